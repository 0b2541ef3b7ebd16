"""How good predictions are, how sure that is, and whether a challenger may become the champion.

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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

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


class GateConfig(BaseModel):
    """``params:gate``: what a challenger must show before it becomes the champion.

    Args:
        calibration_lo, calibration_hi: bounds of the sum predicted over the sum observed.
        baselines: names of baselines to beat in loss (logloss or rmse) and AUC.
        loss_margin: the challenger's loss may exceed the champion's by less than this: the upper
            end of the interval of the difference counts. 0 asks for a proven improvement.
        auc_margin: the same for a lower AUC.
        slice_margin: in no slice may the loss exceed the champion's by more than this share.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    calibration_lo: float = Field(default=0.8, gt=0)
    calibration_hi: float = Field(default=1.25, gt=0)
    baselines: tuple[str, ...] = ("constant", "popularity")
    loss_margin: float = Field(default=0.002, ge=0)
    auc_margin: float = Field(default=0.002, ge=0)
    slice_margin: float = Field(default=0.05, ge=0)

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.calibration_lo >= self.calibration_hi:
            raise ValueError(
                f"calibration_lo {self.calibration_lo} must be below "
                f"calibration_hi {self.calibration_hi}"
            )
        return self


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


@dataclass(frozen=True, eq=False)
class Candidate:
    """A version of the model and its predictions on the test rows."""

    version: str
    predictions: Predictions


