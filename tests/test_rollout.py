"""Challengers and new champions on trial: who answers whom, and what ends a trial.

The service runs inside the test; `faults/test_roll_back_under_load` has one that runs by itself.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

import damage
from fathom.guard import RolloutConfig
from fathom.metrics import metrics
from fathom.ranking import Ranking
from fathom.registry import Challenge, Registry
from fathom.rollout import Serving, is_chosen, user_of
from fathom.service import app
from fathom.serving import OnlineStore, ServingConfig
from small_ranker import SPEC, Artifact, feature_store, register

CONTEXT = {"shelf": "low", "shop": "shop1", "discount": 0.1}
USERS = [f"u{i}" for i in range(60)]


@dataclass(frozen=True)
class House:
    """A registry of two versions, of which a service serves the first."""

    client: TestClient
    serving: Serving
    registry: Registry
    one: str
    other: str
    log: Path

    def rank(self, user: str, **changes: Any) -> Any:
        body = {"user": user, "context": CONTEXT, "candidates": ["i1", "i2", "i3"]} | changes
        return self.client.post("/rank", json=body)

    def answered_by(self, user: str) -> str:
        response = self.rank(user)
        assert response.status_code == 200, response.text
        assert response.headers["X-Fathom-Version"] == response.json()["version"]
        return str(response.json()["version"])

    def challenge(self, mode: Any = "canary", share: float = 0.5) -> Challenge:
        challenge = self.registry.challenge(self.other, mode, share, "a test")
        wait(lambda: self.serving.challenge == challenge)
        return challenge

    def promote(self) -> None:
        self.registry.promote(self.other, "a test")
        wait(lambda: self.serving.version == self.other)

    def logged(self) -> Any:
        for lane in self.serving.cast.lanes:
            assert lane.ranking.log is not None
            lane.ranking.log.close()
        return pq.read_table(self.log)


def wait(done: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until
        time.sleep(0.01)


def trials(role: str, outcome: str) -> float:
    return float(metrics().trials.labels(role=role, outcome=outcome)._value.get())


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    folder = tmp_path_factory.mktemp("artifacts")
    return register(folder / "one"), register(folder / "other", "deep")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> OnlineStore:
    repo = feature_store(tmp_path_factory.mktemp("store"))
    settings = {"root": str(repo.root), **repo.config.model_dump()}
    found = OnlineStore(json.dumps(settings), SPEC)
    wait(lambda: found.state == "ready", 60)
    return found


@pytest.fixture
def house(
    artifacts: tuple[Artifact, Artifact],
    store: OnlineStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[House]:
    one, other = artifacts
    registry = Registry(tmp_path / "registry")
    for artifact in artifacts:
        shutil.copytree(artifact.folder, registry.folder / "versions" / artifact.version)
    registry.promote(one.version, "the first")
    config = ServingConfig(
        registry=str(registry.folder),
        feature_log=str(tmp_path / "log"),
        follow_seconds=0.05,
        queue_seconds=5,
        deadline_seconds=10,
        # Nothing here is to fail by the machine's being busy.
        rollout=RolloutConfig(
            min_requests=20, newest=50, max_error_share=0.1, latency_floor_seconds=0.2
        ),
    )
    serving = Serving(one.folder, None, config)
    serving.ranking.store = store  # and of all that come, since their spec is the same
    monkeypatch.setattr(store, "close", lambda: None)
    monkeypatch.setattr(app.state, "serving", serving, raising=False)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield House(client, serving, registry, one.version, other.version, tmp_path / "log")
    serving.close()


def when(version: str, work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Something happens whenever a version is asked."""
    genuine: Any = Ranking._scored

    def scored(self: Ranking, columns: Any, count: int) -> Any:
        found = genuine(self, columns, count)
        return found if self.version != version else (work(), found)[1]

    monkeypatch.setattr(Ranking, "_scored", scored)


