"""Optimizers for sparse rows: work per step grows with the rows touched, not with the table.

Both take parameters of shape (rows, width) whose gradients are sparse in the first dimension.
Dense parameters use torch's own optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer


class _SparseRows(Optimizer):
    """The step over touched rows; subclasses say what a step does to them."""

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the rows that the last backward pass touched.

        Raises:
            TypeError: a gradient is dense.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if not parameter.grad.is_sparse:
                    raise TypeError(
                        f"{type(self).__name__} got a dense gradient of shape "
                        f"{tuple(parameter.grad.shape)}; look rows up with sparse=True, or use a "
                        "dense optimizer"
                    )
                gradient = parameter.grad.coalesce()
                self._update(parameter, gradient.indices()[0], gradient.values(), group)
        return loss

    def _update(
        self, weight: Tensor, rows: Tensor, gradient: Tensor, group: dict[str, Any]
    ) -> None:
        raise NotImplementedError


class FTRLProximal(_SparseRows):
    """Follow the regularised leader, per coordinate, with L1 and L2.

    With g the gradient, n the sum of its squares and sigma = (sqrt(n + g²) - sqrt(n)) / alpha::

        z += g - sigma w;  n += g²
        w = 0                                                     if |z| <= l1
        w = -(z - sign(z) l1) / ((beta + sqrt(n)) / alpha + l2)   otherwise

    McMahan et al. 2013, "Ad click prediction", algorithm 1.

    Args:
        lr: alpha. beta: the other half of the step size.
        l1, l2: penalties, in units of one example's gradient.

    The gradients of a mean over B examples are multiplied by `scale` = B first, which makes them
    the sum over examples that the paper's penalties are about.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.05,
        beta: float = 1.0,
        l1: float = 0.0,
        l2: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "l1": l1, "l2": l2})
        self.scale = 1.0

    def _update(
        self, weight: Tensor, rows: Tensor, gradient: Tensor, group: dict[str, Any]
    ) -> None:
        state = self.state[weight]
        if not state:
            state["z"], state["n"] = torch.zeros_like(weight), torch.zeros_like(weight)
        gradient = gradient * self.scale
        old = state["n"][rows]
        new = old + gradient.square()
        sigma = (new.sqrt() - old.sqrt()) / group["lr"]
        z = state["z"][rows] + gradient - sigma * weight[rows]
        step = (group["beta"] + new.sqrt()) / group["lr"] + group["l2"]
        state["n"][rows], state["z"][rows] = new, z
        weight[rows] = -torch.sign(z) * (z.abs() - group["l1"]).clamp(min=0) / step


class SparseAdagrad(_SparseRows):
    """AdaGrad: w -= lr g / (sqrt(G) + eps) with G the running sum of g².

    Duchi et al. 2011, "Adaptive subgradient methods", figure 1 (diagonal case).

    Args:
        rowwise: keep one G per row, the mean over its columns, instead of one per weight.
        initial: what G starts from, which bounds the first steps.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.05,
        eps: float = 1e-10,
        initial: float = 0.01,
        rowwise: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "initial": initial, "rowwise": rowwise})

    def _update(
        self, weight: Tensor, rows: Tensor, gradient: Tensor, group: dict[str, Any]
    ) -> None:
        state = self.state[weight]
        if not state:
            width = 1 if group["rowwise"] else weight.shape[1]
            state["sum"] = weight.new_full((weight.shape[0], width), group["initial"])
        squared = gradient.square()
        if group["rowwise"]:
            squared = squared.mean(dim=1, keepdim=True)
        total = state["sum"][rows] + squared
        state["sum"][rows] = total
        weight[rows] -= group["lr"] * gradient / (total.sqrt() + group["eps"])
