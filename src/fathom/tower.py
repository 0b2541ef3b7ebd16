"""The tower that retrieves: vectors of users and items whose dot products rank a whole catalogue.

Implicit alternating least squares (Hu, Koren and Volinsky 2008, "Collaborative filtering for
implicit feedback datasets") with penalties by frequency (Rendle et al. 2022, "Revisiting the
performance of iALS on item recommendation benchmarks", arXiv:2110.14037). With p_u and q_i the
vectors of user and item, S the positive pairs and c their numbers, it minimises

    sum over S of (1 + ln c) (1 - p_u . q_i)²  +  a sum over all (u, i) of (p_u . q_i)²
      + l sum over u of (|S_u| + a I) |p_u|²  +  l sum over i of (|S_i| + a U) |q_i|²

so that, unlike a model of exposures alone, it learns from what a user left alone in the whole
catalogue. Each half step has a closed form, which also gives a vector to a user whom training did
not meet, from the items of a history.

Legend: U users, I items, D factors, E pairs.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from fathom.batch import Batch, Layout
from fathom.encoding import FIRST_KNOWN, Encoder, Vocabulary
from fathom.retrieval import Exact, Floats, Places

FILE = "retrieval.safetensors"
#: Numbers that a half step holds at a time, which bounds memory.
_AT_ONCE = 1 << 22
_INITIAL_SCALE = 0.1
#: Users whose recall is measured, at most.
_MEASURED = 2_000


class TowerError(ValueError):
    """A tower's file is not what it must be; the message lists every fault."""


