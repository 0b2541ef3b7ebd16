"""The history: a line for each window, drawn over time, and kept in Evidently's workspace."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from fathom.drift import Decision, Report, Window, decide, history
from shop import CONFIG, WINDOW, watch, week


def decided(weeks: int, version: str = "v1", **more: Any) -> Decision:
    later = timedelta(weeks=weeks)
    window = Window(WINDOW.start + later, WINDOW.end + later)
    given = {"retrain": False, "reasons": ("loss: 0.10%",), "severity": "none", "alerts": ()}
    evidence = {"expected_loss": weeks / 1000}
    return Decision(**(given | more), window=window, version=version, evidence=evidence)


def written(*decisions: Decision) -> str:
    lines = ""
    for decision in decisions:
        lines = history.with_decision(lines, decision)
    return lines


def test_decisions_are_read_oldest_window_first() -> None:
    lines = written(decided(1), decided(0))
    assert history.read(lines) == [decided(0), decided(1)]
    assert history.read("") == []


def test_a_window_that_is_decided_again_takes_its_lines_place() -> None:
    lines = written(decided(0), decided(1), decided(0, reasons=("loss: again",)))
    first, second = history.read(lines)
    assert (first.reasons, second) == (("loss: again",), decided(1))
    # another champion's view of the same window is another decision
    assert len(history.read(written(decided(0), decided(0, version="v2")))) == 2


def test_figures_of_columns_are_left_to_the_windows_report() -> None:
    decision = decide(watch(week()), (), CONFIG, "v1")
    lines = history.with_decision("", decision)
    (kept,) = history.read(lines)
    assert decision.evidence["columns"]
    assert "columns" not in kept.evidence
    assert kept.trace == decision.trace
    assert len(lines) < 5000


def test_lines_of_others_are_kept_and_skipped() -> None:
    """Of partitions that were refused, say."""
    foreign = json.dumps({"partition": "2024-05-06", "refused": "no columns"})
    lines = history.with_decision(foreign + "\n", decided(0))
    assert lines.splitlines()[0] == foreign
    assert history.read(lines) == [decided(0)]
    assert history.with_decision(lines, decided(0)) == lines


def test_a_broken_line_is_named() -> None:
    lines = written(decided(0)) + '{"retrain": tr'
    with pytest.raises(ValueError, match=r"line 2 of the decision history is no JSON .*delete"):
        history.read(lines)


def test_decisions_are_drawn_by_what_they_say() -> None:
    alert = decided(2, alerts=("rows: 9 a day",))
    decisions = [decided(0), decided(1, retrain=True), alert]
    figure = history.plot(decisions)
    drawn = {trace.name: trace for trace in figure.data}
    assert list(drawn["expected loss"].y) == [0.0, 0.001, 0.002]
    assert [len(drawn[name].x) for name in ("retrain", "alert", "wait")] == [1, 1, 1]
    assert drawn["alert"].text == ("rows: 9 a day<br>loss: 0.10%",)
    assert drawn["retrain"].x[0] == decisions[1].window.end
    assert len(history.plot([]).data) == 4


# ---------------------------------------------------------------- Evidently's workspace


def test_each_window_is_a_run_and_the_same_one_when_it_is_recorded_twice(
    tmp_path: Path, made: Report, decision: Decision
) -> None:
    from evidently.ui.workspace import Workspace

    first = history.record(tmp_path, made.snapshots, decision)
    assert list(first) == ["2024-05-06 00:00 drift (v1)", "2024-05-06 00:00 quality (v1)"]
    later = replace(decision, retrain=True, reasons=("loss: again",))
    assert history.record(tmp_path, made.snapshots, later) == first
    place = Workspace(str(tmp_path))
    (project,) = place.list_projects()
    assert project.name == "Fathom"
    assert sorted(str(run) for run in place.list_runs(project.id)) == sorted(first.values())
    run = place.get_run(project.id, next(iter(place.list_runs(project.id))))
    assert run.metadata["retrain"] == "True"
    assert run.metadata["reasons"].endswith("loss: again")


def test_other_windows_are_other_runs_of_the_same_project(
    tmp_path: Path, made: Report, decision: Decision
) -> None:
    from evidently.ui.workspace import Workspace

    quality = {"quality": made.snapshots["quality"]}
    history.record(tmp_path, quality, decision)
    history.record(tmp_path, quality, replace(decision, window=decided(1).window))
    place = Workspace(str(tmp_path))
    (project,) = place.list_projects()
    assert len(place.list_runs(project.id)) == 2
    panels = {panel.title for panel in place.get_project(project.id).dashboard.model().panels}
    assert {"Logloss", "AUC", "Drifted columns"} <= panels
