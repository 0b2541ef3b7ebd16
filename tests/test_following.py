"""The service follows the champion, and no request sees two versions."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from starlette.testclient import TestClient

from canary import NAMES, bait
from damage import corrupt, nan, other_weights, truncate, vouch
from fathom.metrics import metrics
from fathom.ranker import MANIFEST, TOLERANCE, ArtifactError
from fathom.ranking import RehearsalError
from fathom.registry import Registry, RegistryError
from fathom.service import Serving, app
from fathom.serving import ServingConfig
from small_ranker import Artifact, register


@dataclass(frozen=True)
class House:
    """A registry of two versions, of which a service serves the first."""

    client: TestClient
    registry: Registry
    one: Artifact
    other: Artifact

    @property
    def serves(self) -> str:
        return str(self.client.get("/model").json()["version"])

    def wait(self, done: Callable[[], bool], seconds: float = 20) -> None:
        until = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < until, f"{self.serves} serves"
            time.sleep(0.02)


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Artifact]:
    folder = tmp_path_factory.mktemp("artifacts")
    one, other = register(folder / "one"), register(folder / "other", "deep")
    assert one.version != other.version
    return one, other


@pytest.fixture
def house(
    artifacts: tuple[Artifact, Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[House]:
    one, other = artifacts
    registry = Registry(tmp_path / "registry")
    for artifact in artifacts:
        shutil.copytree(artifact.folder, registry.folder / "versions" / artifact.version)
    registry.promote(one.version, "the first")
    config = ServingConfig(registry=str(registry.folder), follow_seconds=0.05, queue_seconds=5)
    serving = Serving(one.folder, None, config)
    monkeypatch.setattr(app.state, "serving", serving, raising=False)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield House(client, registry, one, other)
    serving.close()


def test_a_new_champion_serves_and_a_roll_back_too(house: House) -> None:
    assert house.serves == house.one.version
    house.registry.promote(house.other.version, "better")
    house.wait(lambda: house.serves == house.other.version)
    answer = house.client.post("/predict", json={"rows": house.other.rows}).json()
    np.testing.assert_allclose(answer["probabilities"], house.other.probabilities, atol=TOLERANCE)
    house.registry.rollback("worse")
    house.wait(lambda: house.serves == house.one.version)


def test_while_champions_change_each_answer_is_wholly_of_one(house: House) -> None:
    expected = {a.version: a.probabilities for a in (house.one, house.other)}
    seen: list[str] = []
    faults: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            response = house.client.post("/predict", json={"rows": house.one.rows})
            answer = response.json()
            if response.status_code != 200:
                faults.append(response.text)
                return
            seen.append(answer["version"])
            difference = np.subtract(answer["probabilities"], expected[answer["version"]])
            if np.abs(difference).max() > TOLERANCE:
                faults.append(f"{answer['version']}: {difference}")

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(2):
        house.registry.promote(house.other.version, "to and fro")
        house.wait(lambda: house.serves == house.other.version)
        house.registry.rollback("to and fro")
        house.wait(lambda: house.serves == house.one.version)
    stop.set()
    for thread in threads:
        thread.join()
    assert not faults
    assert set(seen) == set(expected)


def damaged(house: House, change: Callable[[Path], None], manifest: bool = False) -> Path:
    """The other version, changed where it lies; with ``manifest``, as if it had been made so."""
    folder = house.registry.folder / "versions" / house.other.version
    change(folder)
    if manifest:
        vouch(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "manifest", "reason"),
    [
        (corrupt, False, "weights.safetensors does not have the SHA-256 of the manifest"),
        (truncate, False, "weights.safetensors does not have the SHA-256 of the manifest"),
        (truncate, True, "cannot serve"),
        (lambda folder: (folder / "vocabularies.json").unlink(), False, "is missing"),
        (nan, True, "golden probabilities of"),
        (other_weights, True, "golden probabilities of"),
    ],
    ids=["corrupt", "truncated", "truncated, hash right", "a file less", "NaN", "other weights"],
)
def test_what_cannot_serve_is_refused_and_the_old_one_goes_on(
    house: House,
    change: Callable[[Path], None],
    manifest: bool,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    house.registry.promote(house.other.version, "a trap")
    house.wait(lambda: house.serves == house.other.version)
    house.registry.rollback("to begin with the other")
    house.wait(lambda: house.serves == house.one.version)
    damaged(house, change, manifest)
    before = metrics().swap_failures._value.get()
    with caplog.at_level(logging.ERROR, "bentoml.fathom"):
        _point(house)
        house.wait(lambda: metrics().swap_failures._value.get() >= before + 2)
    assert house.serves == house.one.version
    answer = house.client.post("/predict", json={"rows": house.one.rows})
    assert answer.status_code == 200
    said = [record for record in caplog.records if house.other.version in record.getMessage()]
    assert len(said) == 1, "each reason is logged once"
    assert reason in said[0].getMessage()
    assert f"{house.one.version} goes on" in said[0].getMessage()


def _point(house: House) -> None:
    """What `Registry.promote` would refuse: the pointer is moved by hand."""
    pointer = house.registry.folder / "champion.json"
    pointer.write_text(json.dumps({"champions": [house.one.version, house.other.version]}))


def test_a_pickle_in_a_registry_is_never_read(house: House, tmp_path: Path) -> None:
    """Beside a version's files it is ignored, in place of one refused, hashes or not."""
    canary = tmp_path / "canary"
    payload, serving = bait(canary), app.state.serving
    folder = house.registry.path(house.other.version)
    for name in NAMES:
        (folder / name).write_bytes(payload)
    serving.succeed(folder)
    assert house.serves == house.other.version
    serving.succeed(house.registry.path(house.one.version))

    files_read = set(json.loads((folder / MANIFEST).read_text())["files"]) - {"reference.parquet"}
    assert "golden.json" in files_read
    for name in sorted(files_read):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(payload)
        vouch(folder)
        with pytest.raises((SafetensorError, UnicodeDecodeError)):  # of the format's reader
            serving.succeed(folder)
        (folder / name).write_bytes(whole)
    for place in (folder / MANIFEST, house.registry.folder / "champion.json"):
        place.write_bytes(payload)
    with pytest.raises(ArtifactError, match=r"manifest\.json cannot be read"):
        serving.succeed(folder)
    with pytest.raises(RegistryError, match=r"champion\.json cannot be read"):
        house.registry.champion()
    assert house.serves == house.one.version
    assert not canary.exists()


def test_a_pointer_that_cannot_be_read_changes_nothing(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "bentoml.fathom"):
        (house.registry.folder / "champion.json").write_text("{")
        house.wait(lambda: "cannot be read" in caplog.text)
    assert house.serves == house.one.version


def test_rehearsing_needs_the_recorded_probabilities(house: House) -> None:
    folder = damaged(house, other_weights, manifest=True)
    with pytest.raises(
        RehearsalError, match=r"20 of 20 golden probabilities of .* differ by more than 1e-06"
    ):
        app.state.serving.succeed(folder)
    assert house.serves == house.one.version
