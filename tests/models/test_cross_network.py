"""Deep & Cross: each layer by hand, the degree of its products, and what only products can tell."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fathom.batch import Layout
from fathom.config import ConfigError, TrainingConfig
from fathom.models import Inputs, build, score
from fathom.models.cross_network import (
    CrossLayer,
    DeepCross,
    MatrixCrossLayer,
    MixtureCrossLayer,
)
from small_family import CONFIG, LAYOUT, auc, fitted, numbers_only, randomise, set_weights

FIRST, LAST = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -1.0]])


# --- known answers -----------------------------------------------------------------------------


def test_a_layer_of_the_first_version_by_hand():
    layer = CrossLayer(2)
    set_weights(layer, {"weight": [0.5, 1.0], "bias": [0.1, 0.2]})
    # x_l . w = 3 · 0.5 - 1 · 1 = 0.5, so x_0 · 0.5 + b + x_l:
    expected = [1 * 0.5 + 0.1 + 3, 2 * 0.5 + 0.2 - 1]
    assert layer(FIRST, LAST)[0].tolist() == pytest.approx(expected)


def test_a_layer_of_the_second_version_by_hand():
    layer = MatrixCrossLayer(2)
    set_weights(layer, {"product.weight": [[1.0, 2.0], [0.0, -1.0]], "product.bias": [0.5, 0.0]})
    # W x_l + b = (3 - 2 + 0.5, 1), by element with x_0, plus x_l:
    expected = [1 * 1.5 + 3, 2 * 1.0 - 1]
    assert layer(FIRST, LAST)[0].tolist() == pytest.approx(expected)


def test_a_mixture_of_experts_by_hand():
    layer = MixtureCrossLayer(2, rank=1, experts=2)
    set_weights(
        layer,
        {
            "down": [[[1.0], [0.0]], [[0.0], [0.5]]],  # V: reads 3, and -0.5
            "inner": [[[2.0]], [[1.0]]],
            "up": [[[1.0, -1.0]], [[0.0, 4.0]]],
            "bias": [0.1, 0.2],
            "gate.weight": [[1.0, 0.0], [0.0, -1.0]],  # logits 3 and 1
        },
    )
    one = math.tanh(2 * math.tanh(3.0))
    two = math.tanh(1 * math.tanh(-0.5))
    share = math.exp(3) / (math.exp(3) + math.exp(1))
    # U_i g(C_i g(V_i x)) + b of each expert, by their shares; by element with x_0; plus x_l.
    mixed = [
        share * (one + 0.1) + (1 - share) * (0 + 0.1),
        share * (-one + 0.2) + (1 - share) * (4 * two + 0.2),
    ]
    expected = [1 * mixed[0] + 3, 2 * mixed[1] - 1]
    assert layer(FIRST, LAST)[0].tolist() == pytest.approx(expected)


def test_one_expert_has_no_gate():
    layer = MixtureCrossLayer(2, rank=1, experts=1)
    set_weights(
        layer,
        {
            "down": [[[1.0], [0.0]]],
            "inner": [[[2.0]]],
            "up": [[[1.0, -1.0]]],
            "bias": [0.1, 0.2],
        },
    )
    one = math.tanh(2 * math.tanh(3.0))
    expected = [1 * (one + 0.1) + 3, 2 * (-one + 0.2) - 1]
    assert layer(FIRST, LAST)[0].tolist() == pytest.approx(expected)


def test_both_networks_are_read_by_one_linear_layer():
    layout, batch = numbers_only(np.array([[1.0, 2.0]]))
    model = build(layout, replace(CONFIG, model="dcn", hidden=(1,), cross_layers=2))
    set_weights(
        model,
        {
            "bias": 0.25,
            "deep.crosses.0.weight": [1.0, 0.0],
            "deep.crosses.0.bias": [0.0, 1.0],
            "deep.crosses.1.weight": [0.0, 1.0],
            "deep.crosses.1.bias": [0.0, 0.0],
            "deep.layers.0.weight": [[3.0, -1.0]],
            "deep.layers.0.bias": [0.5],
            "deep.out.weight": [[1.0, 10.0, 100.0]],
        },
    )
    # x_0 = (1, 2); x_1 = x_0 · 1 + (0, 1) + x_0 = (2, 5); x_2 = x_0 · 5 + x_1 = (7, 15).
    # Beside them the ReLU layer: 3 · 1 - 2 + 0.5 = 1.5. The last layer reads (7, 15, 1.5).
    assert model(Inputs.of(batch)).tolist() == [1 * 7 + 10 * 15 + 100 * 1.5 + 0.25]


def test_the_rank_chooses_between_a_matrix_and_a_mixture():
    def layers(**settings: Any) -> list[nn.Module]:
        deep = build(LAYOUT, replace(CONFIG, model="dcn_v2", **settings)).deep
        assert isinstance(deep, DeepCross)
        return list(deep.crosses)

    full = layers(cross_layers=3)
    assert [type(layer) for layer in full] == [MatrixCrossLayer] * 3
    mixture = layers(cross_rank=2, cross_experts=3)
    assert [type(layer) for layer in mixture] == [MixtureCrossLayer] * 2
    shapes = {name: tuple(weight.shape) for name, weight in mixture[0].named_parameters()}
    assert LAYOUT.deep_width == 15
    assert shapes == {
        **{"down": (3, 15, 2), "inner": (3, 2, 2), "up": (3, 2, 15)},
        **{"bias": (15,), "gate.weight": (3, 15)},
    }


@pytest.mark.parametrize("model", ["dcn", "dcn_v2"])
def test_without_deep_columns_there_is_nothing_to_cross(model):
    with pytest.raises(ConfigError) as caught:
        build(Layout(0, {}, (), (), (4,), 0), TrainingConfig(model=model))
    assert str(caught.value) == (
        f"training.model is {model!r}, which needs deep columns; the spec has none: add one, or "
        "choose another model"
    )


# --- properties --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [CrossLayer, MatrixCrossLayer])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_so_many_layers_reach_products_of_one_more_input(kind, layers):
    """Along a line through 0, the output is a polynomial of degree l + 1, and of no lower one.

    The n-th differences of a polynomial on an even grid are 0 from its degree + 1 on.
    """
    crosses = [kind(4).double() for _ in range(layers)]
    for i, layer in enumerate(crosses):
        randomise(layer, seed=i)
    first = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    first = torch.arange(-4, 5, dtype=torch.float64)[:, None] * first
    crossed = first
    for layer in crosses:
        crossed = layer(first, crossed)
    values = crossed.detach().numpy()
    scale = np.abs(values).max()
    assert np.abs(np.diff(values, n=layers + 1, axis=0)).max() > 0.01 * scale
    assert np.abs(np.diff(values, n=layers + 2, axis=0)).max() < 1e-12 * scale


@pytest.mark.parametrize(
    "layer", [CrossLayer(3), MatrixCrossLayer(3), MixtureCrossLayer(3, 2, 2)], ids=lambda m: str(m)
)
def test_gradients_of_a_layer(layer):
    layer = layer.double()
    randomise(layer, seed=2)
    inputs = torch.randn(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    names, weights = zip(*layer.named_parameters(), strict=True)

    def value(first: Tensor, last: Tensor, *given: Tensor) -> Tensor:
        state = dict(zip(names, given, strict=True))
        return torch.func.functional_call(layer, state, (first, last))

    given = [tensor.detach().clone().requires_grad_() for tensor in (*inputs, *weights)]
    assert torch.autograd.gradcheck(value, given)


# --- what only products can tell ---------------------------------------------------------------


def signs(rows: int, inputs: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers around 0, and whether their product is positive: no number alone says anything."""
    numbers = np.random.default_rng(seed).uniform(-1, 1, (rows, inputs))
    return numbers, (numbers.prod(axis=1) > 0).astype(float)