def nans(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A version's scores are no numbers, though its golden ones were."""
    from fathom.fast import FastScorer

    genuine: Any = FastScorer.score

    def score(self: FastScorer, columns: Any, count: int) -> Any:
        found = genuine(self, columns, count)
        return found * np.nan if self._ranker.version == version and count == 3 else found

    monkeypatch.setattr(FastScorer, "score", score)


def fail() -> None:
    raise ValueError("a fault")


# -- whose request it is -------------------------------------------------------------------------


def a_challenge(share: float, version: str = "v1") -> Challenge:
    return Challenge(version, "canary", share, "", "")


@given(st.text(), st.floats(0.01, 1), st.floats(0.01, 1))
def test_a_larger_share_keeps_the_users_it_has(user: str, one: float, other: float) -> None:
    small, large = sorted((one, other))
    assert is_chosen(user, a_challenge(small)) <= is_chosen(user, a_challenge(large))
    assert is_chosen(user, a_challenge(1.0))


def test_a_share_is_one_of_users_and_another_one_with_each_version() -> None:
    users = [f"u{i}" for i in range(20_000)]
    chosen = [is_chosen(user, a_challenge(0.05)) for user in users]
    # Four standard deviations of a binomial.
    assert abs(sum(chosen) - 1000) < 4 * math.sqrt(20_000 * 0.05 * 0.95)
    others = [is_chosen(user, a_challenge(0.05, "v2")) for user in users]
    both = sum(a and b for a, b in zip(chosen, others, strict=True))
    assert abs(both - 50) < 4 * math.sqrt(50)
    # In every process: SHA-256 of "v1", a zero byte and "u0" begins with 98.
    assert not is_chosen("u0", a_challenge(0x98 / 256))
    assert is_chosen("u0", a_challenge(0x99 / 256))
    assert is_chosen("\ud800", a_challenge(1.0)), "half of a surrogate pair is a user, too"


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"user": 7}', b"\xff", b"[" * 100_000])
def test_a_body_that_names_no_user_is_the_champions_to_refuse(body: bytes) -> None:
    assert user_of(body) is None
    assert not is_chosen(user_of(body), a_challenge(1.0))


# -- canaries ------------------------------------------------------------------------------------


def test_a_canary_answers_its_users_and_no_others(house: House) -> None:
    challenge = house.challenge(share=0.5)
    expected = {u: house.other if is_chosen(u, challenge) else house.one for u in USERS}
    assert set(expected.values()) == {house.one, house.other}
    for _ in range(2):
        assert {user: house.answered_by(user) for user in USERS} == expected
    # Where there is no user, there is nothing that a share could be of.
    assert house.client.get("/model").json()["version"] == house.one
    house.registry.withdraw("enough")
    wait(lambda: house.serving.challenge is None)
    assert {house.answered_by(user) for user in USERS} == {house.one}


def test_the_log_says_who_answered_in_what_place_and_how_long_it_took(house: House) -> None:
    house.challenge(share=1.0)
    answer = house.rank("u2").json()
    rows = house.logged()
    assert set(rows["_how"].to_pylist()) == {"canary"}
    assert set(rows["_version"].to_pylist()) == {house.other}
    by_place = dict(zip(rows["_slot"].to_pylist(), rows["item_id"].to_pylist(), strict=True))
    assert [by_place[place] for place in range(3)] == [item["item"] for item in answer["items"]]
    (milliseconds,) = set(rows["_milliseconds"].to_pylist())
    assert 0 < milliseconds < 10_000


