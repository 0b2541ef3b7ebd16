"""The comparison: slices by hand, intervals, claims; what is kept; a log whose answer is known."""

from __future__ import annotations

import copy
import re
import shutil
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

import forks
from fathom.batch import Ragged
from fathom.comparison import (
    ComparisonConfig,
    ComparisonError,
    SlicesConfig,
    Splits,
    Trainings,
    Window,
    cut,
    definitions,
    page,
    text,
    train_all,
    weigh,
)
from fathom.comparison.claims import (
    CLAIMS,
    CONTRADICTED,
    MISSING,
    OPEN,
    SUPPORTED,
    Side,
    Step,
    equal_quality,
    equal_size,
    judge,
)
from fathom.comparison.evidence import Measured, difference
from fathom.comparison.slices import additive_rates, exceptional, needed
from fathom.config import TrainingConfig
from fathom.encoding import Encoder, cross_keys, fit_encoder, hash_value, hash_values
from fathom.evaluation import (
    EvaluationConfig,
    Interval,
    Predictions,
    Resampled,
    metrics,
    paired_interval,
)
from fathom.models import build
from fathom.spec import FeatureSpec

SPEC = FeatureSpec.model_validate(
    {
        "entities": {"user": "user_id", "item": "item_id", "request": "request_id"},
        "label": {"name": "bought", "values": [0, 1]},
        "columns": [
            {
                "name": "user_id",
                "kind": "categorical",
                "owner": "user",
                "embedding": 8,
                "wide": True,
            },
            {
                "name": "item_id",
                "kind": "categorical",
                "owner": "item",
                "embedding": 8,
                "wide": True,
            },
            {"name": "shelf", "kind": "categorical", "owner": "context", "embedding": 2},
        ],
        "crosses": [{"columns": ["item_id", "shelf"]}],
    }
)
BASE = TrainingConfig(
    hidden=(8,),
    batch_size=128,
    epochs=2,
    wide_l1=0.1,
    device="cpu",
    threads=1,
    checkpoint_seconds=0,
)


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# -- a generated log ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Log:
    """Frames of three splits, what is encoded of them, and which rows are planted exceptions."""

    frames: dict[str, dict[str, Any]]
    encoder: Encoder
    splits: Splits
    planted: np.ndarray

    def window(self, **settings: Any) -> Window:
        """The test rows, with the slices cut of them."""
        frame = self.frames["test"]
        masks, _ = cut(self.frames["train"], frame, self.encoder.spec, SlicesConfig())
        rows = Predictions(
            label=np.asarray(frame["bought"], float),
            probability=np.zeros(len(frame["bought"])),
            user=np.unique(frame["user_id"].astype(str), return_inverse=True)[1],
            request=np.unique(frame["request_id"].astype(str), return_inverse=True)[1],
        )
        config = EvaluationConfig(**{"resamples": 40, "min_slice_rows": 100} | settings)
        return Window(rows, masks, config)


