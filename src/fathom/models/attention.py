"""Deep Interest Network: what a user's history says depends on the candidate.

Zhou et al. 2018, "Deep interest network for click-through rate prediction" (arXiv:1706.06978). The
history of n items with embeddings e_1 … e_n is pooled for a candidate with embedding v (section
4.3, equation 3)::

    sum over j of a(e_j, v) e_j,    a(e, v) = w . f(W [e, v, e - v, e ⊙ v] + b) + c

The weights a are not normalised, so that their sum says how strong the interest is. f is Dice
(section 5.2, equation 9), p the share of an activation s that passes::

    f(s) = p s + (1 - p) alpha s,    p = sigmoid((s - E[s]) / sqrt(Var[s] + eps))

Legend: B examples, N values of a history over all examples, w the width of its table.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fathom.batch import Layout
from fathom.config import ConfigError, TrainingConfig
from fathom.models import Bag, Inputs, Model
from fathom.models.deep import Embeddings
from fathom.models.tables import look_up

_EPSILON = 1e-8
#: How much of the running mean and variance a batch replaces.
_MOMENTUM = 0.1


class Dice(nn.Module):
    """An activation whose turning point follows the data. See the module's docstring."""

    mean: Tensor
    variance: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, s: Tensor) -> Tensor:
        """(N, width) in and out; in training by the batch's moments, else by the running ones."""
        if self.training and len(s):
            mean, variance = s.mean(dim=0), s.var(dim=0, unbiased=False)
            with torch.no_grad():
                self.mean.lerp_(mean, _MOMENTUM)
                self.variance.lerp_(variance, _MOMENTUM)
        else:
            mean, variance = self.mean, self.variance
        share = torch.sigmoid((s - mean) * torch.rsqrt(variance + _EPSILON))
        return share * s + (1 - share) * self.alpha * s


def _activation(name: str, width: int) -> nn.Module:
    if name == "relu":
        return nn.ReLU()
    return nn.PReLU(width) if name == "prelu" else Dice(width)


class Attention(nn.Module):
    """Weights of a history's values for a candidate: a(e, v) above.

    Args:
        width: w. hidden: of the one layer. activation: ``dice``, ``prelu`` or ``relu``.
    """

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.layer = nn.Linear(4 * width, hidden)
        self.activation = _activation(activation, hidden)
        self.out = nn.Linear(hidden, 1)

    def forward(self, values: Tensor, candidate: Tensor) -> Tensor:
        """(N, w) values and the candidate of each, (N, w), to weights (N, 1)."""
        read = torch.cat([values, candidate, values - candidate, values * candidate], dim=1)
        weights: Tensor = self.out(self.activation(self.layer(read)))
        return weights


class AttendedEmbeddings(Embeddings):
    """`Embeddings` whose bags are pooled by attention to the item's field that shares their table.

    Bags that share none are averaged. What is not there needs no mask: bags are ragged.
    """

    def __init__(self, layout: Layout, hidden: int, activation: str) -> None:
        super().__init__(layout)
        self._targets = layout.targets
        self.attention = nn.ModuleDict(
            {
                str(i): Attention(layout.tables[layout.bags[i]][1], hidden, activation)
                for i, target in enumerate(self._targets)
                if target is not None
            }
        )

    def forward(self, inputs: Inputs) -> Tensor:
        """(B, F) ids, G bags and (B, M) numbers in, (B, D) out."""
        rest = (
            bag if target is None else _emptied(bag)
            for bag, target in zip(inputs.deep_bags, self._targets, strict=True)
        )
        averaged = super().forward(inputs._replace(deep_bags=tuple(rest)))
        parts = [averaged[:, : self.columns.bags[0].start]]
        for i, (columns, bag) in enumerate(zip(self.columns.bags, inputs.deep_bags, strict=True)):
            target = self._targets[i]
            if target is None:
                parts.append(averaged[:, columns])
            else:
                candidate = averaged[:, self.columns.fields[target]]
                parts.append(self._attend(i, bag, candidate))
        return torch.cat([*parts, averaged[:, self.columns.numeric]], dim=1)

    def _attend(self, i: int, bag: Bag, candidate: Tensor) -> Tensor:
        """(B, w): a bag's values by their weights for each example's candidate (B, w)."""
        stored, start = self.place(i)
        values = look_up(stored, bag.values + start, self.holders)  # (N, w)
        row = torch.repeat_interleave(
            torch.arange(len(candidate), device=candidate.device), bag.offsets.diff()
        )
        weights = self.attention[str(i)](values, candidate.index_select(0, row))
        return torch.zeros_like(candidate).index_add_(0, row, weights * values)


def _emptied(bag: Bag) -> Bag:
    """As many rows, without any values."""
    return Bag(bag.values[:0], torch.zeros_like(bag.offsets))


class InterestNetwork(nn.Module):
    """Attended embeddings, then layers with the same activation, then one logit; all in float32.

    Args:
        config: ``activation``, ``attention_width``, ``hidden`` and ``dropout`` of it.
    """

    def __init__(self, layout: Layout, config: TrainingConfig) -> None:
        super().__init__()
        if all(target is None for target in layout.targets):
            raise ConfigError(
                [
                    f"training.model is {config.model!r}, which needs a history (a multi or "
                    "sequence column, not of the item) whose embedding table a column of the item "
                    "shares; the spec has none: add one, or choose another model"
                ]
            )
        self.embeddings = AttendedEmbeddings(layout, config.attention_width, config.activation)
        layers: list[nn.Module] = []
        width = layout.deep_width
        for next_width in config.hidden:
            layers += [nn.Linear(width, next_width), _activation(config.activation, next_width)]
            layers.append(nn.Dropout(config.dropout))
            width = next_width
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1, bias=False))

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits, shape (B,)."""
        logit: Tensor = self.layers(self.embeddings(inputs)).squeeze(-1)
        return logit


def din(layout: Layout, config: TrainingConfig) -> Model:
    """Attention over the user's history by the candidate."""
    return Model(None, InterestNetwork(layout, config))
