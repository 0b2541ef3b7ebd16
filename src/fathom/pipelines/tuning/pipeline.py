"""Encoded splits → trials → the best settings, as YAML."""

from kedro.pipeline import Node, Pipeline

from fathom.pipelines.tuning.nodes import plot_tuning, tune


def create_pipeline() -> Pipeline:
    """Search on what training encoded; no part of ``kedro run``, since it trains many times."""
    return Pipeline(
        [
            Node(
                tune,
                name="tune",
                # The test split is no input, so no choice can have seen it.
                inputs=[
                    "encoder",
                    "train_batch",
                    "validation_batch",
                    "params:training",
                    "params:tuning",
                    "params:tuning_study",
                ],
                outputs=["tuning_trials", "tuned_training"],
                tags="tuning",
            ),
            Node(
                plot_tuning,
                name="plot_tuning",
                inputs=["tuning_trials", "params:tuning"],
                outputs="tuning_plot",
                tags="tuning",
            ),
        ]
    )
