"""Nodes of the training pipeline."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from fathom.config import SplitConfig, TrainingConfig
from fathom.pipelines.splits import between
from fathom.spec import FeatureSpec

if TYPE_CHECKING:
    from ibis.expr.types import Table

    from fathom.batch import Batch
    from fathom.encoding import Encoder
    from fathom.ranker import Ranker
else:
    Table = Batch = Encoder = Ranker = Any


def encode_splits(
    training_frame: Table, spec: FeatureSpec, split: SplitConfig
) -> tuple[Encoder, Batch, Batch, Batch]:
    """Fit the encoder on the training split alone; encode training, validation and test."""
    from fathom.encoding import fit_encoder
    from fathom.feature_store import frame_of

    columns = dict.fromkeys([spec.label.name, *(column.name for column in spec.columns)])

    def frame(name: str) -> Any:
        return frame_of(between(training_frame, split, name).select(*columns).to_pyarrow())

    train = frame("train")
    encoder = fit_encoder(train, spec)
    return (
        encoder,
        encoder.encode(train),
        encoder.encode(frame("validation")),
        encoder.encode(frame("test")),
    )


def train_candidate(
    encoder: Encoder,
    train_batch: Batch,
    validation_batch: Batch,
    training: TrainingConfig,
    split: SplitConfig,
    data_hash: str,
) -> tuple[Ranker, list[dict[str, Any]]]:
    """Train a model jointly.

    Returns:
        The candidate ranker, and what each epoch gave.
    """
    import fathom
    from fathom.hardware import hardware
    from fathom.ranker import Ranker
    from fathom.training import train

    trained = train(encoder.layout, train_batch, validation_batch, training, encoder.spec.task)
    provenance = {
        "seed": training.seed,
        "data_hash": data_hash,
        "code_version": fathom.__version__,
        "hardware": hardware(),
        "trained_from": split.train_from,
        "trained_until": split.validation_from,
        "rows": {"train": len(train_batch), "validation": len(validation_batch)},
        "best_epoch": trained.best_epoch,
        "parameters": sum(weight.numel() for weight in trained.model.parameters()),
        "wide_zero_share": trained.history[trained.best_epoch - 1].wide_zero_share,
    }
    ranker = Ranker(encoder, trained.model, training, provenance)
    return ranker, [dataclasses.asdict(epoch) for epoch in trained.history]


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
