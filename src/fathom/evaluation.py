"""How good predictions are, and how sure that is.

All metrics but the ECE are computed from sums over users and, for the AUC, from rows sorted once:
a bootstrap that resamples users costs a few products and a cumulative sum per resample. Users are
resampled rather than rows because the exposures of one user share that user's taste: treating them
as independent makes every interval too narrow.

Sources: NDCG with tied scores, McSherry and Najork (2008), "Computing information retrieval
performance measures efficiently in the presence of tied scores"; cluster bootstrap, Field and
Welsh (2007), "Bootstrapping clustered data"; ECE with bins of equal mass, Nixon et al. (2019),
"Measuring calibration in deep learning".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from fathom.config import Task

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
#: Metric → value; None where the metric is undefined, never NaN.
Metrics = dict[str, float | None]

#: The metric that training minimises, by task.
LOSS: dict[Task, str] = {"binary": "logloss", "regression": "rmse"}
#: Probabilities are kept this far from 0 and 1, so that one row costs at most 16.1 in logloss.
#: It is the resolution of float32 below 1.
CLIP = 1e-7
NDCG_DEPTH = 10
ECE_BINS = 20


class EvaluationError(ValueError):
    """The input of an evaluation is wrong; the message lists every fault at once."""

    def __init__(self, what: str, faults: list[str]) -> None:
        self.faults = faults
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        super().__init__(f"{what}: {count}\n" + "\n".join(f"  - {fault}" for fault in faults))


class EvaluationConfig(BaseModel):
    """``params:evaluation``.

    Args:
        min_slice_rows: slices with fewer rows are left out: their metrics are mostly noise.
        resamples: how often the bootstrap resamples the users.
        confidence: share of the resampled differences that an interval holds; it is two-sided,
            so one end alone is passed with half of the rest.
        seed: of the resampling.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    min_slice_rows: int = Field(default=2000, ge=1)
    resamples: int = Field(default=300, ge=20, le=100_000)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True, eq=False)
class Predictions:
    """What was predicted for each of N exposures and what came of it; checked on construction.

    Args:
        label: (N,) the outcome: 0 or 1, or any finite number for a regression.
        probability: (N,) the prediction: a probability, or the predicted value of a regression.
        user, request: (N,) integer codes of who was shown the row, in which ranked list.
        weight: (N,) how many exposures the row stands for (1 / inclusion probability); 1 if None.

    Raises:
        EvaluationError: names every wrong column at once.
    """

    label: Floats
    probability: Floats
    user: Ints
    request: Ints
    weight: Floats | None = None
    task: Task = "binary"

    def __post_init__(self) -> None:
        faults: list[str] = []
        for name in ("label", "probability", "user", "request", "weight"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _vector(name, getattr(self, name), faults))
        faults = faults or self._faults()
        if faults:
            raise EvaluationError("predictions", faults)

    def _faults(self) -> list[str]:
        columns = {"label": self.label, "probability": self.probability}
        if self.weight is not None:
            columns["weight"] = self.weight
        sizes = {name: column.size for name, column in columns.items()}
        sizes |= {"user": self.user.size, "request": self.request.size}
        faults = []
        if len(set(sizes.values())) > 1:
            faults.append(f"lengths differ: {sizes}; give one value per row in every column")
        if self.label.size == 0:
            faults.append("label: holds no rows; is the test window empty?")
        for name, column in columns.items():
            faults += _fault(name, column, ~np.isfinite(column), "not finite")
        if self.weight is not None:
            faults += _fault("weight", self.weight, self.weight <= 0, "not above 0")
        if self.task == "binary":
            p, y = self.probability, self.label
            faults += _fault("label", y, np.isfinite(y) & (y != 0) & (y != 1), "neither 0 nor 1")
            rule = "outside [0, 1] (pass probabilities, not logits)"
            faults += _fault("probability", p, np.isfinite(p) & ((p < 0) | (p > 1)), rule)
        return faults

    @cached_property
    def user_code(self) -> Ints:
        """(N,) users numbered 0 … U-1."""
        return np.unique(self.user, return_inverse=True)[1].astype(np.int64)

    @cached_property
    def row_weight(self) -> Floats:
        """(N,) ``weight``, or ones."""
        return np.ones(self.label.size) if self.weight is None else self.weight

    def where(self, mask: Mask) -> Predictions:
        """The rows of a boolean mask (N,)."""
        return Predictions(
            label=self.label[mask],
            probability=self.probability[mask],
            user=self.user[mask],
            request=self.request[mask],
            weight=None if self.weight is None else self.weight[mask],
            task=self.task,
        )


