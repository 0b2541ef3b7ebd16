"""The champion's reference: what a window is compared with, and how far it may lie from it.

Thresholds are calibrated on windows without drift: days of the reference, drawn as blocks, one for
each weekday in turn, so that the week's rhythm is no drift (a block bootstrap over time, Künsch
1989, "The jackknife and the bootstrap for general stationary observations"). Each drawn window is
compared with the days that were not drawn, as a real one is with days that it does not hold.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import NormalDist
from zlib import crc32

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fathom.config import Task
from fathom.drift import health, scores
from fathom.drift.config import PROBABILITY, MonitoringConfig, MonitoringError
from fathom.drift.forms import Codes, Form, fit_form, values_of, watched_of
from fathom.drift.frames import faults_of
from fathom.drift.health import Trace
from fathom.drift.recoverable import Recoverable, recoverable
from fathom.evaluation import CLIP
from fathom.spec import EVENT_TIMESTAMP, FeatureSpec

Floats = NDArray[np.float64]
#: A bin for all rows, so that a shift of all predictions is a column like any other.
EVERYWHERE = "(all rows)"


@dataclass(frozen=True, eq=False)
class Labelled:
    """The rows of a frame whose labels have arrived. Legend: L of them.

    Attributes:
        rows: (L,) where they are in the frame.
        label, probability: (L,).
        user, request: (L,) codes.
        fold: (L,) which quarter of the users a row belongs to, the same in every frame.
    """

    rows: Codes
    label: Floats
    probability: Floats
    user: Codes
    request: Codes
    fold: Codes
    task: Task

    @classmethod
    def of(cls, frame: pd.DataFrame, spec: FeatureSpec) -> Labelled:
        """The rows that have a label and a prediction."""
        name = spec.label.name
        kept = np.zeros(len(frame), bool)
        if name in frame:
            kept = (frame[name].notna() & frame[PROBABILITY].notna()).to_numpy()
        rows = np.flatnonzero(kept)
        held = frame.iloc[rows]
        label = np.zeros(0)
        if name in frame:
            values = held[name]
            label = (
                values.to_numpy(np.float64)
                if spec.label.values is None
                else (values == spec.label.values[-1]).to_numpy(np.float64)
            )
        user, request = spec.entities.user, spec.entities.request
        return cls(
            rows,
            label,
            held[PROBABILITY].to_numpy(np.float64),
            _codes(held, user),
            _codes(held, request),
            _folds(held, user),
            spec.task,
        )

    @property
    def logit(self) -> Floats:
        """(L,) what corrections are added to; the prediction of a regression."""
        if self.task == "regression":
            return self.probability
        p = np.clip(self.probability, CLIP, 1 - CLIP)
        return np.asarray(np.log(p) - np.log1p(-p), np.float64)

    def rates(self, codes: Codes, bins: Sequence[str]) -> Floats:
        """(B,) the mean label of each bin of a column, whose codes (N,) are given; else NaN."""
        codes = codes[self.rows]
        rows = np.bincount(codes, minlength=len(bins))
        total = np.bincount(codes, self.label, len(bins))
        return np.where(rows > 0, total / np.maximum(rows, 1), np.nan)

    def recoverable(self, codes: Mapping[str, Codes], within: Codes | None = None) -> Recoverable:
        """What could be won back of these rows' loss, or of those at ``within`` (of the L)."""
        chosen = np.arange(len(self.rows)) if within is None else within
        # First, so that of a column that is all alike it takes the credit.
        columns = {EVERYWHERE: np.zeros(len(chosen), np.int64)}
        columns |= {name: column[self.rows[chosen]] for name, column in codes.items()}
        return recoverable(
            columns, self.logit[chosen], self.label[chosen], self.fold[chosen], self.task
        )


@dataclass(frozen=True)
class Usual:
    """What windows without drift show.

    Attributes:
        scores, moved: watched column → the score, and the share of rows in another bin, that only
            ``1 - confidence`` of windows exceed in any column.
        missing: and the rise of the share of missing values.
        won: the recoverable share of the median window.
        most_won: and the share that ``1 - confidence`` of them exceed.
    """

    scores: dict[str, float]
    moved: dict[str, float]
    missing: dict[str, float]
    won: float = 0.0
    most_won: float = 0.0


