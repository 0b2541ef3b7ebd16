"""All decisions in time: a line each, drawn, and as runs of an Evidently workspace.

A window that is decided again, after a crash say, takes the place of its earlier line and run.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.drift.decision import Decision

if TYPE_CHECKING:
    import plotly.graph_objects as go

_PROJECT = "Fathom"
#: What names of runs and of the project are made of, so that the same ones have the same id.
_NAMESPACE = uuid.UUID("7e7a0a5e-5b1c-4d55-9d3c-0f1b6f1d2c11")


def read(lines: str) -> list[Decision]:
    """The decisions of a history, oldest window first.

    Raises:
        ValueError: a line is no JSON object; says which.
    """
    decisions = []
    for number, line in enumerate(lines.splitlines(), 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"line {number} of the decision history is no JSON ({error}); delete that line"
            ) from error
        # Others write lines of their own here: of partitions that were refused, say.
        if "severity" in entry and "evidence" in entry:
            decisions.append(Decision.from_json(entry))
    return sorted(decisions, key=lambda decision: decision.window.end)


def with_decision(lines: str, decision: Decision) -> str:
    """A history with one more decision, in place of an earlier one on the same window."""
    plain = decision.to_json()
    # A column's figures are in the report of its window; here they would make megabytes.
    plain["evidence"] = {n: v for n, v in plain["evidence"].items() if n != "columns"}
    same = plain["window"], plain["version"]
    kept = []
    for line in lines.splitlines():
        entry = json.loads(line)
        if "severity" not in entry or (entry.get("window"), entry.get("version")) != same:
            kept.append(line)
    return "".join(f"{line}\n" for line in (*kept, json.dumps(plain, ensure_ascii=False)))


def plot(decisions: Sequence[Decision]) -> go.Figure:
    """What could be won back in each window, what was usual, and what was decided."""
    import plotly.graph_objects as go

    figure = go.Figure()
    moments = [decision.window.end for decision in decisions]
    expected = [decision.evidence.get("expected_loss") for decision in decisions]
    figure.add_scatter(x=moments, y=expected, mode="lines", name="expected loss")
    groups: dict[str, Iterable[Decision]] = {
        "retrain": [d for d in decisions if d.retrain],
        "alert": [d for d in decisions if d.alerts],
        "wait": [d for d in decisions if not d.retrain and not d.alerts],
    }
    symbols = {"retrain": "star", "alert": "x", "wait": "circle-open"}
    for name, group in groups.items():
        chosen = list(group)
        figure.add_scatter(
            x=[decision.window.end for decision in chosen],
            y=[decision.evidence.get("expected_loss") for decision in chosen],
            mode="markers",
            name=name,
            marker={"symbol": symbols[name], "size": 12},
            text=["<br>".join((*d.alerts, *d.reasons)) for d in chosen],
        )
    return figure.update_layout(
        title="Decisions, by window",
        xaxis_title="end of the window",
        yaxis={"title": "share of the loss to win back", "tickformat": ".1%"},
    )


def record(
    workspace: Path, snapshots: Mapping[str, Mapping[str, Any]], decision: Decision
) -> dict[str, str]:
    """Add a window's reports to the Evidently workspace that ``make monitor-ui`` shows.

    Args:
        snapshots: as `fathom.drift.page.Report` dumps them.

    Returns:
        Name of each run and its id.
    """
    from evidently.core.report import Snapshot
    from evidently.ui.workspace import Workspace

    place = Workspace.create(str(workspace))
    project = uuid.uuid5(_NAMESPACE, _PROJECT)
    if place.get_project(project) is None:
        _create(place, project)
    runs = {}
    for name, dumped in snapshots.items():
        title = f"{decision.window.end:%Y-%m-%d %H:%M} {name} ({decision.version})"
        model = Snapshot.load_dict(dict(dumped)).to_snapshot_model()
        model.name = title
        model.metadata = {
            "version": str(decision.version),
            "retrain": str(decision.retrain),
            "severity": decision.severity,
            "reasons": "; ".join((*decision.alerts, *decision.reasons)),
        }
        run = uuid.uuid5(_NAMESPACE, title)
        place.state.write_snapshot(project, run, model)
        runs[title] = str(run)
    return runs


def _create(place: Any, project: uuid.UUID) -> None:
    """A project whose dashboard draws the windows' figures over time."""
    from evidently.sdk.models import PanelMetric, ProjectModel
    from evidently.sdk.panels import line_plot_panel

    made = place.add_project(
        ProjectModel(id=project, name=_PROJECT, description="Windows against the champion")
    )
    for title, metric, label in (
        ("Logloss", "LogLoss", "logloss"),
        ("AUC", "RocAuc", "AUC"),
        ("Error of a regression", "RMSE", "RMSE"),
        ("Drifted columns", "DriftedColumnsCount", "columns"),
    ):
        values = [PanelMetric(metric=metric, legend=label)]
        made.dashboard.add_panel(line_plot_panel(title, values, size="half"), tab="Windows")
