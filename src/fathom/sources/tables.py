"""Tables of one's own: parquet, CSV or JSON lines, described by configuration alone.

`docs/how-to/use-your-own-data.md` walks through an example. The functions below the settings turn
one raw table into one canonical table each; other sources build on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from fathom.sources.canonical import (
    ALWAYS,
    PARTITION,
    UNREADABLE,
    CanonicalTables,
    Settings,
    SourceError,
    connect,
    store,
)
from fathom.sources.raw_files import UNREADABLE_LINE, RawTable, find, load
from fathom.sources.sampling import draw
from fathom.sources.times import Timestamp, instant, written
from fathom.spec import ARRIVAL_TIMESTAMP, EVENT_TIMESTAMP, INCLUSION_PROBABILITY, Name

if TYPE_CHECKING:
    import ibis.expr.types as ir
    from ibis.backends.duckdb import Backend

Partition = Literal["day", "week", "month"]

#: Rows without a readable time.
UNDATED = "undated"

_PARTITION_FORMATS: dict[Partition, str] = {"day": "%Y-%m-%d", "week": "%G-W%V", "month": "%Y-%m"}
_INSTANT = "_instant"  # the event's time where readable, while a log is being built


def _as_text(values: Any) -> Any:
    """YAML reads ``true`` and ``5`` as more than text; raw files hold their text."""
    if not isinstance(values, list | tuple):
        return values
    return tuple(str(v).lower() if isinstance(v, bool) else str(v) for v in values)


Texts = Annotated[tuple[str, ...], BeforeValidator(_as_text), Field(min_length=1)]


class Label(Settings):
    """What counts as positive.

    Args:
        name: canonical name.
        column: raw name; without one, every row of the log is a positive.
        at_least: numbers from this one on are 1, smaller ones 0.
        positive, negative: these values are 1 and 0. Without ``negative``, all others are 0.
            With neither these nor ``at_least``, the raw value is the label (0 and 1, or a number).
    """

    name: Name
    column: str | None = None
    at_least: float | None = None
    positive: Texts | None = None
    negative: Texts | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        rules = self.at_least is not None or self.positive is not None
        if self.at_least is not None and self.positive is not None:
            raise ValueError("'at_least' and 'positive' are two rules; keep one")
        if self.negative is not None and self.positive is None:
            raise ValueError("'negative' needs 'positive'")
        if self.column is None and rules:
            raise ValueError("a rule needs 'column', the raw column that it reads")
        if overlap := set(self.positive or ()) & set(self.negative or ()):
            raise ValueError(f"both positive and negative: {sorted(overlap)}")
        return self


class Log(RawTable):
    """A log: when things happened, and when the record of it arrived, if known."""

    timestamp: Timestamp
    arrival: Timestamp | None = None


class Exposures(Log):
    """The log of what was shown to whom, with the outcome."""

    label: Label


class Attributes(RawTable):
    """Users or items; without ``timestamp``, rows hold from before any log."""

    timestamp: Timestamp | None = None


class Negatives(Settings):
    """Negatives for a log of positives alone.

    For each positive of a request, ``per_positive`` items are drawn from those seen in the log
    strictly before the request's first event; those in the request are dropped. They copy the
    context columns of the request's first row.
    """

    per_positive: int = Field(default=4, ge=1, le=100)
    seed: int = Field(default=0, ge=0)


class Tables(Settings):
    """Settings of a source that needs configuration only.

    Args:
        user, item, request: canonical names of the keys, as in the spec's ``entities``.
        request_per: what one request is where ``exposures.columns`` maps none: all rows of a user
            at the same ``timestamp``, or on the same ``day`` (UTC).
        partition_by: size of a raw partition, by event time in UTC.
        exposures, interactions, users, items: the tables; users and items without one are those
            of the logs, without attributes.
        negatives: for an ``exposures`` log of positives alone.
    """

    type: Literal["tables"] = "tables"
    user: Name
    item: Name
    request: Name
    request_per: Literal["timestamp", "day"] = "timestamp"
    partition_by: Partition = "week"
    exposures: Exposures
    interactions: Log | None = None
    users: Attributes | None = None
    items: Attributes | None = None
    negatives: Negatives | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        faults = list(self._faults())
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def _faults(self) -> Iterator[str]:
        if len({self.user, self.item, self.request}) < 3:
            yield f"user, item and request must differ: {self.user}, {self.item}, {self.request}"
        keys = {
            "exposures": (self.user, self.item),
            "interactions": (self.user, self.item),
            "users": (self.user,),
            "items": (self.item,),
        }
        for name, table in self.raw_tables().items():
            for key in keys[name]:
                if key not in table.columns:
                    yield f"{name}.columns lacks the key '{key}'"
            reserved = {EVENT_TIMESTAMP, ARRIVAL_TIMESTAMP, PARTITION}
            for column in sorted(reserved & set(table.columns)):
                yield f"{name}.columns must not name '{column}', which the source fills"
            for column in sorted(set(table.separators) - set(table.columns)):
                yield f"{name}.separators names '{column}', which {name}.columns lacks"
        label = self.exposures.label
        if label.name in self.exposures.columns:
            yield f"exposures.columns names the label '{label.name}' too, which leaks the answer"
        if label.column is None and self.negatives is None:
            yield "every row is a positive: set 'negatives', or 'column' of exposures.label"
        if label.column is not None and self.negatives is not None:
            yield "exposures.label reads negatives from the log; remove 'negatives' or its 'column'"
        if self.negatives is not None and INCLUSION_PROBABILITY in self.exposures.columns:
            yield f"'negatives' fills '{INCLUSION_PROBABILITY}'; remove it from exposures.columns"

    def raw_tables(self) -> dict[str, RawTable]:
        """The tables that have files, by canonical name."""
        names = ("exposures", "interactions", "users", "items")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def files(self) -> list[Path]:
        """The files that there are to read; `read` names those that are missing."""
        return [path for name, table in self.raw_tables().items() for path in find(table, name, [])]

    def read(self) -> CanonicalTables:
        """Read all tables; rows keep the order of the files.

        Raises:
            SourceError: files or columns are missing or unreadable; all are named.
        """
        connection = connect()
        faults: list[str] = []
        raw = {
            name: load(connection, table, name, needed(table), faults)
            for name, table in self.raw_tables().items()
        }
        if faults:
            raise SourceError(faults)
        return canonical(connection, raw, self)


def canonical(connection: Backend, raw: dict[str, ir.Table], config: Tables) -> CanonicalTables:
    """Turn opened raw tables, by canonical name, into canonical ones."""
    logs = {"exposures": _exposures(raw["exposures"], config)}
    if config.interactions is not None:
        logs["interactions"] = _log(raw["interactions"], config.interactions, config).drop(_INSTANT)
    logs = {name: store(connection, name, table) for name, table in logs.items()}
    entities = {}
    for name, settings, key in (
        ("users", config.users, config.user),
        ("items", config.items, config.item),
    ):
        table = _keys_of(logs, key) if settings is None else _attributes(raw[name], settings, key)
        entities[name] = store(connection, name, table)
    for name, table in raw.items():
        if UNREADABLE_LINE in table.columns:  # a copy of the file, not a view of it
            connection.drop_table(f"raw_{name}")
    return CanonicalTables(
        exposures=logs["exposures"], interactions=logs.get("interactions"), **entities
    )


def needed(table: RawTable) -> list[str]:
    """The raw columns that a table's settings name."""
    clocks = (getattr(table, "timestamp", None), getattr(table, "arrival", None))
    label = getattr(table, "label", None)
    sources = (*clocks, label)
    return [*table.columns.values(), *(s.column for s in sources if s is not None and s.column)]


