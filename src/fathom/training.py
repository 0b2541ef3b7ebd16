"""The joint training loop: one logit, one loss, each part updated from the same gradient step.

The wide part by FTRL-Proximal with L1, the deep part by AdaGrad (Cheng et al. 2016, section 3.3).
Needs torch and numpy alone.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fathom.batch import Batch, Layout
from fathom.config import TrainingConfig
from fathom.models import Inputs, Model, build
from fathom.models.deep import Deep
from fathom.optim import FTRLProximal, SparseAdagrad

Task = Literal["binary", "regression"]
_SCORING_BATCH = 8192
_PROGRESS_SECONDS = 5.0
#: AdaGrad's accumulator of dense weights starts near zero: gradients of a mean over a batch are
#: small, so a larger start would outweigh them, and every weight would move at the same rate.
_INITIAL_ACCUMULATOR = 1e-6

log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where and why."""


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training split gave. Losses are means per example."""

    epoch: int
    train_loss: float
    validation_loss: float
    examples_per_second: float
    seconds: float
    wide_zero_share: float | None


@dataclass
class Trained:
    """A trained model with the weights of its best epoch, and how it got there."""

    model: Model
    best_epoch: int
    history: list[Epoch] = field(default_factory=list)


class Optimizers:
    """One optimizer for each part of a model, stepped together."""

    def __init__(self, model: Model, config: TrainingConfig) -> None:
        self.sparse: list[FTRLProximal | SparseAdagrad] = []
        self.ftrl: FTRLProximal | None = None
        dense: list[Tensor] = [model.bias]
        if model.wide is not None:
            self.ftrl = FTRLProximal(
                model.wide.parameters(),
                config.wide_learning_rate,
                1.0,
                config.wide_l1,
                config.wide_l2,
            )
            self.sparse.append(self.ftrl)
        if isinstance(model.deep, Deep):
            tables = list(model.deep.embeddings.tables.parameters())
            if tables:  # none when every deep column is numeric
                self.sparse.append(SparseAdagrad(tables, config.embedding_learning_rate))
            dense += list(model.deep.layers.parameters())
        self.dense: torch.optim.Optimizer = torch.optim.Adagrad(
            dense,
            config.deep_learning_rate,
            initial_accumulator_value=_INITIAL_ACCUMULATOR,
            fused=True,
        )
        self._decaying = [
            (optimizer, float(optimizer.defaults["lr"]))
            for optimizer in (self.dense, *self.sparse)
            if optimizer is not self.ftrl
        ]

    def step(self, loss: Tensor, examples: int, rate: float) -> None:
        """One joint update from the gradient of the mean loss over ``examples``.

        Args:
            rate: what the AdaGrad learning rates are multiplied by.
        """
        for optimizer, base in self._decaying:
            for group in optimizer.param_groups:
                group["lr"] = base * rate
        self.dense.zero_grad()
        for optimizer in self.sparse:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.ftrl is not None:
            self.ftrl.scale = float(examples)
        self.dense.step()
        for optimizer in self.sparse:
            optimizer.step()


def train(
    layout: Layout, training: Batch, validation: Batch, config: TrainingConfig, task: Task
) -> Trained:
    """Train a model; keep the weights of the epoch with the lowest validation loss.

    Args:
        training, validation: encoded examples with labels. Validation is only ever scored.

    Raises:
        TrainingError: splits are empty, unlabelled or hold what cannot be learnt from (all faults
            together), or a loss is not finite; the message names the batch.
    """
    if faults := [*_faults("training", training, task), *_faults("validation", validation, task)]:
        raise TrainingError("; ".join(faults))
    device = torch.device(_device(config.device))
    if config.threads:
        torch.set_num_threads(config.threads)
    model = build(layout, config).to(device)
    optimizers = Optimizers(model, config)
    order = np.random.default_rng(config.seed)
    result = Trained(model, best_epoch=0)
    best_loss, best_weights = math.inf, copy.deepcopy(model.state_dict())
    for epoch in range(1, config.epochs + 1):
        started = time.perf_counter()
        train_loss = _pass(model, optimizers, training, config, task, order, epoch)
        seconds = time.perf_counter() - started
        validation_loss = float(
            _loss(torch.from_numpy(score(model, validation)), _label(validation), task)
        )
        if not math.isfinite(validation_loss):
            raise TrainingError(
                f"the validation loss is {validation_loss} after epoch {epoch}; lower the learning "
                "rates or look for extreme inputs"
            )
        zero = None if model.wide is None else _zero_share(model)
        result.history.append(
            Epoch(epoch, train_loss, validation_loss, len(training) / seconds, seconds, zero)
        )
        log.info(
            "epoch %d/%d: training loss %.4f, validation loss %.4f, %s examples/s",
            epoch,
            config.epochs,
            train_loss,
            validation_loss,
            f"{len(training) / seconds:,.0f}",
        )
        if validation_loss < best_loss:
            best_loss, best_weights = validation_loss, copy.deepcopy(model.state_dict())
            result.best_epoch = epoch
        elif epoch - result.best_epoch > config.patience:
            log.info("stopped: no better validation loss since epoch %d", result.best_epoch)
            break
    model.load_state_dict(best_weights)
    model.to("cpu").eval()
    return result


@torch.no_grad()
def score(model: Model, batch: Batch) -> NDArray[np.float32]:
    """Logits of N examples, shape (N,), in evaluation mode and in bounded memory."""
    device = model.bias.device
    was_training = model.training
    model.eval()
    starts = range(0, len(batch), _SCORING_BATCH)
    rows = [np.arange(s, min(s + _SCORING_BATCH, len(batch))) for s in starts]
    logits = [model(Inputs.of(batch.take(index), device)).cpu().numpy() for index in rows]
    model.train(was_training)
    return np.concatenate(logits) if logits else np.zeros(0, np.float32)


def _pass(
    model: Model,
    optimizers: Optimizers,
    training: Batch,
    config: TrainingConfig,
    task: Task,
    order: np.random.Generator,
    epoch: int,
) -> float:
    """One epoch in a new random order; returns the mean loss."""
    model.train()
    device = model.bias.device
    permutation = order.permutation(len(training))
    started = reported = time.perf_counter()
    total, done = torch.zeros((), dtype=torch.float64, device=device), 0
    for start in range(0, len(training), config.batch_size):
        batch = training.take(permutation[start : start + config.batch_size])
        loss = _loss(model(Inputs.of(batch, device)), _label(batch).to(device), task)
        if not torch.isfinite(loss):
            raise TrainingError(
                f"the loss is {loss.item()} in epoch {epoch} at examples {start:,} to "
                f"{start + len(batch):,}; lower the learning rates or look for extreme inputs"
            )
        progress = (epoch - 1 + done / len(training)) / config.epochs
        optimizers.step(loss, len(batch), 1 - (1 - config.final_rate) * progress)
        total += loss.detach() * len(batch)
        done += len(batch)
        now = time.perf_counter()
        if now - reported > _PROGRESS_SECONDS:
            reported, rate = now, done / (now - started)
            log.info(
                "epoch %d: %3.0f %%, loss %.4f, %s examples/s, %.0f s left",
                epoch,
                100 * done / len(training),
                float(total) / done,
                f"{rate:,.0f}",
                (len(training) - done) / rate,
            )
    return float(total) / done


def _loss(prediction: Tensor, label: Tensor, task: Task) -> Tensor:
    """Logistic loss of logits, or squared error of predicted values; the mean."""
    if task == "binary":
        return functional.binary_cross_entropy_with_logits(prediction, label)
    return functional.mse_loss(prediction, label)


def _label(batch: Batch) -> Tensor:
    assert batch.label is not None
    return torch.from_numpy(np.array(batch.label))  # a copy: the array may be a read-only map


def _zero_share(model: Model) -> float:
    assert model.wide is not None
    weight = next(model.wide.parameters())
    return float((weight == 0).float().mean()) if weight.numel() else 1.0


def _device(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise TrainingError(
            "training.device is 'cuda', but torch sees no CUDA device; set it to 'auto' or 'cpu'"
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def _faults(name: str, batch: Batch, task: Task) -> list[str]:
    """What is wrong with a split, in words."""
    if len(batch) == 0:
        return [f"the {name} split is empty; move the split's dates in conf"]
    if batch.label is None:
        return [f"the {name} split has no labels"]
    known = np.isfinite(batch.label)
    counts = {
        "numeric inputs that are not finite": int((~np.isfinite(batch.numeric)).sum()),
        "labels that are not finite": int((~known).sum()),
    }
    if task == "binary":
        odd = known & ~np.isin(batch.label, (0.0, 1.0))
        counts["labels other than 0 and 1"] = int(odd.sum())
    found = [f"{count} {what}" for what, count in counts.items() if count]
    return [f"the {name} split has {' and '.join(found)}; encode it again"] if found else []
