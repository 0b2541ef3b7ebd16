"""What was served and what became of it → the monitor's rows, the next exposures, judgements."""

from kedro.pipeline import Node, Pipeline

from fathom.pipelines.outcomes.nodes import add_exposures, join_outcomes, judge_served


def create_pipeline() -> Pipeline:
    """Join the prediction log with outcomes; no part of ``kedro run``, which serves nothing."""
    return Pipeline(
        [
            Node(
                join_outcomes,
                name="join_outcomes",
                inputs=["interactions", "raw_outcomes", "params:features", "params:outcomes"],
                outputs=["served_outcomes", "outcomes_report"],
                # The log lies outside of the catalog.
                tags=["outcomes", "always"],
            ),
            Node(
                add_exposures,
                name="add_exposures",
                inputs=["served_outcomes", "past_served_exposures", "params:features"],
                outputs="served_exposures",
                tags="outcomes",
            ),
            Node(
                judge_served,
                name="judge_served",
                inputs=[
                    "served_outcomes",
                    "params:features",
                    "params:outcomes",
                    "params:evaluation",
                    "params:registry",
                ],
                outputs="judgements",
                # The registry lies outside of the catalog.
                tags=["outcomes", "always"],
            ),
        ]
    )
