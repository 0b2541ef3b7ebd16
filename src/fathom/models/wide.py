"""The wide part: y = sum of w_k over the active wide features (Cheng et al. 2016, section 3.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fathom.batch import Layout
from fathom.models import Inputs
from fathom.models.tables import Tables, look_up, pool
from fathom.parallel import Group


class Wide(Tables):
    """A linear model over one-hot columns and crosses: one weight for each id of each slot.

    Looking up and adding weights is the product of a sparse 0/1 vector with the weights. All slots
    share one table of shape (rows, 1), each at its own offset.

    A cross is a conjunction that is 0 unless all its parts are there (section 3.1, equation 1), so
    combinations that have no id of their own add nothing: their weight stays 0. Were it trained,
    it would be a bias for whatever is rare, learnt from the rare pairs of the training window and
    given to the new ones of the days after, which are others.

    Args:
        layout: its ``wide_slots`` and ``inactive``.
    """

    inactive: Tensor

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layout.wide_rows, 1))
        inactive = torch.tensor(layout.inactive, dtype=torch.int64)
        self.register_buffer("inactive", inactive, persistent=False)

    def spread(self, holders: Group) -> None:
        """Keep only the rows that this process is to hold."""
        super().spread(holders)
        self.inactive = holders.held_rows(self.inactive)

    @torch.no_grad()
    def silence(self) -> None:
        """Put the weights of inactive rows back to 0, after a step."""
        self.weight.index_fill_(0, self.inactive, 0)

    def forward(self, inputs: Inputs) -> Tensor:
        """Weights by slot: (B, S) ids and T bags in, (B, S + T) out; a bag's weights are summed.

        In evaluation they are summed in float64, so that a logit is the sum of its terms to within
        1e-6 however long its lists are.
        """
        if not self.training:
            return self._exact(inputs)
        single = look_up(self.weight, inputs.wide_ids, self.holders).squeeze(-1)
        bags = [pool(self.weight, bag, "sum", self.holders) for bag in inputs.wide_bags]
        return torch.cat([single, *bags], dim=1)

    def weights_of(self, ids: Tensor) -> Tensor:
        """(...) ids of any slots in, their weights out, float64."""
        return look_up(self.weight, ids, self.holders).squeeze(-1).double()

    def _exact(self, inputs: Inputs) -> Tensor:
        sums = [self.weights_of(inputs.wide_ids)]
        for bag in inputs.wide_bags:
            lengths = bag.offsets.diff()
            rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
            weights = self.weights_of(bag.values)[:, None]
            sums.append(weights.new_zeros(len(lengths), 1).index_add(0, rows, weights))
        return torch.cat(sums, dim=1)
