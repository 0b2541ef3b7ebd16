"""Settings of monitoring, and what is wrong with its input."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

Method = Literal["psi", "jensenshannon"]
#: The model's output among the columns of a frame.
PROBABILITY = "probability"


class MonitoringConfig(BaseModel):
    """``params:monitoring``: how drift is measured, and what it has to cost before it counts.

    Args:
        numeric_method, categorical_method: how numeric and all other columns are scored, in the
            bins of `fathom.drift.forms`. The Jensen-Shannon distance (in nats, 0 to 0.83) needs no
            stand-in for a share of zero, which PSI does.
        numeric_threshold, categorical_threshold: scores from which a column has drifted where the
            reference spans fewer than two windows, so that none can be calibrated.
        thresholds: of single watched columns, by name (``price``, ``history.length``).
        max_categories: more distinct values in the reference make a categorical column an id.
        draws: windows without drift, drawn from the reference's days, that thresholds rest on.
        confidence: share of such windows in which no column at all is called drifted, and by
            which the recoverable loss has to stand out.
        min_loss: share of the loss that a retraining has to win back to be worth it.
        critical_loss: share from which it does not wait for a second window, nor for a cool-down.
        unconfirmed_loss: share that drifted features put at stake, by how much the model leans on
            them, from which to retrain though labels do not tell.
        persistence: windows in a row that must ask for it.
        cool_down: windows after a retraining without another.
        missing_rise: rise of a column's share of missing values that is a fault of the data.
        stuck_share: share of rows moved to one value, all others being as before, that is one
            whatever labels say. A smaller share is one if their label rate is that of all rows.
        unit_factor: factor by which all numbers of a column grow or shrink at once that is one.
        min_volume: share of the usual number of rows below which the feed is broken.
        max_quarantined_share: of the window's raw rows, above which the delivery is broken.
        max_age_hours: between the newest exposure and the time of the run; null for no bound.
        sample_rows: about so many rows of a window are scored and compared, in whole requests, so
            that what it costs does not grow with the log. The reference is a sample as well
            (``release.reference_rows``).
        min_rows: with fewer rows on a side there is no verdict.
        min_labels: with fewer labels, or fewer of either value (binary), labels do not tell.
        leaning_rows: rows on which it is measured how much the model leans on each column.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    numeric_method: Method = "psi"
    categorical_method: Method = "jensenshannon"
    numeric_threshold: PositiveFloat = 0.2
    categorical_threshold: PositiveFloat = 0.15
    thresholds: dict[str, PositiveFloat] = {}
    max_categories: int = Field(default=30, ge=2, le=1000)
    draws: int = Field(default=100, ge=20, le=10_000)
    confidence: float = Field(default=0.99, gt=0.5, lt=1)
    min_loss: float = Field(default=0.005, gt=0, le=1)
    critical_loss: float = Field(default=0.02, gt=0, le=1)
    unconfirmed_loss: float = Field(default=0.05, gt=0)
    persistence: int = Field(default=2, ge=1, le=52)
    cool_down: int = Field(default=2, ge=0, le=52)
    missing_rise: float = Field(default=0.01, gt=0, le=1)
    stuck_share: float = Field(default=0.5, gt=0, le=1)
    unit_factor: float = Field(default=2.0, gt=1)
    min_volume: float = Field(default=0.5, ge=0, lt=1)
    max_quarantined_share: float = Field(default=0.005, ge=0, le=1)
    max_age_hours: float | None = Field(default=None, gt=0)
    sample_rows: int = Field(default=20_000, ge=100)
    min_rows: int = Field(default=2_000, ge=10)
    min_labels: int = Field(default=1_000, ge=1)
    leaning_rows: int = Field(default=5_000, ge=100)
    seed: int = Field(default=0, ge=0)


class MonitoringError(ValueError):
    """The frames do not fit the spec; the message lists every fault at once."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        super().__init__(f"monitoring: {count}\n" + "\n".join(f"  - {fault}" for fault in faults))


@dataclass(frozen=True)
class Window:
    """The time that the current rows come from, both ends included; naive times are UTC.

    Raises:
        ValueError: it ends before it starts.
    """

    start: datetime
    end: datetime

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            moment: datetime = getattr(self, name)
            if moment.tzinfo is None:
                object.__setattr__(self, name, moment.replace(tzinfo=UTC))
        if self.end < self.start:
            raise ValueError(f"window: ends at {self.end}, before it starts at {self.start}")
