"""Models, all on the same parts: encoded examples in, one logit per example out.

    P(Y = 1 | x) = sigmoid(w_wide . [x, phi(x)] + w_deep . a^(l_f) + b)

(Cheng et al. 2016, equation 3): x are the wide columns, phi(x) the crosses, a^(l_f) the last
hidden layer of the deep part, b the bias.

Legend: B examples in a batch, S + T wide slots, F + G deep fields, M numeric inputs, D the width of
the deep part's input. A *logit* is always before the sigmoid; for regression it is the prediction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fathom.batch import Batch, Layout, Ragged
from fathom.config import ConfigError, TrainingConfig

#: Examples that are scored at a time, which bounds memory.
_SCORING_BATCH = 8192


class Bag(NamedTuple):
    """A ragged field: row ``i`` has ``values[offsets[i]:offsets[i + 1]]``."""

    values: Tensor
    offsets: Tensor

    def take(self, index: Tensor) -> Bag:
        """The rows at ``index``, in that order."""
        starts = self.offsets.index_select(0, index)
        lengths = self.offsets.index_select(0, index + 1) - starts
        offsets = torch.zeros(len(index) + 1, dtype=lengths.dtype, device=lengths.device)
        torch.cumsum(lengths, 0, out=offsets[1:])
        places = torch.repeat_interleave(starts - offsets[:-1], lengths)
        places += torch.arange(len(places), device=places.device)
        return Bag(self.values.index_select(0, places), offsets)


class Inputs(NamedTuple):
    """A `fathom.batch.Batch` as tensors on one device, with the same shapes."""

    numeric: Tensor
    deep_ids: Tensor
    deep_bags: tuple[Bag, ...]
    wide_ids: Tensor
    wide_bags: tuple[Bag, ...]

    @classmethod
    def of(cls, batch: Batch, device: torch.device | str = "cpu") -> Inputs:
        """Move a batch to a device."""

        def bag(ragged: Ragged) -> Bag:
            values = torch.as_tensor(ragged.values, device=device)
            return Bag(values, torch.as_tensor(ragged.offsets, device=device))

        return cls(
            numeric=torch.as_tensor(batch.numeric, device=device),
            deep_ids=torch.as_tensor(batch.deep_ids, device=device),
            deep_bags=tuple(bag(ragged) for ragged in batch.deep_bags),
            wide_ids=torch.as_tensor(batch.wide_ids, device=device),
            wide_bags=tuple(bag(ragged) for ragged in batch.wide_bags),
        )

    def take(self, index: Tensor) -> Inputs:
        """The examples at ``index``, in that order."""
        return Inputs(
            numeric=self.numeric.index_select(0, index),
            deep_ids=self.deep_ids.index_select(0, index),
            deep_bags=tuple(bag.take(index) for bag in self.deep_bags),
            wide_ids=self.wide_ids.index_select(0, index),
            wide_bags=tuple(bag.take(index) for bag in self.wide_bags),
        )


@dataclass(frozen=True)
class Contributions:
    """What a logit is the exact sum of.

    Args:
        wide: (B, S + T) weight of each wide slot, float64 in evaluation; zero width without a
            wide part.
        deep: (B,) the deep part's logit; zeros without a deep part.
        bias: scalar.
    """

    wide: Tensor
    deep: Tensor
    bias: Tensor

    @property
    def logit(self) -> Tensor:
        """(B,) the sum."""
        return self.wide.sum(dim=1) + self.deep + self.bias


class Model(nn.Module):
    """The base of every model: a bias and whichever parts it has, summed to one logit."""

    def __init__(self, wide: nn.Module | None, deep: nn.Module | None) -> None:
        super().__init__()
        self.wide = wide
        self.deep = deep
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits, shape (B,)."""
        return self.contributions(inputs).logit

    def heads(self, inputs: Inputs) -> Tensor:
        """Logits that are each trained on the label, (B, H); the last one is the prediction."""
        return self(inputs)[:, None]  # type: ignore[no-any-return]

    def contributions(self, inputs: Inputs) -> Contributions:
        """The exact parts of each logit."""
        rows = len(inputs.numeric)
        none = self.bias.new_zeros(rows)
        return Contributions(
            wide=self.wide(inputs) if self.wide is not None else none[:, None][:, :0],
            deep=self.deep(inputs) if self.deep is not None else none,
            bias=self.bias,
        )

    def weights_of(self, ids: Tensor) -> Tensor:
        """What each wide id, (...), adds to the logit, float64; only with a wide part."""
        return self.wide.weights_of(ids)  # type: ignore[union-attr,operator,no-any-return]


@torch.no_grad()
def score(model: Model, batch: Batch) -> NDArray[np.float64]:
    """Logits of N examples, shape (N,), in evaluation mode and in bounded memory."""
    device = model.bias.device
    was_training = model.training
    model.eval()
    starts = range(0, len(batch), _SCORING_BATCH)
    rows = [np.arange(s, min(s + _SCORING_BATCH, len(batch))) for s in starts]
    logits = [model(Inputs.of(batch.take(index), device)).double().cpu().numpy() for index in rows]
    model.train(was_training)
    return np.concatenate(logits) if logits else np.zeros(0)


Builder = Callable[[Layout, TrainingConfig], Model]


def build(layout: Layout, config: TrainingConfig) -> Model:
    """A freshly initialised model, reproducible from ``config.seed``.

    Raises:
        ConfigError: ``config.model`` is not registered, or the layout lacks what it is about.
    """
    from fathom.models.family import MODELS

    if config.model not in MODELS:
        raise ConfigError(
            [f"training.model is {config.model!r}; it must be one of {sorted(MODELS)}"]
        )
    torch.manual_seed(config.seed)
    return MODELS[config.model](layout, config)
