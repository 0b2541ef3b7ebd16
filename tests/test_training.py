"""Joint training on planted data, its step by hand, and how it stops."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import subprocess
import sys
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fathom import step, training
from fathom.batch import Batch, Layout, Ragged
from fathom.config import TrainingConfig
from fathom.models import Inputs, Model, build, score
from fathom.training import Trained, TrainingError, train

ROOT = Path(__file__).parents[1]
SIDE = 25
#: Two fields and a number in the deep part; the pair of the fields and a bag in the wide part.
LAYOUT = Layout(
    numeric=1,
    tables={"left": (SIDE, 4), "right": (SIDE, 4)},
    fields=("left", "right"),
    bags=(),
    wide_slots=(SIDE * SIDE, 3),
    wide_bags=1,
)
CONFIG = TrainingConfig(
    hidden=(16,),
    wide_learning_rate=0.1,
    wide_l1=0.5,
    embedding_learning_rate=0.05,
    deep_learning_rate=0.05,
    final_rate=0.1,
    batch_size=256,
    epochs=8,
    patience=1,
    device="cpu",
)


def planted(rows: int, seed: int, task: str = "binary") -> Batch:
    """A smooth curve of the number, which no weight per id can draw, plus an exception for each
    pair, which has no rule."""
    random = np.random.default_rng(seed)
    exceptions = np.random.default_rng(0).choice([-2.0, 2.0], (SIDE, SIDE))
    left, right = random.integers(SIDE, size=(2, rows))
    number = random.random(rows)
    logit = 2 * np.sin(6 * number) + exceptions[left, right]
    chance = 1 / (1 + np.exp(-logit))
    label = random.random(rows) < chance if task == "binary" else 5 + logit
    tags = [[SIDE * SIDE + tag] if tag < 3 else [] for tag in random.integers(6, size=rows)]
    return Batch(
        numeric=number[:, None].astype(np.float32),
        deep_ids=np.stack([left, right], axis=1).astype(np.int32),
        deep_bags=(),
        wide_ids=(left * SIDE + right)[:, None].astype(np.int32),
        wide_bags=(Ragged.of(tags, np.int32),),
        label=label.astype(np.float32),
    )


TRAIN, VALIDATION = planted(8000, seed=1), planted(2000, seed=2)


def trained(task: Any = "binary", **settings: Any) -> Trained:
    return train(LAYOUT, TRAIN, VALIDATION, replace(CONFIG, **settings), task)


def logloss(model: Model, batch: Batch) -> float:
    chance = 1 / (1 + np.exp(-score(model, batch).astype(float)))
    label = batch.label.astype(float)
    return float(-(label * np.log(chance) + (1 - label) * np.log1p(-chance)).mean())


def state(model: Model) -> dict[str, np.ndarray]:
    return {name: weight.numpy().copy() for name, weight in model.state_dict().items()}


def equal(first: Model, second: Model) -> bool:
    """Bit for bit."""
    one, other = state(first), state(second)
    return all(one[name].tobytes() == other[name].tobytes() for name in one)


@pytest.fixture(scope="module")
def joint() -> Trained:
    return trained()


# --- joint means joint -------------------------------------------------------------------------


def test_one_step_moves_every_part_by_the_gradient_of_one_loss_of_the_sum():
    batch = TRAIN.take(np.arange(64))
    config = replace(CONFIG, epochs=1, batch_size=64, wide_l1=0.0, hidden=(4,), seed=5)
    before = build(LAYOUT, config)
    logit = before(Inputs.of(batch)).detach().double().numpy()
    after = state(train(LAYOUT, batch, VALIDATION, config, "binary").model)

    # The derivative of the logistic loss by the summed logit, for each example: p - y.
    residual = 1 / (1 + np.exp(-logit)) - batch.label
    assert np.abs(logit).max() > 1e-4  # the deep part has a say in it from the start

    # Wide: FTRL's first step from 0 with g the sum over the examples of a pair.
    g = np.zeros(SIDE * SIDE + 3)
    np.add.at(g, batch.wide_ids[:, 0], residual)
    np.add.at(g, batch.wide_bags[0].values, residual[batch.wide_bags[0].rows])
    np.testing.assert_allclose(
        after["wide.weight"][:, 0], -g / ((1 + np.abs(g)) / 0.1), rtol=1e-4, atol=1e-8
    )
    # Bias: AdaGrad's first step, on the mean, with a sum of squares that starts above 0.
    mean, initial = residual.mean(), step._INITIAL_ACCUMULATOR
    assert after["bias"] == pytest.approx(-0.05 * mean / math.sqrt(initial + mean**2), rel=1e-4)
    # Deep: every layer moved in the same step, and of the tables just the rows looked up.
    start = state(before)
    assert (after["deep.layers.0.weight"] != start["deep.layers.0.weight"]).any()
    assert (after["deep.layers.2.weight"] != start["deep.layers.2.weight"]).any()
    for i, name in enumerate(("left", "right")):
        table = f"deep.embeddings.tables.{name}.weight"
        moved = (after[table] != start[table]).any(axis=1)
        assert set(np.flatnonzero(moved)) == set(batch.deep_ids[:, i].tolist())


def test_both_parts_together_beat_each_alone_on_data_that_need_both(joint):
    losses = {name: logloss(trained(model=name).model, VALIDATION) for name in ("wide", "deep")}
    together = logloss(joint.model, VALIDATION)
    assert together < min(losses.values()) - 0.01, losses
    assert together < min(losses.values()) < math.log(2)  # each alone learnt something


def test_each_part_of_the_joint_model_takes_its_share(joint):
    parts = joint.model.contributions(Inputs.of(VALIDATION))
    pair, curve = parts.wide[:, 0].detach().numpy(), parts.deep.detach().numpy()
    exceptions = np.random.default_rng(0).choice([-2.0, 2.0], (SIDE, SIDE))
    truth = exceptions[VALIDATION.deep_ids[:, 0], VALIDATION.deep_ids[:, 1]]
    assert np.corrcoef(pair, truth)[0, 1] > 0.8
    assert np.corrcoef(curve, np.sin(6 * VALIDATION.numeric[:, 0]))[0, 1] > 0.7


def test_l1_keeps_weights_at_exactly_zero():
    shares = [trained(wide_l1=l1, epochs=1).history[0].wide_zero_share for l1 in (0.0, 2.0, 1e6)]
    assert shares[0] < 0.01 < shares[1] < shares[2] == 1.0


def test_regression_learns_by_squared_error():
    config = replace(CONFIG, wide_learning_rate=0.5, deep_learning_rate=0.2)
    batches = [planted(4000, seed, "regression") for seed in (1, 2)]
    result = train(LAYOUT, *batches, config, "regression")
    error = score(result.model, batches[1]) - batches[1].label
    losses = [epoch.validation_loss for epoch in result.history]
    assert np.mean(error.astype(float) ** 2) == pytest.approx(min(losses), rel=1e-5)
    assert min(losses) < 0.5 * np.var(batches[1].label)


def test_a_model_whose_deep_columns_are_all_numeric_has_no_table_to_train():
    layout = Layout(numeric=1, tables={}, fields=(), bags=(), wide_slots=(), wide_bags=0)
    none = np.zeros((500, 0), np.int32)
    number = np.linspace(0, 1, 500, dtype=np.float32)
    batch = Batch(number[:, None], none, (), none, (), label=(number > 0.5).astype(np.float32))
    config = replace(CONFIG, batch_size=50, epochs=10, deep_learning_rate=0.3)
    assert logloss(train(layout, batch, batch, config, "binary").model, batch) < 0.4


# --- early stopping and history ----------------------------------------------------------------


def noise(rows: int, seed: int) -> Batch:
    """Labels that nothing explains, so that each epoch past the first only overfits."""
    label = np.random.default_rng(1000 + seed).integers(0, 2, rows)
    return replace(planted(rows, seed), label=label.astype(np.float32))


@pytest.mark.parametrize("patience", [0, 2])
def test_early_stopping_keeps_the_weights_of_the_best_epoch(patience):
    config = replace(CONFIG, epochs=30, patience=patience, deep_learning_rate=0.1)
    validation = noise(1000, seed=4)
    result = train(LAYOUT, noise(2000, seed=3), validation, config, "binary")

    losses = [epoch.validation_loss for epoch in result.history]
    assert result.best_epoch == 1 + int(np.argmin(losses))
    assert len(losses) == result.best_epoch + patience + 1 < 30  # it stopped, and why
    assert losses[-1] > min(losses)
    assert logloss(result.model, validation) == pytest.approx(min(losses), rel=1e-6)


def test_without_a_worse_epoch_all_epochs_run(joint):
    assert joint.best_epoch == len(joint.history) == CONFIG.epochs


def test_history_tells_what_each_epoch_gave(joint):
    assert [epoch.epoch for epoch in joint.history] == list(range(1, CONFIG.epochs + 1))
    for epoch in joint.history:
        assert 0 < epoch.validation_loss < math.log(2)
        assert epoch.seconds > 0
        assert epoch.examples_per_second == pytest.approx(len(TRAIN) / epoch.seconds)
        assert 0 <= epoch.wide_zero_share < 1
    training_losses = [epoch.train_loss for epoch in joint.history]
    assert training_losses == sorted(training_losses, reverse=True)
    assert trained(model="deep", epochs=1).history[0].wide_zero_share is None


# --- the cool-down -----------------------------------------------------------------------------

#: One example in four is held back for it.
DRAWN = replace(TRAIN, draw=((np.arange(8000) % 4) / 4).astype(np.float32))
COOLING = replace(CONFIG, epochs=2, patience=9, cool_down=0.25, warmup_steps=3)


def test_before_the_cool_down_the_others_are_learnt_at_rates_that_stay(tmp_path):
    found = train(LAYOUT, DRAWN, VALIDATION, COOLING, "binary", tmp_path)
    assert [epoch.examples for epoch in found.history] == [6000, 6000, 2000]
    assert [epoch.epoch for epoch in found.history] == [1, 2, 3]
    assert found.best_epoch == 3
    others = DRAWN.take(np.flatnonzero(np.arange(8000) % 4 > 0))
    staying = replace(COOLING, cool_down=0.0, schedule="constant")
    alone = train(LAYOUT, others, VALIDATION, staying, "binary", tmp_path / "alone")
    assert {path.name: path.read_bytes() for path in found.state.glob("*.npy")} == {
        path.name: path.read_bytes() for path in alone.state.glob("*.npy")
    }


def test_the_cool_down_goes_on_from_there_with_falling_rates(tmp_path, monkeypatch):
    rates = []

    def watched(config: TrainingConfig, at: int, steps: int) -> float:
        rates.append(step.learning_rate(config, at, steps))
        return rates[-1]

    monkeypatch.setattr(training, "learning_rate", watched)
    said: list[tuple[str, int]] = []
    train(
        LAYOUT, DRAWN, VALIDATION, COOLING, "binary", report=lambda n, v, at: said.append((n, at))
    )
    before = 2 * 24  # of 256 of 6,000
    assert [round(rate, 3) for rate in rates[:4]] == [0.25, 0.5, 0.75, 1.0]
    assert set(rates[4:before]) == {1.0}
    falling = rates[before:]
    assert falling == [step.learning_rate(replace(CONFIG, epochs=1), at, 8) for at in range(8)]
    assert falling[0] == 1.0
    assert [at for name, at in said if name == "validation_loss"] == [24, 48, 56]


def test_a_cool_down_ends_below_where_it_began():
    *_, before, after = [epoch.validation_loss for epoch in trained(cool_down=0.25).history]
    assert after < before


def test_examples_without_keys_cool_down_by_their_places():
    first, again = (train(LAYOUT, TRAIN, VALIDATION, COOLING, "binary") for _ in range(2))
    assert [epoch.examples for epoch in first.history] == [5988, 5988, 2012]
    assert equal(first.model, again.model)


def test_too_few_examples_for_a_cool_down_are_named():
    nowhere = replace(TRAIN, draw=np.full(8000, 0.5, np.float32))
    message = r"training\.cool_down is 0\.25, which is 0 of 8000 examples; set it to 0 for so few"
    with pytest.raises(TrainingError, match=message):
        train(LAYOUT, nowhere, VALIDATION, COOLING, "binary")


def test_the_training_loss_of_an_epoch_is_the_mean_over_its_examples():
    # One batch: its loss is that of the initial weights. 100 examples in batches of 64: a mean of
    # batch means would weigh the last 36 too much; learning rates near 0 keep the weights put.
    batch = TRAIN.take(np.arange(100))
    still = {f"{part}_learning_rate": 1e-9 for part in ("wide", "embedding", "deep")}
    config = replace(CONFIG, epochs=1, batch_size=64, **still)
    result = train(LAYOUT, batch, VALIDATION, config, "binary")
    expected = logloss(build(LAYOUT, config), batch)
    assert result.history[0].train_loss == pytest.approx(expected, rel=1e-6)


def test_validation_examples_teach_nothing():
    other = replace(VALIDATION, label=1 - VALIDATION.label)
    one = train(LAYOUT, TRAIN, VALIDATION, replace(CONFIG, epochs=1), "binary")
    two = train(LAYOUT, TRAIN, other, replace(CONFIG, epochs=1), "binary")
    assert equal(one.model, two.model)


def test_progress_is_logged_with_loss_and_speed(caplog, monkeypatch):
    monkeypatch.setattr(training, "_PROGRESS_SECONDS", 0.0)  # at every batch
    with caplog.at_level(logging.INFO, logger="fathom.training"):
        trained(epochs=1, batch_size=4000)
    progress = [record.getMessage() for record in caplog.records]
    number = r"[\d.,]+"
    assert len(progress) == 3
    for message, percent in zip(progress, (50, 100), strict=False):
        pattern = rf"epoch 1: +{percent} %, loss {number}, {number} examples/s, {number} s left"
        assert re.fullmatch(pattern, message), message
    assert progress[2].startswith("epoch 1/1: training loss 0.")


# --- determinism -------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bits():
    settings = {"epochs": 2, "dropout": 0.2}
    first = trained(**settings)
    torch.rand(3), np.random.default_rng().random()
    assert equal(first.model, trained(**settings).model)
    assert not equal(first.model, trained(**settings, seed=1).model)


def test_the_seed_decides_the_order_of_examples_too():
    # The wide part starts from zeros, so only the order can tell seeds apart.
    runs = [trained(model="wide", epochs=1, seed=seed).model for seed in (0, 0, 1)]
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])


# --- what it refuses ---------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_training_and_names_the_batch():
    with pytest.raises(
        TrainingError,
        match=r"the loss is not finite: (nan|inf) in batch 2 of epoch 1, whose examples are rows "
        r"[\d,]+, .* and 251 more of the training split and whose largest numeric input is 0\.99"
        r".*; "
        r"lower the learning rates, set training\.clip_norm, or look for extreme inputs",
    ):
        trained(deep_learning_rate=1e38)


def test_weights_that_the_last_step_of_an_epoch_broke_are_not_returned():
    with pytest.raises(
        TrainingError,
        match=r"the loss after epoch 1 is 0\.\d+ in training and (nan|inf) in validation; lower",
    ):
        trained(deep_learning_rate=1e38, batch_size=len(TRAIN), epochs=1)


def broken(what: str, value: float) -> Batch:
    array = getattr(TRAIN, what).copy()
    array[3] = value
    return replace(TRAIN, **{what: array})


EMPTY = TRAIN.take(np.arange(0))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (EMPTY, "the training split is empty; move the split's dates in conf"),
        (replace(TRAIN, label=None), "the training split has no labels"),
        (broken("label", 2.0), "the training split has 1 labels other than 0 and 1; encode it"),
        (broken("label", math.nan), "the training split has 1 labels that are not finite; encode"),
        (broken("numeric", math.inf), "has 1 numeric inputs that are not finite; encode it again"),
        (
            replace(broken("numeric", math.nan), label=broken("label", 0.5).label),
            "has 1 numeric inputs that are not finite and 1 labels other than 0 and 1",
        ),
    ],
)
def test_a_split_that_cannot_be_learnt_from(batch, message):
    with pytest.raises(TrainingError, match=message):
        train(LAYOUT, batch, VALIDATION, CONFIG, "binary")
    with pytest.raises(TrainingError, match=message.replace("training", "validation")):
        train(LAYOUT, TRAIN, batch, CONFIG, "binary")


def test_faults_of_both_splits_are_reported_together():
    message = "the training split is empty.*; the validation split has 1 labels other than 0 and 1"
    with pytest.raises(TrainingError, match=message):
        train(LAYOUT, EMPTY, broken("label", -1.0), CONFIG, "binary")


def test_labels_other_than_0_and_1_are_fine_for_regression():
    train(LAYOUT, broken("label", 2.0), VALIDATION, replace(CONFIG, epochs=1), "regression")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_cuda_device_is_named_with_the_remedy():
    message = "training.device is 'cuda', but torch sees no CUDA device; set it to 'auto' or 'cpu'"
    with pytest.raises(TrainingError, match=message):
        trained(device="cuda")


@pytest.mark.gpu
def test_a_gpu_learns_what_the_cpu_learns_and_hands_the_model_back(joint):
    result = trained(device="cuda")
    assert result.model.bias.device.type == "cpu"
    assert logloss(result.model, VALIDATION) == pytest.approx(
        logloss(joint.model, VALIDATION), abs=0.01
    )


# --- scoring -----------------------------------------------------------------------------------


def test_scoring_in_bounded_chunks_equals_scoring_at_once(joint):
    batch = planted(20_000, seed=6)
    sizes: list[int] = []
    handle = joint.model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0][0])))
    chunked = score(joint.model, batch)
    handle.remove()
    with torch.no_grad():
        at_once = joint.model(Inputs.of(batch)).numpy()

    assert sum(sizes) == 20_000
    assert max(sizes) <= 8192
    assert chunked.dtype == np.float64
    np.testing.assert_allclose(chunked, at_once, rtol=0, atol=1e-6)


def test_scoring_nothing_gives_nothing(joint):
    assert score(joint.model, EMPTY).shape == (0,)


@pytest.mark.parametrize("mode", [True, False])
def test_scoring_drops_nothing_out_and_leaves_the_mode_as_it_was(mode):
    model = build(LAYOUT, replace(CONFIG, dropout=0.9)).train(mode)
    scores = [score(model, VALIDATION) for _ in range(2)]
    assert (scores[0] == scores[1]).all()
    assert model.training is mode


def test_a_trained_model_is_in_evaluation_mode():
    assert not trained(dropout=0.5, epochs=1).model.training


def test_mapped_batches_train_and_score_alike_without_a_warning(tmp_path):
    for name, batch in {"train": TRAIN, "validation": VALIDATION}.items():
        batch.save(tmp_path / name)
    mapped = [Batch.load(tmp_path / name) for name in ("train", "validation")]
    config = replace(CONFIG, epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = train(LAYOUT, *mapped, config, "binary")
        scores = score(result.model, mapped[1])
    assert equal(result.model, trained(epochs=1).model)
    assert (scores == score(result.model, VALIDATION)).all()


# --- the command line --------------------------------------------------------------------------

#: Runs the engine where nothing but torch, numpy and what torch asks for can be imported.
BARE = """
import importlib.metadata, re, sys
from importlib.machinery import PathFinder
ours = {"fathom", "torch", "numpy", "torchgen", "functorch"}
for requirement in importlib.metadata.requires("torch"):
    ours.add(re.match(r"[\\w.-]+", requirement)[0].replace("-", "_").lower())
