"""Crosses for the wide part, chosen by what they add to the deep part.

The deep part is trained alone. What it leaves unexplained on the training rows is regressed on the
keys of each candidate cross, and what that gains on the validation window is the cross's *lift*:
the mean loss without it minus that with it. The best one is added to the prediction and the others
are scored again (forward selection), until none is sure to gain.

What keeps it honest
    cross-fitting   a model has fitted its own training rows, so its residuals there are too small.
                    Here each training row is scored by a model that has not seen its request, and
                    validation rows by the mean of these models (Chernozhukov et al. 2018,
                    "Double/debiased machine learning", section 3).
    columns first   what single columns tell beyond the deep part is fitted before any cross, and a
                    cross's weights have a mean of 0 for each value of its columns. So none is
                    chosen for what one of its columns tells alone.
    two halves      of the validation window's users: one selects, the other reports.
    one bound       a cross must gain at the lower end of an interval whose width accounts for users
                    (their rows are not independent) and for the number of candidates (Bonferroni).

The test window has no way in.
"""

from __future__ import annotations

import heapq
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from fathom.batch import Batch, Ragged
from fathom.config import Task, TrainingConfig
from fathom.encoding import FIRST_KNOWN, Frame, Values, bucket, hash_value
from fathom.evaluation import EvaluationConfig
from fathom.residuals import (
    Codes,
    Design,
    Floats,
    Ints,
    Keys,
    Rows,
    fit_weights,
    mean_by_user,
    row_losses,
)
from fathom.spec import Column, FeatureSpec

if TYPE_CHECKING:
    from fathom.encoding import Encoder

Pair = tuple[str, str]
Numeric = Literal["declared", "all", "none"]

#: Times that all columns are fitted before the first cross, unless none has more to say than this.
_SWEEPS, _ENOUGH = 5, 0.01
_PROGRESS_SECONDS = 5.0

log = logging.getLogger(__name__)


class CrossSearchError(ValueError):
    """Nothing can be searched; the message lists every fault at once."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("cross search: " + "; ".join(faults))


class CrossSearchConfig(BaseModel):
    """What is searched, and for how long (``params:cross_search``).

    Args:
        folds: parts of the training split, by request; a row is scored by the model that was
            trained on the other parts. 1 scores rows by a model that was trained on them.
        numeric: which numeric columns are crossed: those with ``declared`` buckets, ``all``, or
            ``none``.
        max_candidates: pairs that are scored; those of two owners come before those of one.
        max_crosses: crosses that are chosen at most.
        max_rows: rows of the wide part that the chosen crosses have at most, together.
        min_count: keys seen less often in training share one id, and have no weight here.
        l1: penalty of a key's weight, in units of one example's gradient.
        l2: the same for its square; null estimates it from each cross's own gradients.
        alpha: chance that any cross is chosen where none gains.
        margin: loss per row that the lower end of a lift's interval must exceed.
        seconds: no candidate is scored any more once scoring took so long; null for no bound.
        seed: of the parts and halves.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    folds: int = Field(default=2, ge=1, le=20)
    numeric: Numeric = "declared"
    max_candidates: int = Field(default=300, ge=1)
    max_crosses: int = Field(default=10, ge=1)
    max_rows: int = Field(default=1_000_000, ge=1)
    min_count: int = Field(default=4, ge=1)
    l1: float = Field(default=1.0, ge=0)
    l2: float | None = Field(default=None, ge=0)
    alpha: float = Field(default=0.05, gt=0, lt=1)
    margin: float = Field(default=2e-5, ge=0)
    seconds: float | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0)


class Split(NamedTuple):
    """A split as values and as the encoder made it: the same rows in the same order."""

    frame: Frame
    batch: Batch


@dataclass(frozen=True)
class Lift:
    """What a cross gained on the selecting half, in loss per row.

    Args:
        rows: of the wide part, the two reserved ones included.
        standard_error: from sums by user.
        bound: the lift less as many standard errors as the number of candidates asks for.
    """

    columns: Pair
    rows: int
    lift: float
    standard_error: float
    bound: float


@dataclass(frozen=True)
class Chosen:
    """A cross that was chosen, and what it gained on the other half, beyond those before it.

    Args:
        selection_lift: on the half that chose it, and so too high.
        lift, lo, hi: on the half that did not, with an interval over resampled users.
    """

    columns: Pair
    min_count: int
    rows: int
    selection_lift: float
    lift: float
    lo: float
    hi: float


