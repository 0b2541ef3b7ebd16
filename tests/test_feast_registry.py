"""Feast's registry in a SQL database: killed writers, readers beside a writer, and newcomers."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import feast.infra.registry.sql  # noqa: F401  before any fork: it takes seconds
import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

import small_store
from fathom.feature_store import FeatureRepo, FeatureStoreConfig
from fathom.spec import FeatureSpec
from small_store import COLUMNS, SPEC, a_spec

REGISTRY = {"registry_type": "sql", "path": "sqlite:///{folder}/registry.db?timeout=60"}
#: A child that hangs is an error, not the end of the test run.
PATIENCE_SECONDS = 120


def a_small_spec(names: str, *crossed: str) -> FeatureSpec:
    return a_spec([c for c in COLUMNS if c["name"] in names.split()], [{"columns": [*crossed]}])


#: Each has views, a cross and fields that the other lacks.
OLD = a_small_spec("user_id tier age item_id genre user_acts item_acts", "user_id", "genre")
NEW = a_small_spec("user_id tier hobbies item_id genre shop user_acts shop_acts", "genre", "shop")


@dataclass(frozen=True)
class World:
    """A feature store whose registry can be put back to where it was."""

    repo: FeatureRepo
    kept: Path

    def open(self) -> Any:
        return self.repo.open()

    def contents(self) -> dict[tuple[str, str], Any]:
        """Everything that is registered, but for times and the counts of versions."""
        state = self.open().registry.proto()
        found = {}
        for kind in ("entities", "data_sources", "feature_views", "feature_services"):
            for item in getattr(state, kind):
                named = item if kind == "data_sources" else item.spec
                found[kind, named.name] = _text(item)
        for item in state.on_demand_feature_views:  # their code is pickled, not always alike
            fields = [(field.name, field.value_type) for field in item.spec.features]
            found["on_demand_feature_views", item.spec.name] = (sorted(fields), item.spec.mode)
        return found

    def keep(self, name: str) -> None:
        for path in self.repo.folder.glob("*.db*"):
            shutil.copy(path, self.kept / f"{name}-{path.name}")

    def put_back(self, name: str) -> None:
        for path in self.repo.folder.glob("*.db*"):
            path.unlink()
        for path in self.kept.glob(f"{name}-*"):
            shutil.copy(path, self.repo.folder / path.name.removeprefix(f"{name}-"))


def _text(message: Any) -> list[str]:
    """All that a message says, in order, because Feast keeps some of it in sets."""
    found = []
    for field, value in message.ListFields():
        single = isinstance(value, str | bytes | int | float) or hasattr(value, "ListFields")
        parts = [value] if single else value.items() if hasattr(value, "items") else value
        for part in parts if field.name != "meta" else ():
            inner = _text(part) if hasattr(part, "ListFields") else [str(part)]
            found += [f"{field.name}.{text}" for text in inner]
    return sorted(found)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Sources of all views; kept states ``nothing``, ``old`` and ``new``."""
    root, kept = tmp_path_factory.mktemp("registry"), tmp_path_factory.mktemp("kept")
    written = small_store.written(root, SPEC, small_store.generated())
    config = FeatureStoreConfig(folder=written.repo.config.folder, registry=REGISTRY)
    made = World(FeatureRepo(config, root), kept)
    made.put_back("nothing")
    for name, spec in {"old": OLD, "new": NEW}.items():
        made.put_back("nothing")
        made.repo.apply(spec)
        made.keep(name)
    return made


@pytest.fixture(scope="module")
def expected(world: World) -> dict[str, dict[tuple[str, str], Any]]:
    """What an undisturbed apply of each spec leaves."""
    found = {}
    for name in ("old", "new"):
        world.put_back(name)
        found[name] = world.contents()
    return found


def forked(act: Callable[[], None]) -> int:
    """Run ``act`` in a process of its own, which ends with 0 if nothing was raised."""
    child = os.fork()
    if child == 0:
        signal.alarm(PATIENCE_SECONDS)
        try:
            act()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"in the child: {error!r}\n".encode())
            os._exit(1)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def on_each_write(act: Callable[[], None]) -> None:
    """Call ``act`` before every statement and every commit that changes the registry."""

    def statement(_c: Any, _cursor: Any, sql: str, *_: Any) -> None:
        if sql.startswith(("INSERT", "UPDATE", "DELETE", "CREATE")):
            act()

    event.listen(Engine, "before_cursor_execute", statement)
    event.listen(Engine, "commit", lambda _c: act())


# -- killed --------------------------------------------------------------------------------------


