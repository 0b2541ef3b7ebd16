"""The wide part: y = sum of w_k over the active wide features (Cheng et al. 2016, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fathom.batch import Layout
from fathom.models import Inputs
from fathom.models.tables import Tables, look_up, pool


class Wide(Tables):
    """A linear model over one-hot columns and crosses: one weight for each id of each slot.

    Looking up and adding weights is the product of a sparse 0/1 vector with the weights. All slots
    share one table of shape (rows, 1), each at its own offset.

    Args:
        layout: its ``wide_slots``.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layout.wide_rows, 1))

    def forward(self, inputs: Inputs) -> Tensor:
        """Weights by slot: (B, S) ids and T bags in, (B, S + T) out; a bag's weights are summed."""
        single = look_up(self.weight, inputs.wide_ids, self.holders).squeeze(-1)
        bags = [pool(self.weight, bag, "sum", self.holders) for bag in inputs.wide_bags]
        return torch.cat([single, *bags], dim=1)
