"""The comparison: every model on the same data with the same budget, and what it says of claims.

The flow is `cut` (slices of the test window) and `train_all` (each model tuned, then trained with
several seeds) → `weigh` (metrics, intervals, verdicts) → `page` and `text`, which show it.
"""

from fathom.comparison.config import ComparisonConfig, SlicesConfig
from fathom.comparison.evidence import Window, weigh
from fathom.comparison.report import page, text
from fathom.comparison.slices import cut, definitions
from fathom.comparison.trainings import ComparisonError, Splits, Trainings, train_all

__all__ = [
    "ComparisonConfig",
    "ComparisonError",
    "SlicesConfig",
    "Splits",
    "Trainings",
    "Window",
    "cut",
    "definitions",
    "page",
    "text",
    "train_all",
    "weigh",
]
