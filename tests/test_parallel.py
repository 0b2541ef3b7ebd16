"""Two processes that train together end where one ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch

import forks
from fathom import checkpoint
from fathom.batch import Batch, Ragged
from fathom.parallel import Group
from ports import free_port

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
        "inactive": [12, 13, 17],  # rows of both processes where they are spread
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


def by_torchrun(job: Path, checkpoints: Path) -> str:
    """Two processes by the command that the README shows; returns what was said."""
    by = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *by, "-m", "fathom.training", job, checkpoints],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


Started = list[tuple[BaseProcess, Path]]


def started(count: int, *command: object) -> Started:
    """As many processes, told what `torchrun` tells them; beside each, where it speaks."""
    port = str(free_port())
    processes = []
    for rank in range(count):
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "TORCHELASTIC_RUN_ID": "x"}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = os.environ | address | {name: str(value) for name, value in told.items()}
        said = Path(tempfile.mkdtemp())
        arguments = [str(word) for word in command]
        given = environment if count > 1 else None
        process = forks.start(*arguments, folder=ROOT, said=said, environment=given)
        processes.append((process, said))
    return processes


def ended(processes: Started) -> str:
    """What they said, all together, once they have ended well."""
    texts = []
    for process, said in processes:
        process.join(300)
        texts.append((said / "err").read_text(encoding="utf-8"))
        shutil.rmtree(said)
    assert {process.exitcode for process, _ in processes} == {0}, "\n".join(texts)[-4000:]
    return "\n".join(texts)


def run(job: Path, checkpoints: Path, processes: int, *options: str) -> str:
    """A training from start to end; returns what was said."""
    return ended(started(processes, "-m", "fathom.training", job, checkpoints, *options))


@pytest.fixture(scope="module")
def alone(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints of one process."""
    checkpoints = tmp_path_factory.mktemp("alone") / "checkpoints"
    run(job, checkpoints, 1)
    return checkpoints


def arrays(checkpoints: Path) -> dict[str, np.ndarray]:
    path = checkpoint.latest(checkpoints)
    return {file.stem: np.load(file) for file in path.glob("*.npy")}


@pytest.mark.slow
@pytest.mark.e2e
def test_two_processes_train_what_one_trains(job: Path, alone: Path, tmp_path: Path):
    """Weights and optimizer states agree to 1e-4: only the order of float32 sums differs."""
    said = by_torchrun(job, tmp_path / "two")
    one, two = arrays(alone), arrays(tmp_path / "two")
    assert set(one) == set(two)
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    histories = [
        checkpoint.state_of(checkpoint.latest(path))["history"]
        for path in (alone, tmp_path / "two")
    ]
    for single, together in zip(*histories, strict=True):
        assert together["train_loss"] == pytest.approx(single["train_loss"], abs=1e-6)
        assert together["validation_loss"] == pytest.approx(single["validation_loss"], abs=1e-6)
    assert said.count("best epoch") == 1, "one of them speaks for both"

    # What two have finished, one goes on from: there is nothing left to do.
    assert "going on from" in run(job, tmp_path / "two", 1)


