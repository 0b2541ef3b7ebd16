"""Retraining that is safe to leave alone: warm from the champion, fresh where that does not hold.

A warm start goes back to the champion's weights and optimizer states as they were before its
cool-down (`TrainingConfig.cool_down`), and learns what these have not seen: all that is new, then,
in a cool-down of its own, the examples that are held back for it. So it learns nothing twice, which
embeddings would fit rather than learn from (Zhang et al. 2022, "Towards understanding the
overfitting phenomenon of deep click-through rate models"), and never from weights whose rates have
fallen. Vocabularies and crosses are fitted anew and rows carried by key (`fathom.warm`); numeric
scalers are the champion's, since its weights know their positions. A fresh start fits all anew on
all the data.

The warm one is compared with the champion on the validation window, never on the test window,
which is the gate's. If it may be worse by more than a margin, or fails, a fresh one is trained too,
and the better of the two goes on.

What has passed the gate then learns the windows that it was validated and judged on, before it is
released (`catch_up`): they are the newest weeks, and a ranker without them ages from the start.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

import fathom
from fathom.artifact import ArtifactError
from fathom.batch import Batch, Ragged, held_back
from fathom.config import OF_THE_MACHINE, SplitConfig, TrainingConfig, moment_of
from fathom.encoding import Encoder, Frame, draws, fit_encoder, outcome
from fathom.evaluation import LOSS, EvaluationConfig, Interval, Predictions, paired_interval
from fathom.spec import EVENT_TIMESTAMP, FeatureSpec

if TYPE_CHECKING:
    from fathom.ranker import Ranker
    from fathom.registry import Registry
    from fathom.training import Report, Trained
    from fathom.warm import WarmStart

Start = Literal["warm", "fresh"]
log = logging.getLogger(__name__)


class RetrainingConfig(BaseModel):
    """When and how the champion is trained again (``params:retraining``).

    Args:
        train_days: days of training before the validation window; None: from where the champion's
            training began.
        validation_days, test_days: the newest labelled days: the test window, which the gate looks
            at, comes last; the validation window lies before it.
        start: ``warm`` from what the champion has learnt, or always ``fresh``.
        growth: monitoring asks for a retraining once there are so many times the rows that the
            champion has learnt from. More data win what no drift shows.
        fresh_growth: start fresh once there are so many times the rows that the last fresh start
            learnt from: a chain of warm starts goes on from a model that was made from fewer.
        fresh_margin: a warm start is good enough if its loss on the validation window exceeds the
            champion's by less than this, at the interval's upper end; else a fresh one is tried.
        catch_up: whether what passes the gate learns the windows it was judged on, too.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    train_days: int | None = Field(default=None, ge=1)
    validation_days: int = Field(default=7, ge=1)
    test_days: int = Field(default=14, ge=1)
    start: Start = "warm"
    growth: float = Field(default=1.05, gt=1)
    fresh_growth: float = Field(default=1.5, gt=1)
    fresh_margin: float = Field(default=0.001, ge=0)
    catch_up: bool = True


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how; the same for every training of a deployment."""

    spec: FeatureSpec
    training: TrainingConfig
    retraining: RetrainingConfig
    evaluation: EvaluationConfig


@dataclass(frozen=True)
class Base:
    """Whom a training may start from: a ranker, and what its training kept (`Trained.state`)."""

    version: str
    ranker: Ranker
    state: Path


@dataclass(frozen=True)
class Window:
    """Labelled exposures of a span of time.

    Args:
        frame: every column of the spec, its keys, the label, and ``event_timestamp``.
    """

    frame: Frame

    @property
    def moments(self) -> NDArray[np.datetime64]:
        """(N,) when each exposure was, UTC."""
        moments = self.frame[EVENT_TIMESTAMP]
        assert not isinstance(moments, Ragged)
        return moments.astype("datetime64[us]")

    def predictions(self, spec: FeatureSpec, scores: NDArray[Any]) -> Predictions:
        """What was predicted for each exposure, and what came of it."""

        def codes(name: str) -> NDArray[np.int64]:
            values = self.frame[name]
            assert not isinstance(values, Ragged)
            return np.unique(values.astype(str), return_inverse=True)[1].astype(np.int64)

        return Predictions(
            label=outcome(self.frame[spec.label.name], spec).astype(np.float64),
            probability=scores,
            user=codes(spec.entities.user),
            request=codes(spec.entities.request),
            task=spec.task,
        )


@dataclass(frozen=True)
class Attempt:
    """One training of a retraining.

    Args:
        steps, examples: that it took, repeated passes counted.
        window_rows: of the whole training window, what a warm start leaves to its base included.
        fresh_rows: what the fresh start learnt from that it goes back to, itself included.
        against: its validation loss less the champion's, where both were compared.
    """

    start: Start
    encoder: Encoder
    trained: Trained
    training_batch: Batch
    validation_batch: Batch
    steps: int
    examples: int
    window_rows: int
    fresh_rows: int
    against: Interval | None = None

    @property
    def loss(self) -> float:
        """The validation loss of the weights that were kept."""
        return self.trained.history[self.trained.best_epoch - 1].validation_loss


@dataclass(frozen=True)
class Retrained:
    """What a retraining ends with.

    Args:
        chosen: the attempt that goes on to the gate.
        attempts: all, in order; more than one if the warm start was not good enough.
        base: the version it could have started from, or None.
        reason: why it started as it did.
    """

    chosen: Attempt
    attempts: tuple[Attempt, ...]
    base: str | None
    reason: str

    def as_dict(self) -> dict[str, Any]:
        """How it went, as plain values."""
        attempts = [
            {
                "start": tried.start,
                "steps": tried.steps,
                "examples": tried.examples,
                "validation_loss": tried.loss,
                "against_champion": asdict(tried.against) if tried.against else None,
            }
            for tried in self.attempts
        ]
        return {
            "start": self.chosen.start,
            "from": self.base,
            "reason": self.reason,
            "attempts": attempts,
        }


# -- when ----------------------------------------------------------------------------------------


def newest_split(
    newest: datetime,
    spec: FeatureSpec,
    config: RetrainingConfig,
    train_from: datetime,
    without: Sequence[tuple[str, str]] = (),
) -> SplitConfig:
    """The split that ends with the newest labelled exposure.

    It moves by whole steps of the features' time, so that a few more rows of the same day change
    nothing.

    Args:
        train_from: where training begins unless ``train_days`` says so.
        without: spans to leave out.
    """
    test = _step_end(newest, spec) - timedelta(days=config.test_days)
    validation = learnable_until(newest, spec, config)
    if config.train_days is not None:
        train_from = validation - timedelta(days=config.train_days)
    moments = [moment.isoformat() for moment in (train_from, validation, test)]
    return SplitConfig(*moments, without=tuple(without))


def learnable_until(newest: datetime, spec: FeatureSpec, config: RetrainingConfig) -> datetime:
    """Until when a retraining could learn: what comes later is to validate and judge it by."""
    return _step_end(newest, spec) - timedelta(days=config.validation_days + config.test_days)


def _step_end(moment: datetime, spec: FeatureSpec) -> datetime:
    origin = spec.grain_origin
    return origin + math.ceil((moment - origin) / spec.grain) * spec.grain


def challenged(registry: Registry, split: SplitConfig) -> str | None:
    """Whom a retraining on a split starts from and challenges: the champion.

    If the champion is what this very retraining has made, then whom that one started from: a run
    that is repeated after the promotion finds everything as it left it.
    """
    version = registry.champion()
    if version is None:
        return None
    provenance = registry.described(version)["provenance"]
    validated_from = provenance.get("validated_from", provenance["trained_until"])
    if moment_of(validated_from) == split.moment("validation_from"):
        started: str | None = provenance.get("from")
        return started
    return version


def utc(moment: datetime) -> datetime:
    """A moment of a table, whose moments are UTC, as an aware one."""
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def trained_from(provenance: Mapping[str, Any]) -> datetime:
    """Where a ranker's training data begin."""
    return moment_of(provenance["trained_from"])


