"""Nodes of the skew pipeline."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from fathom.feature_store import FeatureStoreConfig
from fathom.skew import SkewConfig

log = logging.getLogger(__name__)


def replay_served(
    config: SkewConfig, feature_store: FeatureStoreConfig, registry: str
) -> dict[str, Any]:
    """Build every vector that serving logged again, from history, and compare.

    Returns:
        The report (`fathom.skew.Report.as_dict`).
    """
    from fathom import skew
    from fathom.feature_store import FeatureRepo
    from fathom.registry import Registry

    repo = FeatureRepo(feature_store, Path.cwd())
    report = skew.replay(repo, Registry(Path(registry)), config).as_dict()
    log.info("what was served, by %s\n%s", config.feature_log, skew.table(report))
    return report


def judge_skew(skew_report: dict[str, Any], config: SkewConfig) -> None:
    """Let the run fail if anything differs; the report is written by then.

    Raises:
        SkewError: names the columns that differ, or says that nothing was compared.
    """
    from fathom import skew

    skew.judge(skew_report, config)
