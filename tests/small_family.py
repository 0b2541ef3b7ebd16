"""Layouts, examples and checks that the tests of all architectures share.

A shop in small: users and items by key, the item's genre, the genres that the user bought before
(which share the genre's table) and the item's tags; what the user spent, and the price.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fathom.batch import Batch, Layout, Ragged
from fathom.config import TrainingConfig
from fathom.models import Model
from fathom.training import train

USERS, ITEMS, GENRES, TAGS = 5, 6, 4, 3
LAYOUT = Layout(
    numeric=2,
    tables={"user": (USERS, 3), "item": (ITEMS, 3), "genre": (GENRES, 2), "tag": (TAGS, 3)},
    fields=("user", "item", "genre"),
    bags=("genre", "tag"),
    wide_slots=(USERS, GENRES),
    wide_bags=1,
    user=0,
    item=1,
    owners=("user", "item", "item", "user", "item", "user", "item"),
)
#: Small and quick; each test states what else it is about.
CONFIG = TrainingConfig(
    hidden=(8, 6),
    cross_layers=2,
    factors=3,
    attention_width=3,
    batch_size=32,
    epochs=1,
    patience=9,
    wide_l1=0.0,
    device="cpu",
    threads=1,
)


def examples(rows: int, seed: int = 0, most: int = 3) -> Batch:
    """Random examples of `LAYOUT`, whose label has something to do with all of their parts.

    Args:
        most: values in a history or in tags; with 0 every list is empty.
    """
    draw = np.random.default_rng(seed)
    user, item, genre = (draw.integers(0, n, rows) for n in (USERS, ITEMS, GENRES))
    recent, tags = (
        Ragged.of([draw.integers(0, n, draw.integers(0, most + 1)) for _ in range(rows)], np.int32)
        for n in (GENRES, TAGS)
    )
    numeric = draw.random((rows, 2))
    logit = np.sin(user + 2 * item) + numeric[:, 0] - numeric[:, 1] + 0.3 * recent.lengths
    return Batch(
        numeric=numeric.astype(np.float32),
        deep_ids=np.stack([user, item, genre], axis=1).astype(np.int32),
        deep_bags=(recent, tags),
        wide_ids=user[:, None].astype(np.int32),
        wide_bags=(Ragged((recent.values + USERS).astype(np.int32), recent.offsets),),
        label=(draw.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.float32),
    )


def numbers_only(numeric: np.ndarray, label: np.ndarray | None = None) -> tuple[Layout, Batch]:
    """A layout and examples of nothing but (N, M) numbers."""
    none = np.zeros((len(numeric), 0), np.int32)
    layout = Layout(numeric.shape[1], {}, (), (), (), 0)
    label = None if label is None else label.astype(np.float32)
    return layout, Batch(numeric.astype(np.float32), none, (), none, (), label)


def pairs(users: np.ndarray, items: np.ndarray, label: np.ndarray, sizes: tuple[int, int]) -> Any:
    """A layout and examples of nothing but a user and an item, with embeddings 2 wide."""
    tables = {"user": (sizes[0], 2), "item": (sizes[1], 2)}
    owners = ("user", "item")
    layout = Layout(0, tables, owners, (), (), 0, user=0, item=1, owners=owners)
    ids = np.stack([users, items], axis=1).astype(np.int32)
    none = np.zeros((len(ids), 0), np.int32)
    numeric = np.zeros((len(ids), 0), np.float32)
    return layout, Batch(numeric, ids, (), none, (), label.astype(np.float32))


def fitted(
    layout: Layout, training: Batch, task: Any = "binary", passes: int = 30, **settings: Any
) -> Model:
    """Trained with rates that suit tiny problems.

    Args:
        passes: over the examples, all in one epoch: the last weights are kept, and written once.
    """
    given = {
        **{"hidden": (), "batch_size": 64, "epochs": 1, "wide_l1": 0.0},
        **{"embedding_learning_rate": 0.1, "deep_learning_rate": 0.05},
        **{"device": "cpu", "threads": 1},
    }
    rows = np.tile(np.arange(len(training)), passes)
    config = TrainingConfig(**given | settings)
    return train(layout, training.take(rows), training, config, task).model


def auc(label: np.ndarray, logit: np.ndarray) -> float:
    """Share of (positive, negative) pairs in the right order; a tie is half a pair."""
    difference = logit[label == 1][:, None] - logit[label == 0][None, :]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


def set_weights(module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Give a module known weights by their names in its state dict, which must be all."""
    buffers = dict(module.named_buffers())
    state = {name: value for name, value in module.state_dict().items() if name in buffers}
    module.load_state_dict(state | {name: torch.tensor(value) for name, value in weights.items()})


def randomise(module: nn.Module, seed: int = 0, scale: float = 1.0) -> None:
    """Weights that are all different, and none of them 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.parameters():
            drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            weight.copy_(drawn * scale)


def worst_gradient_error(value: Callable[[], Tensor], weights: Iterable[Tensor]) -> float:
    """The largest difference between a gradient and the one by central finite differences.

    Tables of embeddings have sparse gradients, which ``torch.autograd.gradcheck`` does not take.

    Args:
        value: computes a scalar from the weights, in float64.
    """
    weights = list(weights)
    for weight in weights:
        weight.grad = None
    value().backward()
    worst, step = 0.0, 1e-6
    for weight in weights:
        if weight.grad is None:
            gradient = torch.zeros_like(weight)
        else:
            gradient = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad
        flat, found = weight.detach().view(-1), gradient.reshape(-1)
        for i in range(len(flat)):
            before = float(flat[i])
            with torch.no_grad():
                flat[i] = before + step
                above = float(value())
                flat[i] = before - step
                below = float(value())
                flat[i] = before
            worst = max(worst, abs(float(found[i]) - (above - below) / (2 * step)))
    return worst