@dataclass(frozen=True)
class Slices:
    """Metrics by slice, and the row counts of the slices that are too small to tell."""

    metrics: dict[str, Metrics]
    left_out: dict[str, int]


@dataclass(frozen=True)
class Interval:
    """A metric of the challenger minus the champion's, and where resampled users put it."""

    difference: float
    lo: float
    hi: float


@dataclass(frozen=True, eq=False)
class Resampled:
    """Metrics by name (K) of ``everyone``, (K,), and of each draw of users, (R, K); else NaN."""

    names: list[str]
    everyone: Floats
    draws: Floats
    users: int


def metrics(predictions: Predictions) -> Metrics:
    """Measure predictions; ``row_weight`` counts except in ``rows`` and NDCG.

    Binary: ``auc``; ``logloss`` in nats; ``user_auc``, the AUC within each user averaged by
    exposures (users with one class left out); ``ndcg_at_10``; ``calibration``, sum predicted over
    sum observed; ``ece``, the mean gap between predicted and observed in 20 bins of equal mass.
    Regression: ``rmse``, ``mae``, ``calibration``, ``ndcg_at_10``. Both: ``rows``.

    NDCG is per list (the rows of one user in one request) with the label as gain (those below 0
    as 0); lists without a gain are left out. Tied scores share the mean discount of their
    positions: the expectation over all orders of the tie, so neither the row order nor a model
    that ties everything is favoured.
    """
    totals = UserSums(predictions)
    found: Metrics = {"rows": predictions.label.size}
    values = totals(np.ones(totals.users))
    found |= {name: _defined(value) for name, value in zip(totals.names, values, strict=True)}
    if predictions.task == "binary":
        mass, predicted, observed, _ = _bins(predictions, ECE_BINS)
        found["ece"] = float(np.abs(predicted - observed).sum() / mass.sum())
    return found


def slices(predictions: Predictions, masks: Mapping[str, Mask], min_rows: int = 1) -> Slices:
    """Measure the rows of each mask (N,); those with fewer than ``min_rows`` are only listed.

    Raises:
        EvaluationError: names every mask that is not boolean or not (N,).
    """
    rows = mask_rows(predictions, masks)
    kept = {name: mask for name, mask in masks.items() if rows[name] >= max(min_rows, 1)}
    return Slices(
        metrics={name: metrics(predictions.where(mask)) for name, mask in kept.items()},
        left_out={name: count for name, count in rows.items() if name not in kept},
    )


def reliability(predictions: Predictions, bins: int = ECE_BINS) -> list[dict[str, float]]:
    """Points of a calibration plot, by rising ``probability``.

    Bins hold equal mass, but equal predictions stay together, so there may be fewer.

    Returns:
        one ``{"probability", "observed", "rows"}`` (mean predicted, mean label, count) per bin.
    """
    mass, predicted, observed, rows = _bins(predictions, bins)
    points = zip(predicted / mass, observed / mass, rows, strict=True)
    return [{"probability": float(p), "observed": float(y), "rows": int(n)} for p, y, n in points]


def paired_interval(
    champion: Predictions, challenger: Predictions, config: EvaluationConfig
) -> dict[str, Interval | None]:
    """Bootstrap each metric's difference, challenger minus champion, by resampling users.

    Both models are measured on the same resampled users, so what makes a user hard to predict
    cancels. The interval is the central ``confidence`` of the resampled differences (percentile
    method). ECE is not compared: resampling biases it upwards. ``miscalibration``, the absolute
    logarithm of the calibration, is: 0 is best and twice too much as bad as half.

    Returns:
        an interval per metric; None where the metric is undefined or there is a single user.

    Raises:
        EvaluationError: the two were not made for the same rows in the same order.
    """
    _check_same_rows(champion, challenger)
    old, new = resampled(champion, config), resampled(challenger, config)
    at = new.names.index("calibration")

    def values(side: Floats) -> Floats:
        return np.concatenate([side, miscalibration(side[..., at : at + 1])], axis=-1)

    everyone = values(new.everyone) - values(old.everyone)
    draws = values(new.draws) - values(old.draws)
    names = [*new.names, "miscalibration"]
    return {
        name: interval(value, drawn, config) if new.users > 1 else None
        for name, value, drawn in zip(names, everyone, draws.T, strict=True)
    }


