"""What is computed of an item once, kept for the requests that come.

Legend: N candidates of a request.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathom.encoding import Values

Ints = NDArray[np.int64]
Numbers = NDArray[Any]

#: Of an item's place, roughly.
_PLACE_BYTES = 256


class KeptItems:
    """Numbers of items, under the values of their attributes: an item that changes is another one.

    Args:
        names: the attributes, single-valued columns.
        most_bytes: if all that is kept takes more, it is begun anew.
    """

    def __init__(self, names: Sequence[str], most_bytes: int) -> None:
        self._names, self._most_bytes = names, most_bytes
        self._places: dict[tuple[Any, ...], int] = {}
        self._kept: dict[Hashable, Numbers] = {}

    def find(self, columns: Mapping[str, Values]) -> Ints:
        """(N,) places of candidates, which hold until this is called again."""
        kept = sum(numbers.nbytes for numbers in self._kept.values())
        if kept + len(self._places) * _PLACE_BYTES > self._most_bytes:
            self._places.clear()
            self._kept.clear()
        values = (np.asarray(columns[name]).tolist() for name in self._names)
        items, places = list(zip(*values, strict=True)), self._places
        for item in items:
            if item not in places:
                places[item] = len(places)
        return np.fromiter(map(places.__getitem__, items), np.int64, len(items))

    def numbers(
        self, key: Hashable, like: Numbers, places: Ints, compute: Callable[[Ints], Numbers]
    ) -> Numbers:
        """What is kept of candidates under a key; computed of those that are new to it.

        Args:
            like: (0,) or (0, D), of the type that is kept.
            compute: gets the numbers, 0 to N - 1, of m candidates; gives (m,) or (m, D).

        Returns:
            (N,) or (N, D).
        """
        kept = self._kept.get(key, like)
        if len(kept) < len(self._places):
            unknown = np.full((2 * len(self._places) - len(kept), *like.shape[1:]), np.nan)
            kept = self._kept[key] = np.concatenate([kept, unknown], dtype=like.dtype)
        found: Numbers = kept.take(places, axis=0)
        new = np.flatnonzero(np.isnan(found if found.ndim == 1 else found[:, 0]))
        if len(new):
            found[new] = compute(new)
            kept[places[new]] = found[new]
        return found
