"""The feature store on a small generated world: what it registers, joins, and gives back."""

from __future__ import annotations

import math
import shutil
import signal
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml
from pydantic import ValidationError

import forks
import small_store
from fathom import features
from fathom.batch import Ragged
from fathom.encoding import FrameError, evaluate_cross
from fathom.feature_store import (
    FeatureRepo,
    FeatureStoreConfig,
    FeatureStoreError,
    frame_of,
    to_arrow,
    write_parquet,
)
from fathom.features import stored_name
from fathom.online_tables import Tables
from fathom.spec import FeatureSpec
from small_store import COLUMNS, CROSSES, DAY, SECOND, SPEC, START, a_spec, a_table

TEXTS = pa.list_(pa.string())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> small_store.Store:
    """The whole world, applied and materialised; tests read it and change nothing."""
    return small_store.ready(tmp_path_factory.mktemp("store"))


def spine_of(store: small_store.Store) -> pa.Table:
    """The logged exposures with the probes behind them, shuffled."""
    logged = store.tables["exposures"].drop_columns("arrival_timestamp")
    spine = pa.concat_tables([logged, small_store.probes(store)], promote_options="default")
    return spine.take(np.random.default_rng(1).permutation(len(spine)))


@pytest.fixture(scope="module")
def spine(store: small_store.Store) -> pa.Table:
    return spine_of(store)


@pytest.fixture(scope="module")
def frame(store: small_store.Store, spine: pa.Table) -> pa.Table:
    return store.repo.training_frame(spine, SPEC)


def named(names: str, **more: dict[str, Any]) -> list[dict[str, Any]]:
    """Columns of the small world by name, in its order; others as given."""
    wanted = names.split()
    return [c | more.get(c["name"], {}) for c in COLUMNS if c["name"] in wanted]


# -- what is registered --------------------------------------------------------------------------


def registered(repo: FeatureRepo) -> dict[str, set[str]]:
    found = repo.open()
    return {
        "entities": {e.name for e in found.list_entities()} - {"__dummy"},
        "views": {view.name for view in found.list_batch_feature_views()},
        "crosses": {view.name for view in found.list_on_demand_feature_views()},
        "services": {service.name for service in found.list_feature_services()},
        "sources": {source.name for source in found.list_data_sources()},
    }


def test_the_registry_holds_exactly_the_objects_of_the_spec(store: small_store.Store):
    views = {
        *("users", "items"),
        *("user_id_interactions", "user_id_exposures"),
        *("user_id_item_id_interactions", "user_id_item_id_interactions_packed"),
        *("user_id_genre_interactions", "user_id_genre_interactions_packed"),
        *("user_id_shop_genre_interactions", "user_id_shop_genre_interactions_packed"),
        *("user_id_tier_interactions", "user_id_tier_interactions_packed"),
        *("item_id_interactions", "item_id_exposures", "genre_interactions", "shop_interactions"),
        *("shop_item_id_interactions", "slot_item_id_exposures"),
        *("tier_interactions", "tier_genre_exposures"),
    }
    crosses = {
        *("user_id_x_genre", "genre_x_shop", "recent_genres_x_genre", "searches_x_genre"),
        *("recent_genres_x_tags_x_slot", "user_acts_x_genre", "item_rate_4d_x_discount"),
        "pair_share_x_user_recency",
    }
    from_request = crosses - {"recent_genres_x_genre", "user_acts_x_genre"}
    assert registered(store.repo) == {
        "entities": {"user_id", "item_id", "genre", "shop", "slot", "tier"},
        "views": views,
        "crosses": {f"cross_{name}" for name in crosses},
        "services": {"wide", "deep", "ranker"},
        "sources": {f"{v}_source" for v in views} | {f"context_{name}" for name in from_request},
    }


def test_objects_say_what_they_are(store: small_store.Store):
    found = store.repo.open()
    user, view = found.get_entity("user_id"), found.get_feature_view("user_id_interactions")
    assert (user.join_key, user.tags) == ("user_id", {"owner": "user"})
    assert view.tags == {"spec": SPEC.hash[:12], "owner": "user"}
    assert view.description.startswith("user_id_interactions: user_acts, user_acts_3d")
    owners = {v.name: v.tags["owner"] for v in found.list_batch_feature_views()}
    assert owners["shop_item_id_interactions"] == "context"
    assert owners["item_id_interactions"] == owners["genre_interactions"] == "item"
    assert owners["tier_genre_exposures"] == "user"
    online = {v.name for v in found.list_batch_feature_views() if v.online}
    assert online == {"users", "user_id_interactions", "user_id_exposures"} | {
        name for name in owners if name.endswith("_packed")
    }


def test_fields_have_the_types_of_their_columns(store: small_store.Store):
    found = store.repo.open()

    def types(view: str) -> dict[str, str]:
        return {f.name: str(f.dtype) for f in found.get_feature_view(view).features}

    assert types("users") == {"tier": "String", "age": "Float64", "hobbies": "Array(String)"}
    assert types("user_id_interactions") == {
        "user_acts": "Int64",
        "user_acts_3d": "Int64",
        "user_spent": "Float64",
        "user_recency__last_us": "Int64",
        "recent_genres": "Array(String)",
        "recent_items": "Array(String)",
    }
    pair = "user_id_item_id_interactions"
    assert types(f"{pair}_packed") == {
        f"{pair}__item_id": "Array(String)",
        f"{pair}__pair_acts": "Array(Int64)",
        f"{pair}__pair_recency__last_us": "Array(Int64)",
        f"{pair}__pair_mean_2d": "Array(Float64)",
    }


def fields(store: Any, service: str) -> set[str]:
    projections = store.get_feature_service(service).feature_view_projections
    return {f"{p.name}:{feature.name}" for p in projections for feature in p.features}


def test_the_wide_service_is_what_the_wide_part_reads(store: small_store.Store):
    """Wide columns and parts of crosses, of a ratio its own parts; keys are the rows' own."""
    crosses = {f"cross_{cross.name}:{cross.name}" for cross in SPEC.crosses}
    assert fields(store.repo.open(), "wide") == crosses | {
        *("items:genre", "items:tags"),
        *("user_id_interactions:recent_genres", "user_id_interactions:user_acts"),
        "user_id_interactions:user_recency__last_us",
        "user_id_item_id_interactions:pair_acts",
        "item_id_exposures:item_rate_4d",
    }


