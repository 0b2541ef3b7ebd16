"""FeatureSpec → the columns that a raw table must have, and what their values must be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from fathom.spec import (
    ARRIVAL_TIMESTAMP,
    EVENT_TIMESTAMP,
    INCLUSION_PROBABILITY,
    Column,
    FeatureSpec,
)
from fathom.validation.config import Rule, TableName, TableRules, ValidationConfig
from fathom.validation.partitions import PARTITION

#: Canonical types. ``found`` keeps what the raw column is: number, moment or text.
Type = Literal["text", "number", "whole", "list", "moment", "found"]


@dataclass(frozen=True)
class Field:
    """One column of a canonical table."""

    name: str
    type: Type
    nullable: bool = True
    optional: bool = False
    values: tuple[str, ...] | tuple[int, ...] | None = None
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None


def fields_of(name: TableName, spec: FeatureSpec, config: ValidationConfig) -> tuple[Field, ...]:
    """The columns of a clean table, in order; ``partition`` comes on top of them.

    A name that is both a key and a column of the spec appears once: as a key that obeys the
    column's domain.
    """
    fields: dict[str, Field] = {}
    # A column that one aggregate adds up and another lists is a number.
    aggregated = sorted(_aggregated(name, spec), key=lambda field: field.type == "text")
    for field in (*_canonical(name, spec), *aggregated):
        fields.setdefault(field.name, field)
    for rule in rules_of(name, config).rules:
        for column in columns_of(rule.kwargs):
            if column not in fields and column != PARTITION:
                fields[column] = Field(column, "number" if _compares_numbers(rule) else "found")
    return tuple(fields.values())


def required_columns(
    name: TableName, spec: FeatureSpec, config: ValidationConfig
) -> tuple[str, ...]:
    """Raw columns without which a table cannot be validated, for `read_partitions`."""
    return tuple(field.name for field in fields_of(name, spec, config) if not field.optional)


def rules_of(name: TableName, config: ValidationConfig) -> TableRules:
    """The rules of a table; those of a table that conf does not name are the defaults."""
    return config.tables.get(name, TableRules())


def duplicates_key(name: TableName, spec: FeatureSpec, config: ValidationConfig) -> tuple[str, ...]:
    """Columns in which duplicates are alike; none where all rows are kept."""
    configured = rules_of(name, config).duplicates
    if configured is not None:
        return configured
    entities = spec.entities
    return {
        "exposures": (entities.request, entities.user, entities.item),
        "interactions": (),
        "users": (entities.user, EVENT_TIMESTAMP),
        "items": (entities.item, EVENT_TIMESTAMP),
    }[name]


def columns_of(kwargs: dict[str, Any]) -> list[str]:
    """Columns that an expectation's arguments name, those of a ``row_condition`` included."""
    return list(dict.fromkeys(_columns_in(kwargs)))


def _columns_in(value: Any) -> Iterator[str]:
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _columns_in(entry)
    if not isinstance(value, dict):
        return
    for key, entry in value.items():
        if key in {"column", "column_A", "column_B"} and isinstance(entry, str):
            yield entry
        elif key == "column" and isinstance(entry, dict) and "name" in entry:
            yield str(entry["name"])
        elif key == "column_list" and isinstance(entry, list | tuple):
            yield from (str(column) for column in entry)
        else:
            yield from _columns_in(entry)


def _compares_numbers(rule: Rule) -> bool:
    bounds = (rule.kwargs.get("min_value"), rule.kwargs.get("max_value"))
    values = rule.kwargs.get("value_set") or ()
    return any(type(value) in {int, float} for value in (*bounds, *values))


def _canonical(name: TableName, spec: FeatureSpec) -> Iterator[Field]:
    if name == "exposures":
        yield from (_key(spec, key) for key in _exposure_keys(spec))
        yield from _moments()
        yield from (_column(column) for column in spec.raw_columns("context"))
        yield Field(
            spec.label.name,
            "whole" if spec.task == "binary" else "number",
            nullable=False,
            values=spec.label.values,
        )
        yield Field(
            INCLUSION_PROBABILITY, "number", nullable=False, optional=True, above=0.0, maximum=1.0
        )
    elif name == "interactions":
        yield from (_key(spec, key) for key in (spec.entities.user, spec.entities.item))
        yield from _moments()
    else:
        owner: Literal["user", "item"] = "user" if name == "users" else "item"
        yield _key(spec, spec.entities.user if owner == "user" else spec.entities.item)
        yield Field(EVENT_TIMESTAMP, "moment", nullable=False)
        yield from (_column(column) for column in spec.raw_columns(owner))


def _exposure_keys(spec: FeatureSpec) -> tuple[str, str, str]:
    return (spec.entities.request, spec.entities.user, spec.entities.item)


def _moments() -> tuple[Field, Field]:
    return (
        Field(EVENT_TIMESTAMP, "moment", nullable=False),
        Field(ARRIVAL_TIMESTAMP, "moment", optional=True),
    )


def _key(spec: FeatureSpec, key: str) -> Field:
    declared = spec.by_name.get(key)
    field = Field(key, "text", nullable=False)
    return replace(field, values=declared.values) if declared else field


def _column(column: Column) -> Field:
    kinds: dict[str, Type] = {"categorical": "text", "numeric": "number"}
    return Field(
        column.name,
        kinds.get(column.kind, "list"),
        nullable=column.nullable,
        values=column.values,
        minimum=column.minimum,
        maximum=column.maximum,
    )


def _aggregated(log: TableName, spec: FeatureSpec) -> Iterator[Field]:
    """What aggregates read from this log itself.

    Attributes of users and items are left to their own tables, from which features joins them
    as of each row.
    """
    for column in spec.aggregates:
        aggregate = column.aggregate
        if aggregate is None or aggregate.of != log:
            continue
        for name in (*aggregate.by, aggregate.column):
            if name is None:
                continue
            if name == spec.entities.request:
                yield _key(spec, name)
            elif name in spec.by_name:
                if spec.by_name[name].is_raw and spec.owner(name) == "context":
                    yield _column(spec.by_name[name])
            elif name not in spec.keys:
                adds = aggregate.measure in {"sum", "mean"}
                yield Field(name, "number" if adds else "text")
