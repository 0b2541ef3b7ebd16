"""The whole loop on a slice of the default data, as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import httpx
import numpy as np
import pytest
from kedro.framework.project import configure_project

from fathom.pipeline_registry import register_pipelines
from fathom.ranker import TOLERANCE, Ranker
from fathom.registry import Registry
from fathom.runner import ALWAYS
from ports import free_port
from projects import Project

pytestmark = pytest.mark.e2e

configure_project("fathom")


@pytest.fixture(scope="module")
def summary(run):
    return run[0].json("08_reporting/run_summary.json")


def test_the_summary_has_every_key_of_the_contract(summary):
    assert {
        "rows",
        "sizes",
        "metrics",
        "gate",
        "version",
        "bento_tag",
        "drift",
        "seconds",
        "peak_memory_mb",
        "seed",
        "data_hash",
        "spec_hash",
        "hardware",
    } <= set(summary)
    for figures in summary["metrics"].values():
        assert {"auc", "logloss", "user_auc", "ndcg_at_10", "calibration"} <= set(figures)
    assert {"train", "validation", "test"} == set(summary["sizes"])


def test_no_row_is_lost(summary):
    rows = summary["rows"]
    assert rows["in"] == rows["clean"] + rows["quarantined"] + rows["duplicates"]
    assert rows["quarantined"] > 0  # the data set has lines of quantity 0
    assert list(rows["reasons"]) == ["interactions: quantity is not above 0"]


def test_every_baseline_stands_beside_the_candidate(summary):
    assert list(summary["metrics"]) == [
        "candidate",
        "constant",
        "popularity",
        "logistic_regression",
        "gradient_boosting",
    ]
    metrics = summary["metrics"]
    assert metrics["candidate"]["auc"] > metrics["popularity"]["auc"] > 0.6
    assert metrics["constant"]["auc"] == pytest.approx(0.5)


def test_the_closing_table_says_the_same(run, summary):
    printed = run[1].stdout + run[1].stderr
    for text in (summary["version"], summary["bento_tag"], "gradient_boosting", "drift.html"):
        assert text in printed
    assert "leaked" not in printed


def test_pages_are_self_contained(run):
    for page in ("validation.html", "drift.html", "verdict.html"):
        text = (run[0].folder / "data/test/08_reporting" / page).read_text(encoding="utf-8")
        assert "<script src" not in text
        assert 'rel="stylesheet" href="http' not in text


def test_the_champion_scores_alone_what_was_scored_in_training(run):
    project, _ = run
    versions = Registry(project.folder / "data/test/06_models/registry")
    champion = versions.champion()
    folder = versions.path(champion)
    golden = json.loads((folder / "golden.json").read_text())
    from fathom.ranker import frame_of_rows

    ranker = Ranker.load(folder)
    scores = ranker.score(frame_of_rows(golden["rows"], ranker.spec))
    np.testing.assert_allclose(scores, golden["probabilities"], atol=TOLERANCE, rtol=0)
    assert project.json("06_models/dry_run.json")["max_difference"] <= TOLERANCE


def _again(project, *arguments: str) -> tuple[dict, set[str]]:
    """The figures of one more run, and the nodes that it did not have to run."""
    done = project.forked("run", "--env", "test", *arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    summary = project.json("08_reporting/run_summary.json")
    return _figures(summary), set(summary["unchanged"]["nodes"])


def _figures(summary) -> dict:
    times = ("seconds", "unchanged", "peak_memory_mb")
    return {name: value for name, value in summary.items() if name not in times}


def test_a_second_run_computes_nothing_and_says_the_same(run, summary):
    loop = register_pipelines()["__default__"]
    nodes = {node.name for node in loop.nodes if ALWAYS not in node.tags}
    assert summary["unchanged"] == {"stages": [], "nodes": []}
    assert _again(run[0]) == (_figures(summary), nodes)


def test_a_second_full_run_ends_with_the_same_version_and_figures(run, summary):
    assert _again(run[0], "--runner", "SequentialRunner") == (_figures(summary), set())
    figures, unchanged = _again(run[0])
    assert figures == _figures(summary)
    # What it left are the same bytes, but for reports that tell the time.
    assert {"read_source", "summarise_logs", "train_candidate", "package"} - unchanged == set()


@pytest.fixture(scope="module")
def another(run, tmp_path_factory):
    """A copy of the project after its run, to change: a finished project may be moved."""
    project = Project(tmp_path_factory.mktemp("another") / "project")
    shutil.copytree(run[0].folder, project.folder)
    return project


def test_a_week_that_is_added_trains_and_packs_nothing_anew(another, summary):
    """Its exposures belong to the test window."""
    untouched = {"encode_train", "encode_validation", "train_candidate", "fit_baselines", "package"}
    fewer, unchanged = _again(another, "--params", "source.last_week=52")
    assert fewer["sizes"]["test"] < summary["sizes"]["test"]
    assert fewer["sizes"]["train"] == summary["sizes"]["train"]
    assert fewer["version"] == summary["version"]
    assert fewer["data_hash"] != summary["data_hash"]
    assert untouched - unchanged == set()
    added, unchanged = _again(another)
    assert added.pop("drift")["alerts"] == []  # a decision knows of the windows before
    assert added == {name: value for name, value in _figures(summary).items() if name != "drift"}
    assert untouched - unchanged == set()


def test_another_model_is_trained_on_what_is_there(another, summary):
    figures, unchanged = _again(another, "--params", "training.model=deep")
    before = {"read_source", "accept", "summarise_logs", "read_training_frame", "encode_train"}
    assert (before | {"fit_baselines", "score_baselines"}) - unchanged == set()
    assert not {"train_candidate", "score_champion", "judge", "watch"} & unchanged
    assert figures["version"] != summary["version"]
    assert f"champion {summary['version']}" in figures["metrics"]
    assert _again(another, "--params", "training.model=deep")[0] == figures


def test_commands_show_and_guard_the_champion(run, summary):
    project, _ = run
    shown = project.kedro("champion", "--env", "test").stdout
    assert f"* {summary['version']}" in shown
    refused = project.forked("rollback", "--env", "test")
    assert refused.returncode != 0
    assert "has no predecessor to roll back to" in refused.stderr
    unknown = project.forked("promote", "nonsense", "--env", "test")
    assert unknown.returncode != 0
    assert "no version 'nonsense'" in unknown.stderr


def _served(project):
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "kedro", "serve", "--env", "test", "--port", str(port)],
        cwd=project.folder,
        env=project.environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return process, f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def service(run):
    """`kedro serve` as a process, once it can rank."""
    process, url = _served(run[0])
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                assert process.poll() is None, "kedro serve ended"
            time.sleep(0.5)
        else:
            pytest.fail("kedro serve was not ready within 120 s")
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def test_ranking_over_http_equals_offline_scoring(run, service, visit):
    """The same features through Feast's history and through the online store: no skew."""
    project, _ = run
    answer = httpx.post(f"{service}/rank", json=visit.request, timeout=30)
    assert answer.status_code == 200, answer.text
    served = {item["item"]: item["probability"] for item in answer.json()["items"]}
    assert answer.json()["version"] == project.json("06_models/release.json")["version"]
    assert list(served.values()) == sorted(served.values(), reverse=True)

    versions = Registry(project.folder / "data/test/06_models/registry")
    offline = versions.load(versions.champion()).score(visit.frame)
    np.testing.assert_allclose(
        [served[product] for product in visit.products], offline, atol=TOLERANCE, rtol=0
    )


