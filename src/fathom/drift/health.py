"""Faults of the data: what a retraining would only teach the model.

Drift is a world that has changed; a fault is a feed that broke. They are told apart by their
traces. A feed breaks at once, so a window is compared with the last one that was sound, and it
breaks in ways that worlds seldom do: values go missing; some rows all get one and the same value
while the others stay as they were; all numbers of a column are multiplied by one factor; rows stay
away; the label has one value only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fathom.drift import scores
from fathom.drift.config import MonitoringConfig
from fathom.drift.forms import UNKNOWN

Floats = NDArray[np.float64]
_TENTHS = np.arange(1, 10) / 10
#: Positive numbers needed to tell a factor.
_MIN_NUMBERS = 200
#: Rise of one value's share from which it may be a stuck feed.
_LEAST_RISE = 0.05
#: Part of the overall label rate by which a bin's has to differ to tell its rows from others.
_TELLING = 0.5
#: And within which the rate of rows that were added is that of all.
_ALIKE = 0.25


@dataclass(frozen=True)
class Trace:
    """What of a sound window the next one is compared with.

    Attributes:
        shares: watched column → share of each bin.
        tenths: numeric column → nine deciles of its positive values.
        rows: of the window, before any was sampled, by day.
    """

    shares: dict[str, list[float]]
    tenths: dict[str, list[float]]
    rows_per_day: float | None = None


@dataclass(frozen=True)
class Labels:
    """Label rates of one column's bins, (B,), in the reference and now, NaN where there are none.

    Attributes:
        overall: of the reference.
    """

    before: Floats
    now: Floats
    overall: float

    def like_any(self, place: int, share: float, before: float) -> bool:
        """Whether the rows that were added to a bin are rows of all kinds, not of its own.

        Args:
            share: of all rows that was moved there, which held a share of ``before``.
        """
        own = self.before[place]
        after = before + share * (1 - before)
        if not share or not abs(own - self.overall) > _TELLING * self.overall:
            return False
        added = (after * self.now[place] - (1 - share) * before * own) / share
        return bool(abs(added - self.overall) < _ALIKE * self.overall)


@dataclass(frozen=True)
class Delivery:
    """What validation and the clock say of a window.

    Attributes:
        rows_in, quarantined: raw rows, and those that were refused.
        age_hours: between its newest exposure and now.
    """

    rows_in: int = 0
    quarantined: int = 0
    age_hours: float | None = None


def tenths(numbers: pd.DataFrame) -> dict[str, list[float]]:
    """Deciles of each column's positive values; none where there are too few to tell."""
    found = {}
    for name in numbers:
        values = numbers[name].to_numpy(np.float64)
        values = values[values > 0]
        if len(values) >= _MIN_NUMBERS:
            found[str(name)] = [float(q) for q in np.quantile(values, _TENTHS)]
    return found


@dataclass(frozen=True)
class Compared:
    """A watched column of a window beside what it was. Legend: B bins.

    Attributes:
        was: (B,) shares in the last sound window.
        rows: (B,) now.
        usual_moved, usual_missing: share of rows that change their bin, and rise of the share of
            missing values, that windows without drift reach.
        computed: from logs, so that missing means that nothing happened yet, a value like any.
        keys: the columns that it is summarised by.
        labels: label rates, where labels suffice.
        is_one_value: whether the rows in a bin mostly have one value, as a feed gives it.
    """

    name: str
    bins: Sequence[str]
    was: Floats
    rows: NDArray[np.int64]
    usual_moved: float
    usual_missing: float
    computed: bool
    keys: Sequence[str]
    labels: Labels | None
    is_one_value: Callable[[int], bool]

    @property
    def now(self) -> Floats:
        """(B,) shares now."""
        return np.asarray(self.rows / self.rows.sum(), np.float64)


def faults(
    now: Trace,
    before: Trace,
    columns: Iterable[Compared],
    delivery: Delivery,
    config: MonitoringConfig,
) -> list[str]:
    """All faults of a window, each in words that name the value, the bound and the remedy.

    Args:
        now, before: of the window, and of the last sound one.
    """
    compared = {column.name: column for column in columns if len(column.was) == len(column.rows)}
    found: list[str] = []
    for column in compared.values():
        fault = _missing(column, config)
        if fault is None and not any(_is_new(compared.get(key)) for key in column.keys):
            fault = _stuck(column, config)
        found += [fault] if fault else []
    for name, values in now.tenths.items():
        factor = _factor(before.tenths.get(name), values, config)
        if factor is not None:
            found.append(
                f"{name}: all its numbers are {factor:.3g} times what they were; if its unit "
                "changed, convert it in the source"
            )
    return found + _delivered(now, before, delivery, config)


