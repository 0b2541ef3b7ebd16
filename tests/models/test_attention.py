"""Deep Interest Network: by hand, its gradients, and a label that a mean of the history hides."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fathom.batch import Batch, Layout, Ragged
from fathom.config import ConfigError, TrainingConfig
from fathom.models import Inputs, build, score
from fathom.models.attention import AttendedEmbeddings, Attention, Dice
from small_family import CONFIG, LAYOUT, auc, examples, fitted, randomise, set_weights


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- known answers -----------------------------------------------------------------------------


def test_dice_by_hand():
    dice = Dice(1)
    set_weights(dice, {"alpha": [0.1]})
    found = dice(torch.tensor([[0.0], [4.0]]))  # mean 2, variance 4
    share = sigmoid((4 - 2) / math.sqrt(4 + 1e-8))
    assert found.flatten().tolist() == pytest.approx([0.0, share * 4 + (1 - share) * 0.1 * 4])
    # The running moments took in a tenth of the batch's: 0 and 1 before.
    assert dice.mean.item() == pytest.approx(0.1 * 2)
    assert dice.variance.item() == pytest.approx(0.9 * 1 + 0.1 * 4)


def test_in_evaluation_dice_turns_at_the_running_mean():
    dice = Dice(1).eval()
    set_weights(dice, {"alpha": [0.1]})
    dice.load_state_dict({**dice.state_dict(), "mean": torch.tensor([3.0])})
    found = dice(torch.tensor([[5.0], [3.0]]))
    share = sigmoid((5 - 3) / math.sqrt(1 + 1e-8))
    assert found.flatten().tolist() == pytest.approx(
        [share * 5 + (1 - share) * 0.1 * 5, 0.5 * 3 + 0.5 * 0.1 * 3]
    )
    assert dice.mean.item() == 3.0


def test_dice_takes_batches_of_none_and_of_one():
    dice = Dice(2)
    assert dice(torch.zeros(0, 2)).shape == (0, 2)
    assert dice.variance.tolist() == [1.0, 1.0], "none say nothing of the moments"
    alone = torch.tensor([[3.0, -1.0]], requires_grad=True)
    dice(alone).sum().backward()
    assert torch.isfinite(alone.grad).all()


def test_the_weight_of_a_value_by_hand():
    attention = Attention(width=1, hidden=1, activation="relu")
    set_weights(
        attention,
        {
            "layer.weight": [[1.0, 2.0, 3.0, 4.0]],
            "layer.bias": [0.5],
            "out.weight": [[10.0]],
            "out.bias": [0.25],
        },
    )
    found = attention(torch.tensor([[2.0], [1.0]]), torch.tensor([[1.0], [-3.0]]))
    # e = 2, v = 1: 1 · 2 + 2 · 1 + 3 · (2 - 1) + 4 · 2 + 0.5 = 15.5.
    # e = 1, v = -3: 1 - 6 + 3 · 4 - 4 · 3 + 0.5 = -4.5, which the ReLU cuts.
    assert found.flatten().tolist() == [10 * 15.5 + 0.25, 0.25]


#: A user, a type and, sharing its table, the types of the history; tags are about nothing.
SMALL = Layout(
    numeric=1,
    tables={"user": (2, 1), "type": (3, 1), "tag": (2, 1)},
    fields=("user", "type"),
    bags=("tag", "type"),
    wide_slots=(),
    wide_bags=0,
    owners=("user", "item", "item", "user", "context"),
)
EXAMPLES = Batch(
    numeric=np.array([[0.5], [1.0]], np.float32),
    deep_ids=np.array([[1, 2], [0, 1]], np.int32),
    deep_bags=(Ragged.of([[0, 1], [1]], np.int32), Ragged.of([[1, 2], []], np.int32)),
    wide_ids=np.zeros((2, 0), np.int32),
    wide_bags=(),
)


def with_known_weights(module: torch.nn.Module, prefix: str = "", **more: Any) -> None:
    weights = {
        "tables.user.weight": [[-7.0], [7.0]],
        "tables.type.weight": [[9.0], [2.0], [-1.0]],
        "tables.tag.weight": [[4.0], [6.0]],
        "attention.1.layer.weight": [[0.0, 0.0, 0.0, 1.0], [1.0, 0.0, 0.0, 0.0]],
        "attention.1.layer.bias": [0.0, 0.0],
        "attention.1.out.weight": [[3.0, 1.0]],
        "attention.1.out.bias": [0.5],
    }
    set_weights(module, {f"{prefix}{name}": value for name, value in weights.items()} | more)


def test_a_history_is_pooled_by_weights_for_the_candidate():
    embeddings = AttendedEmbeddings(SMALL, hidden=2, activation="relu")
    with_known_weights(embeddings)
    # The candidate is type 2: -1. The history's values are 2 and -1:
    #   a(2, -1) = 3 · max(0, 2 · -1) + max(0, 2) + 0.5 = 2.5
    #   a(-1, -1) = 3 · max(0, -1 · -1) + max(0, -1) + 0.5 = 3.5
    pooled = 2.5 * 2 + 3.5 * -1
    # user, type; tags are averaged; the history; the number. The second example's history is empty.
    assert embeddings(Inputs.of(EXAMPLES)).tolist() == [
        [7.0, -1.0, (4.0 + 6.0) / 2, pooled, 0.5],
        [-7.0, 2.0, 6.0, 0.0, 1.0],
    ]


def test_din_by_hand():
    model = build(SMALL, replace(CONFIG, model="din", hidden=(1,), attention_width=2)).eval()
    relu = build(
        SMALL,
        TrainingConfig(model="din", hidden=(1,), attention_width=2, activation="relu"),
    )
    more = {
        "bias": 0.25,
        "deep.layers.0.weight": [[1.0, 0.0, 1.0, 2.0, 2.0]],
        "deep.layers.0.bias": [-1.0],
        "deep.layers.3.weight": [[10.0]],
    }
    with_known_weights(relu, "deep.embeddings.", **more)
    # The first layer reads 7, 5, 1.5 and 0.5, the second example -7, 6, 0 and 1.
    first = 7 + 5 + 2 * 1.5 + 2 * 0.5 - 1
    assert relu(Inputs.of(EXAMPLES)).tolist() == [10 * first + 0.25, 10 * 0 + 0.25]
    # By default it is Dice in both places, each with its own slope.
    slopes = {n for n, _ in model.named_parameters() if n.endswith("alpha")}
    assert slopes == {"deep.embeddings.attention.1.activation.alpha", "deep.layers.1.alpha"}


# --- properties --------------------------------------------------------------------------------


def attended(batch: Batch, seed: int = 0) -> Tensor:
    embeddings = AttendedEmbeddings(LAYOUT, hidden=3, activation="prelu").double()
    randomise(embeddings, seed)
    inputs = Inputs.of(batch)
    return embeddings(inputs._replace(numeric=inputs.numeric.double())).detach()


def test_each_example_is_attended_by_itself():
    batch = examples(12)
    order = np.random.default_rng(0).permutation(12)
    torch.testing.assert_close(attended(batch.take(order)), attended(batch)[torch.tensor(order)])
    for i in range(12):
        alone = attended(batch.take(np.array([i])))[0]
        torch.testing.assert_close(alone, attended(batch)[i])


def test_weights_are_not_shares_so_more_of_the_same_is_more():
    once = replace(examples(1), deep_bags=(Ragged.of([[1]], np.int32), Ragged.of([[0]], np.int32)))
    twice = replace(once, deep_bags=(Ragged.of([[1, 1]], np.int32), Ragged.of([[0, 0]], np.int32)))
    history, tags = slice(8, 10), slice(10, 13)
    torch.testing.assert_close(attended(twice)[:, history], 2 * attended(once)[:, history])
    torch.testing.assert_close(attended(twice)[:, tags], attended(once)[:, tags])  # a mean


def test_the_history_of_the_item_itself_is_averaged():
    """A bag of the item's own is about no candidate, whatever table it shares."""
    owners = ("user", "item", "item", "item", "user", "user", "item")
    embeddings = AttendedEmbeddings(
        replace(LAYOUT, fields=("user", "item", "tag"), owners=owners), 3, "relu"
    )
    assert list(embeddings.attention) == ["1"]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradients_of_dice(training):
    dice = Dice(3).double().train(training)
    draw = torch.Generator().manual_seed(0)
    s = torch.randn(5, 3, dtype=torch.float64, generator=draw).requires_grad_()
    alpha = torch.randn(3, dtype=torch.float64, generator=draw).requires_grad_()

    def value(s: Tensor, alpha: Tensor) -> Tensor:
        return torch.func.functional_call(dice, {"alpha": alpha}, (s,))

    assert torch.autograd.gradcheck(value, (s, alpha))