def test_unknown_users_and_items_are_scored_and_counted(service, visit):
    answer = httpx.post(
        f"{service}/rank",
        json={
            "user": "nobody",
            "context": {"store_id": "new store", "display": "0", "mailer": "0"},
            "candidates": [visit.products[0], "no such product"],
            "timestamp": visit.request["timestamp"],
        },
        timeout=30,
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["user_known"] is False
    assert answer.json()["unknown_items"] == 1
    assert all(0 < item["probability"] < 1 for item in answer.json()["items"])


def test_recommendations_over_http_are_ranked_as_rank_ranks_them(service, visit):
    request = {name: visit.request[name] for name in ("user", "context", "timestamp")}
    more = {"k": 20, "exclude_interacted": True, "where": {"department": ["GROCERY"]}}
    answer = httpx.post(f"{service}/recommend", json=request | more, timeout=30)
    assert answer.status_code == 200, answer.text
    items = answer.json()["items"]
    assert {item["source"] for item in items} == {"retrieved"}
    assert len(items) == 20 <= answer.json()["ranked"]
    candidates = {"candidates": [item["item"] for item in items]}
    ranked = httpx.post(f"{service}/rank", json=request | candidates, timeout=30).json()["items"]
    assert [item["item"] for item in ranked] == [item["item"] for item in items]
    np.testing.assert_allclose(
        [item["probability"] for item in ranked],
        [item["probability"] for item in items],
        atol=TOLERANCE,
        rtol=0,
    )
    stranger = request | {"user": "nobody"}
    popular = httpx.post(f"{service}/recommend", json=stranger, timeout=30).json()
    assert popular["popular"]
    assert {item["source"] for item in popular["items"]} == {"popular"}
