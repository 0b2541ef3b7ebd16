"""The service: what it answers, and what it refuses with which words.

The service runs inside the test as the ASGI application that BentoML serves; `test_packaging` runs
it as a process, from a Bento.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from jsonschema import Draft202012Validator
from jsonschema import ValidationError as JsonFault
from prometheus_client import REGISTRY
from pydantic import ValidationError
from starlette.routing import Route
from starlette.testclient import TestClient

from fathom import api
from fathom.feature_store import FeatureRepo, frame_of
from fathom.keys import KeysError, made
from fathom.metrics import metrics
from fathom.online import OnlineFeatures
from fathom.ranker import TOLERANCE, ArtifactError, Ranker, rows_of_frame
from fathom.ranking import Ranking
from fathom.service import (
    FEATURE_LOG,
    FEATURE_STORE,
    RANKER,
    SERVING,
    RankingService,
    Serving,
    _endpoint,
    app,
    serving_config,
)
from fathom.serving import OnlineStore, ServingConfig
from running_service import Running
from small_ranker import SPEC, Artifact, feature_store, register

CONTEXT = {"shelf": "low", "shop": "shop1", "discount": 0.1}
MOMENT = "2024-02-01T10:00:00Z"
#: More fields that nobody knows than are put into words.
MANY = dict.fromkeys(map(str, range(60_000)), 1)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return register(tmp_path_factory.mktemp("ranker"), factors=4)


@contextmanager
def serving(folder: Path) -> Iterator[TestClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(RANKER, str(folder))
        for name in (FEATURE_STORE, SERVING, FEATURE_LOG):
            patch.delenv(name, raising=False)
        with TestClient(RankingService.to_asgi(), raise_server_exceptions=False) as client:
            yield client


@pytest.fixture(scope="module")
def client(artifact: Artifact) -> Iterator[TestClient]:
    with serving(artifact.folder) as client:
        yield client


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> FeatureRepo:
    return feature_store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def opened(repo: FeatureRepo) -> OnlineStore:
    """The feature store, opened in the background as the service does."""
    return wait_until("ready", opening(repo, repo.root))


def opening(repo: FeatureRepo, root: Path, **config: Any) -> OnlineStore:
    settings = {"root": str(root), **repo.config.model_dump()}
    return OnlineStore(json.dumps(settings), SPEC, ServingConfig(**config))


def wait_until(state: str, store: OnlineStore) -> OnlineStore:
    deadline = time.monotonic() + 60
    while store.state != state:
        assert time.monotonic() < deadline, f"the store is {store.state}, not {state}"
        time.sleep(0.05)
    return store


@pytest.fixture
def ranking(client: TestClient, opened: OnlineStore, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """The service with its feature store."""
    monkeypatch.setattr(app.state.serving.ranking, "store", opened)
    return client


def faults(response: Any, status: int = 400) -> dict[str, str]:
    """Field → fault of a refusal, whose form is checked."""
    assert response.status_code == status, response.text
    assert "Traceback" not in response.text
    answer = api.ErrorAnswer.model_validate_json(response.text)
    return {line.field: line.fault for line in answer.faults}


def rank(**changes: Any) -> dict[str, Any]:
    request = {"user": "u2", "context": CONTEXT, "candidates": ["i1", "i2", "i3"]}
    return request | {"timestamp": MOMENT} | changes


# -- /predict ------------------------------------------------------------------------------------


def test_predict_returns_the_probabilities_of_training(
    client: TestClient, artifact: Artifact
) -> None:
    response = client.post("/predict", json={"rows": artifact.rows})
    assert response.status_code == 200
    answer = api.PredictAnswer.model_validate_json(response.text)
    assert answer.version == artifact.version
    np.testing.assert_allclose(answer.probabilities, artifact.probabilities, atol=TOLERANCE)


def test_every_answer_says_which_version_and_request_it_is(
    client: TestClient, artifact: Artifact
) -> None:
    asked = client.get("/model", headers={"X-Request-ID": "abc-1"})
    assert asked.json()["request_id"] == asked.headers["x-request-id"] == "abc-1"
    refused = client.post("/predict", content="{")
    for response in (asked, refused):
        assert (
            response.json()["version"] == response.headers["x-fathom-version"] == (artifact.version)
        )
    # What is not an id is not repeated, in a header above all.
    assert re.fullmatch(r"[0-9a-f]{32}", refused.headers["x-request-id"])
    odd = client.get("/model", headers={"X-Request-ID": "a b\tc"})
    assert re.fullmatch(r"[0-9a-f]{32}", odd.headers["x-request-id"])


def test_ids_never_seen_and_missing_values_are_scored(
    client: TestClient, artifact: Artifact
) -> None:
    unknown = artifact.rows[0] | {"user_id": "nobody", "item_id": "🦄", "shop": "", "tags": ["?"]}
    missing = dict.fromkeys(artifact.rows[0])
    answer = client.post("/predict", json={"rows": [unknown, missing]}).json()
    assert all(0 < probability < 1 for probability in answer["probabilities"])


@pytest.mark.parametrize(
    ("change", "field", "fault"),
    [
        ({"shelf": ...}, "rows[1].shelf", r"is missing; give null if it is not known"),
        ({"shelf": "floor"}, "rows[1].shelf", r"is 'floor'; it must be one of \['low', 'top'\]"),
        ({"shop": 3}, "rows[1].shop", r"is 3; it must be a string"),
        ({"discount": "0.1"}, "rows[1].discount", r"is '0.1'; it must be a number"),
        ({"discount": True}, "rows[1].discount", r"is True; it must be a number"),
        ({"discount": float("nan")}, "rows[1].discount", r"is nan; .* finite"),
        ({"discount": float("-inf")}, "rows[1].discount", r"is -inf; .* finite"),
        ({"discount": 1e300}, "rows[1].discount", r"is 1e\+300; .* below 3.4e38"),
        ({"discount": 10**400}, "rows[1].discount", r"is 1000.*\.\.\.; .* below 3.4e38"),
        ({"tags": "green"}, "rows[1].tags", r"is 'green'; it must be a list of strings"),
        ({"tags": [1]}, "rows[1].tags", r"is \[1\]; it must be a list of strings"),
        ({"tags": ["x"] * 1001}, "rows[1].tags", r"has 1,001 values; at most 1,000 .* shorten it"),
        ({"price": 1}, "rows[1].price", r"is no column"),
    ],
)
def test_a_fault_of_a_row_names_field_value_and_bound(
    client: TestClient, artifact: Artifact, change: dict[str, Any], field: str, fault: str
) -> None:
    row = {name: value for name, value in (artifact.rows[1] | change).items() if value is not ...}
    found = faults(client.post("/predict", content=json.dumps({"rows": [artifact.rows[0], row]})))
    assert list(found) == [field]
    assert re.search(fault, found[field]), found


def test_all_faults_of_all_rows_come_together(client: TestClient, artifact: Artifact) -> None:
    rows = [artifact.rows[0] | {"shelf": "?", "tags": 1}, artifact.rows[1] | {"discount": "x"}]
    response = client.post("/predict", json={"rows": rows})
    assert set(faults(response)) == {"rows[0].shelf", "rows[0].tags", "rows[1].discount"}
    assert response.json()["error"] == "3 faults in the request"
    many = client.post("/predict", json={"rows": [{}] * 50})
    assert len(faults(many)) == api.MAX_FAULTS
    assert many.json()["error"] == "600 faults in the request, of which 100 are listed"


def test_crosses_of_long_lists_cannot_take_all_memory(
    client: TestClient, artifact: Artifact
) -> None:
    # recent_genres × tags: 1,000 × 1,000 combinations in each of 6 rows.
    row = artifact.rows[0] | {"recent_genres": ["tea"] * 1000, "tags": ["green"] * 1000}
    found = faults(client.post("/predict", json={"rows": [row] * 6}))
    assert found == {
        "recent_genres and tags": "make 6,000,000 combinations; at most 5,000,000 are allowed, "
        "so shorten the lists or split the request"
    }
    assert client.post("/predict", json={"rows": [row]}).status_code == 200


@pytest.mark.parametrize(
    ("path", "change"),
    [
        ("/rank", MANY),
        ("/rank", {"context": MANY}),
        ("/rank", {"candidates": [{"item": "i", "context": MANY}]}),
        ("/predict", {"rows": [MANY]}),
        ("/recommend", {"where": {name: [] for name in MANY}}),
    ],
    ids=["fields", "context", "candidates", "rows", "where"],
)
def test_very_many_faults_are_counted_and_not_put_into_words(
    ranking: TestClient, path: str, change: dict[str, Any]
) -> None:
    needed = {
        "/rank": {"user": "u", "context": CONTEXT, "candidates": ["i1"]},
        "/recommend": {"user": "u", "context": CONTEXT},
        "/predict": {},
    }
    response = ranking.post(path, json=needed[path] | change)
    assert faults(response) == {}
    assert response.json()["error"] == "60000 faults in the request, which are too many to list"


@pytest.mark.parametrize("path", ["/predict", "/rank"])
@pytest.mark.parametrize(
    ("body", "field", "fault"),
    [
        ("", "body", "is not JSON: EOF"),
        ("{", "body", "is not JSON: EOF"),
        ("\ufeff{}", "body", "is not JSON"),
        ('{"rows": ' + "[" * 100_000, "body", "is not JSON: recursion limit"),
        ('{"rows": [{"discount": ' + "9" * 5000 + "}]}", "body", "is not JSON: number out of"),
        (b'{"user": "\xff"}', "body", "is not JSON: invalid unicode"),
        (r'{"user": "\ud800"}', "body", "is not JSON"),
        ("[]", "body", "is a list of 0; it must be an object"),
        ("3", "body", "is 3; it must be an object"),
        ("null", "body", "is null; it must be an object"),
    ],
)
def test_a_body_that_is_no_request(
    client: TestClient, path: str, body: str | bytes, field: str, fault: str
) -> None:
    found = faults(client.post(path, content=body))
    assert list(found) == [field]
    assert fault in found[field]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, {"rows": "is missing; give it"}),
        ({"rows": []}, {"rows": "is empty; give at least 1"}),
        ({"rows": {}}, {"rows": "is an object of 0 fields; it must be a list"}),
        ({"rows": [1]}, {"rows[0]": "is 1; it must be an object"}),
        (
            {"rows": [{}] * 10_001},
            {"rows": "has 10,001 entries; at most 10,000 are allowed, so split the request"},
        ),
        (
            {"row": [{}], "rows": None},
            {
                "rows": "is null; it must be a list",
                "row": "is a list of 1, but this request has no such field; remove it",
            },
        ),
    ],
)
def test_the_rows_of_a_request(
    client: TestClient, body: dict[str, Any], expected: dict[str, str]
) -> None:
    assert faults(client.post("/predict", json=body)) == expected


# -- bodies --------------------------------------------------------------------------------------


def test_a_body_above_the_bound_is_refused_before_it_is_read(client: TestClient) -> None:
    response = client.post("/predict", content=b" " * (api.MAX_BODY_BYTES + 1))
    assert faults(response, 413) == {}
    assert "16777217 bytes; at most 16777216 are allowed" in response.json()["error"]
    declared = client.post("/predict", content=b"{}", headers={"Content-Length": "1e9"})
    assert faults(declared, 413) == {}


def test_a_body_of_undeclared_length_is_counted_as_it_comes(client: TestClient) -> None:
    sent = 0

    def chunks() -> Iterator[bytes]:
        nonlocal sent
        while sent < 64:
            sent += 1
            yield b" " * (1 << 20)

    response = client.post("/rank", content=chunks())
    assert faults(response, 413) == {}
    assert "more than 16777216 bytes" in response.json()["error"]
    # The largest body that is allowed gets as far as being read as JSON.
    assert "body" in faults(client.post("/rank", content=b" " * api.MAX_BODY_BYTES))


# -- /rank ---------------------------------------------------------------------------------------


def test_without_a_feature_store_rank_says_so_and_predict_works(client: TestClient) -> None:
    response = client.post("/rank", json=rank())
    assert faults(response, 503) == {}
    assert "has no feature store; set FATHOM_FEATURE_STORE" in response.json()["error"]
    assert "retry-after" not in response.headers
    assert client.get("/readyz").status_code == 200


def test_while_the_feature_store_is_being_opened_rank_asks_to_try_again(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = OnlineStore(None, SPEC)
    monkeypatch.setattr(app.state.serving.ranking, "store", store)
    for state, words, ready in (
        ("opening", "is being opened; try again", 503),
        ("failed", "cannot be opened, see the service's log", 200),
    ):
        store.state = state
        response = client.post("/rank", json=rank())
        assert faults(response, 503) == {}
        assert words in response.json()["error"]
        assert response.headers["retry-after"] == "10"
        assert client.get("/readyz").status_code == ready
        assert client.get("/model").json()["feature_store"] == state


def test_the_model_says_as_of_when_features_are(ranking: TestClient) -> None:
    answer = ranking.get("/model").json()
    assert answer["feature_store"] == "ready"
    assert answer["tables_as_of"] == "2024-01-22T00:00:00+00:00"


def counted(name: str) -> float:
    metrics()
    return REGISTRY.get_sample_value(f"fathom_{name}_total") or 0.0


def test_when_the_online_store_fails_answers_go_on_and_say_so(
    ranking: TestClient, opened: OnlineStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`faults/test_redis_stopped` stops a real one, under a real service."""
    monkeypatch.setattr("fathom.user_rows.RETRY_SECONDS", 0.02)
    before = ranking.post("/rank", json=rank()).json()
    assert (before["degraded"], before["user_known"], before["expired"]) == (False, True, 0)
    degraded = counted("degraded_requests")
    stranger = ranking.post("/rank", json=rank(user="nobody")).json()
    with monkeypatch.context() as stopped:

        def refuse(*_: Any) -> None:
            raise ConnectionError("connection refused")

        stopped.setattr(opened.require()._rows._provider, "online_read", refuse)
        for _ in range(3):
            response = ranking.post("/rank", json=rank())
            assert response.status_code == 200
            answer = api.RankAnswer.model_validate_json(response.text)
            assert (answer.degraded, answer.user_known) == (True, False)
            assert {item.item for item in answer.items} == {"i1", "i2", "i3"}
        assert ranking.get("/model").json()["feature_store"] == "degraded"
        assert ranking.get("/readyz").status_code == 200
        assert counted("degraded_requests") == degraded + 3
        # An unknown user is an unknown user, whether the store is down or not.
        again = ranking.post("/rank", json=rank(user="nobody")).json()
        assert again["items"] == stranger["items"]
    deadline = time.monotonic() + 10
    while opened.require().degraded:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    after = ranking.post("/rank", json=rank()).json()
    assert after | {"request_id": ""} == before | {"request_id": ""}
    assert ranking.get("/model").json()["feature_store"] == "ready"


