"""Negatives are drawn alike on every machine, and with the probability that is recorded."""

from __future__ import annotations

import hashlib
from typing import Any

import ibis
import pytest

from fathom.sources.canonical import connect
from fathom.sources.sampling import draw, uniform


def drawn(requests: dict[str, list[Any]], seed: int = 0, threads: int = 2) -> list[dict[str, Any]]:
    connection = connect()
    connection.settings["threads"] = threads
    table = draw(connection.create_table("requests", ibis.memtable(requests)), "request", seed)
    rows: list[dict[str, Any]] = table.order_by("request", "position").to_pyarrow().to_pylist()
    return rows


def test_numbers_come_from_md5_of_the_joined_parts() -> None:
    """The last 8 bytes of MD5("7/basket/3"), little-endian, their upper 53 bits over 2^53."""
    table = ibis.memtable({"request": ["basket"], "number": [3]})
    last = int.from_bytes(hashlib.md5(b"7/basket/3").digest()[8:], "little")
    number = connect().to_pyarrow(uniform(7, table.request, table.number)).to_pylist()
    assert number == [(last >> 11) / 2**53]


def test_positions_are_distinct_and_inside_the_pool() -> None:
    rows = drawn({"request": ["a", "b"], "n": [3, 1000], "m": [50, 40]})
    assert [row["position"] for row in rows if row["request"] == "a"] == [0, 1, 2]
    large = [row["position"] for row in rows if row["request"] == "b"]
    assert 30 <= len(large) == len(set(large)) <= 40
    assert set(large) <= set(range(1000))


def test_a_pool_of_one_item_is_drawn_for_certain() -> None:
    rows = drawn({"request": ["a"], "n": [1], "m": [4]})
    assert rows == [{"request": "a", "position": 0, "inclusion_probability": 1.0}]


def test_the_recorded_probability_is_the_share_of_requests_that_draw_an_item() -> None:
    """Over 20,000 requests with n = 10 and m = 4, each item is drawn by 1 - 0.9^4 = 34.39 %."""
    count = 20_000
    rows = drawn({"request": list(range(count)), "n": [10] * count, "m": [4] * count})
    assert [row["inclusion_probability"] for row in rows] == pytest.approx([0.3439] * len(rows))
    for position in range(10):
        share = sum(row["position"] == position for row in rows) / count
        assert share == pytest.approx(0.3439, abs=0.0135)  # four standard errors


def test_draws_of_a_request_depend_on_the_seed_and_on_nothing_around_it() -> None:
    one = {"request": ["a"], "n": [1000], "m": [20]}
    many = {"request": ["z", "a", "k"], "n": [5, 1000, 70], "m": [9, 20, 1]}
    expected = drawn(one)
    assert [row for row in drawn(many, threads=1) if row["request"] == "a"] == expected
    assert drawn(one, seed=1) != expected
