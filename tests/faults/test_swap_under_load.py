"""The champion changes while clients ask without pause: nobody is refused, no answer is of two.

`test_following` has the follower's parts, inside the test; here is a service that follows a
registry over HTTP.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import httpx
import numpy as np
import pytest

import damage
from fathom.online import OnlineFeatures
from fathom.ranker import TOLERANCE
from fathom.registry import Registry
from fathom.serving import ServingConfig
from load import Load, Request, load
from running_service import Running, running
from small_ranker import SPEC, Artifact, feature_store, register

pytestmark = pytest.mark.e2e

MOMENT = datetime(2024, 2, 1, 10, tzinfo=timezone.utc)
CONTEXT = {"shelf": "low", "shop": "shop1", "discount": 0.1}
ITEMS = [f"i{i}" for i in range(20)]
RANK: Request = (
    "/rank",
    {"user": "u2", "context": CONTEXT, "candidates": ITEMS, "timestamp": MOMENT.isoformat()},
)


@dataclass(frozen=True)
class House:
    """A registry of two versions, the service that follows it, and what each version answers."""

    service: Running
    registry: Registry
    one: Artifact
    other: Artifact
    predict: Request
    ranked: dict[str, list[float]]

    def wait_for(self, version: str, seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while self.service_version() != version:
            assert time.monotonic() < until, self.service.log.read_text()
            time.sleep(0.05)

    def service_version(self) -> str:
        answer = httpx.get(f"{self.service.url}/model", trust_env=False, timeout=60)
        return str(answer.json()["version"])

    def check(self, load: Load) -> set[str]:
        """Every answer was wholly of one version; returns the versions."""
        recorded = {a.version: a.probabilities for a in (self.one, self.other)}
        seen = set()
        assert not load.failures
        for (path, _), response in load.answers:
            answer = response.json()
            version = answer["version"]
            assert response.headers["X-Fathom-Version"] == version
            if path == "/predict":
                found, expected = answer["probabilities"], recorded[version]
            else:
                by_item = {item["item"]: item["probability"] for item in answer["items"]}
                found, expected = [by_item[item] for item in ITEMS], self.ranked[version]
            np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
            seen.add(version)
        return seen


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    one, other = register(folder / "one"), register(folder / "other", "deep")
    registry = Registry(folder / "registry")
    for artifact in (one, other):
        shutil.copytree(artifact.folder, registry.folder / "versions" / artifact.version)
    registry.promote(one.version, "the first")
    repo = feature_store(folder)
    frame = OnlineFeatures.open(repo, SPEC).frame(
        "u2", CONTEXT, [{"item_id": item} for item in ITEMS], MOMENT
    )[0]
    ranked = {a.version: a.ranker.score(frame).tolist() for a in (one, other)}
    for scores in (ranked, {a.version: a.probabilities for a in (one, other)}):
        assert np.abs(np.subtract(*scores.values())).min() > 100 * TOLERANCE, (
            "they can be told apart"
        )
    # Nobody is to be turned away or late because the machine that runs the tests is busy.
    config = ServingConfig(
        registry=str(registry.folder), follow_seconds=0.1, queue_seconds=20, deadline_seconds=20
    )
    with running(folder, config, one, repo) as service:
        yield House(service, registry, one, other, ("/predict", {"rows": one.rows}), ranked)


def test_champions_come_and_go_under_load(house: House) -> None:
    with load(house.service.url, [house.predict, house.predict, RANK, RANK]) as found:
        for _ in range(3):
            house.registry.promote(house.other.version, "to and fro")
            house.wait_for(house.other.version)
            house.registry.rollback("to and fro")
            house.wait_for(house.one.version)
    assert house.check(found) == {house.one.version, house.other.version}
    paths = [path for (path, _), _ in found.answers]
    assert min(paths.count("/predict"), paths.count("/rank")) > 20


@pytest.mark.parametrize(
    ("name", "change", "vouched", "reason"),
    [
        ("corrupt", damage.corrupt, False, "does not have the SHA-256 of the manifest"),
        ("truncated", damage.truncate, True, "cannot serve"),
        ("nan", damage.nan, True, "20 of 20 golden probabilities of"),
    ],
)
def test_a_bad_champion_is_refused_under_load(
    house: House, name: str, change: Callable[[Path], None], vouched: bool, reason: str
) -> None:
    folder = house.registry.folder / "versions" / name
    shutil.copytree(house.other.folder, folder)
    change(folder)
    if vouched:
        damage.vouch(folder)
    failures = house.service.counted("swap_failures")
    pointer = house.registry.folder / "champion.json"
    whole = pointer.read_text()
    with load(house.service.url, [house.predict, RANK]) as found:
        # By hand: `Registry.promote` would refuse what does not have its hashes.
        pointer.write_text(json.dumps({"champions": [house.one.version, name]}))
        until = time.monotonic() + 60
        while house.service.counted("swap_failures") < failures + 2:
            assert time.monotonic() < until
            time.sleep(0.1)
        began = len(found.answers)
        while len(found.answers) < began + 10:
            time.sleep(0.05)
    pointer.write_text(whole)
    assert house.check(found) == {house.one.version}
    said = [line for line in house.service.log.read_text().splitlines() if reason in line]
    assert any(f"champion {name} cannot serve, {house.one.version} goes on" in s for s in said)
