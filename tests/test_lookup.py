"""Keys to places: a dictionary of tuples, only faster."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.batch import Ragged
from fathom.lookup import Codes, Index, ordered, places_among, spread

#: Texts that would be one when joined, or that look like another.
KEYS = st.sampled_from(["", "a", "b", "c", "ä", "a-b", "-", "b-a"])


def codes_of(*columns: list[Any]) -> Codes:
    return Codes([pa.chunked_array([column], pa.string()) for column in columns])


def test_values_are_numbered_once_whichever_columns_hold_them():
    codes = codes_of(["tea", None, "rye"], ["rye", "ale"], [])
    assert codes.size == 3
    assert codes.of(["tea", "rye", "ale", "tea"], {}).tolist() == [0, 1, 2, 0]
    column = pa.chunked_array([["ale", None], ["new", "tea"]], pa.string())
    assert codes.of_arrow(column).tolist() == [2, 3, 3, 0]


def test_what_is_new_gets_numbers_of_the_request_and_none_is_no_value():
    codes, new = codes_of(["tea"]), {}
    assert codes.of(["gin", None, "tea", "rum", "gin"], new).tolist() == [2, 1, 0, 3, 2]
    assert new == {"gin": 2, "rum": 3}
    # Another list of the same request knows them, another request does not.
    assert codes.of(["rum"], new).tolist() == [3]
    assert codes.of(["rum"], {}).tolist() == [2]


def test_no_columns_are_no_values():
    assert Codes().size == codes_of([]).size == 0
    assert Codes().of(["tea", None], {}).tolist() == [1, 0]


@given(
    width=st.integers(1, 4),
    data=st.data(),
)
def test_an_index_is_a_dictionary(width: int, data: st.DataObject):
    tuples = st.tuples(*[KEYS] * width)
    held = data.draw(st.lists(tuples, unique=True, max_size=20))
    asked = data.draw(st.lists(st.tuples(*[KEYS | st.none()] * width), max_size=20))
    codes = [codes_of([key[i] for key in held]) for i in range(width)]
    parts = [codes[i].of([key[i] for key in held], {}) for i in range(width)]
    index, places = Index.of(parts, [code.size for code in codes])
    if width == 1:
        assert index.missing == codes[0].size
    else:
        assert sorted(places.tolist()) == list(range(len(held)))
        assert index.missing == len(held)
    place = dict(zip(held, places.tolist(), strict=True))
    news: list[dict[Any, int]] = [{} for _ in codes]
    wanted = [codes[i].of([key[i] for key in asked], news[i]) for i in range(width)]
    expected = [place.get(key, index.missing) for key in asked]
    assert index.find(wanted).tolist() == expected
    # One part for all candidates is found as if it were repeated.
    if asked:
        shared = asked[0][0]
        one = [codes[0].of([shared], news[0]), *wanted[1:]]
        found = np.broadcast_to(index.find(one), len(asked)).tolist()
        assert found == [place.get((shared, *key[1:]), index.missing) for key in asked]


def test_numbers_of_pairs_do_not_overflow():
    """Four keys of 2**21 values have 2**84 combinations; two that differ stay apart."""
    size = 2**21
    far = np.array([size - 1, size - 1, 0])
    near = np.array([0, 1, 0])
    index, places = Index.of([far, near, far, near], [size] * 4)
    assert sorted(places.tolist()) == [0, 1, 2]
    assert index.find([far, near, far, near]).tolist() == places.tolist()
    other = np.array([1, 0, 0])
    assert index.find([far, near, far, other]).tolist() == [3, 3, places[2]]


@given(
    held=st.lists(st.tuples(st.integers(-1, 6), st.integers(-1, 6)), unique=True, max_size=20),
    asked=st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=20),
    single=st.booleans(),
)
def test_places_among_few_are_those_of_a_dictionary(
    held: list[tuple[int, int]], asked: list[tuple[int, int]], single: bool
):
    width = 1 if single else 2
    if single:
        held = list({key[0]: key for key in held if key[0] >= 0}.values())
    place = {key[:width]: i for i, key in enumerate(held) if min(key[:width]) >= 0}
    parts = [np.array([key[i] for key in held], np.int64) for i in range(width)]
    wanted = [np.array([key[i] for key in asked], np.int64) for i in range(width)]
    found = places_among(parts, wanted, 7)
    assert found.tolist() == [place.get(key[:width], -1) for key in asked]


def test_values_are_put_at_their_places_and_the_rest_is_missing():
    places = np.array([2, 0])
    np.testing.assert_array_equal(
        ordered(np.array([5, 7]), places, 3), np.array([7.0, np.nan, 5.0, np.nan])
    )
    texts = np.array(["a", None], object)
    assert np.asarray(ordered(texts, places, 3)).tolist() == [None, None, "a", None]
    lists = ordered(Ragged.of([["a", "b"], ["c"]]), places, 3)
    assert isinstance(lists, Ragged)
    assert lists.values.tolist() == ["c", "a", "b"]
    assert lists.offsets.tolist() == [0, 1, 1, 3, 3]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_one_value_for_all_rows(count: int):
    assert np.asarray(spread(np.array([2.5]), count)).tolist() == [2.5] * count
    lists = spread(Ragged.of([["a", "b"]]), count)
    assert isinstance(lists, Ragged)
    assert lists.values.tolist() == ["a", "b"] * count
    assert lists.offsets.tolist() == [2 * i for i in range(count + 1)]
