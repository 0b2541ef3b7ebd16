"""Slices of the test window that test the claims of Wide & Deep, cut by training rows alone.

A pair, an item or a user is *seen* if a training exposure has it. *Exceptions* are rows with a
value of a cross whose rate in training contradicts what the values of its columns, one by one, let
expect. Expected is the rate of a logistic regression on those columns without their conjunction::

    logit e_v = b + sum over columns j of u_(j, v_j)

fitted to all training rows with that cross, with a squared penalty of 1 on each u. With n_v rows of
value v, of which k_v are positive, v is an exception if n_v is large enough and both are beyond
their bounds::

    z = (|k_v - n_v e_v| - 1/2) / sqrt(n_v e_v (1 - e_v))
    odds ratio = (k_v + 1/2) / (n_v - k_v + 1/2) · (1 - e_v) / e_v, or its inverse

z has the usual correction for continuity; the second bound keeps out values that are so common that
any difference is significant.

Legend: N rows, C distinct values of a cross, K columns that it is of.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fathom.batch import Ragged
from fathom.comparison.config import SlicesConfig
from fathom.encoding import Frame, Keys, column_hashes, cross_keys, hash_values
from fathom.evaluation import Floats, Ints, Mask
from fathom.spec import FeatureSpec

_PENALTY = 1.0
_SWEEPS = 100
#: Effects that move by less than this have converged.
_SETTLED = 1e-3
#: The longest step of an effect, in logits: a curve that is nearly flat asks for too much.
_LONGEST = 1.0


def definitions(config: SlicesConfig) -> dict[str, str]:
    """One sentence for each slice, by its name."""
    return {
        "seen pairs": "A training exposure has the same user and item.",
        "unseen pairs": "No training exposure has the same user and item.",
        "head items": (
            f"The item is one of the fewest that make up {config.head_share:.0%} of the training "
            "exposures."
        ),
        "tail items": "Training has seen the item, but it is none of the head.",
        "new items": "No training exposure has the item.",
        "new users": "No training exposure has the user.",
        "exceptions": (
            "A value of one of the spec's crosses, seen in training at least "
            f"{config.exception_min_count} times, has there a label rate that is more than "
            f"{config.exception_z:g} standard errors, and in odds at least a factor of "
            f"{config.exception_odds:g}, from what its columns one by one let expect."
        ),
    }


def needed(spec: FeatureSpec) -> list[str]:
    """The columns that `cut` reads."""
    crossed = [name for cross in spec.crosses for name in cross.columns]
    return list(dict.fromkeys([spec.entities.user, spec.entities.item, spec.label.name, *crossed]))


def cut(
    train: Frame, test: Frame, spec: FeatureSpec, config: SlicesConfig
) -> tuple[dict[str, Mask], dict[str, int]]:
    """Cut the test rows into slices.

    Args:
        train, test: frames with the columns of `needed`.

    Returns:
        Slice → rows of the test (N,), in the order of `definitions`; and for each cross how many
        of its values are exceptions. A regression has none.
    """
    users, items = (
        [hash_values(np.asarray(frame[key])) for frame in (train, test)]
        for key in (spec.entities.user, spec.entities.item)
    )
    pairs = [np.asarray(cross_keys(both)) for both in zip(users, items, strict=True)]
    seen = np.isin(pairs[1], pairs[0])
    known, head = np.isin(items[1], items[0]), np.isin(items[1], _head(items[0], config.head_share))
    exceptions, counts = _exceptions(train, test, spec, config)
    return {
        "seen pairs": seen,
        "unseen pairs": ~seen,
        "head items": head,
        "tail items": known & ~head,
        "new items": ~known,
        "new users": ~np.isin(users[1], users[0]),
        "exceptions": exceptions,
    }, counts


def _head(items: Keys, share: float) -> Keys:
    """The commonest items that together have a share of the rows."""
    values, counts = np.unique(items, return_counts=True)
    order = np.lexsort((values, -counts))
    reached = np.searchsorted(np.cumsum(counts[order]), share * len(items))
    return values[order[: int(reached) + 1]]


def _exceptions(
    train: Frame, test: Frame, spec: FeatureSpec, config: SlicesConfig
) -> tuple[Mask, dict[str, int]]:
    rows = len(test[spec.entities.user])
    mask = np.zeros(rows, np.bool_)
    counts: dict[str, int] = {}
    if spec.label.values is None:
        return mask, counts
    positive = np.asarray(train[spec.label.name]) == spec.label.values[-1]
    for cross in spec.crosses:
        hashes = [
            [column_hashes(spec.by_name[name], frame[name]) for name in cross.columns]
            for frame in (train, test)
        ]
        found = exceptional(hashes[0], positive, config)
        counts[cross.name] = len(found)
        keys = cross_keys(hashes[1])
        if isinstance(keys, Ragged):
            mask[keys.rows[np.isin(keys.values, found)]] = True
        else:
            mask |= np.isin(keys, found)
    return mask, counts


def exceptional(parts: Sequence[Keys | Ragged], positive: Mask, config: SlicesConfig) -> Keys:
    """The values of a cross, by their keys, that are exceptions. See the module's docstring.

    Args:
        parts: hashes of each column in training, (N,) or ragged (`fathom.encoding.cross_keys`).
        positive: (N,) whether a row's label is positive.
    """
    keys = cross_keys(parts)
    flat, rows = _flat(keys), keys.rows if isinstance(keys, Ragged) else np.arange(len(keys))
    there = np.flatnonzero(flat)  # 0 is missing
    cells, first, cell = np.unique(flat[there], return_index=True, return_inverse=True)
    if not len(cells):
        return cells
    seen = np.bincount(cell).astype(np.float64)
    positives = np.bincount(cell, positive[rows[there]]).astype(np.float64)
    columns = []
    for kept in range(len(parts)):
        # The same combinations, told apart by one column alone.
        alone = cross_keys([p if i == kept else _there(p) for i, p in enumerate(parts)])
        columns.append(np.unique(_flat(alone)[there[first]], return_inverse=True)[1])
    expected = additive_rates(columns, seen, positives)
    error = np.abs(positives - seen * expected) - 0.5
    z = error / np.sqrt(seen * expected * (1 - expected))
    odds = (positives + 0.5) / (seen - positives + 0.5)
    apart = np.abs(np.log(odds) - _logit(expected)) >= np.log(config.exception_odds)
    found = cells[(seen >= config.exception_min_count) & (z > config.exception_z) & apart]
    return np.asarray(found)


def additive_rates(columns: Sequence[Ints], seen: Floats, positives: Floats) -> Floats:
    """Rates (C,) that the columns let expect one by one, by the module's logistic regression.

    Newton steps on all values of one column at a time, until none moves.

    Args:
        columns: K of (C,) codes from 0, each value's column values.
        seen, positives: (C,) how many rows have a value, and how many of them are positive.
    """
    rate = (positives.sum() + 0.5) / (seen.sum() + 1)
    logit = np.full(len(seen), _logit(rate))
    effects = [np.zeros(int(codes.max()) + 1) for codes in columns]
    for _ in range(_SWEEPS):
        moved = 0.0
        for codes, effect in zip(columns, effects, strict=True):
            expected = _rate(logit)
            gradient = np.bincount(codes, positives - seen * expected) - _PENALTY * effect
            curvature = np.bincount(codes, seen * expected * (1 - expected)) + _PENALTY
            step = np.clip(gradient / curvature, -_LONGEST, _LONGEST)
            effect += step
            logit += step[codes]
            moved = max(moved, float(np.abs(step).max()))
        if moved < _SETTLED:
            break
    return _rate(logit)


def _flat(keys: Keys | Ragged) -> Keys:
    return keys.values if isinstance(keys, Ragged) else keys


def _there(part: Keys | Ragged) -> Keys | Ragged:
    """1 for every value, 0 where it is missing."""
    one = np.uint64(1)
    if isinstance(part, Ragged):
        return Ragged(np.minimum(part.values, one), part.offsets)
    return np.minimum(part, one)


def _rate(logit: Floats) -> Floats:
    rate: npt.NDArray[np.float64] = 1 / (1 + np.exp(-np.clip(logit, -30, 30)))
    return rate


def _logit(rate: Floats) -> Floats:
    return np.asarray(np.log(rate) - np.log1p(-rate))
