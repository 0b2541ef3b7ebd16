"""The as-of store against Feast's own DuckDB store, which joins the slow way, as the oracle."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import ibis
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.infra.offline_stores.duckdb import DuckDBOfflineStore
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
from feast.types import Array, Float64, String
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.asof_store import AsofOfflineStore, AsofOfflineStoreConfig

UTC = pa.timestamp("us", "UTC")
NOON = datetime(2024, 3, 10, 12, tzinfo=timezone.utc)
HOUR, DAY, MICROSECOND = timedelta(hours=1), timedelta(days=1), timedelta(microseconds=1)
TTL = timedelta(days=2)
STORES = (AsofOfflineStore, DuckDBOfflineStore)
SCHEMA = {
    "user": pa.string(),
    "shop": pa.string(),
    "happened": UTC,
    "created": UTC,
    "x": pa.float64(),
    "word": pa.string(),
    "tags": pa.list_(pa.string()),
}


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
        self.store = FeatureStore(
            config=RepoConfig(
                project="oracle",
                provider="local",
                registry=str(folder / "registry.db"),
                offline_store={"type": "fathom.asof_store.AsofOfflineStore"},
                online_store={"type": "sqlite", "path": str(folder / "online.db")},
                entity_key_serialization_version=3,
                repo_path=folder,
            )
        )
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
        rows = rows.assign(row=range(len(rows)))
        ours, theirs = (self.job(store, rows, *references, **options) for store in STORES)
        found, oracle = ours.to_arrow(), theirs.to_arrow().sort_by("row")
        assert found["row"].to_pylist() == list(range(len(rows)))
        assert found.column_names == oracle.column_names
        for name in found.column_names:
            assert plain(found[name]) == plain(oracle[name]), name
        return found.drop_columns("row")


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
    assert views.read(entity_rows(("ann", NOON)), "plain:x")["x"].to_pylist() == [3.0]


def test_a_feature_lives_until_its_time_to_live_is_over_and_no_longer(views: Views):
    views.write([feature("ann", NOON, x=1.0, word="kept", tags=["a"])])
    edge = NOON + TTL
    rows = entity_rows(("ann", edge - MICROSECOND), ("ann", edge), ("ann", edge + MICROSECOND))
    found = views.read(rows, "aged:x", "aged:word", "aged:tags")
    assert found["x"].to_pylist() == [1.0, 1.0, None]
    assert found["word"].to_pylist() == ["kept", "kept", None]
    assert found["tags"].to_pylist() == [["a"], ["a"], None]


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


# -- the rest of Feast's interface ---------------------------------------------------------------


def test_features_created_after_the_moment_can_be_left_out(views: Views):
    views.write(
        [
            feature("ann", NOON, created=NOON, x=1.0),
            feature("ann", NOON + HOUR, created=NOON + DAY, x=2.0),
        ]
    )
    rows = entity_rows(("ann", NOON + 2 * HOUR), ("ann", NOON + DAY))
    assert views.read(rows, "plain:x")["x"].to_pylist() == [2.0, 2.0]
    guarded = views.job(AsofOfflineStore, rows, "plain:x", filter_by_created_timestamp=True).to_df()
    assert dict(zip(guarded["event_timestamp"], guarded["x"], strict=True)) == {
        NOON + 2 * HOUR: 1.0,
        NOON + DAY: 2.0,
    }


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


def test_a_result_is_kept_where_it_is_told_and_not_overwritten_unasked(
    views: Views, tmp_path: Path
):
    views.write([feature("ann", NOON, x=1.0)])
    job = views.job(AsofOfflineStore, entity_rows(("ann", NOON)), "plain:x")
    storage = SavedDatasetFileStorage(path=str(tmp_path / "kept.parquet"))
    job.persist(storage)
    assert pq.read_table(tmp_path / "kept.parquet")["x"].to_pylist() == [1.0]
    with pytest.raises(SavedDatasetLocationAlreadyExists, match=r"kept\.parquet"):
        job.persist(storage)
    job.persist(storage, allow_overwrite=True)


@pytest.mark.filterwarnings("ignore:Saving dataset is an experimental feature")
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


# -- against the oracle, at random ---------------------------------------------------------------

KEYS = st.sampled_from(["ann", "bob", None])
SHOPS = st.sampled_from(["north", "south", None])
#: Few distinct moments, so that equal ones and the edges of the time to live are common.
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
            "happened": MOMENTS,
            "created": MOMENTS,
            "x": st.none() | st.floats(-9, 9),
            "word": st.none() | st.sampled_from(["", "a", "b"]),
            "tags": st.none() | st.lists(st.sampled_from(["p", "q"]), max_size=2),
        }
    ),
    max_size=12,
    # Which of two rows of one moment and one creation counts is anybody's guess.
    unique_by=lambda row: (row["user"], row["happened"], row["created"]),
)
ENTITY_ROWS = st.lists(st.tuples(KEYS, SHOPS, MOMENTS), min_size=1, max_size=8)
REFERENCES = [
    f"{view}:{name}" for view in ("plain", "aged", "pair") for name in ("x", "word", "tags")
]


@settings(max_examples=12)  # the oracle takes half a second for each
@given(found=FEATURES, rows=ENTITY_ROWS)
def test_any_table_is_joined_as_feast_joins_it(
    views: Views, found: list[dict[str, Any]], rows: list[tuple[Any, ...]]
):
    views.write(found)
    spine = entity_rows(*rows, names=("user", "shop"))
    views.read(spine, *REFERENCES, "renamed:weight", full_feature_names=True)
