"""Ways in which an artifact's files go bad."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from fathom import files
from fathom.ranker import MANIFEST

WEIGHTS = "weights.safetensors"


def corrupt(folder: Path) -> None:
    """A bit of the weights is another."""
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-3] ^= 0xFF
    (folder / WEIGHTS).write_bytes(data)


def truncate(folder: Path) -> None:
    """Half of the weights are gone."""
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def nan(folder: Path) -> None:
    """No weight is a number."""
    weights = load_file(folder / WEIGHTS)
    weights = {name: np.full_like(weight, np.nan) for name, weight in weights.items()}
    save_file(weights, folder / WEIGHTS)


def other_weights(folder: Path) -> None:
    """They are of another model."""
    weights = load_file(folder / WEIGHTS)
    scaled = {name: np.asarray(weight * 1.5) for name, weight in weights.items()}
    save_file(scaled, folder / WEIGHTS)


def vouch(folder: Path) -> None:
    """The manifest says that the files are as they were made."""
    described = json.loads((folder / MANIFEST).read_text())
    described["files"] = {name: files.sha256(folder / name) for name in described["files"]}
    (folder / MANIFEST).write_text(json.dumps(described))
