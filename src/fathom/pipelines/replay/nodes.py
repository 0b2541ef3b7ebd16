"""Nodes of the replay pipeline."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fathom.feature_store import FeatureStoreConfig
from fathom.replay import ReplayConfig

log = logging.getLogger(__name__)


def replay_served(
    config: ReplayConfig, feature_store: FeatureStoreConfig, registry: str
) -> dict[str, Any]:
    """Build every vector that serving logged again, from history, and compare.

    Returns:
        The report (`fathom.replay.Report.as_dict`).
    """
    from fathom import replay
    from fathom.feature_store import FeatureRepo
    from fathom.registry import Registry

    repo = FeatureRepo(feature_store, Path.cwd())
    report = replay.replay(repo, Registry(Path(registry)), config).as_dict()
    log.info("replay of %s\n%s", config.feature_log, replay.table(report))
    return report


def judge_replay(replay_report: dict[str, Any], config: ReplayConfig) -> None:
    """Let the run fail if anything differs; the report is written by then.

    Raises:
        ReplayError: names the columns that differ, or says that nothing was compared.
    """
    from fathom import replay

    replay.judge(replay_report, config)
