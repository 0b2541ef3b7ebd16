"""The feature specification: every feature declared once, everything else derived from it.

A `FeatureSpec` is read from ``params:features`` (``conf/*/parameters_features.yml``) by the
pipelines and from the artifact's own copy by the service and the monitor. The Great Expectations
suite, the Feast objects, the encoder, the layer widths, the request schema and the drift columns
are all computed from it, so adding a feature is one line of YAML.

Vocabulary
    owner      whose property a column is: the *user*'s, the *item*'s, or the *context*'s, which
               comes with the request (for all candidates alike, or for each candidate)
    key        a column that identifies an entity; ``by`` of an aggregate lists keys
    aggregate  a column computed from the log, as of strictly before each exposure
    ratio      a numeric column computed from two others
    cross      a wide feature: the conjunction of the values of several columns
               (Cheng et al. 2016, section 3.1)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from functools import cached_property
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fathom.config import Task

Owner = Literal["user", "item", "context"]
Kind = Literal["categorical", "multi", "numeric", "sequence"]
Log = Literal["interactions", "exposures"]
Measure = Literal["count", "sum", "mean", "rate", "recency_days", "last"]
M = TypeVar("M", bound=BaseModel)
Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=63)]

#: Columns that every canonical log has beside those of the spec.
EVENT_TIMESTAMP = "event_timestamp"
ARRIVAL_TIMESTAMP = "arrival_timestamp"
INCLUSION_PROBABILITY = "inclusion_probability"
#: The stamp on a row of attributes or features, in Feast's terms.
CREATED_TIMESTAMP = "created_timestamp"
RESERVED = frozenset(
    {
        EVENT_TIMESTAMP,
        ARRIVAL_TIMESTAMP,
        INCLUSION_PROBABILITY,
        CREATED_TIMESTAMP,
        *("probability", "partition", "row_number", "reasons", "split"),
    }
)

#: Hashed crosses together; ids of the wide table are 32-bit, and vocabularies need some too.
MOST_BUCKETS = 2**30
#: Feature views of attributes, and whose they are. All other views are of aggregates.
ATTRIBUTES: dict[str, Owner] = {"users": "user", "items": "item"}


class SpecError(ValueError):
    """A feature specification is wrong; the message lists every fault at once."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        super().__init__(f"feature spec: {count}\n" + "\n".join(f"  - {fault}" for fault in faults))


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Entities(_Frozen):
    """Names of the key columns: who was shown what, in which request."""

    user: Name
    item: Name
    request: Name


class Label(_Frozen):
    """The outcome of an exposure.

    ``values`` is the closed set a binary label may take (its last value is the positive one);
    a regression label has none.
    """

    name: Name
    values: tuple[int, int] | None = (0, 1)


class Embedding(_Frozen):
    """One row of width ``width`` for each value; columns that name the same table share it."""

    table: Name
    width: int = Field(ge=1, le=4096)


class Aggregate(_Frozen):
    """A summary of the log by key, as of strictly before each exposure.

    Args:
        of: the log that is summarised.
        by: key columns; the summary is of the log's rows with the same values.
        measure: ``count`` of rows, ``sum`` or ``mean`` of ``column``, ``rate`` of positive labels,
            ``recency_days`` since the last row, or the ``last`` ``n`` values of ``column``
            (newest first).
        window_days: how far back the summary reaches; everything when absent. A multiple of
            the spec's ``grain_days``.
        prior, prior_weight: ``rate`` is (positives + prior·prior_weight) / (rows + prior_weight).
    """

    of: Log = "interactions"
    by: tuple[Name, ...] = Field(min_length=1)
    measure: Measure
    column: Name | None = None
    window_days: int | None = Field(default=None, ge=1)
    n: int | None = Field(default=None, ge=1, le=1000)
    prior: float = Field(default=0.5, ge=0, le=1)
    prior_weight: float = Field(default=0.0, ge=0)

    @property
    def view(self) -> str:
        """Name of the feature view that holds all aggregates of one log by the same keys."""
        return "_".join((*self.by, self.of))

    def faults(self) -> list[str]:
        """What is wrong with this aggregate on its own, in words."""
        found = []
        if self.measure in {"sum", "mean", "last"} and self.column is None:
            found.append(f"measure '{self.measure}' needs 'column', the log's column it reads")
        if self.measure in {"count", "rate", "recency_days"} and self.column is not None:
            found.append(
                f"measure '{self.measure}' reads no column; remove 'column: {self.column}'"
            )
        if self.measure == "last" and self.n is None:
            found.append("measure 'last' needs 'n', how many values to keep")
        if self.measure == "last" and len(self.by) > 1:
            found.append(f"measure 'last' is by one key, not by {list(self.by)}")
        if self.measure != "last" and self.n is not None:
            found.append(f"measure '{self.measure}' keeps no values; remove 'n: {self.n}'")
        if self.measure in {"last", "recency_days"} and self.window_days is not None:
            found.append(f"measure '{self.measure}' has no window; remove 'window_days'")
        if self.measure == "rate" and self.of != "exposures":
            found.append("measure 'rate' is of labels, so it needs 'of: exposures'")
        if self.measure == "rate" and self.prior_weight == 0:
            found.append("measure 'rate' needs a 'prior_weight' above 0, or new keys have no rate")
        return found


