"""Raw files of the configured source → raw partitions."""

from kedro.pipeline import Node, Pipeline

from fathom.pipelines.ingestion.nodes import fingerprint_source, read_source


def create_pipeline() -> Pipeline:
    """Read the source and lay its canonical tables out as partitions under ``01_raw``."""
    return Pipeline(
        [
            Node(
                fingerprint_source,
                name="fingerprint_source",
                inputs="params:source",
                outputs="source_files",
                tags=["ingestion", "always"],
            ),
            Node(
                read_source,
                name="read_source",
                inputs=["params:source", "source_files"],
                outputs=["raw_exposures", "raw_interactions", "raw_users", "raw_items"],
                tags="ingestion",
            ),
        ]
    )
