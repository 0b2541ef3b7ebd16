"""More than one process: each takes its part of every batch, and all take the same step.

``torchrun`` starts the processes. Gradients of dense weights are summed over all; of tables, the
touched rows are exchanged with their gradients, so that every process makes the same update to its
own copy. Traffic grows with the batch, not with the tables.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


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
