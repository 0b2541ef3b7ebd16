"""Crosses as Feast's on-demand views compute them, and how a store can differ from a spec."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import given
from hypothesis import strategies as st

import small_store
from fathom.batch import Ragged
from fathom.encoding import complete, evaluate_cross
from fathom.feast_objects import cross_of_rows
from small_store import COLUMNS, START, a_spec, aggregate


def named(names: str) -> list[dict[str, Any]]:
    """Columns of the small world by name, in its order."""
    return [column for column in COLUMNS if column["name"] in names.split()]


def test_a_cross_buckets_the_numbers_that_the_model_sees():
    """A store has 64 bits and nulls where a frame has 32 bits and defaults; buckets agree."""
    import pandas as pd

    shared = {"ratio": {"of": "discount", "to": "user_rate"}, "buckets": (0.7,)}
    columns = [
        *named("user_id item_id"),
        {"name": "discount", "kind": "numeric", "owner": "context", "buckets": (0.7,)},
        aggregate("user_rate", "user_id", "rate", **small_store.RATE) | {"buckets": (0.2, 0.7)},
        {"name": "share", "kind": "numeric", **shared},
    ]
    spec = a_spec(columns, [{"columns": ["discount", "user_rate", "share"]}])
    rounded = np.float32(0.7)
    assert float(rounded) < 0.7  # on the other side of a boundary of 0.7, if that had 64 bits
    rows = {"discount": [0.7, 0.7, None], "user_rate": [0.7, None, 0.7], "share": [0.7] * 3}
    found = cross_of_rows(pd.DataFrame(rows), spec.to_json(), 0)["discount_x_user_rate_x_share"]
    seen = {
        "discount": np.array([rounded, rounded, np.nan]),
        "user_rate": np.array([rounded, np.float32(0.2), rounded]),
        "share": np.array([rounded] * 3),
    }
    expected = evaluate_cross(spec.crosses[0], spec, seen)
    assert isinstance(expected, np.ndarray)
    assert found.tolist() == expected.view(np.int64).tolist()
    assert found[2] == 0


def test_a_cross_of_rows_keeps_their_index():
    import pandas as pd

    spec = a_spec(named("user_id item_id genre shop tags"), [{"columns": ["tags", "shop"]}])
    rows = pd.DataFrame({"tags": [["a", "b"], None, []], "shop": ["x"] * 3}, index=[5, 3, 5])
    found = cross_of_rows(rows, spec.to_json(), 0)
    assert found.index.tolist() == [5, 3, 5]
    assert [len(keys) for keys in found["tags_x_shop"]] == [2, 0, 0]


# -- any input -----------------------------------------------------------------------------------

WORDS = st.none() | st.text(max_size=3)
LISTS = st.none() | st.lists(st.text(max_size=2), max_size=3)
NUMBERS = st.none() | st.floats(allow_nan=True, allow_infinity=True, width=64)
SPEC = a_spec(
    [
        *named("user_id item_id shop slot tags searches discount price"),
        aggregate("user_acts", "user_id", "count"),
        aggregate("recent_items", "user_id", "last", column="item_id", n=4),
    ],
    [
        {"columns": ["shop", "slot"]},
        {"columns": ["slot", "shop"]},
        {"columns": ["tags", "shop"]},
        {"columns": ["tags", "searches", "recent_items"]},
        {"columns": ["discount", "price"]},
        {"columns": ["user_acts", "tags", "price"]},
    ],
)
ROW = st.fixed_dictionaries(
    {
        **dict.fromkeys(("shop", "slot"), WORDS),
        **dict.fromkeys(("tags", "searches", "recent_items"), LISTS),
        **dict.fromkeys(("discount", "price"), NUMBERS),
        "user_acts": st.none() | st.integers(0, 2**40),
    }
)


def ragged(lists: list[list[str] | None]) -> Ragged:
    return Ragged.of([values or [] for values in lists])


@given(st.lists(ROW, min_size=1, max_size=6))
def test_a_cross_of_any_rows_is_the_encoders_own(rows: list[dict[str, Any]]):
    frame: dict[str, Any] = {
        "event_timestamp": np.full(len(rows), START.replace(tzinfo=None), "M8[us]")
    }
    for column in SPEC.columns:
        values = [row.get(column.name) for row in rows]
        if column.kind in {"multi", "sequence"}:
            frame[column.name] = ragged(values)
        elif column.is_numeric:
            frame[column.name] = np.array([np.nan if v is None else v for v in values], np.float64)
        else:
            frame[column.name] = np.array([*values, None], object)[:-1]
    with np.errstate(over="ignore"):  # numbers beyond 32 bits are infinite, on both sides
        encoders = complete(frame, SPEC)
        inputs = pd.DataFrame(rows, dtype=object)
        for i, cross in enumerate(SPEC.crosses):
            expected = evaluate_cross(cross, SPEC, encoders)
            found = cross_of_rows(inputs[list(cross.columns)], SPEC.to_json(), i)[cross.name]
            if isinstance(expected, Ragged):
                signed = expected.values.view(np.int64).tolist()
                lists = [signed[a:b] for a, b in pairwise(expected.offsets.tolist())]
                assert found.tolist() == lists
            else:
                assert found.tolist() == expected.view(np.int64).tolist()


def test_the_small_world_has_every_kind_of_cross():
    assert {len(cross.columns) for cross in small_store.SPEC.crosses} == {2, 3}
