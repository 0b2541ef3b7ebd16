"""The as-of store against Feast's own DuckDB store, which joins the slow way, as the oracle."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.data_format import ParquetFormat
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.infra.offline_stores.duckdb import DuckDBOfflineStore
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.transformation.pandas_transformation import PandasTransformation
from feast.types import Array, Float64, String
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fathom import asof_store
from fathom.asof_store import (
    AsofOfflineStore,
    AsofOfflineStoreConfig,
    EntityRowsError,
    FeatureSourceError,
)

UTC = pa.timestamp("us", "UTC")
NOON = datetime(2024, 3, 10, 12, tzinfo=timezone.utc)
HOUR, DAY, MICROSECOND = timedelta(hours=1), timedelta(days=1), timedelta(microseconds=1)
SECOND = timedelta(seconds=1)
TTL = timedelta(days=2)
STORES = (AsofOfflineStore, DuckDBOfflineStore)
GUARDED = {"filter_by_created_timestamp": True}
#: DuckDB's ``asof_loop_join_threshold``.
LOOKED_UP = 64
SCHEMA = {
    "user": pa.string(),
    "shop": pa.string(),
    "happened": UTC,
    "created": UTC,
    "x": pa.float64(),
    "word": pa.string(),
    "tags": pa.list_(pa.string()),
}


def configured(folder: Path, **offline: Any) -> RepoConfig:
    return RepoConfig(
        project="oracle",
        provider="local",
        registry=str(folder / "registry.db"),
        offline_store={"type": "fathom.asof_store.AsofOfflineStore"} | offline,
        online_store={"type": "sqlite", "path": str(folder / "online.db")},
        entity_key_serialization_version=3,
        repo_path=folder,
    )


class Views:
    """A registry of feature views over one file, which each test writes anew."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "features.parquet"
        self.write([{"user": "ann", "shop": "north", "happened": NOON, "created": NOON}])
        user = Entity(name="user", join_keys=["user"], value_type=ValueType.STRING)
        shop = Entity(name="shop", join_keys=["shop"], value_type=ValueType.STRING)
        fields = [
            Field(name="x", dtype=Float64),
            Field(name="word", dtype=String),
            Field(name="tags", dtype=Array(String)),
        ]
        renamed = [Field(name="weight", dtype=Float64), Field(name="word", dtype=String)]

        def view(name: str, entities: list[Entity], schema: list[Field], **more: Any) -> Any:
            stamped = more.pop("created", "created")
            source = FileSource(
                name=f"{name}_source",
                path=str(self.path),
                timestamp_field="happened",
                created_timestamp_column=stamped,
                field_mapping=more.pop("field_mapping", {}),
            )
            return FeatureView(name=name, entities=entities, schema=schema, source=source, **more)

        views = [
            view("plain", [user], fields, ttl=timedelta(0)),
            view("aged", [user], fields, ttl=TTL),
            view("pair", [user, shop], fields, ttl=timedelta(0)),
            view("unstamped", [user], fields, ttl=timedelta(0), created=""),
            view("renamed", [user], renamed, ttl=TTL, field_mapping={"x": "weight"}),
        ]
        self.store = FeatureStore(config=configured(folder))
        self.store.apply([user, shop, *views])
        self.by_name = {view.name: self.store.get_feature_view(view.name) for view in views}

    def write(self, rows: list[dict[str, Any]], **types: pa.DataType) -> None:
        schema = SCHEMA | types
        table = {n: pa.array([row.get(n) for row in rows], kind) for n, kind in schema.items()}
        pq.write_table(pa.table(table), self.path)

    def job(
        self, store: Any, rows: Any, *references: str, views: Any = None, **options: Any
    ) -> Any:
        names = dict.fromkeys(reference.split(":")[0] for reference in references)
        return store.get_historical_features(
            self.store.config,
            views or [self.by_name[name] for name in names],
            list(references),
            rows,
            self.store.registry,
            "oracle",
            **options,
        )

    def read(self, rows: Any, *references: str, **options: Any) -> pa.Table:
        """What the as-of store returns, after checking that Feast's own store agrees."""
        asked = len(rows)
        # DuckDB looks up a few rows one by one; copies of them make it sort and merge.
        copies = 1 + LOOKED_UP // max(asked, 1)
        rows = pd.concat([rows] * copies, ignore_index=True)
        rows = rows.assign(row=range(len(rows)))
        ours, theirs = (self.job(store, rows, *references, **options) for store in STORES)
        found, oracle = ours.to_arrow(), theirs.to_arrow().sort_by("row")
        assert found["row"].to_pylist() == list(range(len(rows)))
        assert found.column_names == oracle.column_names
        for name in found.column_names:
            assert plain(found[name]) == plain(oracle[name]), name
        few = self.job(AsofOfflineStore, rows[:asked], *references, **options).to_arrow()
        for name in found.column_names:
            assert plain(few[name]) == plain(found[name][:asked]), name
        return few.drop_columns("row")


def plain(column: pa.ChunkedArray) -> list[Any]:
    """Python values that compare as they read: one NaN equals another."""
    if pa.types.is_timestamp(column.type):
        column = column.cast(UTC)
    values = column.to_pylist()
    return ["NaN" if isinstance(v, float) and math.isnan(v) else v for v in values]


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Views]:
    connection, before = ibis.duckdb.connect(), ibis.options.default_backend
    connection.raw_sql("SET TimeZone='UTC'")
    ibis.set_backend(connection)
    yield Views(tmp_path_factory.mktemp("oracle"))
    ibis.options.default_backend = before


def entity_rows(*rows: tuple[Any, ...], names: tuple[str, ...] = ("user",)) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=[*names, "event_timestamp"])


def feature(user: str | None, happened: datetime, **more: Any) -> dict[str, Any]:
    return {"user": user, "happened": happened, "created": happened} | more


# -- one rule at a time --------------------------------------------------------------------------


