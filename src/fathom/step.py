"""The joint step: one gradient, every part by its own optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fathom.config import Task, TrainingConfig
from fathom.models import Model
from fathom.models.tables import Tables
from fathom.models.wide import Wide
from fathom.optim import FTRLProximal, SparseAdagrad, SparseRows, sum_duplicates
from fathom.parallel import Group, Shard

#: AdaGrad's accumulator of dense weights starts near zero: gradients of a mean over a batch are
#: small, so a larger start would outweigh them, and every weight would move at the same rate.
_INITIAL_ACCUMULATOR = 1e-6


class Optimizers:
    """One optimizer for each part of a model, stepped together.

    Args:
        group: the processes that share each step.
    """

    def __init__(self, model: Model, config: TrainingConfig, group: Group | None = None) -> None:
        self._group = group or Group()
        self._clip = config.clip_norm
        holding: dict[Tensor, Tables] = {
            table: part
            for part in model.modules()
            if isinstance(part, Tables)
            for table in part.stored
        }
        self._holding = holding
        self._linear = [part for part in model.modules() if isinstance(part, Wide)]
        wide = [table for table, part in holding.items() if isinstance(part, Wide)]
        tables = [table for table, part in holding.items() if not isinstance(part, Wide)]
        dense = [weight for weight in model.parameters() if weight not in holding]
        self.wide: FTRLProximal | None = None
        if wide:
            self.wide = FTRLProximal(
                wide, config.wide_learning_rate, 1.0, config.wide_l1, config.wide_l2
            )
        self.embeddings: SparseRows | None = None
        if tables:  # none when every deep column is numeric
            self.embeddings = _embedding_optimizer(tables, config)
        self.dense: torch.optim.Optimizer = torch.optim.Adagrad(
            dense,
            config.deep_learning_rate,
            initial_accumulator_value=_INITIAL_ACCUMULATOR,
            fused=model.bias.device.type == "cpu",  # where alone torch has it
        )
        self.sparse = [part for part in (self.wide, self.embeddings) if part is not None]
        for optimizer in self.sparse:
            optimizer.prepare()
        self._decaying = [
            (optimizer, float(optimizer.defaults["lr"]))
            for optimizer in (self.dense, *self.sparse)
            if not isinstance(optimizer, FTRLProximal)
        ]

    def step(self, loss: Tensor, examples: int, rate: float) -> None:
        """One joint update from the gradient of a loss, its share of the mean over ``examples``.

        Args:
            rate: what the AdaGrad learning rates are multiplied by.
        """
        for optimizer, base in self._decaying:
            for group in optimizer.param_groups:
                group["lr"] = base * rate
        for optimizer in (self.dense, *self.sparse):
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        dense = [w.grad for g in self.dense.param_groups for w in g["params"] if w.grad is not None]
        self._group.sum_(dense)
        rows = {
            optimizer: [
                (table, *sum_duplicates(*self._gradient(table))) for table in optimizer.tables
            ]
            for optimizer in self.sparse
        }
        if self._clip:
            embedded = rows.get(self.embeddings, []) if self.embeddings else []
            self._clip_norm(dense, {table: sums for table, _, sums in embedded})
        self.dense.step()
        for optimizer, touched in rows.items():
            optimizer.scale = float(examples)
            for table, indices, sums in touched:
                optimizer.update(table, indices, sums)
        for part in self._linear:
            part.silence()

    def wide_zero_share(self) -> float | None:
        """The share of wide weights that are exactly zero; None without a wide part."""
        if self.wide is None:
            return None
        count = zeros = 0
        for weight in self.wide.tables:
            found = torch.tensor([weight.numel(), int((weight == 0).sum())], device=weight.device)
            if self._holding[weight].holders is not None:
                self._group.sum_([found])
            count, zeros = count + int(found[0]), zeros + int(found[1])
        return zeros / count if count else 1.0

    def tensors(self) -> dict[str, Tensor | Shard]:
        """All that the next step depends on beside the weights, by name."""
        found: dict[str, Tensor | Shard] = {}
        for part, optimizer in self._parts().items():
            weights = [w for group in optimizer.param_groups for w in group["params"]]
            for number, weight in enumerate(weights):
                for name, value in optimizer.state[weight].items():
                    if torch.is_tensor(value):
                        holder = self._holding.get(weight)
                        found[f"{part}.{number}.{name}"] = (
                            value if holder is None else holder.shard(weight, value)
                        )
        return found

    def _clip_norm(self, dense: Sequence[Tensor], rows: Mapping[Tensor, Tensor]) -> None:
        """Scale gradients in place so that the norm of all together is within the bound."""
        spread = [sums for t, sums in rows.items() if self._holding[t].holders is not None]
        here = [sums for t, sums in rows.items() if self._holding[t].holders is None]
        squares = torch.nn.utils.get_total_norm([*dense, *here]).square()
        if spread:
            elsewhere = torch.nn.utils.get_total_norm(spread).square()
            self._group.sum_([elsewhere])
            squares += elsewhere
        factor = (self._clip / squares.sqrt().clamp(min=1e-12)).clamp(max=1.0)
        for gradient in (*dense, *here, *spread):
            gradient.mul_(factor)

    def _parts(self) -> dict[str, torch.optim.Optimizer]:
        parts = {"dense": self.dense, "wide": self.wide, "embeddings": self.embeddings}
        return {name: part for name, part in parts.items() if part is not None}

    def _gradient(self, table: Tensor) -> tuple[Tensor, Tensor]:
        gradient = table.grad
        if self._holding[table].holders is not None:  # every process sent what it has of these
            assert gradient is not None
            return gradient._indices()[0], gradient._values()
        if gradient is None:  # no example of the batch looked a row up
            none = torch.zeros(0, dtype=torch.int64, device=table.device)
            return self._group.gather(none, table.new_zeros((0, table.shape[1])))
        return self._group.gather(gradient._indices()[0], gradient._values())


def _embedding_optimizer(tables: list[Tensor], config: TrainingConfig) -> SparseRows:
    if config.embedding_optimizer == "ftrl":
        return FTRLProximal(
            tables,
            config.embedding_learning_rate,
            1.0,
            config.embedding_l1,
            config.embedding_l2,
            config.embedding_group_l1,
        )
    rowwise = config.embedding_optimizer == "rowwise_adagrad"
    return SparseAdagrad(tables, config.embedding_learning_rate, rowwise=rowwise)


def learning_rate(config: TrainingConfig, step: int, steps: int) -> float:
    """What the AdaGrad learning rates are multiplied by at a step, from 0, of so many.

    >>> config = TrainingConfig(warmup_steps=2, final_rate=0.5)
    >>> [round(learning_rate(config, step, 10), 3) for step in (0, 1, 2, 6, 10)]
    [0.333, 0.667, 1.0, 0.75, 0.5]
    """
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(steps - config.warmup_steps, 1)
    left = 1 - progress if config.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return config.final_rate + (1 - config.final_rate) * left


def losses(prediction: Tensor, label: Tensor, task: Task) -> Tensor:
    """(B,) logistic losses of logits, or squared errors of predicted values."""
    if task == "binary":
        return functional.binary_cross_entropy_with_logits(prediction, label, reduction="none")
    return functional.mse_loss(prediction, label, reduction="none")