@pytest.mark.parametrize("activation", ["dice", "prelu", "relu"])
def test_gradients_of_attention(activation):
    attention = Attention(2, 3, activation).double()
    randomise(attention, seed=1)
    draw = torch.Generator().manual_seed(2)
    values, candidate = torch.randn(2, 6, 2, dtype=torch.float64, generator=draw)
    names, weights = zip(*attention.named_parameters(), strict=True)

    def value(values: Tensor, candidate: Tensor, *given: Tensor) -> Tensor:
        state = dict(zip(names, given, strict=True))
        return torch.func.functional_call(attention, state, (values, candidate))

    given = [t.detach().clone().requires_grad_() for t in (values, candidate, *weights)]
    assert torch.autograd.gradcheck(value, given)


# --- a label that a mean of the history hides --------------------------------------------------

TYPES = 20
HISTORIES = Layout(
    numeric=0,
    tables={"type": (TYPES, 4)},
    fields=("type",),
    bags=("type",),
    wide_slots=(),
    wide_bags=0,
    owners=("item", "user"),
)


def members(rows: int, seed: int) -> Batch:
    """The label is whether the candidate's type is in the history, of up to eight types."""
    draw = np.random.default_rng(seed)
    histories = [draw.choice(TYPES, draw.integers(1, 9), replace=False) for _ in range(rows)]
    label = draw.random(rows) < 0.5
    candidates = [
        draw.choice(history if inside else np.setdiff1d(np.arange(TYPES), history))
        for history, inside in zip(histories, label, strict=True)
    ]
    return Batch(
        numeric=np.zeros((rows, 0), np.float32),
        deep_ids=np.array(candidates, np.int32)[:, None],
        deep_bags=(Ragged.of(histories, np.int32),),
        wide_ids=np.zeros((rows, 0), np.int32),
        wide_bags=(),
        label=label.astype(np.float32),
    )


