"""The gate word by word, what proves harm in a slice, and how often it is wrong."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fathom.evaluation import (
    EvaluationConfig,
    EvaluationError,
    Metrics,
    Predictions,
    metrics,
    paired_interval,
)
from fathom.gate import Candidate, Compared, GateConfig, Verdict, gate

CONF = Path(__file__).parents[1] / "conf" / "base" / "parameters_evaluation.yml"

RESAMPLING = EvaluationConfig(resamples=60, min_slice_rows=200)
#: Margins so wide that only the check under test can fail.
LENIENT = GateConfig(
    loss_margin=9,
    auc_margin=1,
    user_auc_margin=1,
    calibration_margin=9,
    slice_margin=9,
    slice_auc_margin=1,
    slice_calibration_margin=9,
)
LOGIT = np.random.default_rng(5).normal(-1, 1.5, 4000)
USER = np.arange(4000) % 100
LABEL = (np.random.default_rng(6).random(4000) < 1 / (1 + np.exp(-LOGIT))).astype(float)
MASKS = {"evening": np.arange(4000) % 3 == 0, "noon": np.arange(4000) % 3 == 1, "rare": USER == 0}
BASELINES: dict[str, Metrics] = {
    "constant": {"auc": 0.5, "logloss": 0.65},
    "popularity": {"auc": 0.6, "logloss": 0.6},
}


def noise(scale: float) -> np.ndarray:
    return np.random.default_rng(7).normal(0, scale, 4000)


def window(label: np.ndarray = LABEL, user: np.ndarray = USER, **more) -> Predictions:
    """Who was shown what and what came of it; no predictions yet."""
    return Predictions(label, np.zeros(label.size), user, user, **more)


def candidate(version: str, logit: np.ndarray = LOGIT) -> Candidate:
    return Candidate(version, 1 / (1 + np.exp(-logit)))


def measured(side: Candidate, mask: np.ndarray | None = None) -> Metrics:
    rows = replace(window(), probability=side.probability)
    return metrics(rows if mask is None else rows.where(mask))


def judged(
    challenger: Candidate,
    champion: Candidate | None = None,
    config: GateConfig = LENIENT,
    baselines: dict[str, Metrics] = BASELINES,
    rows: Predictions | None = None,
) -> Verdict:
    return gate(rows or window(), challenger, champion, baselines, MASKS, config, RESAMPLING)


def only(**margins: float) -> GateConfig:
    anything = {"calibration_lo": 0.1, "calibration_hi": 9, "baselines": ()}
    return LENIENT.model_copy(update=anything | margins)


def failures(verdict: Verdict) -> list[str]:
    """The reasons that begin with fail; every other one begins with pass."""
    assert all(re.match("(pass|fail): ", reason) for reason in verdict.reasons)
    failed = [reason for reason in verdict.reasons if reason.startswith("fail: ")]
    assert verdict.promoted == (not failed)
    return failed


def the_failure(verdict: Verdict) -> str:
    failed = failures(verdict)
    assert len(failed) == 1, failed
    return failed[0]


def test_the_first_champion_needs_the_absolute_bounds_only():
    verdict = judged(candidate("v1"))
    assert verdict.promoted
    shown = [re.sub(r"\d\.\d+", "#", reason) for reason in verdict.reasons]
    assert shown == [
        "pass: metrics are defined: logloss #, calibration #, auc #",
        "pass: calibration # is within [#, #]",
        "pass: auc # beats constant's #",
        "pass: logloss # beats constant's #",
        "pass: auc # beats popularity's #",
        "pass: logloss # beats popularity's #",
        "pass: there is no champion yet: the absolute bounds decide alone",
    ]


def test_a_better_challenger_is_promoted_and_every_check_says_so():
    verdict = judged(candidate("v2"), candidate("v1", LOGIT + noise(0.8)), GateConfig())
    assert verdict.promoted
    number = r"[+-]0\.0\d+"
    assert len(verdict.reasons) == 11
    for reason, (name, margin) in zip(
        verdict.reasons[6:10],
        [
            ("logloss", "+0.00000"),
            ("auc", "-0.00200"),
            ("user_auc", "-0.00200"),
            ("miscalibration", "+0.05000"),
        ],
        strict=True,
    ):
        assert re.fullmatch(
            rf"pass: {name} differs from the champion's by {number}, at worst by {number}; "
            rf"the margin is {re.escape(margin)}",
            reason,
        )
    assert verdict.reasons[10] == (
        "pass: none of 2 slices is proven worse; left out as too small: rare (40 rows)"
    )


def test_an_equal_challenger_is_refused_unless_a_margin_lets_it_pass_for_being_newer():
    verdict = judged(candidate("v2"), candidate("v1"), GateConfig())
    assert the_failure(verdict) == (
        "fail: logloss differs from the champion's by +0.00000, at worst by +0.00000; "
        "the margin is +0.00000"
    )
    assert judged(candidate("v2"), candidate("v1"), GateConfig(loss_margin=0.002)).promoted


@pytest.mark.parametrize(
    ("scores", "fault"),
    [
        (
            np.full(4000, np.nan),
            "probability: 4000 of 4000 values are not finite; the first is nan",
        ),
        (np.where(LOGIT > 2, np.inf, 0.5), "values are not finite; the first is inf at row"),
        (LOGIT, r"values are outside \[0, 1\] \(pass probabilities, not logits\)"),
        (np.array([0.5]), "lengths differ"),
    ],
)
def test_unusable_predictions_never_win_and_never_raise(scores, fault):
    broken, sound = Candidate("v2", scores), candidate("v1")
    for champion in (None, sound):
        reason = the_failure(judged(broken, champion))
        assert re.match(rf"fail: the challenger's predictions are unusable: .*{fault}", reason)
    # A champion that has become unusable is no reason to keep it.
    verdict = judged(sound, broken)
    assert verdict.promoted
    assert re.match(r"pass: the champion's predictions are unusable: .*", verdict.reasons[-1])
    assert verdict.reasons[-1].endswith("; the absolute bounds decide alone")


@pytest.mark.parametrize("champion", [None, candidate("v1")])
def test_a_constant_challenger_ranks_nothing(champion):
    """Even calibrated, with no baseline to beat."""
    constant = Candidate("v2", np.full(4000, LABEL.mean()))
    reason = the_failure(judged(constant, champion, only(baselines=())))
    assert reason == f"fail: all predictions are {LABEL.mean():.5f}: they rank nothing"


def test_the_champion_itself_passes_at_once():
    verdict = judged(candidate("v1", -LOGIT), candidate("v1"), GateConfig())
    assert verdict == Verdict(True, ["pass: version v1 is already champion; nothing to compare"])


def test_undefined_metrics_fail():
    nothing = window(np.zeros(4000))
    verdict = judged(candidate("v1"), config=GateConfig(baselines=()), rows=nothing)
    assert the_failure(verdict) == (
        "fail: calibration, auc undefined: the test rows hold a single outcome or labels that "
        "sum to 0"
    )


@pytest.mark.parametrize("bounds", [(0.5, 0.9), (1.1, 1.5)])
def test_calibration_outside_its_bounds_fails(bounds):
    config = LENIENT.model_copy(update={"calibration_lo": bounds[0], "calibration_hi": bounds[1]})
    lo, hi = (re.escape(str(bound)) for bound in bounds)
    pattern = rf"fail: calibration (0\.9|1\.0)\d+ is outside \[{lo}, {hi}\]"
    assert re.fullmatch(pattern, the_failure(judged(candidate("v1"), config=config)))


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("auc", 0.99, r"fail: auc 0\.8\d+ does not beat popularity's 0\.99000"),
        ("logloss", 0.01, r"fail: logloss 0\.4\d+ does not beat popularity's 0\.01000"),
        ("auc", None, r"fail: auc 0\.8\d+ against popularity's None: undefined"),
    ],
)
def test_a_baseline_that_is_not_beaten_fails(name, value, reason):
    better = BASELINES | {"popularity": BASELINES["popularity"] | {name: value}}
    assert re.fullmatch(reason, the_failure(judged(candidate("v1"), baselines=better)))


def test_a_tie_with_a_baseline_does_not_beat_it():
    own = measured(candidate("v1"))
    verdict = judged(candidate("v1"), baselines=BASELINES | {"popularity": own})
    assert len(failures(verdict)) == 2


def test_a_baseline_that_was_not_measured_fails():
    verdict = judged(candidate("v1"), baselines={"constant": BASELINES["constant"]})
    reason = "fail: baseline popularity was not measured; measured: constant"
    assert the_failure(verdict) == reason


@pytest.mark.parametrize(
    ("config", "logit", "reason"),
    [
        # Twice the logit keeps the order, so the AUCs are the same.
        (only(loss_margin=0.002), 2 * LOGIT, r"logloss differs from the champion's by \+0\.\d+"),
        (
            only(auc_margin=0.002),
            LOGIT + noise(0.8),
            r"auc differs from the champion's by -0\.0\d+",
        ),
        (only(user_auc_margin=0.002), LOGIT + noise(0.8), r"user_auc differs .* by -0\.0\d+"),
        (only(calibration_margin=0.05), LOGIT + 0.3, r"miscalibration differs .* by \+0\.\d+"),
        (only(calibration_margin=0.05), LOGIT - 0.3, r"miscalibration differs .* by \+0\.\d+"),
    ],
)
def test_a_metric_that_may_be_worse_than_its_margin_fails_alone(config, logit, reason):
    failed = the_failure(judged(candidate("v2", logit), candidate("v1"), config))
    assert re.match(f"fail: {reason}, at worst by", failed)


def test_the_unfavourable_end_of_the_interval_decides():
    old, new = candidate("v1"), candidate("v2", LOGIT + noise(0.3))
    sides = (replace(window(), probability=side.probability) for side in (old, new))
    found = paired_interval(*sides, RESAMPLING)["logloss"]
    assert found.difference < found.hi
    between = (found.difference + found.hi) / 2
    assert the_failure(judged(new, old, only(loss_margin=between))).startswith("fail: logloss")
    assert judged(new, old, only(loss_margin=found.hi + 1e-9)).promoted


def test_an_interval_that_is_undefined_fails():
    alone = window(user=np.zeros(4000, np.int64))
    failed = failures(judged(candidate("v2"), candidate("v1", 2 * LOGIT), rows=alone))
    undefined = "against the champion is undefined: needs 2 users and 2 outcomes"
    assert failed == [f"fail: logloss {undefined}", f"fail: auc {undefined}"]


def test_where_no_user_has_both_outcomes_there_is_no_user_auc_to_compare():
    each = window(user=np.arange(4000))
    verdict = judged(candidate("v2"), candidate("v1", 2 * LOGIT), rows=each)
    assert verdict.promoted
    names = [found.metric for found in verdict.compared if found.part is None]
    assert names == ["logloss", "auc", "miscalibration"]


# --- slices ------------------------------------------------------------------------------------


def compared(verdict: Verdict, part: str, metric: str) -> Compared:
    (found,) = (c for c in verdict.compared if (c.part, c.metric) == (part, metric))
    return found


def test_differences_in_a_slice_are_those_of_its_metrics_and_the_loss_a_share():
    old, new = candidate("v1"), candidate("v2", 1.5 * LOGIT + noise(0.5))
    verdict = judged(new, old)
    before, after = (measured(side, MASKS["noon"]) for side in (old, new))
    assert compared(verdict, "noon", "logloss").difference == pytest.approx(
        after["logloss"] / before["logloss"] - 1
    )
    for name in ("auc", "user_auc"):
        difference = compared(verdict, "noon", name).difference
        assert difference == pytest.approx(after[name] - before[name])
    assert compared(verdict, "noon", "miscalibration").difference == pytest.approx(
        abs(np.log(after["calibration"])) - abs(np.log(before["calibration"]))
    )
    assert (compared(verdict, "noon", "auc").rows, compared(verdict, "noon", "auc").users) == (
        1333,
        100,
    )


def test_a_slice_that_gets_worse_blocks_a_challenger_that_is_better_overall():
    old, new = LOGIT + noise(1.0), np.where(MASKS["noon"], LOGIT + 1.6 * noise(1.0)[::-1], LOGIT)
    sides = candidate("v2", new), candidate("v1", old)
    assert measured(sides[0])["logloss"] < measured(sides[1])["logloss"]
    reason = the_failure(judged(*sides, only(slice_margin=0.05)))
    assert re.fullmatch(
        r"fail: slice noon \(1333 rows, 100 users\): logloss differs from the champion's by "
        r"\+\d+\.\d%, by \+\d+\.\d% at least; the margin is \+5\.0%",
        reason,
    )


@pytest.mark.parametrize(
    ("config", "logit", "reason"),
    [
        (only(slice_auc_margin=0.02), -LOGIT, [r"auc .* by -0\.\d+, by -0", r"user_auc .* by -0"]),
        (
            only(slice_calibration_margin=0.15),
            LOGIT + 2,
            [r"miscalibration .* by \+0\.\d+, by \+0"],
        ),
        (
            only(slice_calibration_margin=0.15),
            LOGIT - 1,
            [r"miscalibration .* by \+0\.\d+, by \+0"],
        ),
    ],
)
def test_order_and_calibration_of_a_slice_block_too(config, logit, reason):
    new = candidate("v2", np.where(MASKS["noon"], logit, LOGIT))
    failed = failures(judged(new, candidate("v1"), config))
    for found, pattern in zip(failed, reason, strict=True):
        assert re.match(rf"fail: slice noon \(1333 rows, 100 users\): {pattern}", found)


def test_a_slice_blocks_for_proven_harm_only():
    """Worse than its margin as measured, but not by more than chance explains."""
    old, new = candidate("v1"), candidate("v2", np.where(MASKS["noon"], LOGIT + noise(0.4), LOGIT))
    found = compared(judged(new, old), "noon", "logloss")
    assert 0 < found.lo < found.difference < found.hi
    assert judged(new, old, only(slice_margin=(found.lo + found.difference) / 2)).promoted
    assert judged(new, old, only(slice_margin=found.lo + 1e-9)).promoted
    assert not judged(new, old, only(slice_margin=found.lo - 1e-9)).promoted


def test_with_more_slices_more_is_asked_of_a_proof():
    random = np.random.default_rng(0)
    many = MASKS | {f"part {n}": random.random(4000) < 0.3 for n in range(30)}
    old, new = candidate("v1"), candidate("v2", LOGIT + noise(0.3))
    few, more = (
        compared(gate(window(), new, old, BASELINES, masks, LENIENT, RESAMPLING), "noon", "auc")
        for masks in (MASKS, many)
    )
    assert more.difference == few.difference
    assert more.lo < few.lo
    # Thirty-three slices are a family of 99 and more tests; Bonferroni would ask for 3.3 errors.
    assert (more.difference - more.lo) / (few.difference - few.lo) < 2


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_slices_of_the_same_rows_count_as_one(seed):
    """What is said ten times over is no more likely to be chance."""
    random = np.random.default_rng(seed)
    old, new = candidate("v1"), candidate("v2", LOGIT + random.normal(0, 0.3, 4000))
    once = {"noon": MASKS["noon"]}
    often = {f"noon {n}": MASKS["noon"] for n in range(10)}
    one, ten = (
        gate(window(), new, old, BASELINES, masks, LENIENT, RESAMPLING) for masks in (once, often)
    )
    assert compared(ten, "noon 3", "auc").lo == pytest.approx(compared(one, "noon", "auc").lo)


def test_a_slice_with_too_few_rows_or_users_cannot_block():
    old, new = candidate("v1"), candidate("v2", np.where(MASKS["rare"], -LOGIT, LOGIT))
    config = only(slice_margin=0.2, min_slice_users=2)
    assert judged(new, old, config).promoted
    few = RESAMPLING.model_copy(update={"min_slice_rows": 40})
    verdict = gate(window(), new, old, BASELINES, MASKS, config, few)
    assert verdict.reasons[-1] == (
        "pass: none of 2 slices is proven worse; left out as too small: rare (1 users)"
    )
    ten = MASKS | {"rare": USER < 10}
    new = candidate("v2", np.where(ten["rare"], -LOGIT, LOGIT))
    blocked = gate(window(), new, old, BASELINES, ten, config, RESAMPLING)
    assert the_failure(blocked).startswith("fail: slice rare (400 rows, 10 users): logloss")
    twenty = config.model_copy(update={"min_slice_users": 20})
    assert gate(window(), new, old, BASELINES, ten, twenty, RESAMPLING).promoted


def test_a_slice_with_one_outcome_is_compared_by_its_loss_alone():
    lost = {"lost": LABEL == 0}
    new, old = candidate("v2", 2 * LOGIT), candidate("v1")
    verdict = gate(window(), new, old, BASELINES, lost, LENIENT, RESAMPLING)
    assert [found.metric for found in verdict.compared if found.part] == ["logloss"]
    assert verdict.promoted


def test_without_slices_there_is_nothing_to_compare():
    verdict = gate(window(), candidate("v2"), candidate("v1"), BASELINES, {}, LENIENT, RESAMPLING)
    assert verdict.reasons[-1] == "pass: no slice to compare"


def test_a_mask_that_does_not_fit_is_named():
    short = {"short": np.ones(3, bool)}
    with pytest.raises(EvaluationError, match=r"short: bool of shape \(3,\); give bool of shape"):
        gate(window(), candidate("v2"), candidate("v1"), BASELINES, short, LENIENT, RESAMPLING)


# --- how often it is wrong ---------------------------------------------------------------------


def promoted_share(harm: float, worlds: int = 80) -> float:
    """Of challengers that make as many mistakes as the champion, but for one slice's ``harm``."""
    slices = {f"part {n}": n == USER % 10 for n in range(10)}
    config = GateConfig(loss_margin=0.05, auc_margin=0.05, user_auc_margin=0.05, baselines=())
    promoted = 0
    for world in range(worlds):
        random = np.random.default_rng(world)
        label = (random.random(4000) < 1 / (1 + np.exp(-LOGIT))).astype(float)
        old, new = (LOGIT + random.normal(0, 0.3, 4000) for _ in range(2))
        new = np.where(slices["part 3"], new + random.normal(0, harm, 4000), new)
        sides = candidate("v2", new), candidate("v1", old)
        resampling = EvaluationConfig(resamples=60, min_slice_rows=200)
        lenient = config.model_copy(update={"min_slice_users": 10, "slice_calibration_margin": 9})
        verdict = gate(window(label), *sides, {}, slices, lenient, resampling)
        promoted += all(found.passed for found in verdict.compared if found.part)
    return promoted / worlds


