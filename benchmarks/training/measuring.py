"""What all contestants share: the log, the clock, and the one line of JSON that they end with.

Needs numpy and torch alone, for it runs in the environment of each peer.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from criteo_like import auc
from numpy.typing import NDArray
from torch.optim.optimizer import register_optimizer_step_post_hook


@dataclass(frozen=True)
class Task:
    """What a contestant is to do; the same for all but ``precision`` and ``variant``."""

    log: str
    precision: str = "float32"
    variant: str = ""
    threads: int = 1
    batch_size: int = 4096
    embedding: int = 16
    hidden: tuple[int, ...] = (400, 400, 400)
    warm_up: int = 30
    window: int = 20
    seed: int = 0
    data: str = ""
    training: str = ""
    profile: bool = False

    @classmethod
    def given(cls) -> Task:
        """From the command line: one JSON object. Sets the number of threads."""
        settings = json.loads(sys.argv[1])
        task = cls(**settings | {"hidden": tuple(settings.get("hidden", cls.hidden))})
        torch.set_num_threads(task.threads)
        torch.manual_seed(task.seed)
        return task

    def described(self) -> dict[str, Any]:
        """What ``log.json`` says: ``fields``, ``crosses`` (sizes of each), ``numeric``."""
        found: dict[str, Any] = json.loads((Path(self.log) / "log.json").read_text())
        return found

    def split(self, name: str) -> dict[str, NDArray[Any]]:
        """``numeric`` (N, 13), ``ids`` (N, 26), ``crosses`` (N, 2) and ``label`` (N,)."""
        parts = ("numeric", "ids", "crosses", "label")
        return {part: np.load(Path(self.log) / f"{name}.{part}.npy") for part in parts}


class Clock:
    """The moments at which steps end, whoever's loop they are in.

    torch tells of every step of every optimizer; where a trainer has several, those of the first
    that steps are counted.
    """

    def __init__(self) -> None:
        self.ends: list[float] = []
        self._first: int | None = None
        register_optimizer_step_post_hook(self._tick)

    def _tick(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._first = self._first or id(optimizer)
        if id(optimizer) == self._first:
            self.ends.append(time.perf_counter())


def rates(ends: Sequence[float], task: Task) -> list[float]:
    """Examples per second of each window of steps after the warm-up, without the last step.

    The last batch of an epoch may be smaller.
    """
    marks = ends[task.warm_up : -1 : task.window]
    if len(marks) < 2:
        raise SystemExit(
            f"{len(ends)} steps are too few for a window of {task.window} after a "
            f"warm-up of {task.warm_up}"
        )
    size = task.window * task.batch_size
    return [size / (end - start) for start, end in itertools.pairwise(marks)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send what a peer prints to the error stream: the output is one line of JSON."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def say(
    task: Task, clock: Clock, label: NDArray[Any], probability: NDArray[Any], **more: Any
) -> None:
    """Print the result: the rate, the quality on the test rows, and the peak of memory."""
    label = np.asarray(label, np.float64).reshape(-1)
    score = np.asarray(probability, np.float64).reshape(-1)
    bounded = np.clip(score, 1e-7, 1 - 1e-7)
    logloss = -np.mean(label * np.log(bounded) + (1 - label) * np.log1p(-bounded))
    found = rates(clock.ends, task)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "examples_per_second": round(statistics.median(found)),
        "windows": [round(rate) for rate in found],
        "auc": round(auc(label, score), 5),
        "logloss": round(float(logloss), 5),
        "peak_mb": peak >> (20 if sys.platform == "darwin" else 10),
        "torch": torch.__version__,
    }
    print(json.dumps(result | more))