@dataclass(frozen=True, eq=False)
class Reference:
    """Rows that the champion scored and did not learn from. Legend: N rows.

    Attributes:
        forms: of each watched column, by name.
        codes: (N,) of each.
        day: (N,) of each row.
        leaning: column → share by which the loss grows if the model cannot use it.
    """

    spec: FeatureSpec
    config: MonitoringConfig
    forms: dict[str, Form]
    codes: dict[str, Codes]
    day: Codes
    labelled: Labelled
    trace: Trace
    leaning: Mapping[str, float] = field(default_factory=dict)
    _usual: dict[tuple[int, int, int], Usual] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        frame: pd.DataFrame,
        spec: FeatureSpec,
        config: MonitoringConfig,
        vocabularies: Mapping[str, Collection[str]] | None = None,
        leaning: Mapping[str, float] | None = None,
    ) -> Reference:
        """Fit all bins.

        Args:
            frame: as `fathom.drift.measure` takes it.
            vocabularies: values that the model knows, by column.
            leaning: see `fathom.drift.leaning`.

        Raises:
            MonitoringError: as of `measure`; no rows; thresholds of columns that are not watched.
        """
        faults = faults_of(frame, "reference", spec, None)
        if frame.empty:
            faults.append("reference: has no rows; build it from the champion's evaluation window")
        known = [watched.name for watched in watched_of(spec)]
        for name in sorted(set(config.thresholds) - set(known)):
            faults.append(f"thresholds: '{name}' is not watched; choose from {', '.join(known)}")
        if faults:
            raise MonitoringError(faults)
        frame = frame.reset_index(drop=True)
        words = vocabularies or {}
        forms = {w.name: fit_form(w, frame, spec, config, words) for w in watched_of(spec)}
        moments = pd.to_datetime(frame[EVENT_TIMESTAMP], utc=True)
        days = ((moments - moments.min()) // pd.Timedelta(days=1)).to_numpy(np.int64)
        return cls(
            spec=spec,
            config=config,
            forms=forms,
            codes={name: form.reference for name, form in forms.items()},
            day=days,
            labelled=Labelled.of(frame, spec),
            trace=Trace(
                {
                    name: [
                        float(x)
                        for x in np.bincount(f.reference, minlength=len(f.bins)) / len(frame)
                    ]
                    for name, f in forms.items()
                },
                health.tenths(_numbers(frame, forms, config)),
            ),
            leaning=dict(leaning or {}),
        )

    @cached_property
    def computed(self) -> frozenset[str]:
        """Watched columns that are computed from logs, and so may lack a value by their nature."""
        raw = {c.name for c in self.spec.columns if c.aggregate is None and c.ratio is None}
        return frozenset(n for n, form in self.forms.items() if form.watched.column not in raw)

    @cached_property
    def keys(self) -> dict[str, tuple[str, ...]]:
        """Watched column → the columns that it is summarised by."""
        found = {}
        for name, form in self.forms.items():
            column = self.spec.by_name.get(form.watched.column)
            if column is not None and column.aggregate is not None:
                found[name] = tuple(column.aggregate.by)
            elif column is not None and column.ratio is not None:
                part = self.spec.by_name[column.ratio.of].aggregate
                found[name] = tuple(part.by) if part is not None else ()
        return found

    def numbers_of(self, frame: pd.DataFrame) -> pd.DataFrame:
        """The numeric columns of a frame."""
        return _numbers(frame, self.forms, self.config)

    def coded(self, frame: pd.DataFrame) -> dict[str, Codes]:
        """The bins of another frame's rows."""
        seed = self.config.seed
        return {
            n: form.code(values_of(frame, form.watched, seed)) for n, form in self.forms.items()
        }

    def counts(self, name: str, codes: Codes) -> Codes:
        """Rows in each bin of a column."""
        return np.bincount(codes, minlength=len(self.forms[name].bins))

    def usual(self, days: int, rows: int, labelled: int) -> Usual:
        """What is usual for a window of so many days, rows and labelled rows.

        A reference of fewer than two such windows calibrates nothing; thresholds are then those of
        the settings. Windows of about as many rows share what is calibrated.
        """
        key = days, _step_down(rows), _step_down(labelled)
        if key not in self._usual:
            self._usual[key] = self._calibrated(*key) or self._stated()
        return self._usual[key]

    def _stated(self) -> Usual:
        numeric, other = self.config.numeric_threshold, self.config.categorical_threshold
        kinds = {name: form.kind for name, form in self.forms.items()}
        found = {name: numeric if kind == "numeric" else other for name, kind in kinds.items()}
        return Usual(found, dict.fromkeys(found, 0.1), dict.fromkeys(found, 0.0))

    def _calibrated(self, days: int, rows: int, labelled: int) -> Usual | None:
        there = np.unique(self.day)
        if len(there) < 2 * max(days, 1) or rows == 0:
            return None
        draw = np.random.default_rng([self.config.seed, days, rows])
        names = [name for name, form in self.forms.items() if form.has_data]
        by_day = {name: self._by_day(name) for name in names}
        distances = np.zeros((self.config.draws, len(names)))
        shares = np.zeros((self.config.draws, len(names)))
        missing = np.zeros((self.config.draws, len(names)))
        won = []
        enough = labelled >= self.config.min_labels
        day_of_labelled = self.day[self.labelled.rows]
        for i in range(self.config.draws):
            chosen = _drawn_days(there, days, draw)
            drawn = np.isin(np.arange(there.max() + 1), chosen)
            for j, name in enumerate(names):
                now = by_day[name][drawn].sum(axis=0)
                was = by_day[name][~drawn].sum(axis=0)
                if rows < now.sum():
                    now = draw.multinomial(rows, now / now.sum())
                distances[i, j] = scores.score(self.forms[name].method, was, now)
                shares[i, j] = scores.moved(was, now)
                missing[i, j] = now[-1] / now.sum() - was[-1] / was.sum()
            if enough:
                within = np.flatnonzero(drawn[day_of_labelled])
                if len(within) > labelled:
                    within = np.sort(draw.choice(within, labelled, replace=False))
                won.append(self.labelled.recoverable(self.codes, within).share)
        level = 1 - (1 - self.config.confidence) / max(len(names), 1)
        orders = np.array([2 if self.forms[name].method == "psi" else 1 for name in names])
        usual = Usual(
            dict(zip(names, _highest(distances, level, orders), strict=True)),
            dict(zip(names, _highest(shares, level, 1), strict=True)),
            dict(zip(names, (float(rise) for rise in missing.max(axis=0)), strict=True)),
        )
        if not won:
            return usual
        typical, most = (float(np.quantile(won, at)) for at in (0.5, self.config.confidence))
        return replace(usual, won=typical, most_won=most)

    def _by_day(self, name: str) -> Codes:
        """Rows of each bin on each day, (days, bins)."""
        bins = len(self.forms[name].bins)
        days = int(self.day.max()) + 1
        cells = np.bincount(self.day * bins + self.codes[name], minlength=days * bins)
        return cells.reshape(days, bins)


def _step_down(rows: int) -> int:
    """A number of rows rounded down by less than a tenth; fewer rows make thresholds wider."""
    return int(1.1 ** math.floor(math.log(rows, 1.1))) if rows else 0


def _drawn_days(there: Codes, days: int, draw: np.random.Generator) -> Codes:
    """As many days as a window has, on weekdays as a window's are; each at most once."""
    start = int(draw.integers(7))
    chosen: list[int] = []
    for place in range(days):
        same = [day for day in there if day % 7 == (start + place) % 7 and day not in chosen]
        pool = same or [day for day in there if day not in chosen]
        chosen.append(int(pool[draw.integers(len(pool))]))
    return np.array(chosen, np.int64)


def _highest(draws: Floats, level: float, order: Floats | int) -> list[float]:
    """What a column's draws (R, C) exceed with probability 1 - ``level``.

    Levels for many columns at once lie beyond what hundreds of draws reach. Squares of shares'
    differences are distributed about as χ² is, times a scale, and its cube root nearly as a normal
    variable (Wilson and Hilferty 1931, "The distribution of chi-square").

    Args:
        order: (C,) 2 where a distance grows as those squares do, 1 where it does as their root.
    """
    power = 2 / (3 * np.asarray(order, np.float64))
    roots = draws**power
    highest = roots.mean(axis=0) + NormalDist().inv_cdf(level) * roots.std(axis=0)
    return [float(x) for x in np.maximum(highest, 1e-9) ** (1 / power)]


def _numbers(
    frame: pd.DataFrame, forms: Mapping[str, Form], config: MonitoringConfig
) -> pd.DataFrame:
    """The numeric columns' values, for `fathom.drift.health`."""
    numeric = [
        f for f in forms.values() if f.watched.kind == "numeric" and f.watched.aspect == "value"
    ]
    kept = [f for f in numeric if f.watched.column != PROBABILITY]
    return pd.DataFrame({f.watched.name: values_of(frame, f.watched, config.seed) for f in kept})


def _codes(frame: pd.DataFrame, name: str) -> Codes:
    """Codes of a key; without it each row is its own."""
    if name not in frame:
        return np.arange(len(frame))
    return np.asarray(pd.factorize(frame[name])[0], np.int64)


def _folds(frame: pd.DataFrame, user: str) -> Codes:
    if user not in frame:
        return np.arange(len(frame)) % 4
    return np.array([crc32(str(key).encode()) & 3 for key in frame[user]], np.int64)
