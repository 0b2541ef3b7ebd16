"""Fields → canonical values, and the expectations that raw rows must meet.

Whether a raw value can be read as the column's type is worked out next to the data, as helper
columns named ``price: number`` that are expected to be true everywhere; so a value that would be
lost by the cast shows up in Great Expectations' own report.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

from fathom.spec import ARRIVAL_TIMESTAMP, EVENT_TIMESTAMP, INCLUSION_PROBABILITY
from fathom.validation.config import Rule, TableName, ValidationConfig
from fathom.validation.fields import Field, columns_of, rules_of
from fathom.validation.partitions import UTC, as_text

if TYPE_CHECKING:
    import ibis

#: pandas and Feast count nanoseconds in 64 bits, which begin in 1677; Python ends in 9999.
_FIRST_MOMENT = datetime(1678, 1, 1, tzinfo=timezone.utc)
_LAST_MOMENT = datetime.max.replace(tzinfo=timezone.utc)
_NOUNS = {
    "text": "text",
    "number": "number",
    "whole": "whole number",
    "list": "list",
    "moment": "timestamp",
}
_SHOWN_VALUES = 5

_NOT_NULL = "expect_column_values_to_not_be_null"
_IN_SET = "expect_column_values_to_be_in_set"
_BETWEEN = "expect_column_values_to_be_between"
_PAIR = "expect_column_pair_values_a_to_be_greater_than_b"


@dataclass(frozen=True)
class Check:
    """One expectation: Great Expectations' type and arguments, in words, and as a reason.

    Args:
        type, kwargs: as Great Expectations has them.
        claim: what holds for a good row, as "price is finite".
        reason: what is wrong with a row that breaks it, as "price is not finite".
    """

    type: str
    kwargs: dict[str, Any]
    claim: str
    reason: str


@dataclass(frozen=True)
class Plan:
    """What a raw table becomes.

    Args:
        values: canonical columns by name, as Ibis expressions over the raw table.
        frame: columns that the expectations read, by name.
        categories: those of ``frame`` that hold few different texts.
        checks: the expectations, in the order in which reasons are given.
    """

    values: dict[str, Any] = field(default_factory=dict)
    frame: dict[str, Any] = field(default_factory=dict)
    categories: set[str] = field(default_factory=set)
    checks: list[Check] = field(default_factory=list)


def plan_checks(
    raw: ibis.Table,
    fields: tuple[Field, ...],
    name: TableName,
    config: ValidationConfig,
    now: datetime,
) -> Plan:
    """Derive canonical columns and expectations for one raw table."""
    import ibis

    plan = Plan()
    rules = rules_of(name, config).rules
    plain = {column for rule in rules for column in columns_of(rule.kwargs)}
    for column in fields:
        if column.name not in raw.columns:  # an optional one
            if column.name == INCLUSION_PROBABILITY:  # nothing was sampled
                plan.values[column.name] = ibis.literal(1.0)
            continue
        kind = _kind(column, raw[column.name])
        plan.values[column.name] = cast(raw[column.name], kind)
        _add_readable(plan, column, kind, raw[column.name])
        _add_domain(plan, column)
        if column.name in plain:
            _read(plan, column.name)
    _add_time(plan, name, config, now)
    for rule in rules:
        words = _words(rule)
        plan.checks.append(Check(rule.type, dict(rule.kwargs), words, rule.reason or words))
    plan.categories.difference_update(plain)
    return plan


def cast(column: Any, kind: str) -> Any:
    """A raw column in its canonical type; null where a value cannot be read as one."""
    import ibis

    found = column.type()
    if kind == "text":
        return ibis.null("string") if found.is_nested() else as_text(column)
    if kind == "list":
        readable = found.is_array() or found.is_string()
        return column.try_cast("array<string>") if readable else ibis.null("array<string>")
    if kind == "moment":
        readable = found.is_timestamp() or found.is_date() or found.is_string()
        moment = column.try_cast(UTC) if readable else ibis.null(UTC)
        plausible = moment.between(ibis.literal(_FIRST_MOMENT), ibis.literal(_LAST_MOMENT))
        return plausible.ifelse(moment, ibis.null(UTC))
    readable = found.is_numeric() or found.is_boolean() or found.is_string()
    if kind == "whole" and found.is_integer():
        return column.try_cast("int64")
    number = column.try_cast("float64") if readable else ibis.null("float64")
    if kind == "number":
        return number
    whole = (number % 1 == 0) & (number.abs() < 2.0**53)
    return whole.ifelse(number, ibis.null("float64")).try_cast("int64")


def _kind(column: Field, raw: Any) -> str:
    if column.type != "found":
        return column.type
    found = raw.type()
    if found.is_numeric() or found.is_boolean():
        return "number"
    if found.is_timestamp() or found.is_date():
        return "moment"
    return "list" if found.is_array() else "text"


def _add_readable(plan: Plan, column: Field, kind: str, raw: Any) -> None:
    """A value is there, can be read as the column's type, and is finite."""
    import ibis

    name, found, value = column.name, raw.type(), plan.values[column.name]
    finite = _finite(raw) if kind in {"number", "whole"} or found.is_floating() else None
    always = kind == "text" and not found.is_nested()
    if not column.nullable:
        # Of the raw value: one that cannot be read is not missing.
        given = name if always and finite is None else f"{name}: raw"
        plan.frame[given] = raw.notnull().ifelse(1.0, ibis.null("float64")).cast("float32")
        kwargs = {"column": given}
        _add(plan, _NOT_NULL, kwargs, f"{name} is given", f"{name} is missing")
    if not always:
        noun = _NOUNS[kind]
        readable = raw.isnull() | value.notnull()
        readable = readable if finite is None else readable | ~finite
        _add_flag(plan, name, noun, readable, f"is a {noun}", f"is no {noun}")
    if finite is not None:
        _add_flag(plan, name, "finite", finite, "is finite", "is not finite")
        # NaN and infinity have had their reason: bounds are not asked about them.
        plan.values[name] = finite.ifelse(value, ibis.null(value.type()))


