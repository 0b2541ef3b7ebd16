"""What a model has to beat: simple predictors fitted on the same training rows and features.

======================  ==========================================================
``constant``            the mean label
``popularity``          the item's smoothed mean label
``logistic_regression`` linear in log-scaled numbers and one-hot categoricals
                        (``ridge`` when the label is a number)
``gradient_boosting``   histogram-based boosted trees
======================  ==========================================================

Each function fits on training rows and predicts others: (N,) float64, the probabilities of a
binary task strictly between 0 and 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from fathom.evaluation import CLIP, Floats, Ints, Task

Matrix = npt.NDArray[np.float32]

#: Trees put a feature into at most 255 bins, so a categorical has at most as many values.
MAX_CATEGORIES = 255


class BaselineError(ValueError):
    """The input of a baseline is wrong; the message lists every fault at once."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        super().__init__(f"baselines: {count}\n" + "\n".join(f"  - {fault}" for fault in faults))


class BaselinesConfig(BaseModel):
    """``params:baselines``.

    Args:
        seed: of gradient boosting, which bins features on a sample of the rows.
        popularity_prior_weight: how many rows of the mean label an item starts with.
        linear_l2: weight of the squared coefficients against the mean loss of a row. It also
            keeps the solver's Hessian well-conditioned in float32: 1e-6 is too little for that.
        boosting_iterations, boosting_learning_rate, boosting_leaves, boosting_min_leaf_rows:
            number, step and size of the trees.
        boosting_l2: weight of the squared leaf values. It must not be 0: on the default data
            (1.3 million rows, 59 features) trees without it reach leaves of a single class, some
            probabilities saturate at exactly 1, and logloss rises from 0.233 to 0.25.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = Field(default=0, ge=0)
    popularity_prior_weight: float = Field(default=20.0, gt=0)
    linear_l2: float = Field(default=1e-4, ge=1e-5)
    boosting_iterations: int = Field(default=100, ge=1, le=10_000)
    boosting_learning_rate: float = Field(default=0.1, gt=0, le=1)
    boosting_leaves: int = Field(default=31, ge=2)
    boosting_min_leaf_rows: int = Field(default=100, ge=1)
    boosting_l2: float = Field(default=20.0, gt=0)


@dataclass(frozen=True, eq=False)
class Inputs:
    """What the baselines read of N exposures; checked on construction.

    Args:
        x: (N, M) float32 features, NaN where missing.
        categorical: the columns of ``x`` that hold small integer codes, -1 where missing.
        item: (N,) integer codes of the items, any below 0 for unknown; None for no popularity.

    Raises:
        BaselineError: names every fault at once.
    """

    x: Matrix
    categorical: tuple[int, ...] = ()
    item: Ints | None = None

    def __post_init__(self) -> None:
        x = self.x
        if x.ndim != 2 or x.dtype != np.float32:
            raise BaselineError([f"x: {x.dtype} of shape {x.shape}; give float32 (N, M)"])
        columns = x.shape[1]
        outside = [column for column in self.categorical if not 0 <= column < columns]
        faults = [f"categorical: no column {c}; x has columns 0 to {columns - 1}" for c in outside]
        for number in np.flatnonzero(np.isinf(x).any(axis=0)):
            faults.append(f"x: column {number} holds infinity; give NaN where a value is missing")
        for column in sorted(set(self.categorical).difference(outside)):
            codes = x[np.isfinite(x[:, column]), column]
            if np.any(codes != np.floor(codes)):
                faults.append(f"x: column {column} is categorical but holds fractions; give codes")
            elif np.any(codes >= MAX_CATEGORIES):
                limit = f"holds code {int(codes.max())}, the largest is {MAX_CATEGORIES - 1}"
                faults.append(f"x: column {column} {limit}; leave it out or merge rare values")
        item = self.item
        if item is not None and (item.shape != x.shape[:1] or item.dtype.kind != "i"):
            wanted = f"give integers of shape {x.shape[:1]}"
            faults.append(f"item: {item.dtype} of shape {item.shape}; {wanted}")
        if faults:
            raise BaselineError(faults)


def predict_baselines(
    train: Inputs, label: Floats, test: Inputs, config: BaselinesConfig, task: Task = "binary"
) -> dict[str, Floats]:
    """Fit every baseline on the training rows and predict the test rows.

    Args:
        label: (N,) of the training rows; 0 or 1 in a binary task.

    Returns:
        name → predictions (rows of ``test``,), in the order of the module's table; popularity is
        absent if the items are.

    Raises:
        BaselineError: train, label and test do not fit each other.
    """
    _check(train, label, test, task)
    found = {"constant": constant(label, test.x.shape[0], task)}
    if train.item is not None and test.item is not None:
        weight = config.popularity_prior_weight
        found["popularity"] = popularity(train.item, label, test.item, weight, task)
    linear = {"binary": "logistic_regression", "regression": "ridge"}[task]
    found[linear] = (logistic_regression if task == "binary" else ridge)(train, label, test, config)
    found["gradient_boosting"] = gradient_boosting(train, label, test, config, task)
    return found


def constant(label: Floats, rows: int, task: Task = "binary") -> Floats:
    """The mean training label, ``rows`` times."""
    return _bounded(np.full(rows, np.mean(label, dtype=np.float64)), task)


def popularity(
    train_item: Ints, label: Floats, item: Ints, prior_weight: float = 20.0, task: Task = "binary"
) -> Floats:
    """Mean label of each item, drawn to the overall mean: (Σ y + mean·w) / (rows + w).

    Args:
        train_item, label: (N,) of the training rows.
        item: (K,) to predict; those not in training, and codes below 0, get the overall mean.
        prior_weight: w, in rows.
    """
    mean = float(np.mean(label, dtype=np.float64))
    items, code = np.unique(train_item, return_inverse=True)
    rate = np.bincount(code, label) + mean * prior_weight
    rate /= np.bincount(code) + prior_weight
    place = np.minimum(np.searchsorted(items, item), items.size - 1)
    known = (items[place] == item) & (item >= 0)
    return _bounded(np.where(known, rate[place], mean), task)


def logistic_regression(
    train: Inputs, label: Floats, test: Inputs, config: BaselinesConfig
) -> Floats:
    """L2-regularised logistic regression on the design of `_Design`."""
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    design = _Design(train)
    inverse = 1 / (config.linear_l2 * label.size)
    # Few columns and many rows: a Newton step costs one matrix product, and about six converge.
    model = LogisticRegression(C=inverse, solver="newton-cholesky", max_iter=50)
    # Thin products gain little from a second BLAS thread, and on a busy machine the threads wait
    # for each other: 1.25 million rows by 113 columns took 6 s of one core, or 48 s of two.
    with threadpool_limits(limits=1, user_api="blas"):
        model.fit(design(train), label)
        return _bounded(model.predict_proba(design(test))[:, 1], "binary")


def ridge(train: Inputs, label: Floats, test: Inputs, config: BaselinesConfig) -> Floats:
    """L2-regularised least squares on the design of `_Design`."""
    from sklearn.linear_model import Ridge

    design = _Design(train)
    # Ridge sums the squared errors, so a weight against their mean grows with the rows.
    model = Ridge(alpha=config.linear_l2 * label.size, solver="cholesky")
    model.fit(design(train), label)
    return _bounded(model.predict(design(test)), "regression")


def gradient_boosting(
    train: Inputs, label: Floats, test: Inputs, config: BaselinesConfig, task: Task = "binary"
) -> Floats:
    """Histogram-based gradient boosting (as LightGBM, Ke et al. 2017); NaN has a side of its own.

    Features are taken as they are: trees need no scaling.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    options: dict[str, Any] = {
        "max_iter": config.boosting_iterations,
        "learning_rate": config.boosting_learning_rate,
        "max_leaf_nodes": config.boosting_leaves,
        "min_samples_leaf": config.boosting_min_leaf_rows,
        "l2_regularization": config.boosting_l2,
        "categorical_features": sorted(set(train.categorical)) or None,
        "early_stopping": False,
        "random_state": config.seed,
    }
    if task == "regression":
        model = HistGradientBoostingRegressor(**options).fit(_with_nan(train), label)
        return _bounded(model.predict(_with_nan(test)), task)
    model = HistGradientBoostingClassifier(**options).fit(_with_nan(train), label)
    return _bounded(model.predict_proba(_with_nan(test))[:, 1], task)


