"""The crontab and the DAGs in deploy fit the pipelines as they are; Airflow is not needed."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from kedro.framework.project import pipelines
from kedro.framework.startup import bootstrap_project

ROOT = Path(__file__).resolve().parents[1]
DAGS = sorted((ROOT / "deploy/airflow").glob("*_dag.py"))
SETTINGS = yaml.safe_load((ROOT / "conf/base/airflow.yml").read_text())


@dataclass(frozen=True)
class Dag:
    """What a DAG's file says, read without running it."""

    pipeline: str
    nodes: set[str]
    edges: set[tuple[str, str]]
    options: dict[str, object]
    triggers: str | None


def read(path: Path) -> Dag:
    found: dict[str, object] = {}
    nodes: set[str] = set()
    edges: set[tuple[str, str]] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Call(func=ast.Name("dag"), keywords=keywords):
                constants = [k for k in keywords if isinstance(k.value, ast.Constant)]
                found |= {str(k.arg): k.value.value for k in constants}
            case ast.keyword(arg="trigger_dag_id", value=ast.Constant(name)):
                found["triggers"] = name
            case ast.keyword(arg="pipeline_names", value=ast.List([ast.Constant(name)])):
                found["pipeline"] = name
            case ast.Call(func=ast.Call(func=ast.Call(func=ast.Name("task"))), args=args):
                nodes |= {ast.literal_eval(argument) for argument in args}
            case ast.BinOp(ast.Subscript(slice=before), ast.RShift(), ast.Subscript(slice=after)):
                edges.add((ast.literal_eval(before), ast.literal_eval(after)))
    pipeline, triggers = found.pop("pipeline"), found.pop("triggers", None)
    return Dag(str(pipeline), nodes, edges, found, None if triggers is None else str(triggers))


@pytest.fixture(scope="module", autouse=True)
def _project():
    bootstrap_project(ROOT)


@pytest.mark.parametrize("path", DAGS, ids=lambda path: path.stem)
def test_a_dag_has_the_nodes_of_its_pipeline_and_what_they_wait_for(path):
    dag = read(path)
    pipeline = pipelines[dag.pipeline]
    assert dag.nodes == {node.name for node in pipeline.nodes}, "make airflow"
    parents = pipeline.node_dependencies.items()
    assert dag.edges == {(p.name, node.name) for node, found in parents for p in found}


@pytest.mark.parametrize("path", DAGS, ids=lambda path: path.stem)
def test_a_dag_is_what_conf_says_and_runs_once_at_a_time(path):
    dag = read(path)
    settings = SETTINGS.get(dag.pipeline, {})
    assert dag.options["dag_id"] == f"fathom-{dag.pipeline.replace('_', '-')}"
    assert dag.options["schedule"] == settings.get("schedule")
    assert (dag.options["max_active_runs"], dag.options["max_active_tasks"]) == (1, 1)
    then = settings.get("then")
    assert dag.triggers == (then and f"fathom-{then.replace('_', '-')}")


def test_the_dags_are_a_chain_from_the_source_to_retraining():
    chain, name = [], "ingestion"
    while name is not None:
        chain.append(name)
        name = SETTINGS.get(name, {}).get("then")
    assert chain == [
        "ingestion",
        "validation",
        "features",
        "feature_store",
        "monitoring",
        "retraining",
    ]
    assert {read(path).pipeline for path in DAGS} == set(chain)
    assert SETTINGS["monitoring"]["only_if"] == {"dataset": "decision", "key": "retrain"}


def test_the_crontab_asks_for_commands_and_pipelines_that_there_are():
    lines = (ROOT / "deploy/crontab").read_text().splitlines()
    commands = [line for line in lines if "bin/kedro" in line]
    assert sum("kedro watch --once" in command for command in commands) == 1
    named = re.findall(r"kedro run --pipelines ([a-z_,]+)", " ".join(commands))
    assert set(",".join(named).split(",")) <= set(pipelines)
    assert named[-1] == "retraining"
    for command in commands:
        assert re.match(r"#?[\d*/]+( [\d*/]+){4} cd ", command), command