def trained_until(provenance: Mapping[str, Any]) -> datetime:
    """Where a ranker's training data end."""
    return moment_of(provenance["trained_until"])


def nothing_newer(provenance: Mapping[str, Any], learnable: datetime) -> str | None:
    """Why a retraining has to wait: it would learn nothing that the champion has not; else None.

    Nor could it be judged: the champion may have learnt the windows for that, too.

    Args:
        learnable: until when it could learn (`learnable_until`).
    """
    until = trained_until(provenance)
    if learnable > until:
        return None
    return (
        f"waiting: the champion has learnt what there is until {until:%Y-%m-%d %H:%M}, and a "
        f"retraining could learn until {learnable:%Y-%m-%d %H:%M} only, for what comes after that "
        "is to validate and judge it by"
    )


def base_of(registry: Registry, version: str | None, recipe: Recipe) -> tuple[Base | None, str]:
    """What a warm start can go on from.

    Returns:
        The version and what its training kept, or None, and the reason in words.
    """
    if recipe.retraining.start == "fresh":
        return None, "params:retraining asks for a fresh start"
    if version is None:
        return None, "there is no champion to start from"
    try:
        state = registry.state(version)
    except ArtifactError as error:
        return None, f"the state of {version} cannot be used: {error}"
    if state is None:
        return None, f"the registry keeps no state of {version}"
    ranker = registry.load(version)
    if ranker.spec.hash != recipe.spec.hash:
        return None, f"the feature spec is no longer that of {version}"
    mine, theirs = (_of_the_model(settings) for settings in (recipe.training, ranker.config))
    changed = [name for name in mine if mine[name] != theirs[name]]
    if changed:
        return None, f"settings are no longer those of {version}: {', '.join(changed)}"
    return Base(version, ranker, state), f"the champion is {version}"


