"""Aggregates of a log that grows: sums by key and step, and what windows make of them.

A log grows, and what is written of it stays true, so the work is cut where a later run can go on.
`parts` reduces rows of a log to what they add to a view. Parts of two stretches of a log are
`added`. `evaluated` gives every aggregate at each step at which it changes, and `carried` keeps
what later steps still need: its size depends on the keys and on the widest window, not on the
length of the log. A full computation is one that starts from nothing.

Rows come with the number of the step at which they count, in the column `STEP`. What a step is in
time, `fathom.features` knows. All functions build Ibis expressions; nothing is executed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from fathom.spec import EVENT_TIMESTAMP, Aggregate, Column, FeatureSpec

if TYPE_CHECKING:
    from ibis.expr.types import Column as Expression
    from ibis.expr.types import IntegerScalar, Table

    #: What rows of a log add to a view: sums by key and step under `SUMS`, and for each history,
    #: under its column's name, the newest values by key and step.
    Parts = Mapping[str, Table]

# Columns on the way to an aggregate. No column of a spec starts with an underscore.
STEP = "__step"
SUMS = "__sums"
_COUNT = "__count"
_POSITIVES = "__positives"
_LAST_EVENT = "__last_event"
_RANK = "__rank"
#: Money and other sums are added exactly, so that a sum does not depend on the order of rows.
_EXACT = "decimal(18, 6)"


def view_keys(spec: FeatureSpec, view: str) -> list[str]:
    """The columns that a view is keyed by."""
    return list(_aggregate(spec.views[view][0]).by)


def parts(rows: Table, spec: FeatureSpec, view: str) -> dict[str, Table]:
    """Reduce rows of a log to what they add to a view.

    Rows with a null key are left out, and those without a moment.

    Args:
        rows: of the view's log, with the columns that its aggregates read, and `STEP`.
        view: a name in ``spec.views``.
    """
    columns, by = spec.views[view], view_keys(spec, view)
    rows = rows.filter([rows[name].notnull() for name in (*by, STEP)])
    found = {SUMS: rows.group_by(*by, STEP).agg(**_sums(rows, columns, spec))}
    histories = [column for column in columns if column.kind == "sequence"]
    return found | {column.name: _newest_values(rows, by, column) for column in histories}


def added(earlier: Parts, later: Parts) -> dict[str, Table]:
    """Parts of two stretches of a log, as one."""
    import ibis

    return {name: ibis.union(earlier[name], later[name]) for name in later}


def carried(parts: Parts, spec: FeatureSpec, view: str, until: int) -> dict[str, Table]:
    """What steps after ``until`` still need: parts to which those of later rows can be added.

    Sums stay apart by step only as far back as the widest window of a later step reaches; all
    before are added up in one row per key. Of a history, the newest values of each key are left.
    """
    import ibis

    by, sums = view_keys(spec, view), parts[SUMS]
    oldest = until - max(_widths(spec, view), default=0)
    sums = sums.mutate(**{STEP: ibis.greatest(sums[STEP], oldest)})
    kept = {SUMS: sums.group_by(*by, STEP).agg(**_totals(sums, by))}
    for column in spec.views[view]:
        if column.kind == "sequence":
            values = _histories(parts[column.name], by, column)
            kept[column.name] = values.group_by(*by).agg(
                **{name: values[name].argmax(values[STEP]) for name in (STEP, column.name)}
            )
    return kept


def evaluated(
    parts: Parts,
    spec: FeatureSpec,
    view: str,
    until: IntegerScalar | int,
    since: int | None = None,
) -> Table:
    """Every aggregate of a view at each step at which one of them changes.

    Args:
        since: write only the steps after this one, whose own parts are what `carried` kept of
            it; from the first on when None.
        until: the last step to write.

    Returns:
        One row for each key and step at which rows arrive or leave a window: the key columns,
        `STEP`, and the aggregates by their columns' names. Recency is the moment of the last row.
    """
    columns, by = spec.views[view], view_keys(spec, view)
    changes = _changes(parts[SUMS], spec, view, until, since)
    scalars = [column for column in columns if column.kind == "numeric"]
    values = [_value(changes, by, column, spec).name(column.name) for column in scalars]
    result = changes.select(*by, STEP, *values)
    if since is not None:
        result = result.filter(result[STEP] > since)
    for column in columns:
        if column.kind == "sequence":
            # A row that only marks a window's end has no history of its own: it keeps the last.
            # (Ibis drops `include_null=False` inside a window, so no window can carry it on.)
            history = _histories(parts[column.name], by, column)
            joined = result.asof_join(history, on=STEP, predicates=by, rname="__right_{name}")
            result = joined.select(*result.columns, column.name)
    return result


# -- sums and windows ----------------------------------------------------------------------------


def _sums(rows: Table, columns: Iterable[Column], spec: FeatureSpec) -> dict[str, Expression]:
    """What is summed by key and step for a view's aggregates; none of it is ever null."""
    sums = {_COUNT: rows.count()}
    for aggregate in map(_aggregate, columns):
        if aggregate.measure in {"sum", "mean"}:
            sums[_sum(aggregate)] = rows[aggregate.column].cast(_EXACT).fill_null(0).sum()
        if aggregate.measure == "mean":
            sums[_valued(aggregate)] = rows[aggregate.column].count()
        if aggregate.measure == "rate":
            sums[_POSITIVES] = _is_positive(rows, spec).cast("int64").fill_null(0).sum()
        if aggregate.measure == "recency_days":
            sums[_LAST_EVENT] = rows[EVENT_TIMESTAMP].max()
    return sums


