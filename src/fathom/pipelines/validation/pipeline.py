"""Raw partitions → clean tables, quarantine, reports."""

from kedro.pipeline import Node, Pipeline

from fathom.pipelines.validation.nodes import accept, validate_raw


def create_pipeline() -> Pipeline:
    """Validate every raw table; stop before anything downstream if too much of one is bad."""
    return Pipeline(
        [
            Node(
                validate_raw,
                name="validate_raw",
                inputs=[
                    "raw_exposures",
                    "raw_interactions",
                    "raw_users",
                    "raw_items",
                    "params:features",
                    "params:validation",
                    "params:data_docs",
                    "served_exposures",
                ],
                outputs=[
                    "validated",
                    "quarantine",
                    "validation_report",
                    "validation_page",
                    "data_docs",
                ],
                tags="validation",
            ),
            Node(
                accept,
                name="accept",
                inputs=[
                    "validated",
                    "validation_report",
                    "params:features",
                    "params:validation",
                ],
                outputs=["exposures", "interactions", "users", "items", "data_hash"],
                tags="validation",
            ),
        ]
    )
