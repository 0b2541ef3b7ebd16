"""Distances of two sets of shares: worked out by hand, and as Evidently computes them."""

from __future__ import annotations

from math import isnan, log, sqrt

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.drift.config import Method
from fathom.drift.scores import moved, score


def counts(*rows: int) -> np.ndarray:
    return np.array(rows, np.int64)


def test_psi_by_hand() -> None:
    # half and half against three quarters and one quarter
    by_hand = (0.5 - 0.75) * log(0.5 / 0.75) + (0.5 - 0.25) * log(0.5 / 0.25)
    assert score("psi", counts(50, 50), counts(75, 25)) == pytest.approx(by_hand)


def test_psi_puts_a_small_share_in_the_place_of_none() -> None:
    # of a bin that is empty on both sides, nothing
    by_hand = 2 * (0.5 - 0.4) * log(0.5 / 0.4) + (0.0001 - 0.2) * log(0.0001 / 0.2)
    assert score("psi", counts(50, 50, 0, 0), counts(40, 40, 20, 0)) == pytest.approx(by_hand)


def test_jensen_shannon_distance_by_hand() -> None:
    # half and half against all in one; the mixture is (3/4, 1/4)
    was = 0.5 * log(0.5 / 0.75) + 0.5 * log(0.5 / 0.25)
    now = 1.0 * log(1.0 / 0.75)
    found = score("jensenshannon", counts(50, 50), counts(100, 0))
    assert found == pytest.approx(sqrt((was + now) / 2))
    assert score("jensenshannon", counts(5, 0), counts(0, 7)) == pytest.approx(sqrt(log(2)))


def test_the_share_that_moved_by_hand() -> None:
    assert moved(counts(50, 50, 0), counts(30, 50, 20)) == pytest.approx(0.2)
    assert moved(counts(1, 2), counts(20, 40)) == 0


_COUNTS = st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), min_size=1, max_size=9)


@pytest.mark.parametrize("method", ["psi", "jensenshannon"])
@settings(max_examples=20)
@given(_COUNTS.filter(lambda pairs: all(sum(side) for side in zip(*pairs, strict=True))))
def test_evidently_computes_the_same(method: Method, pairs: list[tuple[int, int]]) -> None:
    from evidently.legacy.calculations.stattests import jensenshannon_stat_test, psi_stat_test
    from evidently.legacy.core import ColumnType

    was, now = (counts(*side) for side in zip(*pairs, strict=True))
    names = np.array([f"bin {i}" for i in range(len(pairs))], object)
    test = {"psi": psi_stat_test, "jensenshannon": jensenshannon_stat_test}[method]
    sides = (pd.Series(np.repeat(names, side)) for side in (was, now))
    theirs, _ = test.func(*sides, ColumnType.Categorical, 0.1)
    # NaN is the square root of a divergence that rounding left just below 0.
    assert score(method, was, now) == pytest.approx(0 if isnan(theirs) else theirs, abs=1e-6)