class Ratio(_Frozen):
    """``of / (to + plus)``, both numeric columns; a missing ``of`` or ``to`` counts as 0."""

    of: Name
    to: Name
    plus: float = Field(default=1.0, gt=0)


class Column(_Frozen):
    """One feature.

    Args:
        kind: ``categorical`` (one value), ``multi`` (a set of values), ``numeric``, or
            ``sequence`` (an ordered list of values, newest first).
        owner: whose property it is; derived, and so not given, for aggregates and ratios.
        nullable, values, minimum, maximum: the domain that validation enforces on raw rows.
            ``values`` closes the set of a categorical column; requests outside it are refused.
        embedding: table and width in the deep part; ``embedding: 16`` is short for a table of its
            own. Without one, a categorical column gets a table of width 8.
        min_count: values seen less often in training share the unknown id.
        buckets: right-open boundaries that make a numeric column categorical inside crosses;
            without them, powers of two.
        wide, deep: which part of the model reads the column by itself. Crosses read it anyway.
    """

    name: Name
    kind: Kind
    owner: Owner | None = None
    description: str = ""
    nullable: bool = True
    values: tuple[str, ...] | None = Field(default=None, min_length=1)
    minimum: float | None = None
    maximum: float | None = None
    embedding: Embedding | None = None
    min_count: int = Field(default=2, ge=1)
    buckets: tuple[float, ...] | None = Field(default=None, min_length=1)
    wide: bool = False
    deep: bool = True
    aggregate: Aggregate | None = None
    ratio: Ratio | None = None

    @property
    def is_raw(self) -> bool:
        """Whether the column is read from a source rather than computed."""
        return self.aggregate is None and self.ratio is None

    @property
    def is_numeric(self) -> bool:
        """Whether the column holds numbers rather than ids."""
        return self.kind == "numeric"

    def faults(self) -> list[str]:
        """What is wrong with this column on its own, in words."""
        found = self.aggregate.faults() if self.aggregate else []
        if self.name in RESERVED:
            found.append("the name is reserved; choose another")
        if self.aggregate and self.ratio:
            found.append("is both an aggregate and a ratio; keep one")
        if self.is_raw and self.owner is None:
            found.append("needs 'owner': user, item or context")
        if not self.is_raw and self.owner is not None:
            found.append(f"its owner follows from its keys; remove 'owner: {self.owner}'")
        if self.ratio and self.kind != "numeric":
            found.append(f"a ratio is numeric, not {self.kind}")
        if self.aggregate and (self.aggregate.measure == "last") != (self.kind == "sequence"):
            found.append(f"measure '{self.aggregate.measure}' does not give a {self.kind} column")
        if self.aggregate and self.aggregate.measure != "last" and self.kind != "numeric":
            found.append(f"measure '{self.aggregate.measure}' is numeric, not {self.kind}")
        if self.is_numeric and (self.values or self.embedding):
            found.append("a numeric column has neither 'values' nor 'embedding'")
        if self.is_numeric and self.wide:
            found.append("a numeric column is wide only through a cross; remove 'wide: true'")
        if not self.is_numeric and (self.minimum is not None or self.maximum is not None):
            found.append(f"'minimum' and 'maximum' are for numeric columns, not {self.kind}")
        if not self.is_numeric and self.buckets:
            found.append(f"'buckets' are for numeric columns, not {self.kind}")
        if self.buckets and list(self.buckets) != sorted(set(self.buckets)):
            found.append(f"'buckets' must rise: {list(self.buckets)}")
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            found.append(f"'minimum' {self.minimum} is above 'maximum' {self.maximum}")
        return found


class Cross(_Frozen):
    """The conjunction of the values of two or more columns, a feature of the wide part.

    ``buckets`` hashes the keys into that many ids. Without it, keys seen ``min_count`` times in
    training get an id each, and the rest share the unknown id.
    """

    columns: tuple[Name, ...] = Field(min_length=2, max_length=4)
    min_count: int = Field(default=4, ge=1)
    buckets: int | None = Field(default=None, ge=2, le=MOST_BUCKETS)

    @property
    def name(self) -> str:
        """``a_x_b``: the columns in the order of the spec."""
        return "_x_".join(self.columns)


