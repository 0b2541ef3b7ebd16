"""One raw table → clean rows, quarantined rows with their reasons, and a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import numpy as np

from fathom.spec import FeatureSpec
from fathom.validation.checks import Plan, plan_checks
from fathom.validation.config import TableName, ValidationConfig
from fathom.validation.expectations import Outcome, evaluate
from fathom.validation.fields import (
    Field,
    columns_of,
    duplicates_key,
    fields_of,
    rules_of,
)
from fathom.validation.partitions import (
    PARTITION,
    REASONS,
    ROW_NUMBER,
    RawDataError,
    as_text,
)
from fathom.validation.report import (
    ExpectationReport,
    PartitionRows,
    Rows,
    TableReport,
)

if TYPE_CHECKING:
    import ibis
    import pandas as pd
    import pyarrow as pa
    from numpy.typing import NDArray

    Numbers = NDArray[np.int64]

_EXAMPLES = 3


@dataclass(frozen=True)
class Validated:
    """A raw table taken apart.

    Args:
        clean: canonical columns and ``partition``, in the order of the raw rows.
        quarantine: all raw columns as text, ``partition``, ``row_number`` (position in reading
            order, from 0) and ``reasons`` (array of text), in the same order.
        report: what was found.

    Both tables are expressions over the raw table: they are computed where they are saved.
    """

    clean: ibis.Table
    quarantine: ibis.Table
    report: TableReport


@dataclass(frozen=True)
class _Rejected:
    """Rows that are not clean, by number, rising; and for the quarantined ones why."""

    quarantined: Numbers
    reasons: pa.ListArray
    duplicates: Numbers


def validate(
    table: ibis.Table, name: TableName, spec: FeatureSpec, config: ValidationConfig
) -> Validated:
    """Validate one raw table against the spec and the rules in conf.

    Great Expectations judges the rows. A row that breaks any expectation is quarantined once,
    with all of its reasons. Of the others, rows alike in the table's key keep the first.

    Args:
        table: raw rows, as `read_partitions` gives them. Without ``row_number``, rows are
            numbered as they come; without ``partition``, the table's name stands for it.
        name: which canonical table it is.
        spec: declares the columns and their domains.
        config: rules beside those of the spec.

    Raises:
        RawDataError: columns are missing, so that no row can be judged.
        RuleError: with all rules in conf that cannot be applied.
    """
    now = config.now or datetime.now(timezone.utc)
    fields = fields_of(name, spec, config)
    key = duplicates_key(name, spec, config)
    _require_columns(table, name, fields, key)
    raw = _numbered(table, name)
    plan = plan_checks(raw, fields, name, config, now)
    numbers, partitions, frame = _batch(raw, plan, name)
    outcomes, gx = evaluate(frame, plan.checks, name, now)
    del frame
    quarantined, reasons, counts = _collect(outcomes, numbers)
    canonical = raw.select(
        **plan.values, **{PARTITION: raw[PARTITION], ROW_NUMBER: raw[ROW_NUMBER]}
    )
    rejected = _Rejected(quarantined, reasons, _duplicates(canonical, key, quarantined))
    quarantine = _quarantine(raw, rejected)
    report = TableReport(
        table=name,
        moment=now.isoformat(),
        rows=_rows(len(numbers), rejected, counts),
        max_quarantined_share=rules_of(name, config).max_quarantined_share,
        partitions=_per_partition(numbers, partitions, rejected),
        expectations=tuple(_expectation(outcome) for outcome in outcomes),
        examples=_examples(raw, outcomes, numbers),
        gx=gx,
    )
    return Validated(_clean(canonical, rejected), quarantine, report)


def _require_columns(
    table: ibis.Table, name: TableName, fields: Sequence[Field], key: Sequence[str]
) -> None:
    have = ", ".join(table.columns)
    faults = [
        f"column {field.name} is missing; the table has {have}"
        for field in fields
        if not field.optional and field.name not in table.columns
    ]
    known = {field.name for field in fields}
    faults += [
        f"column {taken} of the spec or conf has a name that validation uses itself; rename it"
        for taken in (PARTITION, ROW_NUMBER, REASONS)
        if taken in known
    ]
    faults += [
        f"duplicates are told by {column}, which is no column of {name}; it has "
        f"{', '.join(sorted(known))}"
        for column in key
        if column not in known
    ]
    if faults:
        raise RawDataError(name, faults)


def _numbered(table: ibis.Table, name: TableName) -> ibis.Table:
    import ibis

    partition = ibis.literal(str(name))
    if PARTITION in table.columns:
        partition = table[PARTITION].cast("string").fill_null(partition)
    number = table[ROW_NUMBER] if ROW_NUMBER in table.columns else ibis.row_number()
    return table.mutate(**{PARTITION: partition, ROW_NUMBER: number.cast("int64")})


def _batch(
    raw: ibis.Table, plan: Plan, name: TableName
) -> tuple[Numbers, pa.DictionaryArray, pd.DataFrame]:
    """The only rows that leave the database: row numbers, partitions, columns with rules."""
    read = raw.select(
        **{
            ROW_NUMBER: raw[ROW_NUMBER],
            PARTITION: raw[PARTITION],
            **{f"rule {rule}": column for rule, column in plan.frame.items()},
        }
    ).to_pyarrow()
    numbers = read[ROW_NUMBER].to_numpy()
    if not np.all(numbers[1:] > numbers[:-1]):
        read = read.take(np.argsort(numbers, kind="stable"))
        numbers = read[ROW_NUMBER].to_numpy()
        if read[ROW_NUMBER].null_count or np.any(numbers[1:] == numbers[:-1]):
            raise RawDataError(name, [f"{ROW_NUMBER} must differ from row to row; drop it"])
    partitions = read[PARTITION].combine_chunks().dictionary_encode()
    read = read.drop_columns([ROW_NUMBER, PARTITION])
    categories = [f"rule {rule}" for rule in plan.categories]
    frame = read.to_pandas(categories=categories, self_destruct=True)
    return numbers, partitions, frame.set_axis(list(plan.frame), axis=1)


def _collect(outcomes: Sequence[Outcome], numbers: Numbers) -> tuple[Numbers, Any, dict[str, int]]:
    """Turn rows per reason into reasons per row.

    Returns:
        Numbers of the rows that break anything, rising; for each its reasons, in the order of the
        suite (Arrow lists of text); and how many rows have each reason.
    """
    import pyarrow as pa

    broken = [o for o in outcomes if o.rows is not None and len(o.rows)]
    names = list(dict.fromkeys(outcome.check.reason for outcome in broken))
    # One number per pair of row and reason: unique drops repetitions and sorts by both.
    pairs = [
        outcome.rows * len(names) + names.index(outcome.check.reason)
        for outcome in broken
        if outcome.rows is not None
    ]
    rows, which = np.divmod(
        np.unique(np.concatenate([np.array([], np.int64), *pairs])), max(len(names), 1)
    )
    positions, starts = np.unique(rows, return_index=True)
    reasons = pa.ListArray.from_arrays(
        pa.array([*starts, len(rows)], pa.int32()),
        pa.array(names, pa.string()).take(pa.array(which, pa.int64())),
    )
    counts = np.bincount(which, minlength=len(names)).tolist()
    ranked = sorted(zip(names, counts, strict=True), key=lambda entry: (-entry[1], entry[0]))
    return numbers[positions], reasons, dict(ranked)


def _duplicates(canonical: ibis.Table, key: Sequence[str], quarantined: Numbers) -> Numbers:
    """Later copies among the rows that are good by themselves."""
    import ibis

    if not key:
        return np.array([], dtype=np.int64)
    rows = _without(canonical, quarantined)
    copy = ibis.row_number().over(group_by=list(key), order_by=ROW_NUMBER)
    copies = rows.select(ROW_NUMBER, copy=copy).filter(ibis._.copy > 0)
    return np.sort(copies.to_pyarrow()[ROW_NUMBER].to_numpy())


def _clean(canonical: ibis.Table, rejected: _Rejected) -> ibis.Table:
    gone = np.union1d(rejected.quarantined, rejected.duplicates)
    return _without(canonical, gone).order_by(ROW_NUMBER).drop(ROW_NUMBER)


def _without(table: ibis.Table, numbers: Numbers) -> ibis.Table:
    import ibis
    import pyarrow as pa

    if not len(numbers):
        return table
    return table.anti_join(ibis.memtable(pa.table({ROW_NUMBER: numbers})), ROW_NUMBER)


def _quarantine(raw: ibis.Table, rejected: _Rejected) -> ibis.Table:
    import ibis
    import pyarrow as pa

    reasons = pa.table(
        {
            ROW_NUMBER: pa.array(rejected.quarantined, pa.int64()),
            REASONS: rejected.reasons,
        }
    )
    # An older verdict, on rows that were in quarantine before, gives way to the new one.
    kept = raw.drop(REASONS) if REASONS in raw.columns else raw
    return _as_text(kept).inner_join(ibis.memtable(reasons), ROW_NUMBER).order_by(ROW_NUMBER)


def _as_text(raw: ibis.Table) -> ibis.Table:
    texts = {name: as_text(raw[name]) for name in raw.columns if name != ROW_NUMBER}
    return raw.select(**texts, **{ROW_NUMBER: raw[ROW_NUMBER]})


def _rows(count: int, rejected: _Rejected, reasons: dict[str, int]) -> Rows:
    quarantined, duplicates = len(rejected.quarantined), len(rejected.duplicates)
    return {
        "in": count,
        "clean": count - quarantined - duplicates,
        "quarantined": quarantined,
        "duplicates": duplicates,
        "reasons": reasons,
    }


def _per_partition(
    numbers: Numbers, partitions: pa.DictionaryArray, rejected: _Rejected
) -> tuple[PartitionRows, ...]:
    names = partitions.dictionary.to_pylist()
    codes = partitions.indices.to_numpy(zero_copy_only=False)

    def count(rows: Numbers) -> Numbers:
        found = codes if rows is numbers else codes[np.searchsorted(numbers, rows)]
        return np.bincount(found, minlength=len(names)).astype(np.int64)

    read, bad, copies = count(numbers), count(rejected.quarantined), count(rejected.duplicates)
    return tuple(
        PartitionRows(name, int(r), int(r - b - c), int(b), int(c))
        for name, r, b, c in zip(names, read, bad, copies, strict=True)
    )


def _expectation(outcome: Outcome) -> ExpectationReport:
    check = outcome.check
    return ExpectationReport(
        type=check.type,
        columns=tuple(columns_of(check.kwargs)),
        claim=check.claim,
        reason=check.reason,
        success=outcome.success,
        unexpected=None if outcome.rows is None else len(outcome.rows),
        observed=outcome.observed,
    )


def _examples(
    raw: ibis.Table, outcomes: Sequence[Outcome], numbers: Numbers
) -> dict[str, tuple[dict[str, str | None], ...]]:
    """For each reason the first rows that have it."""
    wanted: dict[str, list[int]] = {}
    for outcome in outcomes:
        if outcome.rows is not None and len(outcome.rows):
            first = wanted.setdefault(outcome.check.reason, [])
            first += numbers[outcome.rows[:_EXAMPLES]].tolist()
    chosen = sorted({number for first in wanted.values() for number in first})
    if not chosen:
        return {}
    examples = _as_text(raw.filter(raw[ROW_NUMBER].isin(chosen)))
    examples = examples.relocate(PARTITION, ROW_NUMBER)
    found: list[dict[str, Any]] = examples.to_pyarrow().to_pylist()
    by_number = {row[ROW_NUMBER]: row | {ROW_NUMBER: str(row[ROW_NUMBER])} for row in found}
    return {
        reason: tuple(by_number[number] for number in sorted(set(first))[:_EXAMPLES])
        for reason, first in wanted.items()
    }
