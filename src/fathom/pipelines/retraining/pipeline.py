"""Newest exposures → challenger, warm from the champion or fresh → gate → champion."""

from kedro.pipeline import Node, Pipeline

from fathom.pipelines import evaluation, release, training
from fathom.pipelines.retraining.nodes import plan_retraining, retrain_champion

#: What of the training pipeline holds for any candidate.
_SHARED = ("split_frame", "encode_validation", "encode_test", "plot_training")


def create_pipeline() -> Pipeline:
    """Plan the windows, train, evaluate, release; no part of ``kedro run``, whose split is conf's.

    But for the first two nodes these are those of the other pipelines, on another split.
    """
    trained = training.create_pipeline(split="retraining_split").only_nodes(*_SHARED)
    begun = Pipeline(
        [
            Node(
                plan_retraining,
                name="plan_retraining",
                inputs=[
                    "training_frame",
                    "previous_decisions",
                    "params:features",
                    "params:split",
                    "params:retraining",
                    "params:registry",
                ],
                outputs=["retraining_split", "retraining_base"],
                # The registry lies outside of the catalog.
                tags=["retraining", "always"],
            ),
            Node(
                retrain_champion,
                name="retrain_champion",
                inputs=[
                    "train_frame",
                    "validation_frame",
                    "retraining_base",
                    "retraining_split",
                    "params:features",
                    "params:training",
                    "params:retraining",
                    "params:evaluation",
                    "params:retrieval",
                    "params:registry",
                    "params:checkpoints",
                    "params:tracking",
                ],
                outputs=[
                    "encoder",
                    "candidate",
                    "candidate_version",
                    "training_curves",
                    "training_state",
                    "retrieval_metrics",
                    "retraining_report",
                ],
                tags="retraining",
            ),
        ]
    )
    return begun + trained + evaluation.create_pipeline() + release.create_pipeline()