def miscalibration(calibration: Floats) -> Floats:
    """How far sums predicted are from those observed, as ``|log|``; NaN where not above 0."""
    found = np.full(calibration.shape, np.nan)
    np.log(calibration, out=found, where=calibration > 0)
    return np.asarray(np.abs(found))


def resampled(predictions: Predictions, config: EvaluationConfig) -> Resampled:
    """Measure predictions on all users, and on as many users drawn with replacement, many times.

    The draws follow from ``config`` and the number of users. So predictions of the same rows are
    measured on the same users, and whatever is computed of their metrics is paired.
    """
    totals = UserSums(predictions)
    users = totals.users
    generator = np.random.default_rng(config.seed)
    draws = np.empty((config.resamples, len(totals.names)))
    for draw in draws:
        drawn = generator.integers(users, size=users)
        draw[:] = totals(np.bincount(drawn, minlength=users).astype(np.float64))
    return Resampled(totals.names, totals(np.ones(users)), draws, users)


def interval(difference: float, draws: Floats, config: EvaluationConfig) -> Interval | None:
    """The central ``confidence`` of a difference's draws (R,); None where it is undefined."""
    known = draws[np.isfinite(draws)]
    if not np.isfinite(difference) or not known.size:
        return None
    tail = (1 - config.confidence) / 2
    lo, hi = np.quantile(known, (tail, 1 - tail))
    return Interval(float(difference), float(lo), float(hi))


class UserSums:
    """The metrics as a function of how often each user counts.

    Args of a call: (U,) counts, 1 for everyone or a resample's. Returns (K,) values in the order
    of ``names``, NaN where undefined.
    """

    def __init__(self, predictions: Predictions) -> None:
        self._of, self._user = predictions, predictions.user_code
        self._weight = predictions.row_weight
        self.users = int(self._user.max()) + 1
        ratios = _ratios(predictions, self.users)
        self._numerators, self._denominators = np.stack(list(ratios.values()), axis=1)
        self.names = list(ratios)
        self._together = np.zeros_like(self._user)
        self._pairs: _Pairs | None = None
        if predictions.task == "binary":
            self._pairs = _Pairs.of(predictions.label, predictions.probability, self._together)
            self.names.insert(0, "auc")

    def __call__(self, counts: Floats) -> Floats:
        values = _divide(self._numerators @ counts, self._denominators @ counts)
        if self._pairs is None:
            values[self.names.index("rmse")] **= 0.5
            return values
        weight = self._weight * counts[self._user]
        mass = weight[self._pairs.positive].sum() * weight[self._pairs.negative].sum()
        auc = self._pairs.won(weight).sum() / mass if mass else np.nan
        return np.concatenate(([auc], values))

    def influence(self) -> Floats:
        """(U, K) derivatives of the values by each user's count, at 1 for everyone.

        To first order a resample changes the values by its counts @ these, so that many slices
        are resampled at the price of a product. Those of the AUC are the clustered ones of
        Obuchowski (1997), "Nonparametric analysis of clustered ROC curve data".
        """
        total = self._denominators.sum(axis=1, keepdims=True)
        ratio = _divide(self._numerators.sum(axis=1, keepdims=True), total)
        parts = _divide(self._numerators - ratio * self._denominators, total)
        if self._pairs is None:
            rmse = self.names.index("rmse")
            parts[rmse] = _divide(parts[rmse], 2 * ratio[rmse] ** 0.5)  # of a square root
            return parts.T
        return np.column_stack([self._auc_influence(self._pairs), parts.T])

    def _auc_influence(self, pairs: _Pairs) -> Floats:
        of, weight, user = self._of, self._weight, self._user
        mirrored = _Pairs.of(1 - of.label, -of.probability, self._together)
        won, lost = pairs.won(weight), mirrored.won(weight)
        decided = _sums(user[pairs.positive], won, self.users)
        decided += _sums(user[mirrored.positive], lost, self.users)
        positives = _sums(user, weight * of.label, self.users)
        negatives = _sums(user, weight * (1 - of.label), self.users)
        mass = np.array([positives.sum() * negatives.sum()])
        auc = _divide(won.sum(keepdims=True), mass)
        shares = positives * negatives.sum() + negatives * positives.sum()
        return _divide(decided - auc * shares, mass)


