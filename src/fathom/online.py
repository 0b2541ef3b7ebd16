"""Features for a request: one user row through Feast, everything else from memory.

The cost of an online read grows with rows × features, so a request reads one row, the user's. What
depends on the item or the context is held as columns, loaded from the feature store's newest
snapshot; what depends on the user and the item is packed in the user's row. The result goes
through `fathom.encoding.complete`, as the training frame did.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fathom.batch import Ragged
from fathom.encoding import Keys, Values, complete, cross_keys, hash_values
from fathom.feature_store import FeatureRepo, frame_of
from fathom.features import is_packable, packed_name, stored_name
from fathom.spec import ATTRIBUTES, EVENT_TIMESTAMP, Column, FeatureSpec

if TYPE_CHECKING:
    from feast import FeatureStore


@dataclass(frozen=True)
class Known:
    """Whether the feature store has met the user, and each candidate, shape (N,)."""

    user: bool
    items: NDArray[np.bool_]


@dataclass(frozen=True)
class KeyedTable:
    """Columns in memory, found by key.

    Args:
        keys: (R,) rising hashes of the key columns.
        columns: R + 1 values each; the last one is what an unknown key gets.
    """

    keys: Keys
    columns: dict[str, Values]

    @classmethod
    def of(cls, table: pa.Table, by: Sequence[str]) -> KeyedTable:
        """Index a table by its key columns."""
        frame = frame_of(table)
        keys = _keys([frame[name] for name in by])
        order = np.argsort(keys)
        columns = {
            name: _with_missing(values, order)
            for name, values in frame.items()
            if name not in {*by, EVENT_TIMESTAMP}
        }
        return cls(keys[order], columns)

    def find(self, parts: Sequence[Values]) -> NDArray[np.int64]:
        """Row of each key, shape (N,); R where it is unknown."""
        wanted = _keys(parts)
        if len(self.keys) == 0:
            return np.zeros(len(wanted), np.int64)
        place = np.minimum(np.searchsorted(self.keys, wanted), len(self.keys) - 1)
        return np.where(self.keys[place] == wanted, place, len(self.keys))

    def take(self, rows: NDArray[np.int64]) -> dict[str, Values]:
        """The columns' values at ``rows``."""
        return {name: _take(values, rows) for name, values in self.columns.items()}


class OnlineFeatures:
    """Reads features for requests. Safe to share between threads that do not refresh it."""

    def __init__(
        self, store: FeatureStore, spec: FeatureSpec, tables: dict[str, KeyedTable]
    ) -> None:
        self.spec = spec
        self._store = store
        self._tables = tables
        self._user_fields = _user_fields(spec)

    @classmethod
    def open(cls, repo: FeatureRepo, spec: FeatureSpec) -> OnlineFeatures:
        """Connect to the online store and load what is held in memory."""
        tables = {}
        if any(column.name not in spec.keys for column in spec.raw_columns("item")):
            tables["items"] = KeyedTable.of(repo.latest("items", spec), [spec.entities.item])
        for view, columns in spec.views.items():
            by = _by(columns)
            if spec.entities.user not in by:
                tables[view] = KeyedTable.of(repo.latest(view, spec), by)
        return cls(repo.open(), spec, tables)

    def frame(
        self,
        user: str,
        context: Mapping[str, Any],
        candidates: Sequence[Mapping[str, Any]],
        moment: datetime,
    ) -> tuple[dict[str, Values], Known]:
        """Every column of the spec for each candidate.

        Args:
            context: context columns that all candidates share.
            candidates: the item key, and context columns that are the candidate's own.
            moment: of the exposure; with a time zone, or taken as UTC.

        Returns:
            A frame of N rows in the candidates' order, and what was known.
        """
        spec, count = self.spec, len(candidates)
        items = _texts([candidate[spec.entities.item] for candidate in candidates])
        frame: dict[str, Values] = {
            spec.entities.user: _texts([user] * count),
            spec.entities.item: items,
            EVENT_TIMESTAMP: np.full(count, _utc(moment), "datetime64[us]"),
        }
        for column in spec.raw_columns("context"):
            shared = context.get(column.name)
            frame[column.name] = _context(
                column, [candidate.get(column.name, shared) for candidate in candidates]
            )
        known_items = np.zeros(count, np.bool_)
        if "items" in self._tables:
            rows = self._tables["items"].find([items])
            known_items = rows < len(self._tables["items"].keys)
            frame |= self._tables["items"].take(rows)
        row = self._user_row(user)
        for column in spec.raw_columns("user"):
            if column.name not in frame:
                frame[column.name] = _repeat(column, row[column.name], count)
        for view, columns in spec.views.items():
            by = _by(columns)
            if by == (spec.entities.user,):
                frame |= {stored_name(c): _repeat(c, row[stored_name(c)], count) for c in columns}
            elif is_packable(spec, view):
                frame |= _unpack(spec, view, row, frame)
            else:
                table = self._tables[view]
                rows = table.find([frame[key] for key in by])
                frame |= table.take(rows)
                if by == (spec.entities.item,):
                    known_items |= rows < len(table.keys)
        known_user = any(value is not None for value in row.values())
        return complete(frame, spec), Known(known_user, known_items)

    def _user_row(self, user: str) -> dict[str, Any]:
        if not self._user_fields:
            return {}
        found = self._store.get_online_features(
            features=self._user_fields, entity_rows=[{self.spec.entities.user: user}]
        ).to_dict()
        return {name: values[0] for name, values in found.items() if name not in self.spec.keys}


