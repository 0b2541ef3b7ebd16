"""The joint step: schedules, clipping, weights and precision, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fathom.batch import Batch, Layout
from fathom.config import TrainingConfig
from fathom.models import Inputs, build, deep, score
from fathom.models.deep import ReluLinear
from fathom.step import Optimizers, learning_rate, losses
from fathom.training import TrainingError, train

LAYOUT = Layout(2, {"a": (6, 4)}, ("a",), (), (6,), 0)
CONFIG = TrainingConfig(hidden=(5,), batch_size=64, epochs=2, wide_l1=0.0, device="cpu")


def examples(rows: int = 128, seed: int = 0, weight: np.ndarray | None = None) -> Batch:
    draw = np.random.default_rng(seed)
    ids = draw.integers(0, 6, (rows, 1)).astype(np.int32)
    return Batch(
        numeric=draw.normal(size=(rows, 2)).astype(np.float32),
        deep_ids=ids,
        deep_bags=(),
        wide_ids=ids,
        wide_bags=(),
        label=(draw.random(rows) < 0.2 + 0.1 * ids[:, 0]).astype(np.float32),
        weight=weight,
    )


# --- schedules ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("cosine", [1.0, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2, 0.0]),
        ("constant", [1.0] * 5),
    ],
)
def test_a_schedule_falls_from_all_of_the_rate_to_what_is_left(schedule, expected):
    config = TrainingConfig(schedule=schedule, final_rate=0.2)
    found = [learning_rate(config, step, 8) for step in (0, 2, 4, 6, 8)]
    least = 1.0 if schedule == "constant" else 0.2
    assert found == pytest.approx([least + (1 - least) * share for share in expected])


def test_a_warm_up_rises_to_where_the_schedule_begins():
    config = TrainingConfig(warmup_steps=3, schedule="linear", final_rate=0.5)
    assert [learning_rate(config, step, 103) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert learning_rate(config, 103, 103) == 0.5


# --- one gradient ------------------------------------------------------------------------------


def gradients(config: TrainingConfig, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> dict:
    """What each optimizer is given in a step, by parameter."""
    model = build(LAYOUT, config)
    optimizers = Optimizers(model, config)
    given: dict[str, torch.Tensor] = {}
    names = {id(weight): name for name, weight in model.named_parameters()}
    for part in optimizers.sparse:
        monkeypatch.setattr(
            part, "update", lambda table, rows, sums: given.update({names[id(table)]: sums.clone()})
        )
    monkeypatch.setattr(
        optimizers.dense,
        "step",
        lambda: given.update(
            {
                n: w.grad.clone()
                for n, w in model.named_parameters()
                if n not in given and w.grad is not None and not w.grad.is_sparse
            }
        ),
    )
    inputs = Inputs.of(batch)
    loss = losses(model(inputs), torch.from_numpy(batch.label), "binary").mean()
    optimizers.step(loss, len(batch), 1.0)
    return given


def test_clipping_bounds_the_norm_of_the_deep_part_and_leaves_the_wide_part(monkeypatch):
    batch = examples()
    free = gradients(CONFIG, batch, monkeypatch)
    bound = 0.01
    clipped = gradients(replace(CONFIG, clip_norm=bound), batch, monkeypatch)
    assert set(free) == set(clipped)
    deep = [name for name in free if name != "wide.weight"]

    def norm(given: dict) -> float:
        return math.sqrt(sum(float(given[name].double().square().sum()) for name in deep))

    assert norm(free) > bound
    assert norm(clipped) == pytest.approx(bound, rel=1e-5)
    factor = bound / norm(free)
    for name in deep:
        torch.testing.assert_close(clipped[name], free[name] * factor)
    assert torch.equal(clipped["wide.weight"], free["wide.weight"])


def test_inactive_rows_have_no_weight_after_a_step_and_the_others_learn():
    model = build(replace(LAYOUT, inactive=(0, 3)), CONFIG)
    with torch.no_grad():
        model.wide.weight.fill_(0.25)  # as weights of another training may be
    optimizers = Optimizers(model, CONFIG)
    batch = examples()
    loss = losses(model(Inputs.of(batch)), torch.from_numpy(batch.label), "binary").mean()
    optimizers.step(loss, len(batch), 1.0)
    weights = model.wide.weight.detach()[:, 0]
    assert weights[[0, 3]].tolist() == [0, 0]
    assert not (weights[[1, 2, 4, 5]] == 0.25).any()
    assert (weights[[1, 2, 4, 5]] != 0).all()


def test_a_norm_within_the_bound_changes_nothing():
    splits = (examples(), examples(seed=1))
    bounded, free = (
        train(LAYOUT, *splits, replace(CONFIG, clip_norm=norm), "binary").model.state_dict()
        for norm in (1e6, 0.0)
    )
    assert all(torch.equal(bounded[name], value) for name, value in free.items())


# --- weights -----------------------------------------------------------------------------------


def test_an_example_of_weight_2_counts_as_two_of_weight_1():
    """Twice as often, or twice as heavy: the same loss, up to float32, for the whole batch."""
    split = examples(64)
    heavy = np.where(split.label == 1, 2.0, 1.0).astype(np.float32)
    twice = split.take(np.concatenate([np.arange(64), np.flatnonzero(split.label == 1)]))
    one = replace(CONFIG, epochs=1, batch_size=len(twice), hidden=())
    by_weight = train(
        LAYOUT, replace(split, weight=heavy), split, replace(one, use_weights=True), "binary"
    )
    by_number = train(LAYOUT, twice, split, one, "binary")
    assert by_weight.history[0].train_loss == pytest.approx(by_number.history[0].train_loss, 1e-5)
    by_class = train(LAYOUT, split, split, replace(one, positive_weight=2.0), "binary")
    assert by_class.history[0].train_loss == pytest.approx(by_number.history[0].train_loss, 1e-5)


def test_weights_are_left_aside_unless_they_are_asked_for():
    weight = np.linspace(1, 5, 128).astype(np.float32)
    splits = (examples(weight=weight), examples(seed=1))
    weighted = train(LAYOUT, *splits, CONFIG, "binary").model.state_dict()
    plain = train(LAYOUT, examples(), examples(seed=1), CONFIG, "binary").model.state_dict()
    assert all(torch.equal(weighted[name], value) for name, value in plain.items())


@pytest.mark.parametrize("odd", [-1.0, math.nan, math.inf])
def test_weights_that_mean_nothing_are_refused(odd):
    weight = np.ones(128, np.float32)
    weight[3] = odd
    message = "training split has 1 weights that are negative or not finite; encode it again"
    with pytest.raises(TrainingError, match=message):
        train(LAYOUT, examples(weight=weight), examples(), CONFIG, "binary")


@pytest.mark.parametrize(("part", "value"), [("deep_ids", 6), ("deep_ids", -1), ("wide_ids", 6)])
def test_an_id_beyond_its_table_is_refused_before_training(part, value):
    split = examples()
    getattr(split, part)[5, 0] = value
    message = "training split has [12] ids outside of their tables; encode it again"
    with pytest.raises(TrainingError, match=message):
        train(LAYOUT, split, examples(), CONFIG, "binary")


def test_a_loss_that_explodes_stops_training_and_names_the_batch():
    with pytest.raises(
        TrainingError,
        match=r"the loss explodes: [\d.e+]+ in batch \d+ of epoch 1, whose examples are rows .* of "
        r"the training split",
    ):
        train(
            LAYOUT,
            examples(640),
            examples(),
            replace(CONFIG, hidden=(5, 5), deep_learning_rate=1e4),
            "binary",
        )


# --- precision ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (3, 4), (29, 16), (64, 32)])
@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
def test_the_fused_layer_is_a_relu_of_a_linear_layer(
    rows, inputs, outputs, bfloat16, fused, monkeypatch
):
    """In float32 to rounding; in bfloat16, which has 8 bits, to the sums of 2^-8 of each part."""
    if not fused:  # as on a processor without it
        monkeypatch.setattr(deep, "_fuses", lambda dtype: False)
    torch.manual_seed(rows)
    layer = ReluLinear(inputs, outputs, bfloat16)
    x = torch.randn(rows, inputs, requires_grad=True)
    found = layer(x)
    assert found.dtype == (torch.bfloat16 if bfloat16 else torch.float32)
    into = torch.randn(rows, outputs)
    found.backward(into.to(found.dtype))
    gradients = [x.grad.clone(), layer.weight.grad.clone(), layer.bias.grad.clone()]
    assert all(gradient.dtype == torch.float32 for gradient in gradients)

    x.grad, layer.weight.grad, layer.bias.grad = None, None, None
    expected = torch.relu(torch.nn.functional.linear(x, layer.weight, layer.bias))
    # Where the sum is next to zero, rounding decides which side the ReLU sees.
    sure = (expected - found.float()).abs() < 0.5 * expected.abs().clamp(min=0.05)
    assert sure.float().mean() > 0.9
    same = (expected > 0) == (found > 0)
    expected.backward(into * same)
    share = 2**-5 if bfloat16 else 1e-5
    torch.testing.assert_close(found.float(), expected, rtol=share, atol=share * 2)
    if same.all():
        for gradient, exact in zip(
            gradients, (x.grad, layer.weight.grad, layer.bias.grad), strict=True
        ):
            scale = float(exact.abs().max()) + 1e-6
            assert float((gradient - exact).abs().max()) <= share * 4 * scale


def test_scoring_is_float32_whatever_training_was():
    layer = ReluLinear(3, 2, bfloat16=True).eval()
    assert layer(torch.ones(1, 3)).dtype == torch.float32


def test_bfloat16_trains_to_the_same_loss_as_float32():
    """Within the difference that another seed makes."""
    splits = (examples(4000), examples(1000, seed=1))

    def loss(**settings) -> float:
        config = replace(CONFIG, hidden=(32, 16), epochs=3, **settings)
        return train(LAYOUT, *splits, config, "binary").history[-1].validation_loss

    single = [loss(seed=seed) for seed in range(3)]
    half = [loss(seed=seed, precision="bfloat16") for seed in range(3)]
    assert abs(np.mean(half) - np.mean(single)) < 3 * max(np.std(single), 5e-4)


def test_scores_do_not_depend_on_how_many_are_scored_at_a_time():
    model = train(LAYOUT, examples(), examples(), CONFIG, "binary").model
    whole = score(model, examples(9000, seed=3))
    part = score(model, examples(9000, seed=3).take(np.arange(8200, 8210)))
    np.testing.assert_allclose(part, whole[8200:8210], atol=1e-6)


@pytest.mark.parametrize("kind", ["adagrad", "rowwise_adagrad", "ftrl"])
def test_every_embedding_optimizer_learns(kind):
    config = replace(CONFIG, embedding_optimizer=kind, epochs=4, patience=4)
    history = train(LAYOUT, examples(2000), examples(500, seed=1), config, "binary").history
    assert history[-1].train_loss < history[0].train_loss < math.log(2)


def test_embeddings_by_ftrl_can_lose_whole_rows():
    config = replace(CONFIG, embedding_optimizer="ftrl", embedding_group_l1=1e3)
    model = train(LAYOUT, examples(), examples(), config, "binary").model
    assert (model.state_dict()["deep.embeddings.tables.a.weight"] == 0).all()
