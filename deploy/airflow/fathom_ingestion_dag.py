"""The pipeline `ingestion` as an Airflow DAG, a task for each node.

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
    """As `kedro run --pipelines ingestion --nodes …`: what is unchanged is skipped."""
    with project() as session:
        from fathom.runner import UpToDateRunner

        session.run(
            pipeline_names=["ingestion"],
            node_names=list(node_names),
            runner=UpToDateRunner(),
        )


@dag(
    dag_id="fathom-ingestion",
    schedule="0 8 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    max_active_tasks=1,  # the runner's record of what is done has one writer
    default_args={"retries": 1, "retry_delay": timedelta(minutes=5)},
)
def fathom_ingestion():
    tasks = {
        "fingerprint_source": task(task_id="fingerprint_source")(run)("fingerprint_source"),
        "read_source": task(task_id="read_source")(run)("read_source"),
    }
    tasks["fingerprint_source"] >> tasks["read_source"]
    following = TriggerDagRunOperator(task_id="validation", trigger_dag_id="fathom-validation")
    following << list(tasks.values())


fathom_ingestion()
