"""What a comparison's scores say: metrics, intervals, slices, and a verdict on each claim.

The interval of a difference between two models holds two kinds of chance. Users are resampled, the
same for both models (`fathom.evaluation`). And of each model's S seeds as many are drawn with
replacement, for each model by itself; a metric is its mean over those drawn. How far that lies from
the mean over all seeds is stretched by sqrt(S / (S - 1)): a bootstrap of so few is too narrow by
that factor.

Legend: N test rows, R resamples, S seeds.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fathom.comparison.claims import (
    CLAIMS,
    Claim,
    Side,
    Step,
    Verdict,
    equal_quality,
    equal_size,
    plain,
    verdict_on,
)
from fathom.comparison.trainings import APART, JOINT, Trainings
from fathom.evaluation import (
    LOSS,
    EvaluationConfig,
    Floats,
    Interval,
    Mask,
    Predictions,
    Resampled,
    interval,
    resampled,
)

#: What a training took, averaged over seeds.
_COSTS = (
    "validation_loss",
    "parameters",
    "layer_parameters",
    "nonzero",
    "bytes",
    "seconds",
    "scoring_us",
)
_SHOWN = {
    "binary": ("auc", "user_auc", "logloss", "ndcg_at_10", "calibration"),
    "regression": ("rmse", "mae", "ndcg_at_10", "calibration"),
}

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
    """The test rows.

    Args:
        rows: who was shown what and what came of it; its probabilities are not looked at.
        masks: slice → rows (N,).
    """

    rows: Predictions
    masks: Mapping[str, Mask]
    config: EvaluationConfig

    @property
    def loss(self) -> str:
        """The metric that training minimises."""
        return LOSS[self.rows.task]

    @property
    def compared(self) -> tuple[str, ...]:
        """The metrics of which differences have intervals."""
        return (self.loss, "auc") if self.rows.task == "binary" else (self.loss,)

    @property
    def sizes(self) -> dict[str, int]:
        """Rows of each slice."""
        return {name: int(mask.sum()) for name, mask in self.masks.items()}

    def measure(self, scores: Sequence[Floats], slices: bool = True) -> Measured:
        """Measure a model by its scores with each seed, (N,) each."""
        sides = [dataclasses.replace(self.rows, probability=values) for values in scores]
        parts: dict[str | None, list[Resampled]] = {}
        parts[None] = [resampled(side, self.config) for side in sides]
        for name, rows in self.sizes.items() if slices else ():
            if rows >= self.config.min_slice_rows:
                mask = self.masks[name]
                parts[name] = [resampled(side.where(mask), self.config) for side in sides]
        return Measured(parts)


@dataclasses.dataclass(frozen=True, eq=False)
class Measured:
    """A model's metrics with each seed, as users are resampled; by slice, None for all rows."""

    parts: Mapping[str | None, list[Resampled]]

    def values(self, part: str | None, metric: str) -> list[float]:
        """(S,) a metric with each seed; NaN where undefined."""
        return [float(s.everyone[s.names.index(metric)]) for s in self.parts[part]]

    def mean(self, part: str | None, metric: str) -> float | None:
        """Over the seeds; None where undefined."""
        return _defined(statistics.fmean(self.values(part, metric)))

    def spread(self, part: str | None, metric: str) -> float | None:
        """Sample standard deviation over the seeds; None where undefined, as with one seed."""
        values = self.values(part, metric)
        return _defined(statistics.stdev(values)) if len(values) > 1 else None

    def draws(self, part: str | None, metric: str, generator: np.random.Generator) -> Floats:
        """(R,) the mean over seeds that are drawn anew with each resample of users."""
        seeds = self.parts[part]
        values = np.stack([s.draws[:, s.names.index(metric)] for s in seeds])  # (S, R)
        mean, count = values.mean(axis=0), len(values)
        if count == 1:
            return np.asarray(mean)
        picks = generator.integers(count, size=values.shape)
        drawn = np.take_along_axis(values, picks, axis=0).mean(axis=0)
        return np.asarray(mean + (drawn - mean) * np.sqrt(count / (count - 1)))


