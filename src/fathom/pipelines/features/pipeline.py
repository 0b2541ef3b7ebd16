"""Clean tables → as-of aggregates."""

from kedro.pipeline import Node, Pipeline

from fathom.pipelines.features.nodes import summarise_logs


def create_pipeline() -> Pipeline:
    """Compute the sources of the feature views."""
    return Pipeline(
        [
            Node(
                summarise_logs,
                name="summarise_logs",
                inputs=["exposures", "interactions", "users", "items", "params:features"],
                outputs=["attributes", "views", "packed_views"],
                tags="features",
            )
        ]
    )