@dataclass(frozen=True, eq=False)
class _Pairs:
    """All (positive, negative) pairs within groups, sorted once for any weights.

    positive (P,), negative (Q,) are row numbers, the latter ordered by group and score. For each
    positive the negatives of its group begin at ``first``, those tied with it at ``tied``, and
    those that score more at ``above``.
    """

    positive: Ints
    negative: Ints
    first: Ints
    tied: Ints
    above: Ints

    @classmethod
    def of(cls, label: Floats, score: Floats, group: Ints) -> _Pairs:
        rank = np.unique(score, return_inverse=True)[1].astype(np.int64)
        span = int(rank.max()) + 1
        key = group * span + rank
        order = np.argsort(key, kind="stable")
        positive, negative = order[label[order] > 0], order[label[order] <= 0]
        wins, losses = key[positive], key[negative]
        return cls(
            positive,
            negative,
            first=np.searchsorted(losses, group[positive] * span),
            tied=np.searchsorted(losses, wins),
            above=np.searchsorted(losses, wins, side="right"),
        )

    def won(self, weight: Floats) -> Floats:
        """Weight (P,) of the pairs each positive wins; a tie is half won."""
        mass = np.concatenate(([0.0], np.cumsum(weight[self.negative])))
        below = (mass[self.tied] + mass[self.above]) / 2 - mass[self.first]
        return weight[self.positive] * below


def _ratios(predictions: Predictions, users: int) -> dict[str, tuple[Floats, Floats]]:
    """Metrics that are a sum over users divided by another: name → both, (U,) each."""
    p, weight, user = predictions, predictions.row_weight, predictions.user_code

    def by_user(values: Floats, owner: Ints = user) -> Floats:
        return _sums(owner, values, users)

    mass = by_user(weight)
    calibration = (by_user(weight * p.probability), by_user(weight * p.label))
    gain, owner = _ndcg(p)
    ndcg = (by_user(gain, owner), by_user(np.ones_like(gain), owner))
    error = by_user(weight * _row_loss(p))
    if p.task == "regression":
        absolute = by_user(weight * np.abs(p.probability - p.label))
        return {
            "rmse": (error, mass),  # its square, until the division is done
            "mae": (absolute, mass),
            "ndcg_at_10": ndcg,
            "calibration": calibration,
        }
    pairs = _Pairs.of(p.label, p.probability, user)
    positives = by_user(weight * p.label)
    possible = positives * by_user(weight * (1 - p.label))
    auc = _divide(by_user(pairs.won(weight), user[pairs.positive]), possible)
    exposures = np.where(possible > 0, mass, 0.0)
    return {
        "logloss": (error, mass),
        "user_auc": (np.where(possible > 0, auc, 0.0) * exposures, exposures),
        "ndcg_at_10": ndcg,
        "calibration": calibration,
    }


def _ndcg(predictions: Predictions) -> tuple[Floats, Ints]:
    """NDCG of every ranked list that has a gain, and the user (code) it was shown to."""
    p, user = predictions, predictions.user_code
    gain = np.maximum(p.label, 0.0)
    order = np.lexsort((-p.probability, p.request, user))
    ideal = np.lexsort((-gain, p.request, user))
    new_list = (np.diff(p.request[order]) != 0) | (np.diff(user[order]) != 0)
    starts = np.concatenate(([True], new_list))
    ranked = np.cumsum(starts) - 1
    position = np.arange(order.size) - np.flatnonzero(starts)[ranked]
    discount = np.where(position < NDCG_DEPTH, 1 / np.log2(position + 2.0), 0.0)
    new_score = np.concatenate(([True], np.diff(p.probability[order]) != 0))
    tie = np.cumsum(starts | new_score) - 1
    shared = (np.bincount(tie, discount) / np.bincount(tie))[tie]
    best = np.bincount(ranked, gain[ideal] * discount)
    found = np.bincount(ranked, gain[order] * shared)
    kept = best > 0
    return found[kept] / best[kept], user[order][starts][kept]


