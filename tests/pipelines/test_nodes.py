"""What holds for every node: Kedro can validate its parameters, and it is quick to list."""

from __future__ import annotations

import subprocess
import sys
from typing import get_type_hints

import pytest
from kedro.config import OmegaConfigLoader
from kedro.framework.project import configure_project, pipelines
from kedro.validation.utils import is_pydantic_class

from fathom.pipeline_registry import APART
from fathom.runner import ALWAYS, STAMPS
from fathom.settings import CONF_SOURCE, CONFIG_LOADER_ARGS

configure_project("fathom")
NODES = {node.name: node for node in pipelines["__default__"].nodes}

#: Parameters that are plain text: paths.
PLAIN = {"params:checkpoints", "params:registry", "params:data_docs", "params:workspace"}


def test_the_default_pipeline_is_the_sum_of_the_others():
    stages = {name: pipeline for name, pipeline in pipelines.items() if name != "__default__"}
    summed = [stage for name, stage in stages.items() if name not in APART]
    assert len(NODES) == sum(len(stage.nodes) for stage in summed)
    assert sorted(stages) == [
        "comparison",
        "cross_search",
        "evaluation",
        "feature_store",
        "features",
        "ingestion",
        "monitoring",
        "outcomes",
        "release",
        "replay",
        "reporting",
        "retraining",
        "skew",
        "training",
        "tuning",
        "validation",
    ]


@pytest.mark.parametrize("name", sorted(NODES))
def test_parameters_arrive_validated(name):
    """Hints that do not resolve when Kedro reads them let raw dicts through, with a warning."""
    node = NODES[name]
    hints = get_type_hints(node.func)
    arguments = [name for name in hints if name != "return"]
    for dataset, argument in zip(node.inputs, arguments, strict=True):
        if dataset.startswith("params:") and dataset not in PLAIN:
            kind = hints[argument]
            assert is_pydantic_class(kind) or hasattr(kind, "__dataclass_fields__"), dataset


@pytest.mark.parametrize("name", sorted(NODES))
def test_every_node_is_tagged_with_its_stage(name):
    (tag,) = NODES[name].tags - {ALWAYS}
    assert NODES[name] in pipelines[tag].nodes


@pytest.mark.parametrize("environment", ["base", "test", "movielens"])
def test_every_node_can_be_skipped(root, environment):
    """Everything between nodes is in files, and there is a place for the runner's stamps."""
    conf = OmegaConfigLoader(str(root / CONF_SOURCE), env=environment, **CONFIG_LOADER_ARGS)
    datasets = {name for name in pipelines["__default__"].datasets() if "params:" not in name}
    assert sorted(datasets - conf["catalog"].keys()) == []
    assert STAMPS in conf["catalog"]
    assert all(node.outputs for node in NODES.values())


def test_the_runners_stamps_go_with_make_clean(root):
    conf = OmegaConfigLoader(str(root / CONF_SOURCE), env="base", **CONFIG_LOADER_ARGS)
    assert conf["catalog"][STAMPS]["dataset"]["filepath"].startswith("data/08_reporting/")


def test_listing_pipelines_imports_nothing_heavy():
    code = (
        "import sys; from kedro.framework.project import configure_project, pipelines;"
        "configure_project('fathom'); dict(pipelines);"
        "print([m for m in ('torch', 'feast', 'great_expectations', 'evidently', 'sklearn',"
        " 'bentoml', 'ibis', 'duckdb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