def test_the_deep_service_is_what_the_deep_part_reads(store: small_store.Store):
    found = fields(store.repo.open(), "deep")
    deep = {c.name: c for c in SPEC.columns if c.deep and c.ratio is None}
    held = {
        stored_name(c) if c.aggregate else name
        for name, c in deep.items()
        if c.owner != "context" and name not in SPEC.keys
    }
    # `price` is no deep column of its own, but the deep ratio `price_share` is made of it.
    assert {name.split(":")[1] for name in found} == held | {"price"}
    assert "items:tags" not in found
    assert not any("packed" in name or "cross" in name for name in found)


def test_the_ranker_service_has_everything_but_pickled_code(store: small_store.Store):
    found = store.repo.open()
    views = {p.name for p in found.get_feature_service("ranker").feature_view_projections}
    assert views == registered(store.repo)["views"]
    assert not views & registered(store.repo)["crosses"]


def test_a_spec_without_crosses_and_attributes_is_enough(tmp_path: Path):
    spec = a_spec(named("user_id item_id user_acts", user_id={"wide": False}), [])
    made = small_store.written(tmp_path, spec, small_store.generated())
    made.repo.apply(spec)
    assert registered(made.repo) == {
        "entities": {"user_id", "item_id"},
        "views": {"user_id_interactions"},
        "crosses": set(),
        "services": {"deep", "ranker"},  # nothing is wide
        "sources": {"user_id_interactions_source"},
    }


def test_what_the_spec_no_longer_has_is_removed(tmp_path: Path):
    before = a_spec(
        named("user_id item_id genre shop user_acts genre_acts pair_acts"),
        [{"columns": ["genre", "shop"]}],
    )
    made = small_store.written(tmp_path, before, small_store.generated())
    made.repo.apply(before)
    assert registered(made.repo)["crosses"] == {"cross_genre_x_shop"}
    assert registered(made.repo)["services"] == {"wide", "deep", "ranker"}
    vectors = np.ones((1, 2), np.float32)
    made.repo.publish_embeddings("v1", {"genre_vectors": ("genre", ["tea"], vectors)})
    after = a_spec(named("user_id item_id shop user_acts", user_id={"wide": False}), [])
    made.repo.apply(after)
    assert registered(made.repo) == {
        "entities": {"user_id", "item_id", "genre"},
        "views": {"user_id_interactions", "genre_vectors_v1"},
        "crosses": set(),
        # The embeddings are the ranker's, not the spec's: they stay until the next ones come.
        "services": {"deep", "ranker", "embeddings"},
        "sources": {"user_id_interactions_source", "genre_vectors_v1_source"},
    }
    assert fields(made.repo.open(), "deep") == {"user_id_interactions:user_acts"}
    read = made.repo.open().get_online_features(
        ["genre_vectors_v1:embedding"], [{"genre": "tea"}, {"genre": "rye"}]
    )
    assert read.to_dict()["embedding"] == [[1.0, 1.0], None]
    once = registered(made.repo)
    made.repo.apply(after)  # again, which changes nothing
    assert registered(made.repo) == once


def test_all_missing_sources_are_named_together(tmp_path: Path):
    spec = a_spec(named("user_id item_id genre user_acts pair_acts"), [])
    repo = FeatureRepo(FeatureStoreConfig(folder="nowhere"), tmp_path)
    expected = (
        r"no source for feature views \['items', 'user_id_interactions', "
        r"'user_id_item_id_interactions', 'user_id_item_id_interactions_packed'\] in "
        rf"{tmp_path}/nowhere; run the features pipeline"
    )
    with pytest.raises(FeatureStoreError, match=expected):
        repo.apply(spec)
    assert not (tmp_path / "nowhere").exists()


def test_settings_are_written_for_feasts_own_tools_and_only_when_they_change(
    store: small_store.Store,
):
    path = store.repo.folder / "feature_store.yaml"
    settings = yaml.safe_load(path.read_text())
    assert settings["offline_store"] == {"type": "fathom.asof_store.AsofOfflineStore"}
    assert settings["online_store"]["path"] == f"{store.repo.folder}/online.db"
    assert settings["registry"]["path"] == (
        f"sqlite:///{store.repo.folder}/registry.db?timeout=60"  # seconds, for concurrent readers
    )
    before = path.stat()
    store.repo.open()
    assert path.stat().st_ino == before.st_ino
    assert path.stat().st_mtime_ns == before.st_mtime_ns


