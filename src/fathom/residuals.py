"""Weights of keys, fitted on what a prediction leaves unexplained; `cross_search` stands on them.

A *key* is a value of a column, or the pair of values of a cross. Keys are plain numbers here, so
that none collide, and memory is that of a few numbers for each value of each row.

Legend: N rows, R rows with a key, E keys that rows hold, K keys with a weight, U users.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fathom.batch import Ragged
from fathom.config import Task

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
#: Numbers of a column's values, -1 for none: (N,), or a list per row.
Codes = Ints | Ragged

#: Newton steps of a fit, and how far one moves a logit's weight at most.
_STEPS, _LONGEST = 8, 2.0
_PRECISE = 1e-4
#: Rounds of the estimate of a prior's variance, and of the means by column.
_ROUNDS = 10
#: Rows whose pairs are coded at a time, and cells of a table that codes are looked up in directly.
_BLOCK, _DENSE = 1 << 18, 1 << 23


# -- keys ----------------------------------------------------------------------------------------


def pair_codes(first: Ints, second: Ints, size: int) -> Ints:
    """One number for each pair of numbers, -1 where either is; two pairs never share one.

    Args:
        first, second: (E,) numbers, the second ones below ``size``; both below 2**31.
    """
    return np.where((first < 0) | (second < 0), -1, first * size + second)


@dataclass(frozen=True)
class Design:
    """Which rows hold which keys: the sparse matrix that weights of keys are multiplied by.

    Args:
        rows: (R,) the rows that hold a key at all, rising.
        ids: (E,) the keys that they hold, each 0 to K - 1.
        lengths: (R,) how many keys each holds; None for one each, E = R.
        size: K.
    """

    rows: Ints
    ids: NDArray[np.int32]
    lengths: Ints | None
    size: int

    def by_key(self, values: Floats) -> Floats:
        """(R,) values of rows, summed by key: (K,)."""
        spread = values if self.lengths is None else np.repeat(values, self.lengths)
        summed: Floats = np.bincount(self.ids, spread, minlength=self.size).astype(np.float64)
        return summed

    def by_row(self, weights: Floats) -> Floats:
        """(K,) weights of keys, summed by row: (R,)."""
        taken: Floats = weights[self.ids]
        if self.lengths is None or len(taken) == 0:
            return taken
        starts = np.cumsum(self.lengths) - self.lengths
        return np.add.reduceat(taken, starts)


@dataclass(frozen=True)
class Keys:
    """The keys of a column or a cross that have a weight: those seen often enough in training.

    Args:
        columns: one or two names; a list stands first.
        size: the second column's.
        cells: pairs that there could be.
        known: (K,) their codes, rising.
    """

    columns: tuple[str, ...]
    size: int
    cells: int
    known: Ints

    @classmethod
    def fit(
        cls, columns: tuple[str, ...], rows: Rows, sizes: dict[str, int], min_count: int
    ) -> Keys:
        """Those that training rows hold ``min_count`` times."""
        size = sizes[columns[1]] if len(columns) == 2 else 1
        cells = sizes[columns[0]] * size
        blocks = (codes for _, codes, _ in _blocks(rows, columns, size))
        if cells <= _DENSE:
            counts = np.zeros(cells + 1, np.int64)
            for codes in blocks:
                counts += np.bincount(codes + 1, minlength=cells + 1)
            return cls(columns, size, cells, np.flatnonzero(counts[1:] >= min_count))
        found = [np.unique(codes[codes >= 0], return_counts=True) for codes in blocks]
        known, place = np.unique(np.concatenate([k for k, _ in found]), return_inverse=True)
        total = np.bincount(place, np.concatenate([c for _, c in found]), minlength=len(known))
        return cls(columns, size, cells, known[total >= min_count])

    def centred(self, weights: Floats, mass: Floats) -> Floats:
        """Weights of a cross without what either of its columns says alone.

        Args:
            weights: (K,).
            mass: (K,) how much each key counts in the mean of its columns' values, which becomes 0.
        """
        found = weights.copy()
        sides = np.divmod(self.known, self.size)
        totals = [np.bincount(side, mass) for side in sides]
        for _ in range(_ROUNDS):
            for side, total in zip(sides, totals, strict=True):
                mean = np.bincount(side, mass * found) / np.maximum(total, 1)
                found -= mean[side]
        return found

    def design(self, rows: Rows) -> Design:
        """Which of a split's rows hold which of them."""
        place = self._place()
        held, ids, lengths = [], [], []
        for start, codes, counts in _blocks(rows, self.columns, self.size):
            found = place(codes)
            kept = found >= 0
            ids.append(found[kept])
            if counts is None:
                held.append(start + np.flatnonzero(kept))
                continue
            ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept)])
            each = np.diff(ends[np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])])
            held.append(start + np.flatnonzero(each))
            lengths.append(each[each > 0])
        many = isinstance(rows.codes[self.columns[0]], Ragged)
        return Design(
            np.concatenate(held),
            np.concatenate(ids),
            np.concatenate(lengths) if many else None,
            len(self.known),
        )

    def _place(self) -> Callable[[Ints], NDArray[np.int32]]:
        """Codes → places among the known ones, -1 for none."""
        known = self.known
        if self.cells <= _DENSE:
            table = np.full(self.cells + 1, -1, np.int32)
            table[known] = np.arange(len(known), dtype=np.int32)
            return lambda codes: table[codes]  # the code -1 reads the last cell, which is no key's
        if len(known) == 0:
            return lambda codes: np.full(len(codes), -1, np.int32)

        def places(codes: Ints) -> NDArray[np.int32]:
            near = np.minimum(np.searchsorted(known, codes), len(known) - 1)
            return np.where(known[near] == codes, near, -1).astype(np.int32)

        return places


