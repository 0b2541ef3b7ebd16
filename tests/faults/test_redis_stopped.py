"""Redis stops, or hangs, in the middle of serving: answers go on, say so, and recover.

The service is a process of its own with a real Redis, which is killed and stopped under it. What it
served with the user's features is replayed afterwards, and is what history says.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from fathom.feature_store import FeatureRepo
from fathom.online import OnlineFeatures
from fathom.registry import Registry
from fathom.serving import ServingConfig
from fathom.skew import SkewConfig, judge, replay
from load import Load, load
from redis_server import RedisServer
from running_service import Running, running
from small_ranker import DAYS, SPEC, START, USERS, feature_store, register

pytestmark = [pytest.mark.redis, pytest.mark.e2e]

ROOT = Path(__file__).resolve().parents[2]
UNTIL = START + timedelta(days=DAYS + 1)
MOMENT = datetime(2024, 2, 1, 10, tzinfo=timezone.utc)
CONTEXT = {"shelf": "low", "shop": "shop1", "discount": 0.1}
#: For each answer, whatever the store does; a busy machine is part of it.
BUDGET_SECONDS = 3.0


def conf_options() -> str:
    """What conf/redis says after the address."""
    text = (ROOT / "conf/redis/globals.yml").read_text(encoding="utf-8")
    connection: str = yaml.safe_load(text)["online_store"]["connection_string"]
    return connection.split(",", 1)[1]


def on_redis(folder: Path, server: RedisServer) -> FeatureRepo:
    """A small feature store whose online rows are in Redis."""
    embedded = feature_store(folder)
    for name in ("online.json", "registry.db"):
        (embedded.folder / name).unlink()
    settings = embedded.config.model_copy(update={"online_store": server.settings})
    repo = replace(embedded, config=settings)
    repo.apply(SPEC)
    repo.materialise(SPEC, UNTIL)
    return repo


# -- a service -----------------------------------------------------------------------------------


@dataclass
class Service:
    """A process that ranks."""

    client: httpx.Client
    asked: int = 0

    @staticmethod
    def body(count: int) -> dict[str, Any]:
        """A request, of one user after the other."""
        return {
            "user": f"u{count % USERS}",
            "context": CONTEXT,
            "candidates": [f"i{i}" for i in range(20)],
            "timestamp": (MOMENT + timedelta(seconds=count)).isoformat(),
        }

    def rank(self) -> dict[str, Any]:
        """The next answer; always 200 and within the budget."""
        body = self.body(self.asked)
        self.asked += 1
        started = time.perf_counter()
        answer = self.client.post("/rank", json=body)
        assert time.perf_counter() - started < BUDGET_SECONDS
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def until(self, degraded: bool, seconds: float = 30) -> int:
        """Rank until answers are, or are not, degraded; how many it took."""
        began, count = time.monotonic(), 1
        while self.rank()["degraded"] is not degraded:
            assert time.monotonic() - began < seconds
            time.sleep(0.02)
            count += 1
        return count


@dataclass(frozen=True)
class House:
    """A service on Redis, what it reads, and where its log is."""

    service: Service
    running: Running
    server: RedisServer
    repo: FeatureRepo
    registry: Registry
    log: Path


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """The service as `kedro serve` runs it, but without a Bento."""
    registry = Registry(tmp_path / "registry")
    artifact = register(tmp_path / "ranker")
    version = registry.register(artifact.ranker.save)
    artifact = replace(artifact, folder=registry.path(version))
    log = tmp_path / "feature_log"
    # Nobody is to be turned away because the machine that runs the tests is busy.
    config = ServingConfig(refresh_seconds=1, feature_log=str(log), queue_seconds=5)
    with RedisServer(conf_options()) as server:
        repo = on_redis(tmp_path / "store", server)
        with (
            running(tmp_path, config, artifact, repo) as started,
            httpx.Client(base_url=started.url, trust_env=False, timeout=30) as client,
        ):
            yield House(Service(client), started, server, repo, registry, log)


def test_answers_go_on_while_redis_is_down_and_recover_by_themselves(house: House) -> None:
    served, server, repo = house.service, house.server, house.repo
    for _ in range(2 * USERS):
        answer = served.rank()
        assert (answer["degraded"], answer["user_known"]) == (False, True)

    server.stop()
    degraded = 0
    for _ in range(60):
        answer = served.rank()
        assert (answer["degraded"], answer["user_known"]) == (True, False)
        degraded += 1
    assert served.client.get("/model").json()["feature_store"] == "degraded"
    assert served.client.get("/readyz").status_code == 200
    server.start()  # empty, as a server that keeps nothing comes back
    repo.materialise(SPEC, UNTIL)
    degraded += served.until(degraded=False) - 1
    for _ in range(2 * USERS):
        answer = served.rank()
        assert (answer["degraded"], answer["user_known"]) == (False, True)

    with server.hanging():
        for _ in range(30):
            assert served.rank()["degraded"]
            degraded += 1
    degraded += served.until(degraded=False) - 1
    for _ in range(USERS):
        assert served.rank()["user_known"]
    assert house.running.counted("degraded_requests") == degraded
    assert house.running.counted("unlogged_rows") == 0

    house.running.stop()
    config = SkewConfig(feature_log=str(house.log))
    report = replay(repo, house.registry, config).as_dict()
    assert report["requests"] == served.asked
    assert report["degraded"] == degraded * 20
    assert report["compared"] == (served.asked - degraded) * 20
    assert report["differing"] == 0, report["columns"]
    judge(report, config)


def test_clients_that_ask_without_pause_see_no_error_when_redis_is_killed_and_comes_back(
    house: House,
) -> None:
    bodies = [house.service.body(i) for i in range(4)]

    def wait_for_answers(found: Load, degraded: bool, seconds: float = 60) -> None:
        """Until each client has had twenty of a kind, or more, and none of the other among them."""
        until = time.monotonic() + seconds
        while found.seen(_degraded)[-80:] != [degraded] * 80:
            assert time.monotonic() < until, found.failures or found.seen(_degraded)[-80:]
            time.sleep(0.02)

    with load(house.running.url, [("/rank", body) for body in bodies]) as found:
        wait_for_answers(found, degraded=False)
        house.server.stop()
        wait_for_answers(found, degraded=True)
        house.server.start()
        house.repo.materialise(SPEC, UNTIL)
        wait_for_answers(found, degraded=False)
        with house.server.hanging():
            wait_for_answers(found, degraded=True)
        wait_for_answers(found, degraded=False)
    assert not found.failures
    assert all(taken < BUDGET_SECONDS for taken in found.seen(lambda r: r.elapsed.total_seconds()))


def _degraded(response: httpx.Response) -> bool:
    return bool(response.json()["degraded"])


# -- without any options -------------------------------------------------------------------------


def test_a_redis_that_hangs_for_ever_costs_one_late_answer(tmp_path: Path) -> None:
    """Redis' own client waits for ever, and tries again for seconds, unless it is told not to."""
    with RedisServer("db=0") as server:
        repo = on_redis(tmp_path, server)
        online = OnlineFeatures.open(repo, SPEC, read_seconds=0.3)
        candidates = [{"item_id": f"i{i}"} for i in range(20)]

        def timed(user: str) -> tuple[bool, float]:
            started = time.perf_counter()
            _, known = online.frame(user, CONTEXT, candidates, MOMENT)
            return known.degraded, time.perf_counter() - started

        def wait_until_up() -> None:
            deadline = time.monotonic() + 60
            while online.degraded:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert not timed("u1")[0]

        assert not timed("u1")[0]
        with server.hanging():
            first = timed("u1")
            rest = [timed(f"u{i % USERS}") for i in range(50)]
        assert first[0]
        assert 0.3 <= first[1] < BUDGET_SECONDS
        assert all(degraded and seconds < 0.3 for degraded, seconds in rest)
        wait_until_up()

        server.stop()
        gone = [timed(f"u{i % USERS}") for i in range(50)]
        assert all(degraded for degraded, _ in gone)
        assert max(seconds for _, seconds in gone) < BUDGET_SECONDS
        server.start()
        wait_until_up()
        online.close()
