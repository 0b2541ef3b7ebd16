"""`python -m fathom.training`, held up a little at each step and at each file of a checkpoint.

So a kill falls within a step as within a checkpoint, between any two of its files. Run by a fork
server that has imported torch already, since what is tested is not the import.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from fathom import training
from fathom.step import Optimizers

_STEP_SECONDS, _FILE_SECONDS = 0.003, 0.001


def train(job: Path, checkpoints: Path, said: Path) -> None:
    """Train in this process, with standard error going to a file."""
    step, save = Optimizers.step, np.save

    def slow_step(self: Optimizers, *given: Any) -> None:
        step(self, *given)
        time.sleep(_STEP_SECONDS)

    def slow_save(*given: Any, **more: Any) -> None:
        time.sleep(_FILE_SECONDS)
        save(*given, **more)

    Optimizers.step, np.save = slow_step, slow_save  # type: ignore[method-assign]
    with said.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
        sys.argv = ["fathom.training", str(job), str(checkpoints)]
        training.main()