def test_a_row_sees_the_newest_feature_at_or_before_its_moment(views: Views):
    views.write([feature("ann", NOON, x=1.0), feature("ann", NOON + HOUR, x=2.0)])
    rows = entity_rows(
        ("ann", NOON - MICROSECOND),
        ("ann", NOON),
        ("ann", NOON + HOUR - MICROSECOND),
        ("ann", NOON + HOUR),
        ("ann", NOON + 365 * DAY),
    )
    assert views.read(rows, "plain:x")["x"].to_pylist() == [None, 1.0, 1.0, 2.0, 2.0]


def test_of_features_of_one_moment_the_last_created_counts(views: Views):
    views.write(
        [
            feature("ann", NOON, created=NOON + HOUR, x=2.0),
            feature("ann", NOON, created=NOON + 2 * HOUR, x=3.0),
            feature("ann", NOON, created=NOON, x=1.0),
            feature("ann", NOON, created=None, x=0.0),
            feature("ann", NOON - HOUR, created=NOON + 9 * HOUR, x=-1.0),
        ]
    )
    rows = entity_rows(("ann", NOON), ("ann", NOON + DAY))
    assert views.read(rows, "plain:x")["x"].to_pylist() == [3.0, 3.0]


def test_a_feature_lives_until_its_time_to_live_is_over_and_no_longer(views: Views):
    views.write([feature("ann", NOON, x=1.0, word="kept", tags=["a"])])
    edge = NOON + TTL
    rows = entity_rows(("ann", edge - MICROSECOND), ("ann", edge), ("ann", edge + MICROSECOND))
    found = views.read(rows, "aged:x", "aged:word", "aged:tags")
    assert found["x"].to_pylist() == [1.0, 1.0, None]
    assert found["word"].to_pylist() == ["kept", "kept", None]
    assert found["tags"].to_pylist() == [["a"], ["a"], None]


def test_a_time_to_live_may_reach_back_before_all_time(views: Views):
    views.write([feature("ann", NOON, x=1.0)])
    view = view_of(views.path, ttl=timedelta(days=2_000_000))
    found = views.read(entity_rows(("ann", NOON + 365 * DAY)), "visits:x", views=[view])
    assert found["x"].to_pylist() == [1.0]


def test_missing_values_of_the_newest_row_stay_missing(views: Views):
    views.write(
        [
            feature("ann", NOON, x=1.0, word="old", tags=["old"]),
            feature("ann", NOON + HOUR, x=None, word=None, tags=None),
            feature("bob", NOON, x=math.nan, word="", tags=[]),
        ]
    )
    rows = entity_rows(("ann", NOON + DAY), ("bob", NOON + DAY))
    found = views.read(rows, "plain:x", "plain:word", "plain:tags")
    assert plain(found["x"]) == [None, "NaN"]
    assert found["word"].to_pylist() == [None, ""]
    assert found["tags"].to_pylist() == [None, []]


def test_a_missing_key_matches_nothing_not_even_another(views: Views):
    views.write([feature(None, NOON, x=1.0), feature("ann", NOON, x=2.0)])
    rows = entity_rows((None, NOON), ("ann", NOON), ("stranger", NOON))
    assert views.read(rows, "plain:x")["x"].to_pylist() == [None, 2.0, None]


def test_a_feature_without_a_moment_is_never_seen(views: Views):
    views.write([feature("ann", None, x=1.0), feature("ann", NOON, x=2.0)])
    rows = entity_rows(("ann", NOON - DAY), ("ann", NOON + DAY))
    assert views.read(rows, "plain:x")["x"].to_pylist() == [None, 2.0]


def test_several_keys_must_all_match(views: Views):
    views.write(
        [
            feature("ann", NOON, shop="north", x=1.0),
            feature("ann", NOON + HOUR, shop="south", x=2.0),
            feature("bob", NOON + HOUR, shop="north", x=3.0),
            feature("ann", NOON + HOUR, shop=None, x=4.0),
        ]
    )
    later = NOON + DAY
    rows = entity_rows(
        ("ann", "north", later),
        ("north", "ann", later),
        ("ann", "south", later),
        ("ann", None, later),
        ("bob", "south", later),
        names=("user", "shop"),
    )
    assert views.read(rows, "pair:x")["x"].to_pylist() == [1.0, None, 2.0, None, None]


def test_two_views_are_joined_side_by_side(views: Views):
    views.write([feature("ann", NOON, shop="north", x=1.0, word="w")])
    rows = entity_rows(
        ("ann", "north", NOON), ("ann", "south", NOON + 3 * DAY), names=("user", "shop")
    )
    found = views.read(rows, "pair:x", "aged:word")
    assert found["x"].to_pylist() == [1.0, None]
    assert found["word"].to_pylist() == ["w", None]


def test_a_view_can_be_read_by_another_column_and_name(views: Views):
    views.write([feature("ann", NOON, x=1.0), feature("bob", NOON, x=2.0)])
    friend = views.by_name["plain"].with_name("friend").with_join_key_map({"user": "friend"})
    rows = entity_rows(("ann", "bob", NOON), ("bob", "carl", NOON), names=("user", "friend"))
    both = [views.by_name["plain"], friend]
    found = views.read(rows, "plain:x", "friend:x", views=both, full_feature_names=True)
    assert found["plain__x"].to_pylist() == [1.0, 2.0]
    assert found["friend__x"].to_pylist() == [2.0, None]


def test_full_names_tell_equal_features_of_two_views_apart(views: Views):
    views.write([feature("ann", NOON, x=1.0)])
    rows = entity_rows(("ann", NOON + 3 * DAY))
    found = views.read(rows, "plain:x", "aged:x", full_feature_names=True)
    assert found.column_names == ["user", "event_timestamp", "plain__x", "aged__x"]
    assert (found["plain__x"][0].as_py(), found["aged__x"][0].as_py()) == (1.0, None)


def test_columns_renamed_by_the_source_are_read_by_their_new_name(views: Views):
    views.write([feature("ann", NOON, x=1.5, word="w")])
    rows = entity_rows(("ann", NOON), ("ann", NOON + 3 * DAY))
    found = views.read(rows, "renamed:weight", "renamed:word")
    assert found["weight"].to_pylist() == [1.5, None]


