"""Wide & Deep, and each of its parts alone (Cheng et al. 2016, figure 1)."""

from __future__ import annotations

from fathom.batch import Layout
from fathom.config import TrainingConfig
from fathom.models import Model
from fathom.models.deep import Deep
from fathom.models.wide import Wide


def _deep(layout: Layout, config: TrainingConfig) -> Deep:
    return Deep(layout, config.hidden, config.dropout, config.precision == "bfloat16")


def wide(layout: Layout, config: TrainingConfig) -> Model:
    """The wide part alone: memorises, and gives unseen combinations nothing."""
    return Model(Wide(layout), None)


def deep(layout: Layout, config: TrainingConfig) -> Model:
    """The deep part alone: generalises, and blurs exceptions."""
    return Model(None, _deep(layout, config))


def wide_deep(layout: Layout, config: TrainingConfig) -> Model:
    """Both parts, summed before the loss and trained together."""
    return Model(Wide(layout), _deep(layout, config))
