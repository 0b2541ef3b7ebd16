"""Nodes of the tuning pipeline."""

from __future__ import annotations

import dataclasses
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from fathom.config import TrainingConfig
from fathom.tuning import Choices, TuningConfig, as_text

if TYPE_CHECKING:
    from fathom.batch import Batch
    from fathom.encoding import Encoder
else:
    Batch = Encoder = Any

_HEADER = """\
# Found by `kedro run --pipelines tuning`: validation loss {loss:.5f}, the best of {trials} trials.
# To train with it, copy this file to conf/local/parameters_training.yml.
"""
_COLUMNS = 2


def tune(
    encoder: Encoder,
    train_batch: Batch,
    validation_batch: Batch,
    training: TrainingConfig,
    tuning: TuningConfig,
    study: str,
) -> tuple[list[dict[str, Any]], str]:
    """Search settings of the training; see `fathom.tuning.search`.

    Args:
        study: where finished trials are kept, so that a search can be resumed.

    Returns:
        The trials, and ``params:training`` with the best settings in it as YAML.
    """
    from fathom.tuning import search

    task = encoder.spec.task
    found = search(
        encoder.layout, train_batch, validation_batch, training, tuning, task, Path(study)
    )
    tuned = dataclasses.replace(training, **found.best).as_dict()
    text = yaml.safe_dump({"training": tuned}, sort_keys=False, default_flow_style=None)
    return found.trials, _HEADER.format(loss=found.best_loss, trials=len(found.trials)) + text


def plot_tuning(tuning_trials: list[dict[str, Any]], tuning: TuningConfig) -> Any:
    """Loss by trial with the best so far, and a panel of each tuned setting against the loss."""
    from plotly.subplots import make_subplots

    complete = [trial for trial in tuning_trials if trial["state"] == "complete"]
    losses = [trial["validation_loss"] for trial in complete]
    numbers = [trial["number"] + 1 for trial in complete]
    rows = 1 + -(-len(tuning.space) // _COLUMNS)
    figure = make_subplots(
        rows=rows,
        cols=_COLUMNS,
        specs=[[{"colspan": _COLUMNS}, None]] + [[{}] * _COLUMNS for _ in range(rows - 1)],
        subplot_titles=["validation loss by trial", *tuning.space],
    )
    best = list(accumulate(losses, min))
    line = {"shape": "hv"}
    figure.add_scatter(x=numbers, y=losses, mode="markers", name="trial", row=1, col=1)
    figure.add_scatter(x=numbers, y=best, mode="lines", line=line, name="best", row=1, col=1)
    for place, (name, range_) in enumerate(tuning.space.items()):
        at = {"row": 2 + place // _COLUMNS, "col": 1 + place % _COLUMNS}
        values = [trial["settings"][name] for trial in complete]
        category = isinstance(range_, Choices)
        figure.add_scatter(
            x=[as_text(value) for value in values] if category else values,
            y=losses,
            mode="markers",
            marker={"color": numbers, "colorscale": "Blues"},  # later trials are darker
            text=[f"trial {number}" for number in numbers],
            name=name,
            showlegend=False,
            **at,
        )
        figure.update_xaxes(
            type="category" if category else "log" if range_.log else "linear", **at
        )
    failed = len(tuning_trials) - len(complete)
    return figure.update_layout(
        title=f"Tuning: {len(complete)} trials" + (f", {failed} failed" if failed else ""),
        height=300 * rows,
    )
