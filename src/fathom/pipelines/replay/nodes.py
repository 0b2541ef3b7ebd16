"""Nodes of the replay pipeline."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.config import SplitConfig, TrainingConfig
from fathom.drift import MonitoringConfig
from fathom.evaluation import EvaluationConfig
from fathom.gate import GateConfig
from fathom.replay import ReplayConfig
from fathom.retraining import RetrainingConfig
from fathom.spec import FeatureSpec

if TYPE_CHECKING:
    from ibis.expr.types import Table
else:
    Table = Any

log = logging.getLogger(__name__)


def replay_year(
    training_frame: Table,
    spec: FeatureSpec,
    split: SplitConfig,
    training: TrainingConfig,
    retraining: RetrainingConfig,
    monitoring: MonitoringConfig,
    gate: GateConfig,
    evaluation: EvaluationConfig,
    config: ReplayConfig,
    checkpoints: str,
) -> dict[str, Any]:
    """Live the year again, week by week, under every policy of retraining.

    Returns:
        The figures (`fathom.replay.Replay.run`).
    """
    from fathom.files import remove
    from fathom.replay import Log, Replay
    from fathom.retraining import Recipe

    recipe = Recipe(spec, training, retraining, evaluation)
    folder = Path(checkpoints) / "replay"
    year = Log.of(training_frame, spec)
    train_from = split.moment("train_from")
    found = Replay(year, recipe, monitoring, gate, config, train_from, folder).run()
    remove(folder)  # checkpoints are of no use to anyone now
    return found


def write_replay(replay_figures: dict[str, Any]) -> str:
    """Show the replay as one page; the log has the sums."""
    from fathom import replay_report

    log.info("the year's replay\n%s", replay_report.table(replay_figures))
    return replay_report.page(replay_figures)
