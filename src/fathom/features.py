"""As-of aggregates and histories: what was known strictly before each exposure.

A log is summarised by key into *snapshots*. Time is cut into steps of the spec's grain, and the
snapshot at a boundary ``T`` covers the rows whose event time and arrival time are both strictly
before ``T``; a row that arrives late counts from when it arrived. A snapshot row is written only
where a value changes: when rows arrive, and when they leave a window. An exposure at ``t`` then
reads, for its key, the last snapshot row with ``T <= t`` (the feature store's as-of join).

Here is what stands around the sums: the rows of a log that they read, and the rows of a feature
view that they become. `fathom.aggregates` adds up, and `fathom.increments` knows what an earlier
run has added up already.

All functions build Ibis expressions; nothing is executed here.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timezone
from typing import TYPE_CHECKING

from fathom import aggregates
from fathom.aggregates import STEP, view_keys
from fathom.spec import (
    ARRIVAL_TIMESTAMP,
    CREATED_TIMESTAMP,
    EVENT_TIMESTAMP,
    Aggregate,
    Column,
    FeatureSpec,
)

if TYPE_CHECKING:
    from ibis.expr.types import Column as Expression
    from ibis.expr.types import IntegerScalar, Table

_TIMES = (EVENT_TIMESTAMP, ARRIVAL_TIMESTAMP)
#: Feast's DuckDB reader refuses nanoseconds.
_UTC = "timestamp('UTC', 6)"
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def stored_name(column: Column) -> str:
    """Name of the field that a feature view holds for an aggregate column.

    It is the column's own name, but for recency: its value grows with every second, so the view
    holds the moment of the last row, in microseconds since 1970 (Feast's own timestamps are cut to
    seconds online), and `fathom.encoding.complete` measures the age when it is read.
    """
    assert column.aggregate is not None
    recency = column.aggregate.measure == "recency_days"
    return f"{column.name}__last_us" if recency else column.name


def stamp_name(view: str) -> str:
    """Name of the field that holds a row's own moment, in microseconds since 1970.

    Only views with a maximal age have it (`FeatureSpec.max_age_days`).
    """
    return f"{view}__at_us"


def stored_fields(spec: FeatureSpec, view: str) -> dict[str, Column | None]:
    """What a feature view holds beside its keys: field → its column, None for the row's moment."""
    held = spec.held(view)
    fields: dict[str, Column | None] = {
        stored_name(column) if column.aggregate else column.name: column for column in held
    }
    if spec.max_age(view):
        fields[stamp_name(view)] = None
    return fields


def packed_name(view: str) -> str:
    """Name of the one-row-per-user form of a view."""
    return f"{view}_packed"


def is_packable(spec: FeatureSpec, view: str) -> bool:
    """Whether a view is keyed by the user and something else."""
    by = view_keys(spec, view)
    return spec.entities.user in by and len(by) > 1


def boundary(step: int, spec: FeatureSpec) -> datetime:
    """The moment of a step's boundary, UTC."""
    return spec.grain_origin + step * spec.grain


# -- rows of a log -------------------------------------------------------------------------------


def with_attributes(log: Table, users: Table, items: Table, spec: FeatureSpec) -> Table:
    """Add to each row of a log the attributes that aggregates use as keys or values.

    Attributes are as of the row's own event time. Rows whose user or item has none keep nulls.

    Args:
        log: exposures or interactions, canonical.
        users, items: canonical tables; a row holds from its ``event_timestamp`` on.

    Returns:
        The log with one more column for each attribute needed.
    """
    return _joined(log, users, items, spec, columns_read(spec.aggregates))


def rows_read(
    log: Table, users: Table, items: Table, spec: FeatureSpec, of: str, since: int | None = None
) -> Table:
    """What `fathom.aggregates.parts` reads of a log: its rows' values, attributes and steps.

    Args:
        of: which log it is.
        since: only rows that were not known yet at this step's boundary; all when None.
    """
    columns = [column for column in spec.aggregates if _aggregate(column).of == of]
    needed = columns_read(columns)
    kept = {*needed, spec.entities.user, spec.entities.item, spec.label.name, *_TIMES}
    rows = log.select(*(name for name in log.columns if name in kept))
    if since is not None:
        rows = rows.filter(~known_by(rows, spec, since))
    rows = _joined(_numbered(rows, spec), users, items, spec, needed)
    return rows.select(*(name for name in rows.columns if name != ARRIVAL_TIMESTAMP))


def columns_read(columns: Iterable[Column]) -> set[str]:
    """Columns that aggregates read, as a key or as a value."""
    aggregates = [_aggregate(column) for column in columns]
    return {name for a in aggregates for name in (*a.by, a.column) if name is not None}


def known_by(log: Table, spec: FeatureSpec, step: int) -> Expression:
    """Whether each row of a log had happened and arrived strictly before a step's boundary."""
    return before(known_from(log), spec, step)


def before(moment: Expression, spec: FeatureSpec, step: int) -> Expression:
    """Whether a moment is strictly before a step's boundary."""
    import ibis

    return moment < ibis.literal(boundary(step, spec), type=_UTC)


def known_from(log: Table) -> Expression:
    """The later of a row's event time and its arrival time."""
    import ibis

    known = log[EVENT_TIMESTAMP]
    if ARRIVAL_TIMESTAMP in log.columns:
        known = ibis.greatest(known, log[ARRIVAL_TIMESTAMP].fill_null(known))
    return known


def last_step(logs: Iterable[Table], spec: FeatureSpec) -> IntegerScalar:
    """The step of the newest boundary that covers every row of the logs."""
    import ibis

    newest = [log.aggregate(known=known_from(log).max()) for log in logs]
    known = ibis.union(*newest).known.max() if len(newest) > 1 else newest[0].known
    return _step(known, spec).as_scalar()