def test_newer_features_are_loaded_in_the_background_and_failures_are_tried_again(
    repo: FeatureRepo,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("fathom.serving.RETRY_SECONDS", 0.05)
    refreshes, failures = counted("refreshes"), counted("refresh_failures")
    items = repo.source("items")
    whole = items.read_bytes()
    store = wait_until("ready", opening(repo, repo.root, refresh_seconds=0.05))
    try:
        request = ("u2", CONTEXT, [{"item_id": "i1"}], datetime(2024, 2, 1))
        items.write_bytes(b"half a fi")
        wait_for(lambda: counted("refresh_failures") >= failures + 2)
        assert "newer features cannot be loaded; the old ones stay" in caplog.text
        assert store.require().frame(*request)[1].items.all()
        assert counted("refreshes") == refreshes
        items.write_bytes(whole)
        wait_for(lambda: counted("refreshes") >= refreshes + 1)
        assert store.require().frame(*request)[1].items.all()
    finally:
        items.write_bytes(whole)
        store.close()


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_is_ranked_is_logged_with_the_features_it_was_ranked_by(
    artifact: Artifact, opened: OnlineStore, tmp_path: Path
) -> None:
    ranking = Ranking(artifact.folder, None, ServingConfig(feature_log=str(tmp_path)))
    ranking.store = opened
    answers = {}
    for name, user in (("a", "u2"), ("b", "nobody")):
        answers[name] = ranking.rank(json.dumps(rank(user=user)).encode(), name)
    # What is refused, and what goes to /predict, ranks nothing.
    with pytest.raises(api.RefusedError):
        ranking.rank(json.dumps(rank(candidates=[])).encode(), "c")
    ranking.predict(json.dumps({"rows": artifact.rows[:1]}).encode(), "d")
    assert ranking.log is not None
    ranking.log.close()
    logged = pq.read_table(tmp_path / artifact.version)
    assert logged["_request"].to_pylist() == ["a"] * 3 + ["b"] * 3
    for name, answer in answers.items():
        rows = logged.filter(pc.equal(logged["_request"], name))
        served = {item["item"]: item["probability"] for item in answer["items"]}
        found = dict(zip(*(rows[n].to_pylist() for n in ("item_id", "probability")), strict=True))
        assert found == served
        assert set(rows["_user_known"].to_pylist()) == {answer["user_known"]}
        rescored = artifact.ranker.score(frame_of(rows))
        np.testing.assert_allclose(rescored, rows["probability"], atol=TOLERANCE, rtol=0)


def test_settings_come_from_the_environment_and_the_log_has_a_variable_of_its_own() -> None:
    assert serving_config({}) == ServingConfig()
    given = serving_config({SERVING: '{"refresh_seconds": 5, "feature_log": "/a"}'})
    assert (given.refresh_seconds, given.feature_log) == (5, "/a")
    assert serving_config({FEATURE_LOG: "/b", SERVING: '{"feature_log": "/a"}'}).feature_log == "/b"
    with pytest.raises(ValidationError, match=r"refresh_seconds\n.*greater than 0"):
        serving_config({SERVING: '{"refresh_seconds": 0}'})
    with pytest.raises(ValidationError, match=r"often\n.*Extra inputs are not permitted"):
        serving_config({SERVING: '{"often": 1}'})


def test_a_feature_store_that_cannot_be_opened_is_tried_again(
    repo: FeatureRepo,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("fathom.serving.RETRY_SECONDS", 0.2)
    store = wait_until("failed", opening(repo, tmp_path))
    assert f"{tmp_path / 'features'}: the feature store cannot be opened" in caplog.text
    shutil.copytree(repo.folder, tmp_path / "features", dirs_exist_ok=True)
    features = wait_until("ready", store).require()
    _, known = features.frame("u2", CONTEXT, [{"item_id": "i1"}], datetime(2024, 2, 1))
    assert known.user


def test_rank_scores_what_the_feature_store_knows_as_predict_would(
    ranking: TestClient, artifact: Artifact, repo: FeatureRepo
) -> None:
    candidates = [f"i{i}" for i in range(30)]
    response = ranking.post("/rank", json=rank(candidates=candidates))
    assert response.status_code == 200, response.text
    answer = api.RankAnswer.model_validate_json(response.text)
    assert (answer.version, answer.user_known, answer.unknown_items) == (artifact.version, True, 0)

    frame, _ = OnlineFeatures.open(repo, SPEC).frame(
        "u2", CONTEXT, [{"item_id": item} for item in candidates], datetime.fromisoformat(MOMENT)
    )
    rows = json.loads(json.dumps(rows_of_frame(frame, SPEC, range(len(candidates)))))
    alone = ranking.post("/predict", json={"rows": rows}).json()["probabilities"]
    assert {item.item: item.probability for item in answer.items} == pytest.approx(
        dict(zip(candidates, alone, strict=True)), abs=TOLERANCE
    )
    probabilities = [item.probability for item in answer.items]
    assert probabilities == sorted(probabilities, reverse=True)
    assert len(set(probabilities)) > 10
    # u2 is an even user, so it likes what is tea: odd items.
    assert {int(item.item[1:]) % 2 for item in answer.items[:10]} == {1}


def test_users_and_items_never_seen_are_ranked_and_counted(ranking: TestClient) -> None:
    request = rank(user="nobody", candidates=["i1", "unheard", "of"])
    answer = ranking.post("/rank", json=request).json()
    assert (answer["user_known"], answer["unknown_items"]) == (False, 2)
    assert {item["item"] for item in answer["items"]} == {"i1", "unheard", "of"}
    assert all(0 < item["probability"] < 1 for item in answer["items"])
    open_context = CONTEXT | {"shop": "never seen", "discount": None}
    assert ranking.post("/rank", json=rank(context=open_context)).status_code == 200


def test_context_can_differ_by_candidate_and_ties_keep_their_order(ranking: TestClient) -> None:
    request = rank(
        context={"shop": "shop1", "discount": 0.1},
        candidates=[
            {"item": "i1", "context": {"shelf": "low"}},
            {"item": "i1", "context": {"shelf": "top"}},
            {"item": "i1", "context": {"shelf": "top", "discount": 0.9}},
            {"item": "i1", "context": {"shelf": "low"}},
        ],
        explain=True,
    )
    items = ranking.post("/rank", json=request).json()["items"]
    alone = [
        ranking.post("/rank", json=rank(context=context, candidates=["i1"])).json()["items"][0]
        for context in (CONTEXT, CONTEXT | {"shelf": "top"})
    ]
    probabilities = [item["probability"] for item in items]
    for expected in alone:
        assert min(abs(expected["probability"] - p) for p in probabilities) < TOLERANCE
    assert probabilities == sorted(probabilities, reverse=True)
    assert len({round(p, 9) for p in probabilities}) == 3

    same = ranking.post("/rank", json=rank(candidates=["x", "y", "x", "z"])).json()["items"]
    assert [item["item"] for item in same] == ["x", "y", "x", "z"]


def test_an_explanation_sums_to_the_logit(ranking: TestClient, artifact: Artifact) -> None:
    answer = ranking.post("/rank", json=rank(explain=True)).json()
    assert len(answer["items"]) == 3
    for item in answer["items"]:
        parts = item["explanation"]
        assert list(parts["wide"]) == list(artifact.ranker.encoder.wide_slots)
        logit = parts["bias"] + parts["deep"] + sum(parts["wide"].values())
        assert logit == pytest.approx(parts["logit"], abs=1e-12)
        assert 1 / (1 + np.exp(-logit)) == pytest.approx(item["probability"], abs=TOLERANCE)
        exact = parts["bias"] + parts["deep"] + sum(term["logit"] for term in parts["terms"])
        assert exact == pytest.approx(parts["logit"], abs=1e-12)
    assert set(ranking.post("/rank", json=rank()).json()["items"][0]) == {"item", "probability"}


def test_terms_are_named_by_what_the_feature_store_knows(ranking: TestClient) -> None:
    """u2 bought nothing but tea of late, which odd items are."""
    items = ranking.post("/rank", json=rank(explain=True)).json()["items"]
    terms = {item["item"]: item["explanation"]["terms"] for item in items}
    for item, genre in (("i1", "tea"), ("i2", "coffee")):
        of = {term["feature"]: term for term in terms[item]}
        assert of["user_id_x_genre"]["values"] == {"user_id": "u2", "genre": genre}
        assert of["user_id_x_genre"]["weight_of"] == "values"
        assert of["recent_genres_x_genre"]["values"] == {"recent_genres": "tea", "genre": genre}
    assert [abs(t["logit"]) for t in terms["i1"]] == sorted(
        (abs(t["logit"]) for t in terms["i1"]), reverse=True
    )


def test_more_terms_than_an_answer_may_have_are_refused(
    ranking: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api, "MAX_TERMS", 20)
    assert faults(ranking.post("/rank", json=rank(explain=True, candidates=["i1"] * 20))) == {
        "explain": "is true, which makes up to 180 terms; at most 20 are allowed, so rank without "
        "it, then ask again for the first candidates alone"
    }
    assert ranking.post("/rank", json=rank(candidates=["i1"] * 20)).status_code == 200
    assert ranking.post("/rank", json=rank(explain=True, candidates=["i1"])).status_code == 200


def test_attributions_are_the_artifacts_and_sum_to_the_deep_logit(
    ranking: TestClient, artifact: Artifact, opened: OnlineStore
) -> None:
    answer = ranking.post("/rank", json=rank(attribute=True, explain=True)).json()
    assert api.RankAnswer.model_validate(answer).items[0].attribution
    items = {item["item"]: item for item in answer["items"]}
    candidates = [{"item_id": item} for item in items]
    frame, _ = opened.require().frame("u2", CONTEXT, candidates, datetime.fromisoformat(MOMENT))
    shares = artifact.ranker.attribute(frame)
    for i, item in enumerate(items.values()):
        found = item["attribution"]
        assert found["deep"] == item["explanation"]["deep"]
        total = found["baseline"] + sum(found["shares"].values())
        assert total == pytest.approx(found["deep"], abs=0.02 * abs(found["deep"]) + 1e-4)
        expected = {name: share[i] for name, share in shares.items() if name != "baseline"}
        assert found["shares"] == pytest.approx(expected, abs=1e-5)
    alone = ranking.post("/rank", json=rank(attribute=True)).json()["items"][0]
    assert set(alone) == {"item", "probability", "attribution"}


def test_more_candidates_than_can_be_attributed_are_refused(ranking: TestClient) -> None:
    most = api.MAX_ATTRIBUTED
    many = rank(attribute=True, candidates=["i1"] * (most + 1), timestamp="soon")
    found = faults(ranking.post("/rank", json=many))
    assert set(found) == {"attribute", "timestamp"}
    assert found["attribute"] == (
        "is true, for 101 candidates; at most 100 can be attributed at once, so rank without it, "
        "then ask again for the first candidates alone"
    )
    answer = ranking.post("/rank", json=rank(attribute=True, candidates=["i1"] * most))
    assert answer.status_code == 200
    assert len(answer.json()["items"]) == most


def test_a_model_without_a_deep_part_has_nothing_to_attribute(
    opened: OnlineStore, tmp_path: Path
) -> None:
    wide = register(tmp_path, model="wide")
    ranking = Ranking(wide.folder, None)
    ranking.store = opened
    with pytest.raises(api.RefusedError) as refusal:
        ranking.rank(json.dumps(rank(attribute=True)).encode(), "a")
    assert refusal.value.status == 400
    assert refusal.value.faults == [
        {
            "field": "attribute",
            "fault": "is true, but the model, wide, has no deep part; leave it out: all of its "
            "terms are exact, and 'explain' names them",
        }
    ]
    answer = ranking.rank(json.dumps(rank(explain=True)).encode(), "b")
    assert {item["explanation"]["deep"] for item in answer["items"]} == {0.0}


@pytest.mark.parametrize("fails", [False, True])
def test_what_attribution_needs_is_loaded_in_the_background_once_rank_is_ready(
    artifact: Artifact,
    repo: FeatureRepo,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fails: bool,
) -> None:
    """On the scoring thread, on the first request, it would hold all others up for seconds."""
    loaded = []

    def load() -> None:
        loaded.append(threading.current_thread())
        if fails:
            raise ImportError("no Captum here")

    monkeypatch.setattr("fathom.attribution.load", load)
    Ranking(artifact.folder, None).close()
    assert loaded == []  # what cannot rank is not asked
    settings = json.dumps({"root": str(repo.root), **repo.config.model_dump()})
    ranking = Ranking(artifact.folder, settings)
    try:
        wait_until("ready", ranking.store)
        until = time.monotonic() + 10
        while (
            not loaded or fails > ("no Captum here" in caplog.text)
        ) and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        ranking.close()
    assert len(loaded) == 1
    assert loaded[0] is not threading.current_thread()
    assert ("no Captum here" in caplog.text) == fails


def test_the_moment_of_a_request_is_now_unless_it_is_given(ranking: TestClient) -> None:
    def first(**changes: Any) -> float:
        answer = ranking.post("/rank", json=rank(**changes)).json()
        return float(answer["items"][0]["probability"])

    assert first(timestamp="2024-02-01T10:00:00") == first(timestamp="2024-02-01T12:00:00+02:00")
    assert 0 < first(timestamp=None) < 1


@pytest.mark.parametrize(
    ("change", "field", "fault"),
    [
        ({"user": ...}, "user", "is missing; give it"),
        ({"user": 900}, "user", "is 900; it must be a string"),
        ({"candidates": []}, "candidates", "is empty; give at least 1"),
        ({"candidates": "i1"}, "candidates", "is 'i1'; it must be a list"),
        ({"candidates": [7]}, "candidates[0]", "is 7; it must be an object"),
        ({"candidates": [{}]}, "candidates[0].item", "is missing; give it"),
        ({"candidates": [{"item": "i", "q": 1}]}, "candidates[0].q", "no such field; remove it"),
        ({"context": {**CONTEXT, "shelf": ...}}, "context.shelf", "is missing; give null"),
        ({"context": {**CONTEXT, "shelf": "floor"}}, "context.shelf", "must be one of ['low',"),
        ({"context": {**CONTEXT, "shelf": 1}}, "context.shelf", "is 1; it must be a string"),
        ({"context": {**CONTEXT, "discount": "1"}}, "context.discount", "must be a number"),
        ({"context": {**CONTEXT, "discount": float("nan")}}, "context.discount", "finite"),
        ({"context": {**CONTEXT, "discount": 10**400}}, "context.discount", "below 3.4e38"),
        ({"context": {**CONTEXT, "genre": "tea"}}, "context.genre", "no context column; remove"),
        ({"context": []}, "context", "is a list of 0; it must be an object"),
        (
            {"candidates": ["i1", {"item": "i2", "context": {"shelf": "?"}}]},
            "candidates[1].context.shelf",
            "is '?'; it must be one of ['low', 'top']",
        ),
        (
            {"candidates": [{"item": "i2", "context": {"genre": "tea"}}]},
            "candidates[0].context.genre",
            "is no context column; remove it (there are ['shelf', 'shop', 'discount'])",
        ),
        (
            {
                "context": {"shop": "s", "discount": 1},
                "candidates": [{"item": "i1", "context": {"shelf": "low"}}, "i2"],
            },
            "candidates[1].context.shelf",
            "is missing",
        ),
        ({"timestamp": "yesterday"}, "timestamp", "is 'yesterday'; it must be an ISO 8601 moment"),
        ({"timestamp": 1706781600}, "timestamp", "is 1706781600; it must be a string"),
        ({"timestamp": "1969-12-31"}, "timestamp", "must be from 1970-01-01 to before 2200-01-01"),
        ({"timestamp": "0001-01-01T00:00+14:00"}, "timestamp", "must be"),
        ({"explain": "yes"}, "explain", "is 'yes'; it must be true or false"),
        ({"attribute": 1}, "attribute", "is 1; it must be true or false"),
        ({"k": 3}, "k", "is 3, but this request has no such field; remove it"),
    ],
)
def test_a_fault_of_a_rank_request_is_named(
    client: TestClient, change: dict[str, Any], field: str, fault: str
) -> None:
    request = {name: value for name, value in rank(**change).items() if value is not ...}
    request["context"] = (
        {n: v for n, v in request["context"].items() if v is not ...}
        if isinstance(request["context"], dict)
        else request["context"]
    )
    found = faults(client.post("/rank", content=json.dumps(request)))
    assert list(found) == [field]
    assert fault in found[field]


def test_all_faults_of_a_rank_request_come_together(client: TestClient) -> None:
    request = rank(
        timestamp="soon", context={"shelf": "?", "discount": "x", "genre": "tea"}, candidates=["a"]
    )
    assert set(faults(client.post("/rank", json=request))) == {
        *("timestamp", "context.shelf", "context.discount", "context.genre", "context.shop"),
    }


def test_too_many_candidates_are_refused_at_once(client: TestClient) -> None:
    body = json.dumps(rank(candidates=["i1"] * 100_000))
    started = time.perf_counter()
    found = faults(client.post("/rank", content=body))
    assert time.perf_counter() - started < 2
    assert found == {
        "candidates": "has 100,000 entries; at most 10,000 are allowed, so split the request"
    }


# -- the rest ------------------------------------------------------------------------------------


def test_model_says_what_is_served(client: TestClient, artifact: Artifact) -> None:
    answer = api.ModelAnswer.model_validate(client.get("/model").json())
    assert answer.spec_hash == SPEC.hash
    assert answer.provenance["trained_until"] == "2024-01-30"
    assert answer.training["hidden"] == [8]
    columns = {column["name"]: column for column in answer.columns}
    assert columns["shelf"]["values"] == ["low", "top"]
    assert (columns["genre_share"]["owner"], columns["genre_share"]["source"]) == ("user", "ratio")
    assert answer.crosses == [cross.name for cross in SPEC.crosses]
    assert answer.limits["candidates"] == 10_000
    assert answer.limits["attributed"] == 100


def test_wrong_methods_and_paths(client: TestClient) -> None:
    for response in (client.get("/rank"), client.post("/model", json={})):
        assert response.status_code == 405
        assert response.json() == {"error": "Method Not Allowed"}
    assert client.post("/nothing", json={}).status_code == 404


def test_the_openapi_document_is_true(ranking: TestClient, artifact: Artifact) -> None:
    document = ranking.get("/docs.json").json()
    assert document["info"]["version"] == artifact.version
    schemas = document["components"]["schemas"]

    def check(name: str, value: Any) -> None:
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        Draft202012Validator.check_schema(schema)
        Draft202012Validator(schema).validate(value)

    row = schemas["Row"]
    assert set(row["properties"]) == set(row["required"]) == set(artifact.rows[0])
    assert row["properties"]["shelf"]["anyOf"][0]["enum"] == ["low", "top"]
    assert set(schemas["Context"]["properties"]) == {"shelf", "shop", "discount"}
    with pytest.raises(JsonFault, match="'floor' is not"):
        check("PredictRequest", {"rows": [artifact.rows[0] | {"shelf": "floor"}]})

    asked = {}
    for path in ("/rank", "/recommend", "/predict", "/model"):
        ((method, described),) = document["paths"][path].items()
        body = None
        if "requestBody" in described:
            content = described["requestBody"]["content"]["application/json"]
            body = content["example"]
            check(content["schema"]["$ref"].rpartition("/")[2], body)
        response = ranking.request(method, path, json=body)
        assert response.status_code == 200, (path, response.text)
        answered = described["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
        check(answered.rpartition("/")[2], response.json())
        asked[path] = response.json()
    assert asked["/rank"]["user_known"]
    accounted = rank(explain=True, attribute=True)
    check("RankRequest", accounted)
    check("RankAnswer", ranking.post("/rank", json=accounted).json())
    terms = ranking.post("/rank", json=accounted).json()["items"][0]["explanation"]["terms"]
    assert terms
    with pytest.raises(JsonFault, match="'logit' is a required property"):
        check("Term", {name: value for name, value in terms[0].items() if name != "logit"})
    check("ErrorAnswer", ranking.post("/rank", json={}).json())
    for path in ("/livez", "/readyz", "/healthz"):
        assert path in document["paths"]
        assert ranking.get(path).status_code == 200


def test_a_fault_of_the_service_tells_the_client_only_where_to_look(
    client: TestClient,
    artifact: Artifact,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Ranker, "score", lambda *_: np.array([np.nan]))
    response = client.post(
        "/predict", json={"rows": artifact.rows[:1]}, headers={"X-Request-ID": "look-here"}
    )
    assert response.status_code == 500
    assert response.json()["request_id"] == "look-here"
    assert "nan" not in response.text
    assert "request look-here failed" in caplog.text


@pytest.mark.parametrize("name", ["weights.safetensors", "vocabularies.json", "spec.json"])
def test_a_damaged_artifact_is_not_served(artifact: Artifact, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(artifact.folder, folder)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name} does not have the SHA-256"):
        Ranking(folder, None)


def test_without_a_ranker_the_service_says_how_to_give_it_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(RANKER, raising=False)
    with pytest.raises(RuntimeError, match=r"make serve.*set FATHOM_RANKER"):
        RankingService()


def test_importing_the_service_costs_little(root: Path) -> None:
    """BentoML's supervisor imports the service too, and needs none of this."""
    heavy = ["torch", "feast", "pandas", "sklearn", "kedro", "great_expectations", "evidently"]
    script = f"import sys, fathom.service; print(sorted(set(sys.modules) & set({heavy!r})))"
    answer = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.stdout.strip() == "[]", answer.stderr


# -- who is let in, and how long it may take -----------------------------------------------------


@contextmanager
def limited(folder: Path, **settings: Any) -> Iterator[TestClient]:
    """The application with settings of its own."""
    serving = Serving(folder, None, ServingConfig(**settings))
    before = getattr(app.state, "serving", None)
    app.state.serving = serving
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client
    app.state.serving = before
    serving.close()


def slow(seconds: float) -> Callable[..., dict[str, Any]]:
    def predict(*_: Any) -> dict[str, Any]:
        time.sleep(seconds)
        return {"probabilities": []}

    return predict


def test_without_a_valid_key_nothing_is_answered_but_the_document(
    artifact: Artifact, tmp_path: Path
) -> None:
    key, line = made("shop")
    (tmp_path / "keys").write_text(line)
    with limited(artifact.folder, api_keys=str(tmp_path / "keys")) as client:
        valid = {"Authorization": f"Bearer {key}"}
        assert client.get("/model", headers=valid).status_code == 200
        for headers in ({}, {"Authorization": "Bearer guess"}):
            for method, path in (("POST", "/predict"), ("POST", "/rank"), ("GET", "/model")):
                response = client.request(method, path, headers=headers)
                assert response.status_code == 401
                assert response.headers["WWW-Authenticate"] == "Bearer"
                said = response.json()["error"]
                assert said == "no valid API key; send one as 'Authorization: Bearer KEY'"
        assert client.get("/docs.json").status_code == 200
        assert client.get("/").status_code == 200


def test_a_service_does_not_start_with_a_bad_file_of_keys(
    artifact: Artifact, tmp_path: Path
) -> None:
    with (
        pytest.raises(KeysError, match="cannot be read"),
        limited(artifact.folder, api_keys=str(tmp_path / "none")),
    ):
        pass


def test_a_rush_is_turned_away_with_429_and_the_rest_is_answered(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"rows": artifact.rows[:1]}
    found: list[Any] = []
    with limited(artifact.folder, queue_seconds=0.05) as client:
        monkeypatch.setattr(app.router, "routes", [_rerouted("/predict", slow(0.1))])
        assert client.post("/predict", json=body).status_code == 200
        threads = [
            threading.Thread(target=lambda: found.append(client.post("/predict", json=body)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = [response.status_code for response in found]
        assert set(statuses) == {200, 429}
        refused = next(response for response in found if response.status_code == 429)
        assert refused.headers["Retry-After"] == "1"
        assert refused.json()["error"] == "too many requests are waiting; try again later"
        assert client.post("/predict", json=body).status_code == 200, "at once, after the rush"


def test_requests_that_are_still_being_read_take_places_too(artifact: Artifact) -> None:
    with limited(artifact.folder) as client, ExitStack() as reading:
        for _ in range(63):
            reading.enter_context(app.state.serving.queue.place())
        assert client.get("/model").status_code == 200
        reading.enter_context(app.state.serving.queue.place())
        refused = client.get("/model")
        assert refused.status_code == 429
        assert refused.headers["Retry-After"] == "1"
        assert refused.json()["version"] == artifact.version


def test_a_scan_of_paths_makes_no_time_series(client: TestClient) -> None:
    """Metrics are kept for ever, so nothing in their labels may be a stranger's choice."""
    for path in ("/users/0", "/livez", "/metrics"):
        client.get(path)
    before = client.get("/metrics").text
    for number in range(200):
        path = f"/users/{number}{'/' * (number % 3)}?q={number}"
        assert client.request(("GET", "POST", "SCAN")[number % 3], path).status_code == 404
    after = client.get("/metrics").text
    assert 'fathom_requests_total{path="/livez",status="200"}' in before
    assert "/users" not in after
    found = re.search(r'fathom_requests_total\{path="other",status="404"\} (\S+)', after)
    assert found is not None
    assert float(found[1]) >= 201
    assert len(after.splitlines()) - len(before.splitlines()) <= 2


def test_an_answer_comes_by_the_deadline_or_not_at_all(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    with limited(artifact.folder, deadline_seconds=0.2) as client:
        monkeypatch.setattr(app.router, "routes", [_rerouted("/predict", slow(0.6))])
        began = time.monotonic()
        response = client.post("/predict", json={"rows": []})
        assert time.monotonic() - began < 0.5
    assert response.status_code == 504
    assert response.json()["error"] == "the deadline has passed"


def test_a_body_that_does_not_come_is_not_waited_for(artifact: Artifact) -> None:
    """As the server passes it on: it declares four bytes, sends one, and stays."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not sent_body:
            sent_body.append(True)
            return {"type": "http.request", "body": b"{", "more_body": True}
        await asyncio.sleep(30)
        raise AssertionError("it was waited for")

    async def send(message: Any) -> None:
        sent.append(message)

    sent_body: list[bool] = []
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": "/predict",
        "raw_path": b"/predict", "query_string": b"", "root_path": "", "scheme": "http",
        "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1), "asgi": {"version": "3.0"},
        "headers": [(b"content-length", b"4")],
    }  # fmt: skip
    with limited(artifact.folder, deadline_seconds=0.2):
        asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 408
    assert dict(sent[0]["headers"])[b"connection"] == b"close"
    assert json.loads(sent[1]["body"])["error"] == "the body did not come in time"


def test_what_is_refused_is_forgotten_at_once(ranking: TestClient) -> None:
    """Sixteen megabytes of JSON are hundreds as objects, and the garbage collector comes late."""

    def kept() -> int:
        return sum(isinstance(thing, api.RankRequest) for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = kept()
        for _ in range(3):
            assert "timestamp" in faults(ranking.post("/rank", json=rank(timestamp="soon")))
        assert kept() == before
    finally:
        gc.enable()


def _rerouted(path: str, method: Callable[..., dict[str, Any]]) -> Route:
    return Route(path, _endpoint(method), methods=["POST"])


def test_a_running_service_says_who_serves_and_where_time_goes(service: Running) -> None:
    asked = rank()
    assert httpx.post(f"{service.url}/rank", json=asked, trust_env=False).status_code == 200
    text = httpx.get(f"{service.url}/metrics", trust_env=False).text
    assert f'fathom_model{{version="{service.artifact.version}"}} 1.0' in text
    for stage in ("wait", "parse", "features", "score", "write"):
        found = re.search(rf'fathom_stage_seconds_count{{stage="{stage}"}} (\S+)', text)
        assert found is not None, stage
        assert float(found[1]) >= 1
    as_of = re.search(r"^fathom_tables_as_of_seconds (\S+)", text, re.MULTILINE)
    assert as_of is not None
    assert float(as_of[1]) > 1_700_000_000
