"""Logs that grow in pieces against the same logs at once: the same snapshots, whatever happens.

Days start at 05:00 UTC. Runs are those of the features pipeline, on files in a temporary folder.
"""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom import aggregates, features, increments
from fathom.pipelines import datasets
from fathom.pipelines.features import nodes
from fathom.spec import FeatureSpec

UTC = pa.timestamp("us", "UTC")
ORIGIN = datetime(2024, 1, 1, 5, tzinfo=timezone.utc)
DAY, MICROSECOND = timedelta(days=1), timedelta(microseconds=1)
LOG = {
    "user_id": pa.string(),
    "item_id": pa.string(),
    "event_timestamp": UTC,
    "arrival_timestamp": UTC,
    "shop": pa.string(),
    "quantity": pa.float64(),
    "bought": pa.int64(),
}
USERS = {"user_id": pa.string(), "event_timestamp": UTC, "tier": pa.string()}
ITEMS = {"item_id": pa.string(), "event_timestamp": UTC, "genre": pa.string(), "maker": pa.string()}

Row = dict[str, Any]
#: Rows by view.
Content = dict[str, list[Row]]


@pytest.fixture(autouse=True, scope="module")
def _own_engine() -> Iterator[None]:
    before = ibis.options.default_backend
    ibis.set_backend(ibis.duckdb.connect())
    yield
    ibis.options.default_backend = before


def aggregate(name: str, by: str, measure: str, **more: Any) -> Row:
    kind = "sequence" if measure == "last" else "numeric"
    return {
        "name": name,
        "kind": kind,
        "aggregate": {"by": by.split(), "measure": measure, **more},
    }


RATE = {"of": "exposures", "prior": 0.25, "prior_weight": 2}
ACTS = aggregate("acts", "user_id", "count")
ACTS_2D = aggregate("acts_2d", "user_id", "count", window_days=2)
PAIRS = aggregate("pairs", "user_id item_id", "count")
PAIRS_3D = aggregate("pairs_3d", "user_id item_id", "count", window_days=3)
GENRE_ACTS = aggregate("genre_acts", "user_id genre", "count")
ITEM_RATE = aggregate("item_rate", "item_id", "rate", **RATE)


def a_spec(*aggregates: Row, **changes: Any) -> FeatureSpec:
    owned = {"user_id": "user", "tier": "user", "item_id": "item", "genre": "item"}
    owned |= {"maker": "item", "shop": "context"}
    columns = [{"name": n, "kind": "categorical", "owner": owner} for n, owner in owned.items()]
    return FeatureSpec.model_validate(
        {
            "entities": {"user": "user_id", "item": "item_id", "request": "request_id"},
            "label": {"name": "bought", "values": [0, 1]},
            "grain_days": 1,
            "grain_origin": ORIGIN,
            "columns": [*columns, *aggregates],
        }
        | changes
    )


def a_table(rows: list[Row], types: dict[str, Any]) -> pa.Table:
    return pa.table({n: pa.array([row.get(n) for row in rows], t) for n, t in types.items()})


def day(number: float) -> datetime:
    """The boundary that many days after the origin."""
    return ORIGIN + number * DAY


def act(user: str, event: float, item: str = "tea", **more: Any) -> Row:
    return {"user_id": user, "item_id": item, "event_timestamp": day(event)} | more


def item(name: str, genre: str, since: float = -9, maker: str = "m") -> Row:
    return {"item_id": name, "event_timestamp": day(since), "genre": genre, "maker": maker}


CATALOGUE = [item("tea", "drink"), item("jam", "spread"), item("rye", "bread")]