def _finite(raw: Any) -> Any:
    import ibis

    if raw.type().is_nested():
        return ibis.literal(True)
    number = raw.try_cast("float64")
    return ~(number.isnan() | number.isinf()).fill_null(False)


def _add(plan: Plan, type: str, kwargs: dict[str, Any], claim: str, reason: str) -> None:
    plan.checks.append(Check(type, kwargs, claim, reason))


def _add_flag(plan: Plan, name: str, what: str, flag: Any, claim: str, reason: str) -> None:
    helper = f"{name}: {what}"
    plan.frame[helper] = flag
    kwargs = {"column": helper, "value_set": [True]}
    _add(plan, _IN_SET, kwargs, f"{name} {claim}", f"{name} {reason}")


def _read(plan: Plan, name: str) -> None:
    """Hand the canonical values of a column to the expectations."""
    plan.frame[name] = plan.values[name]


def _add_domain(plan: Plan, column: Field) -> None:
    """The closed set and the bounds that the spec declares."""
    name, value = column.name, plan.values[column.name]
    if column.values:
        shown = _few(column.values)
        claim, reason = f"is one of {shown}", f"is not one of {shown}"
        if column.type == "list":
            within = _within(column.values, value).fill_null(True)
            _add_flag(plan, name, "within its values", within, claim, reason)
        else:
            _read(plan, name)
            if column.type == "text":
                plan.categories.add(name)
            kwargs: dict[str, Any] = {"column": name, "value_set": list(column.values)}
            _add(plan, _IN_SET, kwargs, f"{name} {claim}", f"{name} {reason}")
    lowest = column.minimum if column.above is None else column.above
    if lowest is not None or column.maximum is not None:
        _read(plan, name)
        bounds = {"min_value": lowest, "max_value": column.maximum}
        kwargs = {"column": name, **{b: value for b, value in bounds.items() if value is not None}}
        if column.above is not None:
            kwargs["strict_min"] = True
        claim, reason = _bounds(lowest, column.maximum, strict=column.above is not None)
        _add(plan, _BETWEEN, kwargs, f"{name} {claim}", f"{name} {reason}")


def _bounds(lowest: float | None, highest: float | None, strict: bool) -> tuple[str, str]:
    if highest is None:
        return f"is at least {lowest:g}", f"is below {lowest:g}"
    if lowest is None:
        return f"is at most {highest:g}", f"is above {highest:g}"
    interval = f"{'(' if strict else '['}{lowest:g}, {highest:g}]"
    return f"is in {interval}", f"is outside {interval}"


def _within(values: tuple[Any, ...], entries: Any) -> Any:
    """Whether all entries of an array are among the values; null for no array."""
    import ibis

    # Ibis 12 writes array filters in a lambda syntax that DuckDB 2.0 refuses.
    @ibis.udf.scalar.builtin(signature=(("array<string>", "array<string>"), "boolean"))
    def list_has_all(whole, part): ...  # type: ignore[no-untyped-def]

    return list_has_all(ibis.array(list(values)), entries)


def _few(values: tuple[Any, ...]) -> str:
    rest = len(values) - _SHOWN_VALUES
    shown = ", ".join(str(value) for value in values[:_SHOWN_VALUES])
    return shown + (f" and {rest} more" if rest > 0 else "")


def _add_time(plan: Plan, name: TableName, config: ValidationConfig, now: datetime) -> None:
    """Nothing from the future, nothing from before the log began, no arrival before its event."""
    latest = now + timedelta(seconds=config.future_tolerance_seconds)
    moments = [m for m in (EVENT_TIMESTAMP, ARRIVAL_TIMESTAMP) if m in plan.values]
    for moment in moments:
        _read(plan, moment)
        kwargs: dict[str, Any] = {"column": moment, "max_value": latest}
        claim, reason = f"{moment} is not in the future", f"{moment} is in the future"
        _add(plan, _BETWEEN, kwargs, claim, reason)
        if config.earliest and name in {"exposures", "interactions"}:
            kwargs = {"column": moment, "min_value": config.earliest}
            earliest = f"{config.earliest:%Y-%m-%dT%H:%M:%SZ}"
            claim, reason = f"{moment} is from {earliest} on", f"{moment} is before {earliest}"
            _add(plan, _BETWEEN, kwargs, claim, reason)
    if ARRIVAL_TIMESTAMP in moments:
        kwargs = {
            "column_A": ARRIVAL_TIMESTAMP,
            "column_B": EVENT_TIMESTAMP,
            "or_equal": True,
            "ignore_row_if": "either_value_is_missing",
        }
        claim = f"{ARRIVAL_TIMESTAMP} is not before {EVENT_TIMESTAMP}"
        _add(plan, _PAIR, kwargs, claim, claim.replace("is not", "is"))


def _words(rule: Rule) -> str:
    """``quantity: values to be between (min_value 0, strict_min True)``."""
    columns = columns_of(rule.kwargs)
    arguments = ", ".join(
        f"{key} {value}" for key, value in rule.kwargs.items() if not key.startswith("column")
    )
    claim = rule.type.removeprefix("expect_").removeprefix("column_").replace("_", " ")
    return f"{', '.join(columns) or 'table'}: {claim}" + (f" ({arguments})" if arguments else "")