def difference(
    one: Measured, other: Measured, part: str | None, metric: str, config: EvaluationConfig
) -> Interval | None:
    """A metric of one model minus that of another, each averaged over its seeds.

    Returns:
        None where the slice was left out, the metric is undefined or there is a single user.
    """
    if part not in one.parts or one.parts[part][0].users < 2:
        return None
    means = [statistics.fmean(model.values(part, metric)) for model in (one, other)]
    draws = [
        model.draws(part, metric, np.random.default_rng([config.seed, side]))
        for side, model in enumerate((one, other))
    ]
    return interval(means[0] - means[1], draws[0] - draws[1], config)


def weigh(
    trainings: Trainings, baselines: Mapping[str, Floats], window: Window, reference: str
) -> dict[str, Any]:
    """Measure all models and baselines on the test window, and judge the claims.

    Args:
        baselines: name → predictions of the test rows (N,).
        reference: the model that the others are compared with.

    Returns:
        ``loss`` and ``metrics`` (names), ``reference``, ``models`` and ``baselines`` (see
        `_described`), ``slices`` (``rows``, ``left_out``), ``chosen`` (the best model on the
        validation window), ``ladder`` (see `fathom.comparison.claims.Step`) and ``claims``.
    """
    measured = {}
    for name, model in trainings.models.items():
        if scores := [trainings.scores[k] for k in model["trainings"] if k in trainings.scores]:
            log.info("measuring %s", name)
            measured[name] = window.measure(scores)
    others = {name: window.measure([values]) for name, values in baselines.items()}
    base = measured.get(reference)
    models = {
        name: _described(measured.get(name), None if name == reference else base, window)
        | _trained(trainings, name)
        for name in trainings.models
    }
    losses = {name: models[name]["cost"]["validation_loss"] for name in measured}
    chosen = min(losses, key=lambda name: losses[name], default=None)
    found = [_judged(claim, measured, trainings, window) for claim in CLAIMS]
    if chosen is not None and "gradient_boosting" in others:
        found.append(_against_boosting(chosen, measured | others, window))
    steps, sides = _ladder(trainings, measured, window)
    if steps:

        def between(one: Side, other: Side) -> Interval | None:
            pair = (sides[one.model, tuple(one.hidden)], sides[other.model, tuple(other.hidden)])
            return difference(*pair, None, window.loss, window.config)

        found.insert(2, equal_size(steps, window.loss))
        found.insert(3, equal_quality(steps, window.loss, between))
    small = {n: r for n, r in window.sizes.items() if r < window.config.min_slice_rows}
    return {
        "loss": window.loss,
        "metrics": list(_SHOWN[window.rows.task]),
        "reference": reference,
        "models": models,
        "baselines": {name: _described(side, base, window) for name, side in others.items()},
        "slices": {"rows": window.sizes, "left_out": small},
        "chosen": chosen,
        "ladder": [dataclasses.asdict(step) for step in steps],
        "claims": [dataclasses.asdict(verdict) for verdict in found],
    }


def _described(
    model: Measured | None, reference: Measured | None, window: Window
) -> dict[str, Any]:
    """``mean`` and ``spread`` of each metric, ``against`` the reference, and the same by slice."""
    if model is None:
        return {"mean": None, "spread": None, "against": None, "slices": {}}

    def against(part: str | None) -> dict[str, Any] | None:
        if reference is None:
            return None
        config = window.config
        return {
            metric: plain(difference(model, reference, part, metric, config))
            for metric in window.compared
        }

    def part_of(part: str | None, names: Sequence[str]) -> dict[str, Any]:
        return {
            "mean": {name: model.mean(part, name) for name in names},
            "spread": {name: model.spread(part, name) for name in names},
            "against": against(part),
        }

    return {
        **part_of(None, _SHOWN[window.rows.task]),
        "slices": {part: part_of(part, window.compared) for part in model.parts if part},
    }