def _row_loss(predictions: Predictions) -> Floats:
    """(N,) logloss in nats, or the squared error of a regression."""
    y = predictions.label
    if predictions.task == "regression":
        return np.square(predictions.probability - y)
    p = np.clip(predictions.probability, CLIP, 1 - CLIP)
    return -(y * np.log(p) + (1 - y) * np.log1p(-p))


def _bins(predictions: Predictions, bins: int) -> tuple[Floats, Floats, Floats, Ints]:
    """Mass, weighted sum predicted, weighted sum observed and rows of each bin that is filled.

    A row's bin follows from the mass of the smaller predictions, half of the equal ones included,
    so that equal predictions share a bin whatever the order of the rows.
    """
    weight = predictions.row_weight
    value, code = np.unique(predictions.probability, return_inverse=True)
    mass = np.bincount(code, weight)
    middle = np.cumsum(mass) - mass / 2
    bin_of_value = np.minimum((middle / mass.sum() * bins).astype(np.int64), bins - 1)
    filled, bin_ = np.unique(bin_of_value, return_inverse=True)
    row_bin, size = bin_[code], filled.size
    return (
        _sums(row_bin, weight, size),
        _sums(bin_, mass * value, size),
        _sums(row_bin, weight * predictions.label, size),
        np.bincount(row_bin).astype(np.int64),
    )


def _sums(group: Ints, values: Floats, groups: int) -> Floats:
    """Sum of ``values`` in each of the groups 0 … ``groups`` - 1."""
    return np.bincount(group, values, minlength=groups).astype(np.float64, copy=False)


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    """Their quotient, NaN where the denominator is 0; it may be broadcast."""
    quotient = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=quotient, where=denominator != 0)
    return quotient


def _defined(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _vector(name: str, values: Any, faults: list[str]) -> Any:
    array, codes = np.asarray(values), name in {"user", "request"}
    if array.ndim != 1:
        faults.append(f"{name}: shape {array.shape}; give one value per row, (N,)")
    elif array.dtype.kind not in ("iu" if codes else "fiub"):
        remedy = "give integer codes, as of np.unique's inverse" if codes else "give numbers"
        faults.append(f"{name}: dtype {array.dtype}; {remedy}")
    else:
        array = array.astype(np.int64 if codes else np.float64, copy=False)
    return array


def _fault(name: str, values: Floats, bad: Mask, rule: str) -> list[str]:
    rows = np.flatnonzero(bad)
    if not rows.size:
        return []
    first = f"the first is {values[rows[0]]} at row {rows[0]}"
    return [f"{name}: {rows.size} of {values.size} values are {rule}; {first}"]


def mask_rows(predictions: Predictions, masks: Mapping[str, Mask]) -> dict[str, int]:
    shape = predictions.label.shape
    faults = [
        f"{name}: {mask.dtype} of shape {mask.shape}; give bool of shape {shape}"
        for name, mask in masks.items()
        if mask.dtype != np.bool_ or mask.shape != shape
    ]
    if faults:
        raise EvaluationError("slices", faults)
    return {name: int(mask.sum()) for name, mask in masks.items()}


def _check_same_rows(champion: Predictions, challenger: Predictions) -> None:
    faults = []
    if champion.task != challenger.task:
        faults.append(f"task: {champion.task} and {challenger.task}")
    for name in ("label", "user", "request", "row_weight"):
        old, new = getattr(champion, name), getattr(challenger, name)
        if old.shape != new.shape:
            faults.append(f"{name}: {old.size} and {new.size} rows")
        elif not np.array_equal(old, new):
            faults.append(f"{name}: differs first at row {np.flatnonzero(old != new)[0]}")
    if faults:
        remedy = "score both on the same test rows in the same order"
        raise EvaluationError(f"champion and challenger ({remedy})", faults)
