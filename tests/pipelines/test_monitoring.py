"""The window that is watched, who watches it, and that watching it twice is watching it once."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

import small_ranker
from fathom.drift import Decision, MonitoringConfig, history
from fathom.feature_log import HOW, REQUEST, VERSION
from fathom.pipelines.monitoring.nodes import (
    WindowConfig,
    decide,
    draw_decisions,
    record_window,
    score_window,
)
from fathom.registry import Registry
from fathom.retraining import RetrainingConfig
from small_ranker import START, exposures

CONFIG = MonitoringConfig(min_rows=100, min_labels=20, draws=20)
NEWEST = START + timedelta(days=28)
REPORT: list[dict[str, Any]] = []
RETRAINING = RetrainingConfig(growth=9.0)


def log() -> Any:
    """Four weeks of exposures."""
    return ibis.memtable(exposures(3200, days=28))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> str:
    """With a champion, which carries its reference."""
    folder = tmp_path_factory.mktemp("champion")
    ranker = small_ranker.register(folder).ranker
    # Before the four weeks begin.
    made = ranker.provenance | {"trained_until": "2023-12-31"}
    ranker = replace(ranker, provenance=made)
    reference = io.BytesIO()
    pq.write_table(exposures(3200, days=28), reference)
    versions = Registry(folder / "registry")
    added = {"reference.parquet": reference.getvalue()}
    versions.promote(versions.register(lambda to: ranker.save(to, added)), "it is the first")
    return str(versions.folder)


def watch(registry: str, lines: str | None = None, **window: Any) -> tuple[Any, ...]:
    rows, watched = score_window(
        log(), None, {}, CONFIG, WindowConfig(**window), RETRAINING, registry
    )
    return decide(ibis.memtable(rows), watched, REPORT, lines, CONFIG, registry)


# ---------------------------------------------------------------- the window


def test_a_window_ends_with_the_newest_exposure_and_reaches_back_some_days() -> None:
    assert WindowConfig().bounds(NEWEST) == (NEWEST - timedelta(days=7), NEWEST)
    assert WindowConfig(days=1).bounds(NEWEST) == (NEWEST - timedelta(days=1), NEWEST)


def test_a_window_may_be_stated() -> None:
    until = datetime(2024, 1, 14, 23, 59, tzinfo=timezone.utc)
    since = datetime(2024, 1, 10, tzinfo=timezone.utc)
    assert WindowConfig(until="2024-01-14T23:59").bounds(NEWEST) == (
        until - timedelta(days=7),
        until,
    )
    both = WindowConfig(since="2024-01-10T01:00+01:00", until="2024-01-14T23:59:00Z")
    assert both.bounds(NEWEST) == (since, until)
    assert WindowConfig(since="2024-01-10").bounds(NEWEST) == (since, NEWEST)


@pytest.mark.parametrize("name", ["since", "until"])
def test_a_bound_that_is_no_moment_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"window\.{name} is 'last week'; it must be an ISO 8601"):
        WindowConfig(**{name: "last week"}).bounds(NEWEST)


@pytest.mark.parametrize(("key", "value"), [("days", 0), ("days", 1.5), ("weeks", 1)])
def test_a_window_has_bounds_of_its_own(key: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=key):
        WindowConfig.model_validate({key: value})


# ---------------------------------------------------------------- scoring


def test_the_champion_scores_the_newest_exposures(registry: str) -> None:
    rows, watched = score_window(log(), None, {}, CONFIG, WindowConfig(), RETRAINING, registry)
    rows = rows.to_pandas()
    versions = Registry(Path(registry))
    champion = versions.champion()
    assert champion is not None
    assert watched == {
        "version": champion,
        "start": "2024-01-22T00:00:00+00:00",
        "end": "2024-01-29T00:00:00+00:00",
        "rows": 800,
        "outgrown": None,
        "waits": None,
    }
    assert len(rows) == 800
    assert rows["event_timestamp"].min() >= NEWEST - timedelta(days=7)
    assert "user_id_x_genre.hits" in rows
    # the last of all that there are
    expected = versions.load(champion).score(small_ranker.plain_frame(3200))[-800:]
    np.testing.assert_allclose(sorted(rows["probability"]), sorted(expected), rtol=0, atol=1e-6)


def test_of_a_large_window_a_sample_of_whole_requests_is_scored(registry: str) -> None:
    few = CONFIG.model_copy(update={"sample_rows": 200})
    rows, watched = score_window(log(), None, {}, few, WindowConfig(), RETRAINING, registry)
    rows = rows.to_pandas()
    assert watched["rows"] == 800
    assert 100 < len(rows) < 300
    assert set(rows["request_id"].value_counts()) == {5}
    again, _ = score_window(log(), None, {}, few, WindowConfig(), RETRAINING, registry)
    assert sorted(again["request_id"].to_pylist()) == sorted(rows["request_id"])


def test_both_ends_of_a_window_belong_to_it(registry: str) -> None:
    moment = WindowConfig(since=START.isoformat(), until=START.isoformat())
    rows, _ = score_window(log(), None, {}, CONFIG, moment, RETRAINING, registry)
    assert rows["event_timestamp"].to_pylist() == [START]


def served(champion: str, how: str = "champion") -> Any:
    """The four weeks as the service logged them: requests under its name, a probability of 0.5."""
    added = {VERSION: ibis.literal(champion), HOW: ibis.literal(how), "probability": 0.5}
    return log().rename({REQUEST: "request_id"}).mutate(**added).to_pyarrow()


def test_data_that_have_outgrown_the_champion_ask_for_a_retraining(registry: str) -> None:
    """It learnt from 320 rows. Three weeks aside, a week of 800 is there to learn from."""
    few = RetrainingConfig(growth=2.0)
    rows, watched = score_window(log(), None, {}, CONFIG, WindowConfig(), few, registry)
    assert watched["outgrown"].startswith("growth: there are 2.50 times the rows")
    decision = decide(ibis.memtable(rows), watched, REPORT, None, CONFIG, registry)[0]
    assert watched["outgrown"] in decision["reasons"]
    assert decision["retrain"] is not bool(decision["alerts"])
    assert watched["waits"] is None


def test_what_the_champion_has_learnt_a_retraining_waits_for(registry: str) -> None:
    """The 29th of January less 29 days for validation and test is when the champion ends."""
    few = RetrainingConfig(growth=1.0001, validation_days=14, test_days=15)
    rows, watched = score_window(log(), None, {}, CONFIG, WindowConfig(), few, registry)
    assert watched["waits"].startswith("waiting: the champion has learnt what there is until 2023")
    watched["outgrown"] = "growth: as if there were more"
    decision = decide(ibis.memtable(rows), watched, REPORT, None, CONFIG, registry)[0]
    assert not decision["retrain"]
    assert watched["waits"] in decision["reasons"]


def test_what_was_served_is_watched_with_the_predictions_that_were_served(registry: str) -> None:
    champion = str(Registry(Path(registry)).champion())
    others = [served(champion, "shadow"), served("another")]
    logged = ibis.memtable(pa.concat_tables([served(champion), *others]))
    of = WindowConfig(of="served")
    rows, watched = score_window(log(), logged, {}, CONFIG, of, RETRAINING, registry)
    assert (watched["rows"], len(rows)) == (800, 800)
    assert set(rows["probability"].to_pylist()) == {0.5}
    assert "request_id" in rows.column_names


def test_what_was_served_cannot_be_watched_before_it_has_outcomes(registry: str) -> None:
    of = WindowConfig(of="served")
    with pytest.raises(ValueError, match=r"nothing is joined with its outcomes yet; run kedro run"):
        score_window(log(), None, {}, CONFIG, of, RETRAINING, registry)
    with pytest.raises(ValueError, match=r"nothing that champion .* has served is joined"):
        score_window(log(), ibis.memtable(served("another")), {}, CONFIG, of, RETRAINING, registry)


def test_without_a_champion_there_is_nothing_to_score(tmp_path: Path) -> None:
    rows, watched = score_window(log(), None, {}, CONFIG, WindowConfig(), RETRAINING, str(tmp_path))
    assert (len(rows), watched["version"]) == (0, None)
    decision, lines, page, figures, snapshots = decide(
        ibis.memtable(rows), watched, REPORT, None, CONFIG, str(tmp_path)
    )
    assert decision["retrain"] is True
    assert "there is no champion" in page
    assert (figures, snapshots) == ({}, {})
    assert len(history.read(lines)) == 1


# ---------------------------------------------------------------- deciding


@pytest.fixture(scope="module")
def quiet(registry: str) -> tuple[Any, ...]:
    """All that watching the newest window gives."""
    return watch(registry)


def test_a_quiet_window_is_decided_on(registry: str, quiet: tuple[Any, ...]) -> None:
    decision, lines, page, figures, _ = quiet
    assert (decision["retrain"], decision["alerts"]) == (False, [])
    assert decision["version"] == Registry(Path(registry)).champion()
    assert decision["window"]["end"] == "2024-01-29T00:00:00Z"
    assert decision["evidence"]["rows"] == {
        "reference": 3200,
        "current": 800,
        "sampled": 800,
    }
    assert "<h1>Do not retrain</h1>" in page
    assert set(figures) == {"drift", "quality"}
    (line,) = lines.splitlines()
    assert json.loads(line)["window"] == decision["window"]


def test_watching_a_window_twice_is_watching_it_once(registry: str, quiet: tuple[Any, ...]) -> None:
    """After a crash, say, or with the lines of later windows there already."""
    decision, lines, *_ = quiet
    assert watch(registry, lines)[:2] == (decision, lines)
    earlier = watch(registry, lines, until="2024-01-22T00:00:00")
    assert [d.window.end.day for d in history.read(earlier[1])] == [22, 29]
    again = watch(registry, earlier[1], until="2024-01-22T00:00:00")
    assert again[:2] == earlier[:2]


def test_what_validation_refused_of_the_newest_delivery_is_a_fault(registry: str) -> None:
    rows, watched = score_window(log(), None, {}, CONFIG, WindowConfig(), RETRAINING, registry)
    partitions = [
        {"rows_in": 1000, "quarantined": 0},
        {"rows_in": 1000, "quarantined": 80},
    ]
    report = [
        {"table": "users", "partitions": [{"rows_in": 9, "quarantined": 9}]},
        {"table": "exposures", "partitions": partitions},
    ]
    settings = CONFIG.model_copy(update={"max_age_hours": 24.0})
    decision, *_ = decide(ibis.memtable(rows), watched, report, None, settings, registry)
    quarantine, freshness = decision["alerts"]
    assert quarantine.startswith("validation: 8.00% of 1,000 rows are in quarantine")
    assert freshness.startswith("freshness: the newest exposure is ")
    assert decision["retrain"] is False


# ---------------------------------------------------------------- what is left behind


def test_decisions_are_drawn_and_kept_in_the_workspace(
    quiet: tuple[Any, ...], tmp_path: Path
) -> None:
    decision, lines, _, _, snapshots = quiet
    figure = draw_decisions(lines)
    assert [len(trace.x) for trace in figure.data if trace.name == "wait"] == [1]
    receipt = record_window(snapshots, decision, str(tmp_path / "workspace"))
    assert receipt["needs"] == [str(tmp_path / "workspace")]
    version = Decision.from_json(decision).version
    assert list(receipt["runs"]) == [
        f"2024-01-29 00:00 {name} ({version})" for name in ("drift", "quality")
    ]
