"""As-of aggregates and histories: what was known strictly before each exposure.

A log is summarised by key into *snapshots*. Time is cut into steps of the spec's grain, and the
snapshot at a boundary ``T`` covers the rows whose event time and arrival time are both strictly
before ``T``; a row that arrives late counts from when it arrived. A snapshot row is written only
where a value changes: when rows arrive, and when they leave a window. An exposure at ``t`` then
reads, for its key, the last snapshot row with ``T <= t`` (the feature store's as-of join).

All functions build Ibis expressions; nothing is executed here.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timezone
from typing import TYPE_CHECKING

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

# Columns on the way to a snapshot. No column of a spec starts with an underscore.
_STEP = "__step"
_COUNT = "__count"
_POSITIVES = "__positives"
_LAST_EVENT = "__last_event"
_ROW = "__row"
_RANK = "__rank"
#: Money and other sums are added exactly, so that a sum does not depend on the order of rows.
_EXACT = "decimal(18, 6)"
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
    by = _aggregate(spec.views[view][0]).by
    return spec.entities.user in by and len(by) > 1


def with_attributes(log: Table, users: Table, items: Table, spec: FeatureSpec) -> Table:
    """Add to each row of a log the attributes that aggregates use as keys or values.

    Attributes are as of the row's own event time. Rows whose user or item has none keep nulls.

    Args:
        log: exposures or interactions, canonical.
        users, items: canonical tables; a row holds from its ``event_timestamp`` on.

    Returns:
        The log with one more column for each attribute needed.
    """
    needed = _read_columns(spec)
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


def last_step(logs: Iterable[Table], spec: FeatureSpec) -> IntegerScalar:
    """The step of the newest boundary that covers every row of the logs."""
    import ibis

    newest = [log.aggregate(step=_step(log, spec).max()) for log in logs]
    return ibis.union(*newest).step.max().as_scalar() if len(newest) > 1 else newest[0].as_scalar()


def snapshots(log: Table, spec: FeatureSpec, view: str, until: IntegerScalar | int) -> Table:
    """Summarise a log for one feature view.

    Args:
        log: the log of the view's aggregates, with the attributes they need.
        view: a name in ``spec.views``.
        until: the last step to write (see `last_step`); later ones are not known yet.

    Returns:
        One row for each key and boundary at which a value changes: the key columns,
        ``event_timestamp`` and ``created_timestamp`` (the boundary, UTC), and each aggregate
        under its `stored_name`. Rows with a null key are left out.
    """
    columns = spec.views[view]
    by = list(_aggregate(columns[0]).by)
    rows = log.mutate(**{_STEP: _step(log, spec)}).filter([log[key].notnull() for key in by])
    scalars = [column for column in columns if column.kind == "numeric"]
    histories = [column for column in columns if column.kind == "sequence"]
    result = _running(rows, by, scalars, spec, until)
    for column in histories:
        # A row that only marks a window's end has no history of its own: it keeps the last one.
        # (Ibis drops `include_null=False` inside a window, so no window can carry it on.)
        history = _history(rows, by, column)
        joined = result.asof_join(history, on=_STEP, predicates=by, rname="__right_{name}")
        result = joined.select(*result.columns, column.name)
    boundary = _boundary(result[_STEP], spec)
    return result.select(
        *by,
        boundary.name(EVENT_TIMESTAMP),
        boundary.name(CREATED_TIMESTAMP),
        *(stored_name(column) for column in columns),
    )


def packed(snapshot: Table, spec: FeatureSpec, view: str) -> Table:
    """Gather a view keyed by user and something else into one row per user.

    Serving reads one row per request, the user's; a candidate's value is then found in it by the
    other keys (`fathom.feature_store`). The row holds each key's newest snapshot.

    Returns:
        One row per user: the user key, both timestamps (the newest boundary), and equally long
        arrays ``<view>__<key>`` and ``<view>__<field>``.
    """
    import ibis

    user = spec.entities.user
    columns = spec.views[view]
    others = [key for key in _aggregate(columns[0]).by if key != user]
    fields = [stored_name(column) for column in columns]
    newest = snapshot.group_by(user, *others).agg(
        **{name: snapshot[name].argmax(snapshot[EVENT_TIMESTAMP]) for name in fields},
        **{EVENT_TIMESTAMP: snapshot[EVENT_TIMESTAMP].max()},
    )
    as_of = newest[EVENT_TIMESTAMP].max().over(ibis.window()).cast(_UTC)
    newest = newest.mutate(as_of.name(EVENT_TIMESTAMP))
    order = [newest[key] for key in others]
    return newest.group_by(user).agg(
        **{
            f"{view}__{name}": newest[name].collect(order_by=order, include_null=True)
            for name in (*others, *fields)
        },
        **{name: newest[EVENT_TIMESTAMP].max() for name in (EVENT_TIMESTAMP, CREATED_TIMESTAMP)},
    )


def _running(
    rows: Table, by: list[str], columns: list[Column], spec: FeatureSpec, until: IntegerScalar | int
) -> Table:
    """Cumulative and windowed values at every step where one of them changes."""
    import ibis

    aggregates = [_aggregate(column) for column in columns]
    sums = {_COUNT: rows.count()}
    for aggregate in aggregates:
        if aggregate.measure in {"sum", "mean"}:
            sums[_sum(aggregate)] = rows[aggregate.column].cast(_EXACT).sum()
        if aggregate.measure == "mean":
            sums[_known(aggregate)] = rows[aggregate.column].count()
        if aggregate.measure == "rate":
            sums[_POSITIVES] = _is_positive(rows, spec).cast("int64").sum()
    arrived = rows.group_by(*by, _STEP).agg(**sums, **{_LAST_EVENT: rows[EVENT_TIMESTAMP].max()})
    steps = sorted(
        {a.window_days // spec.grain_days for a in aggregates if a.window_days is not None}
    )
    leaving = [
        arrived.mutate(
            **{_STEP: arrived[_STEP] + window, _LAST_EVENT: ibis.null(arrived[_LAST_EVENT].type())},
            **{name: arrived[name] * 0 for name in sums},
        )
        for window in steps
    ]
    changes = ibis.union(arrived, *leaving) if leaving else arrived
    changes = changes.filter(changes[_STEP] <= until)
    changes = changes.group_by(*by, _STEP).agg(
        **{name: changes[name].sum() for name in sums},
        **{_LAST_EVENT: changes[_LAST_EVENT].max()},
    )
    return changes.select(
        *by,
        _STEP,
        *(_value(changes, by, column, spec).name(stored_name(column)) for column in columns),
    )


def _value(changes: Table, by: list[str], column: Column, spec: FeatureSpec) -> Expression:
    """One aggregate at each step of ``changes``."""
    import ibis

    aggregate = _aggregate(column)
    if aggregate.window_days is None:
        window = ibis.cumulative_window(group_by=by, order_by=_STEP)
    else:
        width = aggregate.window_days // spec.grain_days
        window = ibis.range_window(preceding=width - 1, following=0, group_by=by, order_by=_STEP)
    count = changes[_COUNT].sum().over(window)
    if aggregate.measure == "count":
        return count.cast("int64")
    if aggregate.measure == "recency_days":
        return _microseconds(changes[_LAST_EVENT].max().over(window))
    if aggregate.measure == "rate":
        positives = changes[_POSITIVES].sum().over(window).cast("float64")
        prior = aggregate.prior * aggregate.prior_weight
        return (positives + prior) / (count.cast("float64") + aggregate.prior_weight)
    total = changes[_sum(aggregate)].sum().over(window).cast("float64")
    if aggregate.measure == "sum":
        return total
    return total / changes[_known(aggregate)].sum().over(window).nullif(0).cast("float64")


def _history(rows: Table, by: list[str], column: Column) -> Table:
    """The last ``n`` values at every step in which a row arrived, newest first."""
    import ibis

    aggregate = _aggregate(column)
    assert aggregate.column is not None
    assert aggregate.n is not None
    valued = rows.filter(rows[aggregate.column].notnull())
    # Rows of one moment are ordered by their value, so that the history is the same on every run;
    # equal rows by any number, so that both windows see the same one of them first.
    valued = valued.mutate(**{_ROW: ibis.row_number()})
    order = (_STEP, EVENT_TIMESTAMP, aggregate.column, _ROW)
    newest_first = [valued[name].desc() for name in order]
    older = ibis.window(preceding=0, following=aggregate.n - 1, group_by=by, order_by=newest_first)
    within_step = ibis.window(group_by=[*by, _STEP], order_by=newest_first)
    ranked = valued.select(
        *by,
        _STEP,
        valued[aggregate.column].collect().over(older).name(column.name),
        ibis.row_number().over(within_step).name(_RANK),
    )
    return ranked.filter(ranked[_RANK] == 0).drop(_RANK)


def _step(log: Table, spec: FeatureSpec) -> Expression:
    """Number of the first boundary strictly after a row happened and arrived."""
    import ibis

    known = log[EVENT_TIMESTAMP]
    if ARRIVAL_TIMESTAMP in log.columns:
        known = ibis.greatest(known, log[ARRIVAL_TIMESTAMP].fill_null(known))
    since_origin = _microseconds(known) - int(spec.grain_origin.timestamp()) * 1_000_000
    return since_origin // (int(spec.grain.total_seconds()) * 1_000_000) + 1


def _boundary(step: Expression, spec: FeatureSpec) -> Expression:
    """The moment of a step's boundary, UTC."""
    seconds = step * int(spec.grain.total_seconds()) + int(spec.grain_origin.timestamp())
    return seconds.as_timestamp("s").cast(_UTC)


def _microseconds(moment: Expression) -> Expression:
    """Since 1970. (A difference of moments, so the session's time zone has no part in it.)"""
    import ibis

    return moment.delta(ibis.literal(_EPOCH, type=_UTC), unit="microsecond")


def _is_positive(rows: Table, spec: FeatureSpec) -> Expression:
    """Whether a row's label is the positive one; above 0 where labels are numbers."""
    label = rows[spec.label.name]
    return label == spec.label.values[-1] if spec.label.values else label > 0


def _sum(aggregate: Aggregate) -> str:
    return f"__sum_{aggregate.column}"


def _known(aggregate: Aggregate) -> str:
    """How many rows have a value: a mean is of those."""
    return f"__known_{aggregate.column}"


def _read_columns(spec: FeatureSpec) -> set[str]:
    """Columns that some aggregate reads, as a key or as a value."""
    aggregates = [_aggregate(column) for column in spec.aggregates]
    return {name for a in aggregates for name in (*a.by, a.column) if name is not None}


def _aggregate(column: Column) -> Aggregate:
    assert column.aggregate is not None
    return column.aggregate