def _exposures(raw: ir.Table, config: Tables) -> ir.Table:
    """The canonical exposures of a raw log."""
    import ibis

    table = _log(raw, config.exposures, config)
    if config.request not in config.exposures.columns:
        when = table[_INSTANT]
        at = when.cast("string") if config.request_per == "timestamp" else when.strftime("%Y-%m-%d")
        table = table.mutate(**{config.request: table[config.user] + "@" + at})
    if config.negatives is not None:
        table = _with_negatives(table, config, config.negatives)
    elif INCLUSION_PROBABILITY not in table.columns:
        table = table.mutate(**{INCLUSION_PROBABILITY: ibis.literal(1.0)})
    keys = (config.request, config.user, config.item)
    rest = [name for name in table.columns if name not in {*keys, _INSTANT}]
    return table.select(*keys, *rest)


def _attributes(raw: ir.Table, settings: Attributes, key: str) -> ir.Table:
    """The canonical users or items of a raw table."""
    import ibis

    columns = _mapped(raw, settings, {key})
    if settings.timestamp is None:
        time = ibis.timestamp(ALWAYS).cast(
            "string" if UNREADABLE_LINE in raw.columns else "timestamp"
        )
    else:
        time = written(raw, settings.timestamp)
    return raw.select(**columns, **{EVENT_TIMESTAMP: _or_line(raw, time)})


