"""What holds for every architecture, of those there are and of those to come."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fathom.batch import Layout, Ragged
from fathom.config import ConfigError, TrainingConfig
from fathom.models import Inputs, Model, build, score
from fathom.models.deep import Embeddings, ReluLinear
from fathom.models.family import MODELS
from fathom.step import Optimizers
from fathom.training import train
from fathom.warm import WIDE, WarmStart
from small_family import CONFIG, LAYOUT, examples, randomise, worst_gradient_error

TRAIN, VALIDATION = examples(160, seed=0), examples(60, seed=1)
#: Architectures, and settings of theirs that change what they are built of.
CASES: dict[str, dict[str, Any]] = {
    **{name: {"model": name} for name in MODELS},
    "mixture": {"model": "dcn_v2", "cross_rank": 2, "cross_experts": 2},
    "projected": {"model": "deepfm", "factors": 5},
    "prelu": {"model": "din", "activation": "prelu"},
}

pytestmark = pytest.mark.parametrize("case", CASES)


def config_of(case: str, **settings: Any) -> TrainingConfig:
    return replace(CONFIG, **CASES[case] | settings)


def built(case: str, **settings: Any) -> Model:
    return build(LAYOUT, config_of(case, **settings))


def trained(case: str, folder: Path | None = None, **settings: Any) -> Model:
    config = config_of(case, **settings)
    return train(LAYOUT, TRAIN, VALIDATION, config, "binary", folder).model


def has(model: Model, kind: type[nn.Module]) -> bool:
    return any(isinstance(part, kind) for part in model.modules())


def same(one: Model, other: Model) -> bool:
    """Bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


# --- what a model gives ------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_a_logit_for_each_example(case, rows):
    model, inputs = built(case), Inputs.of(examples(rows))
    for mode in (True, False):
        model.train(mode)
        assert model(inputs).shape == (rows,)
        heads = model.heads(inputs)
        assert heads.shape[0] == rows
        torch.testing.assert_close(heads[:, -1], model(inputs))  # the last is the prediction


@torch.no_grad()
def test_contributions_sum_to_the_logit(case):
    model, batch = built(case), examples(50)
    randomise(model, seed=2, scale=0.5)
    model.eval()
    parts = model.contributions(Inputs.of(batch))
    wide, deep = parts.wide.double().sum(dim=1), parts.deep.double()
    np.testing.assert_allclose(
        (wide + deep + parts.bias.double()).numpy(), score(model, batch), rtol=1e-6, atol=1e-6
    )
    slots = len(LAYOUT.wide_slots) if model.wide is not None else 0
    assert parts.wide.shape == (50, slots)
    assert parts.deep.any() == (model.deep is not None)