def _of_the_model(training: TrainingConfig) -> dict[str, Any]:
    apart = (*OF_THE_MACHINE, "seed")
    return {name: value for name, value in training.as_dict().items() if name not in apart}


# -- how -----------------------------------------------------------------------------------------


def retrain(
    training_window: Window,
    validation_window: Window,
    recipe: Recipe,
    base: Base | None,
    reason: str,
    folder: Path,
    report: Report | None = None,
) -> Retrained:
    """Train a challenger: warm from ``base`` if there is one and that is good enough, else fresh.

    Args:
        base, reason: of `base_of`.
        folder: where checkpoints are kept; a retraining that was killed goes on from there.
    """
    from fathom.training import TrainingError

    def fresh() -> Attempt:
        encoder = fit_encoder(training_window.frame, recipe.spec)
        batches = _encoded(encoder, training_window.frame, validation_window.frame)
        return attempt("fresh", encoder, batches, recipe.training, folder / "fresh", report)

    def only(found: Attempt, why: str) -> Retrained:
        return _said(Retrained(found, (found,), base.version if base else None, why))

    if base is None:
        return only(fresh(), reason)
    if not (training_window.moments >= _learnt_until(base)).any():
        return only(fresh(), f"there is nothing newer than what {base.version} was trained on")
    growth = grown(len(training_window.moments), base.ranker.provenance)
    if growth >= recipe.retraining.fresh_growth:
        return only(fresh(), f"{growth:.2f} times the rows of the last fresh start are there")
    warm, trouble = None, ""
    try:
        warm = _warm(training_window, validation_window, recipe, base, folder / "warm", report)
        trouble = _trouble(warm, recipe)
    except TrainingError as error:
        trouble = f"it ends with: {error}"
    if warm is not None and not trouble:
        return only(warm, reason)
    log.info("a warm start is not good enough: %s", trouble)
    attempts = tuple(tried for tried in (warm, fresh()) if tried is not None)
    best = min(attempts, key=lambda tried: tried.loss)
    why = f"{reason}; a warm start is not good enough: {trouble}; the {best.start} one is better"
    return _said(Retrained(best, attempts, base.version, why))


