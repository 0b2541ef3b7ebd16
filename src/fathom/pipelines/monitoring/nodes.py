"""Nodes of the monitoring pipeline."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from fathom.drift import MonitoringConfig
from fathom.spec import EVENT_TIMESTAMP

if TYPE_CHECKING:
    from ibis.expr.types import Table
else:
    Table = Any


class WindowConfig(BaseModel):
    """Which exposures are the newest (``params:window``).

    Args:
        days: the window ends with the newest exposure and reaches back this far.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    days: int = Field(default=28, ge=1)


def watch(
    training_frame: Table,
    release: dict[str, Any],
    config: MonitoringConfig,
    window: WindowConfig,
    registry: str,
) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Compare the newest window with the champion's reference and decide on retraining.

    The spec is the champion's own copy, so that editing conf cannot move its thresholds.

    Returns:
        The decision, the report as one HTML page, and Evidently's figures.
        Without a champion, a decision to retrain that says so.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from fathom import drift
    from fathom.feature_store import frame_of
    from fathom.registry import Registry

    moment = training_frame[EVENT_TIMESTAMP]
    end = moment.max().to_pyarrow().as_py()
    start = end - timedelta(days=window.days)
    versions = Registry(Path(registry))
    version = versions.champion()
    if version is None:
        found = drift.nothing_to_watch(drift.Window(start, end))
        return {"version": None, **found.decision.to_json()}, found.html, found.evidently
    champion = versions.load(version)
    reference = pq.read_table(versions.path(version) / "reference.parquet")
    spec = champion.spec
    # Without inclusion probabilities: the model predicts on the scale of the sampled log.
    columns = dict.fromkeys(
        [*spec.keys, EVENT_TIMESTAMP, spec.label.name, *(column.name for column in spec.columns)]
    )
    current = training_frame.filter(moment >= start).select(*columns).to_pyarrow()
    scores = champion.score(frame_of(current))
    current = current.append_column("probability", pa.array(scores))
    found = drift.monitor(
        reference.to_pandas(), current.to_pandas(), spec, config, drift.Window(start, end)
    )
    return {"version": version, **found.decision.to_json()}, found.html, found.evidently