class TowerConfig(BaseModel):
    """How the tower is trained (``params:retrieval``).

    Args:
        factors: width D of the vectors; 0 for no tower, and no ``/recommend``.
        iterations: each solves for all users, then for all items.
        unobserved_weight: a, how much a pair that is not positive counts, against 1.
        l2: l, the penalty.
        seed: of the initial item vectors.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    factors: int = Field(default=32, ge=0, le=1024)
    iterations: int = Field(default=6, ge=1, le=100)
    unobserved_weight: float = Field(default=0.1, gt=0, le=1)
    l2: float = Field(default=0.01, gt=0)
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True)
class Tower:
    """What retrieval needs; rows are the known values of the encoder's vocabularies, in order.

    Args:
        items, users: (I, D), (U, D); zeros where there was no positive pair.
        popularity: (I,) number of positive examples.
        settings: (2,) ``unobserved_weight`` and ``l2``, which `fold_in` needs as well.
    """

    items: Floats
    users: Floats
    popularity: Floats
    settings: Floats

    def __bool__(self) -> bool:
        return len(self.items) > 0

    @classmethod
    def empty(cls) -> Tower:
        """No tower."""
        none = np.zeros((0, 0), np.float32)
        return cls(none, none, none[:, :0].reshape(0), np.zeros(2, np.float32))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all numbers, in hexadecimal."""
        digest = hashlib.sha256()
        for name, array in self._arrays().items():
            digest.update(f"{name} {array.shape}".encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def fold_in(self, places: Places, counts: NDArray[np.float64]) -> Floats:
        """The vector of a user from a history: what training would have solved for.

        Args:
            places: (H,) different items, 0 to I - 1.
            counts: (H,) how often each, 1 or more.

        Returns:
            (D,).
        """
        pairs = _Pairs(np.array([0, len(places)]), places, _weights(counts))
        weight, l2 = self.settings.tolist()
        vector: Floats = _solve(pairs, self.items, self._gram, weight, l2)[0]
        return vector

    @cached_property
    def _gram(self) -> Floats:
        gram: Floats = self.items.T @ self.items
        return gram

    def save(self, folder: Path) -> None:
        """Write its one file into a folder."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.ascontiguousarray(a) for name, a in self._arrays().items()}
        save_file(arrays, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> Tower:
        """Read it from a folder.

        Raises:
            TowerError: the file holds other arrays, or numbers that are not finite.
        """
        from safetensors.numpy import load_file

        found: dict[str, Any] = load_file(folder / FILE)
        names = set(cls.__dataclass_fields__)
        if set(found) != names:
            raise TowerError(f"{FILE} holds {sorted(found)}; it must hold {sorted(names)}")
        faults = [
            f"{name} holds numbers that are not finite"
            for name, array in found.items()
            if not np.isfinite(array).all()
        ]
        if faults:
            raise TowerError(f"{FILE}: {'; '.join(faults)}")
        return cls(**found)

    def _arrays(self) -> dict[str, Floats]:
        return {name: getattr(self, name) for name in sorted(self.__dataclass_fields__)}


def vocabularies(encoder: Encoder) -> tuple[Vocabulary, Vocabulary] | None:
    """The known users and items, in the order of a tower's rows; None without columns of them."""
    places = _places(encoder.layout)
    if places is None:
        return None
    user, item = (encoder.tables[encoder.layout.fields[place]] for place in places)
    return user, item


def fit_tower(encoder: Encoder, batch: Batch, config: TowerConfig) -> Tower:
    """Learn a tower from the positive examples (label above 0) of a split.

    Returns:
        An empty one if the model has no columns of user and item, or nothing is positive.
    """
    known, places = vocabularies(encoder), _places(encoder.layout)
    if config.factors == 0 or known is None or places is None:
        return Tower.empty()
    users, items = _positives(batch, places)
    sizes = len(known[0].values), len(known[1].values)
    popularity = np.bincount(items, minlength=sizes[1]).astype(np.float32)
    codes, counts = np.unique(users * sizes[1] + items, return_counts=True)
    if not len(codes):
        return Tower.empty()
    pairs = np.divmod(codes, sizes[1])
    by_user = _Pairs.of(pairs[0], pairs[1], counts, sizes[0])
    by_item = _Pairs.of(pairs[1], pairs[0], counts, sizes[1])
    draw = np.random.default_rng(config.seed)
    scale = _INITIAL_SCALE / np.sqrt(config.factors)
    item_vectors = (draw.standard_normal((sizes[1], config.factors)) * scale).astype(np.float32)
    item_vectors[popularity == 0] = 0
    weight, l2 = config.unobserved_weight, config.l2
    for _ in range(config.iterations):
        user_vectors = _solve(by_user, item_vectors, item_vectors.T @ item_vectors, weight, l2)
        item_vectors = _solve(by_item, user_vectors, user_vectors.T @ user_vectors, weight, l2)
    # As `fold_in` would have them.
    user_vectors = _solve(by_user, item_vectors, item_vectors.T @ item_vectors, weight, l2)
    return Tower(item_vectors, user_vectors, popularity, np.array([weight, l2], np.float32))


def measure(
    tower: Tower, encoder: Encoder, batch: Batch, ks: tuple[int, ...] = (100, 500)
) -> dict[str, Any]:
    """How many of each user's positive items of a split are among the k retrieved.

    Returns:
        ``items``, ``users`` (those with a positive known item, of whom at most 2,000 are
        measured), and for each k ``recall_at_<k>`` of the tower and of popularity.
    """
    places = _places(encoder.layout)
    if not tower or places is None:
        return {"items": 0, "users": 0}
    users, items = _positives(batch, places, unknown_users=True)
    order = np.argsort(users, kind="stable")
    distinct, starts = np.unique(users[order], return_index=True)
    wanted = [np.unique(part) for part in np.split(items[order], starts[1:])]
    chosen = np.random.default_rng(0).permutation(len(distinct))[:_MEASURED]
    exact, popular = Exact(tower.items), Exact(tower.popularity[:, None])
    most = popular.search(np.ones(1, np.float32), max(ks)).places
    shares: dict[str, dict[str, list[float]]] = {
        f"recall_at_{k}": {"tower": [], "popularity": []} for k in ks
    }
    for at in chosen.tolist():
        user, met = distinct[at], wanted[at]
        vector = tower.users[user] if user >= 0 else np.zeros(1, np.float32)
        own = exact.search(vector, max(ks)).places if vector.any() else most
        for k in ks:
            found = shares[f"recall_at_{k}"]
            found["tower"].append(float(np.isin(met, own[:k]).mean()))
            found["popularity"].append(float(np.isin(met, most[:k]).mean()))
    means = {k: {n: float(np.mean(v)) for n, v in found.items()} for k, found in shares.items()}
    figures: dict[str, Any] = {"items": len(tower.items), "users": len(chosen)}
    return figures | (means if len(chosen) else {})


# -- least squares -------------------------------------------------------------------------------


class _Pairs(NamedTuple):
    """Rows of weighted columns: row r has those at ``offsets[r]:offsets[r + 1]``."""

    offsets: Places
    columns: Places
    weights: Floats

    @classmethod
    def of(cls, rows: Places, columns: Places, counts: NDArray[np.int64], size: int) -> _Pairs:
        order = np.argsort(rows, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=size))])
        return cls(offsets, columns[order], _weights(counts[order]))


