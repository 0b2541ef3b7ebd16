"""Encoded splits → every model of the family, tuned and trained alike → evidence → report."""

from kedro.pipeline import Node, Pipeline

from fathom.pipelines.comparison.nodes import (
    cut_slices,
    report_comparison,
    train_family,
    weigh_evidence,
)


def create_pipeline() -> Pipeline:
    """Compare on what a run encoded; no part of ``kedro run``, since it trains many times."""
    return Pipeline(
        [
            Node(
                cut_slices,
                name="cut_slices",
                inputs=["encoder", "train_frame", "test_frame", "params:comparison"],
                outputs=["comparison_slices", "comparison_exceptions"],
                tags="comparison",
            ),
            Node(
                train_family,
                name="train_family",
                inputs=[
                    "encoder",
                    "train_batch",
                    "validation_batch",
                    "test_batch",
                    "params:training",
                    "params:comparison",
                    "params:comparison_trainings",
                ],
                outputs=["comparison_trainings", "comparison_scores"],
                tags="comparison",
            ),
            Node(
                weigh_evidence,
                name="weigh_evidence",
                inputs=[
                    "encoder",
                    "comparison_trainings",
                    "comparison_scores",
                    "comparison_slices",
                    "comparison_exceptions",
                    "baseline_predictions",
                    "test_frame",
                    "training_job",
                    "data_hash",
                    "params:comparison",
                    "params:evaluation",
                ],
                outputs="comparison",
                tags="comparison",
            ),
            Node(
                report_comparison,
                name="report_comparison",
                inputs="comparison",
                outputs=["comparison_page", "comparison_text"],
                tags="comparison",
            ),
        ]
    )
