"""Clean tables → as-of aggregates."""

from kedro.pipeline import Node, Pipeline

from fathom.pipelines.features.nodes import describe_features, stamp_attributes, summarise_logs


def create_pipeline() -> Pipeline:
    """Bring the sources of the feature views up to what the logs say."""
    return Pipeline(
        [
            Node(
                stamp_attributes,
                name="stamp_attributes",
                inputs=["users", "items", "params:features"],
                outputs="attributes",
                tags="features",
            ),
            Node(
                summarise_logs,
                name="summarise_logs",
                inputs=[
                    "exposures",
                    "interactions",
                    "users",
                    "items",
                    "past_features",
                    "params:features",
                ],
                # What is carried comes last: it says that the files before it are complete.
                outputs=["views", "packed_views", "carried_features"],
                tags="features",
            ),
            Node(
                describe_features,
                name="describe_features",
                inputs=["carried_features", "params:features"],
                outputs="features_state",
                tags="features",
            ),
        ]
    )
