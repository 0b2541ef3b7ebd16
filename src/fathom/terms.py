"""The terms of a wide part: which values of a row have which weight in its logit.

The wide part is linear (Cheng et al. 2016, section 3.1), so nothing here is approximate: a row's
terms, its deep logit and its bias sum to its logit. A column has a term for each of its values, a
cross one for each combination of values, of lists too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fathom.batch import Ragged
from fathom.encoding import MISSING, UNKNOWN, Encoder, Frame, Values, bucket, value_places
from fathom.models import Model
from fathom.spec import Column

#: Whose weight a term has: its values' own; the one that is shared by all values that training saw
#: too rarely; that of a missing value; or that of a bucket of a hashed cross, in which other
#: combinations may be, too.
Sharing = Literal["values", "unknown", "missing", "bucket"]
_Texts = tuple[str | None, ...]


@dataclass(frozen=True)
class Term:
    """One addend of a logit.

    Args:
        feature: a column, or a cross by its name.
        values: the row's value of each column: of a number the range that it is in, None if it is
            missing.
        weight_of: see `Sharing`.
        logit: what it adds; of a combination that a row's lists make twice, twice its weight.
    """

    feature: str
    values: dict[str, str | None]
    weight_of: Sharing
    logit: float


def terms(model: Model, encoder: Encoder, frame: Frame) -> list[list[Term]]:
    """Each row's terms other than 0, the largest first.

    Args:
        model: in evaluation mode.
        frame: N rows.

    Returns:
        N lists, empty for a model without a wide part.

    Raises:
        FrameError: the frame does not fit the spec.
    """
    batch = encoder.encode(frame)
    # By row: the terms' features and values, whose weights they have, and their sums.
    found: list[dict[tuple[str, _Texts], tuple[Sharing, float]]] = [{} for _ in range(len(batch))]
    single, start = batch.wide_ids.shape[1], 0
    for place, (name, size) in enumerate(
        zip(encoder.wide_slots, encoder.layout.wide_slots, strict=True)
    ):
        ids = batch.wide_ids[:, place] if place < single else batch.wide_bags[place - single].values
        if model.wide is not None:
            for row, values, weight_of, weight in _of_slot(name, ids, start, model, encoder, frame):
                before = found[row].get((name, values), (weight_of, 0.0))[1]
                found[row][name, values] = weight_of, before + weight
        start += size
    columns = {name: _columns(name, encoder) for name in encoder.wide_slots}
    return [
        [
            Term(name, dict(zip(columns[name], values, strict=True)), weight_of, logit)
            for (name, values), (weight_of, logit) in sorted(row.items(), key=_size)
        ]
        for row in found
    ]


def _size(item: tuple[Any, tuple[Sharing, float]]) -> float:
    return -abs(item[1][1])


def most_terms(encoder: Encoder, frame: Frame) -> int:
    """How many terms a frame has if none of them is 0: cheap to know beforehand."""
    total = 0
    for name in encoder.wide_slots:
        columns = [frame[column] for column in _columns(name, encoder)]
        lengths = [values.lengths for values in columns if isinstance(values, Ragged)]
        total += int(np.prod([np.ones(len(columns[0]), np.int64), *lengths], axis=0).sum())
    return total


@torch.no_grad()
def _of_slot(
    name: str, ids: NDArray[np.int32], start: int, model: Model, encoder: Encoder, frame: Frame
) -> Iterator[tuple[int, _Texts, Sharing, float]]:
    """Row, values and weight of whatever in a slot has a weight other than 0."""
    columns = _columns(name, encoder)
    texts = [_texts(encoder.spec.by_name[column], frame[column]) for column in columns]
    rows, places = _combinations([frame[column] for column in columns], texts)
    weights = model.weights_of(torch.as_tensor(ids)).numpy()
    kept = weights.nonzero()[0]
    chosen = [text[at[kept]].tolist() for text, at in zip(texts, places, strict=True)]
    hashed = name in encoder.crosses and encoder.crosses[name].buckets is not None
    shared: dict[int, Sharing] = {MISSING: "missing", UNKNOWN: "unknown"}
    yield from zip(
        rows[kept].tolist(),
        zip(*chosen, strict=True),
        [shared.get(id_, "bucket" if hashed else "values") for id_ in (ids[kept] - start).tolist()],
        weights[kept].tolist(),
        strict=True,
    )


def _columns(name: str, encoder: Encoder) -> tuple[str, ...]:
    """The columns of a slot: a cross's, or the one that it is of."""
    crosses = {cross.name: cross.columns for cross in encoder.spec.crosses}
    return tuple(crosses.get(name, (name,)))


def _combinations(
    columns: Sequence[Values], texts: Sequence[NDArray[Any]]
) -> tuple[NDArray[np.int64], list[NDArray[np.int64]]]:
    """The K values, or combinations of them, in the order of `fathom.encoding.cross_keys`.

    Returns:
        The row of each, (K,), and where each column's value is among ``texts``, (K,).
    """
    rows = np.arange(len(columns[0]))
    places: list[NDArray[np.int64]] = []
    for values in columns:
        lengths, at = np.ones(len(rows), np.int64), rows
        if isinstance(values, Ragged):
            lengths, at = value_places(values, rows)
        rows = np.repeat(rows, lengths)
        places = [*(np.repeat(earlier, lengths) for earlier in places), at]
    if len(columns) > 1 and any(isinstance(values, Ragged) for values in columns):
        # In a cross of lists, what lacks a value is no combination.
        known = [np.array([text is not None for text in column.tolist()], bool) for column in texts]
        whole = np.all([k[at] for k, at in zip(known, places, strict=True)], axis=0)
        rows, places = rows[whole], [at[whole] for at in places]
    return rows, places


def _texts(column: Column, values: Values) -> NDArray[Any]:
    """Each value as text, as it is encoded: numbers by the range that they are in."""
    if isinstance(values, Ragged):
        return values.values
    if not column.is_numeric:
        return values
    numbers = bucket(values, column.buckets)
    ranges = {n: _range(int(n), column.buckets) for n in set(numbers.tolist()) - {None}}
    return np.array([ranges.get(number) for number in numbers.tolist()], object)


def _range(number: int, boundaries: Sequence[float] | None) -> str:
    """The numbers in a bucket of `fathom.encoding.bucket`.

    >>> [_range(n, [1.0, 2.5]) for n in range(3)]
    ['below 1', '1 to below 2.5', '2.5 or more']
    >>> [_range(n, None) for n in (0, 1, 3, -3)]
    ['above -1 to below 1', '1 to below 2', '4 to below 8', 'above -8 to -4']
    """
    if boundaries is None:
        if number == 0:
            return "above -1 to below 1"
        low, high = 2.0 ** (abs(number) - 1), 2.0 ** abs(number)
        return f"{low:g} to below {high:g}" if number > 0 else f"above {-high:g} to {-low:g}"
    if number == 0:
        return f"below {boundaries[0]:.9g}"
    if number == len(boundaries):
        return f"{boundaries[-1]:.9g} or more"
    return f"{boundaries[number - 1]:.9g} to below {boundaries[number]:.9g}"
