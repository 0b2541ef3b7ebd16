"""The embedded online store: what it keeps, what it returns, and what no crash or crowd breaks."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from functools import partial
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np
import pandas as pd
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
from feast.infra.online_stores.sqlite import SqliteOnlineStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import RepoConfig
from feast.types import Array, Float32, Float64, Int64, String
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fathom import sqlite_store
from fathom.sqlite_store import OnlineStoreError, WalSqliteOnlineStore, distances

TYPE = "fathom.sqlite_store.WalSqliteOnlineStore"
NOON = datetime(2024, 3, 10, 12, 0, 0, 123_456, tzinfo=timezone.utc)
SECOND = timedelta(seconds=1)
PERSON = Entity(name="person", join_keys=["person"], value_type=ValueType.STRING)
FIELDS: dict[str, Any] = {"age": Int64, "name": String, "tags": Array(String)}


def a_view(
    fields: dict[str, Any] = FIELDS, name: str = "people", indexed: str | None = None
) -> FeatureView:
    return FeatureView(
        name=name,
        entities=[PERSON],
        schema=[
            *(Field(name=f, dtype=kind, vector_index=f == indexed) for f, kind in fields.items()),
            Field(name="person", dtype=String),
        ],
        source=FileSource(name=f"{name}_source", path="none", timestamp_field="event_timestamp"),
        ttl=timedelta(0),
    )


def a_config(path: Path, type: str = TYPE, **more: Any) -> RepoConfig:
    return RepoConfig(
        project="small",
        provider="local",
        registry={"registry_type": "sql", "path": f"sqlite:///{path.parent}/registry.db"},
        online_store={"type": type, "path": str(path), **more},
        offline_store={"type": "duckdb"},
        entity_key_serialization_version=3,
    )


def key(name: str) -> EntityKey:
    return EntityKey(join_keys=["person"], entity_values=[Value(string_val=name)])


def row(
    name: str, event: datetime = NOON, created: datetime | None = None, /, **values: Any
) -> tuple[Any, ...]:
    """One row as Feast hands it over; numbers, texts and lists of either become its values."""
    return (
        key(name),
        {feature: value_of(value) for feature, value in values.items()},
        event,
        created,
    )


def value_of(plain: Any) -> Value:
    match plain:
        case None:
            return Value()
        case int():
            return Value(int64_val=plain)
        case float():
            return Value(double_val=plain)
        case str():
            return Value(string_val=plain)
        case [float(), *_] | []:
            return Value(float_list_val={"val": plain})
    return Value(string_list_val={"val": plain})


def plain(value: Value) -> Any:
    kind = value.WhichOneof("val")
    found = getattr(value, kind) if kind else None
    return list(found.val) if hasattr(found, "val") else found


class Database:
    """One view in one file, written and read through the store."""

    def __init__(self, path: Path, view: FeatureView | None = None, **more: Any) -> None:
        self.path, self.config = path, a_config(path, **more)
        self.view, self.store = view or a_view(), WalSqliteOnlineStore()

    def apply(self, view: FeatureView | None = None, drop: tuple[FeatureView, ...] = ()) -> None:
        self.view = view or self.view
        self.store.update(self.config, drop, [self.view], [], [PERSON], partial=False)

    def write(self, *rows: tuple[Any, ...]) -> None:
        self.store.online_write_batch(self.config, self.view, list(rows), None)

    def read(self, *names: str, only: list[str] | None = None) -> list[Any]:
        found = self.store.online_read(self.config, self.view, [key(n) for n in names], only)
        return [
            (moment, values and {feature: plain(value) for feature, value in values.items()})
            for moment, values in found
        ]

    def values(self, name: str) -> dict[str, Any]:
        values: dict[str, Any] = self.read(name)[0][1]
        return values

    def nearest(self, query: list[float], top_k: int = 10, metric: str = "L2", **more: Any) -> Any:
        found = self.store.retrieve_online_documents_v2(
            self.config, self.view, ["vector"], query, top_k, metric, **more
        )
        return {
            found_key.entity_values[0].string_val: round(values["distance"].float_val, 6)
            for _, found_key, values in found
            if found_key and values
        }


@pytest.fixture
def database(tmp_path: Path) -> Database:
    made = Database(tmp_path / "online.db")
    made.apply()
    return made


def forked(act: Callable[[], None]) -> int:
    """Run ``act`` in a process of its own, which ends with 0 if nothing was raised."""
    child = os.fork()
    if child == 0:
        try:
            act()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"in the child: {error!r}\n".encode())
            os._exit(1)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# -- rows ----------------------------------------------------------------------------------------


def test_a_row_comes_back_as_it_was_written(database: Database) -> None:
    database.write(row("ann", age=41, name="Ann", tags=["a", "b"]), row("bob", age=7))
    assert database.read("bob", "nobody", "ann") == [
        (NOON, {"age": 7}),
        (None, None),
        (NOON, {"age": 41, "name": "Ann", "tags": ["a", "b"]}),
    ]


def test_only_what_is_asked_for_is_returned(database: Database) -> None:
    database.write(row("ann", age=41, name="Ann", tags=["a"]))
    assert database.read("ann", only=["tags", "age"]) == [(NOON, {"tags": ["a"], "age": 41})]


def test_a_missing_value_is_not_a_value_that_was_never_written(database: Database) -> None:
    database.write(row("ann", age=None))
    assert database.read("ann") == [(NOON, {"age": None})]
    assert database.read("ann", only=["name"]) == [(None, None)]


def test_a_row_that_brings_some_features_keeps_the_others(database: Database) -> None:
    database.write(row("ann", age=41, name="Ann"), row("bob", age=7, name="Bob"))
    database.write(row("ann", NOON + SECOND, age=42), row("bob", NOON + SECOND, name="Rob"))
    assert database.read("ann", "bob") == [
        (NOON + SECOND, {"age": 42, "name": "Ann"}),
        (NOON + SECOND, {"age": 7, "name": "Rob"}),
    ]


def test_more_keys_than_sqlite_takes_at_once(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "_KEYS_PER_QUERY", 3)
    database.write(*(row(f"p{i}", age=i) for i in range(10)))
    names = [f"p{i}" for i in (9, 0, 4, 77, 3, 2, 8)]
    assert [values and values["age"] for _, values in database.read(*names)] == [
        9, 0, 4, None, 3, 2, 8,
    ]  # fmt: skip


def test_progress_counts_the_rows(database: Database) -> None:
    counted: list[int] = []
    rows: Any = [row("ann", age=1), row("bob", age=2)]
    database.store.online_write_batch(database.config, database.view, rows, counted.append)
    assert sum(counted) == 2


# -- moments -------------------------------------------------------------------------------------


@given(st.datetimes(timezones=st.sampled_from([None, timezone.utc, ZoneInfo("Asia/Kathmandu")])))
def test_moments_are_kept_to_the_microsecond_in_utc(moment: datetime) -> None:
    if moment.tzinfo and not datetime(1, 1, 2) < moment.replace(tzinfo=None) < datetime(
        9999, 12, 30
    ):
        return  # outside of what Python can express in UTC
    utc = moment.astimezone(timezone.utc) if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    folder = Path(tempfile.mkdtemp())
    try:
        database = Database(folder / "online.db")
        database.write(row("ann", moment, age=1))
        ((found, _),) = database.read("ann")
        assert found == utc
        assert found.utcoffset() == timedelta(0)
    finally:
        shutil.rmtree(folder)


def test_the_time_zone_of_the_machine_changes_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 06:30 UTC is 01:30 in New York for the second time: the clock was set back at 06:00 UTC.
    twice = datetime(2024, 11, 3, 6, 30, 0, 1, tzinfo=timezone.utc)
    try:
        for zone in ("America/New_York", "Asia/Kathmandu"):
            monkeypatch.setenv("TZ", zone)
            time.tzset()
            database.write(row(zone, twice, age=1))
            assert {moment for moment, _ in database.read(zone, "America/New_York")} == {twice}
    finally:
        monkeypatch.undo()
        time.tzset()


def test_moments_are_stored_as_numbers_so_that_no_global_adapter_touches_them(
    database: Database,
) -> None:
    database.write(row("ann", NOON, NOON - SECOND, age=1))
    with sqlite3.connect(database.path) as raw:
        stored = raw.execute("SELECT event_us, created_us FROM small_people").fetchone()
    # 2024-03-10 12:00:00 UTC is 1,710,072,000 s after 1970.
    assert stored == (1_710_072_000_123_456, 1_710_071_999_123_456)


# -- which row wins ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "wins"),
    [
        ((0, None), (1, None), "second"),
        ((1, None), (0, None), "first"),
        ((1, 5), (0, 9), "first"),  # the event decides, not when its row was made
        ((0, 1), (0, 2), "second"),
        ((0, 2), (0, 1), "first"),
        ((0, 1), (0, 1), "second"),  # equal: the same row again, or its correction
        ((0, None), (0, 1), "second"),
        ((0, 1), (0, None), "second"),
    ],
)
@pytest.mark.parametrize("batches", [1, 2])
def test_an_older_row_never_replaces_a_newer_one(
    database: Database,
    first: tuple[int, int | None],
    second: tuple[int, int | None],
    wins: str,
    batches: int,
) -> None:
    def made(name: str, event: int, created: int | None) -> tuple[Any, ...]:
        return row(
            "ann",
            NOON + event * SECOND,
            None if created is None else NOON + created * SECOND,
            name=name,
        )

    rows = [made("first", *first), made("second", *second)]
    for batch in [rows] if batches == 1 else [[one] for one in rows]:
        database.write(*batch)
    event, _ = first if wins == "first" else second
    assert database.read("ann") == [(NOON + event * SECOND, {"name": wins})]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 3), st.integers(0, 3)), max_size=9))
def test_rows_in_any_order_leave_the_newest(writes: list[tuple[str, int, int]]) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        database = Database(folder / "online.db")
        database.apply()
        newest: dict[str, tuple[int, int, int]] = {}
        for number, (name, event, created) in enumerate(writes):
            database.write(row(name, NOON + event * SECOND, NOON + created * SECOND, age=number))
            newest[name] = max(newest.get(name, (0, 0, 0)), (event, created, number))
        for name, (event, _, number) in newest.items():
            assert database.read(name) == [(NOON + event * SECOND, {"age": number})]
    finally:
        shutil.rmtree(folder)


# -- what a crash leaves -------------------------------------------------------------------------


def test_a_row_that_cannot_be_written_takes_its_batch_with_it(database: Database) -> None:
    database.write(row("ann", age=1), row("bob", age=1))
    with pytest.raises(OnlineStoreError, match=r"cannot write to .*online\.db: NOT NULL"):
        database.write(row("ann", age=2), row("bob", pd.NaT, age=2))
    assert [values["age"] for _, values in database.read("ann", "bob")] == [1, 1]


@pytest.mark.parametrize("statement", [2, 3, 40, 102, 103, 104])
def test_a_killed_writer_leaves_the_state_before_its_batch(
    database: Database, statement: int
) -> None:
    names = [f"p{i}" for i in range(100)]
    database.write(*(row(name, age=1) for name in names))

    def die() -> None:
        left = [statement]

        def count(sql: str) -> None:
            if sql.lstrip().startswith(("BEGIN", "INSERT", "COMMIT")):
                left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        database.store._get_conn(database.config).set_trace_callback(count)
        database.write(*(row(name, age=2) for name in names))

    # BEGIN, 100 rows, the mark of the view, COMMIT: the last one dies before it is done, too.
    child = forked(die)
    assert ended(child) == (-signal.SIGKILL if statement <= 103 else 0)
    expected = 1 if statement <= 103 else 2
    assert {values["age"] for _, values in database.read(*names)} == {expected}
    with sqlite3.connect(database.path) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.write(*(row(name, age=2) for name in names))
    assert {values["age"] for _, values in database.read(*names)} == {2}


# -- many at once --------------------------------------------------------------------------------


def reads_whole_batches(database: Database, until: Callable[[], bool]) -> int:
    """Read two keys until told to stop; they must always be of one batch. Returns the last."""
    last = 0
    while not until():
        (_, ann), (_, bob) = database.read("ann", "bob")
        assert ann == bob, "half of a batch was seen"
        assert ann["age"] >= last, "an older batch came back"
        last = ann["age"]
    return last


def writes_batches(database: Database, count: int) -> None:
    for number in range(1, count + 1):
        moment = NOON + number * SECOND
        database.write(row("ann", moment, age=number), row("bob", moment, age=number))


def test_threads_share_a_store(database: Database) -> None:
    database.write(row("ann", age=0), row("bob", age=0))
    done, last, faults = threading.Event(), [], []

    def read() -> None:
        try:
            reads_whole_batches(database, done.is_set)
            last.append(reads_whole_batches(database, iter([False, True]).__next__))
        except Exception as error:
            faults.append(error)

    readers = [threading.Thread(target=read) for _ in range(4)]
    for reader in readers:
        reader.start()
    writes_batches(database, 200)
    done.set()
    for reader in readers:
        reader.join()
    assert faults == []
    assert last == [200] * 4


def test_processes_share_a_file(database: Database) -> None:
    database.write(row("ann", age=0), row("bob", age=0))  # parents' connection is inherited
    deadline = time.monotonic() + 30

    def read() -> None:
        while reads_whole_batches(database, iter([False, True]).__next__) < 200:
            assert time.monotonic() < deadline

    readers = [forked(read) for _ in range(3)]
    writers = [forked(lambda: writes_batches(database, 200)) for _ in range(2)]
    assert [ended(child) for child in readers + writers] == [0] * 5
    assert database.values("ann") == {"age": 200}


def test_processes_that_meet_at_a_new_file_all_get_in(tmp_path: Path) -> None:
    for attempt in range(5):
        path = tmp_path / str(attempt) / "online.db"
        start = time.time() + 0.05

        def write(name: str, path: Path = path, start: float = start) -> None:
            made = Database(path)
            time.sleep(max(0.0, start - time.time()))
            made.apply()
            made.write(row(name, age=1))

        children = [forked(partial(write, f"p{i}")) for i in range(6)]
        assert [ended(child) for child in children] == [0] * 6
        found = Database(path).read(*(f"p{i}" for i in range(6)))
        assert found == [(NOON, {"age": 1})] * 6


def test_readers_do_not_wait_for_a_writer(database: Database) -> None:
    database.write(row("ann", age=1))
    with sqlite3.connect(database.path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        other.execute("DELETE FROM small_people")
        started = time.monotonic()
        assert database.values("ann") == {"age": 1}
        assert time.monotonic() - started < 1
        other.execute("ROLLBACK")


def test_each_thread_and_each_process_has_a_connection_of_its_own(database: Database) -> None:
    mine = database.store._get_conn(database.config)
    assert database.store._get_conn(database.config) is mine
    others: list[sqlite3.Connection] = []
    thread = threading.Thread(
        target=lambda: others.append(database.store._get_conn(database.config))
    )
    thread.start()
    thread.join()
    assert others != [mine]

    def another() -> None:
        assert database.store._get_conn(database.config) is not mine

    assert ended(forked(another)) == 0


def test_a_file_that_was_replaced_is_opened_anew(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "_LOOK_SECONDS", 0.0)
    database.write(row("ann", age=1))
    assert database.values("ann") == {"age": 1}
    for path in database.path.parent.glob("online.db*"):
        path.unlink()
    with pytest.raises(OnlineStoreError, match="no such table: small_people; apply the feature"):
        database.read("ann")
    other = Database(database.path)
    other.apply()
    other.write(row("ann", NOON - SECOND, age=2))
    assert database.values("ann") == {"age": 2}


# -- views that come, change and go --------------------------------------------------------------


def test_a_new_feature_is_absent_until_it_is_written(database: Database) -> None:
    database.write(row("ann", age=41))
    database.apply(a_view(FIELDS | {"height": Float64}))
    assert database.values("ann") == {"age": 41}
    database.write(row("ann", height=1.7))
    assert database.values("ann") == {"age": 41, "height": 1.7}


def test_a_feature_of_another_type_does_not_keep_values_of_the_old_one(database: Database) -> None:
    database.write(row("ann", age=41, name="Ann"))
    database.apply(a_view(FIELDS | {"age": String}))
    assert database.values("ann") == {"name": "Ann"}


def test_a_feature_that_comes_back_does_not_bring_its_old_values(database: Database) -> None:
    database.write(row("ann", age=41, name="Ann"))
    database.apply(a_view({"name": String}))
    database.apply(a_view())
    assert database.values("ann") == {"name": "Ann"}


def test_applying_again_keeps_everything(database: Database) -> None:
    database.write(row("ann", age=41, name="Ann", tags=["a"]))
    database.apply()
    assert database.values("ann") == {"age": 41, "name": "Ann", "tags": ["a"]}


def test_a_view_that_goes_takes_its_rows_and_no_others(database: Database) -> None:
    other = Database(database.path, a_view(name="others"))
    other.apply()
    other.write(row("ann", age=1))
    database.write(row("ann", age=2))
    database.apply(a_view(name="third"), drop=(a_view(),))
    with pytest.raises(OnlineStoreError, match="no such table: small_people"):
        Database(database.path).read("ann")
    assert other.values("ann") == {"age": 1}
    other.store.teardown(other.config, [other.view], [PERSON])
    with pytest.raises(OnlineStoreError, match="no such table: small_others"):
        other.read("ann")
    assert database.path.exists()


def test_writing_makes_the_table_that_is_missing(tmp_path: Path) -> None:
    database = Database(tmp_path / "online.db")  # never applied: somebody removed the file
    database.write(row("ann", age=41))
    assert database.values("ann") == {"age": 41}


def test_names_with_quotes_and_spaces(tmp_path: Path) -> None:
    odd = 'the "age", in years; --'
    database = Database(tmp_path / "online.db", a_view({odd: Int64}))
    database.apply()
    database.write(row("ann", **{odd: 41}))
    assert database.values("ann") == {odd: 41}


def test_a_database_of_feasts_own_store_is_refused_until_apply_rebuilds_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, view = tmp_path / "online.db", a_view()
    theirs, config = SqliteOnlineStore(), a_config(path, type="sqlite")
    theirs.update(config, [], [view], [], [PERSON], partial=False)
    theirs.online_write_batch(config, view, [row("ann", age=41)], None)

    database = Database(path)
    with pytest.raises(OnlineStoreError, match=r"no such column: t\.event_us; apply the feature"):
        database.read("ann")
    with pytest.raises(OnlineStoreError, match="no column named event_us; apply the feature"):
        database.write(row("ann", age=42))
    database.apply()
    assert (
        "small_people was written by Feast's own SqliteOnlineStore and starts empty" in caplog.text
    )
    assert database.read("ann") == [(None, None)]
    database.write(row("ann", age=42))
    assert database.values("ann") == {"age": 42}


# -- faults --------------------------------------------------------------------------------------


def test_a_full_disk_leaves_what_was_there(database: Database) -> None:
    database.write(row("ann", name="Ann"))
    connection = database.store._get_conn(database.config)
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(OnlineStoreError, match=r"write to .*online\.db: .*full; free some space"):
        database.write(*(row(f"p{i}", name="x" * 1000) for i in range(100)))
    assert database.read("ann", "p0") == [(NOON, {"name": "Ann"}), (None, None)]
    database.write(row("ann", name="Anna"))
    assert database.values("ann") == {"name": "Anna"}


def test_a_writer_that_waits_too_long_says_for_whom(database: Database) -> None:
    impatient = Database(database.path, busy_timeout_seconds=0.05)
    with sqlite3.connect(database.path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OnlineStoreError, match="locked; another process is writing; repeat"):
            impatient.write(row("ann", age=1))
        other.execute("ROLLBACK")
    impatient.write(row("ann", age=1))
    assert database.values("ann") == {"age": 1}


def test_a_file_that_may_not_be_written(database: Database) -> None:
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    try:
        database = Database(folder / "online.db")
        database.write(row("ann", age=1))
        (folder / "online.db").chmod(0o444)
        folder.chmod(0o555)

        def write() -> None:
            if os.getuid() == 0:
                os.setuid(65534)  # root may write anything
            with pytest.raises(OnlineStoreError, match=r"online\.db: .*; this user must be able"):
                database.write(row("ann", age=2))

        assert ended(forked(write)) == 0
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OnlineStoreError, match=r"taken/online\.db: .*; name a path that can be"):
        Database(tmp_path / "taken" / "online.db").apply()


def test_a_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "online.db").write_bytes(b"not a database, " * 1000)
    with pytest.raises(OnlineStoreError, match="not a database; delete it with its -wal and -shm"):
        Database(tmp_path / "online.db").read("ann")


def test_the_settings_have_bounds(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="busy_timeout_seconds"):
        assert a_config(tmp_path / "online.db", busy_timeout_seconds=-1).online_store


# -- nearest neighbours --------------------------------------------------------------------------

#: Four points of a plane and one that has no vector.
POINTS: dict[str, list[float] | None] = {
    "east": [1.0, 0.0],
    "north": [0.0, 2.0],
    "far": [3.0, 4.0],
    "origin": [0.0, 0.0],
    "nowhere": None,
}


def plane(path: Path, points: dict[str, list[float] | None] = POINTS) -> Database:
    database = Database(path, a_view({"vector": Array(Float32), "label": String}))
    database.apply()
    database.write(
        *(
            row(name, **({"label": name.upper()} | ({"vector": point} if point else {})))
            for name, point in points.items()
        )
    )
    return database


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        # From (1, 0): 0, √(1+4), √(4+16), 1.
        ("L2", {"east": 0.0, "far": 4.472136, "north": 2.236068, "origin": 1.0}),
        # Cosines with the x axis: 1, 3/5, 0; the origin has no direction.
        ("cosine", {"east": 0.0, "far": 0.4, "north": 1.0, "origin": 1.0}),
        ("inner_product", {"east": -1.0, "far": -3.0, "north": 0.0, "origin": 0.0}),
    ],
)
def test_distances_worked_out_by_hand(
    tmp_path: Path, metric: str, expected: dict[str, float]
) -> None:
    database = plane(tmp_path / "online.db")
    for spelling in (metric, metric.upper(), metric.lower()):
        found = database.nearest([1.0, 0.0], metric=spelling)
        assert found == pytest.approx(expected)
        assert list(found) == sorted(expected)  # in key order: see the docstring


def test_top_k_takes_the_nearest_and_never_more_than_there_are(tmp_path: Path) -> None:
    database = plane(tmp_path / "online.db")
    assert set(database.nearest([1.0, 0.0], 2)) == {"east", "origin"}
    assert len(database.nearest([1.0, 0.0], 100)) == 4


def test_of_equal_distances_the_first_keys_are_taken(tmp_path: Path) -> None:
    circle: dict[str, list[float] | None] = {
        name: [np.cos(i), np.sin(i)] if name != "a" else [0.5, 0.0]
        for i, name in enumerate("hgfedcba")
    }
    same: dict[str, list[float] | None] = {name: [1.0, 1.0] for name in "zyxwv"}
    database = plane(tmp_path / "online.db", circle | same)
    for _ in range(3):
        assert set(database.nearest([1.0, 1.0], 3)) == {"v", "w", "x"}


def test_an_empty_view_has_no_neighbours(tmp_path: Path) -> None:
    assert plane(tmp_path / "online.db", {}).nearest([1.0, 0.0]) == {}
    assert plane(tmp_path / "other.db", {"nowhere": None}).nearest([1.0, 0.0]) == {}


def test_vectors_are_read_again_after_any_write(tmp_path: Path) -> None:
    database = plane(tmp_path / "online.db")
    assert set(database.nearest([9.0, 9.0], 1)) == {"far"}
    database.write(row("east", NOON + SECOND, vector=[9.0, 9.0]))
    assert database.nearest([9.0, 9.0], 1) == {"east": 0.0}
    # An older vector is no change.
    database.write(row("north", NOON - SECOND, vector=[9.0, 9.0]))
    assert set(database.nearest([9.0, 9.0], 2)) == {"east", "far"}

    def elsewhere() -> None:
        Database(database.path, database.view).write(row("new", vector=[9.0, 8.0]))

    assert ended(forked(elsewhere)) == 0
    assert set(database.nearest([9.0, 9.0], 2)) == {"east", "new"}
    database.apply(a_view({"other": String}), drop=(database.view,))
    database.apply(a_view({"vector": Array(Float32), "label": String}))
    assert database.nearest([9.0, 9.0]) == {}


def test_vectors_stay_in_memory_between_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = plane(tmp_path / "online.db")
    loads: list[str] = []
    load = sqlite_store._load
    monkeypatch.setattr(sqlite_store, "_load", lambda *a: loads.append(a[1]) or load(*a))
    for _ in range(3):
        database.nearest([1.0, 0.0])
    assert loads == ["small_people"]


@given(
    st.lists(st.tuples(*[st.integers(-3, 3)] * 3), min_size=1, max_size=30),
    st.tuples(*[st.integers(-3, 3)] * 3),
    st.integers(1, 40),
)
def test_search_equals_brute_force(
    rows: list[tuple[int, ...]], query: tuple[int, ...], count: int
) -> None:
    """Small whole numbers are exact as floats, so ties are ties and the order is known."""

    def squared(r: tuple[int, ...]) -> int:
        return sum((a - b) ** 2 for a, b in zip(r, query, strict=True))

    def product(r: tuple[int, ...]) -> int:
        return -sum(a * b for a, b in zip(r, query, strict=True))

    matrix = np.array(rows, np.float32)
    for metric, measure in {"L2": squared, "inner_product": product}.items():
        far = distances(matrix, query, metric)
        exact = [measure(r) for r in rows]
        assert far.dtype == np.float32
        assert far == pytest.approx(np.sqrt(exact) if metric == "L2" else exact, rel=1e-6)
        expected = sorted(range(len(rows)), key=lambda i: (exact[i], i))[:count]
        assert sqlite_store._smallest(far, count).tolist() == expected


@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 9))
def test_equal_rows_are_equally_far_wherever_they_stand(rows: int, width: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    matrix = np.repeat(random.normal(size=(1, width)).astype(np.float32), rows, axis=0)
    for metric in sqlite_store.METRICS:
        assert len(set(distances(matrix, random.normal(size=width), metric).tolist())) == 1


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(1)
    matrix, query = random.normal(size=(50, 7)).astype(np.float32), random.normal(size=7)
    whole = distances(matrix, query, "cosine")
    monkeypatch.setattr(sqlite_store, "_ROWS_PER_BLOCK", 8)
    assert distances(matrix, query, "cosine").tolist() == whole.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"metric": "L1"}, r"'L1'; it must be one of \['L2', 'cosine', 'inner_product'\]"),
        ({"top_k": 0}, "top_k is 0; it must be 1 or more"),
        ({"query": [1.0]}, "people:vector: the query has 1 numbers, the stored vectors have 2"),
        ({"query": [1.0, float("nan")]}, "the query has shape .* finite numbers in a row"),
        ({"query": None}, "this store searches by vector alone"),
        ({"query_string": "tea"}, "query_string='tea' .* this store searches by vector alone"),
        ({"filters": object()}, "filters=<object.* this store searches by vector alone"),
    ],
)
def test_what_cannot_be_searched(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    database = plane(tmp_path / "online.db")
    with pytest.raises(ValueError, match=message):
        database.nearest(**{"query": [1.0, 0.0]} | arguments)


def test_vectors_of_two_widths_are_refused(tmp_path: Path) -> None:
    database = plane(tmp_path / "online.db", {"a": [1.0], "b": [1.0, 2.0]})
    with pytest.raises(ValueError, match=r"small_people:vector holds vectors of \[1, 2\] numbers"):
        database.nearest([1.0])


def test_the_vector_field_is_the_one_that_is_marked(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"vector": Array(Float32), "second": Array(Float32)}
    database = Database(tmp_path / "online.db", a_view(fields, indexed="second"))
    database.apply()
    database.write(row("a", vector=[0.0], second=[5.0]), row("b", vector=[5.0], second=[0.0]))
    assert database.nearest([0.0], 1) == {"b": 0.0}
    for some in (fields, {"name": String}):
        database.view = a_view(some)
        names = r"\['vector', 'second'\]" if some is fields else r"\[\]"
        with pytest.raises(ValueError, match=f"people has the vector fields {names}; mark exactly"):
            database.nearest([0.0])


# -- through Feast -------------------------------------------------------------------------------


@pytest.fixture
def feast(tmp_path: Path) -> Iterator[FeatureStore]:
    view = a_view({"vector": Array(Float32), "label": String}, indexed="vector")
    moment = pd.Timestamp(NOON)
    rows = pd.DataFrame(
        [
            {"person": name, "vector": point, "label": name.upper(), "event_timestamp": moment}
            for name, point in POINTS.items()
            if point
        ]
    )
    rows.to_parquet(tmp_path / "people.parquet", coerce_timestamps="us")
    view.batch_source = FileSource(
        name="people_source",
        path=str(tmp_path / "people.parquet"),
        timestamp_field="event_timestamp",
    )
    store = FeatureStore(config=a_config(tmp_path / "online.db"))
    store.apply([PERSON, view])
    store.materialize(NOON - SECOND, NOON + SECOND)
    yield store
    store.registry.teardown()


def test_feast_materialises_and_reads(feast: FeatureStore) -> None:
    found = feast.get_online_features(
        features=["people:label", "people:vector"],
        entity_rows=[{"person": p} for p in ("far", "x")],
    ).to_dict()
    assert found == {"person": ["far", "x"], "label": ["FAR", None], "vector": [[3.0, 4.0], None]}


def test_feast_writes_rows_of_its_own(feast: FeatureStore) -> None:
    rows = {"person": ["far"], "label": ["FURTHER"], "vector": [[6.0, 8.0]]}
    for moment, label in ((NOON + SECOND, "FURTHER"), (NOON - SECOND, "OLDER")):
        frame = pd.DataFrame(rows | {"label": [label], "event_timestamp": [pd.Timestamp(moment)]})
        feast.write_to_online_store("people", frame)
    found = feast.get_online_features(features=["people:label"], entity_rows=[{"person": "far"}])
    assert found.to_dict()["label"] == ["FURTHER"]


def test_feasts_search_gives_each_key_its_own_values(feast: FeatureStore) -> None:
    """Nearest to (3, 4) is `far`, then `north`: not the order of the keys."""
    found = feast.retrieve_online_documents_v2(
        features=["people:vector", "people:label"], query=[3.0, 4.0], top_k=3
    ).to_dict()
    assert found == {
        "person": ["east", "far", "north"],
        "label": ["EAST", "FAR", "NORTH"],
        "vector": [[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]],
        "distance": pytest.approx([np.sqrt(20), 0.0, np.sqrt(13)]),
    }


def test_feasts_older_search(feast: FeatureStore) -> None:
    found = feast.retrieve_online_documents(
        features=["people:vector", "people:person", "people:distance"], query=[3.0, 4.0], top_k=2
    ).to_dict()
    assert found == {
        "person": ["far", "north"],
        "vector": [[3.0, 4.0], [0.0, 2.0]],
        "distance": pytest.approx([0.0, np.sqrt(13)]),
    }


def test_feast_makes_nothing_behind_the_stores_back(feast: FeatureStore) -> None:
    provider = feast._get_provider()
    assert provider.online_store.plan(feast.config, feast.registry.proto()) == []
    feast.teardown()
    with pytest.raises(OnlineStoreError, match="no such table"):
        provider.online_read(feast.config, a_view(), [key("far")], ["label"])
