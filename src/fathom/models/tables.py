"""Look-ups in tables of rows, whole or spread over processes.

A table whose rows are spread holds, in process k of K, the rows k, k + K, k + 2K, … of the whole
one. Each process looks up rows for its own examples: the distinct ones are asked of the processes
that hold them, and their gradients go back the same way, by the all-to-all exchange of
``torch.distributed``. Traffic grows with the batch, not with the tables.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fathom.models import Bag
from fathom.parallel import Group, Shard


class Tables(nn.Module):
    """A part of a model whose parameters are tables of rows, trained by optimizers for such."""

    def __init__(self) -> None:
        super().__init__()
        #: The processes that the rows are spread over; None if they are all here.
        self.holders: Group | None = None
        self._rows: dict[int, int] = {}

    @property
    def stored(self) -> list[nn.Parameter]:
        """The tables as they are stored and trained."""
        return list(self.parameters(recurse=False))

    def spread(self, holders: Group) -> None:
        """Keep only the rows that this process is to hold."""
        for name, table in list(self.named_parameters(recurse=False)):
            held = nn.Parameter(holders.held(table.detach()))
            setattr(self, name, held)
            self._rows[id(held)] = len(table)
        self.holders = holders

    def shard(self, table: Tensor, values: Tensor) -> Tensor | Shard:
        """What has a row for each of a stored table's: itself, or as a part of the whole."""
        if self.holders is None:
            return values
        return Shard(values, 0, self._rows[id(table)], self.holders)

    def named(self) -> dict[str, Tensor | Shard]:
        """Its part of the model's state dict."""
        return {
            name: self.shard(table, table.detach())
            for name, table in self.named_parameters(recurse=False)
        }


def named_weights(model: nn.Module) -> dict[str, Tensor | Shard]:
    """A model's state dict, in which tables that are spread are shards."""
    found: dict[str, Tensor | Shard] = dict(model.state_dict())
    for prefix, part in model.named_modules():
        if isinstance(part, Tables) and part.holders is not None:
            found |= {f"{prefix}.{name}": value for name, value in part.named().items()}
    return found


def look_up(table: Tensor, rows: Tensor, holders: Group | None = None) -> Tensor:
    """Rows of a table; its gradient is sparse.

    Args:
        table: (R, D); with ``holders``, those of its rows that this process holds.
        rows: (...) numbers of rows of the whole table.
        holders: the processes over which rows are spread, all of which must call this alike.

    Returns:
        (..., D).
    """
    if holders is None:
        return functional.embedding(rows, table, sparse=True)
    distinct, places = torch.unique(rows, return_inverse=True)
    exchanged: Tensor = _Exchange.apply(table, distinct, holders)  # type: ignore[no-untyped-call]
    return exchanged[places]


def pool(
    table: Tensor, bag: Bag, mode: Literal["sum", "mean"], holders: Group | None = None
) -> Tensor:
    """(B, D) sums or means of each bag's rows, zeros where it is empty; else as `look_up`."""
    values, source = bag.values, table
    if holders is not None:
        source = look_up(table, bag.values, holders)
        values = torch.arange(len(source), device=source.device)
    return functional.embedding_bag(
        values,
        source,
        bag.offsets.to(values.dtype),
        mode=mode,
        sparse=holders is None,
        include_last_offset=True,
    )


class _Exchange(torch.autograd.Function):
    """(U,) distinct rows in rising order → (U, D), from the processes that hold them."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, distinct: Tensor, holders: Group) -> Tensor:
        by_holder = torch.argsort(distinct % holders.world, stable=True)
        wanted = distinct.index_select(0, by_holder)
        sizes = torch.bincount(wanted % holders.world, minlength=holders.world)
        asked, given = holders.exchange(wanted // holders.world, sizes.tolist())
        values, _ = holders.exchange(table.index_select(0, asked), given)
        ctx.holders, ctx.sizes, ctx.shape = holders, sizes.tolist(), table.shape
        ctx.save_for_backward(by_holder, asked)
        return torch.empty_like(values).index_copy_(0, by_holder, values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        by_holder, asked = ctx.saved_tensors
        mine, _ = ctx.holders.exchange(gradients[0].index_select(0, by_holder), ctx.sizes)
        gradient = torch.sparse_coo_tensor(
            asked[None].long(), mine, ctx.shape, check_invariants=False
        )
        return gradient, None, None