def listed(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Everything in a folder and the folder itself: identity, size and moment of change."""
    states = {path: path.stat() for path in (folder, *folder.rglob("*"))}
    return {str(p): (s.st_ino, s.st_size, s.st_mtime_ns) for p, s in states.items()}


@pytest.mark.parametrize("writable", [True, False])
def test_opening_for_serving_writes_nothing(
    store: small_store.Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: bool
):
    """A service may see the features through a mount that can only be read.

    Who may do anything may write to any folder, so what `os.access` says is given here too.
    """
    online = {"type": "sqlite", "path": str(tmp_path / "online.db")}
    config = store.repo.config.model_copy(update={"online_store": online})
    repo = FeatureRepo(config, store.repo.root)
    before = listed(repo.folder)
    modes = {path: path.stat().st_mode for path in (repo.folder, *repo.folder.rglob("*"))}
    if not writable:
        for path, mode in modes.items():
            path.chmod(mode & ~0o222)
        monkeypatch.setattr("fathom.feature_store.os.access", lambda *_: False)
        monkeypatch.setattr("fathom.files.locked", lambda *_, **__: pytest.fail("it writes"))
    try:
        repo.check(store.spec)
        Tables.load(repo, store.spec)
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    assert listed(repo.folder) == before


def test_a_state_of_one_registry_never_passes_for_that_of_another(
    store: small_store.Store, tmp_path: Path
):
    """Feast caches what a registry holds by the address of its state, which is soon used again."""
    other = FeatureRepo(FeatureStoreConfig(folder="other"), tmp_path)
    versions = set()
    for k in range(30):
        opened, expected = ((store.repo, 8), (other, 0))[k % 2]
        registry = opened.open().registry
        found = registry.list_on_demand_feature_views("fathom", allow_cache=True)
        assert len(found) == expected
        versions.add(registry.cached_registry_proto.version_id)
        registry.refresh()
        versions.add(registry.cached_registry_proto.version_id)
    assert len(versions) == 60  # all different, so that addresses do not matter


def test_unknown_settings_are_refused():
    with pytest.raises(ValidationError, match="foldr"):
        FeatureStoreConfig(foldr="data")


# -- the training frame --------------------------------------------------------------------------


def test_the_frame_has_the_spines_rows_in_order_and_every_column_of_the_spec(
    spine: pa.Table, frame: pa.Table
):
    assert frame.num_rows == spine.num_rows
    for name in ("request_id", "user_id", "item_id", "event_timestamp", "shop", "bought"):
        assert frame[name].to_pylist() == spine[name].to_pylist()
    assert sorted(frame.column_names) == sorted({*spine.column_names, *SPEC.by_name})
    numeric = {c.name for c in SPEC.columns if c.is_numeric}
    assert {frame.schema.field(name).type for name in numeric} == {pa.float32()}


def test_the_frame_starts_with_the_spine_and_ends_with_numbers_in_the_order_of_the_spec(
    spine: pa.Table, frame: pa.Table
):
    kept = [name for name in spine.column_names if name != "discount"]
    assert frame.column_names[: len(kept)] == kept
    numeric = [c.name for c in SPEC.columns if c.is_numeric]
    assert frame.column_names[-len(numeric) :] == numeric


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def known_before(rows: list[dict[str, Any]], moment: datetime) -> list[dict[str, Any]]:
    """Rows that had happened and arrived strictly before the last boundary at a moment."""
    boundary = START + (moment - START) // DAY * DAY
    return [
        row
        for row in rows
        if max(row["event_timestamp"], row["arrival_timestamp"] or row["event_timestamp"])
        < boundary
    ]


def test_each_exposure_sees_what_was_known_strictly_before_it(
    store: small_store.Store, frame: pa.Table
):
    """Counts, rates and histories recomputed in Python, row by row, from the logs."""
    genres: dict[str, list[tuple[datetime, str | None]]] = {}
    for row in rows_of(store.tables["items"]):
        genres.setdefault(row["item_id"], []).append((row["event_timestamp"], row["genre"]))

    def genre(item: str, moment: datetime) -> str | None:
        held = [value for start, value in genres.get(item, []) if start <= moment]
        return held[-1] if held else None

    acts, shown = (rows_of(store.tables[n]) for n in ("interactions", "exposures"))
    for row in rows_of(frame)[:150]:
        moment, user, item = row["event_timestamp"], row["user_id"], row["item_id"]
        assert row["genre"] == genre(item, moment)
        before = known_before(acts, moment)
        own = [act for act in before if act["user_id"] == user]
        pair = [act for act in own if act["item_id"] == item]
        assert row["user_acts"] == len(own)
        assert row["pair_acts"] == len(pair)
        assert row["pair_share"] == np.float32(len(pair) / (len(own) + 1))
        same = [a for a in own if row["genre"] == genre(a["item_id"], a["event_timestamp"])]
        assert row["user_genre_acts"] == (len(same) if row["genre"] is not None else 0)
        labels = [s["bought"] for s in known_before(shown, moment) if s["user_id"] == user]
        assert row["user_rate"] == np.float32((sum(labels) + 1) / (len(labels) + 5))
        newest = max((act["event_timestamp"] for act in own), default=None)
        if newest is None:
            assert math.isnan(row["user_recency"])
            assert not row["recent_items"]
        else:
            assert row["user_recency"] == np.float32((moment - newest) / DAY)
            assert set(row["recent_items"]) <= {act["item_id"] for act in own}
            assert len(row["recent_items"]) == min(4, len(own))


def test_who_and_what_is_unknown_gets_defaults(store: small_store.Store):
    stranger = {
        "request_id": "r",
        "user_id": "nobody",
        "item_id": "nothing",
        "event_timestamp": START + 40 * DAY,
        "shop": None,
        "slot": "top",
        "discount": None,
        "searches": None,
    }
    row = rows_of(store.repo.training_frame(a_table([stranger]), SPEC))[0]
    counts = ("user_acts", "pair_acts", "item_acts", "shop_item_acts_5d", "user_spent", "tier_acts")
    assert [row[name] for name in counts] == [0.0] * 6
    assert row["user_rate"] == row["item_rate_4d"] == row["tier_genre_rate"] == np.float32(0.2)
    for name in ("user_recency", "pair_recency", "item_mean", "pair_mean_2d", "age", "price"):
        assert math.isnan(row[name])
    assert (row["pair_share"], row["price_share"], row["tier"], row["genre"]) == (0, 0, None, None)
    frame = frame_of(store.repo.training_frame(a_table([stranger]), SPEC))
    for name in ("recent_genres", "item_shops", "hobbies", "tags", "searches"):
        assert frame[name].lengths.tolist() == [0]


def test_no_exposures_give_an_empty_frame_of_the_same_columns(
    store: small_store.Store, spine: pa.Table, frame: pa.Table
):
    empty = store.repo.training_frame(spine.slice(0, 0), SPEC)
    assert (empty.num_rows, empty.column_names) == (0, frame.column_names)
    assert {c.name: len(frame_of(empty)[c.name]) for c in SPEC.columns} == dict.fromkeys(
        SPEC.by_name, 0
    )


def test_a_spine_without_the_context_is_refused_with_all_that_is_absent(
    store: small_store.Store, spine: pa.Table
):
    spine = spine.drop_columns(["discount", "searches"])
    expected = r"absent columns \['discount', 'searches'\]; the spec needs them"
    with pytest.raises(FrameError, match=expected):
        store.repo.training_frame(spine, SPEC)


# -- planted leaks -------------------------------------------------------------------------------


@contextmanager
def planted(
    store: small_store.Store, view: str, change: Callable[[pa.Table], pa.Table]
) -> Iterator[None]:
    """The source of a view, changed for a while."""
    path = store.repo.source(view)
    aside = path.with_name(f".{path.name}")
    path.rename(aside)
    write_parquet(change(pq.read_table(aside)), path / "1.parquet" if aside.is_dir() else path)
    try:
        yield
    finally:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        aside.rename(path)


def comparable(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose missing numbers equal each other."""
    return {k: "NaN" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}


def exposure(moment: datetime) -> pa.Table:
    return a_table(
        [
            {
                "request_id": "r",
                "user_id": "u1",
                "item_id": "i1",
                "event_timestamp": moment,
                "shop": "north",
                "slot": "top",
                "discount": 0.0,
                "searches": [],
            }
        ]
    )


def test_a_feature_row_one_second_after_the_exposure_never_reaches_it(store: small_store.Store):
    moment = store.until - 5 * DAY + timedelta(hours=3)
    view = "user_id_interactions"
    honest = rows_of(store.repo.training_frame(exposure(moment), SPEC))[0]

    def leak(source: pa.Table) -> pa.Table:
        future = rows_of(source.filter(pc.field("user_id") == "u1"))[-1] | {
            "event_timestamp": moment + SECOND,
            "created_timestamp": moment + SECOND,
            "user_acts": 999,
            "recent_genres": ["leaked"],
        }
        return pa.concat_tables([source, pa.Table.from_pylist([future], source.schema)])

    with planted(store, view, leak):
        guarded = rows_of(store.repo.training_frame(exposure(moment), SPEC))[0]
        later = rows_of(store.repo.training_frame(exposure(moment + SECOND), SPEC))[0]
        rows = rows_of(pq.read_table(store.repo.source(view)))
    assert comparable(guarded) == comparable(honest)
    assert later["user_acts"] == 999  # the planted row is there, a second too late
    # Without the guard (the nearest row in time, whichever side it is on) it would have leaked.
    own = [row for row in rows if row["user_id"] == "u1"]
    nearest = min(own, key=lambda row: abs(row["event_timestamp"] - moment))
    assert nearest["user_acts"] == 999
    assert guarded["user_acts"] != nearest["user_acts"]


def test_an_attribute_of_one_second_later_never_reaches_the_exposure(store: small_store.Store):
    moment = START + 20 * DAY

    def leak(source: pa.Table) -> pa.Table:
        stamps = {"event_timestamp": moment + SECOND, "created_timestamp": moment + SECOND}
        future = {"item_id": "i1", "genre": "leaked", "price": 9.0, "tags": ["leaked"], **stamps}
        return pa.concat_tables([source, pa.Table.from_pylist([future], source.schema)])

    with planted(store, "items", leak):
        guarded = rows_of(store.repo.training_frame(exposure(moment), SPEC))[0]
        later = rows_of(store.repo.training_frame(exposure(moment + SECOND), SPEC))[0]
    assert (guarded["genre"], later["genre"]) == ("tea", "leaked")


def test_a_row_that_arrived_late_never_reaches_exposures_before_its_arrival(tmp_path: Path):
    """It happened on day 1 and arrived on day 3; the exposure in between must not count it."""
    spec = a_spec(named("user_id item_id user_acts user_rate user_recency"), [])
    happened, arrived = START + 1.5 * DAY, START + 3.5 * DAY
    late = {
        "request_id": "r",
        "user_id": "u1",
        "item_id": "i1",
        "event_timestamp": happened,
        "arrival_timestamp": arrived,
        "bought": 1,
    }
    tables = {
        "interactions": a_table([late]),
        "exposures": a_table([late]),
        "users": a_table([{"user_id": "u1", "event_timestamp": START}]),
        "items": a_table([{"item_id": "i1", "event_timestamp": START}]),
    }
    between, after = START + 2.5 * DAY, START + 4.5 * DAY
    spine = a_table(
        [late | {"event_timestamp": moment} for moment in (between, after)],
        *("request_id", "user_id", "item_id", "event_timestamp"),
    )

    def frame(folder: str, **logs: pa.Table) -> list[dict[str, Any]]:
        made = small_store.written(tmp_path / folder, spec, tables | logs)
        made.repo.apply(spec)
        return rows_of(made.repo.training_frame(spine, spec))

    guarded = frame("guarded")
    assert [row["user_acts"] for row in guarded] == [0, 1]
    assert [row["user_rate"] for row in guarded] == [np.float32(0.2), np.float32(2 / 6)]
    assert math.isnan(guarded[0]["user_recency"])
    assert guarded[1]["user_recency"] == 3.0  # the age of the event, not of its arrival
    # Without the guard (logs by event time alone), the first exposure would have seen it.
    leaky = frame(
        "leaky",
        **{n: tables[n].drop_columns("arrival_timestamp") for n in ("interactions", "exposures")},
    )
    assert [row["user_acts"] for row in leaky] == [1, 1]
    assert leaky[0]["user_rate"] == np.float32(2 / 6)


# -- crosses through Feast -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def crossed(
    store: small_store.Store, spine: pa.Table, frame: pa.Table
) -> tuple[pa.Table, dict[str, Any]]:
    """Every cross of every exposure as Feast computes it, and the frame that the encoder sees."""
    import pandas as pd

    asked = spine.select(
        ["user_id", "item_id", "event_timestamp", "shop", "slot", "discount", "searches"]
    )
    for name in ("tier", "pair_share", "user_recency"):
        asked = asked.append_column(name, frame[name])
    references = [f"cross_{cross.name}:{cross.name}" for cross in SPEC.crosses]
    rows = asked.to_pandas(types_mapper=pd.ArrowDtype)
    fetched = store.repo.open().get_historical_features(rows, references).to_arrow()
    return fetched, frame_of(frame)


