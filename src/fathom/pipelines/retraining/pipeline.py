"""Newest exposures → challenger, warm or fresh → gate → caught up → champion."""

from kedro.pipeline import Node, Pipeline

from fathom.pipelines import evaluation, release, training
from fathom.pipelines.retraining.nodes import catch_up, plan_retraining, retrain_champion

#: What of the training pipeline holds for any candidate.
_SHARED = ("split_frame", "encode_validation", "encode_test", "plot_training")


def create_pipeline() -> Pipeline:
    """Plan the windows, train, evaluate, catch up, release; no part of ``kedro run``.

    But for those of this module, the nodes are those of the other pipelines, on another split.
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
    caught_up = Pipeline(
        [
            Node(
                catch_up,
                name="catch_up",
                inputs=[
                    "candidate",
                    "training_state",
                    "judgement",
                    "train_frame",
                    "validation_frame",
                    "test_frame",
                    "retraining_split",
                    "params:training",
                    "params:retraining",
                    "params:evaluation",
                    "params:retrieval",
                    "params:checkpoints",
                ],
                outputs=["caught_up", "caught_up_state"],
                tags="retraining",
            )
        ]
    )
    judged = evaluation.create_pipeline() + caught_up
    return begun + trained + judged + release.create_pipeline("caught_up", "caught_up_state")
