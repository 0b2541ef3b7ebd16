"""Nodes of the evaluation pipeline."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fathom.baselines import BaselinesConfig
from fathom.config import moment_of
from fathom.evaluation import EvaluationConfig
from fathom.gate import GateConfig
from fathom.spec import EVENT_TIMESTAMP, INCLUSION_PROBABILITY, FeatureSpec

if TYPE_CHECKING:
    from ibis.expr.types import Table
    from pyarrow import Table as ArrowTable

    from fathom.baselines import Baselines
    from fathom.batch import Batch
    from fathom.evaluation import Predictions
    from fathom.ranker import Ranker
    from fathom.registry import Registry
else:
    Table = ArrowTable = Baselines = Batch = Ranker = Registry = Predictions = Any

#: A context value is a slice of its own if it is among this many commonest.
_COMMON_VALUES = 12

log = logging.getLogger(__name__)


def score_splits(
    candidate: Ranker,
    validation_batch: Batch,
    test_batch: Batch,
    validation_frame: Table,
    test_frame: Table,
) -> ArrowTable:
    """Score the exposures that the candidate was not trained on.

    Returns:
        Keys, moment, label, inclusion probability, ``split`` and ``probability``.
    """
    import pyarrow as pa

    spec = candidate.spec
    columns = [*spec.keys, EVENT_TIMESTAMP, spec.label.name, INCLUSION_PROBABILITY]
    splits = {
        "validation": (validation_frame, validation_batch),
        "test": (test_frame, test_batch),
    }
    parts = []
    for name, (frame, batch) in splits.items():
        rows = frame.select(*columns).to_pyarrow()
        rows = rows.append_column("split", pa.array([name] * len(rows)))
        parts.append(rows.append_column("probability", pa.array(candidate.score_batch(batch))))
    return pa.concat_tables(parts)


def fit_baselines(train_frame: Table, spec: FeatureSpec, config: BaselinesConfig) -> Baselines:
    """Fit every baseline on the training split, on the same features as the candidate.

    Numeric columns as they are; categorical ones as codes where they have few values.
    """
    from fathom.baselines import MAX_CATEGORIES, Baselines

    columns = _columns(train_frame, spec)
    codes = {spec.entities.item: _values(columns[spec.entities.item])}
    for column in spec.columns:
        if column.kind == "categorical":
            values = _values(columns[column.name])
            if column.name in codes or len(values) <= MAX_CATEGORIES:
                codes[column.name] = values
    label = np.asarray(_label(train_frame, spec), np.float64)
    inputs = _baseline_inputs(columns, spec, codes)
    return Baselines.fit(inputs, label, config, spec.task, codes)


def score_baselines(baselines: Baselines, test_frame: Table, spec: FeatureSpec) -> ArrowTable:
    """Score the test split with every baseline.

    Returns:
        One column of predictions per baseline, in the test split's order.
    """
    import pyarrow as pa

    inputs = _baseline_inputs(_columns(test_frame, spec), spec, baselines.codes)
    return pa.table({n: pa.array(values) for n, values in baselines.predict(inputs).items()})


def look_up_champion(candidate_version: str, registry: str) -> dict[str, str | None]:
    """Find whom the candidate challenges: the champion, or whom it has itself replaced.

    So a run that is repeated after a promotion compares the same two once more, and not the new
    champion with itself, nor with what it was before it caught up.

    Returns:
        The ``version``, and until when it has learnt (``trained_until``), or None.
    """
    from fathom.registry import Registry

    versions = Registry(Path(registry))
    for version in reversed(versions.champions()):
        made = versions.described(version)["provenance"]
        if candidate_version not in (version, made.get("judged")):
            return {"version": version, "trained_until": made.get("trained_until")}
    return {"version": None, "trained_until": None}


def score_champion(
    test_frame: Table, champion: dict[str, str | None], spec: FeatureSpec, registry: str
) -> ArrowTable:
    """Score the test split with the champion that the candidate challenges.

    Returns:
        Its ``version`` and its ``probability`` for each row; no row if there is no champion, or
        if it reads columns that this spec no longer has (which the log says).
    """
    import pyarrow as pa

    from fathom.feature_store import frame_of
    from fathom.registry import Registry

    version = champion["version"]
    scores = np.array([], np.float64)
    if version is not None:
        ranker = Registry(Path(registry)).load(version)
        absent = [c.name for c in ranker.spec.columns if c.name not in test_frame.columns]
        if absent or ranker.spec.label != spec.label:
            log.warning("champion %s cannot score this frame: it reads %s", version, absent)
        else:
            columns = dict.fromkeys([spec.label.name, *(c.name for c in ranker.spec.columns)])
            test = test_frame.select(*columns).to_pyarrow()
            scores = ranker.score(frame_of(test))
    return pa.table(
        {"version": pa.array([version] * len(scores), pa.string()), "probability": scores}
    )


def evaluate(
    predictions: Table,
    baseline_predictions: Table,
    champion_predictions: Table,
    train_frame: Table,
    test_frame: Table,
    spec: FeatureSpec,
    config: EvaluationConfig,
) -> tuple[dict[str, Any], dict[str, Any], list[dict[str, float]]]:
    """Measure the candidate, the baselines and the champion on the test window.

    Returns:
        Metrics by model; the candidate's by slice; points of its calibration plot.
    """
    from fathom import evaluation

    window, scores = _test_window(predictions, spec)
    sides = {"candidate": scores}
    sides |= {f"champion {name}": s for name, s in _champion(champion_predictions).items()}
    baselines = baseline_predictions.to_pyarrow()
    sides |= {name: baselines[name].to_numpy() for name in baselines.column_names}
    usable = {}
    for name, values in sides.items():
        try:
            usable[name] = dataclasses.replace(window, probability=values)
        except evaluation.EvaluationError as error:  # for the gate to refuse; the loop goes on
            log.error("%s cannot be measured: %s", name, error)
    measured = {
        name: evaluation.metrics(usable[name]) if name in usable else {"rows": len(values)}
        for name, values in sides.items()
    }
    if "candidate" not in usable:
        return measured, {"metrics": {}, "left_out": {}}, []
    test = usable["candidate"]
    found = evaluation.slices(
        test, slice_masks(train_frame, test_frame, spec), config.min_slice_rows
    )
    return measured, dataclasses.asdict(found), evaluation.reliability(test)


def judge(
    candidate: Ranker,
    predictions: Table,
    champion: dict[str, str | None],
    champion_predictions: Table,
    metrics: dict[str, Any],
    train_frame: Table,
    test_frame: Table,
    spec: FeatureSpec,
    config: GateConfig,
    evaluation: EvaluationConfig,
) -> dict[str, Any]:
    """Let the gate decide whether the candidate may become the champion.

    A champion that has learnt from the test window cannot be compared on it, nor replaced.

    Returns:
        `fathom.gate.Verdict`, and who challenged whom (``challenger``, ``champion``) on which
        ``window`` (``from``, ``to``, ``rows``, ``users``).
    """
    from fathom.gate import Candidate, gate
    from fathom.retraining import utc

    window, scores = _test_window(predictions, spec)
    champions = [Candidate(*side) for side in _champion(champion_predictions).items()]
    rival = champions[0] if champions else None
    verdict = gate(
        window,
        Candidate(candidate.version, scores),
        rival,
        {name: values for name, values in metrics.items() if name in config.baselines},
        slice_masks(train_frame, test_frame, spec),
        config,
        evaluation,
    )
    moment = test_frame[EVENT_TIMESTAMP]
    ends = test_frame.agg(first=moment.min(), last=moment.max()).to_pyarrow().to_pylist()[0]
    learnt = champion["trained_until"]
    if rival and learnt and moment_of(learnt) > utc(ends["first"]):
        why = (
            f"fail: champion {rival.version} has learnt until {learnt}, and the test window begins "
            f"at {ends['first'].isoformat()}: what it has learnt is no test; run kedro run "
            "--pipelines retraining, or move params:split"
        )
        verdict = dataclasses.replace(verdict, promoted=False, reasons=[why, *verdict.reasons])
    return {
        **dataclasses.asdict(verdict),
        "challenger": candidate.version,
        "champion": rival.version if rival else None,
        "window": {
            "from": ends["first"].isoformat(),
            "to": ends["last"].isoformat(),
            "rows": window.label.size,
            "users": int(window.user_code.max()) + 1,
        },
    }


def plot_calibration(calibration_points: list[dict[str, float]]) -> Any:
    """Observed rate against predicted probability."""
    import plotly.graph_objects as go

    predicted = [point["probability"] for point in calibration_points]
    observed = [point["observed"] for point in calibration_points]
    top = max([*predicted, *observed], default=1.0)
    figure = go.Figure()
    figure.add_scatter(x=[0, top], y=[0, top], mode="lines", name="perfect")
    figure.add_scatter(x=predicted, y=observed, mode="lines+markers", name="candidate")
    return figure.update_layout(
        title="Calibration on the test window", xaxis_title="predicted", yaxis_title="observed"
    )


def _columns(rows: Table, spec: FeatureSpec) -> Any:
    names = dict.fromkeys([spec.entities.item, *(column.name for column in spec.columns)])
    kept = [
        n
        for n in names
        if n not in spec.by_name or spec.by_name[n].kind in {"numeric", "categorical"}
    ]
    return rows.select(*kept).to_pyarrow()


def _baseline_inputs(rows: Any, spec: FeatureSpec, codes: Mapping[str, list[str]]) -> Any:
    """Numbers as they are and few-valued categories as codes of the training split's values."""
    from fathom.baselines import MAX_CATEGORIES, Inputs

    columns: list[Any] = []
    categorical = []
    for column in spec.columns:
        if column.kind == "numeric":
            columns.append(rows[column.name].to_numpy())
        elif len(codes.get(column.name, range(MAX_CATEGORIES + 1))) <= MAX_CATEGORIES:
            categorical.append(len(columns))
            columns.append(_codes(rows[column.name], codes[column.name]))
    item = _codes(rows[spec.entities.item], codes[spec.entities.item])
    return Inputs(np.stack(columns, axis=1).astype(np.float32), tuple(categorical), item)


