"""When a ranker on trial is out of bounds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fathom.guard import Newest, RolloutConfig


def newest(*seconds: float, failed: int = 0, most: int = 500) -> Newest:
    found = Newest(most)
    for second in seconds:
        found.took(second)
    for _ in range(failed):
        found.failed()
    return found


#: A hundred requests of 10 ms, of which one took 30.
USUAL = newest(*[0.01] * 99, 0.03)


def test_a_ranker_like_the_one_before_it_goes_on() -> None:
    assert RolloutConfig().fault(newest(*[0.01] * 99, 0.03), USUAL) is None
    assert RolloutConfig().fault(newest(), newest()) is None


@pytest.mark.parametrize(("answered", "failed", "faulty"), [(0, 2, 0), (0, 3, 1), (497, 10, 0)])
def test_a_few_errors_are_a_fault_before_there_are_many_requests(
    answered: int, failed: int, faulty: int
) -> None:
    """Two of a hundred may fail, so with the third there is no need to wait for the hundredth."""
    fault = RolloutConfig().fault(newest(*[0.01] * answered, failed=failed), USUAL)
    assert bool(fault) == bool(faulty)
    if fault:
        assert fault == "3 of its newest 3 requests failed; at most 2.0% may"


def test_what_failed_long_ago_is_forgotten() -> None:
    found = newest(failed=20, most=100)
    assert RolloutConfig(newest=100).fault(found, USUAL)
    for _ in range(98):
        found.took(0.01)
    assert RolloutConfig(newest=100).fault(found, USUAL) is None
    assert int(np.isnan(found.seconds()).sum()) == 2


def test_a_slow_ranker_is_one_whose_p99_is_too_long_beside_the_one_before() -> None:
    slow = newest(*[0.01] * 95, *[0.05] * 5)
    assert RolloutConfig().fault(slow, USUAL) == (
        "p99 of its newest 100 requests is 50.0 ms, beside 10.2 ms before; at most 2 times as "
        "long is allowed, and 20 ms always"
    )
    assert RolloutConfig(max_latency_ratio=5).fault(slow, USUAL) is None
    assert RolloutConfig(latency_floor_seconds=0.05).fault(slow, USUAL) is None
    assert RolloutConfig(min_requests=101).fault(slow, USUAL) is None
    assert RolloutConfig().fault(slow, newest(*[0.001] * 99)) is None, "too few to compare with"


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("probation_seconds", -1),
        ("patience_seconds", 0),
        ("newest", 19),
        ("min_requests", 9),
        ("max_error_share", 1),
        ("max_latency_ratio", 1),
        ("latency_floor_seconds", -0.1),
        ("often", 1),
    ],
)
def test_a_setting_out_of_bounds_is_named(setting: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=rf"{setting}\n"):
        RolloutConfig(**{setting: value})


def test_they_are_looked_at_after_each_failure_and_every_tenth_request() -> None:
    assert [n for n in range(31) if newest(*[0.01] * n).is_due] == [10, 20, 30]
    assert newest(0.01, failed=1).is_due


def test_p99_must_be_reachable() -> None:
    with pytest.raises(ValidationError, match="min_requests is 100; it must be at most newest, 50"):
        RolloutConfig(newest=50)
