"""`kedro run` killed at one stage after another, then run to its end: the undisturbed result."""

from __future__ import annotations

import pytest

from projects import make_project

pytestmark = pytest.mark.e2e

#: A node of each stage that writes; the process is killed a moment after it has begun.
NODES = ["validate_raw", "summarise_logs", "materialise_online", "train_candidate", "package"]

#: Less data than the environment `test`: six runs must fit.
SLICE = "source.household_share=0.012,training.epochs=1"


def _finish(project) -> dict:
    done = project.forked("run", "--env", "test", "--params", SLICE)
    assert done.returncode == 0, done.stderr[-4000:]
    summary = project.json("08_reporting/run_summary.json")
    for varies in ("seconds", "unchanged", "peak_memory_mb"):
        summary.pop(varies)
    return summary


def test_a_run_killed_at_any_stage_can_simply_be_run_again(root, tmp_path):
    killed = make_project(root, tmp_path / "killed")
    for node in NODES:
        killed.killed(f"Running node: {node}:", "run", "--env", "test", "--params", SLICE)
    undisturbed = make_project(root, tmp_path / "undisturbed")
    assert _finish(killed) == _finish(undisturbed)