@dataclass
class Rows:
    """Rows as the search sees them, and what is predicted for them so far.

    Args:
        codes: column → numbers of its values, those of training from 0 on.
        label, weight: (N,).
        user: (N,) from 0 on.
        logit: (N,) the prediction; columns and crosses that are fitted are added to it.
    """

    codes: dict[str, Codes]
    label: Floats
    weight: Floats
    user: Ints
    logit: Floats
    mass: Floats = field(init=False)

    def __post_init__(self) -> None:
        self.mass = np.bincount(self.user, self.weight).astype(np.float64)

    def __len__(self) -> int:
        return len(self.label)

    def add(self, design: Design, weights: Floats) -> None:
        """Predict with more."""
        self.logit[design.rows] += design.by_row(weights)


def _blocks(
    rows: Rows, columns: tuple[str, ...], size: int
) -> Iterator[tuple[int, Ints, Ints | None]]:
    """First row, codes and, of lists, number of codes by row, for some rows at a time."""
    first, *rest = (rows.codes[name] for name in columns)
    for start in range(0, len(rows), _BLOCK):
        stop = min(start + _BLOCK, len(rows))
        counts = None
        if isinstance(first, Ragged):
            counts = np.diff(first.offsets[start : stop + 1])
            codes = first.values[first.offsets[start] : first.offsets[stop]]
        else:
            codes = first[start:stop]
        for second in rest:
            assert not isinstance(second, Ragged)
            single = second[start:stop]
            other = single if counts is None else np.repeat(single, counts)
            codes = pair_codes(codes, other, size)
        yield start, codes, counts


# -- weights -------------------------------------------------------------------------------------


def fit_weights(
    design: Design,
    rows: Rows,
    task: Task,
    l1: float = 0.0,
    l2: float | None = None,
) -> Floats:
    """Weights of keys that lower the loss of rows most, given what is predicted for them: (K,).

    Newton's method by key, on the sum of losses (half the squared error of a regression) plus
    l1 |w| + l2 w² / 2, by soft thresholds. Where rows hold several keys each step is shortened to
    what the curvature along it allows.

    Args:
        l2: None estimates it: weights are normal around 0 with the variance that makes the
            gradients at 0 as large as they are (empirical Bayes, by `prior_variance`). If they are
            no larger than chance makes them, all weights are 0.
    """
    given, label = rows.logit[design.rows], rows.label[design.rows]
    weight = rows.weight[design.rows]
    longest = _LONGEST if task == "binary" else np.inf
    found = np.zeros(design.size)
    if len(design.rows) == 0:
        return found
    for _ in range(_STEPS):
        slope, curve = _slopes(task, given + design.by_row(found), label)
        curve *= weight
        gradient, curvature = design.by_key(weight * slope), design.by_key(curve)
        if l2 is None:
            noise = 1.0 if task == "binary" else float(np.average(slope * slope, weights=weight))
            chance = noise * design.by_key(weight * curve)
            variance = prior_variance(gradient, curvature, chance)
            if variance == 0:
                return found
            l2 = noise / variance
        moved = curvature * found - gradient
        target = np.sign(moved) * np.maximum(np.abs(moved) - l1, 0)
        step = np.clip(target / np.maximum(curvature + l2, 1e-12) - found, -longest, longest)
        ridge = l2 * step @ step
        along = curve @ design.by_row(step) ** 2
        if along > 0:
            step *= min(1.0, float((curvature @ step**2 + ridge) / (along + ridge)))
        found += step
        if np.abs(step).max(initial=0) < _PRECISE:
            break
    return found


def prior_variance(gradient: Floats, curvature: Floats, chance: Floats) -> float:
    """The variance of weights under which gradients have the squares that they have.

    With a weight w a key's gradient at 0 is about -curvature · w, plus noise of the variance
    ``chance``: E[gradient²] = chance + curvature² · variance. Each key counts by how well it is
    known (iterated, as maximum likelihood would). 0 if squares are no larger than by chance.
    """
    known = chance > 0
    square, curvature, chance = gradient[known] ** 2, curvature[known], chance[known]
    variance = 0.0
    for _ in range(_ROUNDS):
        trust = (curvature / (chance + curvature**2 * variance)) ** 2
        total = float(trust @ curvature**2)
        variance = max(float(trust @ (square - chance)) / total, 0.0) if total > 0 else 0.0
    return variance


def _slopes(task: Task, logit: Floats, label: Floats) -> tuple[Floats, Floats]:
    """First and second derivative of each row's loss; half of a squared error."""
    if task == "regression":
        return logit - label, np.ones(len(logit))
    probability = 0.5 + 0.5 * np.tanh(0.5 * logit)  # which cannot overflow
    return probability - label, probability * (1 - probability)


def row_losses(task: Task, logit: Floats, label: Floats) -> Floats:
    """(N,) logloss in nats, or the squared error of a regression."""
    if task == "regression":
        return np.square(logit - label)
    return np.logaddexp(0, logit) - label * logit


def mean_by_user(sums: Floats, mass: Floats) -> tuple[float, float]:
    """A mean over rows from sums by user (U,), and its standard error with users as clusters."""
    mean = sums.sum() / mass.sum()
    spread = sums - mean * mass
    users = len(mass)
    return float(mean), float(np.sqrt(users / (users - 1) * spread @ spread) / mass.sum())
