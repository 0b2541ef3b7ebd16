"""Encoded splits → what each cross would gain → the crosses to declare, as YAML."""

from kedro.pipeline import Node, Pipeline

from fathom.pipelines.cross_search.nodes import plot_crosses, search_crosses


def create_pipeline() -> Pipeline:
    """Search on what training encoded; no part of ``kedro run``: what it finds a person pastes."""
    return Pipeline(
        [
            Node(
                search_crosses,
                name="search_crosses",
                # The test split is no input, so no choice can have seen it.
                inputs=[
                    "encoder",
                    "train_frame",
                    "train_batch",
                    "validation_frame",
                    "validation_batch",
                    "params:training",
                    "params:cross_search",
                    "params:evaluation",
                ],
                outputs=["cross_lifts", "chosen_crosses"],
                tags="cross_search",
            ),
            Node(
                plot_crosses,
                name="plot_crosses",
                inputs="cross_lifts",
                outputs="cross_plot",
                tags="cross_search",
            ),
        ]
    )
