"""Candidate and baselines on the test window; the gate's verdict."""

from kedro.pipeline import Node, Pipeline

from fathom.pipelines.evaluation.nodes import (
    evaluate,
    fit_baselines,
    judge,
    look_up_champion,
    plot_calibration,
    score_baselines,
    score_champion,
    score_splits,
)


def create_pipeline() -> Pipeline:
    """Score, measure overall and by slice, and compare with the baselines and the champion."""
    return Pipeline(
        [
            Node(
                score_splits,
                name="score_splits",
                inputs=[
                    "candidate",
                    "validation_batch",
                    "test_batch",
                    "validation_frame",
                    "test_frame",
                ],
                outputs="predictions",
                tags="evaluation",
            ),
            Node(
                fit_baselines,
                name="fit_baselines",
                inputs=["train_frame", "params:features", "params:baselines"],
                outputs="baselines",
                tags="evaluation",
            ),
            Node(
                score_baselines,
                name="score_baselines",
                inputs=["baselines", "test_frame", "params:features"],
                outputs="baseline_predictions",
                tags="evaluation",
            ),
            Node(
                look_up_champion,
                name="look_up_champion",
                inputs=["candidate_version", "params:registry"],
                outputs="champion",
                tags=["evaluation", "always"],
            ),
            Node(
                score_champion,
                name="score_champion",
                inputs=[
                    "test_frame",
                    "champion",
                    "params:features",
                    "params:registry",
                ],
                outputs="champion_predictions",
                tags="evaluation",
            ),
            Node(
                evaluate,
                name="evaluate",
                inputs=[
                    "predictions",
                    "baseline_predictions",
                    "champion_predictions",
                    "train_frame",
                    "test_frame",
                    "params:features",
                    "params:evaluation",
                ],
                outputs=["metrics", "slices", "calibration_points"],
                tags="evaluation",
            ),
            Node(
                judge,
                name="judge",
                inputs=[
                    "candidate",
                    "predictions",
                    "champion",
                    "champion_predictions",
                    "metrics",
                    "train_frame",
                    "test_frame",
                    "params:features",
                    "params:gate",
                    "params:evaluation",
                ],
                outputs="judgement",
                tags="evaluation",
            ),
            Node(
                plot_calibration,
                name="plot_calibration",
                inputs="calibration_points",
                outputs="calibration_plot",
                tags="evaluation",
            ),
        ]
    )
