"""Checkpoints: all that a training needs to go on as if it had never stopped.

A folder for each, ``step-000000001200``: a flat ``.npy`` file for each tensor and ``state.json``.
It is written beside, flushed, and gets its name last; then the one before is removed. Nothing in it
is code, and nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fathom import files
from fathom.parallel import Shard

STATE = "state.json"
_NAME = re.compile(r"step-(\d{12})")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or read; the message says what is left and what to do."""


def write(
    folder: Path, step: int, tensors: Mapping[str, Tensor | Shard], state: Mapping[str, Any]
) -> Path:
    """Write a checkpoint, then remove those before it.

    Args:
        tensors: by name; names may hold dots, not slashes.
        state: JSON values.

    Raises:
        CheckpointError: it cannot be written; the one before is intact.
    """
    path = folder / f"step-{step:012d}"
    try:
        with files.replacing(path) as temporary:
            save(temporary, tensors, state)
        for older in _all(folder):
            if older != path:
                files.remove(older)
    except OSError as error:
        left = latest(folder)
        kept = f"{left.name} before it is intact" if left else "there is none before it"
        raise CheckpointError(
            f"the checkpoint {path} cannot be written ({error.strerror or error}); {kept}. Make "
            "room and run the same command again, or set training.checkpoint_seconds to 0"
        ) from error
    return path


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a folder."""
    found = _all(folder)
    return found[-1] if found else None


def save(folder: Path, tensors: Mapping[str, Tensor | Shard], state: Mapping[str, Any]) -> None:
    """Write tensors and a state into a folder, which must not be read before this returns."""
    folder.mkdir(parents=True)
    for name, tensor in tensors.items():
        path = folder / f"{name}.npy"
        if isinstance(tensor, Shard):
            _gather(path, tensor)
        else:
            np.save(path, tensor.detach().cpu().numpy(), allow_pickle=False)
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    files.write_json(folder / STATE, {"tensors": shapes, "state": state})


def contribute(tensors: Mapping[str, Tensor | Shard]) -> None:
    """Give another process, which saves the same tensors now, this one's parts of them."""
    for tensor in tensors.values():
        if isinstance(tensor, Shard):
            for _ in tensor.blocks():
                pass


def _gather(path: Path, shard: Shard) -> None:
    """Write the whole of which a shard is a part; no process has to hold it."""
    dtype = torch.empty(0, dtype=shard.held.dtype).numpy().dtype
    whole = np.lib.format.open_memmap(path, "w+", dtype, tuple(shard.shape))
    for rows, block in shard.blocks():
        whole[rows] = block.numpy()
    whole.flush()


def state_of(folder: Path) -> dict[str, Any]:
    """The state that a checkpoint was written with.

    Raises:
        CheckpointError: it is missing or unreadable.
    """
    return dict(_description(folder)["state"])


def load(folder: Path, tensors: Mapping[str, Tensor | Shard], prefix: str = "") -> None:
    """Copy a checkpoint's tensors into the given ones.

    Args:
        tensors: all that it holds, or all of those whose names start with ``prefix``.

    Raises:
        CheckpointError: tensors are missing, cut short or of another shape; names all of them, and
            copies none.
    """
    held = _description(folder)["tensors"]
    shapes = {name: shape for name, shape in held.items() if name.startswith(prefix)}
    faults = [f"{name} is not in it" for name in tensors if name not in shapes]
    faults += [f"{name} is of no use here" for name in shapes if name not in tensors]
    read: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if name in shapes:
            try:
                read[name] = np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                faults.append(f"{name}.npy cannot be read ({error})")
                continue
            if read[name].shape != tuple(tensor.shape):
                faults.append(f"{name} is {read[name].shape}, not {tuple(tensor.shape)}")
    if faults:
        raise CheckpointError(f"{folder}: {'; '.join(faults)}; remove it to start anew")
    with torch.no_grad():
        for name, tensor in tensors.items():
            whole = torch.from_numpy(read[name])
            if isinstance(tensor, Shard):
                tensor.fill(whole)
            else:
                tensor.copy_(whole)


def digest(folder: Path) -> str:
    """SHA-256 of a folder's tensors and their names, in hexadecimal."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.npy")):
        found.update(f"{path.name} {files.sha256(path)}".encode())
    return found.hexdigest()


def _all(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first; those being written have other names."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def _description(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not {"tensors", "state"} <= set(found):
            raise ValueError("it lacks tensors or state")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{folder / STATE} cannot be read ({error}); remove {folder} to start anew"
        ) from error
    return found
