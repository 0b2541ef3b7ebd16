"""Weights of keys: how keys are numbered, and what is fitted to them, worked out by hand."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom import residuals
from fathom.batch import Ragged
from fathom.residuals import (
    Design,
    Keys,
    Rows,
    fit_weights,
    mean_by_user,
    pair_codes,
    prior_variance,
    row_losses,
)


def rows_of(label, logit=0.0, codes=None, weight=None, user=None) -> Rows:
    label = np.asarray(label, np.float64)
    return Rows(
        codes=codes or {},
        label=label,
        weight=np.ones(len(label)) if weight is None else np.asarray(weight, np.float64),
        user=np.arange(len(label)) if user is None else np.asarray(user),
        logit=np.full(len(label), logit, np.float64),
    )


def one_key(rows: int) -> Design:
    """All rows hold the one key there is."""
    return Design(np.arange(rows), np.zeros(rows, np.int32), None, 1)


# --- keys --------------------------------------------------------------------------------------

pairs = st.tuples(st.integers(-1, 2**31 - 2), st.integers(-1, 2**31 - 2))


@given(st.lists(pairs, min_size=1, max_size=20, unique=True))
def test_two_pairs_never_share_a_code(drawn):
    first, second = (np.array(part) for part in zip(*drawn, strict=True))
    codes = pair_codes(first, second, 2**31 - 1).tolist()
    whole = [code for code, pair in zip(codes, drawn, strict=True) if min(pair) >= 0]
    assert len(set(whole)) == len(whole)
    assert min(whole, default=0) >= 0
    assert {code for code, pair in zip(codes, drawn, strict=True) if min(pair) < 0} <= {-1}


def test_neighbours_do_not_run_into_each_other():
    # With three values in the second column, (0, 2) and (1, 0) are the nearest pairs.
    assert pair_codes(np.array([0, 1]), np.array([2, 0]), 3).tolist() == [2, 3]


@given(
    first=st.lists(st.lists(st.integers(-1, 4), max_size=4), min_size=1, max_size=12),
    ragged=st.booleans(),
    dense=st.booleans(),
    min_count=st.integers(1, 3),
    data=st.data(),
)
def test_a_design_holds_the_keys_that_are_seen_often_enough(first, ragged, dense, min_count, data):
    if not ragged:
        first = [[data.draw(st.integers(-1, 4))] for _ in first]
    second = [data.draw(st.integers(-1, 2)) for _ in first]
    lines = zip(first, second, strict=True)
    expected = [[(a, b) for a in held if min(a, b) >= 0] for held, b in lines]
    counts = Counter(pair for held in expected for pair in held)
    many = Ragged.of(first, np.int64)
    codes = {"a": many if ragged else many.values, "b": np.array(second)}
    rows = rows_of(np.zeros(len(second)), codes=codes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(residuals, "_BLOCK", 5)
        patch.setattr(residuals, "_DENSE", 1 << 20 if dense else 0)
        keys = Keys.fit(("a", "b"), rows, {"a": 5, "b": 3}, min_count)
        design = keys.design(rows)
    known = sorted(pair for pair, count in counts.items() if count >= min_count)
    assert [divmod(code, 3) for code in keys.known.tolist()] == known
    kept = [[known.index(pair) for pair in held if pair in known] for held in expected]
    assert design.rows.tolist() == [row for row, held in enumerate(kept) if held]
    assert design.ids.tolist() == [key for held in kept for key in held]
    # Sums by key and by row are those of the matrix written out.
    matrix = np.array([[held.count(k) for k in range(len(known))] for held in kept])
    values = np.arange(1.0, len(second) + 1)
    assert np.allclose(design.by_key(values[design.rows]), values @ matrix)
    weights = np.arange(1.0, len(known) + 1)
    assert np.allclose(design.by_row(weights), (matrix @ weights)[design.rows])


def test_keys_that_only_other_rows_hold_have_no_weight():
    training = rows_of([0, 0, 0], codes={"a": np.array([0, 1, 1])})
    others = rows_of([0, 0, 0], codes={"a": np.array([1, -1, 0])})
    keys = Keys.fit(("a",), training, {"a": 2}, min_count=2)
    assert keys.known.tolist() == [1]
    assert keys.design(others).rows.tolist() == [0]


def test_a_centred_cross_says_nothing_of_its_columns():
    codes = {"a": np.array([0, 0, 1, 1]), "b": np.array([0, 1, 0, 1])}
    keys = Keys.fit(("a", "b"), rows_of(np.zeros(4), codes=codes), {"a": 2, "b": 2}, 1)
    mass = np.ones(4)
    assert np.allclose(keys.centred(np.array([1.0, 3.0, 5.0, 7.0]), mass), 0)  # 4 for a, 2 for b
    xor = np.array([1.0, -1.0, -1.0, 1.0])
    assert np.allclose(keys.centred(xor + np.array([1, 3, 5, 7]), mass), xor)


# --- weights -----------------------------------------------------------------------------------


def test_one_step_of_newton_is_what_it_is_on_paper(monkeypatch):
    # Ten rows at even odds, eight of them positive: the gradient is 10/2 - 8 = -3 and the curvature
    # 10/4 = 2.5. A penalty of 2 makes the step 3 / 4.5; a threshold of 1 makes it 2 / 4.5.
    monkeypatch.setattr(residuals, "_STEPS", 1)
    rows = rows_of([1] * 8 + [0] * 2)
    assert fit_weights(one_key(10), rows, "binary", l2=2.0) == pytest.approx([3 / 4.5])
    assert fit_weights(one_key(10), rows, "binary", l1=1.0, l2=2.0) == pytest.approx([2 / 4.5])
    assert fit_weights(one_key(10), rows, "binary", l1=3.0, l2=2.0) == [0.0]


def test_all_steps_end_at_the_odds_that_are_seen():
    rows = rows_of([1] * 8 + [0] * 2)
    found = fit_weights(one_key(10), rows, "binary", l2=0.0)
    assert found == pytest.approx([math.log(8 / 2)], abs=1e-6)
    rows.logit += 1.0  # what is predicted already need not be said again
    found = fit_weights(one_key(10), rows, "binary", l2=0.0)
    assert found == pytest.approx([math.log(8 / 2) - 1], abs=1e-6)


def test_a_key_that_is_predicted_badly_does_not_run_away():
    # Odds of one to three thousand where one in ten is positive: a bare Newton step would be 75.
    rows = rows_of([1] * 100 + [0] * 900, logit=-8.0)
    found = fit_weights(one_key(1000), rows, "binary", l2=0.01)
    assert found == pytest.approx([8 + math.log(1 / 9)], abs=0.01)


def test_rows_count_by_their_weight():
    rows = rows_of([1, 0], weight=[3.0, 1.0])
    assert fit_weights(one_key(2), rows, "binary", l2=0.0) == pytest.approx([math.log(3)], abs=1e-6)


def test_a_regression_fits_what_is_missing_on_average():
    rows = rows_of([1.0, 2.0, 6.0], logit=1.0)
    # Residuals of 0, 1 and 5: their mean is 2, and with a penalty of 1 on three rows 6 / 4.
    assert fit_weights(one_key(3), rows, "regression", l2=0.0) == pytest.approx([2.0])
    assert fit_weights(one_key(3), rows, "regression", l2=1.0) == pytest.approx([1.5])


def test_rows_with_several_keys_reach_the_optimum_too():
    """Against Newton's method with the whole matrix of second derivatives."""
    random = np.random.default_rng(0)
    keys, count = 6, 400
    lists = Ragged.of([random.integers(keys, size=1 + row % 4).tolist() for row in range(count)])
    matrix = np.zeros((count, keys))
    np.add.at(matrix, (lists.rows, lists.values.astype(int)), 1)
    truth = random.normal(0, 1, keys)
    label = (random.random(count) < 1 / (1 + np.exp(-matrix @ truth))).astype(float)
    exact = np.zeros(keys)
    for _ in range(20):
        p = 1 / (1 + np.exp(-matrix @ exact))
        hessian = matrix.T @ (matrix * (p * (1 - p))[:, None]) + np.eye(keys)
        exact -= np.linalg.solve(hessian, matrix.T @ (p - label) + exact)
    design = Design(np.arange(count), lists.values.astype(np.int32), lists.lengths, keys)
    found = fit_weights(design, rows_of(label), "binary", l2=1.0)
    assert np.abs(found - exact).max() < 0.02


