"""Known protocols run end to end on generated files of their format, and measure as they say."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import forks
from fathom.evaluation import Predictions, metrics
from projects import Project, make_project
from protocol_files import (
    SPLITS,
    USERS,
    write_criteo,
    write_frappe,
    write_leave_one_out,
    write_movielens,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def protocols() -> Iterator[ModuleType]:
    """``benchmarks/protocols.py``, which is a script and in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("protocols")


@pytest.fixture(scope="module")
def project(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = make_project(root, tmp_path_factory.mktemp("protocols"))
    external = project.folder / "data/00_external"
    write_movielens(external / "movielens")
    write_frappe(external / "frappe_x1")
    write_criteo(external / "criteo_x1")
    write_leave_one_out(external / "leave_one_out")
    return project


Run = Callable[..., subprocess.CompletedProcess[str]]
Measured = Callable[[str, str], dict[str, Any]]


@pytest.fixture
def measured(project: Project, protocols: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Measured:
    """What the script measures after its `kedro run`, which finds the vendors imported."""

    def run(name: str, params: str) -> dict[str, Any]:
        monkeypatch.chdir(project.folder)
        arguments = ("--env", name, "--to-nodes", protocols.NODES, "--params", params)
        done = project.forked("run", *arguments)
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, Any] = protocols.measure(name, Path("data") / name)
        return found

    return run


@pytest.fixture(scope="module")
def benchmark(project: Project) -> Run:
    """The script, in the project's folder."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        script = str(ROOT / "benchmarks/protocols.py")
        return forks.python(
            script, *arguments, folder=project.folder, environment=project.environment
        )

    return run


def small(*more: str) -> str:
    settings = ("batch_size=64", "epochs=4", "threads=1", *more)
    return ",".join(f"training.{setting}" for setting in settings)


def figures(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.e2e
def test_autoint_learns_what_either_gender_likes(measured: Measured) -> None:
    """Labels follow from gender and genres without noise; chance is an AUC of 0.5."""
    found = measured("autoint_movielens", small())
    assert found["metrics"]["auc"] > 0.9
    sizes = found["sizes"]
    kept = sum(sizes.values())
    assert kept == pytest.approx(4000 * 0.8, rel=0.05)  # a fifth has 3 stars
    assert sizes["train"] == int(kept * 0.8)
    assert sizes["test"] == kept - int(kept * 0.9)
    assert found["training"]["model"] == "wide_deep"


@pytest.mark.e2e
def test_frappe_learns_where_an_app_is_used_and_prints_the_published_rows(benchmark: Run) -> None:
    """The best possible AUC is about 0.95; the user, the app and the place alone tell nothing."""
    done = benchmark("frappe_x1", "--json", "--model", "deepfm", "--params", small())
    found = figures(done)
    assert found["metrics"]["auc"] > 0.85
    assert found["sizes"] == {
        "train": SPLITS["train"],
        "validation": SPLITS["valid"],
        "test": SPLITS["test"],
    }
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["auc", "logloss"]
    assert lines[4].split() == ["Wide", "&", "Deep", "0.9831", "0.1540"]
    assert lines[8].startswith("fathom, deepfm  ")
    assert f"{found['metrics']['auc']:.4f}" in lines[8]
    assert "NOT the published split, which has 202,027 train" in done.stdout


@pytest.mark.e2e
def test_criteo_learns_from_a_number_and_a_category(measured: Measured) -> None:
    """With chances of 10, 50 and 90 %, for a quarter, a half and a quarter, no AUC is above 0.8."""
    found = measured("criteo_x1", small())
    assert 0.7 < found["metrics"]["auc"] < 0.83  # the test split is a sample, too
    assert found["metrics"]["logloss"] < math.log(2) - 0.05


@pytest.mark.e2e
def test_leave_one_out_finds_the_items_of_the_users_group(
    measured: Measured, protocols: ModuleType
) -> None:
    """Of 99 others about 4 are of the group. Chance finds a tenth, the group nearly all."""
    found = measured("leave_one_out", small("epochs=10"))
    assert found["training"]["model"] == "dot_product"
    assert found["sizes"]["test"] == USERS * 100
    assert found["metrics"]["hr_at_10"] > 0.6
    assert found["metrics"]["ndcg_at_10"] > 0.3
    assert "matrix factorisation              0.7294      0.4523" in protocols.table(
        found | {"seconds": 1.0}
    )


@pytest.mark.e2e
def test_a_broken_line_stops_the_run_and_says_which(project: Project, benchmark: Run) -> None:
    path = project.folder / "data/00_external/frappe_x1/valid.csv"
    before = path.read_text()
    path.write_text(before + "1,2,3\n")
    done = benchmark("frappe_x1")
    path.write_text(before)
    assert done.returncode == 1
    assert f"valid.csv: line {SPLITS['valid'] + 2} ('1,2,3')" in done.stderr
    assert "protocols: '-m kedro run --env frappe_x1 --to-nodes score_splits," in done.stderr


def lists(labels: list[list[int]], scores: list[list[float]]) -> Predictions:
    request = np.repeat(np.arange(len(labels)), [len(each) for each in labels])
    label = np.concatenate(labels).astype(float)
    return Predictions(label, np.concatenate(scores), request, request)


def test_hit_rate_and_ndcg_by_hand(protocols: ModuleType) -> None:
    """At depth 2: the positives are at ranks 0, 1 and 2, so two of three are hits.

    NDCG: 1 / log2(2) = 1, 1 / log2(3) = 0.6309, and 0; their mean is 0.5436.
    """
    labels = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    scores = [[0.9, 0.5, 0.1], [0.9, 0.5, 0.1], [0.9, 0.5, 0.1]]
    hit_rate, ndcg = protocols.leave_one_out(lists(labels, scores), depth=2)
    assert hit_rate == pytest.approx(2 / 3)
    assert ndcg == pytest.approx((1 + 0.63093) / 3, abs=1e-5)


def test_a_model_that_gives_all_candidates_one_score_hits_nothing(protocols: ModuleType) -> None:
    labels, scores = [[1] + [0] * 10], [[0.5] * 11]
    assert protocols.leave_one_out(lists(labels, scores)) == (0, 0)


def test_ndcg_is_that_of_evaluation_where_no_scores_are_equal(protocols: ModuleType) -> None:
    draw = np.random.default_rng(0)
    labels = [draw.permutation([1] + [0] * 30).tolist() for _ in range(50)]
    scores = [draw.random(31).tolist() for _ in range(50)]
    test = lists(labels, scores)
    assert protocols.leave_one_out(test)[1] == pytest.approx(metrics(test)["ndcg_at_10"])


def test_a_list_without_its_one_positive_is_refused(protocols: ModuleType) -> None:
    test = lists([[1, 0], [0, 0], [1, 1]], [[0.1, 0.2]] * 3)
    with pytest.raises(protocols.ProtocolError, match="2 of 3 lists have not exactly one positive"):
        protocols.leave_one_out(test)


def test_an_unknown_protocol_is_refused_with_those_that_there_are() -> None:
    done = forks.python("benchmarks/protocols.py", "netflix", folder=ROOT)
    assert done.returncode == 2
    assert "'autoint_movielens', 'criteo_x1', 'frappe_x1', 'leave_one_out'" in done.stderr