@pytest.mark.slow
@pytest.mark.e2e
def test_tables_spread_over_two_processes_end_as_whole_ones(job: Path, alone: Path, tmp_path: Path):
    """Each process holds every other row; checkpoints are of whole tables all the same."""
    run(job, tmp_path / "spread", 2, "--shard-tables")
    for folder in (checkpoint.latest, lambda path: next(path.glob("best-*"))):
        whole, spread = (
            {file.stem: np.load(file) for file in folder(path).glob("*.npy")}
            for path in (alone, tmp_path / "spread")
        )
        assert set(whole) == set(spread)
        for name, value in whole.items():
            np.testing.assert_allclose(spread[name], value, rtol=1e-4, atol=1e-5, err_msg=name)
    histories = [
        checkpoint.state_of(checkpoint.latest(path))["history"]
        for path in (alone, tmp_path / "spread")
    ]
    for single, together in zip(*histories, strict=True):
        for figure in ("train_loss", "validation_loss", "wide_zero_share"):
            assert together[figure] == pytest.approx(single[figure], abs=1e-6)
    # One process, whose tables are whole, goes on from them, and so do three, of other parts.
    assert "going on from" in run(job, tmp_path / "spread", 1)
    assert "going on from" in run(job, tmp_path / "spread", 3, "--shard-tables")


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.parametrize("options", [(), ("--shard-tables",)], ids=["whole", "spread"])
def test_killed_within_an_epoch_two_processes_end_as_if_they_were_not(
    job: Path, tmp_path: Path, options: tuple[str, ...]
):
    """Bit for bit, with dropout: what it drops follows from the seed and the place in the run."""
    described = json.loads((job / "job.json").read_text())
    described["training"] |= {
        "batch_size": 8,
        "epochs": 3,
        "patience": 3,
        "dropout": 0.2,
        "checkpoint_seconds": 0.02,
    }
    other = tmp_path / "input"
    other.mkdir()
    for name in ("train", "validation"):
        (other / name).symlink_to(job / name)
    (other / "job.json").write_text(json.dumps(described))

    run(other, tmp_path / "undisturbed", 2, *options)
    processes = started(2, "-m", "fathom.training", other, tmp_path / "killed", *options)
    give_up = time.monotonic() + 120
    while not within_an_epoch(tmp_path / "killed"):
        assert all(process.is_alive() for process, _ in processes), "it ended too early"
        assert time.monotonic() < give_up
        time.sleep(0.001)
    for process, _ in processes:
        process.kill()
    for process, said in processes:
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
        shutil.rmtree(said)
    assert "going on from" in run(other, tmp_path / "killed", 2, *options)

    undisturbed, resumed = (arrays(tmp_path / name) for name in ("undisturbed", "killed"))
    assert set(undisturbed) == set(resumed)
    for name, value in undisturbed.items():
        assert np.array_equal(resumed[name], value), name


#: Each process takes its number as the moments of its half; what they agree on is printed.
AGREE = """
import json, sys
from pathlib import Path
import torch
from fathom.batch import Batch, Layout
from fathom.config import TrainingConfig
from fathom.parallel import Group
from fathom.training import Job, Run

job = json.loads((Path(sys.argv[1]) / "job.json").read_text())
splits = [Batch.load(Path(sys.argv[1]) / name) for name in ("train", "validation")]
config = TrainingConfig(**job["training"])
run = Run(Job(Layout.of(job["layout"]), *splits, config, "binary"), Path(sys.argv[2]))
moments = [b for name, b in run.model.named_buffers() if name.endswith((".mean", ".variance"))]
for moment in moments:
    moment.fill_(1 + 2 * run._group.rank)
run._agree()
Path(sys.argv[2], f"{run._group.rank}.json").write_text(json.dumps([m.tolist() for m in moments]))
Group.leave()
"""


@pytest.mark.slow
@pytest.mark.e2e
def test_moments_that_each_process_keeps_become_those_of_all(job: Path, tmp_path: Path):
    """Else they would score validation differently, and one might stop before the other."""
    described = json.loads((job / "job.json").read_text())
    described["training"] |= {"model": "din", "activation": "dice"}
    described["layout"] |= {"bags": ["a"], "tables": {"a": [12, 4], "b": [12, 8]}}
    owners = ["item", "item", "user", "user", "user"]
    described["layout"] |= {"owners": owners}
    other = tmp_path / "input"
    other.mkdir()
    for name in ("train", "validation"):
        (other / name).symlink_to(job / name)
    (other / "job.json").write_text(json.dumps(described))
    (tmp_path / "agree.py").write_text(AGREE)
    (tmp_path / "out").mkdir()
    ended(started(2, tmp_path / "agree.py", other, tmp_path / "out"))
    for rank in (0, 1):
        moments = json.loads((tmp_path / "out" / f"{rank}.json").read_text())
        assert len(moments) == 6, "of the attention's layer and of two hidden ones"
        assert {value for moment in moments for value in moment} == {2.0}, "the mean of 1 and 3"


def within_an_epoch(checkpoints: Path) -> bool:
    """Whether the newest checkpoint is of a batch that does not end an epoch of 65."""
    path = checkpoint.latest(checkpoints)
    return path is not None and int(path.name.removeprefix("step-")) % 65 != 0


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
