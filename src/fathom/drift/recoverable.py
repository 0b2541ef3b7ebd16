"""How much of the loss a retraining would win back, as far as labels tell.

A window's loss moves with what was shown and to whom, though the model is as good as ever. What a
retraining can mend is what is *systematic* in its errors: rows alike in some column on which it is
too high or too low. So each column's bins are offered as corrections of the model's own logit, in
a stagewise additive fit (Friedman 2001, "Greedy function approximation", with a penalty towards
no correction): the column that explains most is taken, the logit corrected, and again. Corrections
are learnt on one half of the users and their gain is counted on the other, so that noise gains
nothing: the estimate is what was found *and* held.

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
#: Nats by which a column must explain more than its bins would by chance, to be taken.
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
    codes: Mapping[str, Ints], logit: Floats, label: Floats, half: Ints, task: Task
) -> Recoverable:
    """Estimate it for N labelled rows.

    Args:
        codes: column → (N,) bin of each row, from 0.
        logit: (N,) the model's; its prediction for a regression.
        label: (N,) 0 or 1; any number for a regression.
        half: (N,) 0 or 1: which half of the users a row belongs to.
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
        learn, judge = half == side, half != side
        if not learn.any() or not judge.any():
            continue
        taken = _corrections(table[:, learn], sizes, logit[learn], label[learn], task, scale)
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
    table: Ints, sizes: Ints, logit: Floats, label: Floats, task: Task, scale: float
) -> list[tuple[int, Floats]]:
    """Columns taken, each with a correction for every bin of all columns (0 in others' bins)."""
    bins = int(sizes.sum())
    column_of = np.repeat(np.arange(len(sizes)), sizes)
    taken = []
    for _ in range(_ROUNDS):
        gradient, curvature = _derivatives(logit, label, task, scale)
        g = np.stack([np.bincount(row, gradient, bins) for row in table]).sum(axis=0)
        h = np.stack([np.bincount(row, curvature, bins) for row in table]).sum(axis=0)
        penalty = 1 / _PRIOR**2 / (scale if task == "regression" else 1.0)
        # What a bin explains, less what its freedom would explain by chance (Akaike 1974).
        explained = g**2 / (h + penalty) / 2 - h / (h + penalty)
        gains = np.bincount(column_of, explained, len(sizes))
        best = int(np.argmax(gains))
        if gains[best] < _LEAST_NATS:
            break
        correction = np.zeros(bins)
        for _ in range(_NEWTON_STEPS):
            gradient, curvature = _derivatives(logit + correction[table[best]], label, task, scale)
            g = np.bincount(table[best], gradient, bins) - penalty * correction
            h = np.bincount(table[best], curvature, bins) + penalty
            correction = correction + g / h
        correction[column_of != best] = 0.0
        taken.append((best, correction))
        logit = logit + correction[table[best]]
    return taken


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
