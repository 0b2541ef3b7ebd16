"""Raw times, however they are written, as UTC.

Timestamps of the canonical tables are naive and in UTC. DuckDB's cast of text to TIMESTAMP drops
an offset (``+02:00``) without a word, so text with an offset goes through its type with a zone.
"""

from __future__ import annotations

from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, Any
from zoneinfo import ZoneInfo

from pydantic import AfterValidator

from fathom.sources.canonical import UNREADABLE, Settings, builtin

if TYPE_CHECKING:
    import ibis.expr.types as ir

_MICROSECONDS = {"s": Decimal(10**6), "ms": Decimal(10**3), "us": Decimal(1), "ns": Decimal("1e-3")}
#: What is outside is a mistake in the data, and would give names of partitions that do not sort.
_FIRST, _LAST = "1000-01-01T00:00:00", "9999-12-31T23:59:59.999999"
_LARGEST = Decimal(10) ** 20  # of any unit; its microseconds still fit the decimal type
_AWARE = "timestamp('UTC')"
_OFFSET = r"\d:\d\d.*(Z|z|[+-]\d\d(:?\d\d)?)$"


def _known_zone(zone: str) -> str:
    try:
        ZoneInfo(zone)
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"no time zone '{zone}'; use an IANA name, as Europe/Berlin") from error
    return zone


def _known_unit(unit: str) -> str:
    if unit != "iso" and unit not in _MICROSECONDS and "%" not in unit:
        raise ValueError(f"'{unit}' is no unit; use iso, s, ms, us, ns or a format as %d.%m.%Y")
    if "%z" in unit.lower():
        raise ValueError(f"format '{unit}' holds a zone; use iso, which reads offsets")
    return unit


class Timestamp(Settings):
    """How a raw column tells the time.

    Args:
        column: raw name.
        unit: ``iso`` (ISO 8601 text, or a parquet timestamp), ``s``, ``ms``, ``us`` or ``ns``
            since 1970, or a strptime format such as ``%d.%m.%Y %H:%M``.
        timezone: IANA zone of wall-clock times; text with an offset says for itself.
    """

    column: str
    unit: Annotated[str, AfterValidator(_known_unit)] = "iso"
    timezone: Annotated[str, AfterValidator(_known_zone)] = "UTC"


def instant(raw: ir.Table, clock: Timestamp) -> Any:
    """The time of each row as a naive timestamp in UTC, null where it cannot be read."""
    import ibis

    column = raw[clock.column]
    kind = column.type()
    if clock.unit in _MICROSECONDS:
        moment = _since_1970(column, _MICROSECONDS[clock.unit])
    elif clock.unit != "iso":
        parse = builtin("try_strptime", ("string", "string"), "timestamp")
        moment = utc(parse(column.cast("string"), clock.unit), clock.timezone)
    elif kind.is_timestamp() and kind.timezone is not None:
        moment = naive_utc(column)
    elif kind.is_timestamp() or kind.is_date():
        moment = utc(column.cast("timestamp(6)"), clock.timezone)
    else:
        text = column.cast("string")
        moment = ibis.ifelse(
            text.re_search(_OFFSET),
            naive_utc(text.try_cast(_AWARE)),
            utc(text.try_cast("timestamp"), clock.timezone),
        )
    inside = moment.between(ibis.timestamp(_FIRST), ibis.timestamp(_LAST))
    return ibis.ifelse(inside, moment, ibis.null("timestamp"))


def written(raw: ir.Table, clock: Timestamp) -> Any:
    """The time of each row: as a timestamp where the raw column is one, else as text."""
    import ibis

    column, moment = raw[clock.column], instant(raw, clock)
    if column.type().is_timestamp() or column.type().is_date():
        return moment
    return ibis.coalesce(moment.cast("string"), UNREADABLE + column.cast("string"))


def utc(moment: Any, zone: str) -> Any:
    """A naive wall-clock timestamp column of ``zone`` (an IANA name) as naive UTC."""
    if zone == "UTC":
        return moment
    return naive_utc(builtin("timezone", ("string", "timestamp"), _AWARE)(zone, moment))


def wall_clock(moment: Any, zone: str) -> Any:
    """A timestamp column of naive UTC as naive wall-clock time of ``zone``; undoes `utc`."""
    aware = builtin("timezone", ("string", "timestamp"), _AWARE)("UTC", moment)
    return builtin("timezone", ("string", _AWARE), "timestamp")(zone, aware)


def naive_utc(moment: Any) -> Any:
    """A timestamp column with a time zone as naive UTC."""
    return builtin("timezone", ("string", _AWARE), "timestamp")("UTC", moment)


def _since_1970(column: Any, microseconds: Decimal) -> Any:
    import ibis

    wide = "decimal(38, 6)"
    number = column.try_cast(wide)
    number = ibis.ifelse(number.abs() <= ibis.literal(_LARGEST, type=wide), number, ibis.null())
    factor = ibis.literal(microseconds, type="decimal(10, 3)")
    whole = (number * factor).floor().try_cast("int64")
    whole = ibis.ifelse(whole.abs() < 2**58, whole, ibis.null())  # within ±9133 years
    return builtin("make_timestamp", ("int64",), "timestamp")(whole)