def catch_up(
    everything: Window,
    judged_on: Window,
    recipe: Recipe,
    judged: Base,
    folder: Path,
    report: Report | None = None,
) -> Attempt | None:
    """Let what has passed the gate learn what it was validated and judged on: a warm start from it.

    Nothing is left to judge the outcome by. But it has learnt ``judged_on``: if it does not predict
    that better than before, something went wrong, and what was judged is to be released as it is.

    Args:
        everything: all that is labelled. judged_on: the test window, at its end.

    Returns:
        None if something went wrong, which the log says.
    """
    from fathom.training import TrainingError

    try:
        found = _warm(everything, judged_on, recipe, judged, folder, report)
    except TrainingError as error:
        log.warning(
            "%s is released as it was judged: catching up ends with: %s", judged.version, error
        )
        return None
    if found.against is None or not found.against.difference < 0:
        log.warning(
            "%s is released as it was judged: caught up, its loss on the windows it has learnt "
            "would not be lower",
            judged.version,
        )
        return None
    log.info("caught up on %s examples, from %s", f"{found.examples:,}", judged.version)
    return found


def grown(rows: int, provenance: Mapping[str, Any]) -> float:
    """How many times the rows are there that a ranker's last fresh start learnt from."""
    return rows / _fresh_rows(provenance)


def outgrown(rows: int, provenance: Mapping[str, Any], config: RetrainingConfig) -> str | None:
    """Why data that have outgrown a ranker ask for its retraining; None if they have not.

    More data win what no correction of the old model's errors shows, so that drift does not see it.

    Args:
        rows: that a retraining would learn from.
    """
    growth = rows / int(provenance.get("window_rows", provenance["rows"]["train"]))
    if growth < config.growth:
        return None
    return (
        f"growth: there are {growth:.2f} times the rows that the champion has learnt from "
        f"(≥ {config.growth:g})"
    )


def _fresh_rows(provenance: Mapping[str, Any]) -> int:
    """The rows that a ranker's last fresh start learnt from."""
    return int(provenance.get("fresh_rows", provenance["rows"]["train"]))


def _trouble(warm: Attempt, recipe: Recipe) -> str:
    """Why a warm start is not good enough, in words; empty if it is."""
    margin = recipe.retraining.fresh_margin
    if warm.against is None:
        return "its validation loss against the champion's is undefined"
    if warm.against.hi < margin:
        return ""
    return (
        f"its validation loss differs from the champion's by {warm.against.difference:+.5f}, at "
        f"worst by {warm.against.hi:+.5f}, and the margin is {margin:+.5f}"
    )


def _against(base: Base, warm: Attempt, window: Window, recipe: Recipe) -> Attempt:
    """A warm start, with its validation loss less that of what it started from."""
    from fathom.ranker import Ranker

    challenger = Ranker(warm.encoder, warm.trained.model, recipe.training)
    sides = (base.ranker.score(window.frame), challenger.score_batch(warm.validation_batch))
    champion, ours = (window.predictions(recipe.spec, scores) for scores in sides)
    found = paired_interval(champion, ours, recipe.evaluation)[LOSS[recipe.spec.task]]
    return replace(warm, against=found)


def _learnt_until(base: Base) -> np.datetime64:
    """As `Window.moments` are, in UTC."""
    until = trained_until(base.ranker.provenance).astimezone(timezone.utc)
    return np.datetime64(until.replace(tzinfo=None), "us")


def warm_rows(window: Window, until: np.datetime64, recipe: Recipe) -> NDArray[np.int64]:
    """What a warm start learns, as rows: all since ``until``, and those of the cool-down."""
    draw = draws(window.frame, recipe.spec)
    assert draw is not None
    late = held_back(draw, recipe.training.cool_down)
    return np.flatnonzero(late | (window.moments >= until))


def _warm(
    training_window: Window,
    validation_window: Window,
    recipe: Recipe,
    base: Base,
    folder: Path,
    report: Report | None,
) -> Attempt:
    from fathom.warm import WarmStart

    known = base.ranker.encoder
    encoder = fit_encoder(training_window.frame, recipe.spec, scalers_of=known)
    start = WarmStart(base.state, known.layout, base.ranker.config, encoder.rows_of(known))
    rows = warm_rows(training_window, _learnt_until(base), recipe)
    batches = _encoded(encoder, take(training_window.frame, rows), validation_window.frame)
    known_rows = (len(training_window.moments), _fresh_rows(base.ranker.provenance))
    warm = attempt("warm", encoder, batches, recipe.training, folder, report, start, known_rows)
    return _against(base, warm, validation_window, recipe)


