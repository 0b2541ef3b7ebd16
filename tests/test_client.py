"""The client: against a real service, and against a server that misbehaves in every way."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from fathom.client import AsyncClient, Client, ClientConfig, ServiceError
from fathom.ranker import TOLERANCE
from running_service import Running

QUICK = ClientConfig(
    deadline_seconds=5, timeout_seconds=0.3, first_wait_seconds=0.01, longest_wait_seconds=0.05
)
ANSWER = {"version": "v1", "request_id": "r1", "probabilities": [0.25]}
CONTEXT = {"shelf": "low", "shop": "shop1", "discount": 0.1}

Behaviour = Callable[[socket.socket], None]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


# -- a server that misbehaves ---------------------------------------------------------------------


class Server:
    """Reads requests, and does with each what the next of its behaviours says."""

    def __init__(self) -> None:
        self.behaviours: list[Behaviour] = []
        self.requests: list[bytes] = []
        self.moments: list[float] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def does(self, *behaviours: Behaviour) -> str:
        self.behaviours = list(behaviours)
        return self.url

    def close(self) -> None:
        with suppress(OSError):  # closed before
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._handle, args=(connection,), daemon=True).start()

    def _handle(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            self.requests.append(_request(connection))
            self.moments.append(time.monotonic())
            self.behaviours.pop(0)(connection)


def _request(connection: socket.socket) -> bytes:
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    length = re.search(rb"(?i)content-length: (\d+)", head)
    while length and len(body) < int(length[1]):
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def says(status: int, content: Any, *headers: str) -> Behaviour:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    lines = [f"HTTP/1.1 {status} Some", f"Content-Length: {len(body)}", "Connection: close"]
    head = "\r\n".join([*lines, *headers, "", ""]).encode()
    return lambda connection: connection.sendall(head + body)


def resets(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def hangs_up(_: socket.socket) -> None:
    """Closes without a word."""


def breaks_off(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")


def is_silent(_: socket.socket) -> None:
    time.sleep(1)


def drips(connection: socket.socket) -> None:
    """Each byte in time, the whole never."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(100):
        connection.sendall(b" ")
        time.sleep(0.1)


OK = says(200, ANSWER)
BUSY = {"error": "64 requests are being answered already"}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


def predict(url: str, config: ClientConfig = QUICK, **how: Any) -> Any:
    with Client(url, config=config) as client:
        return client.predict([{"a": 1.0}], **how)


@pytest.mark.parametrize(
    "fault",
    [
        *(resets, hangs_up, breaks_off, is_silent),
        *(says(429, BUSY), says(504, {"error": "late"}), says(502, b"<html>Bad Gateway")),
        says(503, b"no endpoints available"),  # a gateway's, which does not know the header
        says(503, {"error": "being opened"}, "Retry-After: 0", "X-Fathom-Version: v1"),
    ],
)
def test_what_may_pass_is_tried_again(server: Server, fault: Behaviour) -> None:
    answer = predict(server.does(fault, fault, OK))
    assert answer.probabilities == [0.25]
    assert len(server.requests) == 3
    # The same request each time, under one id.
    ids = [re.findall(rb"(?i)x-request-id: ([0-9a-f]{32})", request) for request in server.requests]
    assert ids == [ids[0]] * 3
    assert len(ids[0]) == 1
    bodies = {request.partition(b"\r\n\r\n")[2] for request in server.requests}
    assert bodies == {b'{"rows": [{"a": 1.0}]}'}


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 405, 413, 500])
def test_what_would_not_pass_is_not_tried_again(server: Server, status: int) -> None:
    with pytest.raises(ServiceError, match=rf"POST /predict: {status}, it is so \(") as caught:
        predict(server.does(says(status, {"error": "it is so"}), OK))
    assert caught.value.status == status
    assert len(server.requests) == caught.value.attempts == 1


def test_a_service_that_cannot_come_says_so_by_no_retry_after(server: Server) -> None:
    absent = says(503, {"error": "this service has no feature store"}, "X-Fathom-Version: v1")
    with pytest.raises(ServiceError, match="503, this service has no feature store") as caught:
        predict(server.does(absent, OK))
    assert caught.value.attempts == 1