def log_of(
    rows: dict[str, int],
    users: int,
    items: int,
    shelves: int,
    exceptions: float,
    spec: FeatureSpec = SPEC,
) -> Log:
    """A log with two kinds of structure.

    Smooth: users and items lie on a circle, and a user likes what is near. It takes no more than
    two numbers for each to know that, and it holds for pairs that were never seen. Exceptions: for
    some pairs of item and shelf, drawn at random, it is decided whatever the taste. Nothing but
    their conjunction tells which. Only every second pair of user and item is there to be trained
    on.
    """
    random = np.random.default_rng(11)
    at_user, at_item = (random.uniform(0, 2 * np.pi, n) for n in (users, items))
    decided = np.where(random.random((items, shelves)) < exceptions, 1, 0)
    decided *= random.choice([-1, 1], (items, shelves))
    offered = random.random((users, items)) < 0.5
    frames, planted = {}, np.zeros(0)
    for name, count in rows.items():
        drawn = 4 * count  # of which those are kept that may be
        user, item = random.integers(users, size=drawn), random.integers(items, size=drawn)
        kept = np.flatnonzero(offered[user, item] | (name != "train"))[:count]
        user, item, shelf = user[kept], item[kept], random.integers(shelves, size=count)
        taste = 3.0 * np.cos(at_user[user] - at_item[item])
        logit = np.where(decided[item, shelf] == 0, taste, 4.0 * decided[item, shelf])
        planted = decided[item, shelf] != 0
        frames[name] = {
            "user_id": _texts("u", user),
            "item_id": _texts("i", item),
            "request_id": _texts("r", np.arange(count) // 4),
            "shelf": _texts("s", shelf),
            "bought": (random.random(count) < 1 / (1 + np.exp(-logit))).astype(np.int64),
        }
    encoder = fit_encoder(frames["train"], spec)
    splits = Splits(*(encoder.encode(frames[name]) for name in ("train", "validation", "test")))
    return Log(frames, encoder, splits, planted)


def _texts(prefix: str, numbers: np.ndarray) -> np.ndarray:
    texts = np.empty(len(numbers), object)
    texts[:] = [f"{prefix}{number}" for number in numbers.tolist()]
    return texts


@cache
def small() -> Log:
    return log_of({"train": 2000, "validation": 600, "test": 1200}, 40, 30, 6, 0.1)


RATE = {"deep_learning_rate": {"low": 0.01, "high": 0.1, "log": True}}
WIDE_RATE = {"wide_learning_rate": {"low": 0.003, "high": 0.1, "log": True}}


def config_of(**settings: Any) -> ComparisonConfig:
    """Two models, two trials, two seeds."""
    models = {"wide": WIDE_RATE, "wide_deep": RATE}
    given = {"models": models, "trials": 2, "seeds": [0, 1], "resamples": 40}
    return ComparisonConfig.model_validate(given | settings)


def trained(folder: Path, base: TrainingConfig = BASE, **settings: Any) -> Trainings:
    return train_all(small().encoder, small().splits, base, config_of(**settings), folder)


def without_times(found: Trainings) -> dict[str, Any]:
    """What was trained, but for what differs between two machines."""
    plain = copy.deepcopy(found.plain())
    for model in plain["models"].values():
        model["trials"] = [{k: v for k, v in t.items() if k != "seconds"} for t in model["trials"]]
    for figures in plain["trainings"].values():
        del figures["seconds"], figures["scoring_us"]
    return plain


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the trainings of `compared` are kept."""
    return tmp_path_factory.mktemp("comparison")


@pytest.fixture(scope="module")
def compared(folder):
    """Two models, trained once for all tests that only look."""
    return trained(folder)


# -- slices ---------------------------------------------------------------------------------------


def frame(pairs: list[str], shelf: str = "", bought: str = "") -> dict[str, Any]:
    """Rows written as ``user item``."""
    split = [pair.split() for pair in pairs]
    return {
        "user_id": np.array([user for user, _ in split], object),
        "item_id": np.array([item for _, item in split], object),
        "shelf": np.array(list(shelf or "a" * len(pairs)), object),
        "bought": np.array([int(label) for label in bought or "0" * len(pairs)]),
    }


def test_pairs_users_and_items_are_seen_or_not_in_training():
    train = frame(["ann tea", "ann tea", "ann rye", "bob tea", "bob oat"])
    test = frame(["ann tea", "bob rye", "ann oat", "cat tea", "ann ham", "cat ham"])
    masks, counts = cut(train, test, SPEC, SlicesConfig())
    # Tea has 3 of 5 exposures, which is more than half: it is the head alone.
    assert {name: mask.astype(int).tolist() for name, mask in masks.items()} == {
        "seen pairs": [1, 0, 0, 0, 0, 0],
        "unseen pairs": [0, 1, 1, 1, 1, 1],
        "head items": [1, 0, 0, 1, 0, 0],
        "tail items": [0, 1, 1, 0, 0, 0],
        "new items": [0, 0, 0, 0, 1, 1],
        "new users": [0, 0, 0, 1, 0, 1],
        "exceptions": [0, 0, 0, 0, 0, 0],
    }
    assert counts == {"item_id_x_shelf": 0}
    assert list(masks) == list(definitions(SlicesConfig()))


@pytest.mark.parametrize(
    ("share", "head"), [(0.3, "a"), (0.4, "a"), (0.41, "ab"), (0.7, "ab"), (0.71, "abc")]
)
def test_the_head_is_the_fewest_items_with_the_share(share, head):
    train = frame([f"u {item}" for item in "aaaabbbccd"])  # 4, 3, 2 and 1 of 10
    test = frame([f"u {item}" for item in "abcd"])
    masks, _ = cut(train, test, SPEC, SlicesConfig(head_share=share))
    assert [item for item, is_head in zip("abcd", masks["head items"], strict=True) if is_head] == (
        list(head)
    )


def counted(cells: dict[str, tuple[int, int]], spec: FeatureSpec = SPEC) -> dict[str, Any]:
    """Training rows with ``item shelf`` → (positive, negative) rows."""
    rows = [(*cell.split(), 1) for cell, (yes, _) in cells.items() for _ in range(yes)]
    rows += [(*cell.split(), 0) for cell, (_, no) in cells.items() for _ in range(no)]
    items, shelves, labels = zip(*rows, strict=True)
    return {
        "user_id": np.array(["u"] * len(rows), object),
        "item_id": np.array(items, object),
        "shelf": np.array(shelves, object),
        "bought": np.array(labels),
    }


#: Tea sells well, ham does not; the end of the aisle helps. But ham at the end sells like nothing
#: else: item and shelf by themselves would let expect less.
AISLE = {
    "tea mid": (60, 40),
    "tea end": (70, 30),
    "rye mid": (50, 50),
    "rye end": (60, 40),
    "oat mid": (40, 60),
    "oat end": (50, 50),
    "ham mid": (20, 80),
    "ham end": (95, 5),
}
TESTED = frame(["u tea", "u ham", "u ham", "u new"]) | {
    "shelf": np.array(["mid", "end", "mid", "end"], object)
}


def test_an_exception_is_where_a_cross_contradicts_its_columns():
    config = SlicesConfig(exception_z=4.0, exception_odds=2.5)
    masks, counts = cut(counted(AISLE), TESTED, SPEC, config)
    # Ham in the middle is one as much: that ham sells at all is because of the end.
    assert masks["exceptions"].tolist() == [False, True, True, False]
    assert counts == {"item_id_x_shelf": 2}


@pytest.mark.parametrize(
    "bound", [{"exception_min_count": 101}, {"exception_z": 20.0}, {"exception_odds": 50.0}]
)
def test_each_of_the_three_bounds_takes_exceptions_away(bound):
    masks, _ = cut(counted(AISLE), TESTED, SPEC, SlicesConfig(**bound))
    assert not masks["exceptions"].any()


def test_a_value_that_is_no_conjunction_is_no_exception_however_odd_its_rate():
    cells = {"tea a": (90, 10), "tea b": (90, 10), "ham a": (10, 90), "ham b": (10, 90)}
    masks, counts = cut(counted(cells), TESTED, SPEC, SlicesConfig())
    assert counts == {"item_id_x_shelf": 0}
    assert not masks["exceptions"].any()


def test_expected_rates_are_additive_in_logits():
    # Logits of -1, 0 and 2 for one column and of 0 and 1.5 for the other, many rows of each.
    codes = [np.repeat([0, 1, 2], 2), np.tile([0, 1], 3)]
    logit = np.array([-1, 0, 2.0])[codes[0]] + np.array([0, 1.5])[codes[1]]
    rates, seen = 1 / (1 + np.exp(-logit)), np.full(6, 1e6)
    np.testing.assert_allclose(additive_rates(codes, seen, seen * rates), rates, atol=1e-3)


def test_of_xor_nothing_can_be_expected():
    codes = [np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])]
    seen = np.full(4, 100.0)
    expected = additive_rates(codes, seen, seen * [1, 0, 0, 1])
    np.testing.assert_allclose(expected, 0.5, atol=1e-6)


def test_labels_of_one_kind_are_expected_and_are_no_exceptions():
    for positive in (np.zeros(90, bool), np.ones(90, bool)):
        parts = [hash_values(_texts(p, np.arange(90) % n)) for p, n in (("a", 3), ("b", 2))]
        assert len(exceptional(parts, positive, SlicesConfig())) == 0


@given(seed=st.integers(0, 1000))
def test_noise_is_seldom_taken_for_an_exception(seed):
    random = np.random.default_rng(seed)
    a, b = random.integers(20, size=8000), random.integers(10, size=8000)
    logit = random.normal(0, 1, 20)[a] + random.normal(0, 1, 10)[b] - 1
    positive = random.random(8000) < 1 / (1 + np.exp(-logit))
    found = exceptional(
        [hash_values(_texts("a", a)), hash_values(_texts("b", b))], positive, SlicesConfig()
    )
    assert len(found) <= 4  # of 200 values: 3 standard errors, either side, is 1 in 370


def test_exceptions_of_a_history_are_its_values_with_the_item():
    # Who has just bought tea never buys tea again, though tea sells, and so does whatever follows.
    spec = FeatureSpec.model_validate(
        SPEC.model_dump(mode="json")
        | {
            "columns": [
                *SPEC.model_dump(mode="json")["columns"],
                {"name": "recent", "kind": "multi", "owner": "user"},
            ],
            "crosses": [{"columns": ["recent", "item_id"]}],
        }
    )
    random = np.random.default_rng(3)
    items = random.choice(["tea", "ham", "rye"], 3000)
    recent = [sorted(set(random.choice(["tea", "ham", "rye", "oat"], 2))) for _ in items]
    repeated = np.array([i == "tea" and "tea" in r for i, r in zip(items, recent, strict=True)])
    bought = random.random(3000) < np.where(repeated, 0.02, 0.6)
    train = frame([f"u {item}" for item in items]) | {
        "recent": Ragged.of(recent),
        "bought": bought.astype(int),
    }
    test = frame(["u tea", "u tea", "u ham", "u tea"]) | {
        "recent": Ragged.of([["oat", "tea"], ["oat"], ["tea"], []])
    }
    config = SlicesConfig(exception_odds=4.0)
    masks, counts = cut(train, test, spec, config)
    assert masks["exceptions"].tolist()[0] is True
    assert masks["exceptions"].tolist()[3] is False  # an empty history is no exception
    parts = [
        Ragged(hash_values(train["recent"].values), train["recent"].offsets),
        hash_values(train["item_id"]),
    ]
    found = exceptional(parts, bought, config)
    one = [
        Ragged(np.array([hash_value("tea")], np.uint64), np.array([0, 1])),
        hash_values(np.array(["tea"], object)),
    ]
    assert cross_keys(one).values[0] in found
    assert counts == {"recent_x_item_id": len(found)}
    assert needed(spec) == ["user_id", "item_id", "bought", "recent"]


def test_a_regression_has_no_exceptions():
    raw = SPEC.model_dump(mode="json")
    spec = FeatureSpec.model_validate(
        raw | {"task": "regression", "label": {"name": "bought", "values": None}}
    )
    masks, counts = cut(counted(AISLE), TESTED, spec, SlicesConfig())
    assert not masks["exceptions"].any()
    assert counts == {}


# -- evidence -------------------------------------------------------------------------------------


def predictions(seed: int, noise: float = 1.0) -> Predictions:
    random = np.random.default_rng(5)
    logit = random.normal(0, 1, 400)
    label = (random.random(400) < 1 / (1 + np.exp(-logit))).astype(float)
    shifted = logit + noise * np.random.default_rng(seed).normal(0, 1, 400)
    user, request = np.arange(400) % 25, np.arange(400) // 8
    return Predictions(label, 1 / (1 + np.exp(-shifted)), user, request)


RESAMPLING = EvaluationConfig(resamples=200, min_slice_rows=100)
ROWS = predictions(0)
HALF = Window(ROWS, {"half": np.arange(400) < 200, "few": np.arange(400) < 50}, RESAMPLING)


def test_with_one_seed_the_interval_is_the_paired_one():
    one, other = predictions(1), predictions(2, noise=2.0)
    measured = [HALF.measure([side.probability]) for side in (one, other)]
    for metric in ("logloss", "auc"):
        found = difference(*measured, None, metric, RESAMPLING)
        assert found == paired_interval(other, one, RESAMPLING)[metric]
        half = difference(*measured, "half", metric, RESAMPLING)
        mask = HALF.masks["half"]
        assert half == paired_interval(other.where(mask), one.where(mask), RESAMPLING)[metric]


def test_small_slices_are_left_out_with_their_rows():
    measured = HALF.measure([ROWS.probability])
    assert set(measured.parts) == {None, "half"}
    assert difference(measured, measured, "few", "logloss", RESAMPLING) is None


def test_the_difference_is_that_of_the_means_over_seeds():
    scores = [predictions(seed).probability for seed in (1, 2, 3)]
    other = predictions(4, noise=2.0).probability
    losses = [metrics(replace(ROWS, probability=s))["logloss"] for s in (*scores, other)]
    found = difference(HALF.measure(scores), HALF.measure([other]), None, "logloss", RESAMPLING)
    assert found.difference == pytest.approx(np.mean(losses[:3]) - losses[3])
    assert found.lo < found.difference < found.hi


def _sides(draws: int, seeds: list[float]) -> Measured:
    """A model whose loss with each seed is the same for whatever users."""
    parts = [
        Resampled(["logloss"], np.array([loss]), np.full((draws, 1), loss), 10) for loss in seeds
    ]
    return Measured({None: parts})


def test_intervals_hold_the_chance_of_the_seeds_as_wide_as_it_is():
    seeds = [0.1, 0.2, 0.6]
    draws = _sides(20_000, seeds).draws(None, "logloss", np.random.default_rng(0))
    # The standard error of a mean of three, from their sample standard deviation.
    assert draws.std() == pytest.approx(np.std(seeds, ddof=1) / np.sqrt(3), rel=0.02)
    assert draws.mean() == pytest.approx(0.3, abs=0.005)
    alone = _sides(10, [0.1]).draws(None, "logloss", np.random.default_rng(0))
    assert alone.tolist() == pytest.approx([0.1] * 10)


def test_seeds_that_differ_make_the_interval_wide_and_those_that_agree_do_not():
    config = EvaluationConfig(resamples=500)
    other = _sides(500, [0.5])
    wide = difference(_sides(500, [0.3, 0.4, 0.5]), other, None, "logloss", config)
    narrow = difference(_sides(500, [0.4, 0.4, 0.4]), other, None, "logloss", config)
    assert (narrow.lo, narrow.hi) == pytest.approx((-0.1, -0.1))
    assert wide.lo < -0.15 < wide.difference < -0.05 < wide.hi
    assert wide.difference == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("lo", "hi", "verdict"),
    [(-0.2, -0.1, SUPPORTED), (-0.1, 0.1, OPEN), (-0.1, 0.0, OPEN), (0.1, 0.2, CONTRADICTED)],
)
def test_an_interval_decides_a_claim_unless_it_includes_0(lo, hi, verdict):
    assert judge(Interval((lo + hi) / 2, lo, hi)) == verdict


def side(model: str, width: int, validation: float) -> Side:
    """Of a model whose layers have as many weights as they are wide; an ensemble's, four more."""
    layers = width + 4 * (model == "ensemble")
    return Side(model, [width], 1000 + layers, layers, 900, validation, 0.3, 0.01)


def step(width: int, joint: float, apart: float, lo: float = 0.0, hi: float = 0.0) -> Step:
    interval = Interval((lo + hi) / 2, lo, hi)
    return Step(side("wide_deep", width, joint), side("ensemble", width, apart), interval)


def test_size_is_equal_where_the_ensemble_is_best():
    steps = [step(8, 0.1, 0.40, -0.3, -0.2), step(16, 0.5, 0.38, 0.01, 0.02)]
    verdict = equal_size(steps, "logloss")
    assert verdict.verdict == CONTRADICTED
    assert "layers [16]" in verdict.evidence
    assert "+0.01500 [+0.01000, +0.02000]" in verdict.evidence


@pytest.mark.parametrize(
    ("joint", "interval", "verdict", "words"),
    [
        # The ensemble is best with 32 and a loss of 0.30.
        ([0.30, 0.29, 0.28], (-0.1, 0.1), SUPPORTED, "layers [8]: 97.3% of the parameters, 22.2%"),
        ([0.31, 0.29, 0.28], (-0.1, 0.1), SUPPORTED, "layers [16]: 98.1% of the parameters, 44.4%"),
        ([0.31, 0.31, 0.28], (-0.1, 0.1), OPEN, "layers [32]: 99.6% of the parameters, 88.9%"),
        ([0.31, 0.29, 0.28], (0.1, 0.2), CONTRADICTED, "minus the ensemble's is +0.15"),
        ([0.33, 0.32, 0.31], (-0.1, 0.1), OPEN, "no wide_deep of the ladder is as good there"),
        ([0.33, 0.32, 0.31], (0.1, 0.2), CONTRADICTED, "the best has layers [32] and 0.31"),
    ],
)
def test_quality_is_equal_where_validation_is_no_worse(joint, interval, verdict, words):
    steps = [
        step(width, loss, apart)
        for width, loss, apart in zip((8, 16, 32), joint, (0.4, 0.35, 0.3), strict=True)
    ]
    found = equal_quality(
        steps, "logloss", lambda *_: Interval(sum(interval) / 2, interval[0], interval[1])
    )
    assert found.verdict == verdict
    assert words in found.evidence


def test_a_larger_joint_model_contradicts_the_claim():
    steps = [step(8, 0.4, 0.3), step(16, 0.2, 0.5)]
    assert equal_quality(steps, "logloss", lambda *_: None).verdict == CONTRADICTED


# -- trainings ------------------------------------------------------------------------------------


def test_every_model_has_its_trials_and_a_training_for_each_seed(compared):
    assert list(compared.models) == ["wide", "wide_deep"]
    for name, model in compared.models.items():
        assert model["error"] is None
        assert [trial["number"] for trial in model["trials"]] == [0, 1]
        done = [compared.figures[key] for key in model["trainings"]]
        assert [figures["seed"] for figures in done] == [0, 1]
        for key, figures in zip(model["trainings"], done, strict=True):
            assert figures["model"] == name
            assert figures["settings"] | model["settings"] == figures["settings"]
            assert compared.scores[key].shape == (1200,)
            assert figures["seconds"] > 0
            assert figures["scoring_us"] > 0
        # The best trial was a training with the base's seed, which is the first one's.
        losses = [trial["validation_loss"] for trial in model["trials"]]
        assert done[0]["validation_loss"] == min(losses)
        assert done[1]["validation_loss"] != min(losses)
    assert set(compared.scores) == set(compared.figures)


def test_sizes_are_those_of_the_model_and_of_its_file(compared):
    key = compared.models["wide_deep"]["trainings"][0]
    figures = compared.figures[key]
    model = build(small().encoder.layout, TrainingConfig(**figures["settings"]))
    count = sum(weight.numel() for weight in model.parameters())
    assert figures["parameters"] == count
    # The layers: 8 + 8 + 2 embedding columns to 8 units, their biases, 8 to the logit; the bias.
    assert figures["layer_parameters"] == 18 * 8 + 8 + 8 + 1
    assert figures["layer_parameters"] < figures["nonzero"] < count
    assert figures["bytes"] > 4 * figures["nonzero"]


def test_a_second_run_trains_nothing_anew(compared, folder, caplog):
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("figures.json")}
    with caplog.at_level("INFO"):
        second = trained(folder)
    assert "epoch" not in caplog.text
    assert "8 of 8 trainings, about 0 min left" in caplog.text
    assert second.plain() == compared.plain()
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("figures.json")} == stamps
    for key, scores in second.scores.items():
        np.testing.assert_array_equal(scores, compared.scores[key])