class _Design:
    """Features → the matrix of a linear model, with statistics of the training rows only.

    Numbers become sign(x)·log(1 + |x|), standardised, the mean where missing, and a column that
    says so if any was missing in training. Categoricals become one-hot; a missing code and one
    not seen in training are all zeros.
    """

    def __init__(self, train: Inputs) -> None:
        columns = np.arange(train.x.shape[1])
        self._categorical = sorted(set(train.categorical))
        self._numeric = np.setdiff1d(columns, self._categorical)
        values, missing = self._logarithms(train)
        seen = np.maximum(missing.shape[0] - missing.sum(axis=0), 1)
        self._mean = values.sum(axis=0, dtype=np.float64) / seen
        squares = np.einsum("nm,nm->m", values, values, dtype=np.float64)
        deviation = np.sqrt(np.maximum(squares / seen - self._mean**2, 0))
        # A constant column's deviation is rounding error; scaling by it would be noise.
        self._scale = np.where(deviation > 1e-4, deviation, 1.0)
        self._with_missing = np.flatnonzero(missing.any(axis=0))
        self._codes = {
            column: [code for code in np.unique(train.x[:, column]) if code >= 0]
            for column in self._categorical
        }

    def __call__(self, inputs: Inputs) -> Matrix:
        """(N, numbers + missing indicators + categories) float32."""
        values, missing = self._logarithms(inputs)
        values -= self._mean.astype(np.float32)
        values /= self._scale.astype(np.float32)
        values[missing] = 0
        hot = [
            inputs.x[:, [column]] == np.asarray(codes, dtype=np.float32)
            for column, codes in self._codes.items()
        ]
        parts = (values, missing[:, self._with_missing], *hot)
        return np.concatenate(parts, axis=1, dtype=np.float32)

    def _logarithms(self, inputs: Inputs) -> tuple[Matrix, npt.NDArray[np.bool_]]:
        """Log-scaled numbers (N, numeric columns), 0 where missing, and where that is."""
        x = inputs.x[:, self._numeric]
        values = np.abs(x)
        np.log1p(values, out=values)
        np.copysign(values, x, out=values)
        missing = np.isnan(values)
        values[missing] = 0
        return values, missing


