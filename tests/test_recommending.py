"""Recommendation over HTTP: what is retrieved, what is left out, what chance adds."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from starlette.testclient import TestClient

from fathom import api
from fathom.feature_log import PROPENSITY, SLOT
from fathom.feature_store import FeatureRepo
from fathom.online import OnlineFeatures, UserRead
from fathom.ranking import Ranking
from fathom.recommending import Pool, Recommender
from fathom.retrieval import Approximate, RetrievalConfig
from fathom.service import Serving, app
from fathom.serving import OnlineStore, ServingConfig
from small_ranker import ITEMS, SPEC, WITH_HISTORY, Artifact, feature_store, register, tables

CONTEXT = {"shelf": "low", "shop": "shop1", "discount": 0.1}
MOMENT = "2024-02-01T10:00:00Z"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return register(tmp_path_factory.mktemp("ranker"), spec=WITH_HISTORY, factors=4)


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> FeatureRepo:
    return feature_store(tmp_path_factory.mktemp("store"), WITH_HISTORY)


@pytest.fixture(scope="module")
def log_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log")


@contextmanager
def serving(whole: Serving) -> Iterator[TestClient]:
    """The service's own ASGI application; `test_service` has it inside BentoML's."""
    app.state.serving = whole
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client
    whole.close()
    del app.state.serving


@pytest.fixture(scope="module")
def client(artifact: Artifact, repo: FeatureRepo, log_folder: Path) -> Iterator[TestClient]:
    """The service with its feature store; it logs what it saw."""
    settings = json.dumps({"root": str(repo.root), **repo.config.model_dump()})
    config = ServingConfig(feature_log=str(log_folder), segment_seconds=0.1, deadline_seconds=30)
    with serving(Serving(artifact.folder, settings, config)) as client:
        deadline = time.monotonic() + 60
        while client.get("/model").json()["feature_store"] != "ready":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield client


def recommend(client: TestClient, name: str = "r1", **changes: Any) -> dict[str, Any]:
    """An answer, whose form is checked."""
    request = {"user": "u2", "context": CONTEXT, "timestamp": MOMENT} | changes
    response = client.post("/recommend", json=request, headers={"X-Request-ID": name})
    assert response.status_code == 200, response.text
    api.RecommendAnswer.model_validate_json(response.text)
    return dict(response.json())


def items(answer: dict[str, Any]) -> list[str]:
    return [item["item"] for item in answer["items"]]


def bought_by(user: str) -> set[str]:
    log = tables()["interactions"].to_pylist()
    return {row["item_id"] for row in log if row["user_id"] == user}


# -- what is shown -------------------------------------------------------------------------------


def test_the_best_of_what_rank_would_give(client: TestClient) -> None:
    answer = recommend(client, k=7)
    everything = [f"i{i}" for i in range(ITEMS)]
    ranked = client.post(
        "/rank",
        json={"user": "u2", "context": CONTEXT, "timestamp": MOMENT, "candidates": everything},
    ).json()
    best = [(item["item"], item["probability"]) for item in ranked["items"][:7]]
    assert [(item["item"], item["probability"]) for item in answer["items"]] == [
        (item, pytest.approx(probability, abs=1e-6)) for item, probability in best
    ]
    assert {item["source"] for item in answer["items"]} == {"retrieved"}
    assert {item["propensity"] for item in answer["items"]} == {1.0}
    assert answer["ranked"] == ITEMS  # the pool is larger than this catalogue
    assert (answer["user_known"], answer["popular"], answer["degraded"]) == (True, False, False)


def test_ten_items_come_unless_asked_for_another_number(client: TestClient) -> None:
    assert len(items(recommend(client))) == 10
    assert len(items(recommend(client, k=1))) == 1
    assert len(items(recommend(client, k=1000))) == ITEMS  # all there are


def test_explanations_add_up(client: TestClient) -> None:
    for item in recommend(client, k=3, explain=True)["items"]:
        parts = item["explanation"]
        assert parts["logit"] == pytest.approx(
            parts["bias"] + parts["deep"] + sum(parts["wide"].values()), abs=1e-5
        )
        assert 1 / (1 + np.exp(-parts["logit"])) == pytest.approx(item["probability"], abs=1e-6)


def test_taste_decides_what_is_retrieved(artifact: Artifact, repo: FeatureRepo) -> None:
    """u2 likes tea, the odd items; what was bought since the training counts too."""
    features = OnlineFeatures.open(repo, WITH_HISTORY)
    recommender = Recommender(artifact.ranker, RetrievalConfig(pool=8))
    request = api.RecommendRequest(user="u2", k=5)
    fresh = recommender.retrieve(request, features, features.read("u2"))
    stored = recommender.retrieve(request, features, UserRead({}, True))
    nobody = recommender.retrieve(
        api.RecommendRequest(user="nobody", k=5), features, features.read("nobody")
    )
    features.close()
    places, counts = features.history(features.read("u2"))
    assert set(places) == bought_by("u2")
    assert counts.sum() == 40  # two a day, for twenty days
    kinds = [[int(item[1:]) % 2 for item in pool.items] for pool in (fresh, stored)]
    assert kinds == [[1] * 8, [1] * 8]
    assert set(fresh.items) != set(stored.items)
    popular = np.argsort(-artifact.ranker.tower.popularity, kind="stable")[:8]
    assert nobody.places.tolist() == popular.tolist()
    assert [fresh.popular, stored.popular, nobody.popular] == [False, False, True]


def test_an_unknown_user_gets_what_is_popular(client: TestClient) -> None:
    answer = recommend(client, user="nobody")
    assert answer["popular"]
    assert not answer["user_known"]
    assert {item["source"] for item in answer["items"]} == {"popular"}
    assert len(answer["items"]) == 10


def test_when_the_online_store_is_down_the_stored_vector_is_used(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = app.state.serving.ranking.store.features
    monkeypatch.setattr(features, "read", lambda user: UserRead({}, True))
    answer = recommend(client, exclude_interacted=True)
    assert (answer["degraded"], answer["popular"], answer["user_known"]) == (True, False, False)


# -- filters -------------------------------------------------------------------------------------


def test_what_the_user_has_bought_is_left_out(client: TestClient) -> None:
    bought = bought_by("u2")
    assert bought & set(items(recommend(client, k=1000)))
    left = items(recommend(client, k=1000, exclude_interacted=True))
    assert set(left) == {f"i{i}" for i in range(ITEMS)} - bought


def test_lists_and_attributes_narrow_the_choice(client: TestClient) -> None:
    allow = ["i1", "i2", "i3", "i4", "unheard of"]
    assert set(items(recommend(client, allow=allow))) == {"i1", "i2", "i3", "i4"}
    assert set(items(recommend(client, allow=allow, deny=["i3", "🦄"]))) == {"i1", "i2", "i4"}
    tea = items(recommend(client, k=1000, where={"genre": ["tea", "cocoa"]}))
    assert set(tea) == {f"i{i}" for i in range(1, ITEMS, 2)}
    # tags: none, green, or green and loose, by i % 3.
    green = items(recommend(client, k=1000, where={"tags": ["green"]}))
    assert set(green) == {f"i{i}" for i in range(ITEMS) if i % 3}
    both = items(recommend(client, k=1000, where={"tags": ["loose"], "genre": ["tea"]}))
    assert set(both) == {f"i{i}" for i in range(ITEMS) if i % 3 == 2 and i % 2}
    assert set(items(recommend(client, where={"tags": ["green"]}, allow=["i1", "i3"]))) == {"i1"}


def test_where_nothing_is_allowed_nothing_comes(client: TestClient) -> None:
    for nothing in ({"allow": []}, {"where": {"genre": ["cocoa"]}}, {"where": {"genre": []}}):
        answer = recommend(client, **nothing, explain=True)
        assert (answer["items"], answer["ranked"], answer["user_known"]) == ([], 0, True)


# -- chance and diversity ------------------------------------------------------------------------


def test_exploration_is_flagged_repeatable_and_logged(client: TestClient, log_folder: Path) -> None:
    asked = {"k": 5, "exploration": 0.4}
    answer = recommend(client, "seed-1", **asked)
    sources = [item["source"] for item in answer["items"]]
    assert sources.count("explored") == 2  # 0.4 of 5
    assert len(set(items(answer))) == 5
    by_hand = {"explored": 2 / (ITEMS - 3), "retrieved": 1.0}
    plain = items(recommend(client, k=5))
    for item in answer["items"]:
        expected = 1.0 if item["item"] in plain[:3] else by_hand["explored"]
        assert item["propensity"] == pytest.approx(expected)
    assert recommend(client, "seed-1", **asked) == answer
    assert any(items(recommend(client, f"seed-{i}", **asked)) != items(answer) for i in (2, 3, 4))

    deadline = time.monotonic() + 30
    rows: list[dict[str, Any]] = []
    while not rows:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        found = [
            r for p in log_folder.glob("*/[!.]*.parquet") for r in pq.read_table(p).to_pylist()
        ]
        rows = [row for row in found if row["_request"] == "seed-1"][:ITEMS]
    assert len(rows) == ITEMS  # all that were ranked, shown or not
    assert sum(row[PROPENSITY] for row in rows) == pytest.approx(5)
    shown = sorted((row[SLOT], row["item_id"]) for row in rows if row[SLOT] is not None)
    assert [item for _, item in shown] == items(answer)


def test_diversity_trades_probability_for_difference(
    client: TestClient, artifact: Artifact
) -> None:
    tower, known = artifact.ranker.tower, artifact.ranker.encoder.tables["item_id"].values

    def likeness(answer: dict[str, Any]) -> float:
        vectors = tower.items[[known.index(item) for item in items(answer)]]
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        return float((unit @ unit.T)[np.triu_indices(len(unit), 1)].mean())

    plain, diverse = (recommend(client, k=8, diversity=share) for share in (0.0, 0.7))
    assert plain["items"][0] == diverse["items"][0]
    assert likeness(diverse) < likeness(plain) - 0.1
    means = [np.mean([item["probability"] for item in a["items"]]) for a in (plain, diverse)]
    assert means[1] <= means[0]


def test_the_services_settings_hold_where_a_request_says_nothing(
    artifact: Artifact,
) -> None:
    config = RetrievalConfig(exploration=1.0)
    recommender = Recommender(artifact.ranker, config)
    pool = recommender._exact.search(artifact.ranker.tower.users[0], ITEMS)
    held = Pool(pool.places, ["i0"] * ITEMS, False)
    for share, explored in ((None, 5), (0.0, 0)):
        request = api.RecommendRequest(user="u1", k=5, exploration=share)
        slots = recommender.fill(request, "r", held, np.linspace(1, 0, ITEMS))
        assert slots.explored.sum() == explored


# -- the approximate index -----------------------------------------------------------------------


def test_a_large_catalogue_is_searched_approximately(artifact: Artifact) -> None:
    pytest.importorskip("faiss")
    recommender = Recommender(artifact.ranker, RetrievalConfig(exact_items=10, pool=5))
    deadline = time.monotonic() + 30
    while not isinstance(recommender._index, Approximate):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    described = recommender.described
    assert (described["items"], described["index"]) == (ITEMS, "approximate")
    assert described["recall"] >= 0.95


def test_without_faiss_the_exact_index_stays(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    recommender = Recommender(artifact.ranker, RetrievalConfig(exact_items=10_000))
    recommender._approximate()
    assert recommender.described == {"items": ITEMS, "index": "exact", "recall": 1.0}
    assert "pip install 'fathom[retrieval]'" in caplog.text


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "field", "fault"),
    [
        ({"k": 0}, "k", "is 0; it must be at least 1"),
        ({"k": 1001}, "k", "is 1001; it must be at most 1000"),
        ({"k": "5"}, "k", "is '5'; Input should be a valid integer"),
        ({"diversity": 1.1}, "diversity", "is 1.1; it must be at most 1"),
        ({"exploration": -0.5}, "exploration", "is -0.5; it must be at least 0"),
        ({"deny": ["x"] * 10_001}, "deny", "has 10,001 entries; at most 10,000 are allowed"),
        ({"allow": ["x"] * 10_001}, "allow", "has 10,001 entries; at most 10,000 are allowed"),
        ({"allow": [1]}, "allow[0]", "is 1; it must be a string"),
        ({"where": {"genre": "tea"}}, "where.genre", "is 'tea'; it must be a list"),
        ({"where": {"shop": ["a"]}}, "where.shop", "is no attribute of items; there are ['genre'"),
        ({"where": {"genre": ["x"] * 10_001}}, "where.genre", "has 10,001 entries"),
        ({"context": CONTEXT | {"shelf": "floor"}}, "context.shelf", "is 'floor'; it must be one"),
        ({"context": {}}, "context.shop", "is missing; give null"),
        ({"timestamp": "soon"}, "timestamp", "is 'soon'; it must be an ISO 8601 moment"),
        ({"candidates": ["i1"]}, "candidates", "this request has no such field"),
    ],
)
def test_a_fault_names_field_value_and_bound(
    client: TestClient, change: dict[str, Any], field: str, fault: str
) -> None:
    request = {"user": "u2", "context": CONTEXT, "timestamp": MOMENT} | change
    response = client.post("/recommend", json=request)
    assert response.status_code == 400, response.text
    found = {line["field"]: line["fault"] for line in response.json()["faults"]}
    assert fault in found[field]


def test_faults_of_all_parts_come_together(client: TestClient) -> None:
    request = {"user": "u2", "context": {}, "timestamp": "soon", "where": {"x": []}}
    faults = client.post("/recommend", json=request).json()["faults"]
    assert {"timestamp", "where.x", "context.shelf"} <= {fault["field"] for fault in faults}


def test_without_an_aggregate_by_user_and_item_nothing_says_what_was_bought(
    artifact: Artifact, tmp_path: Path
) -> None:
    features = OnlineFeatures.open(feature_store(tmp_path), SPEC)
    request = api.RecommendRequest(user="u2", exclude_interacted=True)
    (fault,) = Recommender(artifact.ranker, RetrievalConfig()).faults(request, features)
    assert features.history(features.read("u2"))[0] == []
    features.close()
    assert fault["field"] == "exclude_interacted"
    assert "no aggregate of interactions by ['user_id', 'item_id']; remove it" in fault["fault"]


def test_without_a_tower_recommend_says_why(client: TestClient, tmp_path: Path) -> None:
    lane = app.state.serving.cast.champion
    own = lane.ranking
    lane.ranking = Ranking(register(tmp_path, spec=WITH_HISTORY).folder, None)
    try:
        response = client.post("/recommend", json={"user": "u2"})
        model = client.get("/model").json()
    finally:
        lane.ranking = own
    assert response.status_code == 503
    assert "this ranker has no tower to retrieve with" in response.json()["error"]
    assert "retry-after" not in response.headers
    assert model["retrieval"] is None


def test_the_model_says_how_it_retrieves(client: TestClient) -> None:
    model = client.get("/model").json()
    assert model["retrieval"] == {"items": ITEMS, "index": "exact", "recall": 1.0}
    assert (model["limits"]["recommended"], model["limits"]["listed"]) == (1_000, 10_000)


def test_the_settings_of_the_service_hold_those_of_retrieval() -> None:
    config = ServingConfig.model_validate_json('{"retrieval": {"pool": 7}}')
    assert config.retrieval.pool == 7
    assert OnlineStore(None, SPEC, config).state == "absent"