def test_a_source_without_a_created_column_needs_none(views: Views):
    views.write([feature("ann", NOON, x=1.0), feature("ann", NOON + HOUR, x=2.0)])
    rows = entity_rows(("ann", NOON), ("ann", NOON + HOUR))
    assert views.read(rows, "unstamped:x")["x"].to_pylist() == [1.0, 2.0]


def test_entity_rows_keep_their_order_their_copies_and_their_columns(views: Views):
    views.write([feature("ann", NOON, x=1.0), feature("bob", NOON, x=2.0)])
    rows = entity_rows(
        ("bob", NOON), ("ann", NOON + HOUR), ("bob", NOON), ("zoe", NOON), ("ann", NOON)
    ).assign(label=[1, 0, 1, 0, 1])
    rows.index = pd.Index([7, 7, 3, 1, 7])  # labels of rows say nothing about their order
    found = views.read(rows, "plain:x")
    assert found.column_names == ["user", "event_timestamp", "label", "x"]
    assert found["user"].to_pylist() == ["bob", "ann", "bob", "zoe", "ann"]
    assert found["label"].to_pylist() == [1, 0, 1, 0, 1]
    assert found["x"].to_pylist() == [2.0, 1.0, 2.0, None, 1.0]


def test_no_entity_rows_give_no_rows(views: Views):
    views.write([feature("ann", NOON, x=1.0)])
    rows = pd.DataFrame({"user": pd.Series([], dtype=str), "event_timestamp": pd.to_datetime([])})
    found = views.job(AsofOfflineStore, rows, "plain:x", "plain:tags").to_arrow()
    assert (found.num_rows, found.column_names[-2:]) == (0, ["x", "tags"])


def test_no_features_give_nothing_for_any_row(views: Views):
    views.write([])
    found = views.read(entity_rows(("ann", NOON)), "plain:x", "plain:tags")
    assert found["x"].to_pylist() == found["tags"].to_pylist() == [None]


# -- moments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Kolkata"])
def test_a_moment_is_the_same_in_every_time_zone(views: Views, zone: str):
    views.write([feature("ann", NOON, x=1.0), feature("ann", NOON + HOUR, x=2.0)])
    moments = pd.to_datetime([NOON - MICROSECOND, NOON, NOON + HOUR], utc=True)
    rows = pd.DataFrame({"user": "ann", "event_timestamp": moments.tz_convert(zone)})
    found = views.read(rows, "plain:x")
    assert found["x"].to_pylist() == [None, 1.0, 2.0]
    assert found.schema.field("event_timestamp").type == UTC


def test_a_moment_without_a_time_zone_is_taken_as_utc(views: Views):
    views.write([feature("ann", NOON, x=1.0)])
    bare = NOON.replace(tzinfo=None)
    rows = entity_rows(("ann", bare), ("ann", bare - MICROSECOND))
    assert views.read(rows, "plain:x")["x"].to_pylist() == [1.0, None]


def test_features_without_a_time_zone_are_taken_as_utc(views: Views):
    bare = pa.timestamp("us")
    naive = NOON.replace(tzinfo=None)
    views.write([feature("ann", naive, x=1.0)], happened=bare, created=bare)
    rows = entity_rows(("ann", NOON), ("ann", NOON - MICROSECOND))
    assert views.read(rows, "aged:x")["x"].to_pylist() == [1.0, None]


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/Los_Angeles"])
@pytest.mark.parametrize("stamps", [UTC, pa.timestamp("us")])
def test_the_session_of_a_machine_elsewhere_changes_nothing(
    views: Views, zone: str, stamps: pa.DataType
):
    """DuckDB starts in the machine's own time zone."""
    wall = NOON if stamps == UTC else NOON.replace(tzinfo=None)
    views.write([feature("ann", wall, x=1.0)], happened=stamps, created=stamps)
    rows = entity_rows(("ann", NOON - MICROSECOND), ("ann", NOON), ("ann", NOON + TTL))
    ibis.get_backend().raw_sql(f"SET TimeZone='{zone}'")
    found = views.job(AsofOfflineStore, rows, "aged:x").to_arrow()
    assert found["x"].to_pylist() == [None, 1.0, 1.0]
    ibis.get_backend().raw_sql(f"SET TimeZone='{zone}'")
    source, keys, fields = views.by_name["plain"].batch_source, ["user"], ["x"]
    span = ("happened", "created", NOON, NOON)
    latest = AsofOfflineStore.pull_latest_from_table_or_query(
        views.store.config, source, keys, fields, *span
    )
    assert latest.to_arrow()["x"].to_pylist() == [1.0]
    ibis.get_backend().raw_sql(f"SET TimeZone='{zone}'")
    every = AsofOfflineStore.pull_all_from_table_or_query(
        views.store.config, source, keys, fields, *span
    )
    assert every.to_arrow()["x"].to_pylist() == [1.0]


def test_nanoseconds_are_cut_so_that_nothing_later_is_seen(views: Views):
    views.write([feature("ann", NOON, x=1.0), feature("ann", NOON + MICROSECOND, x=2.0)])
    moments = pd.DatetimeIndex([pd.Timestamp(NOON) + pd.Timedelta(999, "ns")])
    rows = pd.DataFrame({"user": ["ann"], "event_timestamp": moments})
    found = views.job(AsofOfflineStore, rows, "plain:x").to_arrow()
    assert found["x"].to_pylist() == [1.0]


# -- features that must have been created --------------------------------------------------------


def test_features_created_after_the_moment_can_be_left_out(views: Views):
    views.write(
        [
            feature("ann", NOON, created=NOON, x=1.0),
            feature("ann", NOON + HOUR, created=NOON + DAY, x=2.0),
        ]
    )
    rows = entity_rows(
        ("ann", NOON + 2 * HOUR), ("ann", NOON + DAY - MICROSECOND), ("ann", NOON + DAY)
    )
    assert views.read(rows, "plain:x")["x"].to_pylist() == [2.0, 2.0, 2.0]
    assert views.read(rows, "plain:x", **GUARDED)["x"].to_pylist() == [1.0, 1.0, 2.0]


