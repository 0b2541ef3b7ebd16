"""What a model has to beat: simple predictors fitted on the same training rows and features.

======================  ==========================================================
``constant``            the mean label
``popularity``          the item's smoothed mean label
``logistic_regression`` linear in log-scaled numbers and one-hot categoricals
                        (``ridge`` when the label is a number)
``gradient_boosting``   histogram-based boosted trees
======================  ==========================================================

Each is fitted on training rows and then predicts others: (N,) float64, the probabilities of a
binary task strictly between 0 and 1. They can be kept in a file, so that a new week is predicted
without fitting them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from fathom.config import Task
from fathom.evaluation import CLIP, Floats, Ints

Matrix = npt.NDArray[np.float32]

#: Trees put a feature into at most 255 bins, so a categorical has at most as many values.
MAX_CATEGORIES = 255


FILE = "baselines.skops"
#: What a file of baselines may hold beside numbers, text and scikit-learn's own linear models.
_TRUSTED = [
    *(
        f"fathom.baselines.{name}"
        for name in ("Baselines", "Boosting", "Constant", "Linear", "Popularity", "_Design")
    ),
    "functools.partial",
    "sklearn.ensemble._hist_gradient_boosting.predictor.TreePredictor",
    "sklearn.utils.validation.check_array",
]


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


@dataclass(frozen=True, eq=False)
class Baselines:
    """Fitted baselines by name, in the order of the module's table.

    Args:
        models: each predicts `Inputs` like those that it was fitted on.
        columns, categorical: the number of those inputs' features, and which are codes.
        codes: of the caller's own, kept beside: the values that its codes stand for, by column.
    """

    models: Mapping[str, Constant | Popularity | Linear | Boosting]
    columns: int
    categorical: tuple[int, ...] = ()
    codes: Mapping[str, list[str]] = field(default_factory=dict)

    @classmethod
    def fit(
        cls,
        train: Inputs,
        label: Floats,
        config: BaselinesConfig,
        task: Task = "binary",
        codes: Mapping[str, list[str]] | None = None,
    ) -> Baselines:
        """Fit every baseline on the training rows; popularity is absent if the items are.

        Args:
            label: (N,), 0 or 1 in a binary task.

        Raises:
            BaselineError: the label does not fit the rows or the task; names every fault.
        """
        _check(train, label, task)
        models: dict[str, Constant | Popularity | Linear | Boosting] = {
            "constant": Constant.fit(label, task)
        }
        if train.item is not None:
            weight = config.popularity_prior_weight
            models["popularity"] = Popularity.fit(train.item, label, weight, task)
        linear = {"binary": "logistic_regression", "regression": "ridge"}[task]
        models[linear] = Linear.fit(train, label, config, task)
        models["gradient_boosting"] = Boosting.fit(train, label, config, task)
        return cls(models, train.x.shape[1], tuple(sorted(set(train.categorical))), codes or {})

    def predict(self, test: Inputs) -> dict[str, Floats]:
        """Predictions by name, each (rows of ``test``,).

        Raises:
            BaselineError: the inputs are not like those of the fit; names every fault.
        """
        faults = []
        if test.x.shape[1] != self.columns:
            found = f"{test.x.shape[1]} features, train has {self.columns}"
            faults.append(f"test: {found}; give the same")
        if set(test.categorical) != set(self.categorical):
            both = f"{sorted(self.categorical)} in train, {sorted(test.categorical)} in test"
            faults.append(f"categorical: {both}; give the same")
        if test.item is None and "popularity" in self.models:
            faults.append("item: none in test, train has them; give the same")
        if faults:
            raise BaselineError(faults)
        return {name: model.predict(test) for name, model in self.models.items()}

    def save(self, folder: Path) -> None:
        """Write `FILE` into a folder, without pickling (skops)."""
        import skops.io

        folder.mkdir(parents=True, exist_ok=True)
        skops.io.dump(self, folder / FILE)

    @classmethod
    def load(cls, folder: Path) -> Baselines:
        """Read what `save` wrote; nothing but the types of `_TRUSTED` is made of it.

        Raises:
            skops.io.exceptions.UntrustedTypesFoundException: the file names any other type.
        """
        import skops.io

        loaded: Baselines = skops.io.load(folder / FILE, trusted=_TRUSTED)
        return loaded


@dataclass(frozen=True, eq=False)
class Constant:
    """The mean training label."""

    mean: float
    task: Task

    @classmethod
    def fit(cls, label: Floats, task: Task = "binary") -> Constant:
        return cls(float(np.mean(label, dtype=np.float64)), task)

    def predict(self, test: Inputs) -> Floats:
        return _bounded(np.full(test.x.shape[0], self.mean), self.task)


@dataclass(frozen=True, eq=False)
class Popularity:
    """Mean label of each item, drawn to the overall mean: (Σ y + mean·w) / (rows + w).

    Items that were not in training, and codes below 0, get the overall mean.

    Args:
        items, rates: (K,) the training rows' items, rising, and their rates.
    """

    items: Ints
    rates: Floats
    mean: float
    task: Task

    @classmethod
    def fit(
        cls, item: Ints, label: Floats, prior_weight: float = 20.0, task: Task = "binary"
    ) -> Popularity:
        """From the items and labels (N,) of the training rows; the weight w is in rows."""
        mean = float(np.mean(label, dtype=np.float64))
        items, code = np.unique(item, return_inverse=True)
        rates: Any = np.bincount(code, label) + mean * prior_weight
        rates /= np.bincount(code) + prior_weight
        return cls(items, rates, mean, task)

    def predict(self, test: Inputs) -> Floats:
        assert test.item is not None
        place = np.minimum(np.searchsorted(self.items, test.item), self.items.size - 1)
        known = (self.items[place] == test.item) & (test.item >= 0)
        return _bounded(np.where(known, self.rates[place], self.mean), self.task)


@dataclass(frozen=True, eq=False)
class Linear:
    """Logistic regression, or ridge for numbers, with L2, on the design of `_Design`."""

    design: _Design
    model: Any
    task: Task

    @classmethod
    def fit(
        cls, train: Inputs, label: Floats, config: BaselinesConfig, task: Task = "binary"
    ) -> Linear:
        from sklearn.linear_model import LogisticRegression, Ridge

        design = _Design(train)
        penalty = config.linear_l2 * label.size
        if task == "regression":
            # Ridge sums the squared errors, so a weight against their mean grows with the rows.
            model = Ridge(alpha=penalty, solver="cholesky")
        else:
            # Few columns and many rows: a Newton step costs one matrix product; about six converge.
            model = LogisticRegression(C=1 / penalty, solver="newton-cholesky", max_iter=50)
        with _one_blas_thread():
            model.fit(design(train), label)
        return cls(design, model, task)

    def predict(self, test: Inputs) -> Floats:
        with _one_blas_thread():
            return _bounded(_predicted(self.model, self.design(test), self.task), self.task)


@dataclass(frozen=True, eq=False)
class Boosting:
    """Histogram-based gradient boosting (as LightGBM, Ke et al. 2017); NaN has a side of its own.

    Features are taken as they are: trees need no scaling.
    """

    model: Any
    task: Task

    @classmethod
    def fit(
        cls, train: Inputs, label: Floats, config: BaselinesConfig, task: Task = "binary"
    ) -> Boosting:
        from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

        kinds = {
            "binary": HistGradientBoostingClassifier,
            "regression": HistGradientBoostingRegressor,
        }
        model = kinds[task](
            max_iter=config.boosting_iterations,
            learning_rate=config.boosting_learning_rate,
            max_leaf_nodes=config.boosting_leaves,
            min_samples_leaf=config.boosting_min_leaf_rows,
            l2_regularization=config.boosting_l2,
            categorical_features=sorted(set(train.categorical)) or None,
            early_stopping=False,
            random_state=config.seed,
        )
        return cls(model.fit(_with_nan(train), label), task)

    def predict(self, test: Inputs) -> Floats:
        return _bounded(_predicted(self.model, _with_nan(test), self.task), self.task)


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


def _predicted(model: Any, x: Matrix, task: Task) -> npt.NDArray[Any]:
    predicted: npt.NDArray[Any]
    predicted = model.predict(x) if task == "regression" else model.predict_proba(x)[:, 1]
    return predicted


def _one_blas_thread() -> Any:
    """Thin products gain little from a second BLAS thread.

    On a busy machine the threads wait for each other: 1.25 million rows by 113 columns took 6 s of
    one core, or 48 s of two.
    """
    from threadpoolctl import threadpool_limits

    return threadpool_limits(limits=1, user_api="blas")


def _bounded(prediction: npt.NDArray[Any], task: Task) -> Floats:
    values = np.asarray(prediction, dtype=np.float64)
    return np.clip(values, CLIP, 1 - CLIP) if task == "binary" else values


def _check(train: Inputs, label: Floats, task: Task) -> None:
    rows = train.x.shape[0]
    faults = []
    if label.shape != (rows,):
        faults.append(f"label: shape {label.shape}; give one per training row, ({rows},)")
    elif not np.isfinite(label).all():
        faults.append("label: holds NaN or infinity; drop those rows")
    elif task == "binary" and not np.array_equal(np.unique(label), (0, 1)):
        values = np.unique(label)[:5].tolist()
        faults.append(f"label: holds the values {values}; a binary task needs both 0 and 1")
    if faults:
        raise BaselineError(faults)
