"""A training that is killed goes on as if it had never stopped, bit for bit."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections.abc import Iterator
from multiprocessing import forkserver, get_context, resource_tracker
from pathlib import Path

import numpy as np
import pytest

import slowed_training
from fathom import checkpoint
from fathom.batch import Batch, Ragged

pytestmark = pytest.mark.e2e
KILLS = 50

SERVER = get_context("forkserver")


def examples(rows: int, seed: int) -> Batch:
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, 40, (rows, 2)).astype(np.int32)
    chance = 1 / (1 + np.exp(-np.sin(ids[:, 0]) - np.cos(ids[:, 1])))
    bag = Ragged.of([[int(i) % 5] * (int(i) % 3) for i in ids[:, 0]], np.int32)
    return Batch(
        numeric=draw.normal(size=(rows, 3)).astype(np.float32),
        deep_ids=ids,
        deep_bags=(bag,),
        wide_ids=ids + np.array([0, 40], np.int32),
        wide_bags=(),
        label=(draw.random(rows) < chance).astype(np.float32),
    )


@pytest.fixture(scope="module", autouse=True)
def _stop_the_server() -> Iterator[None]:
    """These tests have a fork server of their own, and it and what tracks its resources end."""
    forkserver._forkserver._stop()
    SERVER.set_forkserver_preload(["fathom.training", "torch._dynamo"])  # which optimizers import
    yield
    forkserver._forkserver._stop()
    resource_tracker._resource_tracker._stop()


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """Three epochs of 19 steps and a cool-down of 7, with dropout, and a checkpoint as often as
    there can be one."""
    folder = tmp_path / "input"
    examples(1600, 0).save(folder / "train")
    examples(400, 1).save(folder / "validation")
    layout = {
        "numeric": 3,
        "tables": {"a": [40, 4], "b": [40, 8], "bag": [5, 4]},
        "fields": ["a", "b"],
        "bags": ["bag"],
        "wide_slots": [40, 40],
        "wide_bags": 0,
    }
    settings = {
        "hidden": [16, 8],
        "dropout": 0.2,
        "wide_l1": 0.1,
        "epochs": 3,
        "cool_down": 0.25,
        "patience": 3,
        "batch_size": 64,
        "shuffle_rows": 512,
        "checkpoint_seconds": 0.01,
        "device": "cpu",
        "threads": 1,
    }
    described = {"task": "binary", "layout": layout, "training": settings}
    (folder / "job.json").write_text(json.dumps(described))
    return folder


class Training:
    """A training in a process of its own."""

    def __init__(self, job: Path, checkpoints: Path) -> None:
        self._said = checkpoints.parent / f"{checkpoints.name}.said"
        given = (job, checkpoints, self._said)
        self.process = SERVER.Process(target=slowed_training.train, args=given)
        self.process.start()

    def end(self) -> tuple[int, str]:
        """Its exit status and what it said."""
        self.process.join(timeout=120)
        assert self.process.exitcode is not None
        return self.process.exitcode, self._said.read_text() if self._said.exists() else ""


PARTS = ("before-cool-down", "cool-down")


def state(checkpoints: Path) -> dict[str, bytes]:
    """Every byte that the last checkpoints and the best weights hold."""
    found = {}
    for part in PARTS:
        (best,) = (checkpoints / part).glob("best-*")
        for folder in (checkpoint.latest(checkpoints / part), best):
            for path in folder.glob("*.npy"):
                found[f"{part}/{folder.name}/{path.name}"] = path.read_bytes()
    return found


def latest(checkpoints: Path) -> list[Path | None]:
    return [checkpoint.latest(checkpoints / part) for part in PARTS]


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_bit_equal(job: Path, tmp_path: Path):
    undisturbed = tmp_path / "undisturbed"
    assert Training(job, undisturbed).end()[0] == 0

    draw = random.Random(0)
    killed, disturbed = 0, tmp_path / "disturbed 0"
    while killed < KILLS:
        training = Training(job, disturbed)
        began = latest(disturbed)
        while latest(disturbed) == began and training.process.is_alive():
            time.sleep(0.005)  # until it has made some progress
        time.sleep(draw.random() * 0.15)
        training.process.kill()
        code, said = training.end()
        if code == -signal.SIGKILL:
            killed += 1
            continue
        assert code == 0, said
        assert state(disturbed) == state(undisturbed)
        disturbed = tmp_path / f"disturbed {killed}"

    code, said = Training(job, disturbed).end()
    assert code == 0, said
    assert "going on from" in said
    assert state(disturbed) == state(undisturbed)


def test_a_checkpoint_of_other_settings_is_not_gone_on_from(job: Path, tmp_path: Path):
    folder = tmp_path / "checkpoints"
    assert Training(job, folder).end()[0] == 0
    described = json.loads((job / "job.json").read_text())
    described["training"]["seed"] = 1
    (job / "job.json").write_text(json.dumps(described))
    code, said = Training(job, folder).end()
    assert code == 0
    assert "is of another training: starting anew" in said
    code, said = Training(job, folder).end()
    assert code == 0
    assert "going on from" in said  # and there is nothing left to do
    assert "epoch 1/3" not in said
    assert "epoch 4/4" not in said


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("job.json", None, r"job\.json cannot be read .*; run kedro run --pipelines training"),
        ("job.json", "{}", r"it lacks task, layout or training"),
        ("train/label.npy", b"", r"train/label\.npy cannot be read .*; encode the split again"),
        ("train/numeric.npy", None, r"train/numeric\.npy cannot be read .*; encode the split"),
    ],
)
def test_unreadable_input_is_named(job: Path, tmp_path: Path, name, content, message):
    path = job / name
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, said = Training(job, tmp_path / "checkpoints").end()
    assert code == 1
    last = said.strip().splitlines()[-1]
    assert last.startswith("fathom.training: ")
    assert re.search(message, last), last
