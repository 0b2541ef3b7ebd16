"""The parts of a model against arithmetic written out here, and the gradients of their sum."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fathom.batch import Batch, Layout, Ragged
from fathom.config import ConfigError, TrainingConfig
from fathom.models import Inputs, Model, build

# Users (a field) and genres (a field and, sharing its table, a bag) in the deep part; in the wide
# part one single-valued slot of 3 ids and one bag of 4, so ids 3 to 6 are the bag's.
LAYOUT = Layout(
    numeric=1,
    tables={"user": (3, 1), "genre": (3, 2)},
    fields=("user", "genre"),
    bags=("genre",),
    wide_slots=(3, 4),
    wide_bags=1,
)
CONFIG = TrainingConfig(hidden=(2,), device="cpu")
BATCH = Batch(
    numeric=np.array([[0.5], [1.0]], np.float32),
    deep_ids=np.array([[1, 2], [0, 1]], np.int32),
    deep_bags=(Ragged.of([[1, 2], []], np.int32),),
    wide_ids=np.array([[1], [2]], np.int32),
    wide_bags=(Ragged.of([[3, 5], []], np.int32),),
)


def with_known_weights(model: Model) -> Model:
    """Weights that are easy to compute with by hand."""
    weights = {
        "bias": 0.25,
        "wide.weight": [[0.0], [0.1], [0.2], [1.0], [2.0], [4.0], [8.0]],
        "deep.embeddings.tables.user.weight": [[-1.0], [1.0], [2.0]],
        "deep.embeddings.tables.genre.weight": [[0.0, 0.0], [1.0, 3.0], [5.0, -1.0]],
        # Inputs: user, genre (2), mean of the bag's genres (2), number.
        "deep.layers.0.weight": [[1.0, 1.0, 0.0, 0.0, 1.0, 2.0], [-1.0, 0.0, 1.0, 1.0, 0.0, 0.0]],
        "deep.layers.0.bias": [0.5, -3.0],
        "deep.layers.2.weight": [[2.0, 10.0]],
    }
    state = {name: torch.tensor(weights[name]) for name in model.state_dict()}
    model.load_state_dict(state)
    return model


# --- known answers -----------------------------------------------------------------------------


def test_wide_deep_on_known_weights_is_the_arithmetic_of_the_paper():
    logits = with_known_weights(build(LAYOUT, CONFIG))(Inputs.of(BATCH))

    # First example: wide slots w[1] = 0.1 and, for the bag, w[3] + w[5] = 1 + 4.
    wide = 0.1 + (1.0 + 4.0)
    # user 1 → 1; genre 2 → (5, -1); the bag's mean of (1, 3) and (5, -1) is (3, 1); number 0.5.
    first = max(0.0, 1 * 1.0 + 1 * 5.0 + 1 * 1.0 + 2 * 0.5 + 0.5)  # = 8.5
    second = max(0.0, -1 * 1.0 + 1 * -1.0 + 1 * 3.0 - 3.0)  # = max(0, -2): the ReLU cuts it
    deep = 2 * first + 10 * second
    # Second example: w[2] = 0.2, an empty bag; user 0 → -1, genre 1 → (1, 3), number 1.
    other = 0.2 + 2 * max(0.0, -1.0 + 1.0 + 2 * 1.0 + 0.5) + 10 * max(0.0, 1.0 + 3.0 - 3.0)

    assert logits.tolist() == pytest.approx([wide + deep + 0.25, other + 0.25])
    assert logits.tolist() == pytest.approx([22.35, 15.45])  # the same, worked out


def test_the_contributions_name_each_slot():
    parts = with_known_weights(build(LAYOUT, CONFIG)).contributions(Inputs.of(BATCH))

    torch.testing.assert_close(parts.wide, torch.tensor([[0.1, 5.0], [0.2, 0.0]]))
    torch.testing.assert_close(parts.deep, torch.tensor([17.0, 15.0]))
    assert parts.bias.item() == 0.25


@pytest.mark.parametrize(("name", "expected"), [("wide", [5.35, 0.45]), ("deep", [17.25, 15.25])])
def test_a_part_alone_gives_its_own_share_and_the_bias(name, expected):
    model = with_known_weights(build(LAYOUT, TrainingConfig(model=name, hidden=(2,))))
    assert model(Inputs.of(BATCH)).tolist() == pytest.approx(expected)


def test_an_empty_bag_gives_zeros_to_both_parts():
    model = with_known_weights(build(LAYOUT, CONFIG))
    inputs = Inputs.of(BATCH)
    assert model.wide is not None
    assert model.wide(inputs)[1, 1] == 0

    embedded = model.deep.embeddings(inputs)  # user, genre (2), bag (2), number
    assert embedded.shape == (2, LAYOUT.deep_width)
    assert embedded[1].tolist() == [-1.0, 1.0, 3.0, 0.0, 0.0, 1.0]


def test_a_shared_table_serves_a_field_and_a_bag():
    model = with_known_weights(build(LAYOUT, CONFIG))
    table = model.deep.embeddings.table("genre")
    before = model.deep.embeddings(Inputs.of(BATCH))[0]
    with torch.no_grad():
        table[2] += 1.0
    moved = model.deep.embeddings(Inputs.of(BATCH))[0] - before
    # The field reads row 2 as it is; the bag averages rows 1 and 2, so it moves by half.
    assert moved.tolist() == [0.0, 1.0, 1.0, 0.5, 0.5, 0.0]


# --- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "slots"), [("wide", 2), ("deep", 0), ("wide_deep", 2)])
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_shapes(name, slots, rows):
    batch = BATCH.take(np.arange(rows))
    parts = build(LAYOUT, TrainingConfig(model=name)).contributions(Inputs.of(batch))
    assert parts.wide.shape == (rows, slots)
    assert parts.deep.shape == parts.logit.shape == (rows,)
    assert parts.bias.shape == ()


@pytest.mark.parametrize("hidden", [(), (3,), (5, 4, 3)])
def test_hidden_widths_give_that_many_layers(hidden):
    model = build(LAYOUT, TrainingConfig(hidden=hidden))
    layers = [
        tuple(w.shape)
        for n, w in model.named_parameters()
        if n.endswith("weight") and ".layers." in n
    ]
    widths = [LAYOUT.deep_width, *hidden, 1]
    assert layers == [(after, before) for before, after in pairwise(widths)]
    assert model(Inputs.of(BATCH)).shape == (2,)


def test_a_model_without_wide_slots_or_tables_is_its_numbers_and_the_bias():
    layout = Layout(numeric=1, tables={}, fields=(), bags=(), wide_slots=(), wide_bags=0)
    none = np.zeros((2, 0), np.int32)
    batch = Batch(np.array([[0.5], [1.0]], np.float32), none, (), none, ())
    model = build(layout, TrainingConfig(hidden=()))
    with torch.no_grad():
        model.deep.layers[0].weight.fill_(3.0)
        model.bias.fill_(1.0)
    assert model(Inputs.of(batch)).tolist() == [2.5, 4.0]


def test_an_unknown_model_is_refused_with_those_there_are():
    message = r"training.model is 'deep_wide'; it must be one of \[.*'wide_deep'.*\]"
    with pytest.raises(ConfigError, match=message):
        build(LAYOUT, TrainingConfig(model="deep_wide"))


# --- initial weights ---------------------------------------------------------------------------


def test_the_seed_decides_the_initial_weights():
    first = build(LAYOUT, CONFIG).state_dict()
    torch.rand(7)  # whatever was drawn before does not matter
    again = build(LAYOUT, CONFIG).state_dict()
    other = build(LAYOUT, TrainingConfig(hidden=(2,), seed=1)).state_dict()

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_the_wide_part_starts_with_no_opinion():
    state = build(LAYOUT, CONFIG).state_dict()
    assert not state["wide.weight"].any()
    assert state["bias"] == 0


# --- properties --------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-3, 1.0, 1e2]))
def test_parts_sum_to_the_logit(seed, scale):
    model = build(LAYOUT, CONFIG)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
        logit = model(Inputs.of(BATCH)).double().numpy()
        parts = model.contributions(Inputs.of(BATCH))
    summed = (
        parts.wide.double().numpy().sum(axis=1) + parts.deep.double().numpy() + parts.bias.item()
    )
    np.testing.assert_allclose(summed, logit, rtol=1e-6, atol=1e-6 * scale)


@given(order=st.permutations([0, 1, 0, 1, 1]))
def test_examples_do_not_see_each_other(order):
    model = with_known_weights(build(LAYOUT, CONFIG))
    logits = model(Inputs.of(BATCH.take(np.array(order)))).tolist()
    assert logits == pytest.approx([[22.35, 15.45][i] for i in order])


@pytest.mark.parametrize("name", ["wide", "deep", "wide_deep"])
def test_gradients_are_those_of_finite_differences(name):
    model = build(LAYOUT, TrainingConfig(model=name, hidden=(4, 3), seed=3)).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    inputs = Inputs.of(BATCH)
    inputs = inputs._replace(numeric=inputs.numeric.double())
    coefficients = torch.tensor([1.0, -0.7], dtype=torch.float64)  # so that rows do not cancel

    def value() -> torch.Tensor:
        return (model(inputs).tanh() * coefficients).sum()

    value().backward()
    step = 1e-6
    for weight in model.parameters():
        gradient = weight.grad.to_dense() if weight.grad.is_sparse else weight.grad
        for i in range(weight.numel()):
            with torch.no_grad():
                flat = weight.view(-1)
                flat[i] += step
                above = float(value())
                flat[i] -= 2 * step
                below = float(value())
                flat[i] += step
            assert float(gradient.reshape(-1)[i]) == pytest.approx(
                (above - below) / (2 * step), abs=1e-8
            )