def product_auc(model: str, inputs: int, **settings: Any) -> float:
    """AUC on numbers that were not trained on; hidden layers are left out, so only crosses help."""
    layout, training = numbers_only(*signs(2000, inputs, seed=0))
    _, fresh = numbers_only(*signs(1000, inputs, seed=1))
    trained = fitted(layout, training, model=model, deep_learning_rate=0.5, **settings)
    assert fresh.label is not None
    return auc(fresh.label, score(trained, fresh))


MIXTURE = {"cross_rank": 2, "cross_experts": 2}


@pytest.mark.parametrize(
    ("model", "settings"),
    [("dcn", {}), ("dcn_v2", {}), ("dcn_v2", MIXTURE)],
    ids=["dcn", "dcn_v2", "mixture"],
)
def test_one_cross_layer_learns_the_product_of_two_inputs(model, settings):
    assert product_auc(model, 2, cross_layers=1, **settings) > 0.99


def test_a_linear_model_cannot_learn_a_product():
    assert product_auc("deep", 2) == pytest.approx(0.5, abs=0.05)


def test_a_product_of_three_inputs_takes_two_layers():
    assert product_auc("dcn_v2", 3, cross_layers=1) < 0.6
    assert product_auc("dcn_v2", 3, cross_layers=2) > 0.95