def _trained(trainings: Trainings, name: str) -> dict[str, Any]:
    """What tuning chose for a model, and what its trainings took."""
    model = trainings.models[name]
    done = [trainings.figures[key] for key in model["trainings"] if key in trainings.scores]
    cost = {what: statistics.fmean(figures[what] for figures in done) for what in _COSTS if done}
    return {
        "cost": cost or None,
        "settings": model["settings"],
        "trials": model["trials"],
        "seeds": [figures["seed"] for figures in done],
        "failed_seeds": len(model["trainings"]) - len(done),
        "error": model["error"],
    }


def _judged(
    claim: Claim, measured: Mapping[str, Measured], trainings: Trainings, window: Window
) -> Verdict:
    absent = [name for name in (claim.better, claim.worse) if name not in measured]
    found: Interval | str | None
    if absent:
        reasons = [
            trainings.models[name]["error"] if name in trainings.models else "was not compared"
            for name in absent
        ]
        found = "; ".join(f"{n}: {reason}" for n, reason in zip(absent, reasons, strict=True))
    else:
        one, other = measured[claim.better], measured[claim.worse]
        found = difference(one, other, claim.part, window.loss, window.config)
    if found is None:
        rows = window.sizes.get(claim.part, 0) if claim.part else len(window.rows.label)
        found = f"{claim.where} has {rows:,} rows; {window.config.min_slice_rows:,} are needed"
    return verdict_on(claim, found, window.loss)


def _against_boosting(chosen: str, measured: Mapping[str, Measured], window: Window) -> Verdict:
    claim = Claim(
        "The best of the family, chosen on the validation window, is ahead of gradient boosting.",
        "this comparison",
        chosen,
        "gradient_boosting",
    )
    pair = (measured[chosen], measured["gradient_boosting"])
    found = difference(*pair, None, window.loss, window.config)
    return verdict_on(claim, found or "there is no interval", window.loss)


def _ladder(
    trainings: Trainings, measured: Mapping[str, Measured], window: Window
) -> tuple[list[Step], dict[tuple[str, tuple[int, ...]], Measured]]:
    """The steps by rising size, and what was measured of each side by model and layers."""
    steps = []
    sides: dict[tuple[str, tuple[int, ...]], Measured] = {}
    for step in trainings.ladder:
        described = {}
        for model in (JOINT, APART):
            keys = [key for key in step[model] if key in trainings.scores]
            if not keys:
                continue
            scores = [trainings.scores[key] for key in keys]
            known = trainings.models[model]["trainings"] == step[model]
            found = measured[model] if known else window.measure(scores, slices=False)
            sides[model, tuple(step["hidden"])] = found
            described[model] = _side(model, step["hidden"], keys, trainings, found, window.loss)
        if len(described) == 2:
            joint, apart = (sides[model, tuple(step["hidden"])] for model in (JOINT, APART))
            ahead = difference(joint, apart, None, window.loss, window.config)
            steps.append(Step(described[JOINT], described[APART], ahead))
    return sorted(steps, key=lambda step: step.joint.layer_parameters), sides


def _side(
    model: str,
    hidden: list[int],
    keys: Sequence[str],
    trainings: Trainings,
    measured: Measured,
    loss: str,
) -> Side:
    figures = [trainings.figures[key] for key in keys]
    return Side(
        model=model,
        hidden=hidden,
        parameters=figures[0]["parameters"],
        layer_parameters=figures[0]["layer_parameters"],
        nonzero=round(statistics.fmean(f["nonzero"] for f in figures)),
        validation_loss=statistics.fmean(f["validation_loss"] for f in figures),
        loss=statistics.fmean(measured.values(None, loss)),
        spread=statistics.stdev(measured.values(None, loss)) if len(figures) > 1 else 0.0,
    )


def _defined(value: float) -> float | None:
    return value if np.isfinite(value) else None
