"""The feed: every example once in an epoch, in an order that can be reached from anywhere."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.batch import Batch, Ragged
from fathom.feed import Examples, Feed, weights
from fathom.models import Bag, Inputs


def numbered(rows: int, weight: bool = False) -> Batch:
    """Example i has i in every place, and i % 3 values in its bag."""
    number = np.arange(rows)
    bag = Ragged.of([[i] * (i % 3) for i in range(rows)], np.int32)
    return Batch(
        numeric=number[:, None].astype(np.float32),
        deep_ids=number[:, None].astype(np.int32),
        deep_bags=(bag,),
        wide_ids=number[:, None].astype(np.int32),
        wide_bags=(bag,),
        label=(number % 2).astype(np.float32),
        weight=(number + 1).astype(np.float32) if weight else None,
    )


def rows_of(feed: Feed, epoch: int = 1, start: int = 0) -> list[list[int]]:
    return [examples.rows.tolist() for examples in feed.epoch(epoch, start)]


def is_whole(examples: Examples) -> bool:
    """Every part of a batch belongs to the rows that it names."""
    rows = torch.from_numpy(examples.rows)
    lengths = rows % 3
    values = torch.repeat_interleave(rows, lengths)
    inputs = examples.inputs
    return (
        torch.equal(inputs.numeric[:, 0].long(), rows)
        and torch.equal(inputs.deep_ids[:, 0].long(), rows)
        and torch.equal(inputs.wide_ids[:, 0].long(), rows)
        and torch.equal(examples.label.long(), rows % 2)
        and all(
            torch.equal(bag.values.long(), values)
            and torch.equal(bag.offsets[1:] - bag.offsets[:-1], lengths)
            for bag in (*inputs.deep_bags, *inputs.wide_bags)
        )
    )


@settings(deadline=None)
@given(
    rows=st.integers(1, 60),
    batch_size=st.integers(1, 25),
    window=st.integers(1, 80),
    epoch=st.integers(1, 3),
    data=st.data(),
)
def test_an_epoch_has_every_example_once_whatever_the_window(rows, batch_size, window, epoch, data):
    feed = Feed(numbered(rows), batch_size, window, seed=5)
    batches = rows_of(feed, epoch)
    assert sorted(chain.from_iterable(batches)) == list(range(rows))
    assert len(batches) == len(feed) == -(-rows // batch_size)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert all(is_whole(examples) for examples in feed.epoch(epoch))
    start = data.draw(st.integers(0, len(batches)))
    assert rows_of(feed, epoch, start) == batches[start:]


@settings(deadline=None)
@given(
    rows=st.integers(1, 60),
    batch_size=st.integers(1, 25),
    window=st.integers(1, 80),
    stride=st.integers(1, 9),
    data=st.data(),
)
def test_an_epoch_of_what_is_chosen_has_that_once_and_nothing_else(
    rows, batch_size, window, stride, data
):
    """Whole or streamed, and however many rows lie between two marks of where they are."""
    chosen = np.array(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fathom.feed._Places._STRIDE", stride)
        feed = Feed(numbered(rows), batch_size, window, seed=5, chosen=chosen)
        batches = rows_of(feed)
        assert sorted(chain.from_iterable(batches)) == np.flatnonzero(chosen).tolist()
        assert feed.examples == chosen.sum()
        assert len(batches) == len(feed) == -(-feed.examples // batch_size)
        assert all(is_whole(examples) for examples in feed.epoch(1))
        start = data.draw(st.integers(0, len(batches)))
        assert rows_of(feed, 1, start) == batches[start:]


def test_what_is_chosen_comes_in_the_order_that_it_would_come_in_alone():
    chosen = np.arange(40) % 3 > 0
    alone = Feed(numbered(40).take(np.flatnonzero(chosen)), 4, 100, seed=5)
    within = Feed(numbered(40), 4, 100, seed=5, chosen=chosen)
    pairs = zip(alone.epoch(2), within.epoch(2), strict=True)
    assert all(torch.equal(one.label, other.label) for one, other in pairs)
    assert rows_of(within, 2) == [
        np.flatnonzero(chosen)[batch].tolist() for batch in rows_of(alone, 2)
    ]


def test_the_order_is_the_seeds_and_the_epochs():
    def order(seed: int, epoch: int, window: int) -> list[list[int]]:
        return rows_of(Feed(numbered(40), 4, window, seed), epoch)

    for window in (100, 12):
        assert order(0, 1, window) == order(0, 1, window)
        assert order(0, 1, window) != order(0, 2, window)
        assert order(0, 1, window) != order(1, 1, window)


def test_one_window_is_a_uniform_shuffle():
    """Each of four examples comes first in a quarter of 2,000 epochs, but for chance."""
    feed = Feed(numbered(4), batch_size=4, window=4, seed=0)
    first = np.bincount([rows_of(feed, epoch)[0][0] for epoch in range(2000)], minlength=4)
    assert np.abs(first - 500).max() < 100  # five standard deviations


def test_windows_hold_whole_blocks_in_random_order():
    feed = Feed(numbered(64), batch_size=8, window=17, seed=0)  # two blocks of 8 in a window
    batches = rows_of(feed)
    windows = [sorted(batches[i] + batches[i + 1]) for i in range(0, 8, 2)]
    for window in windows:
        assert window[:8] == list(range(window[0], window[0] + 8))
        assert window[8:] == list(range(window[8], window[8] + 8))
    assert windows != sorted(windows)
    assert all(batch != sorted(batch) for batch in batches)


def test_parts_of_a_batch_go_to_different_processes():
    whole = rows_of(Feed(numbered(23), 8, 100, seed=3))
    parts = [rows_of(Feed(numbered(23), 8, 100, seed=3, rank=r, world=3)) for r in range(3)]
    assert [[*chain.from_iterable(some)] for some in zip(*parts, strict=True)] == whole


def test_a_mapped_split_is_read_from_its_files(tmp_path: Path):
    numbered(50).save(tmp_path)
    mapped = Batch.load(tmp_path)
    for window in (100, 16):
        feed = Feed(mapped, 8, window, seed=1)
        assert rows_of(feed) == rows_of(Feed(numbered(50), 8, window, seed=1))
        assert all(is_whole(examples) for examples in feed.epoch(2))


@pytest.mark.parametrize("window", [100, 4])
def test_weights_follow_their_examples_and_have_a_mean_of_1(window):
    split = numbered(9, weight=True)  # weights 1 to 9, so their mean is 5
    feed = Feed(split, 2, window, seed=0, weighted=True)
    for examples in feed.epoch(1):
        assert examples.weight.tolist() == pytest.approx(((examples.rows + 1) / 5).tolist())
    assert all(e.weight is None for e in Feed(split, 2, window, seed=0).epoch(1))


def test_a_positive_weight_multiplies_that_of_positives():
    split = numbered(4)  # labels 0, 1, 0, 1
    assert weights(split, False, 3.0).tolist() == [0.5, 1.5, 0.5, 1.5]
    own = numbered(4, weight=True)  # 1, 2, 3, 4 → 1, 6, 3, 12, whose mean is 5.5
    assert weights(own, True, 3.0).tolist() == pytest.approx([1 / 5.5, 6 / 5.5, 3 / 5.5, 12 / 5.5])
    assert weights(own, False, 1.0) is None
    assert weights(split, True, 1.0) is None


def test_taking_rows_of_a_bag():
    bag = Bag(torch.tensor([7, 8, 9]), torch.tensor([0, 2, 2, 3]))  # [7, 8], [], [9]
    taken = bag.take(torch.tensor([2, 1, 0, 0]))
    assert taken.values.tolist() == [9, 7, 8, 7, 8]
    assert taken.offsets.tolist() == [0, 1, 1, 3, 5]
    none = bag.take(torch.tensor([], dtype=torch.int64))
    assert none.values.tolist() == []
    assert none.offsets.tolist() == [0]


def test_inputs_share_memory_with_their_batch():
    split = numbered(3)
    inputs = Inputs.of(split)
    assert inputs.numeric.data_ptr() == split.numeric.ctypes.data
