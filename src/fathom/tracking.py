"""What a training reports while it runs, kept for TensorBoard when that is configured."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict

from fathom.config import TrainingConfig

if TYPE_CHECKING:
    from fathom.training import Report


class TrackingError(RuntimeError):
    """Nothing can be tracked as configured; the message says what to do."""


class TrackingConfig(BaseModel):
    """``params:tracking``.

    Args:
        to: ``nothing``, or ``tensorboard``, which needs the extra ``tracking``.
        folder: where the runs are kept: ``tensorboard --logdir FOLDER`` shows them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    to: Literal["nothing", "tensorboard"] = "nothing"
    folder: str = "tensorboard"


@contextmanager
def reporting(config: TrackingConfig, training: TrainingConfig) -> Iterator[Report | None]:
    """Give what `fathom.training.train` reports to; None if nothing is tracked.

    A run is named by the model and its settings: one that is taken up again goes on in its lines.

    Raises:
        TrackingError: TensorBoard is not installed.
    """
    if config.to == "nothing":
        yield None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise TrackingError(
            f"tracking.to is 'tensorboard', which cannot be imported ({error}); run "
            "pip install -e '.[tracking]', or set it to 'nothing'"
        ) from error
    settings = json.dumps(training.as_dict(), indent=2, sort_keys=True)
    name = f"{training.model}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"
    with SummaryWriter(str(Path(config.folder) / name)) as writer:
        writer.add_text("settings", f"```\n{settings}\n```")

        def report(what: str, value: float, step: int) -> None:
            writer.add_scalar(what, value, step)

        yield report
