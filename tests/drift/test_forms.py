"""What is watched of a spec, and the bins that columns are compared in."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.drift import MonitoringConfig, Watched, watched_of
from fathom.drift.forms import Form, fit_form, values_of
from shop import SHOP, spec

NUMBERS = [float(i) for i in range(1, 101)]


def shares(form: Form, codes: np.ndarray) -> dict[str, float]:
    """The share of each bin that holds anything."""
    counts = np.bincount(codes, minlength=len(form.bins)) / len(codes)
    return {name: float(share) for name, share in zip(form.bins, counts, strict=True) if share}


def binned(
    watched: Watched,
    was: Any,
    now: Any,
    requests: list[str] | None = None,
    vocabulary: set[str] | None = None,
    **config: Any,
) -> tuple[dict[str, float], dict[str, float]]:
    """Shares of both sides in the bins of the first."""
    only = spec({"name": "x", "kind": "categorical"})
    reference = pd.DataFrame({watched.column: was})
    if requests is not None:
        reference["basket"] = requests
    words = {} if vocabulary is None else {"x": vocabulary}
    form = fit_form(watched, reference, only, MonitoringConfig(**config), words)
    coded = form.code(values_of(pd.DataFrame({watched.column: now}), watched, 0))
    return shares(form, form.reference), shares(form, coded)


NUMERIC, CATEGORICAL = Watched("x", "numeric"), Watched("x", "categorical")


def test_every_column_is_watched_and_lists_by_their_length_and_a_value() -> None:
    watched = watched_of(SHOP)
    assert watched[0] == Watched("price", "numeric")
    assert [w.name for w in watched] == [
        "price",
        "visits",
        "channel",
        "product",
        "tags.length",
        "tags.member",
        "history.length",
        "history.first",
        "probability",
    ]


def test_a_cross_is_watched_by_its_hits() -> None:
    crossed = spec(
        {"name": "a", "kind": "categorical"},
        {"name": "b", "kind": "categorical"},
        crosses=[{"columns": ["a", "b"]}],
    )
    hits = watched_of(crossed)[2]
    assert hits == Watched("a_x_b", "numeric", "hits")
    frame = pd.DataFrame({hits.name: [0.5, None]})
    assert values_of(frame, hits, 0).fillna(-1).tolist() == [0.5, -1]


# ---------------------------------------------------------------- numbers


def test_numbers_are_put_in_the_references_tenths() -> None:
    was, now = binned(NUMERIC, NUMBERS, NUMBERS[50:] * 2)
    assert list(was.values()) == [0.1] * 10
    assert list(was)[::9] == ["00: ≤ 10", "09: > 90"]
    assert now == dict.fromkeys(list(was)[5:], 0.2)


def test_an_outlier_does_not_hide_a_drift() -> None:
    """With bins of equal width, all other values would fall in the first, on both sides."""
    plain = binned(NUMERIC, NUMBERS, NUMBERS[50:] * 2)
    assert binned(NUMERIC, [*NUMBERS[:99], 1e9], [*NUMBERS[50:99], 1e9] * 2) == plain


def test_missing_and_infinite_numbers_have_a_bin_of_their_own() -> None:
    half = [nan if i % 2 else i for i in NUMBERS]
    was, now = binned(NUMERIC, half, NUMBERS)
    assert was["(missing)"] == 0.5
    assert now == pytest.approx({name: 0.1 for name in was if name != "(missing)"})
    infinite = [(inf, -inf)[int(i) % 4 == 1] if i % 2 else i for i in NUMBERS]
    assert binned(NUMERIC, infinite, half)[0] == was


@pytest.mark.parametrize("now", [4.0, 6.0])
def test_a_constant_that_changes_is_in_another_bin(now: float) -> None:
    was, same = binned(NUMERIC, [5.0] * 100, [5.0] * 100)
    assert was == same
    assert binned(NUMERIC, [5.0] * 100, [now] * 100)[1].keys().isdisjoint(was)


def test_kinds_of_numbers() -> None:
    numbers = list(range(1, 101))
    for kind in ("Int64", "float32", "object"):
        was, now = binned(NUMERIC, numbers, pd.Series(numbers, dtype=kind))
        assert was == now
    nullable = pd.Series([*numbers[:90], *[None] * 10], dtype="Int64")
    was, now = binned(NUMERIC, nullable, [*numbers[:90], *[None] * 10])
    assert was == now
    was, now = binned(NUMERIC, [True, False] * 50, [False, True] * 50)
    assert was == now


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60),
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20),
)
def test_a_larger_number_is_never_in_a_lower_bin(was: list[float], now: list[float]) -> None:
    form = fit_form(NUMERIC, pd.DataFrame({"x": was}), SHOP, MonitoringConfig(), {})
    codes = form.code(pd.Series(sorted(now)))
    assert codes.tolist() == sorted(codes)
    assert codes.max() <= 10
    assert len(form.bins) <= 12


def test_a_column_without_any_value_has_no_data() -> None:
    form = fit_form(NUMERIC, pd.DataFrame({"x": [nan, nan]}), SHOP, MonitoringConfig(), {})
    assert not form.has_data
    assert form.bins == ("00: any", "(missing)")


# ---------------------------------------------------------------- values and lists


def test_values_that_the_reference_lacks_are_one_unknown_value() -> None:
    was, now = binned(CATEGORICAL, ["a", "b"] * 50, ["a", "b"] * 40 + ["c", "d"] * 5 + [None] * 10)
    assert was == {"a": 0.5, "b": 0.5}
    assert now == {"a": 0.4, "b": 0.4, "(unknown)": 0.1, "(missing)": 0.1}


def test_a_sequence_is_read_at_its_newest_value_and_a_set_at_any() -> None:
    """Swapping all pairs changes every first value and no set."""
    was, now = [["a", "b"]] * 1000, [["b", "a"]] * 1000
    assert binned(Watched("x", "categorical", "first"), was, now) == (
        {"a": 1.0},
        {"(unknown)": 1.0},
    )
    member, swapped = binned(Watched("x", "categorical", "member"), was, now)
    assert member == pytest.approx({"a": 0.5, "b": 0.5}, abs=0.05)
    assert swapped == pytest.approx(member, abs=0.1)
    length, same = binned(Watched("x", "numeric", "length"), was, now)
    assert length == same


def test_empty_and_missing_lists_have_no_value_but_an_empty_one_has_a_length() -> None:
    lists = [["a"]] * 50 + [[]] * 25 + [None] * 25
    was, _ = binned(Watched("x", "categorical", "first"), lists, lists)
    assert was == {"a": 0.5, "(missing)": 0.5}
    was, _ = binned(Watched("x", "numeric", "length"), lists, lists)
    assert was["(missing)"] == 0.25


# ---------------------------------------------------------------- ids


def ids(counts: dict[str, int]) -> list[str]:
    return [name for name, count in counts.items() for _ in range(count)]


OFTEN = {f"often{i}": 20 for i in range(4)}


def test_ids_are_compared_by_how_often_the_reference_saw_them() -> None:
    # 4 ids of 20 rows, 20 of one row. Of the median row's count, 20, half is where the head
    # starts. The single ones are unknown to the rest of the reference.
    reference = ids(OFTEN | {f"seldom{i}": 1 for i in range(20)})
    same = ids(OFTEN | {f"other{i}": 1 for i in range(20)})
    was, now = binned(CATEGORICAL, reference, same, max_categories=10)
    assert was == now == {"(head)": 0.8, "(unknown)": 0.2}
    assert binned(CATEGORICAL, reference, ids(OFTEN), max_categories=10)[1] == {"(head)": 1.0}


def test_what_the_models_vocabulary_lacks_is_unknown_however_often_it_was_seen() -> None:
    """5 to each seldom id, below the head's 10; the vocabulary knows one of them, and `new`."""
    reference = ids(OFTEN | {f"seldom{i}": 5 for i in range(4)})
    vocabulary = {*OFTEN, "seldom0", "new"} - {"often3"}
    was, now = binned(
        CATEGORICAL,
        reference,
        ["often0", "often3", "new", "strange"],
        vocabulary=vocabulary,
        max_categories=5,
    )
    assert was == {"(head)": 0.6, "(tail)": 0.05, "(unknown)": 0.35}
    assert now == {"(head)": 0.25, "(tail)": 0.25, "(unknown)": 0.5}


def test_ids_that_never_come_twice_are_no_drift() -> None:
    was, now = binned(CATEGORICAL, [f"a{i}" for i in range(99)], [f"b{i}" for i in range(99)])
    assert was == now == {"(unknown)": 1.0}


def test_rows_of_one_request_are_one_sight_of_an_id() -> None:
    """Each request is one user's; by rows, a user of a single request would seem well known."""
    users = [f"u{user}" for user in range(40) for _ in range(10)]
    requests = [f"r{user}" for user in range(40) for _ in range(10)]
    was, _ = binned(CATEGORICAL, users, users, requests)
    assert was == {"(unknown)": 1.0}
    was, _ = binned(CATEGORICAL, users, users)
    assert was == {"(head)": 1.0}