def test_attention_finds_the_candidate_in_the_history_where_a_mean_does_not():
    training, fresh = members(4000, seed=0), members(1000, seed=1)

    def found(model: str) -> float:
        settings = {"hidden": (8,), "attention_width": 16, "deep_learning_rate": 0.2}
        trained = fitted(HISTORIES, training, passes=20, model=model, batch_size=128, **settings)
        assert fresh.label is not None
        return auc(fresh.label, score(trained, fresh))

    attending, averaging = found("din"), found("deep")
    assert attending > 0.95
    assert attending > averaging + 0.1


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    [
        replace(LAYOUT, bags=(), owners=("user", "item", "item", "user", "item")),
        replace(LAYOUT, bags=("tag", "tag")),  # whose table no field shares
        replace(LAYOUT, bags=("user", "tag")),  # shared with a field of the user
        replace(LAYOUT, owners=("user", "item", "item", "item", "item", "user", "item")),
    ],
    ids=["no bags", "no shared table", "shared with the user's", "the item's own"],
)
def test_without_a_history_about_the_item_there_is_nothing_to_attend_to(layout):
    with pytest.raises(ConfigError) as caught:
        build(layout, TrainingConfig(model="din"))
    assert str(caught.value) == (
        "training.model is 'din', which needs a history (a multi or sequence column, not of the "
        "item) whose embedding table a column of the item shares; the spec has none: add one, or "
        "choose another model"
    )