@pytest.mark.parametrize("fault", ["error", "NaN"])
def test_what_a_canary_fails_the_champion_answers_until_it_is_withdrawn(
    house: House, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    house.challenge(share=1.0)
    (nans if fault == "NaN" else lambda *a: when(a[0], fail, a[1]))(house.other, monkeypatch)
    failed, ended = trials("canary", "failed"), metrics().rollbacks.labels(role="challenger")
    before = ended._value.get()
    with caplog.at_level(logging.ERROR, "bentoml.fathom"):
        assert {house.answered_by(user) for user in USERS} == {house.one}
        wait(lambda: house.registry.challenger() is None)
    assert house.serving.challenge is None
    # Of 20 requests two may fail. Whoever is asked after the third is asked of the champion alone.
    assert trials("canary", "failed") == failed + 3
    assert ended._value.get() == before + 1
    assert metrics().challenger_share.labels(mode="canary")._value.get() == 0
    said = f"challenger {house.other} is not used any more, {house.one} serves: 3 of its newest 3"
    assert said in caplog.text
    last = house.registry.history()[-1]
    assert (last["action"], last["version"], last["by"]) == ("withdraw", house.other, "service")
    assert last["reason"] == "3 of its newest 3 requests failed; at most 10.0% may"
    assert house.registry.champion() == house.one


def test_a_canary_that_hangs_keeps_nobody_waiting_for_long(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = house.serving.config.rollout.model_copy(update={"patience_seconds": 0.05})
    config = house.serving.config.model_copy(update={"rollout": rollout})
    monkeypatch.setattr(house.serving, "config", config)
    house.challenge(share=1.0)
    goes_on = threading.Event()
    when(house.other, lambda: goes_on.wait(20), monkeypatch)
    began = time.monotonic()
    assert {house.answered_by(user) for user in USERS} == {house.one}
    assert time.monotonic() - began < 5
    wait(lambda: house.registry.challenger() is None)
    goes_on.set()


def test_a_slow_canary_is_withdrawn(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    for user in USERS[:20]:
        house.answered_by(user)
    house.challenge(share=1.0)
    when(house.other, lambda: time.sleep(0.25), monkeypatch)
    assert {house.answered_by(user) for user in USERS[:20]} == {house.other}
    assert house.answered_by("u0") == house.one
    wait(lambda: house.registry.challenger() is None)
    assert "p99 of its newest 20 requests is 2" in house.registry.history()[-1]["reason"]


def test_what_the_champion_refuses_too_is_not_held_against_a_canary(house: House) -> None:
    challenge = house.challenge(share=1.0)
    for _ in range(10):
        refused = house.rank("u1", context={"shelf": "floor"})
        assert refused.status_code == 400
        assert refused.json()["version"] == house.one
    assert house.serving.challenge == challenge
    assert house.answered_by("u1") == house.other


def test_a_challenger_that_was_found_wanting_may_challenge_again_when_asked_to(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.challenge(share=1.0)
    with monkeypatch.context() as broken:
        when(house.other, fail, broken)
        for user in USERS[:3]:
            house.answered_by(user)
        wait(lambda: house.registry.challenger() is None)
    house.registry.challenge(house.other, "canary", 1.0, "mended")
    wait(lambda: house.serving.challenge is not None)
    assert house.answered_by("u1") == house.other


def test_a_promoted_canary_is_the_champion_and_a_canary_no_more(house: House) -> None:
    house.challenge(share=1.0)
    house.promote()
    wait(lambda: house.serving.challenge is None)
    assert house.answered_by("u1") == house.other
    assert house.registry.challenger() is None


def test_a_challenger_that_cannot_be_loaded_changes_nothing(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    damage.nan(house.registry.path(house.other))
    damage.vouch(house.registry.path(house.other))
    refusals = metrics().swap_failures._value.get()
    with caplog.at_level(logging.ERROR, "bentoml.fathom"):
        house.registry.challenge(house.other, "canary", 1.0, "a trap")
        wait(lambda: metrics().swap_failures._value.get() >= refusals + 2)
    assert house.serving.challenge is None
    assert house.answered_by("u1") == house.one
    said = [r.getMessage() for r in caplog.records if "cannot be tried" in r.getMessage()]
    assert len(said) == 1, "once, not every time"
    assert f"challenger {house.other} cannot be tried: 20 of 20 golden probabilities" in said[0]


# -- shadows -------------------------------------------------------------------------------------


def test_a_shadow_scores_what_the_champion_answers_and_is_counted_nowhere(house: House) -> None:
    house.challenge("shadow", 1.0)
    answered, ranked = trials("shadow", "answered"), metrics().ranked_items._value.get()
    for user in USERS[:8]:
        assert house.answered_by(user) == house.one
    wait(lambda: trials("shadow", "answered") == answered + 8)
    assert metrics().ranked_items._value.get() == ranked + 8 * 3
    rows = house.logged()
    by_how = {how: rows.filter(pc.equal(rows["_how"], how)) for how in ("champion", "shadow")}
    assert {len(found) for found in by_how.values()} == {8 * 3}
    assert set(by_how["shadow"]["_version"].to_pylist()) == {house.other}
    asked = [set(found["_request"].to_pylist()) for found in by_how.values()]
    assert asked[0] == asked[1]


def test_a_shadow_that_is_slow_delays_nobody_and_misses_what_is_too_much(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.challenge("shadow", 1.0)
    goes_on = threading.Event()
    when(house.other, lambda: goes_on.wait(20), monkeypatch)
    busy = trials("shadow", "busy")
    began = time.monotonic()
    for user in USERS[:30]:
        assert house.answered_by(user) == house.one
    assert time.monotonic() - began < 5
    assert trials("shadow", "busy") == busy + 30 - 8
    goes_on.set()


def test_a_shadow_that_fails_is_withdrawn(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    house.challenge("shadow", 1.0)
    nans(house.other, monkeypatch)
    for user in USERS[:6]:
        assert house.answered_by(user) == house.one
    wait(lambda: house.registry.challenger() is None)
    assert house.registry.history()[-1]["by"] == "service"


# -- champions on probation ----------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["error", "NaN"])
def test_a_new_champion_that_fails_is_rolled_back_and_its_predecessor_answers(
    house: House, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.promote()
    assert house.answered_by("u1") == house.other
    (nans if fault == "NaN" else lambda *a: when(a[0], fail, a[1]))(house.other, monkeypatch)
    assert {house.answered_by(user) for user in USERS} == {house.one}
    wait(lambda: house.registry.champion() == house.one)
    last = house.registry.history()[-1]
    assert (last["action"], last["version"], last["by"]) == ("rollback", house.one, "service")
    assert house.serving.version == house.one
    assert house.client.get("/model").json()["version"] == house.one


def test_where_the_registry_cannot_be_written_the_pointer_is_refused_until_it_changes(
    house: House, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    house.promote()
    lock = house.registry.folder / ".lock"
    lock.unlink()
    lock.mkdir()  # nobody can open it for writing
    when(house.other, fail, monkeypatch)
    refusals = metrics().swap_failures._value.get()
    with caplog.at_level(logging.ERROR, "bentoml.fathom"):
        assert {house.answered_by(user) for user in USERS} == {house.one}
        wait(lambda: metrics().swap_failures._value.get() >= refusals + 3)
    assert house.registry.champion() == house.other
    assert house.serving.version == house.one
    assert caplog.text.count("but the registry still names it") == 1, "once, not every time"
    lock.rmdir()
    wait(lambda: house.registry.champion() == house.one)


def test_after_its_probation_a_champion_stands_alone(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout = house.serving.config.rollout.model_copy(update={"probation_seconds": 0.3})
    config = house.serving.config.model_copy(update={"rollout": rollout})
    monkeypatch.setattr(house.serving, "config", config)
    house.promote()
    assert house.serving.cast.before is not None
    wait(lambda: house.serving.cast.before is None)
    when(house.other, fail, monkeypatch)
    assert house.rank("u1").status_code == 500
    assert house.registry.champion() == house.other


def test_who_is_rolled_back_to_by_hand_is_not_on_probation(house: House) -> None:
    house.promote()
    house.registry.rollback("by hand")
    wait(lambda: house.serving.version == house.one)
    assert house.serving.cast.before is None


def test_a_canary_falls_back_on_a_champion_on_probation_and_that_on_its_predecessor(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    house.promote()
    house.registry.challenge(house.one, "canary", 1.0, "the old one, once more")
    wait(lambda: house.serving.challenge is not None)
    assert house.answered_by("u1") == house.one
    canary = house.serving.cast.challenger
    assert canary is not None
    monkeypatch.setattr(canary.ranking, "_scored", lambda *_: fail())
    assert house.answered_by("u1") == house.other
    when(house.other, fail, monkeypatch)
    assert house.answered_by("u1") == house.one