def _user_fields(spec: FeatureSpec) -> list[str]:
    """Feast references of everything in the user's row."""
    references = [
        f"{view}:{column.name}"
        for view, owner in ATTRIBUTES.items()
        if owner == "user"
        for column in spec.raw_columns("user")
        if column.name not in spec.keys
    ]
    for view, columns in spec.views.items():
        if _by(columns) == (spec.entities.user,):
            references += [f"{view}:{stored_name(column)}" for column in columns]
        elif is_packable(spec, view):
            others = [key for key in _by(columns) if key != spec.entities.user]
            fields = [stored_name(column) for column in columns]
            references += [f"{packed_name(view)}:{view}__{name}" for name in (*others, *fields)]
    return references


def _unpack(
    spec: FeatureSpec, view: str, row: Mapping[str, Any], frame: Mapping[str, Values]
) -> dict[str, Values]:
    """Look the candidates up in the user's packed row of a view."""
    columns = spec.views[view]
    others = [key for key in _by(columns) if key != spec.entities.user]
    packed = [row[f"{view}__{key}"] or () for key in others]
    place = {key: i for i, key in enumerate(zip(*packed, strict=True))}
    wanted = zip(*(_plain(frame[key]) for key in others), strict=True)
    found = [place.get(key, -1) for key in wanted]
    return {
        stored_name(column): np.array([np.nan if i < 0 else values[i] for i in found], np.float64)
        for column in columns
        for values in (row[f"{view}__{stored_name(column)}"] or (),)
    }


def _by(columns: Sequence[Column]) -> tuple[str, ...]:
    assert columns[0].aggregate is not None
    return columns[0].aggregate.by


def _keys(parts: Sequence[Values]) -> Keys:
    hashed = [hash_values(_single(part)) for part in parts]
    keys = hashed[0] if len(hashed) == 1 else cross_keys(hashed)
    assert not isinstance(keys, Ragged)
    return keys


def _single(values: Values) -> NDArray[Any]:
    assert not isinstance(values, Ragged)
    return values


def _plain(values: Values) -> list[Any]:
    plain: list[Any] = _single(values).tolist()
    return plain


def _with_missing(values: Values, order: NDArray[np.int64]) -> Values:
    """The values in ``order``, and one missing value behind them."""
    if isinstance(values, Ragged):
        taken = values.take(order)
        return Ragged(taken.values, np.append(taken.offsets, taken.offsets[-1]))
    missing: Any = None if values.dtype == object else np.nan
    kind = object if values.dtype == object else np.float64
    return np.append(values[order].astype(kind), np.array([missing], kind))


def _take(values: Values, rows: NDArray[np.int64]) -> Values:
    return values.take(rows) if isinstance(values, Ragged) else values[rows]


def _repeat(column: Column, value: Any, count: int) -> Values:
    """One value of the user's for every candidate."""
    if column.kind in {"multi", "sequence"}:
        return Ragged.of([value or []] * count)
    if column.is_numeric:
        return np.full(count, np.nan if value is None else value, np.float64)
    return _texts([value] * count)


def _context(column: Column, values: Sequence[Any]) -> Values:
    if column.kind in {"multi", "sequence"}:
        return Ragged.of([value or [] for value in values])
    if column.is_numeric:
        return np.array([np.nan if value is None else value for value in values], np.float64)
    return _texts(values)


def _texts(values: Sequence[Any]) -> NDArray[Any]:
    texts = np.empty(len(values), object)
    texts[:] = values
    return texts


def _utc(moment: datetime) -> np.datetime64:
    if moment.tzinfo is not None:
        moment = moment.astimezone(timezone.utc).replace(tzinfo=None)
    return np.datetime64(moment, "us")
