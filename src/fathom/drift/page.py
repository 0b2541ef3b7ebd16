"""Evidently: the report of a window as a page, as figures, and in a workspace.

The only module that knows Evidently. Its defaults, which depend on the number of rows and on
guessed column types, never act: every type, method and threshold is given.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from fathom.drift.config import PROBABILITY, Window
from fathom.drift.decision import Decision
from fathom.drift.measure import Measurement
from fathom.drift.reference import Labelled, Reference

_LABEL = "label"
#: Between a score of ours and Evidently's; more is a bug of either.
_TOLERANCE = 1e-6


@dataclass(frozen=True, eq=False)
class Report:
    """A window as a self-contained page of some 5 MB, and as Evidently's figures.

    Attributes:
        figures: metrics and tests, by what they are about.
        snapshots: all that Evidently needs to show them again.
    """

    html: str
    figures: dict[str, Any]
    snapshots: dict[str, Any]

    @classmethod
    def of(cls, decision: Decision, made: Mapping[str, Any] | None = None) -> Report:
        """From a decision and Evidently's snapshots; without any there is only the decision."""
        made = made or {}
        return cls(
            _page(list(made.values()), decision),
            {name: json.loads(run.json()) for name, run in made.items()},
            {name: _plain(run) for name, run in made.items()},
        )


def _plain(snapshot: Any) -> Any:
    """All of a snapshot, made of what JSON has."""
    from evidently.legacy.utils import NumpyEncoder

    return json.loads(json.dumps(snapshot.dump_dict(), cls=NumpyEncoder))


def report(reference: Reference, found: Measurement, decision: Decision) -> Report:
    """Let Evidently draw what was measured.

    Raises:
        RuntimeError: Evidently does not find the scores that the decision rests on.
    """
    snapshots: dict[str, Any] = {}
    if drift := _drift(reference, found):
        snapshots["drift"] = drift
    if found.labelled is not None:
        snapshots["quality"] = _quality(reference.labelled, found.labelled, found.window)
    return Report.of(decision, snapshots)


def _datasets(was: pd.DataFrame, now: pd.DataFrame, **definition: Any) -> tuple[Any, Any]:
    """Both sides for Evidently. No list of columns is left out, so that it guesses no type."""
    from evidently import DataDefinition, Dataset

    kinds = ("numerical", "categorical", "text", "datetime", "unknown", "list")
    complete = {f"{kind}_columns": [] for kind in kinds} | definition
    return (
        Dataset.from_pandas(was, data_definition=DataDefinition(**complete)),
        Dataset.from_pandas(now, data_definition=DataDefinition(**complete)),
    )


def _drift(reference: Reference, found: Measurement) -> Any:
    """Evidently's report on the columns that have data; None if none has."""
    from evidently import Report as EvidentlyReport
    from evidently.metrics import ValueDrift
    from evidently.presets import DataDriftPreset

    columns = {n: c for n, c in found.columns.items() if c.verdict != "no data"}
    if not columns:
        return None
    # Evidently looks at one column at a time, so the order of its rows does not matter.
    was, now = (
        pd.DataFrame(
            {
                name: np.repeat(np.array(reference.forms[name].bins, object), found.counts[name][i])
                for name in columns
            }
        )
        for i in (0, 1)
    )
    sides = _datasets(was, now, categorical_columns=list(columns))
    features = [name for name in columns if name != PROBABILITY]
    metrics: list[Any] = []
    if PROBABILITY in columns:
        output = columns[PROBABILITY]
        metrics += [
            ValueDrift(column=PROBABILITY, method=output.method, threshold=output.threshold)
        ]
    if features:
        preset = DataDriftPreset(
            columns=features,
            per_column_method={name: columns[name].method for name in features},
            per_column_threshold={name: columns[name].threshold for name in features},
        )
        metrics.append(preset)
    made = EvidentlyReport(metrics, include_tests=True)
    snapshot = made.run(sides[1], sides[0], timestamp=found.window.end)
    _agree(snapshot, found)
    return snapshot


def _agree(snapshot: Any, found: Measurement) -> None:
    """Hold Evidently's scores against those that were decided on."""
    scores = {}
    for metric in snapshot.dict()["metrics"]:
        asked = metric["config"]
        if asked["type"].endswith(":ValueDrift"):
            # NaN is the square root of a divergence that rounding left just below 0.
            known = float(metric["value"])
            scores[asked["column"], asked["method"]] = 0.0 if math.isnan(known) else known
    for name, column in found.columns.items():
        if column.score is None:
            continue
        value = scores.get((name, column.method))
        if value is None or abs(value - column.score) > _TOLERANCE + 1e-4 * column.score:
            raise RuntimeError(
                f"Evidently's {column.method} of {name} is {value}, and {column.score} was "
                "measured; its version may compute it in another way: pin the one in the lock file"
            )


def _quality(was: Labelled, now: Labelled, window: Window) -> Any:
    from evidently import BinaryClassification, Regression
    from evidently import Report as EvidentlyReport
    from evidently.metrics import RMSE, LogLoss, RocAuc

    frames = [
        pd.DataFrame({_LABEL: side.label, PROBABILITY: side.probability}) for side in (was, now)
    ]
    metrics: list[Any]
    if was.task == "binary":
        frames = [frame.astype({_LABEL: int}) for frame in frames]
        outcome = BinaryClassification(target=_LABEL, prediction_probas=PROBABILITY, pos_label=1)
        columns = {"categorical_columns": [_LABEL], "numerical_columns": [PROBABILITY]}
        datasets = _datasets(frames[0], frames[1], classification=[outcome], **columns)
        metrics = [RocAuc(), LogLoss()]
    else:
        outcome = Regression(target=_LABEL, prediction=PROBABILITY)
        columns = {"numerical_columns": [_LABEL, PROBABILITY]}
        datasets = _datasets(frames[0], frames[1], regression=[outcome], **columns)
        metrics = [RMSE()]
    return EvidentlyReport(metrics).run(datasets[1], datasets[0], timestamp=window.end)


def _page(snapshots: list[Any], decision: Decision) -> str:
    """One page: the decision in words, then Evidently's widgets of all snapshots."""
    page = '<!DOCTYPE html>\n<html><meta charset="utf-8"><body></body></html>'
    if snapshots:
        model = snapshots[0].to_snapshot_model()
        for snapshot in snapshots[1:]:
            model.widgets = model.widgets + snapshot.to_snapshot_model().widgets
        page = type(snapshots[0]).load_model(model).get_html_str(as_iframe=False)
    verdict = "Retrain" if decision.retrain else "Do not retrain"
    if decision.alerts:
        verdict = "Mend the data"
    alerts = "".join(f"<li><b>{html.escape(alert)}</b></li>" for alert in decision.alerts)
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in decision.reasons)
    rows = decision.evidence.get("rows", {"reference": 0, "current": 0, "sampled": 0})
    banner = (
        '<div style="font: 16px sans-serif; margin: 24px">'
        f"<h1>{verdict}</h1><p>Window {decision.window.start} to {decision.window.end}; rows: "
        f"{rows['reference']} reference, {rows['current']} current ({rows['sampled']} sampled). "
        f"Severity {decision.severity}.</p><ul>{alerts}{reasons}</ul></div>"
    )
    return page.replace("<body>", f"<body>{banner}", 1)
