"""Training frame → encoder → jointly trained candidate."""

from kedro.pipeline import Node, Pipeline

from fathom.pipelines.training.nodes import encode_splits, plot_training, train_candidate


def create_pipeline() -> Pipeline:
    """Fit the encoder on the training split, encode all splits, train."""
    return Pipeline(
        [
            Node(
                encode_splits,
                name="encode_splits",
                inputs=["training_frame", "params:features", "params:split"],
                outputs=["encoder", "train_batch", "validation_batch", "test_batch"],
                tags="training",
            ),
            Node(
                train_candidate,
                name="train_candidate",
                inputs=[
                    "encoder",
                    "train_batch",
                    "validation_batch",
                    "params:training",
                    "params:split",
                ],
                outputs=["candidate", "candidate_version", "training_curves"],
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
