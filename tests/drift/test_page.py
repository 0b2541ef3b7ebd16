"""The report: Evidently finds what the decision rests on, and the page says why, offline."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fathom.drift import (
    Decision,
    Measurement,
    Reference,
    Report,
    decide,
    measure,
    nothing_to_watch,
    report,
)
from shop import CONFIG, WINDOW, past, reference, spec, watch, week


def column_tests(made: Report) -> dict[str, str]:
    """Evidently's tests of columns: whether each failed."""
    return {
        test["metric_config"]["params"]["column"]: test["status"]
        for test in made.figures["drift"]["tests"]
        if test["id"] == "drift"
    }


def test_evidently_judges_as_the_decision_does(found: Measurement, made: Report) -> None:
    """Its tests, which the page shows, pass and fail column by column as the verdicts say."""
    verdicts = {
        name: "FAIL" if column.verdict == "drifted" else "SUCCESS"
        for name, column in found.columns.items()
        if column.verdict != "no data"
    }
    assert column_tests(made) == verdicts
    assert set(verdicts.values()) == {"FAIL", "SUCCESS"}
    assert "product" not in verdicts


def test_evidently_measures_the_same_quality(found: Measurement, made: Report) -> None:
    values = {
        metric["config"]["type"].rsplit(":", 1)[1]: metric["value"]
        for metric in made.figures["quality"]["metrics"]
    }
    quality = found.quality["current"]
    assert values["RocAuc"] == pytest.approx(quality["auc"])
    assert values["LogLoss"] == pytest.approx(quality["logloss"])


def test_the_page_needs_no_network_and_says_why(made: Report, decision: Decision) -> None:
    page = made.html
    assert decision.alerts
    assert all(html.escape(text) in page for text in (*decision.reasons, *decision.alerts))
    assert "rows: 16000 reference, 4000 current" in page
    for widget in ("Drift in column", "probability", "ROC"):
        assert widget in page
    loads = r"""<(?:script|link|img|iframe)[^>]+(?:src|href)\s*=|url\(['"]?https?:|@import\s+url"""
    assert re.findall(loads, re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)) == []


@pytest.mark.parametrize(
    ("retrain", "alerts", "verdict"),
    [(True, (), "Retrain"), (False, (), "Do not retrain"), (False, ("a < b",), "Mend the data")],
)
def test_the_page_starts_with_the_verdict(
    retrain: bool, alerts: tuple[str, ...], verdict: str
) -> None:
    page = Report.of(Decision(retrain, (), "minor", alerts, WINDOW)).html
    assert f"<h1>{verdict}</h1>" in page
    assert "Severity minor" in page
    assert ("<b>a &lt; b</b>" in page) == bool(alerts)


def test_figures_and_snapshots_are_plain(made: Report) -> None:
    assert set(made.figures) == set(made.snapshots) == {"drift", "quality"}
    assert json.loads(json.dumps(made.snapshots)) == made.snapshots


def test_scores_that_evidently_does_not_find_are_not_shown(found: Measurement) -> None:
    """A later Evidently that computes a method in another way must not pass."""
    price = found.columns["price"]
    assert price.score is not None
    wrong = {"price": replace(price, score=price.score + 0.01)}
    only = replace(found, columns=wrong, labelled=None)
    stated = rf"Evidently's psi of price is 0\.\d+, and {price.score + 0.01:.5f}\d? was measured; "
    with pytest.raises(RuntimeError, match=stated + ".* pin the one in the lock file"):
        report(reference(), only, decide(found, (), CONFIG))


def test_where_nothing_can_be_compared_there_is_only_the_decision() -> None:
    small = watch(week().iloc[:10])
    made = report(reference(), small, decide(small, (), CONFIG))
    assert (made.figures, made.snapshots) == ({}, {})
    assert "current has 10 rows, fewer than min_rows" in made.html
    missing = watch(week().assign(**dict.fromkeys([*reference().spec.by_name, "probability"])))
    assert {column.verdict for column in missing.columns.values()} == {"no data"}
    made = report(reference(), missing, decide(missing, (), CONFIG))
    assert made.figures == {}
    assert made.html.count("all null; mend the source") == 9 - 1


def test_without_a_champion_there_is_only_the_decision() -> None:
    made = Report.of(nothing_to_watch(WINDOW))
    assert "<h1>Retrain</h1>" in made.html
    assert "there is no champion" in made.html


def test_a_regression_has_its_error_in_the_report() -> None:
    stars: Any = {"task": "regression", "label": {"name": "stars", "values": None}}
    one = spec({"name": "price", "kind": "numeric"}, **stars)
    random = np.random.default_rng(0)
    frames = [
        f.assign(stars=f["probability"] + random.normal(size=len(f))) for f in (past(), week())
    ]
    kept = Reference.of(frames[0], one, CONFIG)
    found = measure(kept, frames[1], WINDOW)
    made = report(kept, found, decide(found, (), CONFIG))
    (error,) = (metric["value"] for metric in made.figures["quality"]["metrics"])
    value = error["mean"] if isinstance(error, dict) else error
    assert value == pytest.approx(found.quality["current"]["rmse"], rel=1e-6)
