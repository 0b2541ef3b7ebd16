"""Optimizers for sparse rows: work per step grows with the rows touched, not with the table.

They take parameters of shape (R, D) whose gradients are sparse in the first dimension, as look-ups
with ``sparse=True`` leave them. Dense parameters use torch's own optimizers.

Legend: R rows of a table, D its width, n look-ups in a batch, U distinct rows among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim import Optimizer


def sum_duplicates(rows: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Add up what belongs to the same row, in the order of the look-ups.

    On a CPU each row comes once. On CUDA a row comes as often as it was looked up, each time with
    the whole sum, so that the shapes do not depend on the data and the host need not wait.

    Args:
        rows: (n,) int64. values: (n, D).

    Returns:
        Rows in rising order, (U,), and their sums, (U, D); on CUDA (n,) and (n, D).
    """
    ordered, order = torch.sort(rows, stable=True)
    new = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    torch.ne(ordered[1:], ordered[:-1], out=new[1:])
    if rows.is_cuda:
        group = new.cumsum(0) - 1
        sums = torch.zeros_like(values).index_add_(0, group, values.index_select(0, order))
        return ordered, sums.index_select(0, group)
    first = new.nonzero().squeeze(1)
    sums = functional.embedding_bag(order, values, first, mode="sum")
    return ordered.index_select(0, first), sums


class SparseRows(Optimizer):
    """The step over touched rows; subclasses say what a step does to them.

    The gradients of a mean over B examples are multiplied by `scale` = B first, which makes them
    the sum over examples that the papers' penalties, and what a sum of squares starts from, are
    about: a batch has few examples of most rows.
    """

    #: What gradients are multiplied by.
    scale = 1.0

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
                gradient = parameter.grad
                self.update(parameter, *sum_duplicates(gradient._indices()[0], gradient._values()))
        return loss

    @property
    def tables(self) -> list[Tensor]:
        """The parameters."""
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def update(self, weight: Tensor, rows: Tensor, gradient: Tensor) -> None:
        """Update rows of a table, as `sum_duplicates` gives them with their gradients."""
        (group,) = (g for g in self.param_groups if any(p is weight for p in g["params"]))
        if len(rows):
            self._update(weight, rows, gradient * self.scale, self._state_of(weight, group), group)

    def _state_of(self, weight: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[weight]
        if not state:
            state.update(self._initial(weight.detach(), group))
        return state

    def prepare(self) -> None:
        """Make the state of every table now, rather than at its first step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._state_of(parameter, group)

    def _initial(self, weight: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        raise NotImplementedError

    def _update(
        self,
        weight: Tensor,
        rows: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        group: dict[str, Any],
    ) -> None:
        raise NotImplementedError


class FTRLProximal(SparseRows):
    """Follow the regularised leader, per coordinate, with L1, L2 and group-sparse rows.

    With g the gradient, n the sum of its squares and sigma = (sqrt(n + g²) - sqrt(n)) / alpha::

        z += g - sigma w;  n += g²
        s = -sign(z) max(|z| - l1, 0)
        w = max(1 - sqrt(D) group_l1 / ||s||, 0) s / ((beta + sqrt(n)) / alpha + l2)

    McMahan et al. 2013, "Ad click prediction", algorithm 1; the factor before s, which drops whole
    rows, is the sparse group lasso of Yue et al. 2021 (arXiv:2107.14432, algorithm 2).

    Args:
        lr: alpha. beta: the other half of the step size.
        l1, l2, group_l1: penalties, in units of one example's gradient.

    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.05,
        beta: float = 1.0,
        l1: float = 0.0,
        l2: float = 0.0,
        group_l1: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "l1": l1, "l2": l2, "group_l1": group_l1})

    def _initial(self, weight: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        # Weights follow from z alone, so it starts from what gives the initial ones; without, the
        # first step would forget them. L1 pulls at them from the first step on.
        z = -weight * (group["beta"] / group["lr"] + group["l2"])
        return {"z": z, "n": torch.zeros_like(weight)}

    def _update(
        self,
        weight: Tensor,
        rows: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        group: dict[str, Any],
    ) -> None:
        old = state["n"].index_select(0, rows)
        new = torch.addcmul(old, gradient, gradient)
        root = new.sqrt()
        sigma = (root - old.sqrt_()).div_(group["lr"])
        z = state["z"].index_select(0, rows).add_(gradient)
        z.addcmul_(sigma, weight.index_select(0, rows), value=-1)
        state["n"].index_copy_(0, rows, new)
        state["z"].index_copy_(0, rows, z)
        shrunk = functional.softshrink(z, group["l1"]).neg_()
        if group["group_l1"]:
            bound = math.sqrt(weight.shape[1]) * group["group_l1"]
            norm = torch.linalg.vector_norm(shrunk, dim=1, keepdim=True)
            # A row of zeros has no direction to shrink in.
            shrunk.mul_((1 - bound / norm.clamp(min=bound)).clamp_(min=0))
        step = root.add_(group["beta"]).div_(group["lr"]).add_(group["l2"])
        weight.index_copy_(0, rows, shrunk.div_(step))


class SparseAdagrad(SparseRows):
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

    def _initial(self, weight: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        width = 1 if group["rowwise"] else weight.shape[1]
        return {"sum": weight.new_full((weight.shape[0], width), group["initial"])}

    def _update(
        self,
        weight: Tensor,
        rows: Tensor,
        gradient: Tensor,
        state: dict[str, Tensor],
        group: dict[str, Any],
    ) -> None:
        total = state["sum"].index_select(0, rows)
        if group["rowwise"]:
            total.add_(gradient.square().mean(dim=1, keepdim=True))
        else:
            total.addcmul_(gradient, gradient)
        state["sum"].index_copy_(0, rows, total)
        moved = weight.index_select(0, rows)
        moved.addcdiv_(gradient, total.sqrt_().add_(group["eps"]), value=-group["lr"])
        weight.index_copy_(0, rows, moved)