def test_examples_do_not_see_each_other(case):
    model, batch = built(case), examples(40)
    randomise(model, seed=3, scale=0.5)
    order = np.random.default_rng(0).permutation(40)
    expected = score(model, batch)[order]
    np.testing.assert_allclose(score(model, batch.take(order)), expected, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_finite_differences(case):
    model = built(case).double()
    randomise(model, seed=4, scale=0.5)
    inputs = Inputs.of(examples(6))
    inputs = inputs._replace(numeric=inputs.numeric.double())
    factors = torch.tensor([1.0, -0.7, 0.4, 1.3, -1.1, 0.6], dtype=torch.float64)

    def value() -> torch.Tensor:  # rows do not cancel, and none is far out
        return ((model(inputs) / 10).tanh() * factors).sum()

    assert worst_gradient_error(value, model.parameters()) < 1e-7


# --- training ----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["binary", "regression"])
def test_training_moves_every_weight_and_lowers_the_loss(case, task):
    config = config_of(case, epochs=3)
    history = train(LAYOUT, TRAIN, VALIDATION, config, task)
    losses = [epoch.train_loss for epoch in history.history]
    assert losses[-1] < losses[0]
    before = build(LAYOUT, config)
    for name, weight in history.model.named_parameters():
        assert not torch.equal(weight, dict(before.named_parameters())[name]), name


def test_the_same_seed_gives_the_same_bits_and_another_others(case):
    one, again, other = (trained(case, seed=seed, dropout=0.2) for seed in (0, 0, 1))
    assert same(one, again)
    assert not same(one, other)


def test_saved_weights_give_the_same_scores(case):
    model = trained(case)
    again = build(LAYOUT, config_of(case, seed=7))
    assert not same(again, model)
    again.load_state_dict(model.state_dict())
    np.testing.assert_array_equal(score(again, VALIDATION), score(model, VALIDATION))
    with pytest.raises(RuntimeError, match=r"[Uu]nexpected key"):
        again.load_state_dict(model.state_dict() | {"deep.of_another": torch.zeros(1)})


def test_what_is_dropped_changes_training_and_not_scoring(case):
    model = trained(case, dropout=0.5)
    np.testing.assert_array_equal(score(model, VALIDATION), score(model, VALIDATION))
    assert np.isfinite(score(model, VALIDATION)).all()
    # The autoencoder has no layer for it: it hides what goes in.
    drops = case == "hybrid_autoencoder" or has(model, nn.Dropout)
    assert same(model, trained(case)) != drops


def test_bfloat16_is_for_the_relu_layers_alone(case):
    half = trained(case, precision="bfloat16")
    assert {weight.dtype for weight in half.parameters()} == {torch.float32}
    assert np.isfinite(score(half, VALIDATION)).all()
    assert same(half, trained(case)) != has(half, ReluLinear)


def test_batches_in_which_nobody_has_a_history(case):
    few, config = examples(60, most=0), config_of(case)
    model = train(LAYOUT, few, VALIDATION, config, "binary").model
    assert np.isfinite(score(model, few)).all()
    assert np.isfinite(score(model, VALIDATION)).all()


def test_a_spec_without_numbers(case):
    layout = replace(LAYOUT, numeric=0, owners=LAYOUT.owners[:5])
    batch, validation = (
        replace(split, numeric=split.numeric[:, :0]) for split in (TRAIN, VALIDATION)
    )
    model = train(layout, batch, validation, config_of(case), "binary").model
    assert np.isfinite(score(model, validation)).all()


def test_without_hidden_layers(case):
    if case == "hybrid_autoencoder":  # which would be without a code
        with pytest.raises(ConfigError, match=r"needs at least one width in training\.hidden"):
            built(case, hidden=())
        return
    assert np.isfinite(score(trained(case, hidden=()), VALIDATION)).all()


# --- going on ----------------------------------------------------------------------------------


class Killed(BaseException):
    """No error that anything would catch."""


@pytest.fixture
def killed_in_the_second_epoch(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    steps, step = iter(range(10**6)), Optimizers.step

    def stopping(self: Optimizers, *given: Any) -> None:
        if next(steps) == 7:  # an epoch has five
            raise Killed
        step(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(Optimizers, "step", stopping)
        yield patched


def test_a_training_that_was_killed_ends_as_if_it_were_not(
    case, tmp_path, killed_in_the_second_epoch
):
    settings = {"dropout": 0.2, "epochs": 2, "checkpoint_seconds": 1e-6}
    with pytest.raises(Killed):
        trained(case, tmp_path, **settings)
    (checkpoint,) = tmp_path.glob("step-*")
    assert checkpoint.name == f"step-{7:012d}"
    killed_in_the_second_epoch.undo()
    assert same(trained(case, tmp_path, **settings), trained(case, **settings))


def test_a_warm_start_carries_all_tables_of_a_name_by_key(case, tmp_path):
    """Ids in another order, and a new one at the end of each table: known examples score as before.

    Some models have several tables of one key: the vectors, and the weights of the linear term.
    """
    settings = {"activation": "prelu"}  # which is all weights, unlike Dice
    old = trained(case, tmp_path, **settings)
    (best,) = tmp_path.glob("best-*")
    draw = np.random.default_rng(0)
    rows = {
        name: np.append(draw.permutation(size), -1) for name, (size, _) in LAYOUT.tables.items()
    }
    sizes = [size + 1 for size in LAYOUT.wide_slots]
    rows[WIDE] = np.r_[rows["user"], np.where(rows["genre"] < 0, -1, rows["genre"] + 5)]
    tables = {name: (size + 1, width) for name, (size, width) in LAYOUT.tables.items()}
    layout = replace(LAYOUT, tables=tables, wide_slots=tuple(sizes))
    config = config_of(case, seed=3, **settings)
    model = build(layout, config)
    optimizers = Optimizers(model, config)
    start = WarmStart(best, LAYOUT, config_of(case, **settings), rows)
    assert start.apply(model, optimizers) == []

    place = {name: np.argsort(places[:-1]).astype(np.int32) for name, places in rows.items()}
    ids, (recent, tags) = VALIDATION.deep_ids, VALIDATION.deep_bags
    wide = VALIDATION.wide_bags[0]
    moved = replace(
        VALIDATION,
        deep_ids=np.stack([place[n][ids[:, i]] for i, n in enumerate(LAYOUT.fields)], axis=1),
        deep_bags=(
            Ragged(place["genre"][recent.values], recent.offsets),
            Ragged(place["tag"][tags.values], tags.offsets),
        ),
        wide_ids=place["user"][VALIDATION.wide_ids],
        wide_bags=(Ragged(place["genre"][wide.values - 5] + np.int32(6), wide.offsets),),
    )
    np.testing.assert_array_equal(score(model, moved), score(old, VALIDATION))
    # A new row is what a fresh model has there.
    fresh = dict(build(layout, config).named_modules())
    for name, part in model.named_modules():
        if isinstance(part, Embeddings):
            other = fresh[name]
            assert isinstance(other, Embeddings)
            for table in part.places:
                assert torch.equal(part.table(table)[-1], other.table(table)[-1])


def test_its_layout_survives_as_plain_values(case):
    """What is read back from a job or an artifact builds the same model."""
    layout = Layout.of(json.loads(json.dumps(asdict(LAYOUT))))
    assert same(build(layout, config_of(case)), built(case))