def _missing(column: Compared, config: MonitoringConfig) -> str | None:
    before, after = column.was[-1], column.now[-1]
    if after == 1 and before < 1:
        return f"{column.name}: all null; mend the source rather than retrain on it"
    usual = column.usual_missing
    if before > config.missing_rise:  # of a column that often is, the mix of rows moves it
        usual = max(usual, column.usual_moved)
    if column.computed or after - before < max(config.missing_rise, usual):
        return None
    return (
        f"{column.name}: {after:.1%} missing, before {before:.1%}; a rise of "
        f"{config.missing_rise:.1%} is a fault of the source; mend it rather than retrain on it"
    )


def _stuck(column: Compared, config: MonitoringConfig) -> str | None:
    """One value for some rows, all other rows as before: a mixture with a point mass.

    Worlds do that, too, when more of what is shown is of one kind. But then those rows are like
    the others of that kind, and in a broken feed they are like any: where the labels are there,
    their rate tells. Where it does not, only a flood is taken for a fault.
    """
    place = int(np.argmax(column.now - column.was))
    before = float(column.was[place])
    rise = float(column.now[place]) - before
    if column.bins[place] == UNKNOWN or rise < _LEAST_RISE:
        return None
    share = rise / (1 - before)
    told = column.labels is not None and column.labels.like_any(place, share, before)
    told = told or _flood(column, place, share, config)
    if not told or not column.is_one_value(place):
        return None
    return (
        f"{column.name}: {share:.1%} of the rows changed to {column.bins[place]} and the others "
        "stayed as they were, as where a feed is stuck; mend the source rather than retrain on it"
    )


def _flood(column: Compared, place: int, share: float, config: MonitoringConfig) -> bool:
    """Whether so many rows have moved to one bin, and nothing else has, that no label is needed."""
    usual = column.usual_moved
    if share < max(config.stuck_share, 2 * usual):
        return False
    others = np.arange(len(column.was)) != place
    left = column.now[others].sum()
    # Fewer rows are left than `usual` is for, so that chance moves a larger share of them.
    return bool(
        left == 0
        or scores.moved(column.was[others], column.rows[others]) <= usual / math.sqrt(left)
    )


def _is_new(key: Compared | None) -> bool:
    """Whether many new keys have come, of which nothing is known: a new store is no stuck feed."""
    if key is None or UNKNOWN not in key.bins:
        return False
    place = list(key.bins).index(UNKNOWN)
    return bool(key.now[place] - key.was[place] >= _LEAST_RISE / 2)


def _factor(
    before: Sequence[float] | None, now: Sequence[float], config: MonitoringConfig
) -> float | None:
    """By which all tenths have grown or shrunk alike; None if they have not, or by less."""
    if before is None:
        return None
    ratios = np.log(np.array(now)) - np.log(np.array(before))
    middle = float(np.median(ratios))
    if abs(middle) < math.log(config.unit_factor):
        return None
    return math.exp(middle) if np.abs(ratios - middle).max() <= 0.15 * abs(middle) else None


def _delivered(
    now: Trace, before: Trace, delivery: Delivery, config: MonitoringConfig
) -> list[str]:
    found = []
    if before.rows_per_day and now.rows_per_day is not None:
        share = now.rows_per_day / before.rows_per_day
        if share < config.min_volume:
            found.append(
                f"rows: {now.rows_per_day:,.0f} a day, {share:.0%} of the "
                f"{before.rows_per_day:,.0f} before; below {config.min_volume:.0%} a part of the "
                "feed is missing"
            )
    if delivery.rows_in:
        share = delivery.quarantined / delivery.rows_in
        if share > config.max_quarantined_share:
            found.append(
                f"validation: {share:.2%} of {delivery.rows_in:,} rows are in quarantine, more "
                f"than max_quarantined_share {config.max_quarantined_share:.2%}; its report says "
                "why"
            )
    bound = config.max_age_hours
    if bound is not None and delivery.age_hours is not None and delivery.age_hours > bound:
        found.append(
            f"freshness: the newest exposure is {delivery.age_hours:.1f} hours old, more than "
            f"max_age_hours {bound:g}; look whether deliveries arrive"
        )
    return found
