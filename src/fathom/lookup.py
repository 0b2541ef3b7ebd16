"""Rows found by their keys: texts become numbers once per request, then numpy does the rest.

A key column's values are numbered (`Codes`). A row with several keys is found by numbering pairs of
numbers (`Index`): nothing is hashed, so two different keys never share a place.

Legend: N rows asked for, R rows held.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fathom.batch import Ragged
from fathom.encoding import Values

Numbers = NDArray[np.int64]


class Codes:
    """Numbers of the values of one key column.

    Known values are 0 … ``size`` − 1, and ``size`` is no value. A request numbers what is new to it
    from ``size`` + 1 on, so that its own parts can be compared with each other.
    """

    def __init__(self, columns: Iterable[pa.ChunkedArray] = ()) -> None:
        chunks = [chunk.cast(pa.string()) for column in columns for chunk in column.chunks]
        values = pc.unique(pa.chunked_array(chunks, pa.string())).drop_null()
        self._values = values
        self._known: dict[Any, int] = dict(zip(values.to_pylist(), range(len(values)), strict=True))
        self.size = len(values)

    def of(self, values: Sequence[Any], new: dict[Any, int]) -> Numbers:
        """Numbers of values, shape (N,); ``size`` for None.

        Args:
            new: the request's own numbers, which grow by what was never seen.
        """
        get = self._known.get
        codes = np.array([get(value, -1) for value in values], np.int64)
        if len(codes) and codes.min() < 0:
            for i in np.flatnonzero(codes < 0).tolist():
                value, code = values[i], self.size
                if value is not None:
                    code = new.setdefault(value, self.size + 1 + len(new))
                codes[i] = code
        return codes

    def of_arrow(self, column: pa.ChunkedArray | pa.Array) -> Numbers:
        """Numbers of a column's values, shape (R,); ``size`` for nulls and what is not known."""
        codes = pc.index_in(column.cast(pa.string()), value_set=self._values)
        numbers: Numbers = pc.fill_null(codes, self.size).to_numpy().astype(np.int64)
        return numbers


@dataclass(frozen=True)
class Index:
    """The place of each combination of codes, 0 … R − 1 in rising order.

    Args:
        sizes: of each key, the first code that no combination has; codes from there on are alike.
        stages: for each key but the first, the rising numbers of (place so far, code).
    """

    sizes: tuple[int, ...]
    stages: tuple[Numbers, ...]

    @classmethod
    def of(cls, codes: Sequence[Numbers], sizes: Sequence[int]) -> tuple[Index, Numbers]:
        """Index combinations, which are different from each other; gives their places too."""
        place, stages = codes[0], []
        for part, size in zip(codes[1:], sizes[1:], strict=True):
            mixed = place * (size + 1) + part
            stages.append(_distinct(mixed))
            place = np.searchsorted(stages[-1], mixed)
        return cls(tuple(sizes), tuple(stages)), place

    @property
    def missing(self) -> int:
        """The place of what is not there: R."""
        return len(self.stages[-1]) if self.stages else self.sizes[0]

    def find(self, codes: Sequence[Numbers]) -> Numbers:
        """Places, shape (N,), of parts of shape (N,) or (1,); `missing` where there is none."""
        place: Numbers = np.minimum(codes[0], self.sizes[0])
        for part, size, stage in zip(codes[1:], self.sizes[1:], self.stages, strict=True):
            mixed = place * (size + 1) + np.minimum(part, size)
            if len(place) == 1:
                # All have the same first part: they lie side by side, where search is faster.
                start, end = np.searchsorted(stage, place[0] * (size + 1) + np.array([0, size]))
                found = _find(stage[start:end], mixed)
                place = np.where(found < 0, len(stage), found + start)
            else:
                found = _find(stage, mixed)
                place = np.where(found < 0, len(stage), found)
        return place


def places_among(held: Sequence[Numbers], wanted: Sequence[Numbers], size: int) -> Numbers:
    """Where each wanted combination stands among the held ones, shape (N,); −1 if it does not.

    Args:
        held: codes of each key, (R,), negative for a combination that nobody wants; all different.
        wanted: likewise, (N,) or (1,).
        size: above all codes.
    """
    if len(held) > 1:
        asked = np.flatnonzero(np.min(held, axis=0) >= 0)
        index, places = Index.of([part[asked] for part in held], [size] * len(held))
        rows = np.full(len(asked) + 1, -1, np.int64)
        rows[places] = asked
        return rows.take(index.find(wanted))
    order = np.argsort(held[0])
    found = _find(held[0].take(order), wanted[0])
    return np.where(found < 0, -1, order.take(found, mode="clip")) if len(order) else found


def _distinct(numbers: Numbers) -> Numbers:
    """The numbers, rising, each once. (`numpy.unique` would stop all other threads meanwhile.)"""
    rising = np.sort(numbers)
    first = np.ones(len(rising), np.bool_)
    np.not_equal(rising[1:], rising[:-1], out=first[1:])
    return rising if first.all() else rising[first]


def _find(rising: Numbers, wanted: Numbers) -> Numbers:
    """Where each number stands among rising ones; −1 if it does not."""
    if len(rising) == 0:
        return np.full(len(wanted), -1, np.int64)
    place = np.searchsorted(rising, wanted)
    return np.where(rising.take(place, mode="clip") == wanted, place, -1)


# -- columns -------------------------------------------------------------------------------------


def ordered(values: Values, places: Numbers, size: int) -> Values:
    """Values put at their places among ``size``, and one missing value behind them."""
    rows = np.full(size + 1, len(values), np.int64)
    rows[places] = np.arange(len(values))
    if isinstance(values, Ragged):
        open_ended = Ragged(values.values, np.append(values.offsets, values.offsets[-1]))
        return open_ended.take(rows)
    missing: Any = None if values.dtype == object else np.nan
    kind = object if values.dtype == object else np.float64
    return np.append(values.astype(kind), np.array([missing], kind)).take(rows)


def spread(values: Values, count: int) -> Values:
    """One value for each of ``count`` rows, from as many or from one for all."""
    if len(values) == count:
        return values
    if isinstance(values, Ragged):
        offsets = np.arange(count + 1, dtype=np.int64) * len(values.values)
        return Ragged(np.tile(values.values, count), offsets)
    return np.repeat(values, count)


def spread_frame(columns: Mapping[str, Values], count: int) -> dict[str, Values]:
    """Columns of ``count`` rows each, from as many or from one for all."""
    return {name: spread(values, count) for name, values in columns.items()}