def test_a_feature_that_comes_after_a_newer_one_never_counts(views: Views):
    views.write(
        [
            feature("ann", NOON, created=NOON + 3 * HOUR, x=1.0),
            feature("ann", NOON + HOUR, created=NOON + 2 * HOUR, x=2.0),
            feature("ann", NOON + 2 * HOUR, created=NOON + 2 * HOUR, x=3.0),
        ]
    )
    rows = entity_rows(*(("ann", NOON + hours * HOUR) for hours in range(5)))
    found = views.read(rows, "plain:x", **GUARDED)
    assert found["x"].to_pylist() == [None, None, 3.0, 3.0, 3.0]


def test_a_correction_counts_from_when_it_was_made(views: Views):
    views.write(
        [
            feature("ann", NOON, created=NOON, x=1.0),
            feature("ann", NOON, created=NOON + HOUR, x=2.0),
        ]
    )
    rows = entity_rows(("ann", NOON), ("ann", NOON + HOUR - MICROSECOND), ("ann", NOON + HOUR))
    assert views.read(rows, "plain:x", **GUARDED)["x"].to_pylist() == [1.0, 1.0, 2.0]
    assert views.read(rows, "plain:x")["x"].to_pylist() == [2.0, 2.0, 2.0]


def test_a_feature_created_before_its_event_counts_from_the_event_on(views: Views):
    views.write([feature("ann", NOON, created=NOON - DAY, x=1.0)])
    rows = entity_rows(("ann", NOON - HOUR), ("ann", NOON))
    assert views.read(rows, "plain:x", **GUARDED)["x"].to_pylist() == [None, 1.0]


def test_a_feature_that_was_never_created_counts_only_where_that_is_not_asked(views: Views):
    views.write([feature("ann", NOON, created=None, x=1.0)])
    rows = entity_rows(("ann", NOON + DAY))
    assert views.read(rows, "plain:x")["x"].to_pylist() == [1.0]
    assert views.read(rows, "plain:x", **GUARDED)["x"].to_pylist() == [None]


def test_a_feature_ages_from_its_event_not_from_its_creation(views: Views):
    """And one that came too late to live hides the older ones all the same."""
    views.write(
        [
            feature("ann", NOON, created=NOON + DAY, x=1.0),
            feature("bob", NOON, created=NOON + TTL + DAY, x=2.0),
            feature("bob", NOON - HOUR, created=NOON, x=3.0),
        ]
    )
    edge = NOON + TTL
    rows = entity_rows(
        ("ann", edge), ("ann", edge + MICROSECOND), ("bob", edge - HOUR), ("bob", edge + DAY)
    )
    found = views.read(rows, "aged:x", **GUARDED)
    assert found["x"].to_pylist() == [1.0, None, 3.0, None]


def test_a_source_without_creation_times_is_not_filtered_by_them(views: Views):
    views.write([feature("ann", NOON, created=NOON + DAY, x=1.0)])
    rows = entity_rows(("ann", NOON))
    assert views.read(rows, "unstamped:x", **GUARDED)["x"].to_pylist() == [1.0]


# -- planted leaks -------------------------------------------------------------------------------


def test_a_feature_one_second_after_the_exposure_is_not_seen(views: Views):
    """It holds the very label, and nothing but the as-of join stands between."""
    moments = [NOON + hour * HOUR for hour in range(100)]
    labels = [float(hour % 3 == 0) for hour in range(100)]
    leak = [feature("ann", m + SECOND, x=y) for m, y in zip(moments, labels, strict=True)]
    views.write(leak)
    rows = entity_rows(*(("ann", moment) for moment in moments))
    assert views.read(rows, "plain:x")["x"].to_pylist() == [None, *labels[:-1]]
    late = entity_rows(*(("ann", moment + SECOND) for moment in moments))
    assert views.read(late, "plain:x")["x"].to_pylist() == labels  # where it would be seen


def test_a_feature_that_arrived_later_than_its_event_says_is_not_seen(views: Views):
    moments = [NOON + hour * HOUR for hour in range(100)]
    labels = [float(hour % 3 == 0) for hour in range(100)]
    views.write(
        [
            feature("ann", moment - SECOND, created=moment + SECOND, x=label)
            for moment, label in zip(moments, labels, strict=True)
        ]
    )
    rows = entity_rows(*(("ann", moment) for moment in moments))
    assert views.read(rows, "plain:x", **GUARDED)["x"].to_pylist() == [None, *labels[:-1]]
    assert views.read(rows, "plain:x")["x"].to_pylist() == labels  # without the guard


# -- entity rows ---------------------------------------------------------------------------------


def test_categories_and_other_types_of_text_are_keys_like_any_other(views: Views):
    views.write([feature("ann", NOON, x=1.0), feature("bob", NOON, x=2.0)])
    for kind in ("category", "string", "string[pyarrow]", object):
        users = pd.Series(["bob", "zoe", "ann"]).astype(kind)
        found = views.read(pd.DataFrame({"user": users, "event_timestamp": NOON}), "plain:x")
        assert found["x"].to_pylist() == [2.0, None, 1.0]
        assert found["user"].to_pylist() == ["bob", "zoe", "ann"]


def test_keys_that_are_all_missing_find_nothing(views: Views):
    views.write([feature("ann", NOON, x=1.0)])
    assert views.read(entity_rows((None, NOON)), "plain:x")["x"].to_pylist() == [None]


def test_a_missing_moment_finds_nothing(views: Views):
    views.write([feature("ann", NOON, x=1.0)])
    for moments in ([NOON, None], [None, None]):
        times = pd.to_datetime(pd.Series(moments), utc=True)
        rows = pd.DataFrame({"user": "ann", "event_timestamp": times})
        for name in ("plain", "aged", "unstamped"):
            found = views.read(rows, f"{name}:x")
            assert found["x"].to_pylist() == [1.0 if moment else None for moment in moments]


