"""Rows of the training frame by split."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fathom.config import SplitConfig
from fathom.spec import EVENT_TIMESTAMP

if TYPE_CHECKING:
    from ibis.expr.types import Table
else:
    Table = Any

_BOUNDS = {
    "train": ("train_from", "validation_from"),
    "validation": ("validation_from", "test_from"),
    "test": ("test_from", None),
}


def between(training_frame: Table, split: SplitConfig, name: str) -> Table:
    """The exposures of one split, in the frame's order."""
    start, end = _BOUNDS[name]
    moment = training_frame[EVENT_TIMESTAMP]
    kept = moment >= split.moment(start)
    return training_frame.filter(kept & (moment < split.moment(end)) if end else kept)
