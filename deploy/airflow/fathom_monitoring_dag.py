"""The pipeline `monitoring` as an Airflow DAG, a task for each node.

Made by `make airflow` of deploy/airflow/dag.j2 and conf/base/airflow.yml: change those, not this.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

from airflow.providers.standard.operators.trigger_dagrun import TriggerDagRunOperator
from airflow.sdk import dag, task

#: Where the project lies on the worker, and its environment.
PROJECT = os.environ.get("FATHOM_PROJECT", os.getcwd())
ENV = os.environ.get("FATHOM_ENV")


@contextmanager
def project() -> Iterator[Any]:
    """A session of Kedro, in the project's folder."""
    from kedro.framework.session import KedroSession
    from kedro.framework.startup import bootstrap_project

    os.chdir(PROJECT)
    bootstrap_project(PROJECT)
    with KedroSession.create(PROJECT, env=ENV) as session:
        yield session


def run(*node_names: str) -> None:
    """As `kedro run --pipelines monitoring --nodes …`: what is unchanged is skipped."""
    with project() as session:
        from fathom.runner import UpToDateRunner

        session.run(
            pipeline_names=["monitoring"],
            node_names=list(node_names),
            runner=UpToDateRunner(),
        )


@dag(
    dag_id="fathom-monitoring",
    schedule=None,
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    max_active_tasks=1,  # the runner's record of what is done has one writer
    default_args={"retries": 1, "retry_delay": timedelta(minutes=5)},
)
def fathom_monitoring():
    tasks = {
        "score_window": task(task_id="score_window")(run)("score_window"),
        "decide": task(task_id="decide")(run)("decide"),
        "draw_decisions": task(task_id="draw_decisions")(run)("draw_decisions"),
        "record_window": task(task_id="record_window")(run)("record_window"),
    }
    tasks["score_window"] >> tasks["decide"]
    tasks["decide"] >> tasks["draw_decisions"]
    tasks["decide"] >> tasks["record_window"]
    following = TriggerDagRunOperator(task_id="retraining", trigger_dag_id="fathom-retraining")

    @task.short_circuit(task_id="retrain")
    def asked() -> bool:
        with project() as session:
            return bool(session.load_context().catalog.load("decision")["retrain"])

    following << asked() << list(tasks.values())


fathom_monitoring()