@pytest.mark.parametrize("cross", SPEC.crosses, ids=lambda cross: cross.name)
def test_a_cross_fetched_from_feast_is_the_encoders_own(
    crossed: tuple[pa.Table, dict[str, Any]], cross: Any
):
    fetched, encoders = crossed
    expected = evaluate_cross(cross, SPEC, encoders)
    found = fetched[cross.name].to_pylist()
    if isinstance(expected, Ragged):
        signed = expected.values.view(np.int64).tolist()
        rows = [signed[start:end] for start, end in pairwise(expected.offsets.tolist())]
        assert [list(keys or []) for keys in found] == rows
        assert sum(map(len, rows)) > 20
    else:
        assert found == expected.view(np.int64).tolist()
        assert len({key for key in found if key}) > 3


def test_kinds_of_crosses_are_all_here(crossed: tuple[pa.Table, dict[str, Any]]):
    """The crosses above would prove little if none were missing, ragged or from the request."""
    fetched, _ = crossed
    assert fetched["user_id_x_genre"].to_pylist().count(0) > 5  # items without a genre
    assert pa.types.is_list(fetched["recent_genres_x_tags_x_slot"].type)
    unknown = [row for row in rows_of(fetched) if row["user_id"] == "u9" and row["genre"] == "tea"]
    assert unknown
    assert all(row["user_acts_x_genre"] != 0 for row in unknown)  # a count of 0, not a missing one


