"""Crosses that are chosen: planted ones are found, noise is not, and the figures are honest."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import math
import sys
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import forks
from fathom.batch import Ragged
from fathom.config import TrainingConfig
from fathom.cross_search import (
    CrossSearchConfig,
    CrossSearchError,
    CrossSearchResult,
    ForwardSelection,
    Split,
    candidates,
    columns_read,
    interval,
    search,
)
from fathom.encoding import CrossVocabulary, evaluate_cross, fit_encoder
from fathom.evaluation import EvaluationConfig, Predictions, paired_interval
from fathom.residuals import Rows
from fathom.spec import Cross, FeatureSpec

ROOT = Path(__file__).parents[1]
EVALUATION = EvaluationConfig(resamples=100)


def _load(path: Path) -> ModuleType:
    """A script as a module of a name of its own."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


benchmark = _load(ROOT / "benchmarks" / "cross_search.py")
TRAINING = dataclasses.replace(benchmark.TRAINING, device="cpu", threads=1)


@pytest.fixture(autouse=True, scope="module")
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def searched(
    log: Any, training: TrainingConfig = TRAINING, spec: FeatureSpec | None = None, **settings: Any
) -> CrossSearchResult:
    encoder = fit_encoder(log.training, spec or benchmark.SPEC)
    splits = [Split(frame, encoder.encode(frame)) for frame in (log.training, log.validation)]
    config = CrossSearchConfig(**{"max_crosses": 20, **settings})
    return search(encoder, *splits, training, config, EVALUATION)


def named(result: CrossSearchResult) -> set[frozenset[str]]:
    return {frozenset(cross.columns) for cross in result.chosen}


@pytest.fixture(scope="module")
def log():
    return benchmark.planted_log(30_000, seed=0)


@pytest.fixture(scope="module")
def found(log):
    return searched(log)


# --- what is found -----------------------------------------------------------------------------


def test_planted_crosses_are_found_and_nothing_else(found, log):
    planted = {frozenset(pair) for pair in log.planted}
    assert len(found.candidates) > 100
    assert named(found) - planted == set()
    assert len(named(found)) >= 5


def test_without_planted_crosses_none_is_chosen():
    result = searched(benchmark.planted_log(20_000, seed=1, planted=()))
    assert result.chosen == ()
    assert result.stopped == "no other candidate is sure to gain"
    assert result.total == {"lift": 0.0, "lo": 0.0, "hi": 0.0}


def test_a_regression_is_searched_alike():
    raw = benchmark.SPEC.model_dump(mode="json")
    raw |= {"task": "regression", "label": {"name": "clicked", "values": None}}
    spec = FeatureSpec.model_validate(raw)
    log = benchmark.planted_log(10_000, seed=2, planted=[("club", "genre")])
    result = searched(log, dataclasses.replace(TRAINING, epochs=1), spec)
    assert named(result) == {frozenset(("club", "genre"))}
    assert result.losses["crosses"] < result.losses["columns"] < 0.25  # a squared error


# --- by hand -----------------------------------------------------------------------------------


