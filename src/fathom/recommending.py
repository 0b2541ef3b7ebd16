"""Recommendation: what may be shown, what of it is retrieved, and what of that fills the slots.

Between retrieval and the slots stands the ranker, which scores what was retrieved as ``/rank``
does; `fathom.ranking` puts the three together.

Legend: I items of the tower, P items of a pool (retrieved, then ranked), K slots.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fathom import api
from fathom.batch import Ragged
from fathom.encoding import FIRST_KNOWN, Values
from fathom.lookup import Numbers
from fathom.online import OnlineFeatures, UserRead
from fathom.online_tables import Tables
from fathom.ranker import Ranker
from fathom.retrieval import (
    Approximate,
    Exact,
    Floats,
    Index,
    Mask,
    NoIndexError,
    Places,
    RetrievalConfig,
    Slots,
    diversify,
    draw_of,
    explore,
)
from fathom.service_log import log
from fathom.tower import vocabularies


@dataclass(frozen=True)
class Pool:
    """What was retrieved.

    Args:
        places: (P,) in the tower.
        items: their P keys.
        popular: whether by popularity, since nothing is known of the user's taste.
    """

    places: Places
    items: list[str]
    popular: bool


class Recommender:
    """Chooses what is ranked for a user, and what of that is shown.

    An approximate index is built in the background; until it is there, the exact one answers.

    Args:
        ranker: with a tower.
    """

    def __init__(self, ranker: Ranker, config: RetrievalConfig) -> None:
        known = vocabularies(ranker.encoder)
        assert known is not None
        self._users, self._items = known
        self._keys = np.array(self._items.values, object)
        self._spec, self._tower, self._config = ranker.spec, ranker.tower, config
        self._exact = Exact(ranker.tower.items)
        self._popular = Exact(ranker.tower.popularity[:, None])
        self._index: Index = self._exact
        self._attributes: _Attributes | None = None
        if len(self._keys) > config.exact_items:
            threading.Thread(target=self._approximate, name="index", daemon=True).start()

    @property
    def described(self) -> dict[str, Any]:
        """How many items are searched, by which index, and its share of the exact answer."""
        index = self._index
        found = ("approximate", index.recall) if isinstance(index, Approximate) else ("exact", 1.0)
        return {"items": len(self._keys), "index": found[0], "recall": found[1]}

    def faults(
        self, request: api.RecommendRequest, features: OnlineFeatures
    ) -> list[dict[str, str]]:
        """What of a request the spec does not have.

        Raises:
            RefusedError: it is more than can be named.
        """
        names = [column.name for column in api.filters(self._spec)]
        api.bound_unknown([request.where], names)
        faults = [
            {"field": f"where.{n}", "fault": f"is no attribute of items; there are {names}"}
            for n in request.where
            if n not in names
        ]
        if request.exclude_interacted and not features.has_history:
            keys = [self._spec.entities.user, self._spec.entities.item]
            fault = f"is True, but the spec has no aggregate of interactions by {keys}; remove it"
            faults.append({"field": "exclude_interacted", "fault": fault})
        return faults

    def retrieve(
        self, request: api.RecommendRequest, features: OnlineFeatures, read: UserRead
    ) -> Pool:
        """The items to rank: of those that are allowed, those of the largest dot products.

        The user's vector follows from the history that was read, or else is the one that training
        left. Without either, the most popular items are retrieved.
        """
        items, counts = features.history(read)
        places = self._places(items)
        allowed = self._allowed(request, features.tables, places)
        count = max(request.k, self._config.pool)
        vector = self._vector(request.user, places, counts)
        if vector is None:
            found = self._popular.search(np.ones(1, np.float32), count, allowed)
        else:
            found = self._index.search(vector, count, allowed)
        keys = self._keys[found.places].tolist()
        return Pool(found.places, keys, vector is None)

    def fill(
        self,
        request: api.RecommendRequest,
        request_id: str,
        pool: Pool,
        probabilities: NDArray[np.float64],
    ) -> Slots:
        """Order the ranked pool by relevance and diversity, and explore.

        Args:
            probabilities: (P,) as the ranker scored the pool.
        """
        config = self._config
        diversity = config.diversity if request.diversity is None else request.diversity
        share = config.exploration if request.exploration is None else request.exploration
        vectors = self._tower.items[pool.places] if diversity else self._tower.items[:0]
        order = diversify(probabilities, vectors, request.k, diversity)
        return explore(order, len(pool.items), share, draw_of(request_id))

    def _vector(self, user: str, history: Places, counts: NDArray[np.float64]) -> Floats | None:
        """The user's vector, or None if nothing is known of the user's taste."""
        known = history >= 0
        if known.any():
            return self._tower.fold_in(history[known], counts[known])
        (place,) = self._users.ids(np.array([user], object)) - FIRST_KNOWN
        if place < 0 or not self._tower.users[place].any():
            return None
        vector: Floats = self._tower.users[place]
        return vector

    def _places(self, items: list[str]) -> Places:
        """Places of items in the tower, negative for those that it does not have."""
        keys = np.empty(len(items), object)
        keys[:] = items
        return self._items.ids(keys).astype(np.int64) - FIRST_KNOWN

    def _allowed(
        self, request: api.RecommendRequest, tables: Tables, history: Places
    ) -> Mask | None:
        """Which items may be shown, (I,); None for all."""
        allowed = np.ones(len(self._keys), np.bool_)
        if request.allow is not None:
            allowed[:] = False
            places = self._places(request.allow)
            allowed[places[places >= 0]] = True
        denied = [self._places(request.deny)] + [history] * request.exclude_interacted
        for places in denied:
            allowed[places[places >= 0]] = False
        if request.where:
            if self._attributes is None or self._attributes.tables is not tables:
                self._attributes = _Attributes.of(tables, self._spec.entities.item, self._keys)
            for name, values in request.where.items():
                allowed &= self._attributes.having(name, values)
        return None if allowed.all() else allowed

    def _approximate(self) -> None:
        users = self._tower.users[self._tower.users.any(axis=1)]
        draw = np.random.default_rng(0)
        queries = users[draw.permutation(len(users))[:200]]
        config = self._config
        try:
            index = Approximate(self._exact, self._tower.items, queries, config.recall, config.pool)
        except NoIndexError as error:
            log.warning("%s; until then they are searched exactly all the same", error)
            return
        except Exception:
            log.exception("no approximate index could be built; the exact one stays")
            return
        self._index = index
        log.info("approximate index of %d items: %s", len(self._keys), self.described)


class _Encoded(NamedTuple):
    """An attribute of I items: its distinct values, and each item's as numbers of those, from
    ``offsets[i]`` to ``offsets[i + 1]``; without offsets, one each."""

    values: dict[str, int]
    codes: Numbers
    offsets: Numbers | None


class _Attributes:
    """Attributes of the tower's items in one generation of tables, encoded when first asked for."""

    def __init__(self, tables: Tables, columns: Mapping[str, Values], rows: Numbers) -> None:
        self.tables = tables
        self._columns, self._rows = columns, rows
        self._encoded: dict[str, _Encoded] = {}

    @classmethod
    def of(cls, tables: Tables, key: str, items: NDArray[Any]) -> _Attributes:
        """Find the items' rows."""
        table = tables.views["items"]
        rows = table.index.find([tables.codes[key].of(items.tolist(), {})])
        return cls(tables, table.columns, rows)

    def having(self, name: str, values: list[str]) -> Mask:
        """Which items have one of some values of an attribute, (I,)."""
        if name not in self._encoded:
            self._encoded[name] = _encode(self._columns[name].take(self._rows))
        known, codes, offsets = self._encoded[name]
        wanted = np.zeros(len(known) + 1, np.bool_)  # the last one stands for no value
        wanted[[known[value] for value in values if value in known]] = True
        hits = wanted.take(codes)
        if offsets is None:
            return hits
        sums = np.concatenate([[0], np.cumsum(hits)])
        found: Mask = sums[offsets[1:]] > sums[offsets[:-1]]
        return found


def _encode(values: Values) -> _Encoded:
    flat = values.values if isinstance(values, Ragged) else values
    encoded = pa.array(flat, pa.string()).dictionary_encode()
    known = {value: code for code, value in enumerate(encoded.dictionary.to_pylist())}
    codes = encoded.indices.fill_null(len(known)).to_numpy(zero_copy_only=False).astype(np.int64)
    return _Encoded(known, codes, values.offsets if isinstance(values, Ragged) else None)
