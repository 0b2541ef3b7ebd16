"""The feed: batches of encoded examples on a device, in an order that seed and epoch give.

A split of up to ``window`` examples is one window: it is moved to the device once, or, on a CPU,
read where it lies, and each epoch takes it in a new uniform order. A longer one is cut into blocks,
whose order is drawn anew in each epoch; ``window`` examples' worth of blocks are read at a time and
shuffled as one, while the next are being read. Either way every example that is chosen comes once
in an epoch, batches are sliced out of whole windows rather than collated, and any batch of any
epoch can be reached without reading those before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fathom.batch import Batch
from fathom.models import Inputs

Index = NDArray[np.int64]
Floats = NDArray[np.float32]


class Examples(NamedTuple):
    """A batch on a device: inputs, labels (B,) and weights (B,), or None for equal ones.

    ``rows`` are their places in the split, for messages.
    """

    inputs: Inputs
    label: Tensor
    weight: Tensor | None
    rows: Index

    def __len__(self) -> int:
        return len(self.label)


class Feed:
    """A split's batches.

    Args:
        split: with labels. Larger than memory if it is mapped from files (`Batch.load`).
        batch_size: B, over all processes together; the last batch of an epoch may be smaller.
        window: examples that are shuffled as one; rounded down to whole batches. Two windows are
            in memory if there is more than one.
        weighted, positive_weight: see `weights`.
        rank, world: of each batch, which of so many equal parts this process takes.
        chosen: (N,) whether an example belongs to the epochs; None for all.
    """

    def __init__(
        self,
        split: Batch,
        batch_size: int,
        window: int,
        seed: int,
        device: torch.device | str = "cpu",
        *,
        weighted: bool = False,
        positive_weight: float = 1.0,
        rank: int = 0,
        world: int = 1,
        chosen: NDArray[np.bool_] | None = None,
    ) -> None:
        self._split = split
        self._places = _Places(len(split), chosen)
        self._batch_size = batch_size
        self._window = max(window // batch_size, 1)  # in blocks, which are of a batch's size
        self._seed = seed
        self._device = torch.device(device)
        self._rank, self._world = rank, world
        self._weights = weights(split, weighted, positive_weight)
        self._whole: _Window | None = None
        if -(-len(split) // batch_size) <= self._window:
            self._whole = self._load(split, self._weights)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self._blocks

    @property
    def _blocks(self) -> int:
        return -(-self.examples // self._batch_size)

    @property
    def examples(self) -> int:
        """Examples in an epoch."""
        return self._places.count

    def epoch(self, number: int, start: int = 0) -> Iterator[Examples]:
        """The batches of an epoch from batch ``start`` on."""
        if self._whole is not None:
            every = self._places.rows(0, self.examples)
            order = every[self._draw(number).permutation(len(every))]
            yield from self._batches(self._whole, order, order, start)
            return
        if start >= len(self):
            return
        windows = list(self._windows(number))
        first = start // self._window
        with ThreadPoolExecutor(1, thread_name_prefix="feed") as reader:
            coming = reader.submit(self._read, windows[first])
            for position in range(first, len(windows)):
                rows, examples = coming.result()
                if position + 1 < len(windows):
                    coming = reader.submit(self._read, windows[position + 1])
                order = self._draw(number, position + 1).permutation(len(rows))
                skipped = start - first * self._window if position == first else 0
                yield from self._batches(examples, order, rows[order], skipped)

    def _windows(self, epoch: int) -> Iterator[Index]:
        """Blocks of each window, in an order of their own; the last block, if short, comes last."""
        full = self.examples // self._batch_size
        order = np.append(self._draw(epoch).permutation(full), range(full, self._blocks))
        for first in range(0, self._blocks, self._window):
            yield order[first : first + self._window].astype(np.int64)

    def _read(self, blocks: Index) -> tuple[Index, _Window]:
        """Copy blocks from the split, in rising order, which a disk reads fastest."""
        size = self._batch_size
        ends = np.minimum((blocks + 1) * size, self.examples)
        spans = sorted(zip(blocks * size, ends, strict=True))
        rows = np.concatenate([self._places.rows(begin, end) for begin, end in spans])
        weight = None if self._weights is None else self._weights[rows]
        return rows, self._load(self._split.take(rows), weight)

    def _load(self, split: Batch, weight: Floats | None) -> _Window:
        assert split.label is not None
        return _Window(
            Inputs.of(split, self._device),
            torch.as_tensor(split.label, device=self._device),
            None if weight is None else torch.as_tensor(weight, device=self._device),
        )

    def _batches(
        self, window: _Window, order: Index, rows: Index, start: int
    ) -> Iterator[Examples]:
        """Slices of a window in an order; ``rows`` are the same places in the split."""
        places = torch.as_tensor(order, device=self._device)
        for first in range(start * self._batch_size, len(order), self._batch_size):
            end = min(first + self._batch_size, len(order))
            mine = slice(
                first + (end - first) * self._rank // self._world,
                first + (end - first) * (self._rank + 1) // self._world,
            )
            index = places[mine]
            yield Examples(
                window.inputs.take(index),
                window.label.index_select(0, index),
                None if window.weight is None else window.weight.index_select(0, index),
                rows[mine],
            )

    def _draw(self, *position: int) -> np.random.Generator:
        """Random numbers that follow from the seed and a place in the run alone."""
        return np.random.default_rng([self._seed, *position])


class _Places:
    """Where the chosen examples of a split are, without a list of them all.

    Args:
        size: N, of the split. chosen: (N,), or None for all.
    """

    _STRIDE = 4096

    def __init__(self, size: int, chosen: NDArray[np.bool_] | None) -> None:
        self._chosen = chosen
        if chosen is None:
            self.count = size
            return
        starts = np.arange(0, size, self._STRIDE)
        counts = np.add.reduceat(chosen, starts, dtype=np.int64) if size else starts
        self._before = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        self.count = int(self._before[-1])

    def rows(self, begin: int, end: int) -> Index:
        """The rows of the chosen examples from number ``begin`` to before ``end``."""
        if self._chosen is None:
            return np.arange(begin, end)
        first = int(np.searchsorted(self._before, begin, side="right")) - 1
        last = int(np.searchsorted(self._before, end, side="left"))
        start = first * self._STRIDE
        rows = start + np.flatnonzero(self._chosen[start : last * self._STRIDE])
        skipped = begin - int(self._before[first])
        return rows[skipped : skipped + end - begin]


class _Window(NamedTuple):
    inputs: Inputs
    label: Tensor
    weight: Tensor | None


def weights(split: Batch, weighted: bool, positive_weight: float) -> Floats | None:
    """How much each example counts, (N,) with a mean of 1; None if all count alike.

    Args:
        weighted: whether the split's own weights, if it has any, count.
        positive_weight: what a label of 1 is multiplied by.
    """
    found = None
    if weighted and split.weight is not None:
        found = np.array(split.weight, np.float32)
    if positive_weight != 1 and split.label is not None:
        factor = np.where(split.label == 1, np.float32(positive_weight), np.float32(1))
        found = factor if found is None else found * factor
    return None if found is None else found / np.mean(found, dtype=np.float64).astype(np.float32)
