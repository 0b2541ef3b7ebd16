"""The pipeline `retraining` as an Airflow DAG, a task for each node.

Made by `make airflow` of deploy/airflow/dag.j2 and conf/base/airflow.yml: change those, not this.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

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
    """As `kedro run --pipelines retraining --nodes …`: what is unchanged is skipped."""
    with project() as session:
        from fathom.runner import UpToDateRunner

        session.run(
            pipeline_names=["retraining"],
            node_names=list(node_names),
            runner=UpToDateRunner(),
        )


@dag(
    dag_id="fathom-retraining",
    schedule=None,
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    max_active_tasks=1,  # the runner's record of what is done has one writer
    default_args={"retries": 1, "retry_delay": timedelta(minutes=5)},
)
def fathom_retraining():
    tasks = {
        "plan_retraining": task(task_id="plan_retraining")(run)("plan_retraining"),
        "split_frame": task(task_id="split_frame")(run)("split_frame"),
        "fit_baselines": task(task_id="fit_baselines")(run)("fit_baselines"),
        "retrain_champion": task(task_id="retrain_champion")(run)("retrain_champion"),
        "encode_test": task(task_id="encode_test")(run)("encode_test"),
        "encode_validation": task(task_id="encode_validation")(run)("encode_validation"),
        "look_up_champion": task(task_id="look_up_champion")(run)("look_up_champion"),
        "plot_training": task(task_id="plot_training")(run)("plot_training"),
        "score_baselines": task(task_id="score_baselines")(run)("score_baselines"),
        "score_champion": task(task_id="score_champion")(run)("score_champion"),
        "score_splits": task(task_id="score_splits")(run)("score_splits"),
        "evaluate": task(task_id="evaluate")(run)("evaluate"),
        "judge": task(task_id="judge")(run)("judge"),
        "plot_calibration": task(task_id="plot_calibration")(run)("plot_calibration"),
        "catch_up": task(task_id="catch_up")(run)("catch_up"),
        "write_card": task(task_id="write_card")(run)("write_card"),
        "register": task(task_id="register")(run)("register"),
        "package": task(task_id="package")(run)("package"),
        "dry_run": task(task_id="dry_run")(run)("dry_run"),
        "conclude": task(task_id="conclude")(run)("conclude"),
        "publish_embeddings": task(task_id="publish_embeddings")(run)("publish_embeddings"),
        "promote": task(task_id="promote")(run)("promote"),
    }
    tasks["plan_retraining"] >> tasks["split_frame"]
    tasks["split_frame"] >> tasks["fit_baselines"]
    tasks["plan_retraining"] >> tasks["retrain_champion"]
    tasks["split_frame"] >> tasks["retrain_champion"]
    tasks["retrain_champion"] >> tasks["encode_test"]
    tasks["split_frame"] >> tasks["encode_test"]
    tasks["retrain_champion"] >> tasks["encode_validation"]
    tasks["split_frame"] >> tasks["encode_validation"]
    tasks["retrain_champion"] >> tasks["look_up_champion"]
    tasks["retrain_champion"] >> tasks["plot_training"]
    tasks["fit_baselines"] >> tasks["score_baselines"]
    tasks["split_frame"] >> tasks["score_baselines"]
    tasks["look_up_champion"] >> tasks["score_champion"]
    tasks["split_frame"] >> tasks["score_champion"]
    tasks["encode_test"] >> tasks["score_splits"]
    tasks["encode_validation"] >> tasks["score_splits"]
    tasks["retrain_champion"] >> tasks["score_splits"]
    tasks["split_frame"] >> tasks["score_splits"]
    tasks["score_baselines"] >> tasks["evaluate"]
    tasks["score_champion"] >> tasks["evaluate"]
    tasks["score_splits"] >> tasks["evaluate"]
    tasks["split_frame"] >> tasks["evaluate"]
    tasks["evaluate"] >> tasks["judge"]
    tasks["look_up_champion"] >> tasks["judge"]
    tasks["retrain_champion"] >> tasks["judge"]
    tasks["score_champion"] >> tasks["judge"]
    tasks["score_splits"] >> tasks["judge"]
    tasks["split_frame"] >> tasks["judge"]
    tasks["evaluate"] >> tasks["plot_calibration"]
    tasks["judge"] >> tasks["catch_up"]
    tasks["plan_retraining"] >> tasks["catch_up"]
    tasks["retrain_champion"] >> tasks["catch_up"]
    tasks["split_frame"] >> tasks["catch_up"]
    tasks["catch_up"] >> tasks["write_card"]
    tasks["evaluate"] >> tasks["write_card"]
    tasks["judge"] >> tasks["write_card"]
    tasks["catch_up"] >> tasks["register"]
    tasks["evaluate"] >> tasks["register"]
    tasks["retrain_champion"] >> tasks["register"]
    tasks["split_frame"] >> tasks["register"]
    tasks["write_card"] >> tasks["register"]
    tasks["register"] >> tasks["package"]
    tasks["package"] >> tasks["dry_run"]
    tasks["register"] >> tasks["dry_run"]
    tasks["dry_run"] >> tasks["conclude"]
    tasks["judge"] >> tasks["conclude"]
    tasks["conclude"] >> tasks["publish_embeddings"]
    tasks["package"] >> tasks["publish_embeddings"]
    tasks["register"] >> tasks["publish_embeddings"]
    tasks["conclude"] >> tasks["promote"]
    tasks["package"] >> tasks["promote"]
    tasks["publish_embeddings"] >> tasks["promote"]
    tasks["register"] >> tasks["promote"]


fathom_retraining()
