"""Nodes of the cross search pipeline."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fathom.config import TrainingConfig
from fathom.cross_search import Chosen, CrossSearchConfig, CrossSearchResult
from fathom.evaluation import EvaluationConfig

if TYPE_CHECKING:
    from ibis.expr.types import Table

    from fathom.batch import Batch
    from fathom.encoding import Encoder
else:
    Table = Batch = Encoder = Any

_HEADER = """\
# Found by `kedro run --pipelines cross_search`: {loss} {columns:.5f} without crosses, {crosses:.5f}
# with these, on validation rows that did not choose them. Beside each cross what it adds to those
# before it ({confidence:.0%} interval over users), and its rows of the wide part.
# To train with them, copy this file to conf/local/parameters_features.yml, or the list to where the
# spec declares its crosses.
features:
"""
#: Candidates that the plot shows.
_SHOWN = 30


def search_crosses(
    encoder: Encoder,
    train_frame: Table,
    train_batch: Batch,
    validation_frame: Table,
    validation_batch: Batch,
    training: TrainingConfig,
    cross_search: CrossSearchConfig,
    evaluation: EvaluationConfig,
) -> tuple[dict[str, Any], str]:
    """Choose the crosses of the wide part; see `fathom.cross_search.search`.

    Returns:
        What was found, and the chosen crosses as YAML for the spec.
    """
    from fathom.cross_search import Split, columns_read, search
    from fathom.feature_store import frame_of

    read = columns_read(encoder.spec, cross_search.numeric)
    train, validation = (
        Split(frame_of(frame.select(*read).to_pyarrow()), batch)
        for frame, batch in ((train_frame, train_batch), (validation_frame, validation_batch))
    )
    found = search(encoder, train, validation, training, cross_search, evaluation)
    loss = "logloss" if encoder.spec.task == "binary" else "squared error"
    lifts = {"loss": loss, "confidence": evaluation.confidence} | dataclasses.asdict(found)
    return lifts, _yaml(found, loss, evaluation.confidence)


def _yaml(found: CrossSearchResult, loss: str, confidence: float) -> str:
    header = _HEADER.format(loss=loss, confidence=confidence, **found.losses)
    lines = "".join(f"    {_line(cross)}\n" for cross in found.chosen)
    return header + (f"  crosses:\n{lines}" if lines else "  crosses: [] # none is sure to gain\n")


def _line(cross: Chosen) -> str:
    gain = f"{cross.lift:+.5f} ({cross.lo:+.5f} to {cross.hi:+.5f}), {cross.rows:,} rows"
    columns = ", ".join(cross.columns)
    return f"- {{columns: [{columns}], min_count: {cross.min_count}}} # {gain}"


def plot_crosses(cross_lifts: dict[str, Any]) -> Any:
    """What the best candidates gain alone, and what the chosen ones gain on rows held out."""
    import plotly.graph_objects as go

    def name(cross: dict[str, Any]) -> str:
        return " x ".join(cross["columns"])

    chosen, candidates = cross_lifts["chosen"], cross_lifts["candidates"]
    best = sorted(candidates, key=lambda cross: -cross["lift"])[:_SHOWN]
    names = list(dict.fromkeys(name(cross) for cross in (*chosen, *best)))
    figure = go.Figure()
    figure.add_bar(
        x=[cross["lift"] for cross in best],
        y=[name(cross) for cross in best],
        error_x={"array": [cross_lifts["deviations"] * c["standard_error"] for c in best]},
        orientation="h",
        name="alone, where it is chosen",
    )
    figure.add_bar(
        x=[cross["lift"] for cross in chosen],
        y=[name(cross) for cross in chosen],
        error_x={
            "array": [cross["hi"] - cross["lift"] for cross in chosen],
            "arrayminus": [cross["lift"] - cross["lo"] for cross in chosen],
        },
        orientation="h",
        name="chosen: added to those before it, held out",
    )
    total = cross_lifts["total"]
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1])
    return figure.update_layout(
        title=f"{len(chosen)} crosses chosen of {len(candidates)}: {total['lift']:+.5f} held out "
        f"({total['lo']:+.5f} to {total['hi']:+.5f})",
        xaxis_title=f"lift: {cross_lifts['loss']} per row",
        height=200 + 22 * len(names),
        barmode="group",
    )
