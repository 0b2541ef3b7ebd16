"""Aggregates → Feast; the training frame; the online store."""

from kedro.pipeline import Node, Pipeline

from fathom.pipelines.feature_store.nodes import apply_spec, materialise_online, read_training_frame


def create_pipeline() -> Pipeline:
    """Register the spec's objects, read the training frame as of each exposure, load online."""
    return Pipeline(
        [
            Node(
                apply_spec,
                name="apply_spec",
                inputs=[
                    "params:features",
                    "params:feature_store",
                    "features_state",
                ],
                outputs="feature_store_state",
                tags="feature_store",
            ),
            Node(
                read_training_frame,
                name="read_training_frame",
                inputs=[
                    "exposures",
                    "feature_store_state",
                    "previous_training_frame",
                    "previous_training_frame_state",
                    "params:features",
                    "params:feature_store",
                ],
                outputs=["training_frame", "training_frame_state"],
                tags="feature_store",
            ),
            Node(
                materialise_online,
                name="materialise_online",
                inputs=["feature_store_state", "params:features", "params:feature_store"],
                outputs="online_state",
                tags="feature_store",
            ),
        ]
    )
