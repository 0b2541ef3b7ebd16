"""Served feature vectors against those that history gives."""

from kedro.pipeline import Node, Pipeline

from fathom.pipelines.skew.nodes import judge_skew, replay_served


def create_pipeline() -> Pipeline:
    """Replay what the service logged; no part of ``kedro run``, which serves nothing."""
    return Pipeline(
        [
            Node(
                replay_served,
                name="replay_served",
                inputs=["params:skew", "params:feature_store", "params:registry"],
                outputs="skew_report",
                # What it reads lies outside of the catalog.
                tags=["skew", "always"],
            ),
            Node(
                judge_skew,
                name="judge_skew",
                inputs=["skew_report", "params:skew"],
                outputs=None,
                tags="skew",
            ),
        ]
    )
