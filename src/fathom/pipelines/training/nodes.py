"""Nodes of the training pipeline."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.config import SplitConfig, TrainingConfig
from fathom.spec import EVENT_TIMESTAMP, INCLUSION_PROBABILITY, FeatureSpec
from fathom.tower import TowerConfig
from fathom.tracking import TrackingConfig

if TYPE_CHECKING:
    from ibis.expr.types import Table

    from fathom.batch import Batch
    from fathom.encoding import Encoder
    from fathom.ranker import Ranker
    from fathom.tower import Tower
    from fathom.training import Trained
else:
    Table = Batch = Encoder = Ranker = Tower = Trained = Any

#: What is kept of each epoch. No times: the same training leaves the same bytes.
_CURVES = ("epoch", "train_loss", "validation_loss", "wide_zero_share")


def split_frame(training_frame: Table, split: SplitConfig) -> tuple[Table, Table, Table]:
    """Divide the training frame by time, in its order.

    What lies before ``train_from``, or in a span of ``without``, is left out.

    In files of their own, a new week of one split is no news to what reads another.

    Returns:
        The training, validation and test split.
    """
    for start, end in split.spans:
        training_frame = training_frame.filter(~training_frame[EVENT_TIMESTAMP].between(start, end))
    moment = training_frame[EVENT_TIMESTAMP]
    train, validation, test = (
        split.moment(name) for name in ("train_from", "validation_from", "test_from")
    )
    return (
        training_frame.filter((moment >= train) & (moment < validation)),
        training_frame.filter((moment >= validation) & (moment < test)),
        training_frame.filter(moment >= test),
    )


def encode_train(train_frame: Table, spec: FeatureSpec) -> tuple[Encoder, Batch]:
    """Fit the encoder on the training split, and on nothing else, and encode that."""
    from fathom.encoding import fit_encoder

    frame = frame_of_split(train_frame, spec)
    encoder = fit_encoder(frame, spec)
    return encoder, encoder.encode(frame)


def encode(encoder: Encoder, split_frame: Table) -> Batch:
    """Encode another split."""
    return encoder.encode(frame_of_split(split_frame, encoder.spec))


def describe_job(encoder: Encoder, training: TrainingConfig) -> dict[str, Any]:
    """What ``python -m fathom.training`` needs to know beside the encoded splits."""
    return {
        "task": encoder.spec.task,
        "layout": dataclasses.asdict(encoder.layout),
        "training": training.as_dict(),
    }


def train_tower(
    encoder: Encoder, train_batch: Batch, validation_batch: Batch, retrieval: TowerConfig
) -> tuple[Tower, dict[str, Any]]:
    """Learn what retrieves candidates for the ranker from the whole catalogue.

    Returns:
        The tower, and what of the validation window it retrieves, beside popularity.
    """
    from fathom.tower import fit_tower, measure

    tower = fit_tower(encoder, train_batch, retrieval)
    return tower, measure(tower, encoder, validation_batch)


def train_candidate(
    encoder: Encoder,
    tower: Tower,
    train_batch: Batch,
    validation_batch: Batch,
    training: TrainingConfig,
    split: SplitConfig,
    checkpoints: str,
    tracking: TrackingConfig,
) -> tuple[Ranker, str, list[dict[str, Any]], dict[str, Any]]:
    """Train a model jointly, from the last checkpoint of the same training if there is one.

    Returns:
        The candidate ranker, its version, what each epoch gave, and where what it learnt is kept.
    """
    from fathom.ranker import Ranker
    from fathom.retraining import attempt, provenance
    from fathom.tracking import reporting

    with reporting(tracking, training) as report:
        batches = (train_batch, validation_batch)
        found = attempt("fresh", encoder, batches, training, Path(checkpoints), report)
    trained = found.trained
    described = provenance(found, training, split)
    ranker = Ranker(encoder, trained.model, training, described, tower)
    return ranker, ranker.version, curves(trained), learnt(trained)


def curves(trained: Trained) -> list[dict[str, Any]]:
    """What each epoch gave."""
    return [{name: getattr(epoch, name) for name in _CURVES} for epoch in trained.history]


def learnt(trained: Trained) -> dict[str, Any]:
    """Where what another training can start from is, as a receipt for it."""
    return {"folder": str(trained.state), "covers": [str(trained.state)]}


def frame_of_split(rows: Table, spec: FeatureSpec, *more: str) -> Any:
    """A split as a frame: label, inclusion probability, keys, the spec's columns, and ``more``."""
    from fathom.feature_store import frame_of

    own = (spec.label.name, INCLUSION_PROBABILITY, *spec.keys, *more)
    columns = dict.fromkeys([*own, *(column.name for column in spec.columns)])
    return frame_of(rows.select(*columns).to_pyarrow())


def plot_training(training_curves: list[dict[str, Any]]) -> Any:
    """Training and validation loss by epoch."""
    import plotly.graph_objects as go

    epochs = [epoch["epoch"] for epoch in training_curves]
    figure = go.Figure()
    for name in ("train_loss", "validation_loss"):
        losses = [epoch[name] for epoch in training_curves]
        figure.add_scatter(x=epochs, y=losses, mode="lines+markers", name=name.replace("_", " "))
    return figure.update_layout(
        title="Joint training", xaxis_title="epoch", yaxis_title="loss per example"
    )
