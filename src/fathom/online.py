"""Features for a request: one user row through Feast, everything else from memory.

The cost of an online read grows with rows × features, so a request reads one row, the user's. What
depends on the item or the context is held in memory (`fathom.online_tables`) and exchanged as a
whole when there is something newer; what depends on the user and the item is packed in the user's
row. What is older than its view allows is missing (`fathom.encoding.expire`), and all of it goes
through `fathom.encoding.complete`, as the training frame does.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathom.aggregates import view_keys
from fathom.batch import Ragged
from fathom.encoding import Values, complete, expire, with_ratios
from fathom.feature_store import FeatureRepo
from fathom.features import is_packable, packed_name, stored_fields, stored_name
from fathom.lookup import Numbers, places_among, spread_frame
from fathom.online_tables import (
    KeyedTable,
    Tables,
    depends_on_the_moment,
    part,
    source_of,
    tables_of,
)
from fathom.spec import EVENT_TIMESTAMP, Column, FeatureSpec
from fathom.user_rows import Row, StoreDownError, UserRows

_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True)
class Known:
    """What the feature store knew when a request was served.

    Args:
        user: whether it has met the user; False when it could not be asked.
        items: whether it has met each candidate, shape (N,).
        expired: rows that were too old to be used; the user's count once, the others by candidate.
        degraded: whether the online store could not be asked, so that the user counts as unknown.
        user_as_of: the moment whose state the user's rows are: that of the tables, or of the newest
            row where a later materialisation has written one already.
        tables_as_of: the moment whose state everything else is.
        rows: event timestamp of the user's row in each feature view that has one. A view is as of
            that moment or ``tables_as_of``, whichever is later: what is not newer than the tables
            is the state at their moment, and what is newer is the state at its own.
    """

    user: bool
    items: NDArray[np.bool_]
    expired: int
    degraded: bool
    user_as_of: datetime
    tables_as_of: datetime
    rows: Mapping[str, datetime]


@dataclass(frozen=True)
class UserRead:
    """A user's rows as one read found them; none if the online store was down (``degraded``)."""

    rows: Mapping[str, Row]
    degraded: bool


class OnlineFeatures:
    """Reads features for requests. Safe to share between threads, also while it is refreshed."""

    def __init__(self, repo: FeatureRepo, plan: _Plan, rows: UserRows, tables: Tables) -> None:
        self.spec = plan.spec
        self._repo, self._plan, self._rows, self._tables = repo, plan, rows, tables
        self._refreshing = threading.Lock()

    @classmethod
    def open(
        cls, repo: FeatureRepo, spec: FeatureSpec, read_seconds: float = 0.5
    ) -> OnlineFeatures:
        """Connect to the online store and load what is held in memory.

        Args:
            read_seconds: how long the read of a user's row may take before the answer does without.

        Raises:
            FeatureStoreError: the registry or a source is not the spec's; names what is.
        """
        plan = _Plan.of(spec)
        rows = UserRows(repo.check(spec), spec.entities.user, plan.user_fields, read_seconds)
        return cls(repo, plan, rows, Tables.load(repo, spec))

    def close(self) -> None:
        """End background work."""
        self._rows.close()

    @property
    def tables_as_of(self) -> datetime:
        """The moment whose state the tables in memory are."""
        return self._tables.as_of

    @property
    def tables(self) -> Tables:
        """The tables in memory: one generation, which does not change."""
        return self._tables

    @property
    def degraded(self) -> bool:
        """Whether the online store is down."""
        return self._rows.down

    def read(self, user: str) -> UserRead:
        """Read a user's rows, within a bounded time."""
        try:
            return UserRead(self._rows.read(user), False)
        except StoreDownError:
            return UserRead({}, True)

    @property
    def has_history(self) -> bool:
        """Whether the user's rows say which items the user has interacted with."""
        return self._plan.history is not None

    def history(self, read: UserRead) -> tuple[list[str], NDArray[np.float64]]:
        """The items that a user has interacted with, and how often each.

        Returns:
            H items and (H,) counts of 1 or more; none if there is no aggregate by user and item.
        """
        view = self._plan.history
        row = read.rows.get(packed_name(view)) if view else None
        items = (row.values.get(f"{view}__{self.spec.entities.item}") if row else None) or []
        if view is None or row is None or not items:
            return [], np.zeros(0)
        counts = np.ones(len(items))
        for column in self.spec.held(view):
            aggregate = column.aggregate
            if aggregate and aggregate.measure == "count" and aggregate.window_days is None:
                counts = np.asarray(row.values[f"{view}__{stored_name(column)}"], np.float64)
        kept = np.flatnonzero(counts >= 1)
        return [items[i] for i in kept.tolist()], counts[kept]

    def refresh(self) -> bool:
        """Load the tables again if there is something newer; whether there was.

        Requests go on meanwhile, and each sees one generation of tables. An error leaves the
        tables as they are.
        """
        with self._refreshing:
            if source_of(self._repo, self.spec) == self._tables.source:
                return False
            self._tables = Tables.load(self._repo, self.spec)
            return True

    def frame(
        self,
        user: str,
        context: Mapping[str, Any],
        candidates: Sequence[Mapping[str, Any]],
        moment: datetime,
        read: UserRead | None = None,
    ) -> tuple[dict[str, Values], Known]:
        """`compact`, as a frame of N rows."""
        found, known = self.compact(user, context, candidates, moment, read)
        return spread_frame(found, len(candidates)), known

    def compact(
        self,
        user: str,
        context: Mapping[str, Any],
        candidates: Sequence[Mapping[str, Any]],
        moment: datetime,
        read: UserRead | None = None,
    ) -> tuple[dict[str, Values], Known]:
        """Every column of the spec for each candidate.

        Args:
            context: context columns that all candidates share.
            candidates: the item key, and context columns that are the candidate's own.
            moment: of the exposure; with a time zone, or taken as UTC.
            read: the user's rows, where they have been read already.

        Returns:
            Columns of N rows in the candidates' order, or of one row for all of them; and what was
            known.
        """
        tables, read = self._tables, read or self.read(user)
        rows = read.rows
        request = _Request(self._plan, tables, len(candidates), _utc(moment))
        request.add_context(context, candidates)
        request.add_user(user, rows)
        request.add_tables([candidate[self.spec.entities.item] for candidate in candidates])
        request.add_packed(rows)
        moments = {view: row.moment for view, row in rows.items() if row.moment is not None}
        known = Known(
            bool(moments),
            request.known_items,
            request.expired,
            read.degraded,
            max([tables.as_of, *moments.values()]),
            tables.as_of,
            moments,
        )
        return with_ratios(request.frame, self.spec), known


