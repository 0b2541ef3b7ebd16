"""The newest window against the champion's reference → report and decision."""

from kedro.pipeline import Node, Pipeline

from fathom.pipelines.monitoring.nodes import watch


def create_pipeline() -> Pipeline:
    """Compare features, predictions and quality with the champion's reference; decide."""
    return Pipeline(
        [
            Node(
                watch,
                name="watch",
                inputs=[
                    "training_frame",
                    "release",
                    "params:monitoring",
                    "params:window",
                    "params:registry",
                ],
                outputs=["decision", "drift_page", "drift_figures"],
                tags="monitoring",
            )
        ]
    )
