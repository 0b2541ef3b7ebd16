"""The deep part: a^(l+1) = ReLU(W^(l) a^(l) + b^(l)) (Cheng et al. 2016, section 3.2)."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from fathom.batch import Layout
from fathom.models import Inputs

#: Standard deviation of initial embeddings: small, so that rare ids start as no opinion.
_INITIAL_SCALE = 0.05


class Embeddings(nn.Module):
    """Embeddings of all deep fields beside the numeric inputs.

    Fields that share a table share its weights. The values of a multi-valued field are averaged; an
    empty one gives zeros.

    Args:
        layout: its tables, fields and bags; ``layout.deep_width`` is the output's width D.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.tables = nn.ModuleDict()
        for name, (rows, width) in layout.tables.items():
            table = nn.EmbeddingBag(rows, width, mode="mean", sparse=True, include_last_offset=True)
            nn.init.normal_(table.weight, std=_INITIAL_SCALE)
            self.tables[name] = table
        self._fields = layout.fields
        self._bags = layout.bags

    def forward(self, inputs: Inputs) -> Tensor:
        """(B, F) ids, G bags and (B, M) numbers in, (B, D) out."""
        tables = cast("dict[str, nn.EmbeddingBag]", self.tables)
        single = [
            nn.functional.embedding(inputs.deep_ids[:, i], tables[name].weight, sparse=True)
            for i, name in enumerate(self._fields)
        ]
        bags = [
            tables[name](bag.values, bag.offsets.to(bag.values.dtype))
            for name, bag in zip(self._bags, inputs.deep_bags, strict=True)
        ]
        return torch.cat([*single, *bags, inputs.numeric], dim=1)


class Deep(nn.Module):
    """Embeddings, then ReLU layers, then one logit (its bias is the model's).

    Args:
        hidden: widths of the ReLU layers.
        dropout: share of activations dropped after each.
    """

    def __init__(self, layout: Layout, hidden: tuple[int, ...], dropout: float) -> None:
        super().__init__()
        self.embeddings = Embeddings(layout)
        layers: list[nn.Module] = []
        width = layout.deep_width
        for next_width in hidden:
            layers += [nn.Linear(width, next_width), nn.ReLU()]
            layers += [nn.Dropout(dropout)] if dropout else []
            width = next_width
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1, bias=False))

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits, shape (B,)."""
        logit: Tensor = self.layers(self.embeddings(inputs)).squeeze(-1)
        return logit