def test_slices_that_are_no_worse_seldom_block_and_one_destroyed_nearly_always():
    assert promoted_share(harm=0.0) >= 0.95
    assert promoted_share(harm=5.0, worlds=20) <= 0.05


def test_a_regression_is_judged_by_its_error():
    label = 3 + LOGIT
    rows = window(label, task="regression")
    champion = Candidate("v1", label + noise(0.6))
    challenger = Candidate("v2", label + noise(0.5))
    baselines: dict[str, Metrics] = {"constant": {"rmse": 1.5}, "popularity": {"rmse": 1.4}}
    assert judged(challenger, champion, GateConfig(), baselines, rows).promoted
    verdict = judged(champion, challenger, GateConfig(), baselines, rows)
    assert [reason.split()[1] for reason in failures(verdict)] == ["rmse", "slice", "slice"]
    found = compared(verdict, "evening", "rmse")
    before, after = (
        metrics(replace(rows, probability=side.probability).where(MASKS["evening"]))["rmse"]
        for side in (challenger, champion)
    )
    assert found.difference == pytest.approx(after / before - 1)
    assert found.difference == pytest.approx(0.2)


# --- configuration -----------------------------------------------------------------------------


def test_the_base_configuration_is_the_default_one():
    conf = yaml.safe_load(CONF.read_text(encoding="utf-8"))
    assert GateConfig.model_validate(conf["gate"]) == GateConfig()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"loss_margin": -0.1}, "greater than or equal to 0"),
        ({"min_slice_users": 1}, "greater than or equal to 2"),
        ({"slice_margins": 0.1}, "Extra inputs are not permitted"),
        ({"calibration_lo": 2}, "calibration_lo 2.0 must be below calibration_hi 1.25"),
    ],
)
def test_a_configuration_out_of_bounds_is_refused(line, message):
    with pytest.raises(ValidationError, match=message):
        GateConfig.model_validate(line)