@dataclass(frozen=True)
class CrossSearchResult:
    """What a search found.

    Args:
        chosen: in the order in which they were.
        candidates: the lifts of the first round, highest bound first.
        columns: column → what its values gain by themselves, beyond the deep part, on the selecting
            half; those that gain nothing are not there.
        left_out: pairs that `CrossSearchConfig` left no room or time for.
        stopped: why no more were chosen.
        total: lift, lo and hi of all chosen together, on the reporting half.
        losses: on the reporting half, of the ``deep`` part, with what single ``columns`` add, and
            with the ``crosses``.
        deviations: standard errors between a lift and its bound.
        sizes: rows and users of each part of the data.
    """

    chosen: tuple[Chosen, ...]
    candidates: tuple[Lift, ...]
    columns: dict[str, float]
    left_out: tuple[Pair, ...]
    stopped: str
    total: dict[str, float]
    losses: dict[str, float]
    deviations: float
    sizes: dict[str, int]


def search(
    encoder: Encoder,
    training: Split,
    validation: Split,
    base: TrainingConfig,
    config: CrossSearchConfig,
    evaluation: EvaluationConfig,
) -> CrossSearchResult:
    """Choose crosses by what they add to the deep part.

    Args:
        training, validation: frames with the columns of `columns_read`, and the encoded rows.
        base: settings of the deep part's training; its ``model`` and ``positive_weight`` are not
            looked at.
        evaluation: resamples, confidence and seed of the intervals.

    Raises:
        CrossSearchError: splits do not fit, a half has too few users, or nothing can be crossed.
        TrainingError: the deep part cannot be trained.
    """
    spec = encoder.spec
    pairs = candidates(spec, config.numeric)
    half = _check(training, validation, spec, pairs, config.seed)
    fold = _shares(training.frame[spec.entities.request], config.folds, config.seed)
    first, second = np.flatnonzero(half == 0), np.flatnonzero(half == 1)
    seen, unseen = _logits(encoder, training.batch, validation.batch, fold, first, base)
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    numbered = {name: _coded(spec.by_name[name], training, validation) for name in names}
    sizes = {name: size for name, (_, size) in numbered.items()}
    coded = [{name: codes[place] for name, (codes, _) in numbered.items()} for place in (0, 1)]
    whole = np.arange(len(training.batch))
    parts = [
        _rows(training, whole, coded[0], seen, base, spec),
        _rows(validation, first, coded[1], unseen, base, spec),
        _rows(validation, second, coded[1], unseen, base, spec),
    ]
    return ForwardSelection(parts, sizes, pairs, config, evaluation, spec.task).run()


def columns_read(spec: FeatureSpec, numeric: Numeric) -> list[str]:
    """Columns that frames must hold: those of all candidates, and the keys of user and request."""
    read = (name for pair in candidates(spec, numeric) for name in pair)
    return list(dict.fromkeys([spec.entities.user, spec.entities.request, *read]))


def candidates(spec: FeatureSpec, numeric: Numeric) -> list[Pair]:
    """All pairs that are searched: those of two owners first, else in the order of the spec.

    Two single-valued columns of any owners, the request's key left out; or a list and a
    single-valued column, where one of the two is the item's and the other is not. The list stands
    first. A pair that the spec has as a cross stands as it does there.
    """

    def crossed(column: Column) -> bool:
        if column.is_numeric:
            return numeric == "all" or (numeric == "declared" and column.buckets is not None)
        return column.kind == "categorical" and column.name != spec.entities.request

    def owners(pair: Pair) -> set[str]:
        return {spec.owner(name) for name in pair}

    single = [column.name for column in spec.columns if crossed(column)]
    lists = [column.name for column in spec.columns if column.kind in {"multi", "sequence"}]
    pairs = [*combinations(single, 2), *((many, one) for many in lists for one in single)]
    kept = [p for p in pairs if p[0] not in lists or (len(owners(p)) == 2 and "item" in owners(p))]
    declared = {frozenset(c.columns): c.columns for c in spec.crosses if len(c.columns) == 2}
    ordered = sorted(kept, key=lambda pair: -len(owners(pair)))
    named = [declared.get(frozenset(p), p) if p[0] not in lists else p for p in ordered]
    return [(first, second) for first, second in named]


