"""What a run found, in one place."""

from kedro.pipeline import Node, Pipeline

from fathom.pipelines.reporting.nodes import summarise_run


def create_pipeline() -> Pipeline:
    """Gather the figures of a run; ``fathom.hooks`` adds its times and prints the table."""
    return Pipeline(
        [
            Node(
                summarise_run,
                name="summarise_run",
                inputs=[
                    "validation_report",
                    "candidate",
                    "predictions",
                    "metrics",
                    "release",
                    "decision",
                    "published_embeddings",
                    "data_hash",
                ],
                outputs="run_figures",
                tags="reporting",
            )
        ]
    )