class Runs:
    """The features pipeline of one deployment, run by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        views, packed, carry = (str(folder / name) for name in ("views", "packed", "carry"))
        self.views = datasets.SnapshotsDataset(views)
        self.packed = datasets.SnapshotsDataset(packed)
        self.carry = datasets.CarryDataset(carry, views, packed)
        self.past = datasets.PastDataset(carry, views, packed)

    def saves(
        self,
        spec: FeatureSpec,
        interactions: list[Row],
        exposures: list[Row] = (),  # type: ignore[assignment]
        items: list[Row] = CATALOGUE,
        users: list[Row] = (),  # type: ignore[assignment]
    ) -> Iterator[Callable[[], None]]:
        """One run, as the writes that it makes one after the other."""
        tables = {
            "exposures": a_table(list(exposures), LOG),
            "interactions": a_table(interactions, LOG),
            "users": a_table(list(users), USERS),
            "items": a_table(items, ITEMS),
        }
        read = {name: ibis.memtable(table) for name, table in tables.items()}
        outputs = (self.views, self.packed, self.carry)
        for chunk in nodes.summarise_logs(**read, past=self.past.load(), spec=spec):
            for dataset, data in zip(outputs, chunk, strict=True):
                yield lambda dataset=dataset, data=data: dataset.save(data)

    def run(self, spec: FeatureSpec, *logs: list[Row], **tables: list[Row]) -> Row:
        """A whole run; returns the state of the features."""
        for save in self.saves(spec, *logs, **tables):
            save()
        return nodes.describe_features(self.carry.load(), spec)

    def files(self, kind: str = "views") -> dict[str, list[str]]:
        """Names of the files of each table."""
        found: dict[str, list[str]] = {}
        for path in sorted((self.folder / kind).glob("[!.]*/*.parquet")):
            found.setdefault(path.parent.name, []).append(path.name)
        return found

    def rows(self, view: str) -> list[Row]:
        """A view's snapshots, by key and boundary."""
        return ordered(self.views.load()[view].to_pyarrow().to_pylist())

    def users(self, view: str) -> list[Row]:
        """The newest packed row of each user."""
        rows = self.packed.load()[features.packed_name(view)].to_pyarrow().to_pylist()
        newest: dict[str, Row] = {}
        for row in sorted(rows, key=lambda row: row["event_timestamp"]):
            newest[row["user_id"]] = row
        return ordered(newest.values())

    def content(self) -> Content:
        """Everything that can be read of it."""
        found = {view: self.rows(view) for view in self.views.load()}
        packed = (name.removesuffix("_packed") for name in self.packed.load())
        return found | {features.packed_name(view): self.users(view) for view in packed}


def ordered(rows: Any) -> list[Row]:
    return sorted(rows, key=repr)


@pytest.fixture
def runs(tmp_path: Path) -> Runs:
    return Runs(tmp_path / "runs")


def at_once(tmp_path: Path, spec: FeatureSpec, *logs: list[Row], **tables: list[Row]) -> Runs:
    """The same logs, computed in one run in another folder."""
    folder = tmp_path / "at_once"
    shutil.rmtree(folder, ignore_errors=True)
    runs = Runs(folder)
    runs.run(spec, *logs, **tables)
    return runs


def values(rows: list[Row], *names: str) -> list[tuple[Any, ...]]:
    return sorted(tuple(row[name] for name in names) for row in rows)


# -- what is carried -----------------------------------------------------------------------------


def test_a_run_adds_one_file_with_the_rows_of_its_steps(runs: Runs):
    spec = a_spec(ACTS, PAIRS)
    first = [act("ann", 0.5), act("bob", 1.5)]
    runs.run(spec, first)
    pairs = "user_id_item_id_interactions"
    assert runs.files() == {"user_id_interactions": ["000002.parquet"], pairs: ["000002.parquet"]}
    runs.run(spec, [*first, act("ann", 3.5)])
    both = ["000002.parquet", "000004.parquet"]
    assert runs.files() == {"user_id_interactions": both, pairs: both}
    added = runs.folder / "views" / "user_id_interactions" / "000004.parquet"
    rows = ibis.read_parquet(added).to_pyarrow().to_pylist()
    assert values(rows, "user_id", "event_timestamp", "acts") == [("ann", day(4), 2)]
    assert values(runs.rows("user_id_interactions"), "user_id", "event_timestamp", "acts") == [
        ("ann", day(1), 1),
        ("ann", day(4), 2),
        ("bob", day(2), 1),
    ]


def test_a_window_that_empties_is_written_though_nothing_arrives(runs: Runs):
    """Ann's act of step 1 leaves the window of two days at step 3, which the second run covers."""
    spec = a_spec(ACTS_2D)
    runs.run(spec, [act("ann", 0.5)])
    runs.run(spec, [act("ann", 0.5), act("bob", 4.5)])
    assert values(runs.rows("user_id_interactions"), "user_id", "event_timestamp", "acts_2d") == [
        ("ann", day(1), 1),
        ("ann", day(3), 0),
        ("bob", day(5), 1),
    ]