# -- the search ----------------------------------------------------------------------------------


class ForwardSelection:
    """The search itself, on rows whose logits are those of the deep part; it changes them.

    Args:
        rows: those of training, those that select and those that report.
        sizes: column → how many values it has in training; all columns of ``pairs``.
        pairs: the candidates.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        sizes: dict[str, int],
        pairs: list[Pair],
        config: CrossSearchConfig,
        evaluation: EvaluationConfig,
        task: Task,
    ) -> None:
        self._training, self._selecting, self._reporting = rows
        self._sizes, self._task = sizes, task
        self._config, self._evaluation = config, evaluation
        self._pairs, self._left_out = pairs[: config.max_candidates], pairs[config.max_candidates :]
        self._deviations = NormalDist().inv_cdf(1 - config.alpha / len(self._pairs))
        self._deadline = time.perf_counter() + (config.seconds or math.inf)

    def run(self) -> CrossSearchResult:
        """Fit the columns, score all candidates, and choose."""
        reporting, task = self._reporting, self._task
        deep = row_losses(task, reporting.logit, reporting.label)
        gained = self._fit_columns()
        columns = row_losses(task, reporting.logit, reporting.label)
        first = self._first_round()
        chosen, stopped = self._choose(first)
        log.info("%d crosses chosen: %s", len(chosen), stopped)
        crosses = row_losses(task, reporting.logit, reporting.label)
        means = {"deep": deep, "columns": columns, "crosses": crosses}
        names = ("training", "selecting", "reporting")
        parts = (self._training, self._selecting, reporting)
        return CrossSearchResult(
            chosen=tuple(chosen),
            candidates=tuple(sorted(first, key=lambda lift: (-lift.bound, lift.columns))),
            columns=gained,
            left_out=tuple(self._left_out),
            stopped=stopped,
            total=interval(columns - crosses, reporting, self._evaluation),
            losses={n: float(np.average(v, weights=reporting.weight)) for n, v in means.items()},
            deviations=self._deviations,
            sizes={f"{n}_rows": len(part) for n, part in zip(names, parts, strict=True)}
            | {f"{n}_users": len(part.mass) for n, part in zip(names, parts, strict=True)},
        )

    def _fit_columns(self) -> dict[str, float]:
        """Let each column say what it has to say by itself, so that no cross says it.

        What a column tells of the training rows may be over by the time of the validation rows:
        these are told only what gains there.

        Returns:
            What each column gained there.
        """
        gains: dict[str, float] = {}
        for _ in range(_SWEEPS):
            most = 0.0
            for name in self._sizes:
                keys, design, weights = self._fit((name,))
                self._training.add(design, weights)
                gain, _ = self._gain(keys, weights)
                if gain > 0:
                    self._tell(keys, weights)
                    gains[name] = gains.get(name, 0.0) + gain
                most = max(most, np.abs(weights).max(initial=0))
            if most < _ENOUGH:
                break
        return gains

    def _fit(self, columns: tuple[str, ...]) -> tuple[Keys, Design, Floats]:
        config, rows = self._config, self._training
        keys = Keys.fit(columns, rows, self._sizes, config.min_count)
        design = keys.design(rows)
        weights = fit_weights(design, rows, self._task, config.l1, config.l2)
        if len(columns) == 2 and weights.any():
            weights = keys.centred(weights, design.by_key(rows.weight[design.rows]))
        return keys, design, weights

    def _tell(self, keys: Keys, weights: Floats) -> None:
        """Let weights join the prediction of validation rows."""
        for rows in (self._selecting, self._reporting):
            rows.add(keys.design(rows), weights)

    def _gain(self, keys: Keys, weights: Floats) -> tuple[float, float]:
        """What weights gain on the selecting half per row, and its standard error."""
        if not weights.any():
            return 0.0, 0.0
        rows, design = self._selecting, keys.design(self._selecting)
        logit, label = rows.logit[design.rows], rows.label[design.rows]
        without = row_losses(self._task, logit, label)
        gained = without - row_losses(self._task, logit + design.by_row(weights), label)
        gained *= rows.weight[design.rows]
        sums = np.bincount(rows.user[design.rows], gained, minlength=len(rows.mass))
        return mean_by_user(sums.astype(np.float64), rows.mass)

    def _score(self, pair: Pair) -> Lift:
        """What a cross gains on the selecting half, given all that was added before."""
        keys, _, weights = self._fit(pair)
        lift, error = self._gain(keys, weights)
        bound = lift - self._deviations * error
        return Lift(pair, len(keys.known) + FIRST_KNOWN, lift, error, bound)

    def _first_round(self) -> list[Lift]:
        lifts: list[Lift] = []
        said = time.perf_counter()
        for pair in self._pairs:
            if time.perf_counter() > self._deadline:
                self._left_out = [*self._pairs[len(lifts) :], *self._left_out]
                break
            lifts.append(self._score(pair))
            if time.perf_counter() - said > _PROGRESS_SECONDS:
                said = time.perf_counter()
                log.info("%d of %d candidates scored", len(lifts), len(self._pairs))
        return lifts

    def _choose(self, first: list[Lift]) -> tuple[list[Chosen], str]:
        """The crosses whose gain is sure, one after the other, and why there are no more.

        What a cross gains only falls, as good as always, as others are chosen. So a candidate is
        scored again only when it comes first by what it once had (lazy greedy: Minoux 1978).
        """
        config = self._config
        waiting = [(-lift.bound, place, 0, lift) for place, lift in enumerate(first)]
        heapq.heapify(waiting)
        chosen: list[Chosen] = []
        left = config.max_rows
        while waiting and -waiting[0][0] > config.margin:
            if len(chosen) == config.max_crosses:
                return chosen, f"max_crosses, {config.max_crosses}, was reached"
            _, place, known, lift = heapq.heappop(waiting)
            if lift.rows > left:
                log.info("%s left out: max_rows leaves %d", " x ".join(lift.columns), left)
            elif known == len(chosen):
                chosen.append(self._take(lift))
                left -= lift.rows
            elif time.perf_counter() > self._deadline:
                return chosen, f"seconds, {config.seconds}, were over"
            else:
                lift = self._score(lift.columns)
                heapq.heappush(waiting, (-lift.bound, place, len(chosen), lift))
        return chosen, "no other candidate is sure to gain"

    def _take(self, lift: Lift) -> Chosen:
        """Add a cross to the prediction, and measure it on the half that did not choose it."""
        rows = self._reporting
        before = row_losses(self._task, rows.logit, rows.label)
        keys, design, weights = self._fit(lift.columns)
        self._training.add(design, weights)
        self._tell(keys, weights)
        after = row_losses(self._task, rows.logit, rows.label)
        found = interval(before - after, rows, self._evaluation)
        log.info("chosen: %s, %+.5f held out", " x ".join(lift.columns), found["lift"])
        return Chosen(lift.columns, self._config.min_count, lift.rows, lift.lift, **found)


def interval(gained: Floats, rows: Rows, config: EvaluationConfig) -> dict[str, float]:
    """Mean ``lift`` of (N,) gains, and ``lo`` and ``hi`` of its central share over resampled users.

    As `fathom.evaluation.paired_interval` does for the metrics of two models.
    """
    sums, users = np.bincount(rows.user, rows.weight * gained), len(rows.mass)
    generator = np.random.default_rng(config.seed)
    draws = np.empty(config.resamples)
    for place in range(config.resamples):
        counts = np.bincount(generator.integers(users, size=users), minlength=users)
        draws[place] = counts @ sums / (counts @ rows.mass)
    tail = (1 - config.confidence) / 2
    lo, hi = np.quantile(draws, (tail, 1 - tail))
    return {"lift": float(sums.sum() / rows.mass.sum()), "lo": float(lo), "hi": float(hi)}


# -- the deep part and the data ------------------------------------------------------------------


def _logits(
    encoder: Encoder,
    training: Batch,
    validation: Batch,
    fold: Ints,
    stopping: Ints,
    base: TrainingConfig,
) -> tuple[Floats, Floats]:
    """The deep part's logits of training rows, by models that have not seen them, and of others.

    Args:
        fold: (N,) the part of each training row.
        stopping: validation rows that decide when training stops.
    """
    from fathom.models import score
    from fathom.training import train

    # A model with weighted positives has logits of another loss than that which lifts are of.
    config = replace(base, model="deep", positive_weight=1.0)
    folds = int(fold.max()) + 1
    known, others = np.empty(len(training)), np.zeros(len(validation))
    early = validation.take(stopping)
    for part in range(folds):
        held = np.flatnonzero(fold == part)
        seen = np.flatnonzero(fold != part) if folds > 1 else held
        log.info("deep part %d of %d: %d rows", part + 1, folds, len(seen))
        task = encoder.spec.task
        model = train(encoder.layout, training.take(seen), early, config, task).model
        known[held] = score(model, training.take(held))
        others += score(model, validation) / folds
    return known, others


def _check(
    training: Split, validation: Split, spec: FeatureSpec, pairs: list[Pair], seed: int
) -> Ints:
    """(V,) the half that each validation row's user belongs to, if all is well."""
    faults = []
    for name, split in (("training", training), ("validation", validation)):
        lengths = {len(values) for values in split.frame.values()}
        if lengths != {len(split.batch)}:
            faults.append(
                f"the {name} frame has {' or '.join(map(str, sorted(lengths)))} rows and its "
                f"encoded split {len(split.batch)}; run kedro run --pipelines training"
            )
        if len(split.batch) == 0:
            faults.append(f"the {name} split is empty; move the split's dates in conf")
        if split.batch.label is None:
            faults.append(f"the {name} split has no labels")
    if not pairs:
        faults.append(
            "the spec has no two columns that could be crossed; declare categorical columns, "
            "or buckets of numeric ones"
        )
    user = _flat(validation.frame[spec.entities.user])
    half = _shares(user, 2, seed)
    fewest = min(len(set(user[half == part].tolist())) for part in (0, 1))
    if fewest < 2:
        faults.append(
            f"a half of the validation window has {fewest} values of {spec.entities.user}; an "
            "interval needs 2 or more: move split.validation_from"
        )
    if faults:
        raise CrossSearchError(faults)
    return half


