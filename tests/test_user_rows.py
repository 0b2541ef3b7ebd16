"""Reads of the online store take a bounded time, whatever it does, and go on when it is back.

The store here is one that fails, hangs or dawdles on demand; `faults/test_redis_stopped` does the
same to a real one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from feast.protos.feast.types.Value_pb2 import (
    DoubleList,
    Int64List,
    StringList,
    Value,
)

from fathom.user_rows import Row, StoreDownError, UserRows

NOON = datetime(2024, 1, 2, 12, tzinfo=timezone.utc)
FIELDS = {"tastes": ["likes", "counts", "shares"], "users": ["age", "city", "score"]}
SECONDS = 0.2


class View(NamedTuple):
    name: str


class Store:
    """What `UserRows` needs of Feast, with a fault that can be set."""

    def __init__(self, kind: str = "redis") -> None:
        self.config = SimpleNamespace(online_store=SimpleNamespace(type=kind))
        self.asked = 0
        self.fault: Callable[[], None] = lambda: None

    def _get_provider(self) -> Store:
        return self

    def get_feature_view(self, name: str) -> View:
        return View(name)

    def online_read(self, config: object, view: View, keys: list[Any], fields: list[str]) -> Any:
        self.asked += 1
        self.fault()
        fields.append("the store's own")  # as Feast's Redis store does
        (key,) = keys
        user = key.entity_values[0].string_val
        if user == "nobody":
            return [(None, None)]
        if user == "empty":  # what Redis says of a key that is not there
            return [(datetime(1970, 1, 1, tzinfo=timezone.utc), {"age": Value(), "city": Value()})]
        if view.name == "users":
            return [(NOON, {"age": Value(int64_val=7), "city": Value(string_val=user)})]
        lists = {
            "likes": Value(string_list_val=StringList(val=["tea", user])),
            "counts": Value(int64_list_val=Int64List(val=[1, 2**53])),
            "shares": Value(double_list_val=DoubleList(val=[])),
        }
        return [(NOON, lists)]


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture(params=["redis", "sqlite", "fathom.sqlite_store.WalSqliteOnlineStore"])
def any_store(request: pytest.FixtureRequest) -> Store:
    """One that is another process, and two that are embedded."""
    return Store(request.param)


@pytest.fixture
def any_rows(any_store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[UserRows]:
    monkeypatch.setattr("fathom.user_rows.RETRY_SECONDS", 0.02)
    rows = UserRows(any_store, "user_id", FIELDS, SECONDS)  # type: ignore[arg-type]
    yield rows
    rows.close()


@pytest.fixture
def rows(store: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[UserRows]:
    monkeypatch.setattr("fathom.user_rows.RETRY_SECONDS", 0.02)
    rows = UserRows(store, "user_id", FIELDS, SECONDS)  # type: ignore[arg-type]
    yield rows
    rows.close()


def wait_until_up(rows: UserRows) -> None:
    deadline = time.monotonic() + 10
    while rows.down:
        assert time.monotonic() < deadline, "it did not recover"
        time.sleep(0.005)


def timed(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    with pytest.raises(StoreDownError):
        act()
    return time.perf_counter() - started


def test_a_users_rows_are_plain_values(any_rows: UserRows):
    rows = any_rows
    found = rows.read("u1")
    assert found["users"] == Row(NOON, {"age": 7, "city": "u1"})
    assert found["tastes"].values["likes"] == ["tea", "u1"]
    np.testing.assert_array_equal(found["tastes"].values["counts"], [1, 2**53])
    assert len(found["tastes"].values["shares"]) == 0
    assert rows.read("u2")["users"].values["city"] == "u2"


@pytest.mark.parametrize("user", ["nobody", "empty"])
def test_a_user_without_rows_has_no_moment(rows: UserRows, user: str):
    for row in rows.read(user).values():
        assert row.moment is None
        assert not any(value is not None for value in row.values.values())


def test_a_key_that_cannot_be_stored_is_not_asked_for(rows: UserRows, store: Store):
    assert rows.read("\ud800") == {}
    assert store.asked == 0


def test_without_views_nothing_is_asked(store: Store):
    assert UserRows(store, "user_id", {}).read("u1") == {}  # type: ignore[arg-type]
    assert store.asked == 0


def refuse() -> None:
    raise ConnectionError("connection refused")


def test_a_store_that_fails_is_not_asked_again_until_it_answers(
    any_rows: UserRows, any_store: Store, caplog: pytest.LogCaptureFixture
):
    rows, store = any_rows, any_store
    store.fault = refuse
    with pytest.raises(StoreDownError, match="the online store failed: connection refused"):
        rows.read("u1")
    assert rows.down
    with pytest.raises(StoreDownError, match="is down and being tried again"):
        rows.read("u1")
    store.fault = lambda: None
    wait_until_up(rows)  # though nobody asks
    assert rows.read("u1")["users"].moment == NOON
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "the online store is down (ConnectionError); users count as unknown until it is back",
        "the online store answers again",
    ]


def test_requests_do_not_wait_for_a_store_that_hangs(rows: UserRows, store: Store):
    released = threading.Event()
    store.fault = lambda: released.wait(30) and None
    assert timed(lambda: rows.read("u1")) < SECONDS + 1
    asked = store.asked
    for _ in range(100):
        assert timed(lambda: rows.read("u1")) < SECONDS / 2
    assert store.asked == asked
    store.fault = lambda: None
    released.set()
    wait_until_up(rows)
    assert rows.read("u1")["users"].moment == NOON


def test_an_embedded_store_is_asked_by_whoever_reads():
    """Another thread would only have to be waited for."""
    asked = []
    for kind in ("redis", "sqlite"):
        store = Store(kind)
        store.fault = lambda: asked.append(threading.current_thread() is threading.main_thread())
        rows = UserRows(store, "user_id", FIELDS, SECONDS)  # type: ignore[arg-type]
        rows.read("u1")
        rows.close()
    assert asked == [False, False, True, True]


def test_a_store_that_answers_too_late_every_time_stays_down(rows: UserRows, store: Store):
    store.fault = lambda: time.sleep(SECONDS * 0.75)  # in each of two views
    with pytest.raises(StoreDownError, match=r"did not answer within 0\.2 s"):
        rows.read("u1")
    time.sleep(SECONDS * 4)
    assert rows.down
    store.fault = lambda: None
    wait_until_up(rows)


def test_threads_get_their_own_users_while_the_store_comes_and_goes(
    any_rows: UserRows, any_store: Store
):
    rows, store = any_rows, any_store
    ends = threading.Event()

    def flap() -> None:
        while not ends.wait(0.01):
            store.fault = refuse
            ends.wait(0.01)
            store.fault = lambda: None

    def ask(worker: int) -> tuple[int, int]:
        served = refused = 0
        for i in range(200):
            user = f"u{worker}-{i}"
            try:
                found = rows.read(user)
            except StoreDownError:
                refused += 1
                time.sleep(0.001)
                continue
            served += 1
            assert found["users"].values["city"] == user
            assert found["tastes"].values["likes"][1] == user
        return served, refused

    flapping = threading.Thread(target=flap)
    flapping.start()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(ask, range(4)))
    ends.set()
    flapping.join()
    store.fault = lambda: None
    wait_until_up(rows)
    assert rows.read("u1")["users"].moment == NOON
    assert sum(served for served, _ in results) > 0
    assert sum(refused for _, refused in results) > 0


def test_after_it_is_closed_its_thread_ends(store: Store):
    rows = UserRows(store, "user_id", FIELDS, SECONDS)  # type: ignore[arg-type]
    store.fault = refuse
    assert timed(lambda: rows.read("u1")) < SECONDS + 1
    rows.close(seconds=5)
    assert not rows._thread.is_alive()
