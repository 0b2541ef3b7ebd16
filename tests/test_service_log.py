"""The log: one JSON object a line, and nothing in it of whom the service answers."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from fathom import service_log
from fathom.keys import made
from fathom.ranker import Ranker
from fathom.service import FEATURE_LOG, FEATURE_STORE, RANKER, SERVING, RankingService
from fathom.service_log import about, types_and_places
from running_service import Running
from small_ranker import Artifact, register

#: Of one person's request: whatever of it is found in the log should not be there.
SECRETS = ("mrs-doe", "her-item", "her-shop", "her-tag", "0.8125", "her-key")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return register(tmp_path_factory.mktemp("ranker"))


@pytest.fixture
def printed() -> Iterator[io.StringIO]:
    """What the handler prints that BentoML's server gives its own and the root logger."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    loggers = [logging.getLogger("bentoml"), logging.getLogger()]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger, level in zip(loggers, (logging.INFO, logging.WARNING), strict=True):
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False
    yield stream
    logging.captureWarnings(False)
    for logger, (level, propagate) in zip(loggers, before, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


Serve = Callable[..., TestClient]


@pytest.fixture
def serve(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """A service with settings."""
    clients: list[TestClient] = []

    def start(**settings: Any) -> TestClient:
        for name in (FEATURE_STORE, FEATURE_LOG):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(RANKER, str(artifact.folder))
        monkeypatch.setenv(SERVING, json.dumps(settings))
        client = TestClient(RankingService.to_asgi(), raise_server_exceptions=False)
        clients.append(client.__enter__())
        return client

    yield start
    for client in clients:
        client.__exit__(None, None, None)


def her_row(artifact: Artifact) -> dict[str, Any]:
    personal = {"user_id": "mrs-doe", "item_id": "her-item", "shop": "her-shop"}
    return artifact.rows[0] | personal | {"tags": ["her-tag"], "discount": 0.8125}


def fails(_: Any, frame: Any, *__: Any) -> Any:
    """As a vendor's code fails: with words that quote what it was given, and a cause."""
    rows = {name: getattr(values, "values", values) for name, values in frame.items()}
    try:
        rows["nothing of " + "-".join(["mrs", "doe"])]
    except KeyError as error:
        raise ValueError(f"could not convert {rows}") from error


def ask(client: TestClient, artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One request each that succeeds, is refused, fails, has no key, and knows no path."""
    row, headers = her_row(artifact), {"X-Request-ID": "her-7"}
    found = [
        client.post("/predict", json={"rows": [row]}, headers=headers),
        client.post("/predict", json={"rows": [row | {"discount": "her-shop"}]}, headers=headers),
        client.get("/users/mrs-doe?item=her-item", headers=headers),
        client.request("MRS-DOE", "/model"),
    ]
    monkeypatch.setattr(Ranker, "score", fails)
    found.append(client.post("/predict", json={"rows": [row]}, headers=headers))
    return [response.status_code for response in found]


def test_nothing_of_a_request_is_logged_whatever_becomes_of_it(
    serve: Serve, artifact: Artifact, printed: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses = ask(serve(log_format="json"), artifact, monkeypatch)
    assert statuses == [200, 400, 404, 405, 500]
    text = printed.getvalue()
    assert [secret for secret in SECRETS if secret.lower() in text.lower()] == []
    lines = [json.loads(line) for line in text.splitlines()]
    asked = [line for line in lines if line["logger"] == "bentoml.fathom.access"]
    assert [(line["method"], line["path"], line["status"]) for line in asked] == [
        ("POST", "/predict", 200),
        ("POST", "/predict", 400),
        ("GET", "other", 404),
        ("other", "/model", 405),
        ("POST", "/predict", 500),
    ]
    (failed,) = (line for line in lines if line["level"] == "ERROR")
    # What is left says where to look.
    assert failed["message"] == "request her-7 failed"
    assert failed["exception"].count("(its text is not logged)") == 2
    assert failed["exception"].splitlines()[-1] == "ValueError (its text is not logged)"


def test_a_line_says_which_request_and_version_it_is_of_and_where_time_went(
    serve: Serve, artifact: Artifact, printed: io.StringIO, tmp_path: Path
) -> None:
    key, line = made("shop-frontend")
    (tmp_path / "keys").write_text(line)
    client = serve(log_format="json", api_keys=str(tmp_path / "keys"))
    headers = {"X-Request-ID": "a-1", "Authorization": f"Bearer {key}"}
    client.post("/predict", json={"rows": [her_row(artifact)]}, headers=headers)
    client.post("/predict", headers={"Authorization": "Bearer her-key"})
    client.get("/readyz")
    lines = [json.loads(line) for line in printed.getvalue().splitlines()]
    answered, refused = (line for line in lines if line["logger"] == "bentoml.fathom.access")
    assert answered["request_id"] == "a-1"
    assert (answered["version"], answered["client"]) == (artifact.version, "shop-frontend")
    assert set(answered["stages"]) == {"wait", "write"}
    assert 0 < sum(answered["stages"].values()) < answered["milliseconds"] < 10_000
    assert answered["message"] == "POST /predict 200"
    moment = datetime.fromisoformat(answered["time"])
    assert moment.utcoffset() == timedelta(0)
    assert (refused["status"], "client" in refused) == (401, False)
    assert key not in printed.getvalue()
    assert "her-key" not in printed.getvalue()
    # Whatever else is logged while a ranker serves names it, too.
    logging.getLogger("bentoml.fathom").info("something")
    last = json.loads(printed.getvalue().splitlines()[-1])
    assert (last["message"], last["version"]) == ("something", artifact.version)


def test_text_is_discreet_as_well_and_has_no_line_for_each_request(
    serve: Serve, artifact: Artifact, printed: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(serve(), artifact, monkeypatch)
    text = printed.getvalue()
    assert "request her-7 failed" in text
    assert "POST" not in text
    assert [secret for secret in SECRETS if secret in text] == []


def test_errors_are_quoted_where_that_is_asked_for(
    serve: Serve, artifact: Artifact, printed: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(serve(log_format="json", log_personal=True), artifact, monkeypatch)
    (failed,) = (
        line for line in map(json.loads, printed.getvalue().splitlines()) if "exception" in line
    )
    assert "could not convert" in failed["exception"]
    assert "her-item" in failed["exception"]


def raised() -> BaseException:
    try:
        raise ValueError("-".join(["mrs", "doe"]))  # a traceback shows the code, too
    except ValueError as error:
        return error


@pytest.mark.parametrize(
    ("logger", "extra", "quoted"),
    [
        ("bentoml.fathom", None, True),  # a feature store that cannot be opened, say
        ("fathom.feature_store", None, True),
        ("bentoml.fathom", about("a-1"), False),
        ("uvicorn.error", None, False),  # what came out of an application, whoever raised it
        ("feast", None, False),
    ],
)
def test_errors_are_quoted_if_they_are_ours_and_not_of_a_request(
    logger: str, extra: dict[str, Any] | None, quoted: bool, printed: io.StringIO
) -> None:
    service_log.configure("json")
    logging.getLogger(logger).error("no luck", exc_info=raised(), extra=extra)
    line = json.loads(printed.getvalue())
    assert ("mrs-doe" in line["exception"].splitlines()[-1]) == quoted
    assert line["exception"].splitlines()[-1].startswith("ValueError")


def test_a_task_that_nobody_waited_for_is_named_without_its_error(printed: io.StringIO) -> None:
    service_log.configure("json")

    async def main() -> None:
        async def lost() -> None:
            raise ValueError("mrs-doe".upper())

        task = asyncio.create_task(lost())
        await asyncio.sleep(0)
        del task

    asyncio.run(main())
    line = json.loads(printed.getvalue())
    assert line["message"] == "Task exception was never retrieved"
    assert "MRS-DOE" not in printed.getvalue()


def test_an_error_is_its_own_cause_only_once() -> None:
    error = raised()
    error.__cause__ = error
    assert types_and_places(error).count("ValueError (its text is not logged)") == 1
    assert f"{Path(sys.modules[__name__].__file__ or '').name}" in types_and_places(error)


@pytest.mark.e2e
def test_a_running_service_prints_json_and_answers_are_found_by_their_id(service: Running) -> None:
    asked = {"user": "mrs-doe", "context": {"shop": "her-shop", "shelf": "low", "discount": 0.5}}
    response = httpx.post(
        f"{service.url}/rank", json=asked | {"candidates": ["her-item"]}, trust_env=False
    )
    assert response.status_code == 200
    request_id = response.json()["request_id"]
    until = time.monotonic() + 10  # the answer is sent before its line is written
    while request_id not in (text := service.log.read_text()) and time.monotonic() < until:
        time.sleep(0.01)
    lines = [json.loads(line) for line in text.splitlines()]
    (found,) = (line for line in lines if line.get("request_id") == request_id)
    assert {"parse", "features", "score", "write"} <= set(found["stages"])
    assert [secret for secret in SECRETS if secret in text] == []
