"""Replay: what was served is what history says; what is not is found, named and refused.

A deployment is served while it moves on from one week to the next, also in the middle of a
materialisation, and everything that the model saw is built again afterwards.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

import small_store
from fathom import skew
from fathom.batch import Ragged
from fathom.config import TrainingConfig
from fathom.encoding import fit_encoder
from fathom.feature_log import TABLES_AS_OF, USER_AS_OF, FeatureLog, Served, segments
from fathom.feature_store import FeatureRepo, frame_of
from fathom.models import build
from fathom.online import Known, OnlineFeatures
from fathom.ranker import Ranker
from fathom.registry import Registry
from fathom.skew import SkewConfig, SkewError, judge, replay, table
from fathom.spec import FeatureSpec
from small_store import COLUMNS, DAY, ITEMS, SPEC, START, USERS, a_spec

WEEK = START + timedelta(days=29)


@dataclass
class Deployment:
    """A small store with its registry of rankers and its log."""

    folder: Path
    repo: FeatureRepo
    rankers: Registry
    version: str
    ranker: Ranker
    known: list[Known]
    middle: datetime
    until: datetime

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def config(self, **changes: Any) -> SkewConfig:
        return SkewConfig(**{"feature_log": str(self.log)} | changes)

    def replayed(self, **changes: Any) -> dict[str, Any]:
        report = replay(self.repo, self.rankers, self.config(**changes)).as_dict()
        # What the pipeline writes as JSON.
        return json.loads(json.dumps(report, allow_nan=False))

    def segment(self) -> tuple[Path, pa.Table]:
        path = segments(self.log)[-1]
        return path, pq.read_table(path)


def known_before(tables: Mapping[str, pa.Table], moment: datetime) -> dict[str, pa.Table]:
    """The tables as a deployment has them at a moment: what has happened and arrived by then."""
    limit = pa.scalar(moment, small_store.STAMP)
    cut = {}
    for name, rows in tables.items():
        known = pc.less(rows["event_timestamp"], limit)
        if "arrival_timestamp" in rows.column_names:
            arrived = pc.fill_null(pc.less(rows["arrival_timestamp"], limit), True)
            known = pc.and_(known, arrived)
        cut[name] = rows.filter(known)
    return cut


def serve(online: OnlineFeatures, ranker: Ranker, log: FeatureLog, moment: datetime) -> list[Known]:
    """A request of each user, and one of nobody, with candidates of all kinds."""
    known = []
    for user in range(USERS + 1):
        context = {
            "shop": ["north", "south", "new", None][user % 4],
            "discount": [0.1, None][user % 2],
            "searches": [["rye", "tea"], [], None][user % 3],
        }
        candidates = [
            {"item_id": f"i{i}", "slot": ["top", "end", "new", None][(i + user) % 4]}
            | ({"discount": i / 10} if i % 3 == 0 else {})
            for i in range(ITEMS + 1)
        ]
        at = moment + timedelta(microseconds=user * 1_000_003)
        frame, found = online.frame(f"u{user}", context, candidates, at)
        items = [candidate["item_id"] for candidate in candidates]
        name = f"{moment:%dT%H%M}-{user}-{len(known)}"
        log.put(Served(name, f"u{user}", items, at, frame, found, ranker.score(frame)))
        known.append(found)
    return known


def a_ranker(frame: Mapping[str, Any], spec: FeatureSpec) -> Ranker:
    torch.manual_seed(0)
    config = TrainingConfig(hidden=(8,))
    encoder = fit_encoder(frame, spec)
    model = build(encoder.layout, config)
    model.eval()
    return Ranker(encoder, model, config, {"trained_until": "2024-01-30"})


class Killed(BaseException):
    """In the middle of a materialisation."""


def materialise_some(store: small_store.Store, count: int, patch: pytest.MonkeyPatch) -> None:
    """Materialise, and die when so many views are loaded."""
    genuine, loaded = FeatureRepo._load, []

    def load(repo: FeatureRepo, feast: Any, view: str, *span: Any) -> int:
        if len(loaded) == count:
            raise Killed
        loaded.append(view)
        return genuine(repo, feast, view, *span)

    with patch.context() as killed:
        killed.setattr(FeatureRepo, "_load", load)
        with pytest.raises(Killed):
            store.repo.materialise(store.spec, store.until)


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    """A deployment that was served for a while, and its log."""
    folder = tmp_path_factory.mktemp("lived")
    tables = small_store.generated()
    before = small_store.written(folder, SPEC, known_before(tables, WEEK))
    repo = before.repo
    repo.apply(SPEC)
    repo.materialise(SPEC, before.until)
    online = OnlineFeatures.open(repo, SPEC)
    probes = small_store.probes(before)
    ranker = a_ranker(frame_of(repo.training_frame(probes, SPEC)), SPEC)
    rankers = Registry(folder / "registry")
    version = rankers.register(ranker.save)
    log = FeatureLog(folder / "log", SPEC, version)
    known = serve(online, ranker, log, before.until + timedelta(hours=5))
    known += serve(online, ranker, log, before.until - timedelta(hours=5))  # replayed traffic
    after = small_store.written(folder, SPEC, tables)
    known += serve(online, ranker, log, after.until + timedelta(hours=1))  # nothing loaded yet
    with pytest.MonkeyPatch.context() as patch:
        for count in (2, 5):
            materialise_some(after, count, patch)
            known += serve(online, ranker, log, after.until + timedelta(hours=1 + count))
    repo.materialise(SPEC, after.until)
    known += serve(online, ranker, log, after.until + timedelta(hours=8))
    assert online.refresh()
    known += serve(online, ranker, log, after.until + timedelta(hours=9))
    online.close()
    log.close()
    return Deployment(folder, repo, rankers, version, ranker, known, before.until, after.until)


@pytest.fixture
def copy(lived: Deployment, tmp_path: Path) -> Deployment:
    """The deployment with a log of its own, to change."""
    shutil.copytree(lived.log, tmp_path / "log")
    return replace(lived, folder=tmp_path)


ROWS = (USERS + 1) * (ITEMS + 1)


@pytest.fixture(scope="module")
def report(lived: Deployment) -> dict[str, Any]:
    """What a replay of all that was served says."""
    return lived.replayed()


def test_everything_that_was_served_is_what_history_says(lived: Deployment, report: dict[str, Any]):
    assert report["rows"] == report["compared"] == 7 * ROWS
    assert report["requests"] == 7 * (USERS + 1)
    assert (report["degraded"], report["straddling"], report["differing"]) == (0, 0, 0)
    assert report["columns"] == {}
    assert report["max_difference"] < 1e-6
    assert report["versions"] == {lived.version: 7 * ROWS}
    # Until the tables were refreshed, newer features were due.
    assert report["stale"] == 4 * ROWS
    assert report["from_the_future"] == ROWS
    judge(report, lived.config())


def test_small_batches_say_the_same(lived: Deployment, report: dict[str, Any]):
    path, rows = lived.segment()
    assert len(segments(lived.log)) == 1
    pieces = lived.folder / "pieces" / lived.version
    pieces.mkdir(parents=True)
    for i, start in enumerate(range(0, len(rows), 211)):  # not where requests end
        pq.write_table(rows.slice(start, 211), pieces / f"{i:03}.parquet")
    log = str(pieces.parent)
    small = lived.replayed(feature_log=log, batch_rows=400)
    assert small | {"requests": 0} == report | {"requests": 0}
    assert path.exists()


def test_a_request_in_the_middle_of_a_materialisation_is_of_several_moments(lived: Deployment):
    """And no single one explains it, so that each view has to be looked up at its own."""
    middle = lived.known[3 * (USERS + 1) : 5 * (USERS + 1)]
    assert {known.tables_as_of for known in middle} == {lived.middle}
    newer = [{m for m in known.rows.values() if m > lived.middle} for known in middle]
    assert any(newer)
    for known, moments in zip(middle, newer, strict=True):
        assert known.user_as_of == max(moments, default=lived.middle)
    _, rows = lived.segment()
    rows = rows.slice(3 * ROWS, 2 * ROWS)
    names = ("user_id", "item_id", "event_timestamp", "shop", "slot", "discount", "searches")
    spine = rows.select([*names, USER_AS_OF, TABLES_AS_OF])
    spine = spine.append_column("request_id", rows["_request"])
    unlike = {}
    for moment in (USER_AS_OF, TABLES_AS_OF):
        at_one = frame_of(lived.repo.training_frame(spine, SPEC, moment, TABLES_AS_OF))
        served = frame_of(rows)
        unlike[moment] = sum(
            int(skew._unlike(served[c.name], at_one[c.name]).sum()) for c in SPEC.columns
        )
    assert min(unlike.values()) > 0


@pytest.mark.parametrize(
    ("column", "change"),
    [
        ("user_acts", lambda value: np.nextafter(np.float32(value), np.float32(1e9)).item()),
        ("price", lambda _: 3.0),
        ("genre", lambda _: "plush"),
        ("tags", lambda value: [*value, "green"]),
        ("recent_items", lambda value: [*reversed(value), "i3"]),
        ("pair_share", lambda _: None),
        ("probability", lambda value: value + 3e-6),
    ],
)
def test_one_value_that_differs_is_named_with_what_history_says(
    copy: Deployment, column: str, change: Any
):
    path, rows = copy.segment()
    kept = rows.slice(0, ROWS)
    values = kept[column].to_pylist()
    row = next(i for i in range(40, ROWS) if values[i] is not None and values[i] == values[i])
    expected = values[row]
    values[row] = change(expected)
    place = kept.schema.get_field_index(column)
    changed = pa.array(values, kept.schema.field(column).type, from_pandas=False)
    if column == "pair_share":
        values[row] = float("nan")
        changed = pa.array(np.array(values, np.float32), from_pandas=False)
    pq.write_table(kept.set_column(place, column, changed), path)
    report = copy.replayed()
    # What the model saw is not what it scored, then; what it scored is what history says.
    assert report["differing"] == 1
    assert list(report["columns"]) == [column]
    (example,) = report["columns"][column]["examples"]
    assert example["user_id"] == kept["user_id"][row].as_py()
    assert example["item_id"] == kept["item_id"][row].as_py()
    assert example["_request"] == kept["_request"][row].as_py()
    if column == "probability":
        assert example["rebuilt"] == pytest.approx(expected, abs=1e-6)
        assert report["max_difference"] == pytest.approx(3e-6, abs=1e-6)
    else:
        assert example["rebuilt"] == expected
        assert example["served"] == (None if column == "pair_share" else values[row])
    with pytest.raises(
        SkewError,
        match=rf"1 of {ROWS} served rows differ .*\(at most 0 may\), in {column} \(1\)",
    ):
        judge(report, copy.config())
    judge(report, copy.config(tolerated_rows=1))


def test_history_that_was_changed_afterwards_is_found(copy: Deployment, tmp_path: Path):
    """One value of one item in the offline source; serving had another."""
    shutil.copytree(copy.repo.folder, tmp_path / "features")
    repo = replace(copy.repo, root=tmp_path)
    path = repo.source("items")
    items = pq.read_table(path)
    prices = [
        9.75 if key == "i1" else p
        for key, p in zip(items["item_id"].to_pylist(), items["price"].to_pylist(), strict=True)
    ]
    place = items.schema.get_field_index("price")
    pq.write_table(items.set_column(place, "price", pa.array(prices, pa.float64())), path)
    repo.apply(SPEC)
    report = replace(copy, repo=repo).replayed(examples=2)
    # Each request had the item once; what is computed from it differs, too, where it is not 0.
    assert report["columns"]["price"]["rows"] == 7 * (USERS + 1)
    assert set(report["columns"]) <= {"price", "price_share", "probability"}
    assert len(report["columns"]["price"]["examples"]) == 2
    example = report["columns"]["price"]["examples"][0]
    assert (example["item_id"], example["rebuilt"]) == ("i1", 9.75)
    with pytest.raises(SkewError, match=r"in price \(63\)"):
        judge(report, copy.config())


def test_what_was_served_without_the_online_store_is_not_compared(
    copy: Deployment, monkeypatch: pytest.MonkeyPatch
):
    online = OnlineFeatures.open(copy.repo, SPEC)

    def refuse(*_: Any) -> None:
        raise ConnectionError("connection refused")

    monkeypatch.setattr(online._rows._provider, "online_read", refuse)
    shutil.rmtree(copy.log)
    log = FeatureLog(copy.log, SPEC, copy.version)
    serve(online, copy.ranker, log, copy.until + timedelta(hours=5))
    log.close()
    online.close()
    report = copy.replayed()
    assert (report["rows"], report["degraded"], report["compared"]) == (ROWS, ROWS, 0)
    with pytest.raises(
        SkewError,
        match=rf"nothing was compared: .*/log has {ROWS} rows, {ROWS} of them served without the "
        "online store; serve with --feature-log and replay again",
    ):
        judge(report, copy.config())


def test_an_attribute_that_changed_in_the_middle_is_counted_apart(copy: Deployment, tmp_path: Path):
    """The user's tier was read as of one moment, and a row keyed by it as of a later one."""
    shutil.copytree(copy.repo.folder, tmp_path / "features")
    repo = replace(copy.repo, root=tmp_path)
    path = repo.source("users")
    users = pq.read_table(path)
    moment = pa.array([copy.until - DAY], small_store.STAMP)
    promoted = users.filter(pc.equal(users["user_id"], "u1")).slice(0, 1)
    for name, value in (
        ("tier", pa.array(["gold"])),
        ("event_timestamp", moment),
        ("created_timestamp", moment),
    ):
        promoted = promoted.set_column(users.schema.get_field_index(name), name, value)
    pq.write_table(pa.concat_tables([users, promoted.cast(users.schema)]), path)
    repo.apply(SPEC)
    report = replace(copy, repo=repo).replayed()
    # Of u1's requests, those that saw its packed row of the later moment.
    assert 0 < report["straddling"] <= 3 * (ITEMS + 1)
    assert report["compared"] == 7 * ROWS - report["straddling"]