# -- rows of a view ------------------------------------------------------------------------------


def snapshots(log: Table, spec: FeatureSpec, view: str, until: IntegerScalar | int) -> Table:
    """Summarise a whole log for one feature view.

    Args:
        log: the log of the view's aggregates, with the attributes they need.
        view: a name in ``spec.views``.
        until: the last step to write (see `last_step`); later ones are not known yet.

    Returns:
        One row for each key and boundary at which a value changes, as `stamped` gives them. Rows
        with a null key are left out.
    """
    parts = aggregates.parts(_numbered(log, spec), spec, view)
    return stamped(aggregates.evaluated(parts, spec, view, until), spec, view)


def stamped(evaluated: Table, spec: FeatureSpec, view: str) -> Table:
    """Aggregates by step (see `fathom.aggregates.evaluated`) as rows of their feature view.

    Returns:
        The key columns, ``event_timestamp`` and ``created_timestamp`` (the boundary, UTC), and
        each aggregate under its `stored_name`; in views with a maximal age, the boundary as a
        number too.
    """
    seconds = evaluated[STEP] * _seconds(spec) + int(spec.grain_origin.timestamp())
    moment = seconds.as_timestamp("s").cast(_UTC)
    values = {EVENT_TIMESTAMP: moment, CREATED_TIMESTAMP: moment}
    for field, column in stored_fields(spec, view).items():
        if column is None:
            values[field] = seconds * 1_000_000
        elif field == column.name:
            values[field] = evaluated[field]
        else:
            values[field] = _microseconds(evaluated[column.name])
    return evaluated.select(*view_keys(spec, view), **values)


def with_stamps(attributes: Table, spec: FeatureSpec, view: str) -> Table:
    """The rows of ``users`` or ``items`` as their feature view holds them.

    Returns:
        The table with ``created_timestamp``, and with the rows' own moments if the view ages.
    """
    moment = attributes[EVENT_TIMESTAMP]
    stamps = {CREATED_TIMESTAMP: moment}
    if spec.max_age(view):
        stamps[stamp_name(view)] = _microseconds(moment)
    return attributes.mutate(**stamps)


# -- one row per user ----------------------------------------------------------------------------


def newest(rows: Table, spec: FeatureSpec, view: str) -> Table:
    """The last snapshot of each key: keys, ``event_timestamp`` and fields."""
    moment = rows[EVENT_TIMESTAMP]
    return rows.group_by(*view_keys(spec, view)).agg(
        **{EVENT_TIMESTAMP: moment.max()},
        **{name: rows[name].argmax(moment) for name in stored_fields(spec, view)},
    )


def replaced(earlier: Table, later: Table, spec: FeatureSpec, view: str) -> Table:
    """The last snapshot of each key, from those of two stretches of time."""
    import ibis

    by = view_keys(spec, view)
    return ibis.union(earlier.anti_join(later, by).select(*later.columns), later)


def packed(rows: Table, spec: FeatureSpec, view: str) -> Table:
    """Gather the newest rows of a view keyed by user and something else into one row per user.

    Serving reads one row per request, the user's; a candidate's value is then found in it by the
    other keys (`fathom.feature_store`). A user's newest row is the whole truth about the user.

    Args:
        rows: one for each key (see `newest`).

    Returns:
        One row per user: the user key, both timestamps (the newest boundary among the user's
        rows), and equally long arrays ``<view>__<key>`` and ``<view>__<field>``.
    """
    user = spec.entities.user
    others = [key for key in view_keys(spec, view) if key != user]
    order = [rows[key] for key in others]
    return rows.group_by(user).agg(
        **{
            f"{view}__{name}": rows[name].collect(order_by=order, include_null=True)
            for name in (*others, *stored_fields(spec, view))
        },
        **{name: rows[EVENT_TIMESTAMP].max() for name in (EVENT_TIMESTAMP, CREATED_TIMESTAMP)},
    )


# -- time and columns ----------------------------------------------------------------------------


def _joined(log: Table, users: Table, items: Table, spec: FeatureSpec, needed: set[str]) -> Table:
    """A log with the attributes among ``needed`` that it lacks, as of each row's event time."""
    for table, key, owner in (
        (users, spec.entities.user, "user"),
        (items, spec.entities.item, "item"),
    ):
        wanted = [
            column.name
            for column in spec.columns
            if column.owner == owner and column.name in needed and column.name not in log.columns
        ]
        if wanted:
            attributes = table.select(key, EVENT_TIMESTAMP, *wanted)
            joined = log.asof_join(attributes, on=EVENT_TIMESTAMP, predicates=key)
            log = joined.select(*log.columns, *wanted)
    return log


def _numbered(log: Table, spec: FeatureSpec) -> Table:
    """A log with the number of each row's first boundary strictly after it was known."""
    if STEP in log.columns:
        return log
    return log.mutate(**{STEP: _step(known_from(log), spec)})


def _step(known: Expression, spec: FeatureSpec) -> Expression:
    since_origin = _microseconds(known) - int(spec.grain_origin.timestamp()) * 1_000_000
    return since_origin // (_seconds(spec) * 1_000_000) + 1


def _seconds(spec: FeatureSpec) -> int:
    return int(spec.grain.total_seconds())


def _microseconds(moment: Expression) -> Expression:
    """Since 1970. (A difference of moments, so the session's time zone has no part in it.)"""
    import ibis

    return moment.delta(ibis.literal(_EPOCH, type=_UTC), unit="microsecond")


def _aggregate(column: Column) -> Aggregate:
    assert column.aggregate is not None
    return column.aggregate
