"""Ragged arrays against Python's lists; batches that check themselves; files mapped into memory."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.batch import Batch, BatchError, Layout, Ragged

lists = st.lists(st.lists(st.integers(-9, 9), max_size=4), max_size=8)


def listed(ragged: Ragged) -> list[list[Any]]:
    """A ragged array as lists, read off its definition."""
    return [ragged.values[a:b].tolist() for a, b in pairwise(ragged.offsets.tolist())]


def places(rows: int) -> st.SearchStrategy[list[int]]:
    """Row numbers as lists take them: in any order, repeated, none, and counted from the end."""
    return st.lists(st.integers(-rows, rows - 1), max_size=10) if rows else st.just([])


def batch(rows: int = 4, **replaced: Any) -> Batch:
    """A small batch with a bag in each part; row ``i`` has ``i % 3`` values in its bags."""
    many = [list(range(i % 3)) for i in range(rows)]
    parts: dict[str, Any] = {
        "numeric": np.arange(2 * rows, dtype=np.float32).reshape(rows, 2),
        "deep_ids": np.arange(rows, dtype=np.int32).reshape(rows, 1),
        "deep_bags": (Ragged.of(many, np.int32),),
        "wide_ids": np.arange(3 * rows, dtype=np.int32).reshape(rows, 3),
        "wide_bags": (Ragged.of(many, np.int32), Ragged.of([[7]] * rows, np.int32)),
        "label": np.arange(rows, dtype=np.float32),
        "weight": np.ones(rows, np.float32),
    }
    return Batch(**parts | replaced)


def same(one: Batch, other: Batch) -> bool:
    """Whether two batches hold the same numbers."""

    def flat(b: Batch) -> list[Any]:
        bags = [
            array for bag in (*b.deep_bags, *b.wide_bags) for array in (bag.values, bag.offsets)
        ]
        return [b.numeric, b.deep_ids, b.wide_ids, b.label, b.weight, *bags]

    pairs = list(zip(flat(one), flat(other), strict=True))
    return all((a is None) == (b is None) and (a is None or np.array_equal(a, b)) for a, b in pairs)


# -- ragged ---------------------------------------------------------------------------------------


def test_a_ragged_array_by_hand() -> None:
    ragged = Ragged.of([["a", "b"], [], ["c"]])
    assert ragged.values.tolist() == ["a", "b", "c"]
    assert ragged.offsets.tolist() == [0, 2, 2, 3]
    assert ragged.lengths.tolist() == [2, 0, 1]
    assert ragged.rows.tolist() == [0, 0, 2]
    assert len(ragged) == 3


@given(lists)
def test_of_keeps_every_list(rows: list[list[int]]) -> None:
    ragged = Ragged.of(rows, np.int32)
    assert listed(ragged) == rows
    assert len(ragged) == len(rows)
    assert ragged.lengths.tolist() == [len(row) for row in rows]
    assert ragged.rows.tolist() == [i for i, row in enumerate(rows) for _ in row]
    assert ragged.values.dtype == np.int32
    assert ragged.offsets.dtype == np.int64


@given(lists, st.data())
def test_take_takes_what_a_list_would(rows: list[list[int]], data: st.DataObject) -> None:
    index = data.draw(places(len(rows)))
    taken = Ragged.of(rows, np.int32).take(np.array(index, np.int64))
    assert listed(taken) == [rows[i] for i in index]


@given(lists, st.data())
def test_taking_twice_is_taking_the_taken(rows: list[list[int]], data: st.DataObject) -> None:
    first = np.array(data.draw(places(len(rows))), np.int64)
    second = np.array(data.draw(places(len(first))), np.int64)
    ragged = Ragged.of(rows, np.int32)
    assert listed(ragged.take(first).take(second)) == listed(ragged.take(first[second]))


@given(lists)
def test_take_by_a_mask_is_filtering(rows: list[list[int]]) -> None:
    long = np.array([len(row) > 1 for row in rows], bool)
    assert listed(Ragged.of(rows, np.int32).take(long)) == [row for row in rows if len(row) > 1]


@pytest.mark.parametrize(
    ("offsets", "shown"),
    [([], "[] … []"), ([1, 3], "[1] … [3]"), ([0, 2], "[0] … [2]"), ([0, 4], "[0] … [4]")],
)
def test_offsets_that_do_not_span_the_values_are_refused(offsets: list[int], shown: str) -> None:
    message = f"offsets must run from 0 to 3, the number of values; they are {shown}"
    with pytest.raises(ValueError, match=re.escape(message)):
        Ragged(np.array([1, 2, 3]), np.array(offsets, np.int64))


# -- batches --------------------------------------------------------------------------------------


def test_a_batch_of_parts_that_differ_in_length_is_refused_with_each_length() -> None:
    message = (
        "parts of a batch differ in their number of examples: {'numeric': 4, 'deep_ids': 4, "
        "'wide_ids': 4, 'label': 3, 'weight': 4, 'deep_bag0': 4, 'wide_bag0': 2, 'wide_bag1': 4}"
    )
    short = Ragged.of([[1], [2]], np.int32)
    with pytest.raises(ValueError, match=re.escape(message)):
        batch(label=np.zeros(3, np.float32), wide_bags=(short, batch().wide_bags[1]))


@pytest.mark.parametrize("part", ["numeric", "deep_ids", "wide_ids", "label", "weight"])
def test_every_part_is_counted(part: str) -> None:
    with pytest.raises(ValueError, match=f"'{part}': 3"):
        batch(**{part: getattr(batch(), part)[:3]})


@given(st.lists(st.integers(-4, 3), max_size=6))
def test_taking_examples_takes_the_same_rows_of_every_part(index: list[int]) -> None:
    whole = batch()
    taken = whole.take(np.array(index, np.int64))
    assert len(taken) == len(index)
    for part in ("numeric", "deep_ids", "wide_ids", "label", "weight"):
        assert getattr(taken, part).tolist() == [getattr(whole, part)[i].tolist() for i in index]
    for kind in ("deep_bags", "wide_bags"):
        for bag, before in zip(getattr(taken, kind), getattr(whole, kind), strict=True):
            assert listed(bag) == [listed(before)[i] for i in index]


def test_a_batch_may_be_without_label_and_weight() -> None:
    taken = batch(label=None, weight=None).take(np.array([1]))
    assert taken.label is None
    assert taken.weight is None


@pytest.mark.parametrize(
    "saved",
    [
        batch(),
        batch(label=None, weight=None),
        batch(deep_bags=(), wide_bags=()),
        batch(rows=0),
        batch(rows=1, wide_ids=np.zeros((1, 0), np.int32)),  # every bag empty, no wide slot
    ],
    ids=["full", "bare", "no bags", "no rows", "no values"],
)
def test_a_batch_is_saved_and_mapped_back(tmp_path: Path, saved: Batch) -> None:
    saved.save(tmp_path / "batch")
    loaded = Batch.load(tmp_path / "batch")
    assert same(loaded, saved)
    assert len(loaded) == len(saved)
    for part in ("numeric", "deep_ids", "wide_ids", "label", "weight"):
        array = getattr(loaded, part)
        if array is not None:
            assert isinstance(array, np.memmap), part
            assert array.dtype == getattr(saved, part).dtype
            if array.size:  # what is changed in memory is not written back
                array.flat[0] += 1
                assert (
                    getattr(Batch.load(tmp_path / "batch"), part).flat[0]
                    == getattr(saved, part).flat[0]
                )
    for bag in (*loaded.deep_bags, *loaded.wide_bags):
        assert isinstance(bag.values, np.memmap)
        assert bag.values.dtype == np.int32


def test_more_than_ten_bags_come_back_in_their_order(tmp_path: Path) -> None:
    """Names sort as text would put 10 before 2."""
    bags = tuple(Ragged.of([[i], [i, i]], np.int32) for i in range(12))
    saved = batch(rows=2, wide_bags=bags)
    saved.save(tmp_path)
    assert [listed(bag) for bag in Batch.load(tmp_path).wide_bags] == [
        [[i], [i, i]] for i in range(12)
    ]


def test_a_mapped_batch_can_be_taken_from(tmp_path: Path) -> None:
    saved = batch()
    saved.save(tmp_path)
    index = np.array([3, 0, 2])
    assert same(Batch.load(tmp_path).take(index), saved.take(index))


# -- layout ---------------------------------------------------------------------------------------


def test_widths_by_hand() -> None:
    layout = Layout(
        numeric=6,
        tables={"user": (100, 16), "genre": (10, 4)},
        fields=("user", "genre"),
        bags=("genre", "genre"),
        wide_slots=(10, 20, 7),
        wide_bags=1,
    )
    # A shared table counts once for each field that reads it: 16 + 4 + 4 + 4, and 6 numbers.
    assert layout.deep_width == 34
    assert layout.wide_rows == 37


def test_a_layout_may_be_empty() -> None:
    layout = Layout(numeric=0, tables={}, fields=(), bags=(), wide_slots=(), wide_bags=0)
    assert layout.deep_width == 0
    assert layout.wide_rows == 0


# -- fingerprint ----------------------------------------------------------------------------------


def test_a_fingerprint_tells_batches_apart_by_any_value_in_any_part():
    whole = batch(rows=6)
    assert batch(rows=6).fingerprint() == whole.fingerprint()
    others = {
        "numeric": whole.numeric + 1,
        "deep_ids": whole.deep_ids + 1,
        "deep_bags": (Ragged.of([[5] * (i % 3) for i in range(6)], np.int32),),
        "wide_ids": whole.wide_ids[:, ::-1],
        "wide_bags": whole.wide_bags[::-1],
        "label": None,
        "weight": np.full(6, 2, np.float32),
    }
    seen = {whole.fingerprint(), *(batch(6, **{n: v}).fingerprint() for n, v in others.items())}
    assert len(seen) == 1 + len(others)


def test_a_fingerprint_of_samples_reads_only_those_and_how_many_there_are():
    whole = batch(rows=6)
    other = whole.numeric.copy()
    other[1] = -1  # between the samples 0, 2 and 4
    assert batch(6, numeric=other).fingerprint(2) == whole.fingerprint(2)
    assert batch(6, numeric=other).fingerprint() != whole.fingerprint()
    assert batch(rows=5).fingerprint(2) != whole.fingerprint(2)


#: A user and an item by key, two of the item's attributes, what the user took before, and numbers.
SHOP = Layout(
    numeric=2,
    tables={"user": (9, 4), "item": (7, 4), "kind": (5, 2), "colour": (3, 2)},
    fields=("user", "item", "kind", "colour"),
    bags=("kind", "item", "colour"),
    wide_slots=(9,),
    wide_bags=0,
    inactive=(0, 1),
    user=0,
    item=1,
    owners=("user", "item", "item", "item", "user", "user", "item", "context", "user"),
)


def test_a_bag_is_about_the_items_field_that_shares_its_table() -> None:
    # Kinds and items that the user took are about the candidate's; its own colours about nothing.
    assert SHOP.targets == (2, 1, None)


@pytest.mark.parametrize(
    ("replaced", "expected"),
    [
        ({"fields": ("user", "item", "colour", "colour")}, (None, 1, None)),
        ({"fields": ("user", "kind", "kind", "colour")}, (1, None, None)),  # the first of two
        ({"fields": ("kind", "item", "kind", "colour")}, (2, 1, None)),  # the user's is not meant
        ({"bags": ("user", "user", "user")}, (None, None, None)),
        ({"bags": (), "owners": SHOP.owners[:4] + SHOP.owners[7:]}, ()),
        # Without owners any field may be the item's, and any bag the user's.
        ({"owners": ()}, (2, 1, 3)),
        ({"owners": (), "fields": ("kind", "item", "kind", "colour")}, (0, 1, 3)),
    ],
)
def test_a_bag_that_shares_no_table_with_the_item_is_about_nothing(
    replaced: dict[str, Any], expected: tuple[int | None, ...]
) -> None:
    assert dataclasses.replace(SHOP, **replaced).targets == expected


@pytest.mark.parametrize("layout", [SHOP, dataclasses.replace(SHOP, user=None, item=None)])
def test_a_layout_survives_as_plain_values(layout: Layout) -> None:
    assert Layout.of(json.loads(json.dumps(dataclasses.asdict(layout)))) == layout


def test_a_layout_of_before_there_were_keys_and_owners_is_read() -> None:
    plain = dataclasses.asdict(SHOP)
    for newer in ("inactive", "user", "item", "owners", "names"):
        plain.pop(newer, None)
    layout = Layout.of(plain)
    assert (layout.user, layout.item, layout.owners) == (None, None, ())
    assert layout.fields == SHOP.fields


@pytest.mark.parametrize(
    "wrong",
    [
        {"user": "first"},
        {"item": [1]},
        {"owners": 3},
        {"inactive": 3},
        {"tables": [1]},
        {"numeric": None},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_what_is_no_layout_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(BatchError, match=r"^no layout \(.+\); encode the splits again$"):
        Layout.of(dataclasses.asdict(SHOP) | wrong)
