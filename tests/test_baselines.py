"""The baselines on planted rules: what each can learn, what it cannot, and what it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from math import log
from pathlib import Path

import numpy as np
import pytest
import skops.io
import yaml
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, roc_auc_score
from threadpoolctl import threadpool_limits

from fathom.baselines import (
    FILE,
    BaselineError,
    Baselines,
    BaselinesConfig,
    Boosting,
    Constant,
    Inputs,
    Linear,
    Popularity,
    _Design,
)

CONF = Path(__file__).parents[1] / "conf" / "base" / "parameters_evaluation.yml"
#: Fewer and smaller trees than the default, for a few thousand rows.
SMALL = BaselinesConfig(boosting_iterations=40, boosting_min_leaf_rows=20, boosting_l2=1.0)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """On a few thousand rows a second thread has nothing to do but to be waited for."""
    with threadpool_limits(limits=1):
        yield


def constant(label: np.ndarray, rows: int, task: str = "binary") -> np.ndarray:
    return Constant.fit(label, task).predict(Inputs(np.zeros((rows, 1), np.float32)))


def popularity(
    train: np.ndarray, label: np.ndarray, item: np.ndarray, weight: float = 20, task: str = "binary"
) -> np.ndarray:
    test = Inputs(np.zeros((len(item), 1), np.float32), item=item)
    return Popularity.fit(train, label, weight, task).predict(test)


def linear(
    train: Inputs, label: np.ndarray, test: Inputs, config: BaselinesConfig, task: str = "binary"
) -> np.ndarray:
    return Linear.fit(train, label, config, task).predict(test)


def boosting(
    train: Inputs, label: np.ndarray, test: Inputs, config: BaselinesConfig, task: str = "binary"
) -> np.ndarray:
    return Boosting.fit(train, label, config, task).predict(test)


def predicted(
    train: Inputs, label: np.ndarray, test: Inputs, config: BaselinesConfig, task: str = "binary"
) -> dict[str, np.ndarray]:
    return Baselines.fit(train, label, config, task).predict(test)


def sigmoid(logit: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logit))


def drawn(logit: np.ndarray, seed: int = 0) -> np.ndarray:
    """Labels of the given log-odds."""
    return (np.random.default_rng(seed).random(logit.size) < sigmoid(logit)).astype(float)


def planted(rows: int = 4000, seed: int = 0) -> tuple[Inputs, np.ndarray]:
    """Log-odds that follow a count, whether a value is missing, and one of four categories.

    Columns: the count, a number missing in a third of the rows, the category (-1 in a tenth of
    the rows), and noise. Items are unrelated to the label.
    """
    random = np.random.default_rng(seed)
    count = random.poisson(random.exponential(20, rows)).astype(np.float32)
    sparse = random.normal(size=rows).astype(np.float32)
    sparse[random.random(rows) < 1 / 3] = np.nan
    category = random.integers(-1, 4, rows).astype(np.float32)
    category[random.random(rows) < 0.1] = -1
    effect = np.array([-2.0, 0.0, 2.0, 0.5, 0.0])[category.astype(int)]
    logit = 1.5 * (np.log1p(count) - 2.5) + 2.0 * np.isnan(sparse) + effect - 0.5
    columns = (count, sparse, category, random.normal(size=rows))
    x = np.column_stack(columns).astype(np.float32)
    return Inputs(x, (2,), random.integers(0, 50, rows)), logit


# --- constant and popularity: by hand ----------------------------------------------------------


def test_constant_is_the_mean_label():
    assert constant(np.array([1.0, 0.0, 0.0, 0.0]), rows=3).tolist() == [0.25] * 3
    assert constant(np.array([4.0, 8.0]), rows=2, task="regression").tolist() == [6.0] * 2


def test_popularity_draws_the_items_mean_to_the_overall_mean():
    train, label = np.array([7, 7, 7, 9]), np.array([1.0, 1.0, 1.0, 0.0])
    found = popularity(train, label, np.array([9, 7, 8, -1, 10**12]), weight=2)
    # The overall mean is 3/4. Item 9: (0 + 2·3/4) / (1 + 2). Item 7: (3 + 2·3/4) / (3 + 2).
    assert found == pytest.approx([0.5, 0.9, 0.75, 0.75, 0.75])


def test_popularity_gives_unknown_codes_the_overall_mean_even_if_trained_on():
    train, label = np.array([-1, -1, 3, 3]), np.array([1.0, 1.0, 0.0, 0.0])
    found = popularity(train, label, np.array([-1, 3]), weight=1)
    assert found == pytest.approx([0.5, 0.5 / 3])


def test_popularity_of_a_numeric_label_is_not_clipped():
    found = popularity(np.array([1, 1]), np.array([4.0, 6.0]), np.array([1]), task="regression")
    assert found.tolist() == [5.0]


# --- the linear baseline -----------------------------------------------------------------------


def test_the_design_scales_logarithms_by_training_statistics():
    nan = np.nan
    x = np.array([[np.e - 1, 2, 0], [1 - np.e, 2, 1], [nan, 2, -1], [0, 2, 1]], dtype=np.float32)
    design = _Design(Inputs(x, categorical=(2,)))
    # Column 0 has logarithms 1, -1, (missing), 0: mean 0, variance 2/3. Column 1 is constant.
    # Then: was column 0 missing; is the category 0; is it 1.
    one = 1 / np.sqrt(2 / 3)
    expected = [[one, 0, 0, 1, 0], [-one, 0, 0, 0, 1], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]
    assert design(Inputs(x, categorical=(2,))) == pytest.approx(np.array(expected), abs=1e-6)
    other = np.array([[0, nan, 7]], dtype=np.float32)
    # Never missing in training: no indicator, the mean; an unseen category: all zeros.
    assert design(Inputs(other, categorical=(2,))) == pytest.approx(np.zeros((1, 5)), abs=1e-6)


def test_logistic_regression_learns_counts_missingness_and_categories():
    train, logit = planted()
    test, truth = planted(seed=1)
    found = linear(train, drawn(logit), test, BaselinesConfig())
    assert np.abs(found - sigmoid(truth)).mean() < 0.03
    assert log_loss(drawn(truth, 1), found) < log_loss(drawn(truth, 1), sigmoid(truth)) + 0.01


def test_logistic_regression_is_scikit_learns_on_the_design():
    train, logit = planted(rows=500)
    design, label = _Design(train)(train).astype(np.float64), drawn(logit)
    oracle = LogisticRegression(C=1 / (1e-2 * 500), tol=1e-9, max_iter=1000).fit(design, label)
    found = linear(train, label, train, BaselinesConfig(linear_l2=1e-2))
    assert found == pytest.approx(oracle.predict_proba(design)[:, 1], abs=1e-4)


def test_collinear_columns_do_not_disturb_the_solver():
    train, logit = planted(rows=2000)
    twice = Inputs(np.hstack([train.x, train.x[:, :2]]), (2,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the solver warns before it falls back to a slower one
        found = linear(twice, drawn(logit), twice, BaselinesConfig())
    assert roc_auc_score(drawn(logit), found) > 0.85


def test_ridge_is_scikit_learns_on_the_design():
    train, value = planted(rows=500)
    design = _Design(train)(train).astype(np.float64)
    oracle = Ridge(alpha=1e-4 * 500).fit(design, value).predict(design)
    found = linear(train, value, train, BaselinesConfig(), "regression")
    assert found == pytest.approx(oracle, abs=1e-3)
    assert oracle == pytest.approx(value, abs=0.1)


# --- gradient boosting -------------------------------------------------------------------------


def test_gradient_boosting_learns_an_interaction_that_no_linear_model_can():
    """The label is 1 where exactly one of two signs is positive, as in XOR."""
    random = np.random.default_rng(0)
    x = random.normal(size=(4000, 2)).astype(np.float32)
    label = ((x[:, 0] > 0) != (x[:, 1] > 0)).astype(float)
    train, test = Inputs(x[:2000]), Inputs(x[2000:])
    boosted = boosting(train, label[:2000], test, SMALL)
    straight = linear(train, label[:2000], test, SMALL)
    assert roc_auc_score(label[2000:], boosted) > 0.98
    assert roc_auc_score(label[2000:], straight) < 0.6


def test_gradient_boosting_splits_on_missing_values():
    x = np.random.default_rng(0).normal(size=(2000, 1)).astype(np.float32)
    x[::4] = np.nan
    label = np.isnan(x[:, 0]).astype(float)
    found = boosting(Inputs(x), label, Inputs(x), SMALL)
    assert found[label == 1].min() > 0.9
    assert found[label == 0].max() < 0.1


def test_gradient_boosting_takes_a_missing_code_for_a_missing_value():
    """A test row with -1 is scored as the training rows with -1, not as category 0."""
    code = np.tile([-1, 0, 1, 2], 500).astype(np.float32)[:, None]
    label = (code[:, 0] == -1).astype(float)
    three = np.array([[-1], [0], [np.nan]], dtype=np.float32)
    found = boosting(Inputs(code, (0,)), label, Inputs(three, (0,)), SMALL)
    assert found[0] > 0.9
    assert found[1] < 0.1
    assert found[2] == found[0]


def test_gradient_boosting_splits_categories_into_sets_not_ranges():
    """Odd codes are positive; as numbers, 40 alternating codes would need 39 splits."""
    code = np.random.default_rng(0).integers(0, 40, 4000).astype(np.float32)[:, None]
    stump = SMALL.model_copy(update={"boosting_leaves": 2, "boosting_iterations": 30})
    inputs, label = Inputs(code, (0,)), code[:, 0] % 2
    assert roc_auc_score(label, boosting(inputs, label, inputs, stump)) > 0.99
    as_number = Inputs(code)
    assert roc_auc_score(label, boosting(as_number, label, as_number, stump)) < 0.9


def test_gradient_boosting_of_a_numeric_label_follows_its_mean():
    train, value = planted()
    test, truth = planted(seed=1)
    found = boosting(train, value, test, SMALL, task="regression")
    assert np.sqrt(np.mean((found - truth) ** 2)) < 0.3 * np.std(truth)


# --- all together ------------------------------------------------------------------------------


def test_every_baseline_is_fitted_in_order_and_what_knows_more_predicts_better():
    train, logit = planted()
    test, truth = planted(seed=1)
    found = predicted(train, drawn(logit), test, SMALL)
    assert list(found) == ["constant", "popularity", "logistic_regression", "gradient_boosting"]
    label = drawn(truth, 1)
    for values in found.values():
        assert (values.shape, values.dtype) == ((4000,), np.float64)
        assert np.all((values > 0) & (values < 1))
    losses = {name: log_loss(label, values) for name, values in found.items()}
    assert losses["logistic_regression"] < losses["constant"] - 0.1
    assert losses["gradient_boosting"] < losses["constant"] - 0.1
    assert losses["popularity"] == pytest.approx(losses["constant"], abs=0.02)


def test_regression_baselines_keep_the_names_but_for_the_linear_one():
    train, value = planted(rows=500)
    found = predicted(train, value, train, SMALL, task="regression")
    assert list(found) == ["constant", "popularity", "ridge", "gradient_boosting"]
    errors = {name: np.sqrt(np.mean((values - value) ** 2)) for name, values in found.items()}
    assert errors["ridge"] < errors["gradient_boosting"] < errors["popularity"]


def test_without_items_there_is_no_popularity():
    train, logit = planted(rows=500)
    bare = Inputs(train.x, train.categorical)
    assert "popularity" not in predicted(bare, drawn(logit), bare, SMALL)


def test_the_same_seed_gives_the_same_predictions():
    train, logit = planted(rows=1000)
    first, again = (predicted(train, drawn(logit), train, SMALL) for _ in range(2))
    for name, values in first.items():
        assert np.array_equal(values, again[name]), name


def test_inputs_are_left_as_they_were():
    train, logit = planted(rows=500)
    before = train.x.copy()
    predicted(train, drawn(logit), train, SMALL)
    assert np.array_equal(train.x, before, equal_nan=True)


def test_probabilities_are_never_certain_even_when_the_label_is_separable():
    x = np.repeat([[-9.0], [9.0]], 500, axis=0).astype(np.float32)
    inputs, label = Inputs(x, item=(x[:, 0] > 0).astype(np.int64)), (x[:, 0] > 0).astype(float)
    eager = BaselinesConfig(
        popularity_prior_weight=1e-12, linear_l2=1e-5, boosting_l2=1e-9, boosting_learning_rate=1
    )
    found = predicted(inputs, label, inputs, eager)
    for name, values in found.items():
        assert values.min() >= 1e-7, name
        assert values.max() <= 1 - 1e-7, name
    assert found["popularity"].max() == 1 - 1e-7
    assert log_loss(label, found["gradient_boosting"]) < -log(1 - 1e-3)


# --- kept in a file ----------------------------------------------------------------------------


@pytest.mark.parametrize("task", ["binary", "regression"])
def test_baselines_read_from_a_file_predict_the_same(tmp_path, task):
    train, logit = planted(rows=500)
    label = drawn(logit) if task == "binary" else logit
    fitted = Baselines.fit(train, label, SMALL, task, codes={"brand": ["private", "national"]})
    fitted.save(tmp_path)
    read = Baselines.load(tmp_path)
    assert read.codes == {"brand": ["private", "national"]}
    test, _ = planted(seed=1)
    for name, values in fitted.predict(test).items():
        assert np.array_equal(read.predict(test)[name], values), name


def test_a_file_that_names_other_types_is_refused(tmp_path):
    skops.io.dump(Baselines({"constant": Path("elsewhere").joinpath}, 1), tmp_path / FILE)
    with pytest.raises(skops.io.exceptions.UntrustedTypesFoundException, match="pathlib"):
        Baselines.load(tmp_path)


# --- what is refused ---------------------------------------------------------------------------


def test_inputs_name_every_fault_at_once():
    x = np.array([[0.5, np.inf, 300], [1, -np.inf, 2]], dtype=np.float32)
    with pytest.raises(BaselineError) as error:
        Inputs(x, categorical=(0, 2, 3), item=np.array([0.5, 1.5]))
    assert error.value.faults == [
        "categorical: no column 3; x has columns 0 to 2",
        "x: column 1 holds infinity; give NaN where a value is missing",
        "x: column 0 is categorical but holds fractions; give codes",
        "x: column 2 holds code 300, the largest is 254; leave it out or merge rare values",
        "item: float64 of shape (2,); give integers of shape (2,)",
    ]
    assert str(error.value).startswith("baselines: 5 faults\n  - categorical")


@pytest.mark.parametrize("x", [np.zeros((2, 2)), np.zeros(2, np.float32)])
def test_features_are_a_float32_matrix(x):
    with pytest.raises(BaselineError, match=r"1 fault\n  - x: .* give float32 \(N, M\)"):
        Inputs(x)


def test_train_and_test_must_fit_each_other():
    train, logit = planted(rows=500)
    fitted = Baselines.fit(train, drawn(logit), SMALL)
    with pytest.raises(BaselineError) as error:
        fitted.predict(Inputs(np.zeros((2, 2), np.float32)))
    assert error.value.faults == [
        "test: 2 features, train has 4; give the same",
        "categorical: [2] in train, [] in test; give the same",
        "item: none in test, train has them; give the same",
    ]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.ones(3), r"label: shape \(3,\); give one per training row, \(2,\)"),
        (np.array([0, np.nan]), "label: holds NaN or infinity; drop those rows"),
        (np.array([1.0, 2.0]), r"label: holds the values \[1\.0, 2\.0\]; a binary task needs"),
    ],
)
def test_labels_that_cannot_be_learned_from_are_refused(label, message):
    inputs = Inputs(np.zeros((2, 1), np.float32))
    with pytest.raises(BaselineError, match=message):
        predicted(inputs, label, inputs, SMALL)


# --- configuration -----------------------------------------------------------------------------


def test_the_base_configuration_is_the_default_one():
    conf = yaml.safe_load(CONF.read_text(encoding="utf-8"))
    assert BaselinesConfig.model_validate(conf["baselines"]) == BaselinesConfig()


@pytest.mark.parametrize("name", ["boosting_l2", "popularity_prior_weight", "linear_l2"])
def test_regularisation_cannot_be_switched_off(name):
    with pytest.raises(ValidationError, match=rf"{name}\n.*greater than"):
        BaselinesConfig.model_validate({name: 0})
