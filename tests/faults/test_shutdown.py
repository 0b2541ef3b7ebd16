"""SIGTERM: what was asked is answered, what is new is not taken, what was logged is written."""

from __future__ import annotations

import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pyarrow.parquet as pq
import pytest

from fathom.serving import ServingConfig
from running_service import Running, running

pytestmark = pytest.mark.e2e

CONTEXT = {"shelf": "low", "shop": "shop1", "discount": 0.1}
#: Explaining as many takes some tenths of a second, in which the others wait.
CANDIDATES, CLIENTS = 5_000, 6
#: BentoML's supervisor kills what has not ended by then, and so does Kubernetes.
SECONDS = 30.0


def asking(service: Running) -> httpx.Response:
    items = [f"i{i % 40}" for i in range(CANDIDATES)]
    body = {"user": "u2", "context": CONTEXT, "candidates": items, "explain": True}
    return httpx.post(f"{service.url}/rank", json=body, trust_env=False, timeout=60)


def wait_until_in_progress(service: Running, count: int) -> None:
    """Until the process has so many requests; those on their way to it could ask another one."""
    until = time.monotonic() + SECONDS
    found = 0
    while found < count:
        assert time.monotonic() < until, f"{found} in progress"
        text = httpx.get(f"{service.url}/metrics", trust_env=False, timeout=SECONDS).text
        rank = re.search(r'fathom_requests_in_progress\{.*path="/rank".*\} (\S+)', text)
        found = int(float(rank[1])) if rank else 0


@pytest.mark.parametrize("whole_group", [False, True], ids=["supervisor", "process group"])
def test_what_is_in_flight_is_answered_and_logged(tmp_path: Path, whole_group: bool) -> None:
    """An orchestrator tells the supervisor, a shell all of its processes."""
    config = ServingConfig(
        queue_seconds=30, deadline_seconds=25, feature_log=str(tmp_path / "features_log")
    )
    with running(tmp_path, config) as service, ThreadPoolExecutor(CLIENTS) as pool:
        assert asking(service).status_code == 200
        family = [psutil.Process(service.process.pid)]
        family += family[0].children(recursive=True) if whole_group else []
        asked = [pool.submit(asking, service) for _ in range(CLIENTS)]
        wait_until_in_progress(service, CLIENTS)
        began = time.monotonic()
        for process in family:
            process.send_signal(signal.SIGTERM)
        assert service.process.wait(SECONDS) == 0
        assert time.monotonic() - began < SECONDS
        assert [answer.result().status_code for answer in asked] == [200] * CLIENTS
        assert not any(process.is_running() for process in family)
        address = ("127.0.0.1", int(service.url.rpartition(":")[2]))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        logged = pq.read_table(tmp_path / "features_log")
        assert len(logged) == (CLIENTS + 1) * CANDIDATES
