"""Nodes of the monitoring pipeline."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fathom.drift.config import MonitoringConfig
from fathom.retraining import RetrainingConfig
from fathom.spec import EVENT_TIMESTAMP

if TYPE_CHECKING:
    from ibis.expr.types import Table
    from pyarrow import Table as ArrowTable

    from fathom.ranker import Ranker
else:
    Table = ArrowTable = Ranker = Any


class WindowConfig(BaseModel):
    """Which exposures are compared (``params:window``).

    Args:
        of: ``exposures``, from the training frame, scored now; or ``served``: what the service
            logged, with the features and the predictions as they were served, and the labels that
            have arrived (``kedro run --pipelines outcomes``).
        days: the window reaches back this far from its end.
        since, until: its bounds, ISO 8601, UTC by default, both included; by default ``days``
            and the newest exposure say.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    of: Literal["exposures", "served"] = "exposures"
    days: int = Field(default=7, ge=1)
    since: str | None = None
    until: str | None = None

    def bounds(self, newest: datetime) -> tuple[datetime, datetime]:
        """Where the window starts and ends.

        Raises:
            ValueError: a bound is no ISO 8601 moment; names it.
        """
        end = newest if self.until is None else _moment("until", self.until)
        if self.since is None:
            return end - timedelta(days=self.days), end
        return _moment("since", self.since), end


def _moment(name: str, text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(
            f"window.{name} is {text!r}; it must be an ISO 8601 moment, as 2017-10-30T04:00:00Z"
        ) from error
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def score_window(
    training_frame: Table,
    watched_outcomes: Table,
    release: dict[str, Any],
    config: MonitoringConfig,
    window: WindowConfig,
    retraining: RetrainingConfig,
    registry: str,
) -> tuple[ArrowTable, dict[str, Any]]:
    """Score a sample of the newest exposures with the champion.

    Args:
        watched_outcomes: what was served; None where nothing was.
        release: a new champion is a reason to score again.

    Returns:
        The sampled rows with ``probability`` and the hits of crosses, none without a champion; the
        champion's version, the window's bounds and number of rows, why the data have outgrown the
        champion, if they have, and why a retraining would have to wait, if so.

    Raises:
        ValueError: what was served is asked for, and there is nothing.
    """
    import pyarrow as pa

    from fathom import drift
    from fathom.feature_log import HOW, REQUEST, VERSION
    from fathom.registry import Registry

    versions = Registry(Path(registry))
    version = versions.champion()
    log = training_frame if window.of == "exposures" else watched_outcomes
    if log is None:
        raise ValueError(
            "window.of is 'served', but nothing is joined with its outcomes yet; run kedro run "
            "--pipelines outcomes, or set it to 'exposures'"
        )
    if window.of == "served" and version is not None:
        log = log.filter(log[VERSION] == version, log[HOW] != "shadow")
    moment = log[EVENT_TIMESTAMP]
    newest = moment.max().to_pyarrow().as_py()
    if newest is None:
        raise ValueError(
            f"nothing that champion {version} has served is joined with its outcomes yet; wait, "
            "or set window.of to 'exposures'"
        )
    start, end = window.bounds(newest)
    found = {"version": version, "start": start.isoformat(), "end": end.isoformat(), "rows": 0}
    if version is None:
        return pa.table({drift.PROBABILITY: pa.array([], pa.float64())}), found
    champion = versions.load(version)
    rows = log.filter((moment >= start) & (moment <= end))
    if window.of == "served":
        rows = rows.rename({champion.spec.entities.request: REQUEST})
    found |= _data(training_frame, champion, end, retraining)
    names = drift.watched_columns(champion.spec)
    own = [drift.PROBABILITY] if window.of == "served" else []
    rows = rows.select(*names, *own)
    found["rows"] = rows.count().to_pyarrow().as_py()
    sample = drift.sampled(rows, champion.spec, config.sample_rows)
    scored = drift.scored(champion, sample.to_pyarrow())
    return pa.Table.from_pandas(scored, preserve_index=False), found


def _data(
    training_frame: Table, champion: Ranker, end: datetime, config: RetrainingConfig
) -> dict[str, str | None]:
    """Why what a retraining would learn from asks for one, or is too little for one yet."""
    from fathom.retraining import learnable_until, nothing_newer, outgrown, trained_from

    made = champion.provenance
    until = learnable_until(end, champion.spec, config)
    moment = training_frame[EVENT_TIMESTAMP]
    learnt = training_frame.filter((moment >= trained_from(made)) & (moment < until))
    rows = learnt.count().to_pyarrow().as_py()
    return {"outgrown": outgrown(rows, made, config), "waits": nothing_newer(made, until)}


def decide(
    scored_window: Table,
    watched: dict[str, Any],
    validation_report: list[dict[str, Any]],
    previous_decisions: str | None,
    config: MonitoringConfig,
    registry: str,
) -> tuple[dict[str, Any], str, str, dict[str, Any], dict[str, Any]]:
    """Compare the window with the champion's reference, report, and decide on retraining.

    Returns:
        The decision; the history with it; the report as one HTML page, as Evidently's figures,
        and as its snapshots.
    """
    import pyarrow.parquet as pq

    from fathom import drift
    from fathom.drift import history
    from fathom.registry import Registry

    window = drift.Window(*(datetime.fromisoformat(watched[side]) for side in ("start", "end")))
    lines, version = previous_decisions or "", watched["version"]
    if version is None:
        decision = drift.nothing_to_watch(window)
        made = drift.Report.of(decision)
    else:
        versions = Registry(Path(registry))
        rows = pq.read_table(versions.path(version) / "reference.parquet")
        reference = drift.reference_of(versions.load(version), rows, config)
        past = [d for d in history.read(lines) if d.window.end < window.end]
        found = drift.measure(
            reference,
            scored_window.to_pandas(),
            window,
            drift.last_sound(past, version),
            _delivery(validation_report, window.end),
            watched["rows"],
        )
        why, waits = watched["outgrown"], watched["waits"]
        decision = drift.decide(found, past, config, version, why, waits)
        made = drift.report(reference, found, decision)
    return (
        decision.to_json(),
        history.with_decision(lines, decision),
        made.html,
        made.figures,
        made.snapshots,
    )


def draw_decisions(decisions: str) -> Any:
    """The history of decisions as a figure."""
    from fathom.drift import history

    return history.plot(history.read(decisions))


def record_window(
    drift_snapshots: dict[str, Any], decision: dict[str, Any], workspace: str
) -> dict[str, Any]:
    """Add the window to the Evidently workspace.

    Returns:
        Its runs, as a receipt for the workspace.
    """
    from fathom.drift import Decision, history

    runs = history.record(Path(workspace), drift_snapshots, Decision.from_json(decision))
    return {"runs": runs, "needs": [workspace]}


def _delivery(validation_report: list[dict[str, Any]], end: datetime) -> Any:
    """What validation says of the partitions that the newest rows came in."""
    from fathom.drift import Delivery

    for table in validation_report:
        if table["table"] == "exposures" and table["partitions"]:
            newest = table["partitions"][-1]
            age = datetime.now(timezone.utc) - end
            return Delivery(newest["rows_in"], newest["quarantined"], age.total_seconds() / 3600)
    return Delivery()
