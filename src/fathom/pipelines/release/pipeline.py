"""Candidate → registered version → Bento, proven by a dry run → champion."""

from kedro.pipeline import Node, Pipeline

from fathom.pipelines.release.nodes import (
    conclude,
    dry_run,
    package,
    promote,
    publish_embeddings,
    register,
    write_card,
)


def create_pipeline(released: str = "candidate", state: str = "training_state") -> Pipeline:
    """Promote the candidate if the gate and the built Bento agree.

    Args:
        released: the dataset of what is promoted for it. state: that of its training.
    """
    return Pipeline(
        [
            Node(
                write_card,
                name="write_card",
                inputs=[released, "metrics", "slices", "judgement"],
                outputs="model_card",
                tags="release",
            ),
            Node(
                register,
                name="register",
                inputs=[
                    released,
                    state,
                    "candidate",
                    "validation_frame",
                    "test_frame",
                    "metrics",
                    "model_card",
                    "params:release",
                    "params:registry",
                ],
                outputs="registered",
                tags="release",
            ),
            Node(
                package,
                name="package",
                inputs=["registered", "bentofile", "params:registry"],
                outputs="bento",
                tags="release",
            ),
            Node(
                dry_run,
                name="dry_run",
                inputs=["registered", "bento", "params:registry"],
                outputs="dry_run",
                tags="release",
            ),
            Node(
                conclude,
                name="conclude",
                inputs=["judgement", "dry_run", "params:release"],
                outputs=["verdict", "verdict_text", "verdict_page"],
                tags="release",
            ),
            Node(
                publish_embeddings,
                name="publish_embeddings",
                inputs=[
                    "registered",
                    "verdict",
                    "bento",
                    "online_state",
                    "params:feature_store",
                    "params:registry",
                ],
                outputs="published_embeddings",
                tags="release",
            ),
            Node(
                promote,
                name="promote",
                inputs=[
                    "registered",
                    "verdict",
                    "bento",
                    "published_embeddings",
                    "params:registry",
                ],
                outputs="release",
                tags="release",
            ),
        ]
    )