class _Settings(_Frozen):
    task: Task = "binary"
    maintainer: str = Field(default="", max_length=200)
    grain_days: int = Field(default=1, ge=1)
    max_age_days: dict[str, Annotated[float, Field(gt=0, le=36_500)]] = {}


class FeatureSpec(_Settings):
    """All features of one deployment. See the module's docstring.

    Args:
        maintainer: who answers for the features, an address say; Feast shows it as their owner.
        grain_days, grain_origin: aggregates advance in steps of this size, counted from this
            moment: those of an exposure cover the log up to the last step before it.
        max_age_days: feature view → how old its newest row may be when it is read; an older one
            is missing, in training as in serving. Views without a line never age.

    Raises:
        SpecError: (inside pydantic's ValidationError) with all faults of all lines together.
    """

    entities: Entities
    label: Label
    grain_origin: datetime = datetime(1970, 1, 1, tzinfo=timezone.utc)
    columns: tuple[Column, ...] = Field(min_length=1)
    crosses: tuple[Cross, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _check_everything_at_once(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            raise SpecError([f"expected a mapping, got {type(raw).__name__}"])
        return _checked(dict(raw))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read what `to_json` wrote."""
        return cls.model_validate(json.loads(text))

    def to_json(self) -> str:
        """The spec as canonical JSON: the same text for the same spec, on any machine."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=1)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of `to_json`, in hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @cached_property
    def by_name(self) -> dict[str, Column]:
        """The columns by name, in the order of the spec."""
        return {column.name: column for column in self.columns}

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The user, item and request key columns."""
        return (self.entities.user, self.entities.item, self.entities.request)

    def owner(self, name: str) -> Owner:
        """Whose property a column or key is.

        Aggregates and ratios belong to the user if any of their inputs does, else to the context
        if any does, else to the item.

        Raises:
            KeyError: the spec has no such column or key.
        """
        if name == self.entities.user:
            return "user"
        if name == self.entities.item:
            return "item"
        if name == self.entities.request:
            return "context"
        column = self.by_name[name]
        if column.owner is not None:
            return column.owner
        inputs = column.aggregate.by if column.aggregate else ()
        if column.ratio:
            inputs = (column.ratio.of, column.ratio.to)
        owners = {self.owner(key) for key in inputs}
        return next(owner for owner in ("user", "context", "item") if owner in owners)

    def raw_columns(self, *owners: Owner) -> tuple[Column, ...]:
        """Columns that are read from a source, of the given owners (all when none is given)."""
        return tuple(c for c in self.columns if c.is_raw and (not owners or c.owner in owners))

    @cached_property
    def aggregates(self) -> tuple[Column, ...]:
        """Columns computed from a log."""
        return tuple(column for column in self.columns if column.aggregate)

    @cached_property
    def views(self) -> dict[str, tuple[Column, ...]]:
        """Aggregates grouped into feature views: those of one log by the same keys."""
        grouped: dict[str, list[Column]] = {}
        for column in self.aggregates:
            assert column.aggregate is not None
            grouped.setdefault(column.aggregate.view, []).append(column)
        return {view: tuple(columns) for view, columns in grouped.items()}

    def held(self, view: str) -> tuple[Column, ...]:
        """Columns that a feature view holds: attributes but for the key, or aggregates."""
        if view not in ATTRIBUTES:
            return self.views[view]
        columns = self.raw_columns(ATTRIBUTES[view])
        return tuple(column for column in columns if column.name not in self.keys)

    def max_age(self, view: str) -> timedelta | None:
        """How old a row of a view may be when it is read; None if it never ages."""
        days = self.max_age_days.get(view)
        return None if days is None else timedelta(days=days)

    @cached_property
    def tables(self) -> dict[str, tuple[int, tuple[Column, ...]]]:
        """Embedding tables of the deep part: name → (width, the columns that share it)."""
        tables: dict[str, tuple[int, list[Column]]] = {}
        for column in self.columns:
            if not column.is_numeric and column.deep:
                embedding = _embedding(column)
                tables.setdefault(embedding.table, (embedding.width, []))[1].append(column)
        return {name: (width, tuple(columns)) for name, (width, columns) in tables.items()}

    @property
    def grain(self) -> timedelta:
        """The step in which aggregates advance."""
        return timedelta(days=self.grain_days)


def _checked(raw: dict[str, Any]) -> dict[str, Any]:
    """Collect the faults of every line, then of the lines together; return parsed parts."""
    faults: list[str] = []
    parsed: dict[str, Any] = dict(raw)
    parts = {"entities", "label", "grain_origin", "columns", "crosses"}
    _parse(_Settings, {k: v for k, v in raw.items() if k not in parts}, "spec", faults)
    if "grain_origin" in raw:
        parsed["grain_origin"] = _moment(raw["grain_origin"], faults)
    for field, model in (("entities", Entities), ("label", Label)):
        if field in raw:
            parsed[field] = _parse(model, raw[field], field, faults)
        else:
            faults.append(f"spec: {field}: Field required")
    columns = _parse_list(Column, raw, "columns", faults)
    crosses = _parse_list(Cross, raw, "crosses", faults)
    if not raw.get("columns"):
        faults.append("columns: needs one line or more")
    for column in columns:
        faults.extend(f"{column.name}: {fault}" for fault in column.faults())
    entities, label = parsed.get("entities"), parsed.get("label")
    if isinstance(entities, Entities):
        faults.extend(_key_faults(columns, entities))
    if isinstance(label, Label):
        taken = {column.name for column in columns}
        faults.extend(_label_faults(label, raw.get("task", "binary"), taken, entities))
    known = {_raw_name(line) for line in _lines(raw, "columns")}
    faults.extend(_aggregate_faults(columns, entities, known, raw.get("grain_days", 1)))
    faults.extend(_age_faults(columns, raw.get("max_age_days", {})))
    faults.extend(_ratio_faults(columns, known))
    faults.extend(_sharing_faults(columns))
    faults.extend(_cross_faults(crosses, known))
    if faults:
        raise SpecError(list(dict.fromkeys(faults)))
    return parsed | {"columns": tuple(columns), "crosses": tuple(crosses)}


def _key_faults(columns: list[Column], entities: Entities) -> list[str]:
    owners: dict[str, Owner] = {
        entities.user: "user",
        entities.item: "item",
        entities.request: "context",
    }
    faults = [f"entities: '{key}' is reserved; choose another" for key in owners if key in RESERVED]
    if len(owners) < 3:
        faults.append(f"entities: user, item and request must differ: {sorted(owners)}")
    for column in columns:
        owner = owners.get(column.name)
        if owner and (column.kind, column.owner) != ("categorical", owner):
            faults.append(f"{column.name}: is a key, so it is categorical with 'owner: {owner}'")
    return faults


def _label_faults(label: Label, task: Any, columns: set[str], entities: Any) -> list[str]:
    faults = []
    if label.name in RESERVED:
        faults.append("the name is reserved; choose another")
    if task == "binary" and label.values is None:
        faults.append("a binary task needs 'values', the positive last")
    if task == "regression" and label.values is not None:
        faults.append("a regression label has 'values: null'")
    if label.values is not None and label.values[0] == label.values[1]:
        faults.append(f"'values' must differ: {list(label.values)}")
    if label.name in columns:
        faults.append("is also a column, which would leak the answer")
    if isinstance(entities, Entities) and label.name in dict(entities).values():
        faults.append("is also a key")
    return [f"label {label.name}: {fault}" for fault in faults]


def _aggregate_faults(
    columns: list[Column], entities: Any, known: set[Any], grain_days: Any
) -> list[str]:
    faults = []
    keys = set(dict(entities).values()) if isinstance(entities, Entities) else None
    by_name = {column.name: column for column in columns}
    views: dict[str, tuple[tuple[str, ...], str]] = {}
    for column in columns:
        aggregate = column.aggregate
        if aggregate is None:
            continue
        by = aggregate.by
        for key in by:
            if keys is not None and key not in keys | known:
                faults.append(f"{column.name}: by '{key}', which is no key and no column")
            elif key in by_name and not (
                by_name[key].is_raw and by_name[key].kind == "categorical"
            ):
                faults.append(f"{column.name}: by '{key}', which is not a raw categorical column")
        if len(set(by)) < len(by):
            faults.append(f"{column.name}: by {list(by)}, which names a key twice")
        other, first = views.setdefault(aggregate.view, (by, column.name))
        if other != by:
            faults.append(
                f"{column.name}: by {list(by)} makes the view '{aggregate.view}', and so does by "
                f"{list(other)} at {first}; rename a key"
            )
        window = aggregate.window_days
        if window and type(grain_days) is int and grain_days > 0 and window % grain_days:
            faults.append(
                f"{column.name}: window_days {window} is no multiple of grain_days {grain_days}"
            )
    return faults


def _age_faults(columns: list[Column], ages: Any) -> list[str]:
    views = [*ATTRIBUTES, *dict.fromkeys(c.aggregate.view for c in columns if c.aggregate)]
    named = list(ages) if isinstance(ages, Mapping) else []
    return [
        f"max_age_days: '{view}' is no feature view; there are {views}"
        for view in named
        if view not in views
    ]


def _ratio_faults(columns: list[Column], known: set[Any]) -> list[str]:
    faults = []
    by_name = {column.name: column for column in columns}
    for column in columns:
        for name in (column.ratio.of, column.ratio.to) if column.ratio else ():
            if name not in known:
                faults.append(f"{column.name}: ratio of '{name}', which is no column")
            elif name in by_name and not (by_name[name].is_numeric and not by_name[name].ratio):
                faults.append(f"{column.name}: ratio of '{name}', which is not a plain number")
    return faults


def _sharing_faults(columns: list[Column]) -> list[str]:
    names = [column.name for column in columns]
    faults = [
        f"{name}: declared {names.count(name)} times; names are unique"
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    widths: dict[str, tuple[int, str]] = {}
    for column in columns:
        if not column.is_numeric and (column.deep or column.embedding):
            table, width = _embedding(column).table, _embedding(column).width
            expected, first = widths.setdefault(table, (width, column.name))
            if width != expected:
                faults.append(
                    f"{column.name}: embedding table '{table}' has width {width} here and "
                    f"{expected} at {first}"
                )
    return faults


def _cross_faults(crosses: list[Cross], known: set[Any]) -> list[str]:
    faults = []
    names = [cross.name for cross in crosses]
    for cross in crosses:
        for name in cross.columns:
            if name not in known:
                faults.append(f"cross {cross.name}: '{name}' is no column")
        if len(set(cross.columns)) < len(cross.columns):
            faults.append(f"cross {cross.name}: a column is crossed with itself")
        if names.count(cross.name) > 1:
            faults.append(f"cross {cross.name}: declared {names.count(cross.name)} times")
        if cross.name in known:
            faults.append(f"cross {cross.name}: a column has the same name")
    buckets = sum(cross.buckets or 0 for cross in crosses)
    if buckets > MOST_BUCKETS:
        faults.append(f"crosses: {buckets} buckets in all; {MOST_BUCKETS} is the most")
    return faults


def _embedding(column: Column) -> Embedding:
    return column.embedding or Embedding(table=column.name, width=8)


def _raw_name(line: Any) -> str | None:
    name = line.get("name") if isinstance(line, Mapping) else getattr(line, "name", None)
    return name if isinstance(name, str) else None


def _moment(value: Any, faults: list[str]) -> datetime | None:
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
        aware = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
        return aware.astimezone(timezone.utc)
    except (TypeError, ValueError, OverflowError):
        faults.append(f"grain_origin: {value!r} is no ISO 8601 moment, as 2017-01-02T05:00:00Z")
        return None


def _lines(raw: dict[str, Any], field: str) -> list[Any]:
    lines = raw.get(field)
    return list(lines) if isinstance(lines, list | tuple) else []


def _parse_list(model: type[M], raw: dict[str, Any], field: str, faults: list[str]) -> list[M]:
    if not isinstance(raw.get(field, []), list | tuple | None):
        faults.append(f"{field}: expected a list, got {type(raw[field]).__name__}")
    parsed = [
        _parse(model, line, _raw_name(line) or f"{field}[{i}]", faults)
        for i, line in enumerate(_lines(raw, field))
    ]
    return [line for line in parsed if line is not None]


def _parse(model: type[M], line: Any, where: str, faults: list[str]) -> M | None:
    if isinstance(line, model):
        return line
    try:
        return model.model_validate(_from_yaml(line))
    except ValidationError as error:
        for fault in error.errors():
            at = ".".join(str(part) for part in fault["loc"])
            found = repr(fault["input"])
            found = found if len(found) <= 80 else f"{found[:77]}..."
            shown = f" (got {found})" if fault["type"] != "missing" else ""
            faults.append(f"{where}: {f'{at}: ' if at else ''}{fault['msg']}{shown}")
    return None


def _from_yaml(line: Any) -> Any:
    """YAML has lists, the frozen models have tuples; ``embedding: 16`` is a table of its own."""
    if isinstance(line, list):
        return tuple(_from_yaml(value) for value in line)
    if isinstance(line, Mapping):
        converted = {key: _from_yaml(value) for key, value in line.items()}
        if type(converted.get("embedding")) is int:
            converted["embedding"] = {
                "table": converted.get("name"),
                "width": converted["embedding"],
            }
        return converted
    return line