def test_one_more_seed_is_one_more_training_of_each_model(compared, folder, tmp_path, caplog):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with caplog.at_level("INFO"):
        found = trained(tmp_path, seeds=[0, 1, 2])
    assert len(found.figures) == 6
    assert set(compared.figures) < set(found.figures)
    assert re.findall(r"training with seed \d", caplog.text) == ["training with seed 2"] * 2


def test_other_data_are_another_comparison(tmp_path, compared):
    label = small().splits.test.label.copy()
    label[0] = 1 - label[0]
    splits = replace(small().splits, test=replace(small().splits.test, label=label))
    found = train_all(small().encoder, splits, BASE, config_of(trials=1), tmp_path)
    assert not set(found.figures) & set(compared.figures)


def test_epochs_bound_every_training(tmp_path):
    found = trained(tmp_path, epochs=1, trials=1)
    assert {figures["settings"]["epochs"] for figures in found.figures.values()} == {1}
    assert {figures["best_epoch"] for figures in found.figures.values()} == {1}


SCRIPT = """
import logging, sys
from pathlib import Path
import test_comparison
logging.basicConfig(level=logging.INFO)
test_comparison.trained(Path(sys.argv[1]))
"""


def _kill_after(line: str, folder: Path) -> None:
    here = Path(__file__).parent
    forks.kill_after(line, "-c", SCRIPT, str(folder), folder=here, seconds=0.05)


