"""The year again, week by week, under every policy of retraining."""

from kedro.pipeline import Node, Pipeline

from fathom.pipelines.replay.nodes import replay_year, write_replay


def create_pipeline() -> Pipeline:
    """Replay the training frame as if live; no part of ``kedro run``, for it trains many times."""
    return Pipeline(
        [
            Node(
                replay_year,
                name="replay_year",
                inputs=[
                    "training_frame",
                    "params:features",
                    "params:split",
                    "params:training",
                    "params:retraining",
                    "params:monitoring",
                    "params:gate",
                    "params:evaluation",
                    "params:replay",
                    "params:checkpoints",
                ],
                outputs="replay_figures",
                tags="replay",
            ),
            Node(
                write_replay,
                name="write_replay",
                inputs="replay_figures",
                outputs="replay_page",
                tags="replay",
            ),
        ]
    )