def test_rows_in_the_window_of_both_runs_count_in_both(runs: Runs):
    spec = a_spec(aggregate("spent_3d", "user_id", "sum", column="quantity", window_days=3))
    log = [act("ann", step - 0.5, quantity=10.0**step) for step in (1, 2, 3, 4)]
    for known in range(1, 5):
        runs.run(spec, log[:known])
    assert values(runs.rows("user_id_interactions"), "event_timestamp", "spent_3d") == [
        (day(1), 10.0),
        (day(2), 110.0),
        (day(3), 1110.0),
        (day(4), 11100.0),  # the ten has left
    ]


def test_a_late_row_counts_from_the_run_in_which_it_arrived(runs: Runs):
    """It stands first in the history, but the last event stays the later one."""
    last = aggregate("recent", "user_id", "last", column="item_id", n=2)
    spec = a_spec(ACTS, last, aggregate("age", "user_id", "recency_days"))
    prompt = [act("ann", 1.2, "jam"), act("ann", 1.5, "tea")]
    late = act("ann", 0.5, "rye", arrival_timestamp=day(2.5))
    runs.run(spec, prompt)
    runs.run(spec, [*prompt, late])
    newest = (day(1.5) - datetime(1970, 1, 1, tzinfo=timezone.utc)) // MICROSECOND
    names = ("event_timestamp", "acts", "recent", "age__last_us")
    assert values(runs.rows("user_id_interactions"), *names) == [
        (day(2), 2, ["tea", "jam"], newest),
        (day(3), 3, ["rye", "tea"], newest),
    ]


def test_a_row_without_a_moment_is_never_known(runs: Runs):
    """Validation quarantines such rows; here they must not count in one way and not the other."""
    spec = a_spec(ACTS)
    timeless = act("ann", 0.5) | {"event_timestamp": None}
    runs.run(spec, [act("ann", 0.5), timeless])
    runs.run(spec, [act("ann", 0.5), timeless, act("ann", 1.5), timeless])
    assert values(runs.rows(USER), "event_timestamp", "acts") == [(day(1), 1), (day(2), 2)]


def test_only_users_with_news_get_a_new_packed_row(runs: Runs):
    spec = a_spec(PAIRS)
    first = [act("ann", 0.5), act("bob", 0.5), act("bob", 0.6, "jam")]
    runs.run(spec, first)
    runs.run(spec, [*first, act("bob", 2.5, "rye"), act("bob", 2.6, "tea")])
    view = "user_id_item_id_interactions"
    name = features.packed_name(view)
    assert runs.files("packed") == {name: ["000001.parquet", "000003.parquet"]}
    added = ibis.read_parquet(runs.folder / "packed" / name / "000003.parquet")
    assert added.to_pyarrow().to_pylist() == [
        {  # the row is the whole truth about bob, old pairs and new ones
            "user_id": "bob",
            f"{view}__item_id": ["jam", "rye", "tea"],
            f"{view}__pairs": [1, 1, 2],
            "event_timestamp": day(3),
            "created_timestamp": day(3),
        }
    ]


def test_what_is_carried_grows_with_keys_and_windows_not_with_time(runs: Runs):
    spec = a_spec(ACTS, ACTS_2D, aggregate("recent", "user_id", "last", column="item_id", n=3))
    log = [act(user, step - 0.5) for step in range(1, 41) for user in ("ann", "bob")]
    sizes = []
    for known in (20, 40, 80):
        runs.run(spec, log[:known])
        parts = runs.past.load()["user_id_interactions"].parts
        sizes.append({name: int(table.count().execute()) for name, table in parts.items()})
    # Of each user: two steps inside the window, and one row for all before.
    assert sizes == [{"__sums": 6, "recent": 2}] * 3


# -- what is kept --------------------------------------------------------------------------------