@pytest.mark.slow
def test_a_comparison_that_is_killed_goes_on_where_it_was(tmp_path, compared, caplog):
    for line in ("trial 1 of 2", "wide: training with seed 1"):
        _kill_after(line, tmp_path)
    left = {path.parent.name for path in tmp_path.rglob("figures.json")}
    assert {name.rsplit("-", 1)[0] for name in left} >= {"wide-0"}
    with caplog.at_level("INFO"):
        resumed = trained(tmp_path)
    assert "wide: training with seed 0" not in caplog.text
    assert caplog.text.count("going on after 2 of 2 trials") == 1
    assert without_times(resumed) == without_times(compared)
    for key, scores in resumed.scores.items():
        np.testing.assert_array_equal(scores, compared.scores[key])


def test_a_model_that_this_spec_cannot_have_is_recorded_and_the_others_are_compared(tmp_path):
    # There is no history, which din attends to; and a rate that makes one explode.
    models = {
        "din": RATE,
        "deep": {"deep_learning_rate": {"choices": [1e30, 1e31]}},
        "wide_deep": RATE,
    }
    found = trained(tmp_path, models=models, trials=1)
    assert "needs a history" in found.models["din"]["error"]
    assert re.search("explodes|is not finite", found.models["deep"]["error"])
    assert [f["model"] for f in found.figures.values()] == ["wide_deep", "wide_deep"]

    figures = weigh(found, {}, small().window(), "wide_deep")
    assert figures["models"]["din"]["mean"] is None
    verdicts = {(c["source"], c["verdict"]) for c in figures["claims"]}
    assert ("Zhou et al. 2018 (DIN)", MISSING) in verdicts
    for shown in (text(stood(figures)), page(stood(figures))):
        assert "din could not be trained: all 1 trials failed" in shown


