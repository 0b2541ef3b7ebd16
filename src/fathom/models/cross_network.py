"""Deep & Cross: bounded-degree products of all inputs, learnt instead of chosen.

Each cross layer multiplies the first input x_0 by a function of the last x_l, so l layers reach
products of l + 1 inputs. With ⊙ the product by element::

    v1:       x_(l+1) = x_0 (x_l . w_l) + b_l + x_l                     (Wang et al. 2017, eq. 3)
    v2:       x_(l+1) = x_0 ⊙ (W_l x_l + b_l) + x_l                     (Wang et al. 2021, eq. 1)
    mixture:  x_(l+1) = sum_i G_i(x_l) x_0 ⊙ (U_i g(C_i g(V_i' x_l)) + b_l) + x_l         (eq. 4)

The cross network stands beside the deep one, and one linear layer reads both ("parallel", Wang et
al. 2021, figure 1b).

Legend: B examples, D width of the embeddings beside the numbers, K experts, R their rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fathom.batch import Layout
from fathom.config import ConfigError, TrainingConfig
from fathom.models import Inputs, Model
from fathom.models.deep import Embeddings, Layers


class CrossLayer(nn.Module):
    """One layer of the first version: a vector of weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width).normal_(std=width**-0.5))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, first: Tensor, last: Tensor) -> Tensor:
        """x_0 and x_l, both (B, D), to x_(l+1), (B, D)."""
        return torch.addcmul(last + self.bias, first, (last @ self.weight)[:, None])


class MatrixCrossLayer(nn.Module):
    """One layer of the second version: a full matrix of weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.product = nn.Linear(width, width)

    def forward(self, first: Tensor, last: Tensor) -> Tensor:
        """x_0 and x_l, both (B, D), to x_(l+1), (B, D)."""
        return torch.addcmul(last, first, self.product(last))


class MixtureCrossLayer(nn.Module):
    """One layer of the second version by experts of low rank, with g = tanh and a softmax gate.

    Args:
        rank: R. experts: K; one alone has no gate.
    """

    def __init__(self, width: int, rank: int, experts: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(experts, width, rank).normal_(std=width**-0.5))
        self.inner = nn.Parameter(torch.empty(experts, rank, rank).normal_(std=rank**-0.5))
        self.up = nn.Parameter(torch.empty(experts, rank, width).normal_(std=rank**-0.5))
        self.bias = nn.Parameter(torch.zeros(width))
        self.gate = nn.Linear(width, experts, bias=False) if experts > 1 else None

    def forward(self, first: Tensor, last: Tensor) -> Tensor:
        """x_0 and x_l, both (B, D), to x_(l+1), (B, D)."""
        low = torch.tanh(torch.matmul(last, self.down))  # (K, B, R)
        back = torch.matmul(torch.tanh(torch.matmul(low, self.inner)), self.up) + self.bias
        if self.gate is None:
            return torch.addcmul(last, first, back[0])
        shares = torch.softmax(self.gate(last), dim=1)  # (B, K)
        return torch.addcmul(last, first, torch.einsum("bk,kbd->bd", shares, back))


class DeepCross(nn.Module):
    """Embeddings, then cross layers beside ReLU layers, then one logit.

    Args:
        crosses: the cross layers, each from (B, D) twice to (B, D).
    """

    def __init__(self, layout: Layout, config: TrainingConfig, crosses: list[nn.Module]) -> None:
        super().__init__()
        half = config.precision == "bfloat16"
        self.embeddings = Embeddings(layout)
        self.crosses = nn.ModuleList(crosses)
        self.layers = Layers(layout.deep_width, config.hidden, config.dropout, half)
        reads = layout.deep_width + (self.layers.width if config.hidden else 0)
        self.out = nn.Linear(reads, 1, bias=False)

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits, shape (B,)."""
        first = crossed = self.embeddings(inputs)
        for layer in self.crosses:
            crossed = layer(first, crossed)
        read = [crossed, self.layers(first)] if len(self.layers) else [crossed]
        logit: Tensor = self.out(torch.cat(read, dim=1)).squeeze(-1)
        return logit


def _width(layout: Layout, config: TrainingConfig) -> int:
    if not layout.deep_width:
        raise ConfigError(
            [
                f"training.model is {config.model!r}, which needs deep columns; the spec has none: "
                "add one, or choose another model"
            ]
        )
    return layout.deep_width


def dcn(layout: Layout, config: TrainingConfig) -> Model:
    """Deep & Cross with vectors (Wang et al. 2017, arXiv:1708.05123)."""
    width = _width(layout, config)
    layers: list[nn.Module] = [CrossLayer(width) for _ in range(config.cross_layers)]
    return Model(None, DeepCross(layout, config, layers))


def dcn_v2(layout: Layout, config: TrainingConfig) -> Model:
    """Deep & Cross with matrices, full or a mixture of low ranks (Wang et al. 2021, 2008.13535)."""
    width, rank = _width(layout, config), config.cross_rank
    layers: list[nn.Module] = [
        MixtureCrossLayer(width, rank, config.cross_experts) if rank else MatrixCrossLayer(width)
        for _ in range(config.cross_layers)
    ]
    return Model(None, DeepCross(layout, config, layers))
