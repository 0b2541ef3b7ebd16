"""Nodes of the comparison pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fathom.comparison import ComparisonConfig
from fathom.config import TrainingConfig
from fathom.evaluation import EvaluationConfig

if TYPE_CHECKING:
    from ibis.expr.types import Table
    from pyarrow import Table as ArrowTable

    from fathom.batch import Batch
    from fathom.encoding import Encoder
else:
    Table = ArrowTable = Batch = Encoder = Any


def cut_slices(
    encoder: Encoder, train_frame: Table, test_frame: Table, comparison: ComparisonConfig
) -> tuple[ArrowTable, dict[str, int]]:
    """Cut the test window into the slices that test the claims, by training rows alone.

    Returns:
        One column of booleans per slice, in the test split's order; exceptions of each cross.
    """
    import pyarrow as pa

    from fathom.comparison.slices import cut, needed
    from fathom.feature_store import frame_of

    spec = encoder.spec
    train, test = (
        frame_of(rows.select(*needed(spec)).to_pyarrow()) for rows in (train_frame, test_frame)
    )
    masks, exceptions = cut(train, test, spec, comparison.slices)
    return pa.table(masks), exceptions


def train_family(
    encoder: Encoder,
    train_batch: Batch,
    validation_batch: Batch,
    test_batch: Batch,
    training: TrainingConfig,
    comparison: ComparisonConfig,
    folder: str,
) -> tuple[dict[str, Any], ArrowTable]:
    """Tune and train every model; see `fathom.comparison.trainings`.

    Args:
        folder: where finished trials and trainings are kept, so that a run can be resumed.

    Returns:
        What was trained, and the scores of the test split, one column for each training.
    """
    import pyarrow as pa

    from fathom.comparison import Splits, train_all

    splits = Splits(train_batch, validation_batch, test_batch)
    found = train_all(encoder, splits, training, comparison, Path(folder))
    rows = {
        "training": len(train_batch),
        "validation": len(validation_batch),
        "test": len(test_batch),
    }
    scores = pa.table({key: pa.array(values) for key, values in found.scores.items()})
    return {**found.plain(), "rows": rows}, scores


def weigh_evidence(
    encoder: Encoder,
    trainings: dict[str, Any],
    scores: Table,
    slices: Table,
    exceptions: dict[str, int],
    baseline_predictions: Table,
    test_frame: Table,
    job: dict[str, Any],
    data_hash: str,
    comparison: ComparisonConfig,
    evaluation: EvaluationConfig,
) -> dict[str, Any]:
    """Measure every model and baseline on the test window, and judge the claims.

    Returns:
        What `fathom.comparison.weigh` returns, and what the figures stand on.
    """
    import fathom
    from fathom.comparison import Trainings, Window, definitions, weigh

    spec = encoder.spec
    config = evaluation.model_copy(update={"resamples": comparison.resamples})
    window = Window(_outcomes(test_frame, encoder), _columns(slices), config)
    found = Trainings(
        trainings["models"], trainings["ladder"], trainings["trainings"], _columns(scores)
    )
    figures = weigh(found, _columns(baseline_predictions), window, comparison.reference)
    figures["slices"] |= {"definitions": definitions(comparison.slices), "exceptions": exceptions}
    trials = [trial for model in found.models.values() for trial in model["trials"]]
    spent = [each["seconds"] for each in (*trials, *found.figures.values())]
    return figures | {
        "provenance": {
            "seeds": comparison.seeds,
            "trials": comparison.trials,
            "epochs": comparison.epochs or job["training"]["epochs"],
            "rows": trainings["rows"],
            "users": int(window.rows.user.max()) + 1,
            "resamples": config.resamples,
            "confidence": config.confidence,
            "data_hash": data_hash,
            "spec_hash": spec.hash,
            "code_version": fathom.__version__,
            "hardware": "; ".join(sorted({f["hardware"] for f in found.figures.values()})),
            "seconds": round(sum(spent), 1),
        }
    }


def report_comparison(comparison: dict[str, Any]) -> tuple[str, str]:
    """The comparison as one HTML page, and as Markdown."""
    from fathom.comparison import page, text

    return page(comparison), text(comparison)


def _columns(rows: Table) -> dict[str, Any]:
    table = rows.to_pyarrow()
    return {name: table[name].to_numpy() for name in table.column_names}


def _outcomes(test_frame: Table, encoder: Encoder) -> Any:
    """Who was shown what in the test window and what came of it, without any prediction."""
    from fathom.evaluation import Predictions

    spec = encoder.spec
    names = [spec.entities.user, spec.entities.request, spec.label.name]
    table = test_frame.select(*names).to_pyarrow()

    def codes(name: str) -> Any:
        encoded = table[name].combine_chunks().dictionary_encode()
        return encoded.indices.to_numpy().astype(np.int64)

    label = table[spec.label.name].to_numpy()
    outcome = label if spec.label.values is None else label == spec.label.values[-1]
    return Predictions(
        label=np.asarray(outcome, np.float64),
        probability=np.zeros(len(table)),
        user=codes(spec.entities.user),
        request=codes(spec.entities.request),
        task=spec.task,
    )
