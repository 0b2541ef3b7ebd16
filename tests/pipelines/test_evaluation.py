"""Whom a candidate is compared with, and what becomes of one that returns nonsense."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import ibis
import numpy as np
import pyarrow as pa
import pytest
from ibis.expr.types import Table

from fathom import files
from fathom.evaluation import EvaluationConfig
from fathom.gate import GateConfig
from fathom.pipelines.evaluation.nodes import evaluate, judge, look_up_champion
from fathom.spec import FeatureSpec


@pytest.mark.parametrize(
    ("champions", "candidate", "challenged"),
    [
        ([], "v1", None),
        (["v1"], "v2", "v1"),
        (["v1", "v2"], "v3", "v2"),
        # The candidate is in charge already: the run that promoted it is repeated.
        (["v1"], "v1", None),
        (["v1", "v2"], "v2", "v1"),
        (["v1", "v2", "v1"], "v1", "v2"),
    ],
)
def test_a_candidate_challenges_the_champion_or_whom_it_has_replaced(
    tmp_path, champions, candidate, challenged
):
    in_charge(tmp_path, champions)
    found = look_up_champion(candidate, str(tmp_path))
    assert found == {"version": challenged, "trained_until": challenged and "2024-01-01"}


def in_charge(folder: Path, champions: list[str], **judged: str) -> None:
    """A registry with a stack of champions; ``judged`` tells of some what they were before."""
    for name in set(champions):
        made = {"judged": judged.get(name), "trained_until": "2024-01-01"}
        described = {"provenance": made}
        (folder / "versions" / name).mkdir(parents=True)
        files.write_json(folder / "versions" / name / "ranker.json", described)
    if champions:
        files.write_json(folder / "champion.json", {"champions": champions})


def test_nor_does_it_challenge_what_it_has_become_when_it_caught_up(tmp_path: Path) -> None:
    in_charge(tmp_path, ["v1", "v3"], v3="v2")
    assert look_up_champion("v2", str(tmp_path))["version"] == "v1"
    assert look_up_champion("v4", str(tmp_path))["version"] == "v3"


# --- a challenger that returns nonsense --------------------------------------------------------

SPEC = FeatureSpec.model_validate(
    {
        "entities": {"user": "user", "item": "item", "request": "visit"},
        "label": {"name": "bought", "values": [0, 1]},
        "columns": [{"name": "shelf", "kind": "categorical", "owner": "context"}],
    }
)
RESAMPLING = EvaluationConfig(resamples=20, min_slice_rows=10)
START = datetime(2024, 1, 1, tzinfo=timezone.utc)


def tables(probability: np.ndarray) -> dict[str, Table]:
    """Sixty rows of twenty users, shown over three days; what a challenger makes of them."""
    random = np.random.default_rng(0)
    rows = {
        "user": [f"u{n % 20}" for n in range(60)],
        "item": [f"i{n % 5}" for n in range(60)],
        "visit": [f"v{n % 20}" for n in range(60)],
        "shelf": ["low", "top", "top"] * 20,
        "event_timestamp": [START + timedelta(hours=n) for n in range(60)],
        "bought": random.integers(0, 2, 60),
    }
    test = pa.table(rows)
    scored = test.append_column("split", pa.array(["test"] * 60))
    old = {"version": ["v1"] * 60, "probability": random.uniform(0.4, 0.6, 60)}
    parts = {
        "predictions": scored.append_column("probability", pa.array(probability)),
        "baseline_predictions": pa.table({"constant": np.full(60, 0.5)}),
        "champion_predictions": pa.table(old),
        "train_frame": test.slice(0, 30),
        "test_frame": test,
    }
    return {name: ibis.memtable(part) for name, part in parts.items()}


def judged(
    given: dict[str, Table], metrics: dict[str, Any], until: str = "2024-01-01"
) -> dict[str, Any]:
    given = {name: table for name, table in given.items() if name != "baseline_predictions"}
    candidate = cast("Any", SimpleNamespace(version="v2"))
    champion = {"version": "v1", "trained_until": until}
    conf = {"spec": SPEC, "config": GateConfig(baselines=("constant",)), "evaluation": RESAMPLING}
    return judge(candidate, champion=champion, metrics=metrics, **conf, **given)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_a_challenger_that_returns_nonsense_is_refused_and_the_run_goes_on(value):
    given = tables(np.full(60, value))
    metrics, slices, points = evaluate(spec=SPEC, config=RESAMPLING, **given)
    assert metrics["candidate"] == {"rows": 60}
    assert metrics["champion v1"]["auc"] is not None
    assert (slices, points) == ({"metrics": {}, "left_out": {}}, [])
    verdict = judged(given, metrics)
    assert not verdict["promoted"]
    (reason,) = verdict["reasons"]
    assert reason.startswith("fail: the challenger's predictions are unusable: probability: 60 of")


def test_the_verdict_names_both_sides_and_the_window():
    given = tables(np.linspace(0.1, 0.9, 60))
    metrics, slices, _ = evaluate(spec=SPEC, config=RESAMPLING, **given)
    assert set(slices["metrics"]) == {"shelf = low", "shelf = top"}
    verdict = judged(given, metrics)
    assert (verdict["challenger"], verdict["champion"]) == ("v2", "v1")
    assert verdict["window"] == {
        "from": "2024-01-01T00:00:00+00:00",
        "to": "2024-01-03T11:00:00+00:00",
        "rows": 60,
        "users": 20,
    }
    assert {found["part"] for found in verdict["compared"]} >= {None}
    assert json.loads(json.dumps(verdict, allow_nan=False)) == verdict


def test_a_champion_that_has_learnt_from_the_test_window_is_not_compared_on_it():
    given = tables(np.linspace(0.1, 0.9, 60))
    metrics, _, _ = evaluate(spec=SPEC, config=RESAMPLING, **given)
    verdict = judged(given, metrics, until="2024-01-02")
    assert not verdict["promoted"]
    assert verdict["reasons"][0] == (
        "fail: champion v1 has learnt until 2024-01-02, and the test window begins at "
        "2024-01-01T00:00:00+00:00: what it has learnt is no test; run kedro run --pipelines "
        "retraining, or move params:split"
    )