def _weights(counts: NDArray[Any]) -> Floats:
    found: Floats = (1 + np.log(np.maximum(counts, 1))).astype(np.float32)
    return found


def _solve(pairs: _Pairs, fixed: Floats, gram: Floats, weight: float, l2: float) -> Floats:
    """Vectors of all rows given those of the columns, (R, D); zeros where a row has no column.

    Each solves (a G + sum of w y yᵀ + l (n + a M) 1) x = sum of w y over its n columns' vectors y,
    with G the sum of y yᵀ over all M columns.
    """
    lengths = np.diff(pairs.offsets)
    width = fixed.shape[1]
    solved = np.zeros((len(lengths), width), np.float32)
    # Rows of like length are solved together, so that little is padded.
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] > 0]
    most = max(1, _AT_ONCE // (width * width))
    start = 0
    while start < len(order):
        rows = order[start : start + most]
        rows = rows[: max(1, _AT_ONCE // (width * int(lengths[rows[-1]])))]
        penalty = l2 * (lengths[rows] + weight * len(fixed))
        left = weight * gram + penalty[:, None, None] * np.eye(width)
        own, right = _normal(pairs, rows, fixed)
        solved[rows] = np.linalg.solve(left + own, right[..., None])[..., 0]
        start += len(rows)
    return solved


def _normal(pairs: _Pairs, rows: Places, fixed: Floats) -> tuple[Floats, Floats]:
    """Sums of w y yᵀ, (B, D, D), and of w y, (B, D), over each row's columns."""
    width = fixed.shape[1]
    left = np.zeros((len(rows), width, width), np.float32)
    right = np.zeros((len(rows), width), np.float32)
    starts, ends = pairs.offsets[rows], pairs.offsets[rows + 1]
    step = max(1, _AT_ONCE // (width * len(rows)))
    for begin in range(0, int((ends - starts).max()), step):
        places = starts[:, None] + np.arange(begin, begin + step)
        there = places < ends[:, None]
        places = np.where(there, places, 0)[:, : max(1, int(there.sum(axis=1).max()))]
        there = there[:, : places.shape[1]]
        vectors = fixed[pairs.columns[places]]
        weighted = vectors * (pairs.weights[places] * there)[..., None]
        left += weighted.transpose(0, 2, 1) @ vectors
        right += weighted.sum(axis=1)
    return left, right


def _places(layout: Layout) -> tuple[int, int] | None:
    if layout.user is None or layout.item is None:
        return None
    return layout.user, layout.item


def _positives(
    batch: Batch, places: tuple[int, int], unknown_users: bool = False
) -> tuple[Places, Places]:
    """Rows of users and items of the positive examples whose item, and user, is known.

    Args:
        unknown_users: whether to keep users that are not known too, as negative numbers.
    """
    assert batch.label is not None
    positive = np.flatnonzero(batch.label > 0)
    users, items = (
        batch.deep_ids[positive, place].astype(np.int64) - FIRST_KNOWN for place in places
    )
    kept = (items >= 0) & (unknown_users | (users >= 0))
    return users[kept], items[kept]
