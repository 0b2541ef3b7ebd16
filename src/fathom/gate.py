"""Whether a challenger may become the champion: a test, on the same rows, with stated errors.

**Better, and nowhere proven worse.** The loss must be proven lower: the interval of the difference
lies below ``loss_margin``, which is 0. So of challengers that are no better at most half of
1 - ``confidence`` are promoted, whatever else is checked. The other metrics must be shown not to be
worse by more than a margin. That all of these must pass needs no adjustment for their number: it
makes a wrong promotion rarer, not commoner (the intersection-union test; Berger 1982,
"Multiparameter hypothesis testing and acceptance sampling").

**Slices are the other way round.** To show for each of thirty slices that it is not worse would
take rows that small slices do not have, and a good challenger would fail for their noise. So a
slice blocks when it is *proven* worse by more than its margin. With many slices some look bad by
chance, so all of them, in all metrics, are tested as one family: a bound is as many standard errors
from the difference as the largest of all differences is from 0 in at most 1 - ``confidence`` of the
resamples (Romano and Wolf 2005, "Exact and approximate stepdown methods for multiple hypothesis
testing", whose first step this is). Slices that overlap are resampled on the same users, so unlike
with Bonferroni's bound their number costs little. At most 1 - ``confidence`` of the challengers
that harm no slice are blocked for one. What is given up: harm that is real but small, in a small
slice, passes; a slice that is destroyed is many standard errors beyond its margin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fathom.config import Task
from fathom.evaluation import (
    LOSS,
    EvaluationConfig,
    EvaluationError,
    Floats,
    Ints,
    Mask,
    Metrics,
    Predictions,
    UserSums,
    mask_rows,
    metrics,
    paired_interval,
)

#: More of these is better.
_RISING = ("auc", "user_auc")


class GateConfig(BaseModel):
    """``params:gate``: what a challenger must show before it becomes the champion.

    Args:
        calibration_lo, calibration_hi: bounds of the sum predicted over the sum observed.
        baselines: names of baselines to beat in loss (logloss or rmse) and AUC.
        loss_margin: the challenger's loss less the champion's must be below this at the upper end
            of the interval. 0 asks for a proven improvement; above 0, an equally good challenger
            passes too where there are rows enough to prove that it is equally good.
        auc_margin, user_auc_margin: how much lower either may be, at the lower end.
        calibration_margin: how much farther from calibrated, as ``|log|`` of the sum predicted over
            the sum observed, at the upper end.
        slice_margin: the share of the champion's loss by which no slice may be proven worse.
        slice_auc_margin, slice_calibration_margin: the same for both AUCs and for ``|log|``.
        min_slice_users: slices of fewer users are left out. Fewer clusters than this make standard
            errors too small (Cameron and Miller 2015, "A practitioner's guide to cluster-robust
            inference").
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    calibration_lo: float = Field(default=0.8, gt=0)
    calibration_hi: float = Field(default=1.25, gt=0)
    baselines: tuple[str, ...] = ("constant", "popularity")
    loss_margin: float = Field(default=0.0, ge=0)
    auc_margin: float = Field(default=0.002, ge=0)
    user_auc_margin: float = Field(default=0.002, ge=0)
    calibration_margin: float = Field(default=0.05, ge=0)
    slice_margin: float = Field(default=0.05, ge=0)
    slice_auc_margin: float = Field(default=0.02, ge=0)
    slice_calibration_margin: float = Field(default=0.15, ge=0)
    min_slice_users: int = Field(default=20, ge=2)

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.calibration_lo >= self.calibration_hi:
            raise ValueError(
                f"calibration_lo {self.calibration_lo} must be below "
                f"calibration_hi {self.calibration_hi}"
            )
        return self

    def margins(self, task: Task) -> dict[str, float]:
        """By metric, overall."""
        auc = {"auc": self.auc_margin, "user_auc": self.user_auc_margin}
        return {
            LOSS[task]: self.loss_margin,
            **(auc if task == "binary" else {}),
            "miscalibration": self.calibration_margin,
        }

    def slice_margins(self, task: Task) -> dict[str, float]:
        """By metric, in a slice; that of the loss is a share."""
        auc = dict.fromkeys(_RISING, self.slice_auc_margin)
        return {
            LOSS[task]: self.slice_margin,
            **(auc if task == "binary" else {}),
            "miscalibration": self.slice_calibration_margin,
        }


@dataclass(frozen=True, eq=False)
class Candidate:
    """A version of the model and its predictions of the window's rows, (N,), as they came."""

    version: str
    probability: Floats


@dataclass(frozen=True)
class Compared:
    """A metric of the challenger less the champion's, on all rows or in a slice.

    Args:
        part: the slice; None for all rows.
        metric: ``miscalibration`` is ``|log|`` of the sum predicted over the sum observed.
        difference: in a slice, that of the loss is a share of the champion's.
        lo, hi: of all rows, the interval; of slices, bounds that hold for all slices at once.
        margin: what ``hi`` (an AUC's ``lo``) must not reach; in a slice, what ``lo`` (an AUC's
            ``hi``) must not exceed.
    """

    part: str | None
    metric: str
    rows: int
    users: int
    difference: float
    lo: float
    hi: float
    margin: float
    passed: bool


@dataclass(frozen=True)
class Verdict:
    """Whether the challenger is fit to be champion, every check in words, every comparison."""

    promoted: bool
    reasons: list[str]
    compared: list[Compared] = dataclasses.field(default_factory=list)


_Check = tuple[bool, str]


def gate(
    window: Predictions,
    challenger: Candidate,
    champion: Candidate | None,
    baselines: Mapping[str, Metrics],
    masks: Mapping[str, Mask],
    config: GateConfig,
    evaluation: EvaluationConfig,
) -> Verdict:
    """Decide whether the challenger becomes the champion.

    It must predict something usable, have defined metrics and calibration within bounds, and beat
    the named baselines. Against a champion its loss must be proven lower, the other metrics no
    worse than by a margin, and no slice proven worse. The champion itself passes at once.

    Args:
        window: the rows; its probabilities are not looked at.
        champion: the current one; None lets the absolute bounds decide alone, and so does one
            whose predictions are unusable.
        baselines: `metrics` of each baseline on the same rows.
        masks: slice name → rows (N,).

    Returns:
        the verdict with one reason for every check, passed or failed.

    Raises:
        EvaluationError: a mask does not fit the rows.
    """
    if champion is not None and champion.version == challenger.version:
        reason = f"pass: version {challenger.version} is already champion; nothing to compare"
        return Verdict(True, [reason])
    new = _usable(window, challenger)
    if isinstance(new, str):
        return Verdict(False, [f"fail: the challenger's predictions are unusable: {new}"])
    measured = metrics(new)
    checks = [
        *_absolute(measured, new, config),
        *_against_baselines(measured, baselines, config),
    ]
    compared: list[Compared] = []
    old = None if champion is None else _usable(window, champion)
    if old is None:
        checks.append((True, "there is no champion yet: the absolute bounds decide alone"))
    elif isinstance(old, str):
        reason = f"the champion's predictions are unusable: {old}; the absolute bounds decide alone"
        checks.append((True, reason))
    else:
        overall, undefined = _overall(old, new, config, evaluation)
        slices, left_out = _slices(old, new, masks, config, evaluation)
        compared = [*overall, *slices]
        checks += [*map(_in_words, overall), *undefined, *_harm(slices, left_out)]
    reasons = [f"{'pass' if passed else 'fail'}: {text}" for passed, text in checks]
    return Verdict(all(passed for passed, _ in checks), reasons, compared)


def _usable(window: Predictions, candidate: Candidate) -> Predictions | str:
    """The window with the candidate's predictions, or what is wrong with them."""
    try:
        return dataclasses.replace(window, probability=candidate.probability)
    except EvaluationError as error:
        return "; ".join(error.faults)


def _absolute(measured: Metrics, of: Predictions, config: GateConfig) -> Iterator[_Check]:
    value = of.probability[0]
    if of.probability.size > 1 and (of.probability == value).all():
        yield False, f"all predictions are {value:.5f}: they rank nothing"
    needed = [LOSS[of.task], "calibration"] + (["auc"] if of.task == "binary" else [])
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


def _overall(
    champion: Predictions,
    challenger: Predictions,
    config: GateConfig,
    evaluation: EvaluationConfig,
) -> tuple[list[Compared], list[_Check]]:
    """Comparisons on all rows; and a failed check for each of loss and AUC that is undefined.

    The user AUC may be: where no user has both outcomes there is none to compare.
    """
    intervals = paired_interval(champion, challenger, evaluation)
    rows, users = challenger.label.size, int(challenger.user_code.max()) + 1
    compared, undefined = [], []
    for name, margin in config.margins(challenger.task).items():
        found = intervals[name]
        if found is not None:
            worst = -found.lo if name in _RISING else found.hi
            signed = -margin if name in _RISING else margin
            line = (found.difference, found.lo, found.hi, signed, worst < margin)
            compared.append(Compared(None, name, rows, users, *line))
        elif name in (LOSS[challenger.task], "auc"):
            text = f"{name} against the champion is undefined: needs 2 users and 2 outcomes"
            undefined.append((False, text))
    return compared, undefined


def _in_words(found: Compared) -> _Check:
    worst = found.lo if found.metric in _RISING else found.hi
    text = f"{found.metric} differs from the champion's by {found.difference:+.5f}, at worst by"
    return found.passed, f"{text} {worst:+.5f}; the margin is {found.margin:+.5f}"


def _slices(
    champion: Predictions,
    challenger: Predictions,
    masks: Mapping[str, Mask],
    config: GateConfig,
    evaluation: EvaluationConfig,
) -> tuple[list[Compared], list[str]]:
    """Comparisons in slices, with bounds that hold for all of them; and what was left out, why."""
    changes, left_out = {}, []
    for name, rows in mask_rows(challenger, masks).items():
        users = np.unique(challenger.user_code[masks[name]])
        if rows < evaluation.min_slice_rows:
            left_out.append(f"{name} ({rows} rows)")
        elif users.size < config.min_slice_users:
            left_out.append(f"{name} ({users.size} users)")
        else:
            sides = (champion.where(masks[name]), challenger.where(masks[name]))
            changes[name] = _Change.between(*sides, users)
    everyone = int(challenger.user_code.max()) + 1
    errors = _errors_at_once(list(changes.values()), everyone, evaluation)
    margins = config.slice_margins(challenger.task)
    compared = []
    for name, change in changes.items():
        reach = errors * change.error
        ends = np.stack([change.value, change.value - reach, change.value + reach])
        for metric, line in zip(change.names, ends.T, strict=True):
            # The loss was compared by its logarithm.
            value, lo, hi = map(float, np.expm1(line) if metric in LOSS.values() else line)
            margin = margins[metric]
            least = -hi if metric in _RISING else lo
            found = Compared(
                part=name,
                metric=metric,
                rows=int(masks[name].sum()),
                users=change.users.size,
                difference=value,
                lo=lo,
                hi=hi,
                margin=-margin if metric in _RISING else margin,
                passed=least <= margin,
            )
            compared.append(found)
    return compared, left_out


@dataclass(frozen=True, eq=False)
class _Change:
    """The K defined differences in a slice, (K,), and its users' influence on them, (U, K).

    That of the loss is of its logarithm: what small shares of it add up to.
    """

    users: Ints
    names: list[str]
    value: Floats
    influence: Floats

    @classmethod
    def between(cls, champion: Predictions, challenger: Predictions, users: Ints) -> _Change:
        old, new = _terms(champion), _terms(challenger)
        moves = {name: (new[name][0] - old[name][0], new[name][1] - old[name][1]) for name in new}
        known = [n for n, (value, own) in moves.items() if np.isfinite([value, *own]).all()]
        influence = np.array([moves[name][1] for name in known]).reshape(len(known), users.size)
        return cls(users, known, np.array([moves[name][0] for name in known]), influence.T)

    @property
    def error(self) -> Floats:
        """(K,) standard errors, as resampled users give them."""
        return np.asarray(np.sqrt(np.square(self.influence).sum(axis=0)))


def _terms(predictions: Predictions) -> dict[str, tuple[float, Floats]]:
    """What is compared in a slice, and each user's influence on it (U,); NaN where undefined."""
    sums = UserSums(predictions)
    values = sums(np.ones(sums.users))
    found = dict(zip(sums.names, zip(values, sums.influence().T, strict=True), strict=True))
    (loss, loss_by_user), (ratio, ratio_by_user) = (
        found[LOSS[predictions.task]],
        found["calibration"],
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithm = np.log(ratio)
        return {
            LOSS[predictions.task]: (np.log(loss), loss_by_user / loss),
            **{name: found[name] for name in _RISING if name in found},
            "miscalibration": (abs(logarithm), np.sign(logarithm) * ratio_by_user / ratio),
        }


def _errors_at_once(changes: list[_Change], users: int, config: EvaluationConfig) -> float:
    """How many standard errors every slice's harm is overstated by at most, at ``confidence``."""
    generator = np.random.default_rng(config.seed)
    sides = [
        (change.users, change.influence * [-1 if n in _RISING else 1 for n in change.names])
        for change in changes
    ]
    scale = [np.where(change.error > 0, change.error, np.inf) for change in changes]
    worst = np.zeros(config.resamples)
    for draw in range(config.resamples if sides else 0):
        counts = np.bincount(generator.integers(users, size=users), minlength=users)
        worst[draw] = max(
            ((counts[own] - 1) @ influence / errors).max(initial=-np.inf)
            for (own, influence), errors in zip(sides, scale, strict=True)
        )
    return float(np.quantile(worst, config.confidence))


def _harm(slices: list[Compared], left_out: list[str]) -> Iterator[_Check]:
    """One failed check for each proven harm, or one passed check for all slices."""
    for found in slices:
        if not found.passed:
            form = "+.1%" if found.metric in LOSS.values() else "+.5f"
            least = found.hi if found.metric in _RISING else found.lo
            yield (
                False,
                f"slice {found.part} ({found.rows} rows, {found.users} users): {found.metric} "
                f"differs from the champion's by {found.difference:{form}}, by "
                f"{least:{form}} at least; the margin is {found.margin:{form}}",
            )
    if all(found.passed for found in slices):
        small = f"; left out as too small: {', '.join(left_out)}" if left_out else ""
        count = len({found.part for found in slices})
        said = f"none of {count} slices is proven worse" if count else "no slice to compare"
        yield True, f"{said}{small}"