@dataclass(frozen=True)
class _Plan:
    """What follows from the spec alone: which views are read how, and the columns they make.

    ``own`` are the user's own views, ``packed`` those by user and other keys, which are named;
    ``fields`` is what both hold; ``history`` is the packed view of interactions by user and item.
    """

    spec: FeatureSpec
    own: tuple[str, ...]
    packed: Mapping[str, tuple[str, ...]]
    tables: Mapping[str, tuple[str, ...]]
    fields: Mapping[str, Mapping[str, Column | None]]
    context_part: FeatureSpec
    own_part: FeatureSpec
    packed_part: FeatureSpec
    ageing_part: FeatureSpec
    history: str | None

    @classmethod
    def of(cls, spec: FeatureSpec) -> _Plan:
        user = spec.entities.user
        own = ["users"] if spec.held("users") else []
        own += [view for view in spec.views if view_keys(spec, view) == [user]]
        packed = {
            view: tuple(key for key in view_keys(spec, view) if key != user)
            for view in spec.views
            if is_packable(spec, view)
        }

        def columns(views: Iterable[str]) -> list[Column]:
            return [column for view in views for column in spec.held(view)]

        return cls(
            spec,
            tuple(own),
            packed,
            tables_of(spec),
            {view: stored_fields(spec, view) for view in (*own, *packed)},
            part(spec, spec.raw_columns("context")),
            part(spec, columns(own)),
            part(spec, columns(packed)),
            part(spec, [c for c in columns(tables_of(spec)) if depends_on_the_moment(c)]),
            next((v for v in packed if _is_history(spec, v)), None),
        )

    @property
    def user_fields(self) -> dict[str, list[str]]:
        """Feast's feature view → fields to read of the user."""
        fields = {view: list(self.fields[view]) for view in self.own}
        for view, others in self.packed.items():
            names = (*others, *self.fields[view])
            fields[packed_name(view)] = [f"{view}__{name}" for name in names]
        return fields


def _is_history(spec: FeatureSpec, view: str) -> bool:
    (aggregate, *_) = (column.aggregate for column in spec.views[view])
    keys = {spec.entities.user, spec.entities.item}
    return aggregate is not None and aggregate.of == "interactions" and set(aggregate.by) == keys


def user_views(spec: FeatureSpec) -> list[str]:
    """Feast's names of the feature views that are read of the user."""
    return list(_Plan.of(spec).user_fields)