ours |= {"mpmath", "markupsafe"}  # which those ask for
class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        top = name.partition(".")[0]
        known = top in ours or top in sys.stdlib_module_names or top[0] == "_"
        return PathFinder.find_spec(name, path, target) if known else None
sys.meta_path[sys.meta_path.index(PathFinder)] = Bare
editable = [f for f in sys.meta_path if "Editable" in getattr(f, "__name__", "")]
sys.meta_path[:] = [f for f in sys.meta_path if f not in editable]
from fathom import training
training.main()
"""


def written_job(folder: Path, **settings: Any) -> Path:
    """What the training pipeline leaves for the command line."""
    TRAIN.save(folder / "train")
    VALIDATION.save(folder / "validation")
    config = replace(CONFIG, epochs=2, **settings)
    job = {"task": "binary", "layout": asdict(LAYOUT), "training": config.as_dict()}
    (folder / "job.json").write_text(json.dumps(job))
    return folder


def on_a_bare_machine(*given: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BARE, *map(str, given)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_the_engine_needs_torch_and_numpy_alone(tmp_path):
    shown = on_a_bare_machine("--help")
    assert shown.returncode == 0, shown.stderr
    shown_on_one_line = " ".join(shown.stdout.split())
    command = "torchrun --nproc-per-node 2 -m fathom.training INPUT CHECKPOINTS"
    assert command in shown_on_one_line
    done = on_a_bare_machine(written_job(tmp_path / "input"), tmp_path / "checkpoints")
    assert done.returncode == 0, done.stderr
    assert "best epoch 2: validation loss 0." in done.stderr


def test_the_pipeline_goes_on_from_what_the_command_line_finished(tmp_path, monkeypatch, caplog):
    folder = written_job(tmp_path / "input")
    given = ["fathom.training", str(folder), str(tmp_path / "kept"), "--threads", "1"]
    monkeypatch.setattr(sys, "argv", given)
    training.main()
    caplog.clear()
    config = replace(CONFIG, epochs=2)
    with caplog.at_level(logging.INFO, logger="fathom.training"):
        taken_up = train(LAYOUT, TRAIN, VALIDATION, config, "binary", tmp_path / "kept")
    assert "going on from" in caplog.text
    assert "epoch 1/2" not in caplog.text
    assert len(taken_up.history) == 2
    anew = train(LAYOUT, TRAIN, VALIDATION, replace(config, threads=1), "binary")
    assert equal(taken_up.model, anew.model)


@pytest.mark.parametrize("content", ['{"task": "binary"}', "[]", "no JSON"])
def test_a_job_that_cannot_be_read_is_named_with_the_remedy(tmp_path, monkeypatch, content):
    (tmp_path / "job.json").write_text(content)
    monkeypatch.setattr(sys, "argv", ["fathom.training", str(tmp_path), str(tmp_path / "kept")])
    with pytest.raises(SystemExit, match=r"job\.json cannot be read .*; run kedro run --pipelines"):
        training.main()
    assert not (tmp_path / "kept").exists()


def test_losses_and_rates_are_reported_as_they_become_known():
    found: list[tuple[str, float, int]] = []
    config = replace(CONFIG, epochs=2)
    history = train(
        LAYOUT, TRAIN, VALIDATION, config, "binary", report=lambda *what: found.append(what)
    ).history
    steps = -(-len(TRAIN) // config.batch_size)
    for name in ("train_loss", "validation_loss"):
        values = [(value, step) for what, value, step in found if what == name]
        expected = [(getattr(e, name), e.epoch * steps) for e in history]
        assert values == expected
    assert {"examples_per_second"} <= {what for what, _, _ in found}