FULL = a_spec(ACTS, ACTS_2D, PAIRS, GENRE_ACTS, ITEM_RATE)
USER, PAIR = "user_id_interactions", "user_id_item_id_interactions"
GENRE, SHOWN = "user_id_genre_interactions", "item_id_exposures"
OLD = [act("ann", 0.5), act("bob", 1.2, "jam"), act("ann", 2.5, "rye", quantity=2.0)]
SHOWS = [act("ann", 0.4, bought=1), act("bob", 2.4, "jam", bought=0)]
NEW = [*OLD, act("ann", 3.5), act("bob", 4.5)]
NEW_SHOWS = [*SHOWS, act("ann", 4.4, "rye", bought=0)]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a first run left."""
    folder = tmp_path_factory.mktemp("first") / "runs"
    Runs(folder).run(FULL, OLD, SHOWS)
    return folder


@pytest.fixture
def grown(first: Path, tmp_path: Path) -> Runs:
    """A deployment whose first run is done."""
    return Runs(Path(shutil.copytree(first, tmp_path / "runs")))


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Content:
    """What the second run has to end with."""
    return at_once(tmp_path_factory.mktemp("second"), FULL, NEW, NEW_SHOWS).content()


def kept(before: Row, after: Row) -> set[str]:
    """Views whose lineage goes on."""
    return {v for v, name in after["lineages"].items() if before["lineages"].get(v) == name}


def state(runs: Runs, spec: FeatureSpec = FULL) -> Row:
    return nodes.describe_features(runs.carry.load(), spec)


def test_the_state_says_what_is_covered_and_which_computations_go_on(grown: Runs):
    before = state(grown)
    assert before["until"] == day(3).isoformat()
    assert set(before["lineages"]) == {USER, PAIR, GENRE, SHOWN}
    after = grown.run(FULL, NEW, NEW_SHOWS)
    assert after == before | {"until": day(5).isoformat()}


def test_unchanged_logs_add_nothing(grown: Runs, caplog: pytest.LogCaptureFixture):
    def stamps() -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in grown.folder.rglob("*.parquet")}

    before, stamped = state(grown), stamps()
    with caplog.at_level(logging.INFO, "fathom"):
        assert grown.run(FULL, OLD[::-1], SHOWS[::-1]) == before  # in any order
    assert stamps() == stamped
    assert caplog.messages == [f"view {v}: nothing new" for v in (SHOWN, USER, PAIR, GENRE)]


def test_a_view_without_new_rows_gets_no_file(grown: Runs, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, "fathom"):
        grown.run(FULL, [*OLD, act("ann", 3.5)], SHOWS)
    files = grown.files()
    assert files[SHOWN] == ["000003.parquet"]
    assert files[USER] == ["000003.parquet", "000004.parquet"]
    assert f"view {SHOWN}: 0 rows appended" in caplog.messages
    # ann's new act, and bob's of step 2 that leaves the window of two days
    assert f"view {USER}: 2 rows appended" in caplog.messages


@pytest.mark.parametrize(
    "covered",
    [
        pytest.param([OLD[0], OLD[2]], id="a row is gone"),
        pytest.param([*OLD, act("bob", 0.1)], id="a row was put in"),
        pytest.param([*OLD, OLD[0]], id="a row came twice"),
        pytest.param([*OLD[:2], OLD[2] | {"item_id": "tea"}], id="a row was changed"),
        pytest.param([OLD[0], OLD[1] | {"event_timestamp": day(1.3)}, OLD[2]], id="moved in time"),
        pytest.param(
            [OLD[0] | {"item_id": "jam"}, OLD[1] | {"item_id": "tea"}, OLD[2]], id="swapped values"
        ),
    ],
)
def test_if_a_covered_row_changed_its_log_is_summarised_anew(
    grown: Runs, tmp_path: Path, covered: list[Row], caplog: pytest.LogCaptureFixture
):
    before = state(grown)
    log = [*covered, *NEW[3:]]
    with caplog.at_level(logging.INFO, "fathom"):
        after = grown.run(FULL, log, NEW_SHOWS)
    [message] = [text for text in caplog.messages if text.startswith(f"view {PAIR}:")]
    assert "computed anew, because what it was computed from has changed (log: 3 rows" in message
    kept_views = kept(before, after)
    assert SHOWN in kept_views  # the other log is as it was
    assert {PAIR, GENRE}.isdisjoint(kept_views)
    assert grown.content() == at_once(tmp_path, FULL, log, NEW_SHOWS).content()
    assert grown.files()[PAIR] == ["000005.parquet"]


def test_a_change_in_a_column_that_a_view_does_not_read_is_none_to_it(grown: Runs):
    before = state(grown)
    log = [*OLD[:2], OLD[2] | {"quantity": 7.0, "shop": "north"}]
    assert grown.run(FULL, log, SHOWS) == before
    # ... nor is an item to a view that only counts acts by user.
    log = [*OLD[:2], OLD[2] | {"item_id": "tea"}]
    assert kept(before, grown.run(FULL, log, SHOWS)) == {USER, SHOWN}


def test_a_log_that_ends_earlier_is_summarised_anew(grown: Runs, tmp_path: Path, second: Content):
    before = grown.run(FULL, NEW, NEW_SHOWS)
    after = grown.run(FULL, OLD, SHOWS)
    assert kept(before, after) == set()
    assert after["until"] == day(3).isoformat()
    assert grown.content() == at_once(tmp_path, FULL, OLD, SHOWS).content()
    # Growing again, it is not taken for what it was.
    again = grown.run(FULL, NEW, NEW_SHOWS)
    assert kept(before, again) == set()
    assert grown.content() == second


def test_another_definition_is_computed_anew_and_the_others_go_on(
    grown: Runs, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    before = state(grown)
    wider = a_spec(
        ACTS, aggregate("acts_2d", "user_id", "count", window_days=3), PAIRS, GENRE_ACTS, ITEM_RATE
    )
    with caplog.at_level(logging.INFO, "fathom"):
        after = grown.run(wider, NEW, NEW_SHOWS)
    assert kept(before, after) == {PAIR, GENRE, SHOWN}
    assert grown.content() == at_once(tmp_path, wider, NEW, NEW_SHOWS).content()
    assert any("because its definition has changed" in text for text in caplog.messages)


def test_how_a_column_is_learned_or_aged_is_no_part_of_its_definition(grown: Runs):
    before = grown.run(a_spec(*FULL.columns[6:], max_age_days={USER: 30}), OLD, SHOWS)
    older = [c.model_copy(update={"description": "?", "deep": False}) for c in FULL.columns[6:]]
    after = grown.run(a_spec(*older, max_age_days={USER: 60}), OLD, SHOWS)
    assert after == before
    ageless = grown.run(FULL, OLD, SHOWS)  # its rows have no moment
    assert kept(before, ageless) == {PAIR, GENRE, SHOWN}


def test_another_grain_or_label_is_another_definition(grown: Runs):
    before = state(grown)
    label = a_spec(
        ACTS, ACTS_2D, PAIRS, GENRE_ACTS, ITEM_RATE, label={"name": "bought", "values": [1, 0]}
    )
    assert kept(before, grown.run(label, OLD, SHOWS)) == {USER, PAIR, GENRE}
    before = state(grown)
    moved = a_spec(ACTS, ACTS_2D, PAIRS, GENRE_ACTS, ITEM_RATE, grain_origin=ORIGIN - DAY)
    assert kept(before, grown.run(moved, OLD, SHOWS)) == set()


def test_an_old_item_that_changed_its_genre_is_counted_anew(grown: Runs, tmp_path: Path):
    before = state(grown)
    items = [item("tea", "herb"), *CATALOGUE[1:]]
    after = grown.run(FULL, NEW, NEW_SHOWS, items=items)
    assert kept(before, after) == {USER, PAIR, SHOWN}
    assert after["attributes"] != before["attributes"]
    assert grown.content() == at_once(tmp_path, FULL, NEW, NEW_SHOWS, items=items).content()


def test_news_of_the_catalogue_change_nothing_old(grown: Runs, tmp_path: Path):
    before = state(grown)
    items = [
        *CATALOGUE,
        item("oat", "bread"),  # new, though it has held for long
        item("tea", "herb", since=3),  # old, but from the boundary on
    ]
    after = grown.run(FULL, [*NEW, act("ann", 3.1, "oat")], NEW_SHOWS, items=items)
    assert after == before | {"until": day(5).isoformat()}
    rows = values(grown.rows(GENRE), "user_id", "genre", "event_timestamp", "genre_acts")
    assert ("ann", "herb", day(4), 1) in rows
    assert ("ann", "bread", day(4), 2) in rows
    log = [*NEW, act("ann", 3.1, "oat")]
    assert grown.content() == at_once(tmp_path, FULL, log, NEW_SHOWS, items=items).content()


def test_an_attribute_that_no_aggregate_reads_matters_to_exposures_only(grown: Runs):
    """The maker of a shown item is a feature of the exposure, though nothing is counted by it."""
    before = state(grown)
    items = [item("tea", "drink", maker="other"), *CATALOGUE[1:]]
    after = grown.run(FULL, OLD, SHOWS, items=items)
    assert after["lineages"] == before["lineages"]
    assert after["attributes"] != before["attributes"]
    # rye was bought, but not shown
    items = [*items[:2], item("rye", "bread", maker="other")]
    assert grown.run(FULL, OLD, SHOWS, items=items) == after


def test_a_view_that_is_no_longer_declared_is_removed(grown: Runs):
    fewer = a_spec(ACTS, ACTS_2D, ITEM_RATE)
    grown.run(fewer, OLD, SHOWS)
    assert set(grown.files()) == {USER, SHOWN}
    assert grown.files("packed") == {}
    assert set(grown.past.load()) == {USER, SHOWN, increments.ATTRIBUTES_READ}


# -- files that are not as they were written -----------------------------------------------------


def _delete(path: Path) -> None:
    path.unlink()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def _replace(path: Path) -> None:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    pq.write_table(table.slice(0, len(table) - 1), path)


def _add(path: Path) -> None:
    shutil.copy(path, path.with_name("000002.parquet"))


@pytest.mark.parametrize(
    ("harm", "victim"),
    [
        (_delete, f"views/{PAIR}/000003.parquet"),
        (_cut, f"views/{PAIR}/000003.parquet"),
        (_replace, f"views/{PAIR}/000003.parquet"),
        (_add, f"views/{PAIR}/000003.parquet"),
        (_delete, f"packed/{PAIR}_packed/000003.parquet"),
        (_cut, f"carry/{PAIR}/__sums.parquet"),
        (_delete, f"carry/{PAIR}/__newest.parquet"),
    ],
)
def test_a_view_whose_files_were_tampered_with_is_computed_anew(
    grown: Runs,
    second: Content,
    harm: Callable[[Path], None],
    victim: str,
    caplog: pytest.LogCaptureFixture,
):
    harm(grown.folder / victim)
    before = state(grown)
    with caplog.at_level(logging.INFO, "fathom"):
        after = grown.run(FULL, NEW, NEW_SHOWS)
    assert kept(before, after) == {USER, GENRE, SHOWN}
    assert grown.content() == second
    assert any("because files are not as they were written" in text for text in caplog.messages)


@pytest.mark.parametrize("record", ["", "{}", '{"state": {"until": "x"}, "files": {}}', None])
def test_without_a_record_that_can_be_read_there_is_no_past(
    grown: Runs, second: Content, record: str | None
):
    path = grown.folder / "carry" / PAIR / "state.json"
    path.unlink() if record is None else path.write_text(record)
    assert PAIR not in grown.past.load()
    grown.run(FULL, NEW, NEW_SHOWS)
    assert grown.content() == second


# -- runs that were killed -----------------------------------------------------------------------


@pytest.mark.parametrize("changed", [False, True], ids=["grown", "changed"])
def test_a_run_that_died_after_any_write_is_made_good_by_the_next(tmp_path: Path, changed: bool):
    """What it wrote until then is true, and in the end nothing tells it from a run that lived."""
    spec = a_spec(ACTS_2D, PAIRS)
    log = [OLD[0] | {"item_id": "rye"}, *NEW[1:]] if changed else NEW
    lived = Runs(tmp_path / "lived")
    lived.run(spec, OLD)
    shutil.copytree(lived.folder, tmp_path / "first")
    expected = lived.run(spec, log)
    content, facts = (
        lived.content(),
        [repr(row) for view in (USER, PAIR) for row in lived.rows(view)],
    )
    for died_after in itertools.count(1):
        killed = Runs(Path(shutil.copytree(tmp_path / "first", tmp_path / f"died{died_after}")))
        saves = killed.saves(spec, log)
        for save in itertools.islice(saves, died_after):
            save()
        if not changed:
            read = [repr(row) for view in (USER, PAIR) for row in killed.rows(view)]
            assert set(read) <= set(facts)
            assert len(read) == len(set(read))
        finished = next(saves, None) is None
        assert killed.run(spec, log) == expected
        assert killed.content() == content
        if finished:
            break
    assert died_after == 3 + 2 * 3  # three writes each for the attributes and two views


def test_what_a_killed_run_left_does_not_outlive_a_change_of_its_rows(grown: Runs, tmp_path: Path):
    """The rows that a killed run had written before its record did not count in the end."""
    for save in itertools.islice(grown.saves(FULL, NEW, NEW_SHOWS), 7):
        save()
    strays = {view for view, names in grown.files().items() if "000005.parquet" in names}
    assert strays
    other = [*OLD, act("zoe", 4.5, "jam")]  # the same last step, other rows
    grown.run(FULL, other, SHOWS)
    assert grown.content() == at_once(tmp_path, FULL, other, SHOWS).content()
    for save in itertools.islice(grown.saves(FULL, [*other, act("zoe", 5.5)], SHOWS), 7):
        save()
    longer = [*other, act("ann", 7.5)]  # another last step
    grown.run(FULL, longer, SHOWS)
    assert grown.content() == at_once(tmp_path, FULL, longer, SHOWS).content()


_ENDLESS = """
import sys
from pathlib import Path
sys.path[:0] = {paths!r}
from test_increments import FULL, NEW, NEW_SHOWS, OLD, SHOWS, Runs
runs = Runs(Path({folder!r}))
runs.run(FULL, OLD, SHOWS)
print("written", flush=True)
while True:
    runs.run(FULL, NEW, NEW_SHOWS)
    runs.run(FULL, OLD, SHOWS)
