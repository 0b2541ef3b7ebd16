"""What holds for every node: Kedro can validate its parameters, and it is quick to list."""

from __future__ import annotations

import subprocess
import sys
from typing import get_type_hints

import pytest
from kedro.framework.project import configure_project, pipelines
from kedro.validation.utils import is_pydantic_class

configure_project("fathom")
NODES = {node.name: node for node in pipelines["__default__"].nodes}

#: Parameters that are plain text: paths.
PLAIN = {"params:registry", "params:data_docs"}


def test_the_default_pipeline_is_the_sum_of_the_others():
    stages = {name: pipeline for name, pipeline in pipelines.items() if name != "__default__"}
    assert len(NODES) == sum(len(pipeline.nodes) for pipeline in stages.values())
    assert sorted(stages) == [
        "evaluation",
        "feature_store",
        "features",
        "ingestion",
        "monitoring",
        "release",
        "reporting",
        "training",
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
    (tag,) = NODES[name].tags
    assert NODES[name] in pipelines[tag].nodes


def test_listing_pipelines_imports_nothing_heavy():
    code = (
        "import sys; from kedro.framework.project import configure_project, pipelines;"
        "configure_project('fathom'); dict(pipelines);"
        "print([m for m in ('torch', 'feast', 'great_expectations', 'evidently', 'sklearn',"
        " 'bentoml', 'ibis', 'duckdb') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