def test_what_cannot_be_compared_is_refused(tmp_path):
    with pytest.raises(ComparisonError, match=r"has wider; there are wide, deep, .*or set it to"):
        trained(tmp_path, models={"wider": RATE, "wide_deep": RATE})
    with pytest.raises(ComparisonError, match=r"no model could be trained: .*needs a history"):
        trained(tmp_path, models={"din": RATE}, reference="din")


@pytest.mark.slow
def test_the_ladder_trains_both_sides_at_each_width_and_shares_what_is_there(tmp_path):
    models = {"wide": WIDE_RATE, "wide_deep": RATE, "ensemble": RATE}
    found = trained(tmp_path, models=models, trials=1, ladder=[[4], [8]], epochs=1)
    assert [step["hidden"] for step in found.ladder] == [[4], [8]]
    # The second width is that of the base.
    for name in ("wide_deep", "ensemble"):
        assert found.ladder[1][name] == found.models[name]["trainings"]
    assert len(found.figures) == 2 * (3 + 2)

    figures = weigh(found, {}, small().window(), "wide_deep")
    sizes = [step["joint"]["layer_parameters"] for step in figures["ladder"]]
    assert sizes == [18 * 4 + 4 + 4 + 1, 18 * 8 + 8 + 8 + 1]
    for step in figures["ladder"]:
        assert step["apart"]["parameters"] == step["joint"]["parameters"] + 4
    said = [claim["claim"] for claim in figures["claims"]]
    assert said[2].startswith("At equal size")
    assert said[3].startswith("At equal quality")
    assert "by size" in text(stood(figures))


