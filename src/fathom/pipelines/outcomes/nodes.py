"""Nodes of the outcomes pipeline."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.evaluation import EvaluationConfig
from fathom.outcomes import OutcomesConfig
from fathom.spec import FeatureSpec

if TYPE_CHECKING:
    from ibis.expr.types import Table

    from fathom.judging import Judgement
else:
    Table = Judgement = Any

Partitions = dict[str, Table]

log = logging.getLogger(__name__)


def join_outcomes(
    interactions: Table, raw_outcomes: Table, spec: FeatureSpec, config: OutcomesConfig
) -> tuple[Table, dict[str, Any]]:
    """Join what was served with what became of it.

    Args:
        raw_outcomes: explicit outcomes; None where there are none.

    Returns:
        Served rows with their label (`fathom.outcomes.with_outcomes`), and the report.

    Raises:
        OutcomesError: nothing was served, or nothing that could be an outcome has arrived.
    """
    from fathom import outcomes

    served = outcomes.read_log(Path(config.prediction_log))
    until = outcomes.watermark(config, interactions, raw_outcomes)
    outcomes.require(served is not None, until, config)
    rows = outcomes.served(served, spec, config.shown)
    labelled = outcomes.with_outcomes(rows, spec, config, interactions, raw_outcomes, until)
    labelled = labelled.cache()
    report = outcomes.report(labelled, spec, raw_outcomes) | {"until": until.isoformat()}  # type: ignore[union-attr]
    log.info("served, by %s: %s", config.prediction_log, report)
    return labelled, report


def add_exposures(
    served_outcomes: Table, past_served_exposures: Table, spec: FeatureSpec
) -> Partitions:
    """Make exposures of what was shown, a partition for each day that it was served on.

    Args:
        past_served_exposures: those of earlier runs, whose log may be gone; None at first.
    """
    from fathom import outcomes

    found = outcomes.exposures(served_outcomes, spec)
    found = outcomes.merged(past_served_exposures, found, spec).cache()
    names = found.select("partition").distinct().to_pyarrow()["partition"].to_pylist()
    return {name: found.filter(found.partition == name).drop("partition") for name in sorted(names)}


def judge_served(
    served_outcomes: Table,
    spec: FeatureSpec,
    config: OutcomesConfig,
    evaluation: EvaluationConfig,
    registry: str,
) -> list[dict[str, Any]]:
    """Judge the challenger and a champion on probation, and do what the judgements say.

    Returns:
        A judgement for each that was judged.
    """
    from fathom import judging
    from fathom.feature_log import HOW, PROBABILITY, REQUEST, VERSION
    from fathom.registry import Registry
    from fathom.spec import EVENT_TIMESTAMP

    versions, found = Registry(Path(registry)), list[Judgement]()
    champion, challenge, promoted = versions.champion(), versions.challenger(), versions.promoted()
    keys = [REQUEST, spec.entities.user, spec.entities.item, EVENT_TIMESTAMP]
    rows = served_outcomes.select(*keys, VERSION, HOW, PROBABILITY, spec.label.name).to_pyarrow()
    if champion is not None and challenge is not None:
        judged = judging.judge_challenger(rows, champion, challenge, spec, config, evaluation)
        if judged.act == "withdraw":
            versions.withdraw("; ".join(judged.reasons), by="outcomes", of=challenge)
        found.append(judged)
    since: datetime | None = config.since(promoted) if promoted else None
    if champion is not None and since is not None and len(versions.champions()) > 1:
        judged = judging.judge_champion(rows, champion, since, spec, config, evaluation)
        if judged.act == "rollback":
            versions.rollback("; ".join(judged.reasons), by="outcomes", of=champion)
        found.append(judged)
    for judged in found:
        log.info("%s %s: %s", judged.act, judged.version, "; ".join(judged.reasons))
    return [judged.as_dict() for judged in found]
