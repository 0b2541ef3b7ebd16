"""The rival of joint training: a wide and a deep model trained apart, their logits combined.

Cheng et al. 2016, section 3.3: in an ensemble "individual models are trained separately without
knowing each other, and their predictions are combined only at inference time, but not at training
time". Here each has a bias and a loss of its own; two weights and a bias, fitted to the same labels
by the same steps, combine their logits::

    y_w = w . [x, phi(x)] + b_w,    y_d = w_d . a^(l_f) + b_d,    y = c_w y_w + c_d y_d + b

No gradient of y reaches either part.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fathom.batch import Layout
from fathom.config import TrainingConfig
from fathom.models import Contributions, Inputs, Model
from fathom.models.deep import Deep
from fathom.models.wide import Wide


class Ensemble(Model):
    """See the module's docstring. Contributions are of the combined logit."""

    def __init__(self, wide: nn.Module, deep: nn.Module) -> None:
        super().__init__(wide, deep)
        self.biases = nn.Parameter(torch.zeros(2))  # of the parts: b_w, b_d
        self.shares = nn.Parameter(torch.full((2,), 0.5))  # c_w, c_d

    def heads(self, inputs: Inputs) -> Tensor:
        """(B, 3): the wide logit, the deep one, and the two combined."""
        assert self.wide is not None
        assert self.deep is not None
        wide = self.wide(inputs).sum(dim=1) + self.biases[0]
        deep = self.deep(inputs).to(wide.dtype) + self.biases[1]
        both = torch.stack([wide, deep], dim=1)
        combined = both.detach() @ self.shares.to(wide.dtype) + self.bias
        return torch.cat([both, combined[:, None]], dim=1)

    def contributions(self, inputs: Inputs) -> Contributions:
        """The exact parts of each combined logit."""
        assert self.wide is not None
        assert self.deep is not None
        return Contributions(
            wide=self.wide(inputs) * self.shares[0],
            deep=self.deep(inputs) * self.shares[1],
            bias=self.bias + self.shares @ self.biases,
        )

    def weights_of(self, ids: Tensor) -> Tensor:
        """What each wide id, (...), adds to the combined logit, float64."""
        return super().weights_of(ids) * self.shares[0]


def ensemble(layout: Layout, config: TrainingConfig) -> Model:
    """Wide and deep trained apart, and combined."""
    half = config.precision == "bfloat16"
    return Ensemble(Wide(layout), Deep(layout, config.hidden, config.dropout, half))