def _keys_of(logs: dict[str, ir.Table], key: str) -> ir.Table:
    """The distinct keys of the logs, in order, without attributes."""
    import ibis

    tables = [log.select(key) for log in logs.values()]
    table = ibis.union(*tables, distinct=True) if len(tables) > 1 else tables[0].distinct()
    table = table.filter(table[key].notnull())
    return table.mutate(**{EVENT_TIMESTAMP: ibis.timestamp(ALWAYS)}).order_by(key)


def _log(raw: ir.Table, settings: Log, config: Tables) -> ir.Table:
    moment = instant(raw, settings.timestamp)
    columns = _mapped(raw, settings, {config.user, config.item, config.request})
    columns[EVENT_TIMESTAMP] = _or_line(raw, written(raw, settings.timestamp))
    if settings.arrival is not None:
        columns[ARRIVAL_TIMESTAMP] = written(raw, settings.arrival)
    if isinstance(settings, Exposures):
        columns[settings.label.name] = _label(raw, settings.label)
    columns[PARTITION] = moment.strftime(_PARTITION_FORMATS[config.partition_by]).fill_null(UNDATED)
    return raw.select(**columns, **{_INSTANT: moment})


def _mapped(raw: ir.Table, settings: RawTable, keys: set[str]) -> dict[str, Any]:
    columns = {name: raw[source] for name, source in settings.columns.items()}
    for name, separator in settings.separators.items():
        values = columns[name].cast("string").split(separator)
        columns[name] = values.map(lambda v: v.strip()).filter(lambda v: v != "")
    return {name: _key(c) if name in keys else c for name, c in columns.items()}


def _key(column: Any) -> Any:
    """A key as text. pandas turns whole numbers with gaps into 7.0, which is the key 7."""
    import ibis

    if not column.type().is_floating():
        return column.cast("string")
    whole = column.try_cast("int64")
    return ibis.ifelse(whole == column, whole.cast("string"), column.cast("string"))


def _label(raw: ir.Table, label: Label) -> Any:
    import ibis

    if label.column is None:
        return ibis.literal(1, type="int64")
    column = raw[label.column]
    text, number = column.cast("string"), column.try_cast("float64")
    if label.at_least is not None:
        known = number.notnull() & ~number.isnan() & ~number.isinf()
        positive, negative = known & (number >= label.at_least), known
    elif label.positive is not None:
        positive = _among(label.positive, text, number)
        known = text.notnull() if label.negative is None else _among(label.negative, text, number)
        negative = known
    else:
        return column
    return ibis.cases((positive, "1"), (negative, "0"), else_=UNREADABLE + text)


def _among(values: tuple[str, ...], text: Any, number: Any) -> Any:
    """Whether a value is one of the listed, as text or as the same number (1 and 1.0)."""
    numbers = [float(value) for value in values if _is_number(value)]
    same = text.isin(values)
    return same | number.isin(numbers).fill_null(False) if numbers else same


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _or_line(raw: ir.Table, time: Any) -> Any:
    """In place of the time of a line that is no row: the line."""
    import ibis

    if UNREADABLE_LINE not in raw.columns:
        return time
    return ibis.coalesce(UNREADABLE + raw[UNREADABLE_LINE], time)


def _with_negatives(table: ir.Table, config: Tables, negatives: Negatives) -> ir.Table:
    """Add the drawn negatives, and sort by time, request and item."""
    import ibis

    request, item, label = config.request, config.item, config.exposures.label.name
    valid = table.filter(table[_INSTANT].notnull(), table[request].notnull(), table[item].notnull())
    pool = valid.group_by(item).agg(seen=valid[_INSTANT].min())
    order = ibis.row_number().over(order_by=["seen", item])
    pool = pool.mutate(position=order.cast("int64"))
    sizes = pool.group_by("seen").agg(n=pool.position.max() + 1)
    requests = valid.group_by(request).agg(
        m=valid[item].nunique() * negatives.per_positive, at=valid[_INSTANT].min()
    )
    requests = requests.asof_join(sizes, on=requests.at > sizes.seen)
    requests = requests.filter(requests.n.notnull())
    rank = ibis.row_number().over(group_by=request, order_by=[_INSTANT, item])
    carriers = valid.mutate(rank=rank).filter(lambda t: t["rank"] == 0)
    carriers = carriers.drop("rank", item, label)
    drawn = (
        draw(requests, request, negatives.seed)
        .inner_join(pool, "position")
        .anti_join(valid, [request, item])
        .inner_join(carriers, request)
        .mutate(**{label: ibis.literal(0, type="int64")})
    )
    kept = table.mutate(**{INCLUSION_PROBABILITY: ibis.literal(1.0)})
    everything = kept.union(drawn.select(*kept.columns))
    return everything.order_by(_INSTANT, request, item)