# -- the online side and the newest rows ---------------------------------------------------------


def test_the_newest_row_of_each_key_is_read_from_the_offline_store(store: small_store.Store):
    items = {row["item_id"]: row for row in rows_of(store.repo.latest("items", SPEC))}
    assert len(items) == small_store.ITEMS - 1
    assert set(items["i0"]) == {"item_id", "genre", "price", "tags", "event_timestamp"}
    assert (items["i0"]["genre"], items["i0"]["event_timestamp"]) == ("tea", START + 8 * DAY)
    counts = {
        row["item_id"]: row for row in rows_of(store.repo.latest("item_id_interactions", SPEC))
    }
    acts = rows_of(store.tables["interactions"])
    assert counts["i3"]["item_acts"] == sum(act["item_id"] == "i3" for act in acts)


def test_attributes_without_a_time_of_their_own_are_served_too(tmp_path: Path):
    """Sources stamp them with the first second of 1970."""
    epoch = datetime(1970, 1, 1, tzinfo=timezone.utc)
    spec = a_spec(named("user_id item_id tier genre user_acts"), [])
    tables = small_store.generated() | {
        "users": a_table([{"user_id": "u1", "tier": "gold", "event_timestamp": epoch}]),
        "items": a_table([{"item_id": "i1", "genre": "tea", "event_timestamp": epoch}]),
    }
    made = small_store.written(tmp_path, spec, tables)
    made.repo.apply(spec)
    made.repo.materialise(spec, made.until)
    found = made.repo.open().get_online_features(["users:tier"], [{"user_id": "u1"}]).to_dict()
    assert found["tier"] == ["gold"]
    assert rows_of(made.repo.latest("items", spec))[0]["genre"] == "tea"