# --- shrinkage ---------------------------------------------------------------------------------


def test_the_variance_is_what_gradients_have_beyond_chance():
    # Where all keys are alike, E[g²] = 4 + 2² · variance: squares of 16 on average mean 3.
    gradient = np.array([4.0, -4.0, 5.0, -np.sqrt(7.0)])
    same = np.ones(4)
    assert prior_variance(gradient, 2 * same, 4 * same) == pytest.approx(3.0)
    assert prior_variance(gradient / 2, 2 * same, 4 * same) == 0.0


def test_weights_of_chance_are_none_and_those_of_effects_are_shrunk():
    random = np.random.default_rng(1)
    ids = np.repeat(np.arange(2000, dtype=np.int32), 20)
    design = Design(np.arange(len(ids)), ids, None, 2000)
    effects = random.normal(0, 0.7, 2000)
    noise = rows_of(random.random(len(ids)) < 0.3, logit=math.log(0.3 / 0.7))
    assert np.abs(fit_weights(design, noise, "binary")).max() < 0.1
    logit = math.log(0.3 / 0.7)
    real = rows_of(random.random(len(ids)) < 1 / (1 + np.exp(-logit - effects[ids])), logit=logit)
    found = fit_weights(design, real, "binary")
    unshrunk = fit_weights(design, real, "binary", l2=1e-3)
    errors = [np.mean((w - effects) ** 2) for w in (np.zeros(2000), unshrunk, found)]
    assert errors[2] < 0.8 * min(errors[:2])


