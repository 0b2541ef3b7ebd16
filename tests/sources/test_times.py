"""Raw times in every unit and zone become the same instants in UTC, or stay what they were."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any
from zoneinfo import ZoneInfo

import ibis
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fathom.sources.canonical import connect
from fathom.sources.times import Timestamp, instant, written

NOON = datetime(2017, 3, 13, 12, 30, 15, 250_000)
CONNECTION = connect()


def read(values: list[Any], kind: pa.DataType | None = None, **clock: Any) -> list[Any]:
    raw = ibis.memtable(pa.table({"at": pa.array(values, kind)}))
    moments = CONNECTION.to_pyarrow(instant(raw, Timestamp(column="at", **clock)))
    return list(moments.to_pylist())


@pytest.mark.parametrize(
    ("unit", "value"),
    [
        ("iso", "2017-03-13T12:30:15.250Z"),
        ("iso", "2017-03-13 12:30:15.25"),
        ("iso", "2017-03-13T14:30:15.250+02:00"),
        ("iso", "2017-03-13T07:30:15.250-0500"),
        ("s", "1489408215.25"),
        ("ms", "1489408215250"),
        ("us", "1489408215250000"),
        ("ns", "1489408215250000999"),
        ("%d.%m.%Y %H:%M:%S.%f", "13.03.2017 12:30:15.250000"),
    ],
)
def test_one_moment_in_every_way_to_write_it(unit: str, value: str) -> None:
    assert read([value], unit=unit) == [NOON]


def test_numbers_and_timestamps_of_parquet_are_read_as_they_are() -> None:
    assert read([1489408215], unit="s") == [NOON.replace(microsecond=0)]
    assert read([1489408215.25], unit="s") == [NOON]
    assert read([NOON], pa.timestamp("ns")) == [NOON]
    assert read([NOON], pa.timestamp("us", "America/New_York")) == [NOON]
    assert read([NOON.date()]) == [datetime(2017, 3, 13)]


def test_wall_clock_times_follow_their_zone_through_daylight_saving() -> None:
    """New York is five hours behind in winter and four in summer, from 12 March 2017."""
    clock = {"timezone": "America/New_York"}
    wall = ["2017-03-06 00:00", "2017-03-13 00:00", "2017-03-13T00:00:00+01:00"]
    utc = [datetime(2017, 3, 6, 5), datetime(2017, 3, 13, 4), datetime(2017, 3, 12, 23)]
    assert read(wall, **clock) == utc, "text with an offset says for itself"
    assert read([datetime(2017, 3, 13)], pa.timestamp("us"), **clock) == [datetime(2017, 3, 13, 4)]
    assert read(["13.3.2017"], unit="%d.%m.%Y", **clock) == [datetime(2017, 3, 13, 4)]


@pytest.mark.parametrize(
    ("unit", "values"),
    [
        ("iso", ["2017-02-30", "yesterday", "", "infinity", "12345"]),
        ("s", ["nan", "2017-01-01", "1e30", "9" * 37, "-1e15", "inf"]),
        ("ns", ["", "9" * 30]),
        ("%d.%m.%Y", ["31.02.2017", "2017-03-13"]),
    ],
)
def test_what_cannot_be_read_is_kept_as_text(unit: str, values: list[str]) -> None:
    raw = ibis.memtable(pa.table({"at": pa.array([*values, None, None])}))
    clock = Timestamp(column="at", unit=unit)
    assert read([*values, None], pa.string(), unit=unit) == [None] * (len(values) + 1)
    texts = CONNECTION.to_pyarrow(written(raw, clock)).to_pylist()
    assert texts == [*(f"unreadable: {value}" for value in values), None, None]


def test_readable_times_are_written_in_utc() -> None:
    text = ibis.memtable(pa.table({"at": ["2017-03-13T14:30:00+02:00"]}))
    typed = ibis.memtable(pa.table({"at": pa.array([NOON], pa.timestamp("us"))}))
    clock = Timestamp(column="at")
    assert CONNECTION.to_pyarrow(written(text, clock)).to_pylist() == ["2017-03-13 12:30:00"]
    assert CONNECTION.to_pyarrow(written(typed, clock)).to_pylist() == [NOON]


moments = st.datetimes(datetime(1900, 1, 1), datetime(2100, 1, 1))
zones = st.sampled_from(["UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata"])


@given(moments, zones)
def test_wall_clock_text_agrees_with_the_standard_library(moment: datetime, zone: str) -> None:
    """From UTC to the wall clock by Python, and back by us; but for the hour that is told twice."""
    local = moment.replace(tzinfo=timezone.utc).astimezone(ZoneInfo(zone))
    if local.replace(fold=0).utcoffset() != local.replace(fold=1).utcoffset():
        return
    text = local.replace(tzinfo=None).isoformat()
    assert read([text], timezone=zone) == [moment]


@given(moments, st.sampled_from(["s", "ms", "us", "ns"]))
def test_numbers_are_exact_to_the_microsecond(moment: datetime, unit: str) -> None:
    micros = (moment - datetime(1970, 1, 1)) // timedelta(microseconds=1)
    scale = {"s": 10**6, "ms": 10**3, "us": 1}
    if unit == "ns":
        text = str(micros * 1000)
    else:
        sign, rest = "-" if micros < 0 else "", abs(micros)
        text = f"{sign}{rest // scale[unit]}.{rest % scale[unit] * (10**6 // scale[unit]):06d}"
    assert read([text], unit=unit) == [moment]


@pytest.mark.parametrize(
    ("clock", "fault"),
    [
        ({"unit": "minutes"}, "'minutes' is no unit; use iso, s, ms, us, ns or a format"),
        ({"unit": "%Y %z"}, "holds a zone; use iso, which reads offsets"),
        ({"timezone": "Mars/Olympus"}, "no time zone 'Mars/Olympus'; use an IANA name"),
    ],
)
def test_a_wrong_clock_is_refused_with_a_remedy(clock: dict[str, str], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        Timestamp(column="at", **clock)