"""


def test_a_process_killed_at_any_moment_leaves_what_the_next_run_completes(tmp_path: Path):
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "src")]
    folder = tmp_path / "killed"
    script = _ENDLESS.format(paths=paths, folder=str(folder))
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.7)
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    assert process.wait(30) == -signal.SIGKILL
    killed = Runs(folder)
    killed.run(FULL, NEW, NEW_SHOWS)
    assert killed.content() == at_once(tmp_path, FULL, NEW, NEW_SHOWS).content()


# -- names ---------------------------------------------------------------------------------------


def test_names_of_files_sort_as_their_steps():
    steps = [-400_000, -20, -3, -1, 0, 7, 20_000, 999_999]
    names = [increments.file_name(step) for step in steps]
    assert names == sorted(names)
    assert increments.file_name(53) == "000053.parquet"


def test_a_log_from_before_the_origin_grows_too(runs: Runs, tmp_path: Path):
    spec = a_spec(ACTS, ACTS_2D)
    log = [act("ann", -20.5), act("ann", -3.5), act("ann", -2.5), act("ann", 1.5)]
    for known in range(1, 5):
        runs.run(spec, log[:known])
    assert len(runs.files()[USER]) == 4
    assert runs.content() == at_once(tmp_path, spec, log).content()


# -- any log, in any pieces ----------------------------------------------------------------------

EVERYTHING = a_spec(
    ACTS,
    ACTS_2D,
    aggregate("spent", "user_id", "sum", column="quantity"),
    aggregate("spent_3d", "user_id", "sum", column="quantity", window_days=3),
    aggregate("mean", "user_id", "mean", column="quantity"),
    aggregate("mean_2d", "user_id", "mean", column="quantity", window_days=2),
    aggregate("age", "user_id", "recency_days"),
    aggregate("recent", "user_id", "last", column="item_id", n=3),
    aggregate("genres", "user_id", "last", column="genre", n=2),
    PAIRS,
    PAIRS_3D,
    aggregate("pair_mean_2d", "user_id item_id", "mean", column="quantity", window_days=2),
    aggregate("pair_age", "user_id item_id", "recency_days"),
    ITEM_RATE,
    aggregate("item_rate_2d", "item_id", "rate", window_days=2, **RATE),
    aggregate("shops", "item_id", "last", of="exposures", column="shop", n=2),
    max_age_days={"user_id_item_id_interactions": 5},
)
TIMES = st.builds(
    lambda days, offset: day(days) + offset,
    st.integers(-2, 7),
    st.sampled_from([timedelta(0), -MICROSECOND, MICROSECOND, DAY / 3, DAY / 2]),
)
ROWS = st.fixed_dictionaries(
    {
        "user_id": st.sampled_from(["ann", "bob", None]),
        "event_timestamp": TIMES,
        "arrival_timestamp": st.none() | TIMES,
        "item_id": st.sampled_from(["tea", "jam", "rye", None]),
        "shop": st.sampled_from(["north", "south", None]),
        "quantity": st.none() | st.integers(-(10**9), 10**9).map(lambda n: n / 1000),
        "bought": st.sampled_from([0, 1]),
    }
)
LOGS = st.lists(ROWS, min_size=2, max_size=14)


def known_from(row: Row) -> datetime:
    return max(row["event_timestamp"], row["arrival_timestamp"] or row["event_timestamp"])


def pieces(rows: list[Row], cuts: list[int]) -> list[list[Row]]:
    """The log as it was at the given boundaries, and at last all of it."""
    return [[row for row in rows if known_from(row) < day(cut)] for cut in sorted(cuts)] + [rows]


@settings(max_examples=6)
@given(rows=LOGS, cuts=st.lists(st.integers(-2, 8), max_size=4, unique=True))
def test_parts_of_any_pieces_add_up_to_the_whole(rows: list[Row], cuts: list[int]):
    """The algebra by itself: what is carried, and what arrives, give what all would give."""
    users, items = (ibis.memtable(a_table(r, t)) for r, t in (([], USERS), (CATALOGUE, ITEMS)))
    whole = ibis.memtable(a_table(rows, LOG))
    until = int(features.last_step([whole], EVERYTHING).execute())
    steps = [cut for cut in sorted(cuts) if cut < until]
    for view, of in ((USER, "interactions"), (PAIR, "interactions"), (SHOWN, "exposures")):
        joined = features.with_attributes(whole, users, items, EVERYTHING)
        expected = features.snapshots(joined, EVERYTHING, view, until)
        found: list[Row] = []
        carried, since = None, None
        for step in (*steps, until):
            rows_read = features.rows_read(whole, users, items, EVERYTHING, of, since)
            rows_read = rows_read.filter(rows_read[aggregates.STEP] <= step)
            parts = aggregates.parts(rows_read, EVERYTHING, view)
            parts = aggregates.added(carried, parts) if carried else parts
            evaluated = aggregates.evaluated(parts, EVERYTHING, view, step, since)
            found += features.stamped(evaluated, EVERYTHING, view).to_pyarrow().to_pylist()
            kept = aggregates.carried(parts, EVERYTHING, view, step)
            carried, since = {name: table.cache() for name, table in kept.items()}, step
        assert ordered(found) == ordered(expected.to_pyarrow().to_pylist())


@settings(max_examples=4)
@given(
    interactions=LOGS,
    exposures=LOGS,
    cuts=st.lists(st.integers(0, 7), min_size=1, max_size=3, unique=True),
)
def test_any_logs_in_any_pieces_give_the_files_of_one_run(
    tmp_path_factory: pytest.TempPathFactory,
    interactions: list[Row],
    exposures: list[Row],
    cuts: list[int],
):
    folder = tmp_path_factory.mktemp("pieces")
    grown = Runs(folder / "grown")
    before: tuple[Row, Content] | None = None
    for piece, shown in zip(pieces(interactions, cuts), pieces(exposures, cuts), strict=True):
        if not piece and not shown:
            continue
        now = grown.run(EVERYTHING, piece, shown)
        if before:
            # No row of a log is late without saying so, hence nothing is ever computed anew, and
            # what was written stays: exactly so is what the lineages promise.
            assert before[0] == now | {"until": before[0]["until"]}
            for view in EVERYTHING.views:
                rows = grown.rows(view)
                until = datetime.fromisoformat(before[0]["until"])
                assert [r for r in rows if r["event_timestamp"] <= until] == before[1][view]
        before = now, {view: grown.rows(view) for view in EVERYTHING.views}
    whole = at_once(folder, EVERYTHING, interactions, exposures)
    assert grown.content() == whole.content()