def _encoded(encoder: Encoder, training: Frame, validation: Frame) -> tuple[Batch, Batch]:
    return encoder.encode(training), encoder.encode(validation)


def attempt(
    kind: Start,
    encoder: Encoder,
    batches: tuple[Batch, Batch],
    training: TrainingConfig,
    folder: Path,
    report: Report | None = None,
    start: WarmStart | None = None,
    known_rows: tuple[int, int] | None = None,
) -> Attempt:
    """Train once, from the last checkpoint of the same training if there is one.

    Args:
        batches: what is learnt, and the validation window.
        start: what it starts from; None for random weights.
        known_rows: of a warm start, ``Attempt.window_rows`` and ``fresh_rows``.
    """
    from fathom.training import train

    task = encoder.spec.task
    trained = train(encoder.layout, *batches, training, task, folder, report, start)
    passes = [epoch.examples for epoch in trained.history]
    steps = sum(math.ceil(rows / training.batch_size) for rows in passes)
    rows = known_rows or (len(batches[0]),) * 2
    return Attempt(kind, encoder, trained, *batches, steps, sum(passes), *rows)


def provenance(
    of: Attempt,
    training: TrainingConfig,
    split: SplitConfig,
    base: str | None = None,
    caught_up: tuple[str, datetime] | None = None,
) -> dict[str, Any]:
    """Where a model comes from. No times: the same training leaves the same bytes.

    Args:
        base: the version that a retraining challenges.
        caught_up: the version that passed the gate, and until when this one, which goes on from it,
            has learnt.
    """
    from fathom.checkpoint import digest
    from fathom.hardware import hardware

    batches = (of.training_batch, of.validation_batch)
    trained = of.trained
    assert trained.state is not None
    return {
        "seed": training.seed,
        # Of all that the model was trained on and stopped by; of nothing that came later.
        "data_hash": hashlib.sha256(
            "".join(batch.fingerprint() for batch in batches).encode()
        ).hexdigest(),
        "code_version": fathom.__version__,
        "hardware": hardware(),
        "trained_from": split.train_from,
        "trained_until": caught_up[1].isoformat() if caught_up else split.validation_from,
        "validated_from": split.validation_from,
        "judged": caught_up[0] if caught_up else None,
        "rows": {"train": len(batches[0]), "validation": len(batches[1])},
        "best_epoch": trained.best_epoch,
        "parameters": sum(weight.numel() for weight in trained.model.parameters()),
        "wide_zero_share": trained.history[trained.best_epoch - 1].wide_zero_share,
        "start": of.start,
        "from": base,
        "steps": of.steps,
        "examples": of.examples,
        "window_rows": of.window_rows,
        "fresh_rows": of.fresh_rows,
        # Of what a warm start from this model goes on from, which the registry keeps beside it.
        "state": digest(trained.state),
    }


def base_from(
    of: Attempt,
    training: TrainingConfig,
    split: SplitConfig,
    base: str | None = None,
    caught_up: tuple[str, datetime] | None = None,
) -> Base:
    """What a training ended with, as what the next one can start from; without a tower."""
    from fathom.ranker import Ranker

    described = provenance(of, training, split, base, caught_up)
    ranker = Ranker(of.encoder, of.trained.model, training, described)
    assert of.trained.state is not None
    return Base(ranker.version, ranker, of.trained.state)


def take(frame: Frame, rows: NDArray[np.int64]) -> Frame:
    """The rows of a frame at ``rows``, in that order."""
    return {
        name: values.take(rows) if isinstance(values, Ragged) else values[rows]
        for name, values in frame.items()
    }


def _said(retrained: Retrained) -> Retrained:
    chosen = retrained.chosen
    log.info(
        "%s start, %s steps: validation loss %.5f (%s)",
        chosen.start,
        f"{chosen.steps:,}",
        chosen.loss,
        retrained.reason,
    )
    return retrained