def _totals(sums: Table, by: list[str]) -> dict[str, Expression]:
    """Sums of sums."""
    names = [name for name in sums.columns if name not in {*by, STEP}]
    return {n: sums[n].max() if n == _LAST_EVENT else _narrow(sums[n].sum()) for n in names}


def _narrow(total: Expression) -> Expression:
    """A sum of integers as 64 bits. DuckDB's has 128, which parquet lacks and makes a float.

    (Ibis holds that it has 64 already and leaves a plain cast out.)
    """
    return total.cast("decimal(38, 0)").cast("int64") if total.type().is_integer() else total


def _changes(
    sums: Table, spec: FeatureSpec, view: str, until: IntegerScalar | int, since: int | None
) -> Table:
    """Sums at every step at which rows arrive (what they add) or leave a window (nothing)."""
    import ibis

    by, widths = view_keys(spec, view), _widths(spec, view)
    if since is not None:
        # Keys at which nothing happens in the steps to write need no work.
        moments = [sums[STEP] + width for width in (0, *widths)]
        touched = ibis.or_(*((moment > since) & (moment <= until) for moment in moments))
        sums = sums.semi_join(sums.filter(touched).select(*by).distinct().view(), by)
    nothing = {
        name: ibis.null(sums[name].type()) if name == _LAST_EVENT else sums[name] * 0
        for name in _totals(sums, by)
    }
    leaving = [sums.mutate(**{STEP: sums[STEP] + width}, **nothing) for width in widths]
    if not leaving:
        return sums.filter(sums[STEP] <= until)
    changes = ibis.union(sums, *leaving)
    changes = changes.filter(changes[STEP] <= until)
    return changes.group_by(*by, STEP).agg(**_totals(changes, by))


def _value(changes: Table, by: list[str], column: Column, spec: FeatureSpec) -> Expression:
    """One aggregate at each step of ``changes``."""
    import ibis

    aggregate = _aggregate(column)
    if aggregate.window_days is None:
        window = ibis.cumulative_window(group_by=by, order_by=STEP)
    else:
        width = aggregate.window_days // spec.grain_days
        window = ibis.range_window(preceding=width - 1, following=0, group_by=by, order_by=STEP)
    if aggregate.measure == "recency_days":
        return changes[_LAST_EVENT].max().over(window)
    count = changes[_COUNT].sum().over(window)
    if aggregate.measure == "count":
        return _narrow(count)
    if aggregate.measure == "rate":
        positives = changes[_POSITIVES].sum().over(window).cast("float64")
        prior = aggregate.prior * aggregate.prior_weight
        return (positives + prior) / (count.cast("float64") + aggregate.prior_weight)
    total = changes[_sum(aggregate)].sum().over(window).cast("float64")
    if aggregate.measure == "sum":
        return total
    return total / changes[_valued(aggregate)].sum().over(window).nullif(0).cast("float64")


def _widths(spec: FeatureSpec, view: str) -> list[int]:
    """The view's windows, in steps."""
    windows = {_aggregate(column).window_days for column in spec.views[view]} - {None}
    return sorted(days // spec.grain_days for days in windows if days is not None)


# -- histories -----------------------------------------------------------------------------------


def _newest_values(rows: Table, by: list[str], column: Column) -> Table:
    """The last ``n`` values of each key and step, newest first."""
    import ibis

    aggregate = _aggregate(column)
    assert aggregate.column is not None
    assert aggregate.n is not None
    valued = rows.filter(rows[aggregate.column].notnull())
    # Rows of one moment are ordered by their value, so that the history is the same on every run.
    newest_first = [valued[name].desc() for name in (EVENT_TIMESTAMP, aggregate.column)]
    window = ibis.window(group_by=[*by, STEP], order_by=newest_first)
    ranked = valued.select(
        *by,
        STEP,
        valued[aggregate.column].name(column.name),
        ibis.row_number().over(window).name(_RANK),
    )
    ranked = ranked.filter(ranked[_RANK] < aggregate.n)
    values = ranked[column.name].collect(order_by=ranked[_RANK])
    return ranked.group_by(*by, STEP).agg(**{column.name: values})


def _histories(values: Table, by: list[str], column: Column) -> Table:
    """The last ``n`` values at every step that has one, newest first: later steps go before.

    Each step has one value or more, so the last ``n`` are in the last ``n`` steps.
    """
    import ibis

    n = _aggregate(column).n
    assert n is not None
    newest_first = values[STEP].desc()
    older = ibis.window(preceding=0, following=n - 1, group_by=by, order_by=newest_first)
    last = values[column.name].collect().over(older).flatten()[:n]
    return values.select(*by, STEP, last.name(column.name))


def _is_positive(rows: Table, spec: FeatureSpec) -> Expression:
    """Whether a row's label is the positive one; above 0 where labels are numbers."""
    label = rows[spec.label.name]
    return label == spec.label.values[-1] if spec.label.values else label > 0


def _sum(aggregate: Aggregate) -> str:
    return f"__sum_{aggregate.column}"


def _valued(aggregate: Aggregate) -> str:
    """How many rows have a value: a mean is of those."""
    return f"__valued_{aggregate.column}"


def _aggregate(column: Column) -> Aggregate:
    assert column.aggregate is not None
    return column.aggregate
