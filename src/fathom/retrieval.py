"""Retrieval: the items of the largest dot products, and what may be done to a ranked list of them.

An `Index` finds the k largest of ``V q`` over the rows of V, of those that are allowed. `Exact`
looks at all of them. `Approximate` (Faiss) looks at the nearest cells, so it is for catalogues that
`Exact` is too slow for, and says how much of the exact answer it finds.

Legend: N items, D dimensions, K items found, P items in a pool of candidates.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

Floats = NDArray[np.float32]
Places = NDArray[np.int64]
Mask = NDArray[np.bool_]

#: Of so many scores one is looked at to guess the least that can be among the best.
_SAMPLED = 64
#: Points of each cell that its centre is learnt from.
_POINTS_PER_CELL = 64
#: Queries that the approximate index is measured with.
_MEASURED = 200


class RetrievalConfig(BaseModel):
    """How ``/recommend`` retrieves (``retrieval`` in ``params:serving``).

    Args:
        pool: items that are retrieved for a request, and then ranked; a request for more gets more.
        exact_items: catalogues of up to so many items are searched exactly, larger ones by Faiss
            where it is installed.
        recall: share of the exact answer that the approximate one is to find.
        exploration: share of the slots that is filled by chance, where a request does not say.
        diversity: how much likeness to what stands above counts, 0 to 1, where a request does not
            say (`diversify`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    pool: int = Field(default=500, ge=1, le=10_000)
    exact_items: int = Field(default=1_000_000, ge=0)
    recall: float = Field(default=0.95, gt=0, le=1)
    exploration: float = Field(default=0.0, ge=0, le=1)
    diversity: float = Field(default=0.0, ge=0, le=1)


class NoIndexError(RuntimeError):
    """An approximate index cannot be built; the message says what to install."""


class Found(NamedTuple):
    """Items found, by falling score: their places (K,) among the N, and scores (K,)."""

    places: Places
    scores: Floats


class Index(Protocol):
    """What finds the items of the largest dot products."""

    def search(self, query: Floats, k: int, allowed: Mask | None = None) -> Found:
        """The k items of the largest dot product with a query.

        Args:
            query: (D,), finite.
            allowed: (N,) which items may be found; all if None.

        Returns:
            K items, which is k or, if there are fewer, all that are allowed.
        """
        ...


class Exact:
    """All N dot products; ties by place, the lowest first.

    Args:
        vectors: (N, D) float32.
    """

    def __init__(self, vectors: Floats) -> None:
        # By dimension: the product with one vector then streams through memory.
        self._columns = np.ascontiguousarray(vectors.T, np.float32)
        self.size = len(vectors)

    def search(self, query: Floats, k: int, allowed: Mask | None = None) -> Found:
        """See `Index.search`."""
        query = np.asarray(query, np.float32)
        if allowed is not None and np.count_nonzero(allowed) * 8 < self.size:
            places = np.flatnonzero(allowed)
            best = top_k(query @ self._columns.take(places, axis=1), k)
            return Found(places[best.places], best.scores)
        return top_k(query @ self._columns, k, allowed)

    def scores(self, query: Floats, places: Places) -> Floats:
        """Dot products of some items, shape of ``places``."""
        found: Floats = np.asarray(query, np.float32) @ self._columns.take(places, axis=1)
        return found


def top_k(scores: Floats, k: int, allowed: Mask | None = None) -> Found:
    """The k largest of N scores, by falling score, ties by place.

    A threshold guessed from a sample leaves a few of a million scores to be sorted; where it was
    too high, the k-th largest itself is computed.

    Args:
        allowed: (N,) which of them count; all if None.
    """
    sample = scores[::_SAMPLED] if allowed is None else scores[::_SAMPLED][allowed[::_SAMPLED]]
    # The k best have k / 64 in the sample, more or less its root; four roots are seldom too few.
    rank = math.ceil(k / _SAMPLED + 4 * math.sqrt(k / _SAMPLED) + 4)
    if rank < len(sample) // 2:
        kept = np.flatnonzero(scores >= np.partition(sample, -rank)[-rank])
        kept = kept if allowed is None else kept[allowed[kept]]
        if k <= len(kept) <= len(scores) // 2:
            return _sorted(scores, kept, k)
    places = np.arange(len(scores)) if allowed is None else np.flatnonzero(allowed)
    if 0 < k < len(places):
        some = scores[places]
        least = np.partition(some, -k)[-k]
        above, equal = places[some > least], places[some == least]
        places = np.concatenate([above, equal[: k - len(above)]])
    return _sorted(scores, places, k)


def _sorted(scores: Floats, places: Places, k: int) -> Found:
    left = scores[places]
    order = np.lexsort((places, -left))[:k]
    return Found(places[order], left[order])


class Approximate:
    """Faiss' inverted file: the cells whose centres are nearest to the query.

    The largest dot product becomes the nearest neighbour by one more dimension, which gives all
    items the same norm (Bachrach et al. 2014, "Speeding up the Xbox recommender system using a
    Euclidean transformation for inner-product spaces"); the dot products are exact. The number of
    cells to look at is the least power of two that reaches the wanted recall on given queries.

    Where few items are allowed, or too few are found, `Exact` answers.

    Args:
        vectors: (N, D) float32.
        queries: (Q, D) such as will be asked, which recall is measured with.
        recall: share of the exact answer that is to be found.
        k: for which recall is measured.

    Raises:
        NoIndexError: Faiss is not installed.
    """

    def __init__(
        self, exact: Exact, vectors: Floats, queries: Floats, recall: float = 0.95, k: int = 500
    ) -> None:
        try:
            import faiss
        except ImportError as error:
            raise NoIndexError(
                f"{len(vectors):,} items are more than are searched exactly, and Faiss is not "
                "installed: pip install 'fathom[retrieval]', or raise serving.retrieval.exact_items"
            ) from error
        self._faiss, self._exact = faiss, exact
        vectors = np.asarray(vectors, np.float32)
        squares = np.einsum("nd,nd->n", vectors, vectors)
        more = np.sqrt(np.maximum(squares.max(initial=0.0) - squares, 0.0))
        points = np.column_stack([vectors, more]).astype(np.float32)
        self.cells = max(1, min(math.isqrt(len(points)), len(points) // _POINTS_PER_CELL))
        self._cells = faiss.IndexFlatL2(points.shape[1])
        self._index = faiss.IndexIVFFlat(self._cells, points.shape[1], self.cells, faiss.METRIC_L2)
        self._index.cp.max_points_per_centroid = _POINTS_PER_CELL
        self._index.cp.min_points_per_centroid = 1
        self._index.train(points)
        self._index.add(points)
        self.probes, self.recall = 1, 0.0
        queries, k = np.asarray(queries, np.float32)[:_MEASURED], min(k, exact.size)
        least = _least(exact, queries, k)
        while True:
            found = [self._look(query, k, None) for query in queries]
            self.recall = _shares(exact, queries, found, least, k)
            if self.recall >= recall or self.probes >= self.cells:
                break
            self.probes = min(2 * self.probes, self.cells)

    def search(self, query: Floats, k: int, allowed: Mask | None = None) -> Found:
        """See `Index.search`."""
        count = self._exact.size if allowed is None else int(np.count_nonzero(allowed))
        k = min(k, count)
        if k == 0 or count * 8 < self._exact.size:
            return self._exact.search(query, k, allowed)
        places = self._look(query, k, allowed)
        if len(places) < k:  # there are no more in these cells
            return self._exact.search(query, k, allowed)
        scores = self._exact.scores(query, places)
        order = np.argsort(-scores, kind="stable")
        return Found(places[order], scores[order])

    def _look(self, query: Floats, k: int, allowed: Mask | None) -> Places:
        """At most k places, rising, of those that are allowed in the cells that are looked at."""
        options: dict[str, Any] = {"nprobe": self.probes}
        if allowed is not None:
            bits = np.packbits(allowed, bitorder="little")
            options["sel"] = self._faiss.IDSelectorBitmap(bits)
        asked = np.append(np.asarray(query, np.float32), np.float32(0))[None]
        parameters = self._faiss.SearchParametersIVF(**options)
        _, found = self._index.search(asked, k, params=parameters)
        places: Places = np.sort(found[0])
        return places[places >= 0]


def recall_of(index: Index, exact: Exact, queries: Floats, k: int) -> float:
    """The mean share of the k exact items, or their equals, that an index finds."""
    found = [index.search(query, k).places for query in queries]
    return _shares(exact, queries, found, _least(exact, queries, k), k)


def _shares(
    exact: Exact, queries: Floats, found: list[Places], least: NDArray[Any], k: int
) -> float:
    """`recall_of` of what was found, given the least score of each exact answer."""
    shares = [
        np.count_nonzero(exact.scores(query, places) >= bound) / k
        for query, places, bound in zip(queries, found, least, strict=True)
    ]
    return float(np.mean(shares)) if shares else 1.0


def _least(exact: Exact, queries: Floats, k: int) -> NDArray[Any]:
    """The least score of each exact answer, (Q,): among equals, any item is as good.

    Less the last bits, in which sums of another order differ.
    """
    scores = [exact.search(query, k).scores for query in queries]
    return np.array([found[-1] - 1e-5 * np.abs(found).max() for found in scores])


# -- the list ------------------------------------------------------------------------------------


def diversify(relevance: NDArray[Any], vectors: Floats, k: int, diversity: float) -> Places:
    """The first k of a pool by maximal marginal relevance.

    Each next item maximises ``(1 - diversity) * relevance - diversity * likeness``, likeness being
    the largest cosine to an item before it (Carbonell and Goldstein 1998, "The use of MMR", with
    lambda = 1 - diversity). Relevance is scaled to 0 … 1 over the pool, so that it has a cosine's
    size whatever the task.

    Args:
        relevance: (P,).
        vectors: (P, D); what has none, zeros, is like nothing.
        k: how many.
        diversity: 0 for plain order by relevance, ties by place.

    Returns:
        Places in the pool, (min(k, P),).
    """
    k = min(k, len(relevance))
    if diversity == 0 or k == 0:
        return np.argsort(-relevance, kind="stable")[:k]
    least, most = relevance.min(), relevance.max()
    scaled = (relevance - least) / (most - least) if most > least else np.ones(len(relevance))
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.divide(vectors, norms, out=np.zeros_like(vectors), where=norms > 0)
    gain = (1 - diversity) * scaled
    likeness = np.full(len(relevance), -np.inf)
    chosen = [int(np.argmax(scaled))]
    while len(chosen) < k:
        gain[chosen[-1]] = -np.inf
        np.maximum(likeness, unit @ unit[chosen[-1]], out=likeness)
        chosen.append(int(np.argmax(gain - diversity * likeness)))
    return np.array(chosen, np.int64)


class Slots(NamedTuple):
    """What is shown.

    Args:
        places: (K,) in the pool, by slot.
        explored: (K,) whether the slot was filled by chance.
        propensity: (P,) the probability with which each item of the pool was to be shown.
    """

    places: Places
    explored: Mask
    propensity: NDArray[np.float64]

    @property
    def by_place(self) -> Places:
        """The slot of each item of the pool, (P,), -1 for those that are not shown."""
        slots = np.full(len(self.propensity), -1, np.int64)
        slots[self.places] = np.arange(len(self.places))
        return slots


def explore(order: Places, pool: int, share: float, draw: np.random.Generator) -> Slots:
    """Fill a share of the slots by chance, and say how probable every item was.

    Of K slots, M are explored: K times the share, rounded up or down at random so that its mean is
    that. Which slots is uniform. The first K - M of the order fill the others, and the explored are
    drawn uniformly from the rest of the pool, without replacement. An item of rank r (from 0) is
    thus shown with probability 1 if r < K - M, else M / (P - K + M), averaged over both values of
    M. Propensities over the pool sum to K.

    Args:
        order: (K,) places in the pool, the best first.
        pool: P.
        share: 0 to 1.
    """
    slots = len(order)
    rank = np.full(pool, pool, np.int64)
    rank[order] = np.arange(slots)
    least = math.floor(share * slots)
    more = share * slots - least
    propensity = np.zeros(pool)
    for count, chance in ((least, 1 - more), (least + 1, more)):
        if chance > 0:
            kept = slots - count
            drawn = count / max(pool - kept, 1)
            propensity += chance * np.where(rank < kept, 1.0, drawn)
    count = least + int(draw.random() < more)
    explored = np.zeros(slots, np.bool_)
    explored[draw.choice(slots, count, replace=False)] = True
    places = np.empty(slots, np.int64)
    places[~explored] = order[: slots - count]
    rest = np.flatnonzero(rank >= slots - count)
    places[explored] = draw.choice(rest, count, replace=False)
    return Slots(places, explored, propensity)


def draw_of(request_id: str) -> np.random.Generator:
    """Random numbers of a request, the same whenever it is asked again under its id."""
    digest = hashlib.sha256(request_id.encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "big"))