class _Request:
    """The frame of one request in the making. Legend: N candidates.

    Codes of keys, and what is looked up by them, have shape (1,) where all candidates share them.
    """

    def __init__(self, plan: _Plan, tables: Tables, count: int, now: np.datetime64) -> None:
        self.frame: dict[str, Values] = {}
        self.expired = 0
        self.known_items = np.zeros(count, np.bool_)
        self._plan, self._spec, self._tables = plan, plan.spec, tables
        self._now: dict[str, Values] = {EVENT_TIMESTAMP: np.full(1, now, "datetime64[us]")}
        # Of each key: the candidates' values, their codes, and both as a dictionary.
        self._values: dict[str, Sequence[Any]] = {}
        self._codes: dict[str, Numbers] = {}
        self._asked: dict[str, dict[Any, int]] = {}
        # Numbers of keys that no table has: only this request's parts are compared by them.
        self._new: dict[str, dict[Any, int]] = {key: {} for key in tables.codes}

    def add_context(
        self, context: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]]
    ) -> None:
        """Columns that come with the request, for all candidates alike or for each."""
        columns = self._plan.context_part.columns
        shared = {column.name: [context.get(column.name)] for column in columns}
        values: dict[str, list[Any]] = dict(shared)
        if max(map(len, candidates), default=0) > 1:
            for name, (common,) in shared.items():
                values[name] = [candidate.get(name, common) for candidate in candidates]
        frame = {column.name: _column(column, values[column.name]) for column in columns}
        for name in self._tables.codes:
            if name in values:
                self._number(name, values[name])
        self.frame |= complete(frame | self._now, self._plan.context_part)

    def add_user(self, user: str, rows: Mapping[str, Row]) -> None:
        """The user's key, attributes and aggregates."""
        spec, frame = self._spec, dict(self._now)
        for view in self._plan.own:
            values = rows[view].values if view in rows else {}
            for name, column in self._plan.fields[view].items():
                frame[name] = _column(column, [values.get(name)])
        frame, expired = expire(frame, spec, self._plan.own)
        self.expired += expired
        for name in self._tables.codes:
            if name in frame:
                self._number(name, np.asarray(frame[name]).tolist())
        self.frame |= complete(frame, self._plan.own_part)
        if spec.entities.user in spec.by_name:
            self.frame[spec.entities.user] = np.full(1, user, object)

    def add_tables(self, items: list[Any]) -> None:
        """Attributes of the items and everything else that is held in memory."""
        key = self._spec.entities.item
        self._number(key, items)
        if key in self._spec.by_name:
            self.frame[key] = _column(self._spec.by_name[key], items)
        ageing = dict(self._now)
        for view, by in self._plan.tables.items():
            table = self._tables.views[view]
            rows = table.index.find([self._codes[name] for name in by])
            if by == (key,):
                self.known_items |= table.there.take(rows)
            rows = self._without_old(view, table, rows)
            for columns, target in ((table.columns, self.frame), (table.ageing, ageing)):
                for name, values in columns.items():
                    target[name] = values.take(rows)
            for name, codes in table.keys.items():
                self._codes[name] = codes.take(rows)
                self._values[name] = np.asarray(self.frame[name]).tolist()
        self.frame |= complete(ageing, self._plan.ageing_part)

    def add_packed(self, rows: Mapping[str, Row]) -> None:
        """Aggregates by user and other keys, found in the user's rows."""
        frame = dict(self._now)
        for view, others in self._plan.packed.items():
            row = rows.get(packed_name(view))
            values = row.values if row else {}
            places = self._places(others, [values.get(f"{view}__{key}") or [] for key in others])
            absent = places < 0
            for name in self._plan.fields[view]:
                held = values.get(f"{view}__{name}")
                if held is None or len(held) == 0:
                    found = np.full(len(places), np.nan)
                else:
                    found = held.take(places, mode="clip").astype(np.float64)
                    found[absent] = np.nan
                frame[name] = found
        frame, expired = expire(frame, self._spec, self._plan.packed)
        self.expired += expired
        self.frame |= complete(frame, self._plan.packed_part)

    def _places(self, others: Sequence[str], entries: Sequence[list[Any]]) -> Numbers:
        """Where each candidate's keys stand among a user's entries; −1 if they do not."""
        held = []
        for key, values in zip(others, entries, strict=True):
            # Of all keys, only those that are asked for: a small dictionary is a fast one.
            if key not in self._asked:
                codes = self._codes[key].tolist()
                self._asked[key] = dict(zip(self._values[key], codes, strict=True))
            get = self._asked[key].get
            held.append(np.array([get(value, -1) for value in values], np.int64))
        size = max(self._tables.codes[key].size + 1 + len(self._new[key]) for key in others)
        return places_among(held, [self._codes[key] for key in others], size)

    def _without_old(self, view: str, table: KeyedTable, rows: Numbers) -> Numbers:
        """The rows, but for those that are too old to be read."""
        age = self._spec.max_age(view)
        if age is None or table.stamps is None:
            return rows
        now = np.asarray(self._now[EVENT_TIMESTAMP]).astype(np.float64)
        old = now - table.stamps.take(rows) > age / _MICROSECOND
        self.expired += int(old.sum())
        return np.where(old, table.index.missing, rows)

    def _number(self, key: str, values: Sequence[Any]) -> None:
        self._values[key] = values
        self._codes[key] = self._tables.codes[key].of(values, self._new[key])


def _column(column: Column | None, values: Sequence[Any]) -> Values:
    """A column of a frame; None stands for the moment of a row, which is a number."""
    if column is not None and column.kind in {"multi", "sequence"}:
        return Ragged.of([value or [] for value in values])
    if column is None or column.is_numeric:
        return np.array([np.nan if value is None else value for value in values], np.float64)
    texts = np.empty(len(values), object)
    texts[:] = values
    return texts


def _utc(moment: datetime) -> np.datetime64:
    if moment.tzinfo is not None:
        moment = moment.astimezone(timezone.utc).replace(tzinfo=None)
    return np.datetime64(moment, "us")
