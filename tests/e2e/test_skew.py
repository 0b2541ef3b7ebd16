"""What a real service served of the default data is what `kedro run --pipelines skew` finds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import forks
from fathom.feature_log import segments
from ports import free_port
from projects import Project

pytestmark = pytest.mark.e2e

LOG = "data/test/07_model_output/feature_log"
WEEK = timedelta(days=7)


@dataclass(frozen=True)
class Served:
    """A project whose service has ranked some baskets, and is stopped."""

    project: Project
    answers: list[dict[str, Any]]
    rows: int

    @property
    def log(self) -> Path:
        return self.project.folder / LOG

    def skew(self) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
        done = self.project.forked("run", "--env", "test", "--pipelines", "skew")
        return done, self.project.json("08_reporting/skew.json")


def baskets(project: Project, count: int) -> Iterator[dict[str, Any]]:
    """Requests like the visits of the last week, a week later: after the newest features."""
    frame = pq.read_table(project.folder / "data/test/05_model_input/training_frame.parquet")
    until = datetime.fromisoformat(project.json("04_feature/state.json")["until"])
    until = until if until.tzinfo else until.replace(tzinfo=timezone.utc)
    names = ["basket_id", "household_id", "product_id", "event_timestamp", "store_id"]
    rows = frame.select([*names, "display", "mailer"])
    late = rows.filter(pa.compute.greater_equal(rows["event_timestamp"], pa.scalar(until - WEEK)))
    visits: dict[str, list[dict[str, Any]]] = {}
    for row in late.to_pylist():
        visits.setdefault(row["basket_id"], []).append(row)
    for basket in list(visits.values())[:count]:
        first = basket[0]
        yield {
            "user": first["household_id"],
            "context": {"store_id": first["store_id"]},
            "candidates": [
                {
                    "item": row["product_id"],
                    "context": {name: row[name] for name in ("display", "mailer")},
                }
                for row in basket
            ],
            "timestamp": (first["event_timestamp"].astimezone(timezone.utc) + WEEK).isoformat(),
        }


@pytest.fixture(scope="module")
def served(run: tuple[Project, Any]) -> Served:
    project, _ = run
    port = free_port()
    command = ["serve", "--env", "test", "--port", str(port), "--feature-log", LOG]
    process = subprocess.Popen(
        [sys.executable, "-m", "kedro", *command],
        cwd=project.folder,
        env=project.environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    answers, rows = [], 0
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30
        ) as client:
            wait_until_ready(client, process)
            for request in baskets(project, 60):
                answer = client.post("/rank", json=request)
                assert answer.status_code == 200, answer.text
                answers.append(answer.json())
                rows += len(request["candidates"])
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
    return Served(project, answers, rows)


def wait_until_ready(client: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "kedro serve ended"
        try:
            if client.get("/readyz", timeout=1).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    pytest.fail("kedro serve was not ready within 120 s")


def test_replayed_features_and_probabilities_are_those_that_were_served(served: Served):
    assert served.rows > 200
    assert all(answer["user_known"] and not answer["degraded"] for answer in served.answers)
    done, report = served.skew()
    assert done.returncode == 0, done.stderr[-4000:]
    assert report["rows"] == report["compared"] == served.rows
    assert report["requests"] == len(served.answers)
    assert (report["differing"], report["columns"]) == (0, {})
    assert report["max_difference"] < 1e-6
    assert "differing" in done.stdout + done.stderr


def test_a_value_that_differs_fails_the_run(served: Served):
    """The guard itself: one number of one candidate, by one bit."""
    path = segments(served.log)[0]
    whole = path.read_bytes()
    rows = pq.read_table(path)
    name = "household_purchases"
    values = rows[name].to_numpy().copy()
    values[7] = np.nextafter(values[7], np.float32(np.inf))
    place = rows.schema.get_field_index(name)
    pq.write_table(rows.set_column(place, name, pa.array(values)), path)
    try:
        done, report = served.skew()
    finally:
        path.write_bytes(whole)
    assert done.returncode != 0
    assert f"1 of {served.rows} served rows differ" in " ".join(done.stderr.split())
    assert report["columns"][name]["rows"] == 1
    (example,) = report["columns"][name]["examples"]
    assert example["served"] == float(values[7])
    assert example["product_id"] == rows["product_id"][7].as_py()


def test_the_benchmark_serves_a_day_as_of_the_day_before(root: Path, served: Served):
    """The online store of a day ago, and the exposures that followed."""
    data = served.project.folder / "data/test"
    done = forks.python(
        *("benchmarks/skew.py", "--data", str(data), "--exposures", "100", "--json"), folder=root
    )
    assert done.returncode == 0, done.stderr[-4000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["exposures"] == figures["replay"]["compared"] >= 100
    assert figures["max_probability_difference"] < 1e-6
    assert (figures["replay"]["differing"], figures["replay"]["stale"]) == (0, 0)


def test_a_whole_run_has_no_part_of_it(run: tuple[Project, Any]):
    assert "replay_served" not in run[1].stdout + run[1].stderr