# -- configuration --------------------------------------------------------------------------------


def test_all_faults_of_a_configuration_are_named_together():
    with pytest.raises(ValidationError) as caught:
        ComparisonConfig.model_validate(
            {
                "models": {
                    "wide": {"seed": {"low": 0, "high": 9, "step": 1}},
                    "deep": {"dropout": {"low": 0.0, "high": 1.0}, "widht": {"choices": [1, 2]}},
                    "dcn": {},
                },
            }
        )
    for fault in (
        "wide: Value error, seed cannot be tuned",
        "training.dropout is 1.0; it must be in [0, 1)",
        "widht is no setting of training",
        "dcn: Dictionary should have at least 1 item",
    ):
        assert fault in str(caught.value), fault


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"reference": "deep"}, "reference is 'deep'; it must be one of models: wide, wide_deep"),
        ({"seeds": [0, 0]}, "seeds are [0, 0]; they must differ"),
        ({"seeds": [0, -1]}, "seeds are [0, -1]; they must differ and be 0 or more"),
        ({"seeds": [0]}, "at least 2 items"),
        ({"ladder": [[8, 0]]}, "ladder is [[8, 0]]; it must be lists of layer widths"),
        ({"slices": {"head_share": 1.0}}, "less than 1"),
        ({"resampled": 10}, "Extra inputs"),
        ({"models": {"wide": None}}, "models"),
        ({"models": [1]}, "models"),
    ],
)
def test_a_setting_out_of_bounds_is_refused(settings, fault):
    with pytest.raises(ValidationError) as caught:
        config_of(**settings)
    assert fault in str(caught.value)