def test_a_ranker_that_is_gone_cannot_be_replayed(copy: Deployment):
    (copy.log / copy.version).rename(copy.log / "20240101-gone")
    with pytest.raises(
        SkewError, match=r"what ranker 20240101-gone served cannot be replayed: no version"
    ):
        copy.replayed()


def test_a_feature_store_of_another_spec_cannot_be_replayed(copy: Deployment, tmp_path: Path):
    fewer = a_spec([column for column in COLUMNS if column["name"] != "genre_acts"], [])
    shutil.copytree(copy.repo.folder, tmp_path / "features")
    repo = replace(copy.repo, root=tmp_path)
    repo.apply(fewer)
    with pytest.raises(SkewError, match=f"what ranker {copy.version} served .*genre_inter"):
        replace(copy, repo=repo).replayed()


def test_a_log_of_nothing_is_not_a_success(copy: Deployment):
    shutil.rmtree(copy.log)
    report = copy.replayed()
    assert report["rows"] == 0
    with pytest.raises(SkewError, match=r"nothing was compared: .* has 0 rows"):
        judge(report, copy.config())


def test_the_report_as_a_table(lived: Deployment):
    report = {
        "rows": 12_345,
        "compared": 12_000,
        "columns": {"price": {"rows": 7, "examples": []}},
        "max_difference": 2e-8,
        "versions": {},
    }
    assert table(report).splitlines() == [
        "rows                    12,345",
        "compared                12,000",
        "max difference         2.0e-08  of a probability",
        "  price                                              7 rows differ",
    ]


def test_values_are_the_same_only_bit_for_bit_but_nan_is_nan():
    one, other = np.float32([0.0, 1.0, np.nan, np.nan]), np.float32([-0.0, 1.0, np.nan, 1.0])
    assert skew._unlike(one, other).tolist() == [True, False, False, True]
    quiet = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert skew._unlike(quiet, quiet[::-1]).tolist() == [False, False]
    texts = np.array(["a", None, "", None], object), np.array(["a", None, None, "b"], object)
    assert skew._unlike(*texts).tolist() == [False, False, True, True]
    lists = Ragged.of([["a"], [], ["a", "b"], ["a"]]), Ragged.of([["a"], ["b"], ["b", "a"], ["a"]])
    assert skew._unlike(*lists).tolist() == [False, True, True, False]