def test_a_users_row_online_is_the_newest_as_of_the_moment_asked_for(tmp_path: Path):
    spec = a_spec(named("user_id item_id user_acts"), [])
    made = small_store.written(tmp_path, spec, small_store.generated())
    made.repo.apply(spec)
    acts = [r for r in rows_of(made.tables["interactions"]) if r["user_id"] == "u2"]
    first = min(act["event_timestamp"] for act in acts if act["arrival_timestamp"] is None)
    boundary = START + ((first - START) // DAY + 1) * DAY  # where that act is counted first
    for until in (boundary, made.until):
        made.repo.materialise(spec, until)
        read = made.repo.open().get_online_features(
            ["user_id_interactions:user_acts"], [{"user_id": "u2"}, {"user_id": "nobody"}]
        )
        assert read.to_dict()["user_acts"] == [len(known_before(acts, until)), None]


def online(repo: FeatureRepo, view: str, field: str, users: Sequence[str]) -> list[Any]:
    rows = [{"user_id": user} for user in users]
    found: list[Any] = repo.open().get_online_features([f"{view}:{field}"], rows).to_dict()[field]
    return found


ACTS = "user_id_interactions"


@pytest.fixture
def counted(tmp_path: Path) -> small_store.Store:
    """Users' acts alone, applied; nothing is online."""
    spec = a_spec(named("user_id item_id user_acts"), [])
    made = small_store.written(tmp_path, spec, small_store.generated())
    made.repo.apply(spec)
    return made


def test_a_second_materialisation_writes_only_what_is_new(counted: small_store.Store):
    repo, spec, until = counted.repo, counted.spec, counted.until
    assert repo.materialised(spec) is None
    week = until - 7 * DAY
    assert repo.materialise(spec, week) == {ACTS: small_store.USERS}
    assert repo.materialised(spec) == week
    assert repo.materialise(spec, week) == {ACTS: 0}
    rows = repo.latest(ACTS, spec).filter(pc.field("event_timestamp") > week)
    assert repo.materialise(spec, until) == {ACTS: len(rows)}
    assert repo.materialised(spec) == until


def test_another_computation_is_written_anew(counted: small_store.Store):
    repo, spec, until = counted.repo, counted.spec, counted.until
    repo.materialise(spec, until, {ACTS: "one"})
    with planted(counted, ACTS, lambda rows: changed(rows, "user_acts", pa.array([7] * len(rows)))):
        assert repo.materialise(spec, until, {ACTS: "another"}) == {ACTS: small_store.USERS}
        assert online(repo, ACTS, "user_acts", ["u2"]) == [7]


def test_data_that_went_back_in_time_replace_what_is_online(counted: small_store.Store):
    """A newer value stays where an older one is written, so the newer rows are removed first."""
    repo, spec, until = counted.repo, counted.spec, counted.until
    repo.materialise(spec, until)
    newest = online(repo, ACTS, "user_acts", ["u2"])
    assert repo.materialise(spec, until - 20 * DAY) == {ACTS: small_store.USERS}
    assert online(repo, ACTS, "user_acts", ["u2"]) < newest
    assert repo.materialised(spec) == until - 20 * DAY


def test_rows_that_the_online_store_lost_are_noticed_and_written_again(
    counted: small_store.Store, caplog: pytest.LogCaptureFixture
):
    repo, spec, until = counted.repo, counted.spec, counted.until
    repo.materialise(spec, until)
    held = online(repo, ACTS, "user_acts", ["u2"])
    with sqlite3.connect(repo.folder / "online.db") as database:
        database.execute(f"DELETE FROM fathom_{ACTS}")
    database.close()
    assert online(repo, ACTS, "user_acts", ["u2"]) == [None]
    assert repo.materialise(spec, until) == {ACTS: small_store.USERS}
    assert f"{ACTS}: {small_store.USERS} of the sampled online rows differ" in caplog.text
    assert online(repo, ACTS, "user_acts", ["u2"]) == held


def test_a_store_that_does_not_keep_what_is_written_is_an_error(counted: small_store.Store):
    forgetful = {"type": "odd_stores.ForgetfulSqliteOnlineStore", "path": "{folder}/odd.db"}
    config = counted.repo.config.model_copy(update={"online_store": forgetful})
    repo = FeatureRepo(config, counted.repo.root)
    repo.apply(counted.spec)
    said = rf"8 sampled rows of '{ACTS}' differ .* right after they were written; empty the"
    with pytest.raises(FeatureStoreError, match=said):
        repo.materialise(counted.spec, counted.until)


def child(
    repo: FeatureRepo, spec: FeatureSpec, until: datetime, store: str
) -> tuple[BaseProcess, Path]:
    """A process that materialises, on another class of store over the same file; what it says."""
    code = """
import json, sys
from datetime import datetime
from pathlib import Path
from fathom.feature_store import FeatureRepo, FeatureStoreConfig
from fathom.spec import FeatureSpec
root, config, spec, until = sys.argv[1:]
repo = FeatureRepo(FeatureStoreConfig(**json.loads(config)), Path(root))
repo.materialise(FeatureSpec.from_json(spec), datetime.fromisoformat(until))
"""
    path = {"path": str(repo.folder / "online.db")}
    config = repo.config.model_copy(update={"online_store": {"type": store, **path}})
    arguments = [str(repo.root), config.model_dump_json(), spec.to_json(), until.isoformat()]
    said = Path(tempfile.mkdtemp(dir=repo.root))
    return forks.start("-c", code, *arguments, folder=repo.root, said=said), said / "err"


STORE = FeatureStoreConfig().online_store["type"]


def test_a_killed_materialisation_is_made_good_by_the_next(tmp_path: Path):
    spec = a_spec(named("user_id item_id tier user_acts pair_acts"), [])
    made = small_store.written(tmp_path, spec, small_store.generated())
    made.repo.apply(spec)
    killed, said = child(made.repo, spec, made.until, "odd_stores.DyingSqliteOnlineStore")
    killed.join(600)
    assert killed.exitcode == -signal.SIGKILL, said.read_text()
    # It died in its second view: the first is whole, and nothing says that the rest is.
    assert made.repo.materialised(spec) is None
    made.repo.materialise(spec, made.until)
    users = [f"u{u}" for u in range(small_store.USERS)]
    offline = {row["user_id"]: row["user_acts"] for row in rows_of(made.repo.latest(ACTS, spec))}
    assert online(made.repo, ACTS, "user_acts", users) == [offline[user] for user in users]
    assert made.repo.materialised(spec) == made.until


def test_two_materialisations_at_once_take_turns(counted: small_store.Store):
    repo, spec, until = counted.repo, counted.spec, counted.until
    both = [child(repo, spec, moment, STORE) for moment in (until - 7 * DAY, until)]
    for process, said in both:
        process.join(600)
        assert process.exitcode == 0, said.read_text()
    moment = repo.materialised(spec)
    assert moment in (until - 7 * DAY, until)  # whichever came last
    acts = [r for r in rows_of(counted.tables["interactions"]) if r["user_id"] == "u2"]
    assert online(repo, ACTS, "user_acts", ["u2"]) == [len(known_before(acts, moment))]


# -- a store that is not the spec's --------------------------------------------------------------


def changed(rows: pa.Table, name: str, values: pa.Array) -> pa.Table:
    return rows.set_column(rows.schema.get_field_index(name), name, values)


def test_views_that_were_renamed_or_retyped_are_named_before_anything_is_read(
    counted: small_store.Store,
):
    """Somebody applied another spec; the training frame must not be read with this one."""
    before, repo = counted.spec, counted.repo
    wider = a_spec(named("user_id item_id tier user_acts user_acts_3d pair_acts"), [])
    with pytest.raises(FeatureStoreError) as error:
        repo.training_frame(exposure(counted.until), wider)
    for said in (
        "feature view 'users' is not registered",
        f"'{ACTS}' has no field 'user_acts_3d'",
        "feature view 'user_id_item_id_interactions' is not registered",
        "kedro run --pipelines features,feature_store",
    ):
        assert said in str(error.value)

    def retype(rows: pa.Table) -> pa.Table:
        return changed(rows, "user_acts", rows["user_acts"].cast(pa.string()))

    with (
        planted(counted, ACTS, retype),
        pytest.raises(FeatureStoreError, match=r"column 'user_acts' of .* is string, .* has Int64"),
    ):
        repo.training_frame(exposure(counted.until), before)

    def rename(rows: pa.Table) -> pa.Table:
        names = ["acts" if name == "user_acts" else name for name in rows.column_names]
        return rows.rename_columns(names)

    with (
        planted(counted, ACTS, rename),
        pytest.raises(FeatureStoreError, match=rf"has no column 'user_acts' of '{ACTS}'"),
    ):
        repo.materialise(before, counted.until)


# -- ages ----------------------------------------------------------------------------------------


def test_what_is_older_than_its_view_allows_is_missing_when_it_is_read(tmp_path: Path):
    """u1 acted once, on day 1, which the boundary of day 2 knows; a row lives for two days."""
    act = {"user_id": "u1", "item_id": "i1", "event_timestamp": START + DAY / 2}
    tables = {
        "interactions": a_table([act]),
        "exposures": a_table([act | {"request_id": "r", "bought": 1}]),
        "users": a_table([{"user_id": "u1", "tier": "gold", "event_timestamp": START}]),
        "items": a_table([{"item_id": "i1", "genre": "tea", "event_timestamp": START}]),
    }
    aged = {"user_id_interactions": 2, "items": 1, "genre_interactions": 30}
    columns = named("user_id item_id tier genre user_acts genre_acts")
    spec = a_spec(columns, []).model_copy(update={"max_age_days": aged})
    made = small_store.written(tmp_path, spec, tables)
    made.repo.apply(spec)
    boundary = START + DAY
    moments = [START + DAY, START + DAY + SECOND, boundary + 2 * DAY, boundary + 2 * DAY + SECOND]
    spine = a_table(
        [act | {"request_id": "r", "event_timestamp": moment} for moment in moments],
        *("request_id", "user_id", "item_id", "event_timestamp"),
    )
    frame = made.repo.training_frame(spine, spec)
    assert "items__at_us" not in frame.column_names
    assert frame["user_acts"].to_pylist() == [1, 1, 1, 0]
    assert frame["tier"].to_pylist() == ["gold"] * 4  # users never age here
    assert frame["genre"].to_pylist() == ["tea", None, None, None]
    # An attribute that is too old to be read is too old to be a key.
    assert frame["genre_acts"].to_pylist() == [1, 0, 0, 0]
    view = made.repo.open().get_feature_view("items")
    assert (view.tags["max_age_days"], view.ttl) == ("1", timedelta(0))


def test_a_replay_reads_users_and_tables_as_of_the_moments_that_serving_had_reached(
    counted: small_store.Store,
):
    spec = a_spec(named("user_id item_id user_acts user_recency item_acts"), [])
    made = small_store.written(counted.repo.root / "replay", spec, counted.tables)
    made.repo.apply(spec)
    moment = made.until + timedelta(hours=5)
    user_as_of, tables_as_of = made.until - 9 * DAY, made.until - 14 * DAY
    stamps = [pa.array([m], small_store.STAMP) for m in (user_as_of, tables_as_of)]
    spine = exposure(moment).append_column("user_seen", stamps[0])
    spine = spine.append_column("tables_seen", stamps[1])
    (replayed,) = rows_of(made.repo.training_frame(spine, spec, "user_seen", "tables_seen"))
    (at_user,) = rows_of(made.repo.training_frame(exposure(user_as_of), spec))
    (at_tables,) = rows_of(made.repo.training_frame(exposure(tables_as_of), spec))
    (now,) = rows_of(made.repo.training_frame(exposure(moment), spec))
    assert replayed["user_acts"] == at_user["user_acts"] < now["user_acts"]
    assert replayed["item_acts"] == at_tables["item_acts"] < now["item_acts"]
    # The age of what was known then is as of the request.
    lag = (moment - user_as_of) / DAY
    assert replayed["user_recency"] == pytest.approx(at_user["user_recency"] + lag, abs=1e-5)


# -- embeddings ----------------------------------------------------------------------------------

FIRST = np.array([[1, 0], [0, 1], [1, 1]], np.float32)


def test_embeddings_of_each_version_stay_readable_beside_those_of_the_next(
    counted: small_store.Store,
):
    repo = counted.repo
    tables = {
        "item_embeddings": ("item_id", ["i0", "i1", "i2"], FIRST),
        "user_embeddings": ("user_id", ["u0"], np.ones((1, 4), np.float32)),
    }
    assert not repo.has_embeddings("20240101-aa")
    repo.publish_embeddings("20240101-aa", tables)
    assert repo.has_embeddings("20240101-aa")
    second = {"item_embeddings": ("item_id", ["i2"], FIRST[:1] + 7)}
    repo.publish_embeddings("20240102-bb", second, keep=["20240101-aa"])
    wanted = ["i2", "i0", "never seen"]
    first = repo.embeddings("item_embeddings", "20240101-aa", wanted)
    assert first == [[1.0, 1.0], [1.0, 0.0], None]
    # The next ranker no longer knows i0, and its old vector does not pass for a new one.
    second_vectors = repo.embeddings("item_embeddings", "20240102-bb", wanted)
    assert second_vectors == [[8.0, 7.0], None, None]
    store = repo.open()
    view = store.get_feature_view("item_embeddings_20240101_aa")
    assert view.tags == {"version": "20240101-aa", "width": "2"}
    service = store.get_feature_service("embeddings")
    assert service.tags == {"version": "20240102-bb"}
    names = [projection.name for projection in service.feature_view_projections]
    assert names == ["item_embeddings_20240102_bb"]
    repo.apply(counted.spec)  # the spec's objects come and go without them
    assert repo.embeddings("item_embeddings", "20240102-bb", ["i2"]) == [[8.0, 7.0]]
    assert repo.open().get_entity("item_id").tags == {"owner": "item"}


def test_the_nearest_vectors_are_found_through_feast(counted: small_store.Store):
    """From (2, 1): i2 = (1, 1) is 18 degrees off, i0 = (1, 0) 27 and i1 = (0, 1) 63."""
    tables = {"item_embeddings": ("item_id", ["i0", "i1", "i2"], FIRST)}
    counted.repo.publish_embeddings("v1", tables)
    found = counted.repo.nearest("item_embeddings", "v1", [2.0, 1.0], 2)
    assert [key for key, _ in found] == ["i2", "i0"]
    assert [d for _, d in found] == pytest.approx([1 - 3 / 10**0.5, 1 - 2 / 5**0.5], abs=1e-6)


def test_embeddings_of_champions_long_gone_are_removed(counted: small_store.Store):
    repo = counted.repo
    champions: list[str] = []
    for version in ("v1", "v2", "v3", "v4", "v5"):
        tables = {"item_embeddings": ("item_id", ["i0"], FIRST[:1])}
        repo.publish_embeddings(version, tables, keep=champions)
        champions.append(version)
    left = {v.name for v in repo.open().list_batch_feature_views() if "version" in v.tags}
    assert left == {f"item_embeddings_v{n}" for n in (2, 3, 4, 5)}
    assert [repo.has_embeddings(version) for version in ("v1", "v2")] == [False, True]
    assert not (repo.folder / "embeddings" / "v1").exists()


def test_a_publication_that_was_cut_short_does_not_pass_for_a_whole_one(
    counted: small_store.Store,
):
    tables = {"item_embeddings": ("item_id", ["i0"], FIRST[:1])}
    counted.repo.publish_embeddings("v1", tables)
    broken = {"item_embeddings": ("no_such_key", ["i0"], FIRST[:1])}
    with pytest.raises(Exception, match="no_such_key"):
        counted.repo.publish_embeddings("v2", broken)
    assert not counted.repo.has_embeddings("v2")
    assert counted.repo.open().get_feature_service("embeddings").tags == {"version": "v1"}
    assert counted.repo.embeddings("item_embeddings", "v1", ["i0"]) == [[1.0, 0.0]]
    counted.repo.publish_embeddings("v2", tables)
    assert counted.repo.has_embeddings("v2")


# -- tables and frames ---------------------------------------------------------------------------


def test_a_table_as_a_frame():
    table = pa.table(
        {
            "text": pa.array(["a", None, "a"]),
            "number": pa.array([1.5, None, 2.0]),
            "count": pa.array([3, None, 1], pa.int64()),
            "whole": pa.array([3, 2, 1], pa.int64()),
            "flag": pa.array([True, None, False]),
            "money": pa.array([None, "1.25", "2.50"]).cast(pa.decimal128(9, 2)),
            "many": pa.array([["x", None], None, []], TEXTS),
            "large": pa.array([["x"], ["y", "z"], None], pa.large_list(pa.large_string())),
            "moment": pa.array([START] * 3, pa.timestamp("us", "America/New_York")),
            "nothing": pa.nulls(3),
        }
    )
    frame = frame_of(table)
    assert frame["text"].tolist() == ["a", None, "a"]
    for name, expected in {
        "number": [1.5, math.nan, 2.0],
        "count": [3, math.nan, 1],
        "flag": [1, math.nan, 0],
        "money": [math.nan, 1.25, 2.5],
    }.items():
        np.testing.assert_array_equal(frame[name], np.array(expected), strict=True)
    assert frame["whole"].tolist() == [3, 2, 1]
    many, large = frame["many"], frame["large"]
    assert isinstance(many, Ragged)
    assert isinstance(large, Ragged)
    assert (many.values.tolist(), many.offsets.tolist()) == (["x", None], [0, 2, 2, 2])
    assert (large.values.tolist(), large.offsets.tolist()) == (["x", "y", "z"], [0, 1, 3, 3])
    assert frame["moment"].tolist() == [START.replace(tzinfo=None)] * 3
    assert frame["nothing"].tolist() == [None] * 3


def test_equal_strings_share_one_object():
    texts = frame_of(pa.table({"text": ["".join(["o", "ne"]), "two", "".join(["on", "e"])]}))[
        "text"
    ]
    assert texts[0] is texts[2]


ROUND_TRIPS = {
    "texts": pa.array(["b", None, "a", "b"]),
    "no texts": pa.array([], pa.string()),
    "only nulls": pa.array([None, None], pa.string()),
    "lists": pa.array([["a"], [], ["b", None, "a"]], TEXTS),
    "no lists": pa.array([], TEXTS),
    "empty lists": pa.array([[], []], TEXTS),
    "numbers": pa.array([1.5, -2.0], pa.float64()),
    "integers": pa.array([2**60, -1], pa.int64()),
}


@pytest.mark.parametrize("cuts", [[], [1], [0, 2], [1, 1, 2]], ids=str)
@pytest.mark.parametrize("column", ROUND_TRIPS.values(), ids=ROUND_TRIPS.keys())
def test_a_column_survives_as_a_frame_however_it_is_chunked(column: pa.Array, cuts: list[int]):
    edges = [0, *cuts, len(column)]
    chunks = [column[start:end] for start, end in pairwise(edges)]
    values = frame_of(pa.table({"c": pa.chunked_array(chunks, column.type)}))["c"]
    assert len(values) == len(column)
    assert to_arrow(values).cast(column.type).equals(column)


def test_a_chunked_array_of_no_chunks_is_empty():
    for kind in (pa.string(), TEXTS, pa.float64(), pa.timestamp("us", "UTC")):
        assert len(frame_of(pa.table({"c": pa.chunked_array([], kind)}))["c"]) == 0


def test_a_missing_list_becomes_an_empty_one():
    values = frame_of(pa.table({"c": pa.array([None, ["a"], None], TEXTS)}))["c"]
    assert to_arrow(values).to_pylist() == [[], ["a"], []]


def test_lists_that_were_cut_from_a_longer_array_are_read_right():
    column = pa.array([["out"], ["a", "b"], None, ["c"], ["out"]], TEXTS)[1:4]
    values = frame_of(pa.table({"c": column}))["c"]
    assert isinstance(values, Ragged)
    assert (values.values.tolist(), values.offsets.tolist()) == (["a", "b", "c"], [0, 2, 2, 3])


def test_parquet_is_written_whole_in_microseconds(tmp_path: Path):
    nanoseconds = pa.array([START], pa.timestamp("ns", "UTC"))
    write_parquet(pa.table({"moment": nanoseconds}), tmp_path / "new" / "t.parquet")
    read = pq.read_table(tmp_path / "new" / "t.parquet")
    assert read.schema.field("moment").type == pa.timestamp("us", "UTC")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.parquet"]


def test_views_of_a_user_and_something_else_are_packed():
    assert features.is_packable(SPEC, "user_id_item_id_interactions")
    assert not features.is_packable(SPEC, "user_id_interactions")
    assert not features.is_packable(SPEC, "tier_genre_exposures")


def test_every_kind_of_column_is_in_the_small_world():
    """What the tests above claim to cover, in case the world is ever thinned out."""
    measures = {c.aggregate.measure for c in SPEC.columns if c.aggregate}
    assert measures == {"count", "sum", "mean", "rate", "recency_days", "last"}
    assert {c.kind for c in SPEC.columns} == {"categorical", "multi", "numeric", "sequence"}
    assert len(CROSSES) == len(SPEC.crosses) == 8
    assert isinstance(SPEC, FeatureSpec)
