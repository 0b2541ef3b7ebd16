"""How much of the loss a retraining would win back, as far as labels tell.

A window's loss moves with what was shown and to whom, though the model is as good as ever. What a
retraining can mend is what is *systematic* in its errors: rows alike in some column on which it is
too high or too low. So each column's bins are offered as corrections of the model's own logit, in
a stagewise additive fit (Friedman 2001, "Greedy function approximation", with a penalty towards
no correction): the column that explains most is taken, the logit corrected, and again. Corrections
are learnt on one half of the users and their gain is counted on the other, and within a half a
column is chosen by what each quarter's corrections gain on the other quarter. So noise gains
nothing, nor does a user whose many rows are alike: the estimate is what was found *and* held.

It is a lower bound: corrections of one column each know no interactions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fathom.config import Task

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

#: Corrections are expected to be of this size, in log-odds (for a regression, in the errors' own
#: standard deviations): the standard deviation of their prior, which is what ridge's penalty is.
_PRIOR = 0.25
#: Nats that a column must explain beyond chance, and gain on other users, to be taken.
_LEAST_NATS = 3.0
_ROUNDS = 5
_NEWTON_STEPS = 3


@dataclass(frozen=True)
class Recoverable:
    """What corrections win back, as a share of the window's loss, and by which columns.

    Attributes:
        share: of the loss; about 0 or just below for a model that is right everywhere.
        columns: column → its part of the share, in the order in which halves took them.
    """

    share: float
    columns: dict[str, float]


def recoverable(
    codes: Mapping[str, Ints], logit: Floats, label: Floats, fold: Ints, task: Task
) -> Recoverable:
    """Estimate it for N labelled rows.

    Args:
        codes: column → (N,) bin of each row, from 0.
        logit: (N,) the model's; its prediction for a regression.
        label: (N,) 0 or 1; any number for a regression.
        fold: (N,) 0 to 3: which quarter of the users a row belongs to.
    """
    names = list(codes)
    sizes = np.array([int(codes[name].max(initial=0)) + 1 for name in names])
    table = np.stack([codes[name] for name in names]) + np.concatenate(
        ([0], np.cumsum(sizes)[:-1])
    ).reshape(-1, 1)
    scale = 1.0 if task == "binary" else max(float(np.var(label - logit)), 1e-12)
    before = _loss(logit, label, task)
    won: dict[str, float] = {}
    for side in (0, 1):
        learn, judge = fold % 2 == side, fold % 2 != side
        if not learn.any() or not judge.any():
            continue
        taken = _corrections(
            table[:, learn], sizes, logit[learn], label[learn], fold[learn] // 2, task, scale
        )
        current = logit[judge]
        loss = before[judge].sum()
        for place, correction in taken:
            current = current + correction[table[place, judge]]
            after = _loss(current, label[judge], task).sum()
            won[names[place]] = won.get(names[place], 0.0) + float(loss - after)
            loss = after
    total = float(before.sum())
    if total <= 0:
        return Recoverable(0.0, {})
    columns = {name: gain / total for name, gain in won.items()}
    return Recoverable(sum(columns.values()), columns)


def _corrections(
    table: Ints,
    sizes: Ints,
    logit: Floats,
    label: Floats,
    quarter: Ints,
    task: Task,
    scale: float,
) -> list[tuple[int, Floats]]:
    """Columns taken, each with a correction for every bin of all columns (0 in others' bins)."""
    bins = int(sizes.sum())
    column_of = np.repeat(np.arange(len(sizes)), sizes)
    penalty = 1 / _PRIOR**2 / (scale if task == "regression" else 1.0)
    cells = [table[:, quarter == side] for side in (0, 1)]
    taken: list[tuple[int, Floats]] = []
    while len(taken) < _ROUNDS:
        gradient, curvature = _derivatives(logit, label, task, scale)
        (g, h), (g_other, h_other) = (
            (
                _by_bin(cells[side], gradient[quarter == side], bins),
                _by_bin(cells[side], curvature[quarter == side], bins),
            )
            for side in (0, 1)
        )
        # To second order: what a correction learnt on one quarter gains on the other, and what one
        # learnt on both explains, less what its freedom would by chance (Akaike 1974).
        held = np.zeros(bins)
        for (g1, h1), (g2, h2) in (((g, h), (g_other, h_other)), ((g_other, h_other), (g, h))):
            learnt = g1 / (h1 + penalty)
            held += g2 * learnt - h2 * learnt**2 / 2
        both = h + h_other
        explained = (g + g_other) ** 2 / (both + penalty) / 2 - both / (both + penalty)
        gains = np.minimum(
            np.bincount(column_of, held, len(sizes)), np.bincount(column_of, explained, len(sizes))
        )
        best = int(np.argmax(gains))
        if gains[best] < _LEAST_NATS:
            break
        correction = np.zeros(bins)
        for _ in range(_NEWTON_STEPS):
            gradient, curvature = _derivatives(logit + correction[table[best]], label, task, scale)
            slope = np.bincount(table[best], gradient, bins) - penalty * correction
            bend = np.bincount(table[best], curvature, bins) + penalty
            correction = correction + slope / bend
        correction[column_of != best] = 0.0
        taken.append((best, correction))
        logit = logit + correction[table[best]]
    return taken


def _by_bin(table: Ints, values: Floats, bins: int) -> Floats:
    """Sums of values (N,) over each bin of all columns (C, N)."""
    sums = np.zeros(bins)
    for row in table:
        sums += np.bincount(row, values, bins)
    return sums


def _derivatives(logit: Floats, label: Floats, task: Task, scale: float) -> tuple[Floats, Floats]:
    """Of the log-likelihood by the logit: the first, and the second with its sign turned."""
    if task == "regression":
        return (label - logit) / scale, np.full(logit.shape, 1 / scale)
    p = 1 / (1 + np.exp(-np.clip(logit, -40, 40)))
    return label - p, np.maximum(p * (1 - p), 1e-9)


def _loss(logit: Floats, label: Floats, task: Task) -> Floats:
    """(N,) logloss in nats, or the squared error."""
    if task == "regression":
        return np.square(label - logit)
    return np.logaddexp(0.0, logit) - label * logit
