"""A pickle that shows that it was read: reading it makes a file."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

#: Names under which loaders of other formats, BentoML's among them, look for pickles.
NAMES = (
    *("model.pkl", "saved_model.pkl", "custom_objects.pkl", "encoder.pickle", "ranker.joblib"),
    *("model.pt", "weights.pt", "saved_model.pt", "pytorch_model.bin", "weights.npy"),
)


class _Malicious:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return Path.touch, (self.canary,)


def bait(canary: Path) -> bytes:
    """A pickle that makes a file when it is read, tried once."""
    payload = pickle.dumps(_Malicious(canary))
    pickle.loads(payload)
    canary.unlink()
    return payload
