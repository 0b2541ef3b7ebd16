"""Served feature vectors against those that history gives."""

from kedro.pipeline import Node, Pipeline

from fathom.pipelines.replay.nodes import judge_replay, replay_served


def create_pipeline() -> Pipeline:
    """Replay what the service logged; no part of ``kedro run``, which serves nothing."""
    return Pipeline(
        [
            Node(
                replay_served,
                name="replay_served",
                inputs=["params:replay", "params:feature_store", "params:registry"],
                outputs="replay_report",
                # What it reads lies outside of the catalog.
                tags=["replay", "always"],
            ),
            Node(
                judge_replay,
                name="judge_replay",
                inputs=["replay_report", "params:replay"],
                outputs=None,
                tags="replay",
            ),
        ]
    )
