"""A ranker that fails only when it is live is taken back under load, and no request is lost.

Its golden requests name a shop, as all do that training saw. Where none is named, it has no number.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import damage
from fathom import files
from fathom.artifact import MANIFEST
from fathom.guard import RolloutConfig
from fathom.registry import Registry
from fathom.serving import ServingConfig
from load import Request, load
from running_service import Running, running
from small_ranker import feature_store, register

pytestmark = pytest.mark.e2e

MOMENT = datetime(2024, 2, 1, 10, tzinfo=timezone.utc).isoformat()
CONTEXT = {"shelf": "low", "shop": None, "discount": 0.1}
REQUESTS: list[Request] = [
    (
        "/rank",
        {"user": f"u{user}", "context": CONTEXT, "candidates": ["i1", "i2"], "timestamp": MOMENT},
    )
    for user in range(4)
]


@dataclass(frozen=True)
class House:
    """A service that follows a registry of a sound version and of one that is not."""

    service: Running
    registry: Registry
    sound: str
    trap: str

    def wait(self, done: Callable[[], bool], seconds: float = 60) -> None:
        until = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < until, self.service.log.read_text()
            time.sleep(0.05)

    def last(self) -> tuple[str, str]:
        entry = self.registry.history()[-1]
        return entry["action"], entry["by"]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    sound, other = register(folder / "one"), register(folder / "other", "deep")
    registry = Registry(folder / "registry")
    for artifact in (sound, other):
        shutil.copytree(artifact.folder, registry.folder / "versions" / artifact.version)
    without_a_number_for_missing(registry.folder / "versions" / other.version)
    registry.promote(sound.version, "the first")
    config = ServingConfig(
        registry=str(registry.folder),
        follow_seconds=0.1,
        queue_seconds=20,
        deadline_seconds=20,
        rollout=RolloutConfig(min_requests=50, max_error_share=0.1, patience_seconds=15),
    )
    with running(folder, config, sound, feature_store(folder)) as service:
        yield House(service, registry, sound.version, other.version)


def without_a_number_for_missing(folder: Path) -> None:
    """The embedding of a missing shop is NaN; the manifest vouches for it."""
    weights = load_file(folder / damage.WEIGHTS)
    (name,) = (name for name in weights if "embedding" in name and "shop" in name)
    weights[name][0] = np.nan
    save_file(weights, folder / damage.WEIGHTS)
    damage.vouch(folder)
    assert files.sha256(folder / damage.WEIGHTS) in (folder / MANIFEST).read_text()


@pytest.mark.parametrize("mode", ["canary", "shadow"])
def test_a_challenger_that_fails_is_withdrawn(house: House, mode: str) -> None:
    with load(house.service.url, REQUESTS) as found:
        house.wait(lambda: len(found.answers) > 20)
        house.registry.challenge(house.trap, mode, 1.0, "a trap")  # type: ignore[arg-type]
        house.wait(lambda: house.last() == ("withdraw", "service"))
        before = len(found.answers)
        house.wait(lambda: len(found.answers) > before + 20)
    assert found.failures == []
    assert {answer.json()["version"] for _, answer in found.answers} == {house.sound}
    assert house.registry.challenger() is None
    said = f"challenger {house.trap} is not used any more, {house.sound} serves"
    assert said in house.service.log.read_text()


def test_a_champion_that_fails_is_rolled_back(house: House) -> None:
    with load(house.service.url, REQUESTS) as found:
        house.wait(lambda: len(found.answers) > 20)
        house.registry.promote(house.trap, "a trap")
        house.wait(lambda: house.last() == ("rollback", "service"))
        before = len(found.answers)
        house.wait(lambda: len(found.answers) > before + 20)
    assert found.failures == []
    assert {answer.json()["version"] for _, answer in found.answers} == {house.sound}
    assert house.registry.champion() == house.sound


def test_a_challenger_without_any_number_is_never_tried(house: House) -> None:
    folder = house.registry.folder / "versions" / "nan"
    shutil.copytree(house.registry.path(house.trap), folder)
    damage.nan(folder)
    damage.vouch(folder)
    failures = house.service.counted("swap_failures")
    challenge = {"version": "nan", "mode": "canary", "share": 1.0, "since": "", "reason": ""}
    pointer = house.registry.folder / "challenger.json"
    with load(house.service.url, REQUESTS) as found:
        # By hand, as the registry would write it: its files are as their hashes say.
        pointer.write_text(json.dumps(challenge))
        house.wait(lambda: house.service.counted("swap_failures") >= failures + 2)
    pointer.unlink()
    assert found.failures == []
    assert {answer.json()["version"] for _, answer in found.answers} == {house.sound}
    assert "20 of 20 golden probabilities of" in house.service.log.read_text()