def test_null_takes_a_model_out():
    models = {"wide": None, "wide_deep": RATE}
    config = config_of(models=models)
    assert list(config.models) == ["wide_deep"]
    assert ComparisonConfig.model_validate(config.model_dump()) == config


# -- the report -----------------------------------------------------------------------------------


def stood(figures: dict[str, Any]) -> dict[str, Any]:
    """With what the pipeline adds of where figures come from."""
    figures["slices"] |= {
        "definitions": definitions(SlicesConfig()),
        "exceptions": {"item_id_x_shelf": 12},
    }
    return figures | {
        "provenance": {
            "seeds": [0, 1],
            "trials": 2,
            "epochs": 2,
            "rows": {"training": 2000, "validation": 600, "test": 1200},
            "users": 40,
            "resamples": 40,
            "confidence": 0.95,
            "data_hash": "d" * 64,
            "spec_hash": "e" * 64,
            "code_version": "9.9",
            "hardware": "an abacus",
            "seconds": 120.0,
        }
    }


@pytest.fixture(scope="module")
def figures(compared):
    window = small().window()
    baselines = {
        "constant": np.full(1200, window.rows.label.mean()),
        "gradient_boosting": np.clip(window.rows.label, 0.4, 0.6),
    }
    return stood(weigh(compared, baselines, window, "wide_deep"))


def test_figures_are_means_and_spreads_of_metrics_over_seeds(figures, compared):
    rows = small().window().rows
    keys = compared.models["wide"]["trainings"]
    losses = [metrics(replace(rows, probability=compared.scores[k]))["logloss"] for k in keys]
    wide = figures["models"]["wide"]
    assert wide["mean"]["logloss"] == pytest.approx(np.mean(losses))
    assert wide["spread"]["logloss"] == pytest.approx(np.std(losses, ddof=1))
    assert wide["against"]["logloss"]["difference"] == pytest.approx(
        wide["mean"]["logloss"] - figures["models"]["wide_deep"]["mean"]["logloss"]
    )
    assert figures["models"]["wide_deep"]["against"] is None
    assert figures["baselines"]["constant"]["mean"]["auc"] == 0.5
    assert figures["baselines"]["constant"]["spread"]["auc"] is None
    assert figures["slices"]["left_out"].keys() <= {"new users", "new items", "exceptions"}
    for part in ("seen pairs", "unseen pairs"):
        mask = small().window().masks[part]
        losses = [
            metrics(replace(rows, probability=compared.scores[k]).where(mask))["logloss"]
            for k in keys
        ]
        assert wide["slices"][part]["mean"]["logloss"] == pytest.approx(np.mean(losses))