def _with_nan(inputs: Inputs) -> Matrix:
    """Features with NaN in place of negative codes."""
    if not inputs.categorical:
        return inputs.x
    x = inputs.x.copy()
    for column in inputs.categorical:
        x[x[:, column] < 0, column] = np.nan
    return x


def _bounded(prediction: npt.NDArray[Any], task: Task) -> Floats:
    values = np.asarray(prediction, dtype=np.float64)
    return np.clip(values, CLIP, 1 - CLIP) if task == "binary" else values


def _check(train: Inputs, label: Floats, test: Inputs, task: Task) -> None:
    rows, columns = train.x.shape
    faults = []
    if label.shape != (rows,):
        faults.append(f"label: shape {label.shape}; give one per training row, ({rows},)")
    elif not np.isfinite(label).all():
        faults.append("label: holds NaN or infinity; drop those rows")
    elif task == "binary" and not np.array_equal(np.unique(label), (0, 1)):
        values = np.unique(label)[:5].tolist()
        faults.append(f"label: holds the values {values}; a binary task needs both 0 and 1")
    if test.x.shape[1] != columns:
        faults.append(f"test: {test.x.shape[1]} features, train has {columns}; give the same")
    if set(test.categorical) != set(train.categorical):
        both = f"{sorted(train.categorical)} in train, {sorted(test.categorical)} in test"
        faults.append(f"categorical: {both}; give the same")
    if faults:
        raise BaselineError(faults)