def test_a_refusal_carries_its_faults_and_the_services_request_id(server: Server) -> None:
    faults = [{"field": f"rows[{i}].price", "fault": "is no column; remove it"} for i in range(7)]
    refusal = {"error": "7 faults in the request", "request_id": "r9", "faults": faults}
    with pytest.raises(ServiceError) as caught:
        predict(server.does(says(400, refusal)), request_id="r8")
    error = caught.value
    assert (error.status, error.request_id, len(error.faults)) == (400, "r9", 7)
    assert error.faults[6].field == "rows[6].price"
    assert str(error).endswith(
        "rows[4].price is no column; remove it; 2 more (request r9, 1 attempt)"
    )
    assert b"r8" in server.requests[0]


def test_attempts_are_bounded(server: Server) -> None:
    with pytest.raises(ServiceError, match=r"429, 64 requests .*4 attempts\)") as caught:
        predict(server.does(*[says(429, BUSY)] * 9))
    assert len(server.requests) == caught.value.attempts == QUICK.attempts == 4


def test_without_anything_listening_there_is_no_answer(server: Server) -> None:
    server.close()
    with pytest.raises(ServiceError, match=r"no answer, .*refused.*4 attempts") as caught:
        predict(server.url)
    assert caught.value.status is None
    assert isinstance(caught.value.__cause__, Exception)


def test_retry_after_is_waited_for_as_seconds(server: Server) -> None:
    predict(server.does(says(429, BUSY, "Retry-After: 1"), OK))
    assert server.moments[1] - server.moments[0] >= 0.99


def test_retry_after_is_waited_for_as_a_date(server: Server) -> None:
    moment = datetime.now(timezone.utc).replace(microsecond=0) + timedelta(seconds=2)
    predict(server.does(says(503, BUSY, f"Retry-After: {format_datetime(moment)}"), OK))
    assert datetime.now(timezone.utc) >= moment


def test_nothing_is_waited_for_that_ends_after_the_deadline(server: Server) -> None:
    started = time.monotonic()
    with pytest.raises(ServiceError, match=r"429, .*1 attempt\)"):
        predict(server.does(says(429, BUSY, "Retry-After: 3600"), OK))
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("said", ["soon", "", "-1", "1e9", "٣"])
def test_a_retry_after_that_is_none_is_ignored(server: Server, said: str) -> None:
    fault = says(429, BUSY)
    head = f"HTTP/1.1 429 Some\r\nRetry-After: {said}\r\nContent-Length: 2\r\n\r\n{{}}".encode()
    predict(server.does(fault, lambda connection: connection.sendall(head), OK))
    assert server.moments[2] - server.moments[0] < 1


@pytest.mark.parametrize("behaviour", [is_silent, drips])
def test_the_deadline_bounds_attempts_waits_and_slow_answers(
    server: Server, behaviour: Behaviour
) -> None:
    config = ClientConfig(deadline_seconds=0.6, timeout_seconds=0.25, attempts=100)
    url = server.does(*[behaviour] * 100)

    async def ask() -> None:
        async with AsyncClient(url, config=config) as client:
            await client.predict([{"a": 1.0}])

    for call in (lambda: predict(url, config), lambda: asyncio.run(ask())):
        started = time.monotonic()
        with pytest.raises(ServiceError, match="POST /predict: no answer") as caught:
            call()
        assert 0.3 <= time.monotonic() - started < 1.5
        assert caught.value.status is None


def test_waits_are_drawn_between_zero_and_a_bound_that_doubles() -> None:
    from fathom.client import _Attempts, _Call

    class Nothing(BaseModel):
        pass

    config = ClientConfig(first_wait_seconds=0.1, longest_wait_seconds=0.5)
    attempts = _Attempts(_Call("GET", "/x", Nothing), config)
    for made, bound in ((1, 0.1), (2, 0.2), (3, 0.4), (4, 0.5), (90, 0.5)):
        attempts.made = made
        drawn = [attempts._drawn() for _ in range(2000)]
        assert 0 <= min(drawn) < 0.05 * bound
        assert 0.95 * bound < max(drawn) <= bound


@pytest.mark.parametrize("content", [b"<html>Welcome", b"[]", b"", {"version": "v1"}])
def test_an_answer_of_something_else_is_no_answer(server: Server, content: Any) -> None:
    with pytest.raises(ServiceError, match="200, not an answer of this service"):
        predict(server.does(says(200, content), OK))
    assert len(server.requests) == 1


