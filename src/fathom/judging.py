"""What outcomes say of a challenger, and of a champion on probation: keep, withdraw, roll back.

Somebody has to go only for what has been shown: the whole interval, by resampled users
(`fathom.evaluation`), lies beyond a bound. A shadow is compared on the rows that the champion has
answered, pair by pair; a canary's users are others, so each side is resampled by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fathom.evaluation import (
    LOSS,
    EvaluationConfig,
    Interval,
    Predictions,
    interval,
    paired_interval,
    resampled,
)
from fathom.feature_log import HOW, PROBABILITY, REQUEST, VERSION
from fathom.outcomes import OutcomesConfig
from fathom.registry import Challenge
from fathom.spec import EVENT_TIMESTAMP, FeatureSpec


@dataclass(frozen=True)
class Judgement:
    """What to do, why, and by which figures.

    Args:
        act: ``keep`` also while there is too little to tell.
        rows: labelled rows of each side.
        intervals: metric → difference to the champion's, or for ``calibration`` the value itself.
    """

    act: Literal["keep", "withdraw", "rollback"]
    version: str
    reasons: tuple[str, ...]
    rows: dict[str, int]
    intervals: dict[str, Interval | None]

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        shown = {name: vars(found) if found else None for name, found in self.intervals.items()}
        return vars(self) | {"reasons": list(self.reasons), "intervals": shown}


def judge_challenger(
    rows: pa.Table,
    champion: str,
    challenge: Challenge,
    spec: FeatureSpec,
    config: OutcomesConfig,
    evaluation: EvaluationConfig,
) -> Judgement:
    """Compare a challenger with the champion on what was served since it challenges.

    Args:
        rows: `fathom.outcomes.with_outcomes`, as Arrow.

    Returns:
        ``withdraw`` if its loss is worse by more than ``loss_margin``, or its calibration out of
        bounds, at the favourable end of the interval; else ``keep``.
    """
    rows = _since(rows, spec, datetime.fromisoformat(challenge.since))
    theirs = _of(rows, champion, "champion")
    ours = _of(rows, challenge.version, challenge.mode)
    if challenge.mode == "shadow":
        keys = [REQUEST, spec.entities.user, spec.entities.item]
        # By the same keys in the same order, both hold the same rows.
        theirs = theirs.join(ours.select(keys), keys, join_type="left semi")
        ours = ours.join(theirs.select(keys), keys, join_type="left semi")
        theirs, ours = (t.sort_by([(key, "ascending") for key in keys]) for t in (theirs, ours))
    counts = {"champion": len(theirs), "challenger": len(ours)}
    name = f"challenger {challenge.version}, a {challenge.mode},"
    if wanting := _too_few(counts, config):
        return Judgement("keep", challenge.version, (f"{name} {wanting}",), counts, {})
    before, after = predictions(theirs, spec), predictions(ours, spec)
    loss = LOSS[before.task]
    found = {"calibration": _calibration(after, evaluation)}
    if challenge.mode == "shadow":
        found[loss] = paired_interval(before, after, evaluation)[loss]
    else:
        found[loss] = _difference(before, after, loss, evaluation)
    reasons = [*_worse(found[loss], loss, config), *_off(found["calibration"], config)]
    if not reasons:
        kept = (f"{name} is not shown to be worse on {len(ours)} labelled rows",)
        return Judgement("keep", challenge.version, kept, counts, found)
    said = tuple(f"{name} {reason}" for reason in reasons)
    return Judgement("withdraw", challenge.version, said, counts, found)


def judge_champion(
    rows: pa.Table,
    champion: str,
    since: datetime,
    spec: FeatureSpec,
    config: OutcomesConfig,
    evaluation: EvaluationConfig,
) -> Judgement:
    """Judge a champion on probation by its calibration since it was promoted.

    Returns:
        ``rollback`` if the whole interval of its calibration is out of bounds; else ``keep``.
    """
    ours = _of(_since(rows, spec, since), champion, "champion")
    counts = {"champion": len(ours)}
    if wanting := _too_few(counts, config):
        return Judgement("keep", champion, (f"champion {champion} {wanting}",), counts, {})
    found = {"calibration": _calibration(predictions(ours, spec), evaluation)}
    reasons = tuple(f"champion {champion} {why}" for why in _off(found["calibration"], config))
    if reasons:
        return Judgement("rollback", champion, reasons, counts, found)
    kept = (f"champion {champion} is not shown to be out of calibration",)
    return Judgement("keep", champion, kept, counts, found)


def predictions(rows: pa.Table, spec: FeatureSpec) -> Predictions:
    """Labelled rows as `fathom.evaluation` takes them."""
    label = rows[spec.label.name].cast(pa.float64()).to_numpy()
    if spec.label.values:
        label = (label == spec.label.values[-1]).astype(np.float64)
    return Predictions(
        label=label,
        probability=rows[PROBABILITY].to_numpy(),
        user=_codes(rows[spec.entities.user]),
        request=_codes(rows[REQUEST]),
        task=spec.task,
    )


def _since(rows: pa.Table, spec: FeatureSpec, moment: datetime) -> pa.Table:
    labelled = pc.is_valid(rows[spec.label.name])
    at = rows[EVENT_TIMESTAMP]
    return rows.filter(pc.and_(labelled, pc.greater_equal(at, pa.scalar(moment, at.type))))


def _of(rows: pa.Table, version: str, how: str) -> pa.Table:
    return rows.filter(pc.and_(pc.equal(rows[VERSION], version), pc.equal(rows[HOW], how)))


def _codes(column: pa.ChunkedArray) -> np.ndarray[Any, np.dtype[np.int64]]:
    indices = column.combine_chunks().dictionary_encode().indices
    return np.asarray(indices.to_numpy(zero_copy_only=False), np.int64)


def _too_few(counts: dict[str, int], config: OutcomesConfig) -> str | None:
    if min(counts.values()) >= config.min_rows:
        return None
    shown = ", ".join(f"{rows} of the {side}" for side, rows in counts.items())
    return f"is kept: {shown} are labelled; at least {config.min_rows} are needed to tell"


def _calibration(given: Predictions, evaluation: EvaluationConfig) -> Interval | None:
    found = resampled(given, evaluation)
    at = found.names.index("calibration")
    return interval(float(found.everyone[at]), found.draws[:, at], evaluation)


def _difference(
    before: Predictions, after: Predictions, name: str, evaluation: EvaluationConfig
) -> Interval | None:
    """Of a metric between two sets of users, each resampled by itself."""
    old = resampled(before, evaluation)
    new = resampled(after, _another_seed(evaluation))
    at = old.names.index(name)
    return interval(
        float(new.everyone[at] - old.everyone[at]), new.draws[:, at] - old.draws[:, at], evaluation
    )


def _another_seed(evaluation: EvaluationConfig) -> EvaluationConfig:
    """Settings whose draws are independent of the given ones'."""
    return evaluation.model_copy(update={"seed": evaluation.seed + 1})


def _worse(found: Interval | None, name: str, config: OutcomesConfig) -> Iterator[str]:
    if found is not None and found.lo > config.loss_margin:
        yield (
            f"has a {name} {found.difference:+.5f} beside the champion's, at best "
            f"{found.lo:+.5f}; {config.loss_margin:+.5f} is allowed"
        )


def _off(found: Interval | None, config: OutcomesConfig) -> Iterator[str]:
    lo, hi = config.calibration_lo, config.calibration_hi
    if found is not None and (found.lo > hi or found.hi < lo):
        yield (
            f"predicts {found.difference:.3f} of what comes, surely {found.lo:.3f} to "
            f"{found.hi:.3f}; [{lo}, {hi}] is allowed"
        )