def xor(rows: int, noise: int = 0) -> Rows:
    """Nine of ten rows where a = b are positive, one of ten elsewhere; users of four rows each."""
    cells = np.arange(rows) % 4
    tenth = (np.arange(rows) // 4) % 10
    a, b = cells // 2, cells % 2
    label = np.where(a == b, tenth > 0, tenth == 0)
    return Rows(
        codes={"a": a, "b": b, "c": (np.arange(rows) // 40 + noise) % 2},
        label=label.astype(np.float64),
        weight=np.ones(rows),
        user=np.arange(rows) // 4,
        logit=np.zeros(rows),
    )


def selection(**settings: Any) -> CrossSearchResult:
    pairs = [("a", "c"), ("a", "b"), ("b", "c")]
    parts = [xor(400), xor(400, 1), xor(400, 1)]
    config = CrossSearchConfig(**settings)
    sizes = {"a": 2, "b": 2, "c": 2}
    return ForwardSelection(parts, sizes, pairs, config, EVALUATION, "binary").run()


def test_the_lift_of_xor_is_what_it_is_on_paper():
    """Without the cross the loss is that of a coin, with it the entropy of nine in ten."""
    result = selection(l1=0.0, l2=0.0)
    (chosen,) = result.chosen
    entropy = -0.9 * math.log(0.9) - 0.1 * math.log(0.1)
    assert chosen.columns == ("a", "b")
    assert chosen.lift == pytest.approx(math.log(2) - entropy, abs=1e-6)
    assert chosen.selection_lift == pytest.approx(chosen.lift)
    assert chosen.lo < chosen.lift < chosen.hi
    assert chosen.rows == 4 + 2  # two are reserved
    assert result.losses == pytest.approx(
        {"deep": math.log(2), "columns": math.log(2), "crosses": entropy}, abs=1e-6
    )
    assert result.total["lift"] == pytest.approx(chosen.lift)
    # Three candidates at 5 % together: each has 1.67 %, which is 2.128 standard errors.
    assert result.deviations == pytest.approx(2.128, abs=1e-3)
    best = result.candidates[0]
    assert best.bound == pytest.approx(best.lift - result.deviations * best.standard_error)


def test_what_single_columns_tell_is_no_crosss_lift():
    rows = [xor(400) for _ in range(3)]
    for part in rows:
        tenth = (np.arange(400) // 4) % 10
        part.label = np.where(part.codes["a"] == 1, tenth > 0, tenth == 0).astype(np.float64)
    config = CrossSearchConfig()
    result = ForwardSelection(
        rows, {"a": 2, "b": 2}, [("a", "b")], config, EVALUATION, "binary"
    ).run()
    assert result.losses["columns"] < result.losses["deep"] - 0.2
    assert result.columns == {"a": pytest.approx(result.losses["deep"] - result.losses["columns"])}
    assert result.chosen == ()


def test_the_interval_is_that_of_two_models_compared():
    random = np.random.default_rng(0)
    label = (random.random(300) < 0.4).astype(np.float64)
    user = random.integers(20, size=300)
    logits = [random.normal(0, 1, 300) for _ in range(2)]
    weight = random.uniform(1, 3, 300)
    rows = Rows({}, label, weight, np.unique(user, return_inverse=True)[1], logits[0])
    before, after = (np.logaddexp(0, f) - label * f for f in logits)
    old, new = (
        Predictions(label, 1 / (1 + np.exp(-f)), user, np.arange(300), weight) for f in logits
    )
    theirs = paired_interval(old, new, EVALUATION)["logloss"]
    assert theirs is not None
    assert interval(before - after, rows, EVALUATION) == pytest.approx(
        {"lift": -theirs.difference, "lo": -theirs.hi, "hi": -theirs.lo}, abs=1e-6
    )


# --- honesty -----------------------------------------------------------------------------------


def test_gains_add_up_to_the_total_on_the_half_that_did_not_choose(found):
    assert sum(cross.lift for cross in found.chosen) == pytest.approx(found.total["lift"])
    losses = found.losses
    assert losses["columns"] - losses["crosses"] == pytest.approx(found.total["lift"])
    assert found.total["lo"] > 0
    for cross in found.chosen:
        assert cross.lo <= cross.lift <= cross.hi


def test_the_halves_share_no_user_and_make_up_the_window(found, log):
    sizes = found.sizes
    assert sizes["training_rows"] == 30_000
    assert sizes["selecting_rows"] + sizes["reporting_rows"] == len(log.validation["clicked"])
    users = len(set(log.validation["user_id"].tolist()))
    assert sizes["selecting_users"] + sizes["reporting_users"] == users
    assert 0.3 < sizes["selecting_users"] / users < 0.7


def test_the_same_search_finds_the_same():
    log = benchmark.planted_log(6_000, seed=5, planted=[("club", "genre")])
    first, again = (searched(log, max_candidates=20) for _ in range(2))
    assert first == again


def test_rows_are_scored_by_models_that_have_not_seen_them():
    """A model that knows each user has taken in part of what a cross with the user would tell."""
    log = benchmark.planted_log(30_000, seed=1, planted=[("user_id", "device")])
    lifts = {}
    for folds in (1, 2):
        result = searched(log, folds=folds, max_candidates=20)
        assert named(result) == {frozenset(("user_id", "device"))}
        lifts[folds] = result.total["lift"]
    assert lifts[2] > 1.05 * lifts[1]


def test_weights_count_where_training_counts_them():
    log = benchmark.planted_log(4_000, seed=6)
    thinned = [
        part | {"inclusion_probability": np.where(part["clicked"] == 1, 1.0, 0.1)}
        for part in (log.training, log.validation)
    ]
    log = dataclasses.replace(log, training=thinned[0], validation=thinned[1])
    losses = [
        searched(log, dataclasses.replace(TRAINING, use_weights=use), max_candidates=1).losses
        for use in (False, True)
    ]
    assert losses[0]["deep"] > 0.5
    assert losses[1]["deep"] < 0.35  # one positive counts against ten negatives


def test_there_is_no_way_in_for_the_test_window():
    parameters = inspect.signature(search).parameters.values()
    assert [p.name for p in parameters if p.annotation == "Split"] == ["training", "validation"]


def test_the_rows_of_the_wide_part_are_those_that_the_encoder_makes(found, log):
    for chosen in found.chosen:
        cross = Cross(columns=chosen.columns, min_count=chosen.min_count)
        keys = evaluate_cross(cross, benchmark.SPEC, log.training)
        assert CrossVocabulary.fit(keys, cross).rows == chosen.rows


# --- candidates --------------------------------------------------------------------------------

SMALL = {
    "entities": {"user": "u", "item": "i", "request": "r"},
    "label": {"name": "y", "values": [0, 1]},
    "columns": [
        {"name": "u", "kind": "categorical", "owner": "user"},
        {"name": "r", "kind": "categorical", "owner": "context"},
        {"name": "i", "kind": "categorical", "owner": "item"},
        {"name": "kind", "kind": "categorical", "owner": "item"},
        {"name": "tags", "kind": "multi", "owner": "item"},
        {"name": "recent", "kind": "multi", "owner": "user"},
        {"name": "price", "kind": "numeric", "owner": "item", "buckets": [1.0]},
        {"name": "hour", "kind": "numeric", "owner": "context"},
    ],
    "crosses": [{"columns": ["kind", "u"]}],
}
SPEC = FeatureSpec.model_validate(SMALL)


def test_candidates_are_pairs_of_columns_and_lists_with_the_other_side():
    found = candidates(SPEC, "declared")
    assert found == [
        ("u", "i"),
        ("kind", "u"),  # as the spec's own cross has it
        ("u", "price"),
        ("tags", "u"),
        ("recent", "i"),
        ("recent", "kind"),
        ("recent", "price"),
        ("i", "kind"),  # of one owner
        ("i", "price"),
        ("kind", "price"),
    ]
    assert {name for pair in candidates(SPEC, "none") for name in pair}.isdisjoint(
        {"price", "hour"}
    )
    assert {("u", "hour"), ("tags", "hour")} < set(candidates(SPEC, "all"))
    assert columns_read(SPEC, "declared") == ["u", "r", "i", "kind", "price", "tags", "recent"]


# --- budgets -----------------------------------------------------------------------------------


def two_crosses(rows: int, seed: int) -> Rows:
    """Each of the pairs (a, b) and (c, d) moves the logit where its values are equal."""
    random = np.random.default_rng(seed)
    codes = {name: random.integers(2, size=rows) for name in "abcd"}
    logit = 2.0 * (codes["a"] == codes["b"]) + 1.0 * (codes["c"] == codes["d"]) - 1.5
    label = (random.random(rows) < 1 / (1 + np.exp(-logit))).astype(np.float64)
    return Rows(dict(codes), label, np.ones(rows), np.arange(rows) // 4, np.zeros(rows))


def budgeted(**settings: Any) -> CrossSearchResult:
    pairs = list(combinations("abcd", 2))
    parts = [two_crosses(4000, seed) for seed in range(3)]
    config = CrossSearchConfig(**settings)
    sizes = dict.fromkeys("abcd", 2)
    return ForwardSelection(parts, sizes, pairs, config, EVALUATION, "binary").run()


def test_a_search_goes_on_until_no_cross_is_sure_to_gain():
    result = budgeted()
    assert [cross.columns for cross in result.chosen] == [("a", "b"), ("c", "d")]
    assert result.stopped == "no other candidate is sure to gain"
    assert len(result.candidates) == 6
    assert result.left_out == ()


def test_a_search_stops_at_its_budgets():
    few = budgeted(max_crosses=1)
    assert [cross.columns for cross in few.chosen] == [("a", "b")]
    assert few.stopped == "max_crosses, 1, was reached"

    small = budgeted(max_rows=11)  # a cross has four keys and two rows that are reserved
    assert [cross.columns for cross in small.chosen] == [("a", "b")]

    some = budgeted(max_candidates=4)
    assert [cross.columns for cross in some.chosen] == [("a", "b")]
    assert some.left_out == (("b", "d"), ("c", "d"))
    assert some.deviations < few.deviations  # fewer candidates, less to account for

    none = budgeted(seconds=1e-9)
    assert (none.candidates, none.chosen) == ((), ())
    assert len(none.left_out) == 6


def test_a_cross_must_gain_more_than_the_margin():
    lifts = {cross.columns: cross.lift for cross in budgeted().candidates}
    assert lifts["a", "b"] > 0.08 > lifts["c", "d"]
    assert [cross.columns for cross in budgeted(margin=0.05).chosen] == [("a", "b")]


# --- faults ------------------------------------------------------------------------------------


def splits_of(log: Any) -> tuple[Any, list[Split]]:
    encoder = fit_encoder(log.training, benchmark.SPEC)
    return encoder, [Split(f, encoder.encode(f)) for f in (log.training, log.validation)]


def test_splits_that_do_not_fit_are_all_named():
    encoder, (training, validation) = splits_of(benchmark.planted_log(1000, seed=0))
    cut = {
        n: v.take(np.arange(9)) if isinstance(v, Ragged) else v[:9]
        for n, v in training.frame.items()
    }
    unlabelled = dataclasses.replace(validation.batch, label=None)
    with pytest.raises(
        CrossSearchError,
        match=r"the training frame has 9 rows and its encoded split 1000; run kedro .*"
        r"the validation split has no labels",
    ):
        search(
            encoder,
            Split(cut, training.batch),
            Split(validation.frame, unlabelled),
            TRAINING,
            CrossSearchConfig(),
            EVALUATION,
        )


def test_an_interval_needs_users():
    encoder, (training, validation) = splits_of(benchmark.planted_log(1000, seed=0))
    alone = {**validation.frame, "user_id": np.full(len(validation.batch), "u1", object)}
    with pytest.raises(CrossSearchError, match=r"has 0 values of user_id; .* needs 2 or more"):
        search(
            encoder,
            training,
            Split(alone, validation.batch),
            TRAINING,
            CrossSearchConfig(),
            EVALUATION,
        )


def test_a_spec_without_pairs_has_nothing_to_cross():
    spec = FeatureSpec.model_validate(SMALL | {"columns": SMALL["columns"][:2], "crosses": []})
    frame = {
        "u": np.array(list("aabbccdd"), object),
        "r": np.array(list("abcdefgh"), object),
        "y": np.array([0, 1] * 4),
    }
    encoder = fit_encoder(frame, spec)
    split = Split(frame, encoder.encode(frame))
    with pytest.raises(CrossSearchError, match="no two columns that could be crossed"):
        search(encoder, split, split, TRAINING, CrossSearchConfig(), EVALUATION)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("folds", 0, "greater than or equal to 1"),
        ("alpha", 1.0, "less than 1"),
        ("numeric", "some", "'declared', 'all' or 'none'"),
        ("min_count", "4", "valid integer"),
        ("shortlist", 3, "Extra inputs are not permitted"),
    ],
)
def test_settings_out_of_bounds_are_refused(setting, value, message):
    with pytest.raises(ValidationError, match=message):
        CrossSearchConfig(**{setting: value})


# --- the benchmark -----------------------------------------------------------------------------


def test_the_benchmark_prints_a_table_and_ends_with_one_json_object():
    done = forks.python(
        "benchmarks/cross_search.py", *("--quick", "--rows", "2000", "--json"), folder=ROOT
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == [
        *("seed", "planted", "found", "wrong", "deep", "columns", "crosses", "seconds"),
    ]
    figures = json.loads(lines[-1])
    planted, noise = figures["runs"]
    assert (planted["planted"], noise["planted"]) == (6, 0)
    assert figures["recall"] == planted["hits"] / 6
    assert figures["chosen_of_noise"] == [len(noise["chosen"])]
    assert figures["training"]["model"] == "deep"
    assert "cores" in figures["hardware"]


def test_planted_effects_are_what_no_single_column_tells():
    effect = benchmark._effects(np.random.default_rng(0), 5, 7, scale=1.0)
    assert np.abs(effect.mean(axis=0)).max() < 1e-12
    assert np.abs(effect.mean(axis=1)).max() < 1e-12
    assert effect.std() > 0.5