def _values(column: Any) -> list[str]:
    """The values of a column, in the order of their first rows."""
    import pyarrow.compute as pc

    found: list[str] = pc.unique(column.drop_null()).to_pylist()
    return found


def _codes(column: Any, values: list[str]) -> Any:
    """Positions among the values, -1 for others and missing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    found = pc.index_in(column, pa.array(values, column.type))
    return pc.fill_null(found, -1).to_numpy().astype(np.int64)


def _label(rows: Table, spec: FeatureSpec) -> Any:
    values = rows.select(spec.label.name).to_pyarrow()[spec.label.name].to_numpy()
    return values if spec.label.values is None else values == spec.label.values[-1]


def _test_window(predictions: Table, spec: FeatureSpec) -> tuple[Predictions, Any]:
    """The test rows with no predictions yet (all 0), and the candidate's as they came."""
    from fathom.evaluation import Predictions

    rows = predictions.filter(predictions["split"] == "test")
    table = rows.to_pyarrow()

    def codes(name: str) -> Any:
        encoded = table[name].combine_chunks().dictionary_encode()
        return encoded.indices.to_numpy().astype(np.int64)

    window = Predictions(
        label=np.asarray(_label(rows, spec), np.float64),
        probability=np.zeros(len(table)),
        user=codes(spec.entities.user),
        request=codes(spec.entities.request),
        task=spec.task,
    )
    return window, table["probability"].to_numpy()


def _champion(champion_predictions: Table) -> dict[str, Any]:
    """The champion's predictions by its version; empty if there are none."""
    read = champion_predictions.to_pyarrow()
    return {read["version"][0].as_py(): read["probability"].to_numpy()} if len(read) else {}


def slice_masks(train_frame: Table, test_frame: Table, spec: FeatureSpec) -> dict[str, Any]:
    """New users, new items, and each common value of each context column, as masks of the test."""
    context = [c.name for c in spec.raw_columns("context") if c.kind == "categorical"]
    names = [spec.entities.user, spec.entities.item, *context]
    test = test_frame.select(*names).to_pyarrow()
    masks = {}
    for key, name in ((spec.entities.user, "new users"), (spec.entities.item, "new items")):
        seen = train_frame.select(key).distinct().to_pyarrow()[key]
        known = set(seen.to_pylist())
        masks[name] = np.array([value not in known for value in test[key].to_pylist()], np.bool_)
    for name in context:
        values = np.array(test[name].to_pylist(), object)
        distinct, counts = np.unique(values.astype(str), return_counts=True)
        for value in distinct[np.argsort(-counts, kind="stable")][:_COMMON_VALUES]:
            masks[f"{name} = {value}"] = values.astype(str) == value
    return masks