def _rows(
    split: Split,
    index: Ints,
    codes: dict[str, Codes],
    logit: Floats,
    base: TrainingConfig,
    spec: FeatureSpec,
) -> Rows:
    """Some rows of a split, with what the deep part says of them."""
    from fathom.feed import weights

    assert split.batch.label is not None
    weight = weights(split.batch, base.use_weights, 1.0)
    return Rows(
        codes={n: c.take(index) if isinstance(c, Ragged) else c[index] for n, c in codes.items()},
        label=split.batch.label[index].astype(np.float64),
        weight=np.ones(len(index)) if weight is None else weight[index].astype(np.float64),
        user=_numbered(_flat(split.frame[spec.entities.user])[index], {}),
        logit=logit[index],
    )


def _shares(values: Values, parts: int, seed: int) -> Ints:
    """(N,) the part, 0 to ``parts`` - 1, that each row's value belongs to, wherever it stands."""
    known: dict[Any, int] = {}
    codes = _numbered(_flat(values), known)
    share = np.array([hash_value(f"{seed} {value}") % parts for value in known], np.int64)
    return share[codes]


def _coded(column: Column, training: Split, validation: Split) -> tuple[list[Codes], int]:
    """A column's values in both splits as numbers, and how many there are in training."""
    known: dict[Any, int] = {}
    coded: list[Codes] = []
    for split in (training, validation):
        values = split.frame[column.name]
        flat = _texts(column, _flat(values))
        codes = _numbered(flat, known, new=split is training)
        coded.append(Ragged(codes, values.offsets) if isinstance(values, Ragged) else codes)
    return coded, max(len(known), 1)


def _texts(column: Column, values: NDArray[Any]) -> NDArray[Any]:
    """Values as crosses see them: numbers by their bucket."""
    if not column.is_numeric:
        return values
    distinct, place = np.unique(values, return_inverse=True)
    return bucket(distinct, column.buckets)[place]


def _numbered(values: NDArray[Any], known: dict[Any, int], new: bool = True) -> Ints:
    """(E,) numbers of values, -1 for None; those that are not known get the next, or -1 too."""
    listed = values.tolist()
    if new:
        for value in dict.fromkeys(listed):
            if value is not None:
                known.setdefault(value, len(known))
    return np.fromiter((known.get(value, -1) for value in listed), np.int64, len(listed))


def _flat(values: Values) -> NDArray[Any]:
    return values.values if isinstance(values, Ragged) else values
