"""More than one process: each takes its part of every batch, and all take the same step.

``torchrun`` starts the processes. Gradients of dense weights are summed over all; of tables, the
touched rows are exchanged with their gradients, so that every process makes the same update to its
own copy. Traffic grows with the batch, not with the tables. Tables that are too large for a device
are spread over all instead: a `Shard` is what one process holds of something with a row for each.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, distributed

Made = TypeVar("Made")

#: Steps between two questions to the leading process.
_ASKED = 16
#: Values of a shard that are exchanged at a time when it is read or written as a whole.
_BLOCK = 1 << 24


@dataclass(frozen=True)
class Group:
    """The processes that train together; one alone by default.

    Args:
        rank: this process's number, from 0. world: how many there are.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls, device: torch.device) -> Group:
        """Join the processes that ``torchrun`` started, if it did: NCCL on CUDA, else gloo."""
        if "TORCHELASTIC_RUN_ID" not in os.environ:
            return cls()
        if not distributed.is_initialized():
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        return cls(distributed.get_rank(), distributed.get_world_size())

    @property
    def leads(self) -> bool:
        """Whether this process writes what only one should."""
        return self.rank == 0

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one type by their sums over all processes, in one exchange."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        distributed.all_reduce(flat)
        parts = torch.split(flat, [tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.copy_(part.view_as(tensor))

    def gather(self, rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """All processes' rows (n,) and values (n, D), in the order of the processes."""
        if self.world == 1:
            return rows, values
        counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(self.world)]
        distributed.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
        sizes = [int(count) for count in counts]
        most = max(sizes)

        def gathered(mine: Tensor) -> Tensor:
            padded = mine.new_zeros((most, *mine.shape[1:]))
            padded[: len(mine)] = mine
            parts = [torch.empty_like(padded) for _ in sizes]
            distributed.all_gather(parts, padded)
            return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

        return gathered(rows), gathered(values)

    def exchange(self, values: Tensor, sizes: list[int]) -> tuple[Tensor, list[int]]:
        """Give every process its part, and get what all others have for this one.

        Args:
            values: (n, ...) in the order of the processes they go to. sizes: how many to each.

        Returns:
            (m, ...) in the order of the processes they come from, and how many from each.
        """
        out = torch.tensor(sizes, dtype=torch.int64, device=values.device)
        into = torch.empty_like(out)
        distributed.all_to_all_single(into, out)
        got = [int(size) for size in into.tolist()]
        received = values.new_empty((sum(got), *values.shape[1:]))
        distributed.all_to_all_single(received, values.contiguous(), got, sizes)
        return received, got

    def in_turn(self, make: Callable[[], Made]) -> Made:
        """Call a function in one process after the other, and return what it made in this one."""
        for turn in range(self.world):
            if turn == self.rank:
                made = make()
            self.wait()
        return made

    def held(self, whole: Tensor) -> Tensor:
        """A copy of the rows that this process holds of a table whose rows are spread."""
        return whole[self.rank :: self.world].clone()

    def held_rows(self, rows: Tensor) -> Tensor:
        """Of some rows of such a table those that this process holds, by their number here."""
        return rows[rows % self.world == self.rank] // self.world

    def decided(self, wish: bool, step: int, device: torch.device) -> bool:
        """What the leading process wishes; more processes ask it at some steps only."""
        if self.world == 1:
            return wish
        if step % _ASKED:
            return False
        wishes = torch.tensor([int(wish)], device=device)
        distributed.broadcast(wishes, 0)
        return bool(wishes[0])

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.world > 1:
            distributed.barrier()

    @staticmethod
    def leading() -> bool:
        """Whether this process will be the first, before it has joined the others."""
        return os.environ.get("RANK", "0") == "0"

    @staticmethod
    def leave() -> None:
        """End the exchange, if there was one; the other processes must do so too."""
        if distributed.is_initialized():
            distributed.destroy_process_group()


@dataclass(frozen=True)
class Shard:
    """What this process holds of a tensor whose rows are spread over a group.

    Args:
        held: (·, D) its rows ``rank``, ``rank + world``, … of the table, or of a state of it.
        start, rows: which rows of the table are meant: a part that has a name of its own.
        group: the processes. All of them must read or write a shard together.
    """

    held: Tensor
    start: int
    rows: int
    group: Group

    @property
    def shape(self) -> torch.Size:
        """Of the whole."""
        return torch.Size((self.rows, *self.held.shape[1:]))

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """The whole, some rows at a time, on the host, from the first to the last."""
        step = max(_BLOCK // max(self.held[:1].numel(), 1), 1)
        for first in range(0, self.rows, step):
            last = min(first + step, self.rows)
            parts = [self._span(k, first, last) for k in range(self.group.world)]
            most = max(part.stop - part.start for part in parts)
            mine = self.held[parts[self.group.rank]]
            padded = mine.new_zeros((most, *mine.shape[1:]))
            padded[: len(mine)] = mine
            gathered = [torch.empty_like(padded) for _ in parts]
            distributed.all_gather(gathered, padded)
            block = torch.empty((last - first, *mine.shape[1:]), dtype=mine.dtype)
            for k, values in enumerate(gathered):
                places = block[(k - self.start - first) % self.group.world :: self.group.world]
                places.copy_(values[: len(places)])
            yield slice(first, last), block

    def fill(self, whole: Tensor) -> None:
        """Take over this process's rows of the whole."""
        mine = self._span(self.group.rank, 0, self.rows)
        offset = (self.group.rank - self.start) % self.group.world
        self.held[mine].copy_(whole[offset :: self.group.world])

    def _span(self, rank: int, first: int, last: int) -> slice:
        """Where a process has the rows from ``first`` to ``last`` of those that are meant."""
        world = self.group.world
        begin, end = (-((rank - self.start - row) // world) for row in (first, last))
        return slice(begin, end)
