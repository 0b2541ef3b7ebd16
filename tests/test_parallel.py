"""Two processes that train together end where one ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fathom import checkpoint
from fathom.batch import Batch, Ragged
from fathom.parallel import Group

ROOT = Path(__file__).parents[1]


def examples(rows: int, seed: int) -> Batch:
    """Few ids, so that both halves of a batch look up the same rows; some have no bag."""
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, 12, (rows, 2)).astype(np.int32)
    chance = 1 / (1 + np.exp(-np.sin(ids[:, 0]) - np.cos(ids[:, 1])))
    return Batch(
        numeric=draw.normal(size=(rows, 2)).astype(np.float32),
        deep_ids=ids,
        deep_bags=(Ragged.of([[int(i) % 5] * (int(i) % 3) for i in ids[:, 0]], np.int32),),
        wide_ids=ids + np.array([0, 12], np.int32),
        wide_bags=(),
        label=(draw.random(rows) < chance).astype(np.float32),
    )


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("input")
    examples(515, 0).save(folder / "train")  # the last batch has 3 examples, an odd number
    examples(200, 1).save(folder / "validation")
    layout = {
        "numeric": 2,
        "tables": {"a": [12, 4], "b": [12, 8], "bag": [5, 4]},
        "fields": ["a", "b"],
        "bags": ["bag"],
        "wide_slots": [12, 12],
        "wide_bags": 0,
    }
    training = {
        "hidden": [16, 8],
        "wide_l1": 0.1,
        "clip_norm": 0.05,
        "epochs": 2,
        "patience": 2,
        "batch_size": 64,
        "device": "cpu",
        "threads": 1,
    }
    described = {"task": "binary", "layout": layout, "training": training}
    (folder / "job.json").write_text(json.dumps(described))
    return folder


def run(job: Path, checkpoints: Path, processes: int) -> str:
    """Train by the command that the README shows; returns what was said."""
    by = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *(by if processes > 1 else []), "-m", "fathom.training", job, checkpoints],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def arrays(checkpoints: Path) -> dict[str, np.ndarray]:
    path = checkpoint.latest(checkpoints)
    return {file.stem: np.load(file) for file in path.glob("*.npy") if file.stem != "random"}


@pytest.mark.slow
@pytest.mark.e2e
def test_two_processes_train_what_one_trains(job: Path, tmp_path: Path):
    """Weights and optimizer states agree to 1e-4: only the order of float32 sums differs."""
    run(job, tmp_path / "one", 1)
    said = run(job, tmp_path / "two", 2)
    one, two = arrays(tmp_path / "one"), arrays(tmp_path / "two")
    assert set(one) == set(two)
    for name, value in one.items():
        if name != "total":  # each process has its own share
            np.testing.assert_allclose(two[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    histories = [
        checkpoint.state_of(checkpoint.latest(tmp_path / name))["history"]
        for name in ("one", "two")
    ]
    for alone, together in zip(*histories, strict=True):
        assert together["train_loss"] == pytest.approx(alone["train_loss"], abs=1e-6)
        assert together["validation_loss"] == pytest.approx(alone["validation_loss"], abs=1e-6)
    assert said.count("best epoch") == 1, "one of them speaks for both"

    # What two have finished, one goes on from: there is nothing left to do.
    assert "going on from" in run(job, tmp_path / "two", 1)


def test_one_process_alone_exchanges_nothing():
    group = Group.join(torch.device("cpu"))
    assert (group.rank, group.world, group.leads) == (0, 1, True)
    tensor = torch.tensor([1.0, 2.0])
    group.sum_([tensor])
    assert tensor.tolist() == [1.0, 2.0]
    rows, values = torch.tensor([3]), torch.ones(1, 2)
    assert group.gather(rows, values) == (rows, values)
    group.wait()
    group.leave()