def test_the_two_specs_differ_in_every_kind_of_object(
    expected: dict[str, dict[tuple[str, str], Any]],
) -> None:
    old, new = expected["old"], expected["new"]
    gone = {kind for kind, name in old.keys() - new.keys()}
    come = {kind for kind, name in new.keys() - old.keys()}
    changed = {key[0] for key in old.keys() & new.keys() if old[key] != new[key]}
    assert gone == {"data_sources", "feature_views", "on_demand_feature_views"}
    assert come == gone | {"entities"}
    assert changed >= {"feature_views", "feature_services"}


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4, 0.6, 0.8, 0.99])
@pytest.mark.parametrize("before", ["nothing", "old"])
def test_apply_after_a_killed_apply_leaves_exactly_the_spec(
    world: World,
    expected: dict[str, dict[tuple[str, str], Any]],
    writes: dict[str, int],
    before: str,
    share: float,
) -> None:
    world.put_back(before)
    left = [1 + int(share * writes[before])]

    def count_down() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def die() -> None:
        on_each_write(count_down)
        world.repo.apply(NEW)

    assert ended(forked(die)) == -signal.SIGKILL
    with sqlite3.connect(world.repo.folder / "registry.db") as raw:
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    world.repo.apply(NEW)
    assert world.contents() == expected["new"]


@pytest.fixture(scope="module")
def writes(world: World) -> dict[str, int]:
    """How many statements and commits it takes to apply NEW, by what is there before."""
    found = {}
    for before in ("nothing", "old"):
        world.put_back(before)
        reader, writer = os.pipe()

        def count(writer: int = writer) -> None:
            counted = [0]

            def one_more() -> None:
                counted[0] += 1

            on_each_write(one_more)
            world.repo.apply(NEW)
            os.write(writer, str(counted[0]).encode())

        assert ended(forked(count)) == 0
        found[before] = int(os.read(reader, 100))
        os.close(reader)
        os.close(writer)
    assert all(count > 50 for count in found.values())
    return found


# -- readers beside a writer ---------------------------------------------------------------------


def shapes(store: Any) -> dict[tuple[str, str], Any]:
    """What a reader sees of views and services: their names and fields."""
    found: dict[tuple[str, str], Any] = {}
    for view in [*store.list_batch_feature_views(), *store.list_on_demand_feature_views()]:
        found["view", view.name] = {(field.name, str(field.dtype)) for field in view.features}
    for service in store.list_feature_services():
        found["service", service.name] = {
            (projection.name, field.name)
            for projection in service.feature_view_projections
            for field in projection.features
        }
    return found


def test_readers_beside_a_writer_never_fail_and_see_whole_objects(world: World) -> None:
    known = {}
    for name in ("old", "new"):
        world.put_back(name)
        known[name] = shapes(world.open())
    until = time.monotonic() + 6

    def read() -> None:
        seen = set()
        while time.monotonic() < until:
            for key, shape in shapes(world.open()).items():
                assert shape in [known[name].get(key) for name in known], f"half of {key}: {shape}"
                seen.add((key, str(sorted(shape))))
        assert len(seen) > len(known["old"])  # the reader met both

    def read_in_threads() -> None:
        faults: list[BaseException] = []

        def attempt() -> None:
            try:
                read()
            except BaseException as error:
                faults.append(error)

        threads = [threading.Thread(target=attempt) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if faults:
            raise faults[0]

    def write() -> None:
        while time.monotonic() < until:
            world.repo.apply(OLD)
            world.repo.apply(NEW)

    children = [forked(act) for act in (read, read_in_threads, write)]
    assert [ended(child) for child in children] == [0, 0, 0]


def test_processes_that_meet_at_a_new_registry_all_get_in(world: World) -> None:
    for _ in range(3):
        world.put_back("nothing")
        start = time.time() + 0.1

        def newcomer(start: float = start) -> None:
            time.sleep(max(0.0, start - time.time()))
            assert world.open().list_batch_feature_views() == []

        children = [forked(newcomer) for _ in range(5)]
        assert [ended(child) for child in children] == [0] * 5


def test_a_reader_and_a_writer_wait_for_a_locked_registry(world: World) -> None:
    world.put_back("old")
    with locked(world.repo.folder / "registry.db", seconds=1.5):
        started = time.monotonic()
        store = world.open()
        assert time.monotonic() - started > 1
    with store.registry.write_engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 60_000


class locked:
    """Meanwhile nobody else reads or writes a database; let go after a while."""

    def __init__(self, path: Path, seconds: float) -> None:
        self.connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self.timer = threading.Timer(seconds, self.let_go)

    def __enter__(self) -> None:
        self.connection.execute("BEGIN EXCLUSIVE")
        self.timer.start()

    def __exit__(self, *_: object) -> None:
        self.timer.join()
        self.connection.close()

    def let_go(self) -> None:
        self.connection.execute("ROLLBACK")


@pytest.fixture(autouse=True)
def _nothing_left_behind(world: World) -> Iterator[None]:
    yield
    world.put_back("nothing")
