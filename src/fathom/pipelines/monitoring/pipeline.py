"""The newest window against the champion's reference → report and decision."""

from kedro.pipeline import Node, Pipeline

from fathom.pipelines.monitoring.nodes import (
    decide,
    draw_decisions,
    record_window,
    score_window,
)


def create_pipeline() -> Pipeline:
    """Compare features, predictions and quality with the champion's reference; decide."""
    return Pipeline(
        [
            Node(
                score_window,
                name="score_window",
                inputs=[
                    "training_frame",
                    "watched_outcomes",
                    "release",
                    "params:monitoring",
                    "params:window",
                    "params:retraining",
                    "params:registry",
                ],
                outputs=["scored_window", "watched"],
                tags="monitoring",
            ),
            Node(
                decide,
                name="decide",
                inputs=[
                    "scored_window",
                    "watched",
                    "validation_report",
                    "previous_decisions",
                    "params:monitoring",
                    "params:registry",
                ],
                outputs=[
                    "decision",
                    "decisions",
                    "drift_page",
                    "drift_figures",
                    "drift_snapshots",
                ],
                tags="monitoring",
            ),
            Node(
                draw_decisions,
                name="draw_decisions",
                inputs="decisions",
                outputs="decisions_plot",
                tags="monitoring",
            ),
            Node(
                record_window,
                name="record_window",
                inputs=["drift_snapshots", "decision", "params:workspace"],
                outputs="recorded_window",
                tags="monitoring",
            ),
        ]
    )
