"""The comparison as a pipeline: what it reads, what it leaves, and what conf declares."""

from __future__ import annotations

import inspect
from typing import Any, get_type_hints

import ibis
import numpy as np
import pyarrow as pa
import pytest
from kedro.config import OmegaConfigLoader

from fathom.comparison import ComparisonConfig
from fathom.config import TrainingConfig
from fathom.evaluation import EvaluationConfig
from fathom.models.family import MODELS
from fathom.pipelines.comparison import create_pipeline
from fathom.pipelines.comparison.nodes import (
    cut_slices,
    report_comparison,
    train_family,
    weigh_evidence,
)
from fathom.pipelines.evaluation import create_pipeline as evaluation
from fathom.pipelines.training import create_pipeline as training
from fathom.settings import CONF_SOURCE, CONFIG_LOADER_ARGS
from test_comparison import BASE, config_of, small

EVALUATION = EvaluationConfig(min_slice_rows=100)


def table_of(frame: dict[str, Any]) -> Any:
    return ibis.memtable(pa.table({name: pa.array(values) for name, values in frame.items()}))


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """What the nodes leave, one after another, of the generated log."""
    log, config = small(), config_of()
    train, test = (table_of(log.frames[name]) for name in ("train", "test"))
    slices, exceptions = cut_slices(log.encoder, train, test, config)
    splits = (log.splits.training, log.splits.validation, log.splits.test)
    folder = str(tmp_path_factory.mktemp("comparison"))
    trainings, scores = train_family(log.encoder, *splits, BASE, config, folder)
    constant = pa.table({"constant": np.full(1200, 0.5)})
    figures = weigh_evidence(
        log.encoder,
        trainings,
        ibis.memtable(scores),
        ibis.memtable(slices),
        exceptions,
        ibis.memtable(constant),
        test,
        {"training": BASE.as_dict()},
        "d" * 64,
        config,
        EVALUATION,
    )
    return slices, trainings, scores, figures, report_comparison(figures)


def test_slices_and_scores_have_a_row_for_each_of_the_test_window(left):
    slices, trainings, scores, *_ = left
    assert len(slices) == len(scores) == 1200
    assert scores.column_names == list(trainings["trainings"])
    assert slices["seen pairs"].to_numpy().tolist() == (
        small().window().masks["seen pairs"].tolist()
    )


def test_the_figures_say_what_they_stand_on(left):
    _, trainings, _, figures, _ = left
    made = figures["provenance"]
    trials = [t["seconds"] for m in trainings["models"].values() for t in m["trials"]]
    seconds = [f["seconds"] for f in trainings["trainings"].values()]
    assert made.pop("seconds") == pytest.approx(sum(trials) + sum(seconds), abs=0.06)
    assert "cores" in made.pop("hardware")
    assert made == {
        "seeds": [0, 1],
        "trials": 2,
        "epochs": 2,
        "rows": {"training": 2000, "validation": 600, "test": 1200},
        "users": 40,
        "resamples": 40,
        "confidence": 0.95,
        "data_hash": "d" * 64,
        "spec_hash": small().encoder.spec.hash,
        "code_version": "0.1.0",
    }


def test_the_report_has_every_model_and_baseline(left):
    *_, figures, (page, text) = left
    for name in (*figures["models"], *figures["baselines"]):
        assert f"<td>{name}</td>" in page
        assert f"| {name} |" in text
    assert figures["models"].keys() == {"wide", "wide_deep"}


def test_it_reads_what_runs_leave_and_writes_what_the_catalog_names(root):
    inputs = {name for name in create_pipeline().inputs() if not name.startswith("params:")}
    left = training().all_outputs() | evaluation().all_outputs() | {"data_hash"}
    assert inputs <= left
    for environment in ("base", "test", "movielens"):
        conf = OmegaConfigLoader(str(root / CONF_SOURCE), env=environment, **CONFIG_LOADER_ARGS)
        assert create_pipeline().all_outputs() | inputs <= conf["catalog"].keys()
        for name in create_pipeline().all_outputs():
            entry = conf["catalog"][name]
            path = entry.get("filepath") or entry["dataset"]["filepath"]
            assert path.startswith(conf["globals"]["data"] + "/0")


@pytest.mark.parametrize("environment", ["base", "test", "movielens", "redis"])
def test_every_environment_compares_every_model_of_the_family(root, environment):
    conf = OmegaConfigLoader(str(root / CONF_SOURCE), env=environment, **CONFIG_LOADER_ARGS)
    config = ComparisonConfig.model_validate(conf["parameters"]["comparison"])
    assert config.models.keys() == MODELS.keys()
    base = TrainingConfig(**conf["parameters"]["training"]).as_dict()
    outside = [
        f"{model}.{name}"
        for model, space in config.models.items()
        for name, range_ in space.items()
        if not range_.holds(base[name])
    ]
    assert outside == []  # or the first trial would not be the configured settings


def test_three_seeds_at_least_by_default(root):
    conf = OmegaConfigLoader(str(root / CONF_SOURCE), env="base", **CONFIG_LOADER_ARGS)
    assert len(ComparisonConfig.model_validate(conf["parameters"]["comparison"]).seeds) >= 3


@pytest.mark.parametrize("node", create_pipeline().nodes, ids=lambda node: node.name)
def test_parameters_arrive_validated(node):
    hints = get_type_hints(node.func)
    expected = {
        "params:comparison": ComparisonConfig,
        "params:training": TrainingConfig,
        "params:evaluation": EvaluationConfig,
        "params:comparison_trainings": str,
    }
    for dataset, argument in zip(node.inputs, inspect.signature(node.func).parameters, strict=True):
        if dataset in expected:
            assert hints[argument] is expected[dataset]
    assert node.tags == {"comparison"}
