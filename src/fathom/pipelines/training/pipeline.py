"""Training frame → encoder → jointly trained candidate."""

from kedro.pipeline import Node, Pipeline

from fathom.pipelines.training.nodes import (
    describe_job,
    encode,
    encode_train,
    plot_training,
    split_frame,
    train_candidate,
    train_tower,
)


def create_pipeline(split: str = "params:split") -> Pipeline:
    """Split, fit the encoder on the training split, encode all splits, train tower and ranker.

    Args:
        split: the dataset that says where time divides the exposures.
    """
    return Pipeline(
        [
            Node(
                split_frame,
                name="split_frame",
                inputs=["training_frame", split],
                outputs=["train_frame", "validation_frame", "test_frame"],
                tags="training",
            ),
            Node(
                encode_train,
                name="encode_train",
                inputs=["train_frame", "params:features"],
                outputs=["encoder", "train_batch"],
                tags="training",
            ),
            Node(
                encode,
                name="encode_validation",
                inputs=["encoder", "validation_frame"],
                outputs="validation_batch",
                tags="training",
            ),
            Node(
                encode,
                name="encode_test",
                inputs=["encoder", "test_frame"],
                outputs="test_batch",
                tags="training",
            ),
            Node(
                describe_job,
                name="describe_job",
                inputs=["encoder", "params:training"],
                outputs="training_job",
                tags="training",
            ),
            Node(
                train_tower,
                name="train_tower",
                inputs=["encoder", "train_batch", "validation_batch", "params:retrieval"],
                outputs=["tower", "retrieval_metrics"],
                tags="training",
            ),
            Node(
                train_candidate,
                name="train_candidate",
                inputs=[
                    "encoder",
                    "tower",
                    "train_batch",
                    "validation_batch",
                    "params:training",
                    split,
                    "params:checkpoints",
                    "params:tracking",
                ],
                outputs=["candidate", "candidate_version", "training_curves", "training_state"],
                tags="training",
            ),
            Node(
                plot_training,
                name="plot_training",
                inputs="training_curves",
                outputs="training_plot",
                tags="training",
            ),
        ]
    )