def test_every_claim_has_a_verdict_and_what_it_rests_on(figures):
    claims = figures["claims"]
    assert len(claims) == len(CLAIMS) + 1  # and the best against gradient boosting
    assert {claim["verdict"] for claim in claims} <= {SUPPORTED, CONTRADICTED, OPEN, MISSING}
    by_text = {claim["claim"]: claim for claim in claims}
    missing = by_text["Attention over the history is ahead of its fixed pool."]
    assert (missing["verdict"], missing["evidence"]) == (
        MISSING,
        "din: was not compared; deep: was not compared",
    )
    # Boosting was given the labels.
    last = claims[-1]
    assert last["verdict"] == CONTRADICTED
    assert last["evidence"].startswith("logloss of wide")


def test_the_page_asks_nothing_of_a_network_and_says_what_it_stands_on(figures):
    shown = page(figures)
    assert shown.startswith("<!doctype html>")
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)\s*=", shown)
    assert shown.count("plotly.js v") == 1  # inline, and once
    assert shown.count("data dddddddddddd, spec eeeeeeeeeeee, Fathom 9.9; an abacus") == 5
    for definition in definitions(SlicesConfig()).values():
        assert definition.replace("'", "&#x27;") in shown


def test_markdown_has_the_same_figures_in_tables(figures):
    shown = text(figures)
    wide = figures["models"]["wide"]
    assert f"{wide['mean']['auc']:.5f} ± {wide['spread']['auc']:.5f}" in shown
    tables = [line for line in shown.splitlines() if line.startswith("|")]
    for row, rule in pairwise(tables):
        if set(rule) <= set("|-"):
            assert row.count("|") == rule.count("|")
    ranks = [shown.index(f"\n| {name} |") for name in ("gradient_boosting", "wide", "constant")]
    assert ranks == sorted(ranks)
    assert "| reference |" in shown
    assert "| behind |" in shown
    assert "| ahead |" in shown
    assert "Left out, for too few rows to tell: new items (0 rows), new users (0 rows)" in shown


def test_names_are_escaped(figures):
    odd = figures | {"baselines": {"<b>|": figures["baselines"]["constant"]}}
    assert "<b>|" not in page(odd).split("<h2>All models", 1)[1].split("plotly.js v")[0]
    assert "| <b>\\| |" in text(odd)


def test_every_slice_is_defined_in_the_documentation(root):
    told = (root / "docs/how-to/compare-models.md").read_text()
    for name in definitions(SlicesConfig()):
        assert f"| {name} |" in told, name


# -- a log whose answer is known ------------------------------------------------------------------


@pytest.mark.slow
def test_crosses_know_exceptions_embeddings_carry_over_and_both_together_do_both(tmp_path):
    raw = SPEC.model_dump(mode="json")
    crosses = [{"columns": ["item_id", "shelf"]}, {"columns": ["user_id", "item_id"]}]
    spec = FeatureSpec.model_validate(raw | {"crosses": crosses})
    rows = {"train": 16_000, "validation": 4000, "test": 12_000}
    log = log_of(rows, users=120, items=60, shelves=10, exceptions=0.1, spec=spec)
    base = replace(
        BASE,
        hidden=(16,),
        batch_size=256,
        epochs=6,
        wide_learning_rate=0.5,
        embedding_learning_rate=0.05,
        deep_learning_rate=0.05,
    )
    penalty = {"wide_l1": {"low": 0.0, "high": 1.0}}
    config = config_of(models={"wide": penalty, "deep": RATE, "wide_deep": RATE}, trials=1)
    found = train_all(log.encoder, log.splits, base, config, tmp_path)
    window = log.window(resamples=100)

    # The slice is what was planted: nearly all of it, and little else.
    exceptions = window.masks["exceptions"]
    assert (exceptions & log.planted).sum() > 0.85 * log.planted.sum()
    assert (exceptions & log.planted).sum() > 0.95 * exceptions.sum()

    figures = weigh(found, {}, window, "wide_deep")

    def loss(model: str, part: str | None = None) -> float:
        side = figures["models"][model]
        return (side["slices"][part] if part else side)["mean"]["logloss"]

    # Four logits either way cost 0.09 to those who know; who does not know is at a coin's 0.69.
    assert loss("wide", "exceptions") < 0.2 < 0.6 < loss("deep", "exceptions")
    assert loss("wide_deep", "exceptions") < 0.2
    # On pairs never seen, user and item by themselves say little of a taste.
    assert loss("deep", "unseen pairs") < 0.6 < 0.64 < loss("wide", "unseen pairs")
    assert loss("wide_deep", "unseen pairs") < loss("deep", "unseen pairs")
    # Of pairs that were seen, wide has memorised some; together they know most.
    assert loss("wide", "seen pairs") < loss("wide", "unseen pairs") - 0.1
    assert loss("wide_deep") < min(loss("wide"), loss("deep")) - 0.05
    verdicts = {claim["claim"]: claim["verdict"] for claim in figures["claims"]}
    assert {verdicts[claim.text] for claim in CLAIMS[:4]} == {SUPPORTED}
