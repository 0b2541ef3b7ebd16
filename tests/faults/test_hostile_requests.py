"""Requests that mean harm: each is refused soon, in words, and leaves nothing behind.

`test_service` has what is said of each fault; here is what an open port has to bear.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from fathom import api
from fathom.serving import ServingConfig
from running_service import Running, running

pytestmark = pytest.mark.e2e

#: For each refusal: what 16 MiB of JSON take to read, on a machine that does other things, too.
SOON_SECONDS = 60.0
#: What may be left of bodies that are not read, and of those that are once the allocator has had as
#: much from the system as they take.
GROWTH_BYTES = 100 << 20
MEGABYTE = b" " * 1_000_000
MANY = range(100_000)
WRONG = (None, True, 3, "x", [], {}, [[]], [None], {"a": 1})


def objects(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def bodies() -> Iterator[tuple[str, bytes]]:
    """Path and body of what is to be refused."""
    number = b"9" * 5_000
    for path in ("/rank", "/recommend", "/predict"):
        yield path, b"[" * 100_000
        yield path, b'{"user":' * 100_000
        yield path, b'{"rows": [{"discount": %s}], "k": %s, "user": %s}' % (number, number, number)
        yield path, b'{"rows": [{"discount": NaN}], "k": Infinity, "user": -Infinity}'
        yield path, objects(**{f"f{i}": i for i in MANY})
        for wrong in WRONG:
            yield path, json.dumps(wrong).encode()
            fields = ("user", "candidates", "context", "rows", "k", "where", "allow", "timestamp")
            yield path, objects(**dict.fromkeys(fields, wrong))
    yield "/rank", objects(**dict.fromkeys(map(str, range(1_000_000)), 1))
    yield "/rank", objects(user="u", candidates=["i1"] * 1_000_000)
    yield "/rank", objects(user="u", candidates=[{}] * 100_000)
    yield "/rank", objects(user="u", candidates=["i1"], context=dict.fromkeys(MANY, 1))
    yield "/rank", objects(user="u", candidates=[{"item": "i", "context": {"a": 1}}] * 10_000)
    yield "/predict", objects(rows=[{}] * 10_000)
    yield "/predict", objects(rows=[1] * 1_000_000)
    yield "/recommend", objects(user="u", allow=["i1"] * 1_000_000)
    yield "/recommend", objects(user="u", where={str(i): [] for i in MANY})


@pytest.fixture(scope="module")
def hardened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service that turns nobody away, so that each request is read, and waits for none long."""
    config = ServingConfig(queue_seconds=30, deadline_seconds=30)
    with running(tmp_path_factory.mktemp("hardened"), config) as service:
        yield service


@pytest.fixture
def client(hardened: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=hardened.url, trust_env=False, timeout=2 * SOON_SECONDS) as client:
        yield client


def test_each_is_refused_soon_and_no_memory_stays_with_them(
    hardened: Running, client: httpx.Client
) -> None:
    def ask(path: str, body: bytes) -> None:
        began = time.monotonic()
        response = client.post(path, content=body)
        assert response.status_code == 400, (path, body[:80], response.text)
        assert time.monotonic() - began < SOON_SECONDS
        assert (
            api.ErrorAnswer.model_validate_json(response.text).faults or "too many" in response.text
        )

    hostile, sizes = list(bodies()), [0, 0]
    # What the service still imports in the background after its start comes once; what stayed of
    # requests would come with each round.
    while sizes[-1] - sizes[-3:][0] >= GROWTH_BYTES or len(sizes) < 5:
        assert len(sizes) < 12, sizes
        for path, body in hostile:
            ask(path, body)
        sizes.append(hardened.resident_bytes)


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
def test_a_hundred_megabytes_are_not_read(
    hardened: Running, client: httpx.Client, declared: bool
) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield MEGABYTE

    before = hardened.resident_bytes
    headers = {"Content-Length": "100000000"} if declared else {}
    for _ in range(10):
        began = time.monotonic()
        response = client.post("/rank", content=chunks(), headers=headers)
        assert response.status_code == 413
        assert "at most 16777216 are allowed" in api.ErrorAnswer(**response.json()).error
        assert time.monotonic() - began < SOON_SECONDS
    assert hardened.resident_bytes - before < GROWTH_BYTES


def test_slow_clients_hold_nobody_up_and_are_cut_off(tmp_path: Path) -> None:
    """Forty that send a byte now and then, of the head or of the body."""
    with running(tmp_path, ServingConfig(deadline_seconds=2)) as service:
        address = ("127.0.0.1", int(service.url.rpartition(":")[2]))
        head = b"POST /rank HTTP/1.1\r\nHost: fathom\r\nContent-Length: 1000\r\n"
        slow = [socket.create_connection(address) for _ in range(40)]
        for connection in slow[:20]:
            connection.sendall(head)
        for connection in slow[20:]:
            connection.sendall(head + b"\r\n{")
        until = time.monotonic() + 4
        with httpx.Client(base_url=service.url, trust_env=False, timeout=5) as client:
            while time.monotonic() < until:
                for path in ("/livez", "/readyz", "/model"):
                    assert client.get(path).status_code == 200
                for connection in slow[:20]:
                    connection.sendall(b"X")
                time.sleep(0.1)
        for connection in slow[20:]:
            connection.settimeout(5)
            with connection.makefile("rb") as answer:
                assert b"408" in answer.readline()
                assert b"the body did not come in time" in answer.read()  # and it is closed
        for connection in slow:
            connection.close()


def test_health_checks_answer_meanwhile(hardened: Running, client: httpx.Client) -> None:
    hostile, done = list(bodies()), threading.Event()

    def watch() -> int:
        count = 0
        with httpx.Client(base_url=hardened.url, trust_env=False, timeout=SOON_SECONDS) as probe:
            while not done.is_set():
                for path in ("/livez", "/readyz"):
                    assert probe.get(path).status_code == 200
                    count += 1
        return count

    with ThreadPoolExecutor(1) as pool:
        watched = pool.submit(watch)
        try:
            for path, body in hostile:
                client.post(path, content=body)
        finally:
            done.set()
        assert watched.result() > 20
