"""Redis stops, or hangs, in the middle of serving: answers go on, say so, and recover.

The service is a process of its own with a real Redis, which is killed and stopped under it. What it
served with the user's features is replayed afterwards, and is what history says.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
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
from fathom.replay import ReplayConfig, judge, replay
from fathom.service import FEATURE_LOG, FEATURE_STORE, RANKER, SERVING
from ports import free_port
from redis_server import RedisServer
from small_ranker import DAYS, SPEC, START, USERS, feature_store, register

pytestmark = [pytest.mark.redis, pytest.mark.e2e]

ROOT = Path(__file__).resolve().parents[2]
UNTIL = START + timedelta(days=DAYS + 1)
MOMENT = datetime(2024, 2, 1, 10, tzinfo=timezone.utc)
CONTEXT = {"shelf": "low", "shop": "shop1", "discount": 0.1}
#: For each answer, whatever the store does; a busy machine is part of it.
BUDGET_SECONDS = 1.0


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

    process: subprocess.Popen[bytes]
    client: httpx.Client
    asked: int = 0

    def rank(self) -> dict[str, Any]:
        """One answer, of one user after the other; always 200 and within the budget."""
        body = {
            "user": f"u{self.asked % USERS}",
            "context": CONTEXT,
            "candidates": [f"i{i}" for i in range(20)],
            "timestamp": (MOMENT + timedelta(seconds=self.asked)).isoformat(),
        }
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

    def stop(self) -> None:
        """End it as an orchestrator would; what it has logged is written by then."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            self.process.wait(30)

    def counted(self, name: str) -> float:
        found = re.search(rf"^fathom_{name}_total (\S+)$", self.client.get("/metrics").text, re.M)
        return float(found[1]) if found else 0.0


@pytest.fixture
def service(
    tmp_path: Path,
) -> Iterator[tuple[Service, RedisServer, FeatureRepo, Path]]:
    """The service as `kedro serve` runs it, but without a Bento; its store, its server, its log."""
    registry = Registry(tmp_path / "registry")
    artifact = register(tmp_path / "ranker")
    version = registry.register(artifact.ranker.save)
    with RedisServer(conf_options()) as server:
        repo = on_redis(tmp_path / "store", server)
        port = free_port()
        environment = os.environ | {
            RANKER: str(registry.path(version)),
            FEATURE_STORE: json.dumps({"root": str(repo.root), **repo.config.model_dump()}),
            SERVING: json.dumps({"refresh_seconds": 1}),
            FEATURE_LOG: str(tmp_path / "log"),
            "PYTHONPATH": str(ROOT / "src"),
            "BENTOML_HOME": str(tmp_path / "bentoml"),
        }
        target = "fathom.service:RankingService"
        with open(tmp_path / "service.log", "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "bentoml", "serve", target, "--port", str(port)],
                cwd=tmp_path,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, trust_env=False, timeout=30) as client:
            service = Service(process, client)
            try:
                wait_until_ready(client, process, tmp_path / "service.log")
                yield service, server, repo, tmp_path
            finally:
                service.stop()


def wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if client.get("/readyz", timeout=1).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    pytest.fail(log.read_text(encoding="utf-8", errors="replace")[-4000:])


def test_answers_go_on_while_redis_is_down_and_recover_by_themselves(
    service: tuple[Service, RedisServer, FeatureRepo, Path],
) -> None:
    served, server, repo, folder = service
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
    assert served.counted("degraded_requests") == degraded
    assert served.counted("unlogged_rows") == 0

    served.stop()
    config = ReplayConfig(feature_log=str(folder / "log"))
    report = replay(repo, Registry(folder / "registry"), config).as_dict()
    assert report["requests"] == served.asked
    assert report["degraded"] == degraded * 20
    assert report["compared"] == (served.asked - degraded) * 20
    assert report["differing"] == 0, report["columns"]
    judge(report, config)


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