@dataclass(frozen=True)
class Verdict:
    """Whether the challenger is fit to be champion, and every check in words."""

    promoted: bool
    reasons: list[str]


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
    totals = _UserSums(predictions)
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
    rows = _mask_rows(predictions, masks)
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
    method). ECE is not compared: resampling biases it upwards.

    Returns:
        an interval per metric; None where the metric is undefined or there is a single user.

    Raises:
        EvaluationError: the two were not made for the same rows in the same order.
    """
    _check_same_rows(champion, challenger)
    old, new = resampled(champion, config), resampled(challenger, config)
    everyone, draws = new.everyone - old.everyone, new.draws - old.draws
    return {
        name: interval(value, drawn, config) if new.users > 1 else None
        for name, value, drawn in zip(new.names, everyone, draws.T, strict=True)
    }


def resampled(predictions: Predictions, config: EvaluationConfig) -> Resampled:
    """Measure predictions on all users, and on as many users drawn with replacement, many times.

    The draws follow from ``config`` and the number of users. So predictions of the same rows are
    measured on the same users, and whatever is computed of their metrics is paired.
    """
    totals = _UserSums(predictions)
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


def gate(
    challenger: Candidate,
    champion: Candidate | None,
    baselines: Mapping[str, Metrics],
    masks: Mapping[str, Mask],
    config: GateConfig,
    evaluation: EvaluationConfig,
) -> Verdict:
    """Decide whether the challenger becomes the champion.

    It must have defined metrics and calibration within bounds, and beat the named baselines.
    Against a champion it must also be non-inferior: no worse by more than a margin at the
    unfavourable end of the interval, overall, and as measured in every slice. An equally good
    challenger is promoted, since it has seen newer data. The champion itself passes at once.

    Args:
        champion: the current one on the same rows; None lets the absolute bounds decide alone.
        baselines: `metrics` of each baseline on the same rows.
        masks: slice name → rows (N,).

    Returns:
        the verdict with one reason for every check, passed or failed.

    Raises:
        EvaluationError: champion and challenger differ in rows, or a mask does not fit them.
    """
    if champion is not None and champion.version == challenger.version:
        reason = f"pass: version {challenger.version} is already champion; nothing to compare"
        return Verdict(True, [reason])
    task = challenger.predictions.task
    measured = metrics(challenger.predictions)
    checks = [*_absolute(measured, task, config), *_against_baselines(measured, baselines, config)]
    if champion is None:
        checks.append((True, "there is no champion yet: the absolute bounds decide alone"))
    else:
        intervals = paired_interval(champion.predictions, challenger.predictions, evaluation)
        checks += _non_inferior(intervals, config)
        sides = (challenger.predictions, champion.predictions)
        checks += _in_slices(*sides, masks, config, evaluation.min_slice_rows)
    reasons = [f"{'pass' if passed else 'fail'}: {text}" for passed, text in checks]
    return Verdict(all(passed for passed, _ in checks), reasons)


_Check = tuple[bool, str]


def _absolute(measured: Metrics, task: Task, config: GateConfig) -> Iterator[_Check]:
    needed = [LOSS[task], "calibration"] + (["auc"] if task == "binary" else [])
    undefined = [name for name in needed if measured[name] is None]
    if undefined:
        reason = "the test rows hold a single outcome or labels that sum to 0"
        yield False, f"{', '.join(undefined)} undefined: {reason}"
    else:
        shown = ", ".join(f"{name} {measured[name]:.5f}" for name in needed)
        yield True, f"metrics are defined: {shown}"
    ratio, bounds = measured["calibration"], f"[{config.calibration_lo}, {config.calibration_hi}]"
    if ratio is not None:
        within = config.calibration_lo <= ratio <= config.calibration_hi
        yield within, f"calibration {ratio:.4f} is {'within' if within else 'outside'} {bounds}"


def _against_baselines(
    measured: Metrics, baselines: Mapping[str, Metrics], config: GateConfig
) -> Iterator[_Check]:
    for baseline in config.baselines:
        if baseline not in baselines:
            known = ", ".join(baselines) or "none"
            yield False, f"baseline {baseline} was not measured; measured: {known}"
            continue
        for name in sorted(measured.keys() & {"logloss", "rmse", "auc"}):
            ours, theirs = measured[name], baselines[baseline].get(name)
            if ours is None or theirs is None:
                yield False, f"{name} {ours} against {baseline}'s {theirs}: undefined"
                continue
            beaten = ours > theirs if name == "auc" else ours < theirs
            relation = "beats" if beaten else "does not beat"
            yield beaten, f"{name} {ours:.5f} {relation} {baseline}'s {theirs:.5f}"


def _non_inferior(intervals: Mapping[str, Interval | None], config: GateConfig) -> Iterator[_Check]:
    loss, auc = config.loss_margin, config.auc_margin
    for name, sign, margin in (("logloss", 1, loss), ("rmse", 1, loss), ("auc", -1, auc)):
        interval = intervals.get(name)
        if interval is not None:
            worst = interval.hi if sign > 0 else interval.lo
            text = f"{name} differs from the champion's by {interval.difference:+.5f}, at worst by"
            yield sign * worst < margin, f"{text} {worst:+.5f}; the margin is {sign * margin:+.5f}"
        elif name in intervals:
            yield False, f"{name} against the champion is undefined: needs 2 users and 2 outcomes"


def _in_slices(
    challenger: Predictions,
    champion: Predictions,
    masks: Mapping[str, Mask],
    config: GateConfig,
    min_rows: int,
) -> Iterator[_Check]:
    """One failed check per slice that got worse, or one passed check for all of them."""
    name, margin = LOSS[challenger.task], f"the margin is {config.slice_margin:+.1%}"
    rows = _mask_rows(challenger, masks)
    excess = {}
    for part in (part for part in masks if rows[part] >= min_rows):
        ours, theirs = _loss(challenger.where(masks[part])), _loss(champion.where(masks[part]))
        excess[part] = (ours - theirs) / max(theirs, CLIP)
        if excess[part] > config.slice_margin:
            text = f"slice {part} ({rows[part]} rows): {name} {ours:.5f} against the champion's"
            yield False, f"{text} {theirs:.5f} is {excess[part]:+.1%}; {margin}"
    small = ", ".join(f"{part} ({rows[part]})" for part in masks if part not in excess)
    left_out = f"; left out for fewer than {min_rows} rows: {small}" if small else ""
    worst = max(excess, key=lambda part: excess[part], default=None)
    if worst is None:
        yield True, f"no slice to compare{left_out}"
    elif excess[worst] <= config.slice_margin:
        text = f"{name} against the champion's in the worst of {len(excess)} slices, {worst}, is"
        yield True, f"{text} {excess[worst]:+.1%}; {margin}{left_out}"


class _UserSums:
    """The metrics as a function of how often each user counts.

    Args of a call: (U,) counts, 1 for everyone or a resample's. Returns (K,) values in the order
    of ``names``, NaN where undefined.
    """

    def __init__(self, predictions: Predictions) -> None:
        self._user, self._weight = predictions.user_code, predictions.row_weight
        self.users = int(self._user.max()) + 1
        ratios = _ratios(predictions, self.users)
        self._numerators, self._denominators = np.stack(list(ratios.values()), axis=1)
        self.names = list(ratios)
        self._pairs: _Pairs | None = None
        if predictions.task == "binary":
            together = np.zeros_like(self._user)
            self._pairs = _Pairs.of(predictions.label, predictions.probability, together)
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


def _loss(predictions: Predictions) -> float:
    loss = float(np.average(_row_loss(predictions), weights=predictions.row_weight))
    return loss**0.5 if predictions.task == "regression" else loss


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


def _mask_rows(predictions: Predictions, masks: Mapping[str, Mask]) -> dict[str, int]:
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