@pytest.mark.parametrize(
    "text", ["2024-03-10T12:00:00Z", "2024-03-10 08:00-04:00", "2024-03-10 12"]
)
def test_moments_may_be_text(views: Views, text: str):
    views.write([feature("ann", NOON, x=1.0), feature("ann", NOON + MICROSECOND, x=2.0)])
    rows = pd.DataFrame({"user": ["ann"], "event_timestamp": [text]})
    assert views.read(rows, "plain:x")["x"].to_pylist() == [1.0]


def test_the_only_column_of_moments_may_have_any_name(views: Views):
    views.write([feature("ann", NOON, x=1.0)])
    rows = entity_rows(("ann", NOON)).rename(columns={"event_timestamp": "shown_at"})
    found = views.read(rows, "plain:x")
    assert found.column_names == ["user", "shown_at", "x"]


def test_what_entity_rows_lack_is_said_all_at_once(views: Views):
    rows = pd.DataFrame({"buyer": ["ann"], "x": [1.0]})
    expected = (
        r"entity_df has the columns \['buyer', 'x'\], but it has no column 'event_timestamp', nor "
        r"exactly one of moments; it lacks \['user'\], by which feature view 'plain' is keyed; its "
        r"\['x'\] are also features of feature view 'plain': rename them, or ask for full feature "
        r"names; it lacks \['shop', 'user'\], by which feature view 'pair' is keyed$"
    )
    with pytest.raises(EntityRowsError, match=expected):
        views.job(AsofOfflineStore, rows, "plain:x", "pair:word")


@pytest.mark.parametrize("kind", ["int64", "float64", object])
def test_moments_that_are_numbers_are_refused(views: Views, kind: Any):
    rows = pd.DataFrame({"user": ["ann"], "event_timestamp": pd.Series([1710072000], dtype=kind)})
    expected = r"its 'event_timestamp' holds numbers: convert them with pandas\.to_datetime"
    with pytest.raises(EntityRowsError, match=expected):
        views.job(AsofOfflineStore, rows, "plain:x")


def test_keys_of_another_kind_are_refused(views: Views):
    views.write([feature("5", NOON, x=1.0)])
    rows = pd.DataFrame({"user": [5], "event_timestamp": [NOON]})
    expected = r"its 'user' is int64, where feature view 'plain' has string: convert it"
    with pytest.raises(EntityRowsError, match=expected):
        views.job(AsofOfflineStore, rows, "plain:x")


# -- the rest of Feast's interface ---------------------------------------------------------------


def test_a_query_is_refused_with_the_remedy(views: Views):
    expected = r"entity_df is a str; this store takes a pandas DataFrame"
    with pytest.raises(TypeError, match=expected):
        views.job(AsofOfflineStore, "SELECT * FROM rows", "plain:x")


def test_arrow_backed_rows_are_read_like_any_other(views: Views):
    views.write([feature("ann", NOON, x=1.0)])
    table = pa.table(
        {
            "user": ["ann", None],
            "event_timestamp": pa.array([NOON, NOON], UTC),
            "lists": pa.array([["a"], None], pa.list_(pa.string())),
        }
    )
    rows = table.to_pandas(types_mapper=pd.ArrowDtype)
    job = views.job(AsofOfflineStore, rows, "plain:x")
    assert job.to_arrow().to_pydict() == {
        "user": ["ann", None],
        "event_timestamp": [NOON, NOON],
        "lists": [["a"], None],
        "x": [1.0, None],
    }
    assert [list(values or []) for values in job.to_df()["lists"]] == [["a"], []]
    assert (job.metadata.min_event_timestamp, job.metadata.max_event_timestamp) == (NOON, NOON)


def test_the_store_is_found_by_its_class_path(views: Views):
    assert isinstance(views.store.config.offline_store, AsofOfflineStoreConfig)
    views.write([feature("ann", NOON, x=1.0, tags=["a", "b"])])
    rows = entity_rows(("ann", NOON), ("zoe", NOON))
    job = views.store.get_historical_features(rows, ["plain:x", "plain:tags"])
    frame = job.to_df()
    assert frame["user"].tolist() == ["ann", "zoe"]
    assert frame["x"].tolist() == pytest.approx([1.0, math.nan], nan_ok=True)
    assert list(frame["tags"][0]) == ["a", "b"]
    assert job.to_arrow()["x"].to_pylist() == [1.0, None]


def test_on_demand_views_are_computed_from_what_the_join_found(views: Views, tmp_path: Path):
    views.write([feature("ann", NOON, x=1.0), feature("ann", NOON + HOUR, x=2.0)])

    def evaluate(inputs):  # Feast resolves annotations, and refuses any but pandas' own
        return inputs[["x"]].rename(columns={"x": "doubled"}) * 2

    doubled = OnDemandFeatureView(
        name="twice",
        sources=[views.by_name["plain"]],
        schema=[Field(name="doubled", dtype=Float64)],
        feature_transformation=PandasTransformation(udf=evaluate, udf_string="twice"),
        mode="pandas",
    )
    views.store.apply([doubled])
    rows = entity_rows(("ann", NOON + HOUR), ("zoe", NOON), ("ann", NOON))
    job = views.store.get_historical_features(rows, ["plain:x", "twice:doubled"])
    assert job.to_arrow()["doubled"].to_pylist() == [4.0, None, 2.0]
    assert job.to_df()["doubled"].tolist() == pytest.approx([4.0, math.nan, 2.0], nan_ok=True)
    job.persist(SavedDatasetFileStorage(path=str(tmp_path / "kept.parquet")))
    assert pq.read_table(tmp_path / "kept.parquet")["doubled"].to_pylist() == [4.0, None, 2.0]


def test_the_rows_of_a_job_are_those_of_its_making(views: Views):
    views.write([feature("ann", NOON, x=1.0)])
    rows = entity_rows(("ann", NOON))
    job = views.job(AsofOfflineStore, rows, "plain:x")
    rows["user"] = "zoe"
    assert job.to_arrow() == job.to_arrow()
    assert job.to_arrow()["x"].to_pylist() == [1.0]