# --- losses ------------------------------------------------------------------------------------


def test_losses_by_hand():
    assert row_losses("binary", np.array([0.0]), np.array([1.0])) == pytest.approx([math.log(2)])
    logit = np.array([math.log(3.0), -800.0])  # a probability of 3/4, and one beyond float64
    found = row_losses("binary", logit, np.array([0.0, 1.0]))
    assert found == pytest.approx([math.log(4), 800.0])
    assert row_losses("regression", np.array([3.0]), np.array([1.0])) == [4.0]


def test_the_slope_of_a_loss_is_its_derivative():
    for task, (logit, label) in {"binary": (0.7, 1.0), "regression": (0.7, 2.0)}.items():
        half = 1.0 if task == "binary" else 0.5
        near = half * row_losses(task, logit + np.array([-1e-4, 0, 1e-4]), np.full(3, label))
        slope, curve = residuals._slopes(task, np.array([logit]), np.array([label]))
        assert slope[0] == pytest.approx((near[2] - near[0]) / 2e-4, abs=1e-6)
        assert curve[0] == pytest.approx((near[2] - 2 * near[1] + near[0]) / 1e-8, abs=1e-5)


def test_the_error_of_a_mean_with_users_as_clusters():
    # Users with sums of 3 and 1 over two rows each: the mean is 1, they deviate by +1 and -1, and
    # the error is √(2/1 · (1 + 1)) / 4.
    assert mean_by_user(np.array([3.0, 1.0]), np.array([2.0, 2.0])) == pytest.approx((1.0, 0.5))


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=30))
def test_users_of_one_row_each_are_rows(values):
    mean, error = mean_by_user(np.array(values), np.ones(len(values)))
    assert mean == pytest.approx(np.mean(values))
    assert error == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), abs=1e-12)


def test_every_pair_of_a_small_table_has_a_code_of_its_own():
    cells = [(a, b) for a in range(7) for b in range(5)]
    first, second = (np.array(part) for part in zip(*cells, strict=True))
    codes = pair_codes(first, second, 5)
    assert all(a != b for a, b in combinations(codes.tolist(), 2))
    assert sorted(codes.tolist()) == list(range(35))