def test_a_newer_service_may_say_more(server: Server) -> None:
    answer = predict(server.does(says(200, ANSWER | {"calibrated": True})))
    assert answer.probabilities == [0.25]


def test_the_key_is_sent_to_the_service_alone_and_never_shown(server: Server) -> None:
    server.does(says(307, {"error": "elsewhere"}, "Location: http://127.0.0.1:9/predict"))
    client = Client(server.url, api_key="s3cret", config=QUICK)
    with client, pytest.raises(ServiceError, match="307, elsewhere") as caught:
        client.predict([{}])
    assert b"authorization: bearer s3cret" in server.requests[0].lower()
    assert "s3cret" not in f"{caught.value!r} {client!r}"


@pytest.mark.parametrize(
    "wrong",
    [{"attempts": 0}, {"deadline_seconds": 0}, {"timeout_seconds": -1}, {"retries": 3}],
)
def test_settings_have_bounds(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        ClientConfig(**wrong)


def test_values_that_json_lacks_are_refused_before_anything_is_sent(server: Server) -> None:
    with Client(server.url) as client, pytest.raises(ValueError, match="not JSON compliant"):
        client.predict([{"a": float("nan")}])
    assert server.requests == []


def test_the_client_needs_no_library_of_the_service(root: Path) -> None:
    heavy = ["bentoml", "feast", "kedro", "numpy", "pandas", "starlette", "torch"]
    script = f"import sys, fathom.client; print(sorted(set(sys.modules) & set({heavy!r})))"
    answer = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.stdout.strip() == "[]", answer.stderr


# -- a real service -------------------------------------------------------------------------------


@pytest.mark.e2e
def test_a_real_service_answers_both_clients_alike(service: Running) -> None:
    shown: dict[str, Any] = {
        "context": CONTEXT,
        "timestamp": datetime(2024, 2, 1, 10, tzinfo=timezone.utc),
        "explain": True,
        "request_id": "mine-1",
    }
    asked = {
        "user": "u2",
        "candidates": ["i1", {"item": "i2", "context": {"shelf": "top"}}, "nothing"],
        **shown,
    }
    with Client(service.url) as client:
        ranked = client.rank(**asked)
        wanted = client.recommend("u2", 2, where={"genre": ["tea"]}, deny=["i2"], **shown)
        predicted = client.predict(service.artifact.rows)
        model = client.model(request_id="mine-2")

    async def ask() -> Any:
        async with AsyncClient(service.url) as client:
            return await asyncio.gather(
                client.rank(**asked),
                client.recommend("u2", 2, where={"genre": ["tea"]}, deny=["i2"], **shown),
                client.predict(service.artifact.rows),
                client.model(request_id="mine-2"),
            )

    again, again_wanted, again_predicted, again_model = asyncio.run(ask())
    assert ranked == again
    assert wanted == again_wanted
    assert predicted.probabilities == again_predicted.probabilities
    assert model == again_model

    assert (ranked.version, ranked.request_id) == (service.artifact.version, "mine-1")
    assert (ranked.user_known, ranked.unknown_items) == (True, 1)
    assert {item.item for item in ranked.items} == {"i1", "i2", "nothing"}
    assert len(wanted.items) == 2
    for item in (*ranked.items, *wanted.items):
        parts = item.explanation
        assert parts is not None
        assert parts.bias + parts.deep + sum(parts.wide.values()) == pytest.approx(parts.logit)
    assert predicted.probabilities == pytest.approx(service.artifact.probabilities, abs=TOLERANCE)
    assert (model.request_id, model.feature_store) == ("mine-2", "ready")


@pytest.mark.e2e
def test_a_real_refusal_names_the_fields(service: Running) -> None:
    with Client(service.url) as client, pytest.raises(ServiceError) as caught:
        client.rank("u2", ["i1"], {"shelf": "floor", "shop": "shop1"}, request_id="mine-3")
    error = caught.value
    assert (error.status, error.request_id, error.attempts) == (400, "mine-3", 1)
    assert {fault.field for fault in error.faults} == {"context.shelf", "context.discount"}
    assert "context.shelf is 'floor'; it must be one of ['low', 'top']" in str(error)
