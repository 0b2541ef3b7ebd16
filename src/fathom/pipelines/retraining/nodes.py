"""Nodes of the retraining pipeline."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.config import SplitConfig, TrainingConfig
from fathom.evaluation import EvaluationConfig
from fathom.pipelines.training.nodes import curves, frame_of_split, learnt, train_tower
from fathom.retraining import Attempt, RetrainingConfig, Window
from fathom.spec import EVENT_TIMESTAMP, FeatureSpec
from fathom.tower import TowerConfig
from fathom.tracking import TrackingConfig

if TYPE_CHECKING:
    from ibis.expr.types import Table

    from fathom.encoding import Encoder
    from fathom.ranker import Ranker
else:
    Table = Encoder = Ranker = Any


def plan_retraining(
    training_frame: Table,
    previous_decisions: str | None,
    spec: FeatureSpec,
    split: SplitConfig,
    config: RetrainingConfig,
    registry: str,
) -> tuple[SplitConfig, dict[str, str | None]]:
    """Lay the windows of a retraining so that the newest labelled exposures are the test's.

    Windows in which monitoring found faults of the data are left out: a broken feed is no training
    set, nor one to judge by.

    Args:
        split: says where training begins while there is no champion, and what else to leave out.

    Returns:
        The split, and the ``version`` that is challenged, or None.

    Raises:
        ValueError: there is nothing to learn yet that the champion has not.
    """
    from fathom import retraining
    from fathom.drift import history
    from fathom.registry import Registry

    broken = [
        (past.window.start.isoformat(), past.window.end.isoformat())
        for past in history.read(previous_decisions or "")
        if past.alerts
    ]
    without = dict.fromkeys((*split.without, *broken))
    versions = Registry(Path(registry))
    version = versions.champion()
    train_from = split.moment("train_from")
    if version is not None:
        train_from = retraining.trained_from(versions.described(version)["provenance"])
    labelled = training_frame.filter(training_frame[spec.label.name].notnull())
    for start, end in replace(split, without=tuple(without)).spans:
        labelled = labelled.filter(~labelled[EVENT_TIMESTAMP].between(start, end))
    newest = retraining.utc(labelled[EVENT_TIMESTAMP].max().to_pyarrow().as_py())
    planned = retraining.newest_split(newest, spec, config, train_from, tuple(without))
    challenged = retraining.challenged(versions, planned)
    if challenged is not None:
        why = retraining.nothing_newer(
            versions.described(challenged)["provenance"], planned.moment("validation_from")
        )
        if why is not None:
            raise ValueError(why)
    return planned, {"version": challenged}


def retrain_champion(
    train_frame: Table,
    validation_frame: Table,
    base: dict[str, str | None],
    split: SplitConfig,
    spec: FeatureSpec,
    training: TrainingConfig,
    config: RetrainingConfig,
    evaluation: EvaluationConfig,
    retrieval: TowerConfig,
    registry: str,
    checkpoints: str,
    tracking: TrackingConfig,
) -> tuple[
    Encoder, Ranker, str, list[dict[str, Any]], dict[str, Any], dict[str, Any], dict[str, Any]
]:
    """Train a challenger of the champion: warm from it, or fresh.

    Returns:
        Its encoder, the candidate ranker, its version, what each epoch gave, where what it learnt
        is kept, what its tower retrieves, and how it was trained.
    """
    from fathom import retraining
    from fathom.registry import Registry
    from fathom.tracking import reporting

    recipe = retraining.Recipe(spec, training, config, evaluation)
    found, reason = retraining.base_of(Registry(Path(registry)), base["version"], recipe)
    learnt_from = retraining.Window(frame_of_split(train_frame, spec, EVENT_TIMESTAMP))
    validation = retraining.Window(frame_of_split(validation_frame, spec, EVENT_TIMESTAMP))
    with reporting(tracking, training) as report:
        folder = Path(checkpoints) / "retraining"
        done = retraining.retrain(learnt_from, validation, recipe, found, reason, folder, report)
    best = done.chosen
    described = retraining.provenance(best, training, split, base["version"])
    ranker, retrieved = _with_tower(best, learnt_from, training, retrieval, described)
    kept = (curves(best.trained), learnt(best.trained), retrieved, done.as_dict())
    return best.encoder, ranker, ranker.version, *kept


def catch_up(
    candidate: Ranker,
    training_state: dict[str, Any],
    judgement: dict[str, Any],
    train_frame: Table,
    validation_frame: Table,
    test_frame: Table,
    split: SplitConfig,
    training: TrainingConfig,
    config: RetrainingConfig,
    evaluation: EvaluationConfig,
    retrieval: TowerConfig,
    checkpoints: str,
) -> tuple[Ranker, dict[str, Any]]:
    """Let a challenger that the gate let pass learn the windows it was judged on, if asked for.

    Returns:
        What is released, and where what its training learnt is kept: of the challenger itself if
        it was refused, is not asked to catch up, or fails to.
    """
    from fathom import retraining

    if not (judgement["promoted"] and config.catch_up):
        return candidate, training_state
    spec = candidate.spec
    recipe = retraining.Recipe(spec, training, config, evaluation)
    judged = retraining.Base(candidate.version, candidate, Path(training_state["folder"]))
    rows = train_frame.union(validation_frame).union(test_frame).order_by(EVENT_TIMESTAMP)
    everything = retraining.Window(frame_of_split(rows, spec, EVENT_TIMESTAMP))
    judged_on = retraining.Window(frame_of_split(test_frame, spec, EVENT_TIMESTAMP))
    folder = Path(checkpoints) / "retraining" / "caught-up"
    found = retraining.catch_up(everything, judged_on, recipe, judged, folder)
    if found is None:
        return candidate, training_state
    until = split.moment("test_from") + timedelta(days=config.test_days)
    challenged = candidate.provenance["from"]
    described = retraining.provenance(
        found, training, split, challenged, (candidate.version, until)
    )
    ranker, _ = _with_tower(found, everything, training, retrieval, described)
    return ranker, learnt(found.trained)


def _with_tower(
    of: Attempt,
    window: Window,
    training: TrainingConfig,
    retrieval: TowerConfig,
    described: dict[str, Any],
) -> tuple[Ranker, dict[str, Any]]:
    """What a training ended with, with a tower of its whole window, and what that retrieves."""
    from fathom.ranker import Ranker

    batch = of.encoder.encode(window.frame)
    tower, retrieved = train_tower(of.encoder, batch, of.validation_batch, retrieval)
    return Ranker(of.encoder, of.trained.model, training, described, tower), retrieved
