"""Products of embeddings: by hand, against the sum over pairs, and on cells that were held out."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fathom.batch import Batch, Layout, Ragged
from fathom.config import ConfigError, TrainingConfig
from fathom.models import Inputs, build, score
from fathom.models.deep import Embeddings
from fathom.models.factorization import FactorizationMachine, FirstOrder
from small_family import CONFIG, LAYOUT, auc, examples, fitted, pairs, randomise, set_weights

#: A user, an item and a bag of genres, all 2 wide, and a number.
SMALL = Layout(
    numeric=1,
    tables={"user": (2, 2), "item": (2, 2), "genre": (3, 2)},
    fields=("user", "item"),
    bags=("genre",),
    wide_slots=(),
    wide_bags=0,
    user=0,
    item=1,
    owners=("user", "item", "user", "user"),
)
EXAMPLES = Batch(
    numeric=np.array([[0.5], [2.0]], np.float32),
    deep_ids=np.array([[0, 1], [1, 0]], np.int32),
    deep_bags=(Ragged.of([[1, 2], []], np.int32),),
    wide_ids=np.zeros((2, 0), np.int32),
    wide_bags=(),
)
#: Vectors of SMALL's tables.
VECTORS = {
    "user": [[1.0, 2.0], [0.0, -1.0]],
    "item": [[4.0, 4.0], [3.0, -1.0]],
    "genre": [[9.0, 9.0], [0.0, 2.0], [2.0, 2.0]],
}


def tables(prefix: str, **rows: list[list[float]]) -> dict[str, Any]:
    return {f"{prefix}tables.{name}.weight": values for name, values in rows.items()}


# --- known answers -----------------------------------------------------------------------------


def test_the_factorization_machine_by_hand():
    embeddings = Embeddings(SMALL)
    machine = FactorizationMachine(embeddings, factors=2)
    set_weights(embeddings, tables("", **VECTORS))
    set_weights(machine, {"numeric": [[1.0, 1.0]]})
    found = machine(embeddings(Inputs.of(EXAMPLES)))
    # user 0 (1, 2), item 1 (3, -1), the bag's mean (1, 2), the number 0.5 · (1, 1):
    one = (1 * 3 - 2 * 1) + (1 * 1 + 2 * 2) + (3 * 1 - 1 * 2) + 0.5 * (1 + 2) + 0.5 * 2 + 0.5 * 3
    # user 1 (0, -1), item 0 (4, 4), an empty bag, the number (2, 2):
    two = (0 - 4) + 0 + 0 + (0 - 2) + (8 + 8) + 0
    assert found.tolist() == pytest.approx([one, two])
    assert found.tolist() == [11.0, 10.0]  # the same, worked out


def test_the_first_order_by_hand():
    first = FirstOrder(SMALL)
    assert not any(weight.any() for weight in first.parameters()), "no opinion to start with"
    weights = {"user": [[1.0], [2.0]], "item": [[10.0], [20.0]], "genre": [[0.0], [3.0], [5.0]]}
    set_weights(first, {"numeric": [4.0]} | tables("weights.", **weights))
    # A bag counts by its mean: 1 + 20 + (3 + 5) / 2 + 4 · 0.5, and 2 + 10 + 0 + 4 · 2.
    assert first(Inputs.of(EXAMPLES)).tolist() == [27.0, 20.0]


def test_deepfm_is_the_first_order_the_pairs_and_the_layers_on_the_same_vectors():
    model = build(SMALL, replace(CONFIG, model="deepfm", hidden=(1,), factors=2))
    first = {"user": [[1.0], [2.0]], "item": [[10.0], [20.0]], "genre": [[0.0], [3.0], [5.0]]}
    weights = {
        "bias": 0.25,
        "deep.first_order.numeric": [4.0],
        "deep.pairs.numeric": [[1.0, 1.0]],
        "deep.layers.0.weight": [[1.0, 0.0, 1.0, 1.0, 2.0, 0.0, -2.0]],
        "deep.layers.0.bias": [0.5],
        "deep.layers.2.weight": [[100.0]],
    }
    weights |= tables("deep.embeddings.", **VECTORS)
    set_weights(model, weights | tables("deep.first_order.weights.", **first))
    # The layer: 1 + (3 - 1) + 2 · 1 - 2 · 0.5 + 0.5 = 4.5 and 0 + (4 + 4) + 0 - 2 · 2 + 0.5 = 4.5.
    expected = [100 * 4.5 + 11 + 27 + 0.25, 100 * 4.5 + 10 + 20 + 0.25]
    assert model(Inputs.of(EXAMPLES)).tolist() == expected


def test_the_dot_product_by_hand():
    model = build(SMALL, replace(CONFIG, model="dot_product", factors=2))
    vectors = {name: VECTORS[name] for name in ("user", "item")}
    biases = {"user": [[0.5], [1.0]], "item": [[10.0], [20.0]]}
    weights = {"bias": 0.25} | tables("deep.embeddings.", **vectors)
    set_weights(model, weights | tables("deep.biases.embeddings.", **biases))
    # b_u + b_i + p_u . q_i + b: (1, 2) . (3, -1) = 1 and (0, -1) . (4, 4) = -4.
    assert model(Inputs.of(EXAMPLES)).tolist() == [0.5 + 20 + 1 + 0.25, 1 + 10 - 4 + 0.25]


def test_neumf_by_hand():
    model = build(SMALL, replace(CONFIG, model="neumf", hidden=(1,), factors=2))
    vectors = {name: VECTORS[name] for name in ("user", "item")}
    other = {"user": [[1.0, 0.0], [0.0, 1.0]], "item": [[2.0, 0.0], [0.0, 3.0]]}
    weights = {
        "bias": 0.25,
        "deep.layers.0.weight": [[1.0, 2.0, -1.0, 4.0]],
        "deep.layers.0.bias": [-1.0],
        "deep.out.weight": [[1.0, 10.0, 100.0]],
    }
    weights |= tables("deep.products.embeddings.", **vectors)
    set_weights(model, weights | tables("deep.pairs.embeddings.", **other))
    # Products (1, 2) ⊙ (3, -1) = (3, -2) and (0, -1) ⊙ (4, 4) = (0, -4). The layer reads vectors of
    # its own: (1, 0, 0, 3) gives 1 + 12 - 1 = 12; (0, 1, 2, 0) gives max(0, 2 - 2 - 1) = 0.
    expected = [3 - 10 * 2 + 100 * 12 + 0.25, 0 - 10 * 4 + 100 * 0 + 0.25]
    assert model(Inputs.of(EXAMPLES)).tolist() == expected


def test_neumf_without_layers_reads_the_vectors_themselves():
    model = build(SMALL, replace(CONFIG, model="neumf", hidden=(), factors=2))
    assert model.state_dict()["deep.out.weight"].shape == (1, 2 + 2 * 2)
    assert model(Inputs.of(EXAMPLES)).shape == (2,)


@pytest.mark.parametrize("model", ["dot_product", "neumf"])
def test_of_all_features_the_keys_alone_are_read(model):
    network = build(LAYOUT, replace(CONFIG, model=model))
    randomise(network, scale=0.5)
    batch, other = examples(20), examples(20, seed=1)
    mixed = replace(other, deep_ids=np.c_[batch.deep_ids[:, :2], other.deep_ids[:, 2]])
    np.testing.assert_array_equal(score(network, mixed), score(network, batch))
    assert (score(network, other) != score(network, batch)).any()


def test_keys_may_share_a_table():
    layout = replace(SMALL, fields=("user", "user"), tables={"user": (2, 2), "genre": (3, 2)})
    model = build(layout, replace(CONFIG, model="dot_product", factors=2))
    weights = {"bias": 0.0} | tables("deep.embeddings.", user=VECTORS["user"])
    set_weights(model, weights | tables("deep.biases.embeddings.", user=[[0.5], [1.0]]))
    assert model(Inputs.of(EXAMPLES)).tolist() == [1.5 - 2.0, 1.5 - 2.0]  # (1, 2) . (0, -1)


# --- properties --------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**32 - 1), factors=st.sampled_from([1, 2, 3]))
def test_linear_time_gives_the_sum_over_all_pairs(seed, factors):
    """Rendle 2010, lemma 3.1; fields of other widths than k are projected to k first."""
    embeddings = Embeddings(LAYOUT).double()
    machine = FactorizationMachine(embeddings, factors).double()
    randomise(embeddings, seed)
    randomise(machine, seed + 1)
    inputs = Inputs.of(examples(7, seed))
    embedded = embeddings(inputs._replace(numeric=inputs.numeric.double()))
    # Widths 3, 3 and 2, then the bags' 2 and 3: neighbours of one width are projected as one run.
    widths = [[(0, 3), (3, 6)], [(6, 8), (8, 10)], [(10, 13)]]
    vectors = []
    for i, run in enumerate(widths):
        for place, (start, stop) in enumerate(run):
            vector = embedded[:, start:stop]
            if stop - start != factors:
                vector = vector @ machine.projections[str(i)][place]
            vectors.append(vector)
    vectors += [embedded[:, [13 + i]] * machine.numeric[i] for i in range(2)]
    expected = sum((one * other).sum(dim=1) for one, other in combinations(vectors, 2))
    torch.testing.assert_close(machine(embedded), expected)
    projected = {str(i) for i, run in enumerate(widths) if run[0][1] - run[0][0] != factors}
    assert set(machine.projections) == projected


@pytest.mark.parametrize("factors", [2, 3, 5])
def test_gradients_of_the_factorization_machine(factors):
    embeddings = Embeddings(LAYOUT).double()
    machine = FactorizationMachine(embeddings, factors).double()
    randomise(machine, seed=4)
    names, weights = zip(*machine.named_parameters(), strict=True)
    draw = torch.Generator().manual_seed(5)
    embedded = torch.randn(3, LAYOUT.deep_width, dtype=torch.float64, generator=draw)

    def value(given: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        state = dict(zip(names, weights, strict=True))
        return torch.func.functional_call(machine, state, (given,))

    given = [tensor.detach().clone().requires_grad_() for tensor in (embedded, *weights)]
    assert torch.autograd.gradcheck(value, given)


# --- cells that were held out ------------------------------------------------------------------

SIDE = 30
USERS, ITEMS = (grid.ravel() for grid in np.meshgrid(range(SIDE), range(SIDE), indexing="ij"))
HELD_OUT = np.random.default_rng(0).random(SIDE * SIDE) < 0.3


def held_out(values: np.ndarray, task: str, model: str, **settings: Any) -> np.ndarray:
    """What a model that was trained on the other cells says of those held out."""
    known = np.flatnonzero(~HELD_OUT)
    layout, training = pairs(USERS[known], ITEMS[known], values[known], (SIDE, SIDE))
    _, test = pairs(USERS[HELD_OUT], ITEMS[HELD_OUT], values[HELD_OUT], (SIDE, SIDE))
    settings = {"passes": 60, "batch_size": 32, "factors": 2} | settings
    return score(fitted(layout, training, task, model=model, **settings), test)


def rank_two() -> np.ndarray:
    """Products of two factors, plus an offset for each user and each item."""
    draw = np.random.default_rng(1)
    users, items = draw.normal(size=(2, SIDE, 2)) / 2**0.25
    offsets = draw.normal(size=(2, SIDE))
    return (users[USERS] * items[ITEMS]).sum(axis=1) + offsets[0][USERS] + offsets[1][ITEMS]


def error(values: np.ndarray, predicted: np.ndarray) -> float:
    """Root mean squared error on the held out cells, against their standard deviation."""
    expected = values[HELD_OUT]
    return float(np.sqrt(((predicted - expected) ** 2).mean()) / expected.std())


def test_a_dot_product_completes_a_matrix_of_low_rank():
    values = rank_two()
    settings = {"embedding_learning_rate": 1.0, "passes": 40}
    assert error(values, held_out(values, "regression", "dot_product", **settings)) < 0.01
    # A sum of what is known of user and item has the offsets alone.
    assert error(values, held_out(values, "regression", "deep", **settings)) > 0.4


def likes() -> np.ndarray:
    """Users of one kind like items of one kind and dislike the other; the other users do not."""
    draw = np.random.default_rng(2)
    users, items = draw.choice([-1, 1], (2, SIDE))
    return (users[USERS] == items[ITEMS]).astype(float)


def test_a_factorization_machine_knows_pairs_that_it_never_saw():
    values = likes()
    assert auc(values[HELD_OUT], held_out(values, "binary", "deepfm", passes=20)) == 1.0
    # Without layers the deep model is a sum over the fields, which cannot tell.
    assert auc(values[HELD_OUT], held_out(values, "binary", "deep", passes=20)) < 0.65


def kinked() -> np.ndarray:
    """A product of kinds, plus a sum of offsets that is cut at 0, which is no product of few."""
    draw = np.random.default_rng(3)
    users, items = draw.choice([-1, 1], (2, SIDE))
    offsets = draw.normal(size=(2, SIDE))
    cut = np.maximum(0, offsets[0][USERS] + offsets[1][ITEMS])
    return users[USERS] * items[ITEMS] + 2 * cut


def test_neumf_learns_a_product_and_what_is_no_product():
    values = kinked()
    settings = {"passes": 40, "batch_size": 64, "hidden": (16, 8)}
    rates = {"embedding_learning_rate": 0.1, "deep_learning_rate": 0.1}
    both = error(values, held_out(values, "regression", "neumf", **settings, **rates))
    rates["embedding_learning_rate"] = 1.0  # what suits it best
    product = error(values, held_out(values, "regression", "dot_product", **settings, **rates))
    assert both < 0.06
    assert product > 2 * both


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["dot_product", "neumf"])
@pytest.mark.parametrize(
    ("absent", "missing"),
    [({"user": None}, ["user"]), ({"item": None}, ["item"]), ({"user": None, "item": None}, None)],
    ids=["no user", "no item", "neither"],
)
def test_without_a_key_there_is_nothing_to_multiply(model, absent, missing):
    with pytest.raises(ConfigError) as caught:
        build(replace(SMALL, **absent), TrainingConfig(model=model))
    assert str(caught.value) == "; ".join(
        f"training.model is {model!r}, which needs the {whose}'s key as a feature of its own; the "
        "spec has no deep column of it: add one, or choose another model"
        for whose in missing or ["user", "item"]
    )