def test_a_result_is_kept_where_it_is_told_and_not_overwritten_unasked(
    views: Views, tmp_path: Path
):
    views.write([feature("ann", NOON, x=1.0, tags=["a"])])
    rows = entity_rows(("ann", NOON), ("zoe", NOON)).assign(label=[1, 0])
    job = views.job(AsofOfflineStore, rows, "plain:x", "aged:tags")
    storage = SavedDatasetFileStorage(path=str(tmp_path / "kept.parquet"))
    job.persist(storage)
    assert pq.read_table(tmp_path / "kept.parquet").to_pydict() == job.to_arrow().to_pydict()
    with pytest.raises(SavedDatasetLocationAlreadyExists, match=r"kept\.parquet"):
        job.persist(storage)
    job.persist(storage, allow_overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.parquet"]


def test_a_folder_of_results_is_replaced_not_added_to(views: Views, tmp_path: Path):
    views.write([feature("ann", NOON, x=1.0)])
    storage = SavedDatasetFileStorage(path=str(tmp_path / "kept"))
    for moment in (NOON - HOUR, NOON):
        job = views.job(AsofOfflineStore, entity_rows(("ann", moment)), "plain:x")
        job.persist(storage, allow_overwrite=True)
    assert pq.read_table(tmp_path / "kept")["x"].to_pylist() == [1.0]


def test_a_result_that_fails_half_way_leaves_the_one_before(
    views: Views, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    views.write([feature("ann", NOON, x=1.0)])
    storage = SavedDatasetFileStorage(path=str(tmp_path / "kept.parquet"))
    job = views.job(AsofOfflineStore, entity_rows(("ann", NOON)), "plain:x")
    job.persist(storage)

    def fill_the_disk(table: pa.Table, path: Path) -> None:
        path.write_bytes(b"PAR1 and so on")
        raise OSError("No space left on device")

    monkeypatch.setattr(pq, "write_table", fill_the_disk)
    with pytest.raises(OSError, match="No space left"):
        job.persist(storage, allow_overwrite=True)
    monkeypatch.undo()
    assert pq.read_table(tmp_path / "kept.parquet")["x"].to_pylist() == [1.0]
    assert [path.name for path in tmp_path.iterdir()] == ["kept.parquet"]


@pytest.mark.filterwarnings("ignore:Saving dataset is an experimental feature")
@pytest.mark.filterwarnings("ignore:Retrieving datasets is an experimental feature")
def test_a_saved_dataset_knows_its_keys_features_and_span(views: Views, tmp_path: Path):
    views.write([feature("ann", NOON, x=1.0)])
    rows = entity_rows(("ann", NOON), ("ann", NOON + DAY)).assign(label=[0, 1])
    job = views.store.get_historical_features(rows, ["plain:x"])
    saved = views.store.create_saved_dataset(
        from_=job,
        name="training",
        storage=SavedDatasetFileStorage(path=str(tmp_path / "saved.parquet")),
    )
    assert (saved.features, saved.join_keys) == (["plain:x"], ["user"])
    assert (saved.min_event_timestamp, saved.max_event_timestamp) == (NOON, NOON + DAY)
    again = views.store.get_saved_dataset("training").to_df()
    assert again[["user", "x"]].values.tolist() == [["ann", 1.0], ["ann", 1.0]]


def test_what_memory_cannot_hold_is_sorted_on_disk(views: Views, tmp_path: Path):
    views.write([feature("ann", NOON + i * SECOND, x=float(i)) for i in range(10)])
    order = np.random.default_rng(0).permutation(400_000)
    moments = pd.Timestamp(NOON) + pd.to_timedelta(order * 25, "us")
    rows = pd.DataFrame({"user": "ann", "event_timestamp": moments})
    scratch = tmp_path / "scratch"
    config = configured(tmp_path, memory_limit="64MB", temp_directory=str(scratch))
    asked = [views.by_name["plain"]], ["plain:x"], rows, views.store.registry, "oracle"
    job = AsofOfflineStore.get_historical_features(config, *asked)
    assert job.to_arrow()["x"].to_pylist() == (order * 25 // 1_000_000).tolist()
    assert [*scratch.iterdir()]
    del job
    gc.collect()
    assert not [*scratch.iterdir()]


# -- sources -------------------------------------------------------------------------------------


def view_of(path: Path | str, **more: Any) -> FeatureView:
    """A view of parquet files at ``path``; not in the registry."""
    source = FileSource(
        name="visits",
        path=str(path),
        file_format=more.pop("file_format", ParquetFormat()),
        timestamp_field="happened",
        created_timestamp_column="created",
    )
    more.setdefault("ttl", TTL)
    user = more.pop("entities", [Entity(name="user", value_type=ValueType.STRING)])
    names = [Field(name="user", dtype=String)] if user else []
    schema = [*names, Field(name="x", dtype=Float64), Field(name="word", dtype=String)]
    return FeatureView(name="visits", entities=user, schema=schema, source=source, **more)


def part(path: Path, rows: list[dict[str, Any]], *names: str) -> Path:
    """A file of features with the columns ``names``, in that order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = names or tuple(SCHEMA)
    columns = {n: pa.array([row.get(n) for row in rows], SCHEMA[n]) for n in names}
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Features in several files, at several depths, and what is not to be read."""
    visits = tmp_path / "visits"
    part(visits / "2024-10.parquet", [feature("ann", NOON, x=1.0, word="w")])
    later = [feature("ann", NOON + DAY, x=2.0), feature("bob", NOON, x=3.0)]
    part(visits / "late" / "2024-11.parquet", later, "x", "created", "happened", "user")
    part(visits / ".2024-12.parquet", [feature("ann", NOON, created=NOON + DAY, x=-1.0)])
    part(visits / ".half-written" / "part.parquet", [feature("zoe", NOON, x=-2.0)])
    (visits / "notes.txt").write_text("not parquet")
    return visits


VISITORS = entity_rows(("ann", NOON), ("ann", NOON + DAY), ("bob", NOON), ("zoe", NOON))


@pytest.mark.parametrize("pattern", ["", "**/*.parquet", "**/", "../vis*"])
def test_a_folder_is_read_with_all_below_it_but_what_is_hidden(
    views: Views, folder: Path, pattern: str
):
    view = view_of(f"{folder}/{pattern}" if pattern else folder)
    job = views.job(AsofOfflineStore, VISITORS, "visits:x", "visits:word", views=[view])
    found = job.to_arrow()
    assert found["x"].to_pylist() == [1.0, 2.0, 3.0, None]
    assert found["word"].to_pylist() == ["w", None, None, None]


def test_a_path_may_be_relative_to_the_repository_or_to_the_working_folder(
    views: Views, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    part(views.path.parent / "own" / "a.parquet", [feature("ann", NOON, x=7.0)])
    monkeypatch.chdir(folder.parent)
    for path, expected in (("own", 7.0), ("visits", 1.0)):
        job = views.job(AsofOfflineStore, VISITORS, "visits:x", views=[view_of(path)])
        assert job.to_arrow()["x"][0].as_py() == expected


def test_sources_of_other_kinds_are_read_by_feast(views: Views, tmp_path: Path):
    path = part(tmp_path / "far.parquet", [feature("ann", NOON, x=1.0)])
    job = views.job(AsofOfflineStore, VISITORS, "visits:x", views=[view_of(f"file://{path}")])
    assert job.to_arrow()["x"].to_pylist() == [1.0, 1.0, None, None]


def span_of(pull: Callable[..., Any], views: Views, source: FileSource, *fields: str) -> pa.Table:
    names = (["user"], list(fields), "happened", "created")
    return pull(views.store.config, source, *names, NOON - DAY, NOON + 2 * DAY).to_arrow()


def test_a_folder_can_be_applied_and_materialised(views: Views, tmp_path: Path):
    part(tmp_path / "visits" / "1.parquet", [feature("ann", NOON, x=1.0), feature("bob", NOON)])
    part(tmp_path / "visits" / "2.parquet", [feature("ann", NOON + HOUR, x=2.0)], *SCHEMA)
    views.store.apply([view_of(tmp_path / "visits")])
    views.store.materialize(NOON - DAY, NOON + DAY, feature_views=["visits"])
    asked = [{"user": "ann"}, {"user": "bob"}, {"user": "zoe"}]
    found = views.store.get_online_features(["visits:x"], asked).to_dict()
    assert found["x"] == [2.0, None, None]


def test_materialisation_reads_folders_too(views: Views, folder: Path):
    source = view_of(folder).batch_source
    latest = span_of(AsofOfflineStore.pull_latest_from_table_or_query, views, source, "x")
    assert sorted(zip(latest["user"].to_pylist(), latest["x"].to_pylist(), strict=True)) == [
        ("ann", 2.0),
        ("bob", 3.0),
    ]
    every = span_of(AsofOfflineStore.pull_all_from_table_or_query, views, source, "x", "word")
    assert sorted(every["x"].to_pylist()) == [1.0, 2.0, 3.0]


def test_the_newest_row_is_whole_even_where_it_has_no_value(views: Views):
    """It was written last of those of the newest moment, and what it lacks stays lacking."""
    views.write(
        [
            feature("ann", NOON + HOUR, x=2.0, word="old", tags=["a"], created=NOON + HOUR),
            feature("ann", NOON + HOUR, x=None, word="new", tags=None, created=NOON + DAY),
            feature("ann", NOON + HOUR, x=3.0, word="unstamped", tags=["b"], created=None),
            feature("ann", NOON, x=1.0, word="older", tags=["c"], created=NOON + 2 * DAY),
        ]
    )
    source = views.by_name["plain"].batch_source
    found = span_of(AsofOfflineStore.pull_latest_from_table_or_query, views, source, "x", "word")
    assert (found["x"].to_pylist(), found["word"].to_pylist()) == ([None], ["new"])


def test_materialisation_reads_what_feast_reads(views: Views):
    moments = [NOON, NOON, NOON + HOUR, NOON + 3 * DAY, None]
    views.write(
        [
            feature(user, moment, created=created, x=float(i))
            for i, (user, moment, created) in enumerate(
                (user, moment, created)
                for user in ("ann", "bob", None)
                for moment, created in zip(
                    moments, [NOON, NOON + DAY, None, NOON, NOON], strict=True
                )
            )
        ]
    )
    source = views.by_name["plain"].batch_source
    for name in ("pull_latest_from_table_or_query", "pull_all_from_table_or_query"):
        ours, theirs = (span_of(getattr(store, name), views, source, "x") for store in STORES)
        assert ours.num_rows > 0
        assert ours.sort_by("x").to_pydict() == theirs.sort_by("x").to_pydict()


def test_a_file_that_is_added_later_is_read_by_the_next_job(views: Views, folder: Path):
    view = view_of(folder)
    job = views.job(AsofOfflineStore, VISITORS, "visits:x", views=[view])
    added = part(folder / ".new", [feature("zoe", NOON, x=9.0)])
    added.rename(folder / "2025-01.parquet")
    assert job.to_arrow()["x"].to_pylist() == [1.0, 2.0, 3.0, None]
    job = views.job(AsofOfflineStore, VISITORS, "visits:x", views=[view])
    assert job.to_arrow()["x"].to_pylist() == [1.0, 2.0, 3.0, 9.0]


def test_a_view_without_entities_has_the_same_newest_row_for_all(views: Views, folder: Path):
    view = view_of(folder, entities=[])
    job = views.job(AsofOfflineStore, VISITORS, "visits:word", views=[view])
    assert job.to_arrow()["word"].to_pylist()[1] is None
    rows = pd.DataFrame({"event_timestamp": [NOON - HOUR, NOON + DAY]})
    found = views.job(AsofOfflineStore, rows, "visits:x", views=[view]).to_arrow()
    assert found["x"].to_pylist() == [None, 2.0]


@pytest.mark.parametrize("there", [True, False])
def test_a_source_without_files_is_named_with_the_remedy(views: Views, tmp_path: Path, there: bool):
    empty = tmp_path / "empty"
    if there:
        part(empty / ".hidden.parquet", [])
    view = view_of(empty)
    said = rf"source 'visits' has no parquet files at {empty}: run what writes them, or correct"
    with pytest.raises(FeatureSourceError, match=rf"^feature view 'visits': {said} the path$"):
        views.job(AsofOfflineStore, VISITORS, "visits:x", views=[view])
    for name in ("pull_latest_from_table_or_query", "pull_all_from_table_or_query"):
        with pytest.raises(FeatureSourceError, match=said):
            span_of(getattr(AsofOfflineStore, name), views, view.batch_source, "x")


def test_a_column_that_a_source_lacks_is_named_with_the_file(views: Views, tmp_path: Path):
    path = part(tmp_path / "short.parquet", [feature("ann", NOON)], "user", "happened", "word")
    view = view_of(path)
    said = rf"{path} has no columns \['created', 'x'\], only \['happened', 'user', 'word'\]"
    missing = view_of(tmp_path / "none").with_name("other")
    with pytest.raises(
        FeatureSourceError,
        match=rf"^feature view 'visits': {said}: write them, or ask for others; "
        r"feature view 'visits': source 'visits' has no parquet files",
    ):
        views.job(AsofOfflineStore, VISITORS, "visits:x", "other:x", views=[view, missing])
    for name in ("pull_latest_from_table_or_query", "pull_all_from_table_or_query"):
        with pytest.raises(FeatureSourceError, match=said):
            span_of(getattr(AsofOfflineStore, name), views, view.batch_source, "x")


def test_a_view_that_is_only_pushed_to_has_no_history(views: Views):
    view = view_of("anywhere")
    view.batch_source = None
    with pytest.raises(FeatureSourceError, match="'visits': it has no batch source"):
        views.job(AsofOfflineStore, VISITORS, "visits:x", views=[view])


@pytest.mark.parametrize("limit", ["2", "lots", "-1GB", "50%"])
def test_a_limit_of_memory_has_a_unit(limit: str):
    with pytest.raises(ValidationError, match="memory_limit"):
        AsofOfflineStoreConfig(memory_limit=limit)


# -- against the oracle, at random ---------------------------------------------------------------

KEYS = st.sampled_from(["ann", "bob", None])
SHOPS = st.sampled_from(["north", "south", None])
#: Few distinct moments, so that equal ones and the edges of the time to live are common, and a
#: feature is created before, at and after its event and others'.
MOMENTS = st.builds(
    lambda days, offset: NOON + days * DAY + offset,
    st.integers(0, 5),
    st.sampled_from([timedelta(0), MICROSECOND, -MICROSECOND]),
)
FEATURES = st.lists(
    st.fixed_dictionaries(
        {
            "user": KEYS,
            "shop": SHOPS,
            "happened": st.none() | MOMENTS,
            "created": st.none() | MOMENTS,
            "x": st.none() | st.floats(-9, 9),
            "word": st.none() | st.sampled_from(["", "a", "b"]),
            "tags": st.none() | st.lists(st.sampled_from(["p", "q"]), max_size=2),
        }
    ),
    max_size=30,
    # Which of two rows of one moment and one creation counts is anybody's guess.
    unique_by=lambda row: (row["user"], row["happened"], row["created"]),
)
ENTITY_ROWS = st.lists(st.tuples(KEYS, SHOPS, st.none() | MOMENTS), min_size=1, max_size=20)
REFERENCES = [
    f"{view}:{name}" for view in ("plain", "aged", "pair") for name in ("x", "word", "tags")
]


@pytest.mark.parametrize("guarded", [False, True])
@settings(max_examples=10)  # the oracle takes half a second for each
@given(found=FEATURES, rows=ENTITY_ROWS)
def test_any_table_is_joined_as_feast_joins_it(
    views: Views, guarded: bool, found: list[dict[str, Any]], rows: list[tuple[Any, ...]]
):
    views.write(found)
    spine = entity_rows(*rows, names=("user", "shop"))
    spine["event_timestamp"] = pd.to_datetime(spine["event_timestamp"], utc=True)
    options = {"full_feature_names": True, "filter_by_created_timestamp": guarded}
    views.read(spine, *REFERENCES, "renamed:weight", **options)


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("few", [0, 100_000])
def test_a_long_history_is_joined_as_feast_joins_it(
    views: Views, guarded: bool, few: int, monkeypatch: pytest.MonkeyPatch
):
    """Many keys and rows, most of them created late and out of order."""
    monkeypatch.setattr(asof_store, "_FEW_ROWS", few)
    random = np.random.default_rng(11)
    minutes, delays = random.integers(0, 20_000, 4000), random.integers(-600, 6000, 4000)
    moments = [NOON + timedelta(minutes=int(minute)) for minute in minutes]
    views.write(
        [
            feature(
                f"u{random.integers(300)}",
                moment,
                shop=f"s{random.integers(3)}",
                created=moment + timedelta(minutes=int(delay), microseconds=i),
                x=float(i),
            )
            for i, (moment, delay) in enumerate(zip(moments, delays, strict=True))
        ]
    )
    rows = pd.DataFrame(
        {
            "user": [f"u{i}" for i in random.integers(0, 301, 3000)],
            "shop": [f"s{i}" for i in random.integers(0, 3, 3000)],
            "event_timestamp": NOON + pd.to_timedelta(random.integers(0, 21_000, 3000), "min"),
        }
    )
    options = {"full_feature_names": True, "filter_by_created_timestamp": guarded}
    found = views.read(rows, "plain:x", "aged:x", "pair:x", **options)
    ever, both, lately = (found[f"{view}__x"].null_count for view in ("plain", "pair", "aged"))
    assert 0 < ever < min(both, lately) < 3000  # keys and the time to live count
