"""Every model of the family through train → gate → Bento → HTTP, on one slice of the default data.

The stages up to the training frame are the session's one run; then the real pipelines run for each
model, in this process, since a Kedro process for each would import for longer than it runs. The
release pipeline itself starts each Bento as a process on a free port and posts the golden rows.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bentoml
import numpy as np
import pyarrow.parquet as pq
import pytest
from kedro.framework.project import configure_project
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project
from starlette.testclient import TestClient

from fathom import api
from fathom.feature_store import FeatureStoreConfig, frame_of
from fathom.models.family import MODELS
from fathom.ranker import TOLERANCE, Ranker, frame_of_rows
from fathom.registry import Registry
from fathom.runner import UpToDateRunner
from fathom.service import Serving, app
from fathom.serving import OnlineStore, ServingConfig
from projects import Project

pytestmark = pytest.mark.e2e

#: Small data do not tell good models from bad ones, so whatever is measured may pass.
ANYTHING = {
    **{"calibration_lo": 1e-9, "calibration_hi": 1e9, "baselines": []},
    **{"loss_margin": 1e9, "auc_margin": 1e9, "user_auc_margin": 1e9, "calibration_margin": 1e9},
    **{"slice_margin": 1e9, "slice_auc_margin": 1e9, "slice_calibration_margin": 1e9},
}


@pytest.fixture(scope="module")
def project(run, tmp_path_factory):
    """A copy of the project after its run, with this process inside."""
    project = Project(tmp_path_factory.mktemp("family") / "project")
    shutil.copytree(run[0].folder, project.folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.folder)
        patch.setattr(sys, "path", list(sys.path))
        patch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
        bootstrap_project(project.folder)
        yield project
    # A session that was asked for some pipelines leaves Kedro with those alone.
    configure_project("fathom")


@pytest.fixture(scope="module")
def store(project):
    """The feature store, opened once for all models: their spec is the same."""
    config = FeatureStoreConfig(folder="data/test/04_feature")
    spec = Registry(Path("data/test/06_models/registry"))
    settings = json.dumps({"root": str(project.folder), **config.model_dump()})
    store = OnlineStore(settings, spec.load(spec.champion()).spec)
    deadline = time.monotonic() + 120
    while store.state == "opening":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    yield store
    store.close()


@dataclass(frozen=True)
class Released:
    """What came of a model: the candidate as trained, and the files of the version in its Bento."""

    model: str
    project: Project
    candidate: Ranker
    folder: Path

    @property
    def golden(self) -> dict[str, Any]:
        return json.loads((self.folder / "golden.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=sorted(MODELS))
def released(request, project):
    """The project after `kedro run --params training.model=…` of all that depends on the model."""
    given = {"training": {"model": request.param}, "gate": ANYTHING}
    with KedroSession.create(project.folder, env="test", runtime_params=given) as session:
        stages = ["training", "evaluation", "release"]
        session.run(pipeline_names=stages, runner=UpToDateRunner())
    bento = bentoml.get(project.json("06_models/bento.json")["tag"])
    folder = Path(bentoml.models.get(bento.info.all_models[0].tag).path)
    candidate = Ranker.load(project.folder / "data/test/06_models/candidate")
    return Released(request.param, project, candidate, folder)


def test_it_is_trained_measured_and_let_through_the_gate(released):
    assert released.candidate.config.model == released.model
    metrics = released.project.json("08_reporting/metrics.json")
    assert {"candidate", "gradient_boosting"} <= set(metrics)
    assert metrics["candidate"]["auc"] > metrics["constant"]["auc"]
    verdict = released.project.json("08_reporting/verdict.json")
    assert verdict["challenger"] == released.candidate.version
    assert verdict["promoted"]
    assert len(verdict["reasons"]) > 2
    assert all(isinstance(reason, str) for reason in verdict["reasons"])
    champion = Registry(released.project.folder / "data/test/06_models/registry").champion()
    assert champion == released.candidate.version


def test_its_bento_as_a_process_answers_with_the_probabilities_of_training(released):
    receipt = released.project.json("06_models/bento.json")
    assert receipt["tag"].startswith(f"fathom:{released.candidate.version}-")
    assert released.project.json("06_models/dry_run.json")["max_difference"] <= TOLERANCE
    assert len(released.golden["rows"]) == 16


def test_its_scores_are_equal_when_it_is_loaded_again(released):
    reloaded, golden = Ranker.load(released.folder), released.golden
    assert reloaded.version == released.candidate.version
    frame = frame_of_rows(golden["rows"], reloaded.spec)
    scores = reloaded.score(frame)
    assert len(set(scores.tolist())) > 1
    np.testing.assert_array_equal(scores, released.candidate.score(frame))
    np.testing.assert_allclose(scores, golden["probabilities"], rtol=0, atol=TOLERANCE)


def test_it_has_the_reference_that_drift_is_measured_against(released):
    reference = pq.read_table(released.folder / "reference.parquet")
    requests = reference["basket_id"].value_counts().to_pylist()
    assert 700 < len(reference) < 1300  # about a thousand, in whole requests
    assert max(found["counts"] for found in requests) > 1
    scores = released.candidate.score(frame_of(reference.drop_columns("probability")))
    np.testing.assert_allclose(reference["probability"].to_numpy(), scores, rtol=0, atol=TOLERANCE)


def test_it_ranks_and_accounts_for_it(released, store, visit, monkeypatch):
    """Through the service's own application; a process for each would open Feast each time."""
    has_deep = released.candidate.model.deep is not None
    serving = Serving(released.folder, None, ServingConfig(deadline_seconds=30))
    serving.ranking.store = store
    monkeypatch.setattr(app.state, "serving", serving, raising=False)
    with TestClient(app) as client:
        asked = visit.request | {"explain": True}
        answer = client.post("/rank", json=asked | {"attribute": has_deep})
        refused = client.post("/rank", json=asked | {"attribute": True})
    serving.queue.close()
    assert refused.status_code == (200 if has_deep else 400)
    assert answer.status_code == 200, answer.text
    found = api.RankAnswer.model_validate_json(answer.text)
    assert (found.version, found.user_known) == (released.candidate.version, True)
    served = {item.item: item for item in found.items}
    offline = dict(zip(visit.products, released.candidate.score(visit.frame).tolist(), strict=True))
    for product, item in served.items():
        assert item.probability == pytest.approx(offline[product], abs=TOLERANCE)
        parts = item.explanation
        logit = parts.bias + parts.deep + sum(term.logit for term in parts.terms)
        assert 1 / (1 + np.exp(-logit)) == pytest.approx(item.probability, abs=TOLERANCE)
        assert logit == pytest.approx(parts.logit, abs=1e-6)
        if has_deep:
            shares = item.attribution
            total = shares.baseline + sum(shares.shares.values())
            assert total == pytest.approx(shares.deep, abs=0.05 * abs(shares.deep) + 0.01)
    assert set(served) == set(visit.products)
