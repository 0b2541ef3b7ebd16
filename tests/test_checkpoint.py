"""Checkpoints: whole or not at all, and never another training's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fathom import checkpoint
from fathom.checkpoint import CheckpointError


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "model.bias": torch.tensor(value),
        "table": torch.full((3, 2), value),
        "random": torch.arange(4, dtype=torch.uint8),
    }


def test_what_is_written_is_read_back(tmp_path: Path):
    path = checkpoint.write(tmp_path, 12, tensors(2.5), {"epoch": 3, "loss": 0.1})
    assert path == checkpoint.latest(tmp_path)
    assert checkpoint.state_of(path) == {"epoch": 3, "loss": 0.1}
    found = tensors(0.0)
    checkpoint.load(path, found)
    assert all(torch.equal(found[name], value) for name, value in tensors(2.5).items())


def test_a_new_checkpoint_replaces_the_one_before(tmp_path: Path):
    for step in (5, 40, 200):
        checkpoint.write(tmp_path, step, tensors(step), {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000200"]
    assert checkpoint.latest(tmp_path / "nothing") is None


def test_a_checkpoint_that_is_being_written_is_none_yet(tmp_path: Path):
    checkpoint.write(tmp_path, 5, tensors(), {})
    (tmp_path / ".step-000000000009.tmp").mkdir()
    assert checkpoint.latest(tmp_path).name == "step-000000000005"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint.write(tmp_path, 5, tensors(5), {"step": 5})
    real = np.save

    def save(path, array, **more):  # as on a disk that is full: the kernel refuses the write
        if Path(path).name == "table.npy":
            with open("/dev/full", "wb", buffering=0) as full:
                full.write(array.tobytes())
        real(path, array, **more)

    monkeypatch.setattr(np, "save", save)
    with pytest.raises(
        CheckpointError,
        match=r"step-000000000006 cannot be written \(No space left on device\); "
        r"step-000000000005 before it is intact\. Make room and run the same command again, or "
        r"set training\.checkpoint_seconds to 0",
    ):
        checkpoint.write(tmp_path, 6, tensors(6), {"step": 6})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000000005"]
    assert checkpoint.state_of(checkpoint.latest(tmp_path)) == {"step": 5}


def test_the_first_checkpoint_has_none_before_it(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"cannot be written .*; there is none before it"):
        checkpoint.write(tmp_path / "file", 1, tensors(), {})


def test_every_fault_is_named_and_nothing_is_copied(tmp_path: Path):
    path = checkpoint.write(tmp_path, 1, tensors(9.0), {})
    (path / "random.npy").write_bytes(b"\x93NUMPY")
    wanted = {"table": torch.zeros(2, 2), "random": torch.zeros(4), "new": torch.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(path, wanted)
    message = str(error.value)
    for fault in (
        "new is not in it",
        "model.bias is of no use here",
        "table is (3, 2), not (2, 2)",
        "random.npy cannot be read",
        "remove it to start anew",
    ):
        assert fault in message
    assert wanted["table"].sum() == 0


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"tensors": {}'])
def test_an_unreadable_state_is_named(tmp_path: Path, content: str):
    path = checkpoint.write(tmp_path, 1, tensors(), {})
    (path / checkpoint.STATE).write_text(content)
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read .*; remove .*step-0"):
        checkpoint.state_of(path)


def test_pickled_arrays_are_not_read(tmp_path: Path):
    path = checkpoint.write(tmp_path, 1, {"table": torch.zeros(1)}, {})
    np.save(path / "table.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"table\.npy cannot be read"):
        checkpoint.load(path, {"table": torch.zeros(1)})


def test_a_state_is_json(tmp_path: Path):
    path = checkpoint.write(tmp_path, 3, tensors(), {"history": [1.5]})
    assert json.loads((path / "state.json").read_text())["tensors"]["table"] == [3, 2]
