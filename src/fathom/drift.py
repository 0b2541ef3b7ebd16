"""Drift: the newest window against the champion's reference, as a report and a decision.

The only module that knows Evidently. Each column of the `FeatureSpec` is first put in a form that
can be compared, fitted on the *reference* alone:

numeric      the tenths of the reference, and ``(missing)``. (Evidently's own bins are equally wide
             over both samples together, so that one outlier empties them, and drop missing
             values. So does the Wasserstein distance, which tails rule besides.)
categorical  the values of the reference, ``(unknown)`` and ``(missing)``.
id           a categorical column of more than ``max_categories`` values in the reference:
             ``(head)``, ``(tail)``, ``(unknown)`` and ``(missing)``, see `_frequency_bands`.

A column ``x`` of several values is watched as ``x.length`` and as ``x.first`` (a sequence) or
``x.member`` (a set: one of its members, drawn by seed). ``probability``, the model's output, is
always watched. Evidently computes the scores and the page. Its defaults, which depend on the
number of rows and on guessed column types, never act: every type, method and threshold is given.

What asks for a retraining: too large a share of drifted columns, drifted predictions, or quality
out of its bounds where labels are there. Columns without data are named among the reasons but do
not ask for one: retraining would teach the model the outage.
"""

from __future__ import annotations

import html
import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, TypeAdapter

from fathom.spec import EVENT_TIMESTAMP, INCLUSION_PROBABILITY, FeatureSpec

PROBABILITY = "probability"
MISSING, UNKNOWN, HEAD, TAIL = "(missing)", "(unknown)", "(head)", "(tail)"
_LABEL = "label"
Method = Literal["psi", "jensenshannon"]
Kind = Literal["numeric", "categorical", "id"]
Figures = dict[str, int | float]
_Sides = tuple[pd.Series, pd.Series]  # the reference's, then the current window's


class MonitoringConfig(BaseModel):
    """``params:monitoring``: when a window counts as drifted.

    Args:
        numeric_method, numeric_threshold: how numeric columns are scored, and the score from
            which one has drifted. PSI by custom: below 0.1 stable, from 0.25 a major shift.
        categorical_method, categorical_threshold: the same for categorical and id columns. The
            Jensen-Shannon distance (in nats, 0 to 0.83) needs no stand-in for a share of zero,
            which PSI does; Evidently's stand-in jumps with the rarest value's share.
        thresholds: of single watched columns, by name (``price``, ``history.length``).
        max_categories: more distinct values in the reference make a categorical column an id.
        drifted_share: share of drifted columns, predictions aside, from which to retrain.
        prediction_threshold: score of ``probability``, by ``numeric_method``, from which to
            retrain.
        max_loss_increase: part of the reference's loss (logloss; for regression, rmse) by which
            the loss may rise: 0.1 allows a tenth more.
        max_auc_drop: by how much the AUC may fall below the reference's.
        calibration_lo, calibration_hi: bounds of the sum predicted over the sum observed.
        sample_rows: at most so many rows of each side are compared, drawn by ``seed``.
        min_rows: with fewer rows on a side there is no verdict.
        min_labels: with fewer labels on a side, or fewer of either value (binary), there is none
            on quality: at 1,000 of each, an AUC of 0.8 is known to ±0.02 (two standard errors).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    numeric_method: Method = "psi"
    numeric_threshold: PositiveFloat = 0.2
    categorical_method: Method = "jensenshannon"
    categorical_threshold: PositiveFloat = 0.15
    thresholds: dict[str, PositiveFloat] = {}
    max_categories: int = Field(default=30, ge=2, le=1000)
    drifted_share: float = Field(default=0.3, gt=0, le=1)
    prediction_threshold: PositiveFloat = 0.2
    max_loss_increase: float = Field(default=0.1, ge=0)
    max_auc_drop: float = Field(default=0.02, ge=0, le=1)
    calibration_lo: float = Field(default=0.8, gt=0, le=1)
    calibration_hi: float = Field(default=1.25, ge=1)
    sample_rows: int = Field(default=20_000, ge=100)
    min_rows: int = Field(default=2_000, ge=10)
    min_labels: int = Field(default=1_000, ge=1)
    seed: int = Field(default=0, ge=0)


class MonitoringError(ValueError):
    """The frames do not fit the spec; the message lists every fault at once."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        super().__init__(f"monitoring: {count}\n" + "\n".join(f"  - {fault}" for fault in faults))


@dataclass(frozen=True)
class Window:
    """The time that the current rows come from, both ends included; naive times are UTC.

    Raises:
        ValueError: it ends before it starts.
    """

    start: datetime
    end: datetime

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            moment: datetime = getattr(self, name)
            if moment.tzinfo is None:
                object.__setattr__(self, name, moment.replace(tzinfo=UTC))
        if self.end < self.start:
            raise ValueError(f"window: ends at {self.end}, before it starts at {self.start}")


@dataclass(frozen=True)
class Watched:
    """What is compared of one column: its value, or one aspect of a column of several values."""

    column: str
    kind: Literal["numeric", "categorical"]
    aspect: Literal["value", "length", "first", "member"] = "value"

    @property
    def name(self) -> str:
        """``column``, or ``column.aspect``."""
        return self.column if self.aspect == "value" else f"{self.column}.{self.aspect}"


@dataclass(frozen=True)
class ColumnDrift:
    """How far one watched column has moved; it has drifted from ``threshold`` on."""

    kind: Kind
    method: Method
    score: float | None
    threshold: float
    verdict: Literal["stable", "drifted", "no data"]


@dataclass(frozen=True)
class Quality:
    """Metrics of the labelled rows (sampled) of both sides.

    ``reference`` and ``current`` hold ``rows`` and, if checked, ``auc``, ``logloss`` and
    ``calibration`` (binary) or ``rmse`` (regression). ``causes`` says why the verdict is not
    ``within bounds``.
    """

    reference: Figures
    current: Figures
    verdict: Literal["within bounds", "out of bounds", "not checked"]
    causes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """Whether to retrain, and what speaks for it or is to be known beside it.

    Each reason starts with what it is about: ``columns``, ``prediction``, ``quality``, ``data``.
    """

    retrain: bool
    reasons: tuple[str, ...]
    window: Window
    columns: dict[str, ColumnDrift]
    quality: Quality
    rows: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """The contract of ``decision.json``, made of what JSON has."""
        plain: dict[str, Any] = TypeAdapter(Decision).dump_python(self, mode="json")
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Decision:
        """Read what `to_json` gave."""
        return TypeAdapter(Decision).validate_python(plain)


@dataclass(frozen=True)
class Monitoring:
    """The decision, a self-contained page of some 5 MB that shows it, and Evidently's figures."""

    decision: Decision
    html: str
    evidently: dict[str, Any]


@dataclass(frozen=True)
class _Pair:
    """A watched column as it is compared: (sampled rows,) a side; None where a side is all null."""

    kind: Kind
    method: Method
    threshold: float
    sides: _Sides | None


def column_kinds(spec: FeatureSpec) -> tuple[Watched, ...]:
    """What is watched of a spec, in its order, then the model's output.

    Whether a categorical column is compared by value or as an id is up to the reference, and so
    not known here.
    """
    watched: list[Watched] = []
    for column in spec.columns:
        if column.kind == "numeric" or column.kind == "categorical":
            watched.append(Watched(column.name, column.kind))
        else:
            one: Literal["first", "member"] = "first" if column.kind == "sequence" else "member"
            watched.append(Watched(column.name, "numeric", "length"))
            watched.append(Watched(column.name, "categorical", one))
    return (*watched, Watched(PROBABILITY, "numeric"))


def monitor(
    reference: pd.DataFrame,
    current: pd.DataFrame,
    spec: FeatureSpec,
    config: MonitoringConfig,
    window: Window,
) -> Monitoring:
    """Compare a window with the champion's reference and decide whether to retrain.

    Args:
        reference, current: one row per exposure: the spec's columns as raw values (lists for
            multi and sequence columns), ``probability`` (for regression, the predicted number),
            ``event_timestamp`` (current only) and, where labels have arrived, the spec's label
            (null where not). Two more columns count if they are there: the request key of the
            reference, by which ids drawn together are told, and ``inclusion_probability``, whose
            inverse weighs the calibration.
        window: where the current rows lie; its end is the time of the report.

    Raises:
        MonitoringError: absent or mistyped columns of both frames, values out of their domain,
            rows outside the window, an empty reference: all listed at once.
    """
    if faults := _faults(reference, current, spec, config, window):
        raise MonitoringError(faults)
    reference, current = reference.reset_index(drop=True), current.reset_index(drop=True)
    rows = {"reference": len(reference), "current": len(current)}
    few = tuple(
        f"data: {side} has {n} rows, fewer than min_rows {config.min_rows}: no verdict"
        for side, n in rows.items()
        if n < config.min_rows
    )
    if few:
        decision = Decision(False, few, window, {}, Quality({}, {}, "not checked", few), rows)
        return Monitoring(decision, _page([], decision), {})
    samples = (_sample(reference, config), _sample(current, config))
    pairs = {
        watched.name: _pair(watched, reference, samples, spec, config)
        for watched in column_kinds(spec)
    }
    drift = _drift_snapshot(pairs, config, window)
    columns = _columns(pairs, drift)
    quality, measured = _quality(reference, current, spec, config, window)
    decision = _decide(columns, quality, config, window, rows)
    snapshots = {"drift": drift, "quality": measured}
    snapshots = {name: snapshot for name, snapshot in snapshots.items() if snapshot is not None}
    figures = {name: json.loads(snapshot.json()) for name, snapshot in snapshots.items()}
    return Monitoring(decision, _page(list(snapshots.values()), decision), figures)


def nothing_to_watch(window: Window) -> Monitoring:
    """What to say of a window when no model is in charge yet."""
    reason = (
        "data: there is no champion, so nothing to compare with; train one that passes the gate"
    )
    rows = {"reference": 0, "current": 0}
    quality = Quality({}, {}, "not checked", (reason,))
    decision = Decision(True, (reason,), window, {}, quality, rows)
    return Monitoring(decision, _page([], decision), {})


def _sample(frame: pd.DataFrame, config: MonitoringConfig) -> pd.DataFrame:
    if len(frame) <= config.sample_rows:
        return frame
    return frame.sample(config.sample_rows, random_state=config.seed)


def _decide(
    columns: dict[str, ColumnDrift],
    quality: Quality,
    config: MonitoringConfig,
    window: Window,
    rows: dict[str, int],
) -> Decision:
    verdicts = {name: column.verdict for name, column in columns.items() if name != PROBABILITY}
    shown = {
        name: f"{name} {column.method} {column.score:.3f} ≥ {column.threshold:g}"
        for name, column in columns.items()
        if column.verdict == "drifted"
    }
    drifted = [shown[name] for name, verdict in verdicts.items() if verdict == "drifted"]
    scored = sum(verdict != "no data" for verdict in verdicts.values())
    share = len(drifted) / max(scored, 1)
    too_many = share >= config.drifted_share
    reasons = []
    if drifted:
        reasons.append(
            f"columns: {len(drifted)} of {scored} drifted, share {share:.2f} "
            f"{'≥' if too_many else '<'} {config.drifted_share:g}: {'; '.join(drifted)}"
        )
    if PROBABILITY in shown:
        reasons.append(f"prediction: {shown[PROBABILITY]}")
    if quality.verdict == "out of bounds":
        reasons += [f"quality: {cause}" for cause in quality.causes]
    retrain = too_many or PROBABILITY in shown or quality.verdict == "out of bounds"
    empty = [name for name, column in columns.items() if column.verdict == "no data"]
    if empty:
        reasons.append(
            f"data: {', '.join(empty)}: all null in the reference or in the window, so not "
            "compared; mend the source rather than retrain on it"
        )
    return Decision(retrain, tuple(reasons), window, columns, quality, rows)


# ---------------------------------------------------------------------------- bad input

_TYPES = {
    "numeric": ("numbers", {"integer", "floating", "mixed-integer-float", "boolean", "decimal"}),
    # Strings, because the id 1 reads 1.0 as soon as a neighbour is missing.
    "categorical": ("strings", {"string"}),
}


def _faults(
    reference: pd.DataFrame,
    current: pd.DataFrame,
    spec: FeatureSpec,
    config: MonitoringConfig,
    window: Window,
) -> list[str]:
    faults = []
    kinds = {column.name: column.kind for column in spec.columns} | {PROBABILITY: "numeric"}
    for side, frame in (("reference", reference), ("current", current)):
        names = [*kinds, EVENT_TIMESTAMP] if side == "current" else list(kinds)
        if absent := [name for name in names if name not in frame]:
            faults.append(f"{side}: lacks the columns {', '.join(absent)}")
        for name, kind in kinds.items():
            if name in frame and (fault := _type_fault(frame[name], kind)):
                faults.append(f"{side}: {name}: {fault}")
        faults += [f"{side}: {fault}" for fault in _output_faults(frame, spec)]
    if reference.empty:
        faults.append("reference: has no rows; build it from the champion's evaluation window")
    known = [watched.name for watched in column_kinds(spec)]
    for name in sorted(set(config.thresholds) - set(known)):
        faults.append(f"thresholds: '{name}' is not watched; choose from {', '.join(known)}")
    if EVENT_TIMESTAMP in current:
        times = pd.to_datetime(current[EVENT_TIMESTAMP], utc=True, errors="coerce")
        if outside := int((~times.between(window.start, window.end)).sum()):
            faults.append(
                f"current: {EVENT_TIMESTAMP}: {outside} rows lie outside the window "
                f"{window.start.isoformat()} to {window.end.isoformat()}; select the rows by it"
            )
    return faults


def _type_fault(values: pd.Series, kind: str) -> str | None:
    known = values.dropna().astype(object)
    if kind in _TYPES:
        wanted, accepted = _TYPES[kind]
        found = pd.api.types.infer_dtype(known)
        if known.empty or found in accepted:
            return None
        return f"{kind} columns hold {wanted}, found {found}, first {known.iloc[0]!r}"
    strays = [value for value in known if not isinstance(value, list | tuple | np.ndarray)]
    return f"{kind} columns hold lists, found {strays[0]!r}" if strays else None


def _output_faults(frame: pd.DataFrame, spec: FeatureSpec) -> list[str]:
    """Labels and probabilities that the task does not allow."""
    faults = []
    if spec.label.name in frame:
        labels = frame[spec.label.name].dropna()
        if spec.label.values is None:
            fault = _type_fault(labels, "numeric")
        else:
            strange = labels[~labels.isin(spec.label.values)].unique().tolist()
            fault = f"{strange[:5]} not among {list(spec.label.values)}" if strange else None
        faults += [f"{spec.label.name}: {fault}"] if fault else []
    if spec.task == "binary" and PROBABILITY in frame:
        values = frame[PROBABILITY].dropna()
        if not _type_fault(values, "numeric") and not values.between(0, 1).all():
            faults.append(f"{PROBABILITY}: {values.min()} to {values.max()}, not within 0 to 1")
    return faults


# ---------------------------------------------------------------------------- columns


def _pair(
    watched: Watched,
    reference: pd.DataFrame,
    samples: tuple[pd.DataFrame, pd.DataFrame],
    spec: FeatureSpec,
    config: MonitoringConfig,
) -> _Pair:
    """Fit the form on all rows of the reference, apply it to the sampled rows of both sides."""
    known = _values(reference[watched.column], watched, config.seed)
    now = _values(samples[1][watched.column], watched, config.seed)
    sides = (known.loc[samples[0].index], now)
    has_data = all(side.notna().any() for side in sides)
    coded: _Sides | None = None
    kind: Kind = watched.kind
    method, threshold = config.categorical_method, config.categorical_threshold
    if watched.kind == "numeric":
        method, threshold = config.numeric_method, config.numeric_threshold
        coded = _deciles(known, sides) if has_data else None
    elif known.nunique() > config.max_categories:
        kind = "id"
        if has_data:
            coded = _frequency_bands(known, sides, reference.get(spec.entities.request))
    elif has_data:
        coded = _named_values(known, sides)
    if watched.column == PROBABILITY:
        threshold = config.prediction_threshold
    return _Pair(kind, method, config.thresholds.get(watched.name, threshold), coded)


def _values(values: pd.Series, watched: Watched, seed: int) -> pd.Series:
    """(rows,) numbers, NaN where missing or infinite, or strings, None where missing."""
    if watched.aspect == "length":
        return values.map(len, na_action="ignore").astype(float)
    if watched.kind == "numeric":
        return values.astype(float).replace([-np.inf, np.inf], np.nan)
    if watched.aspect == "value":
        return values.astype(object)
    # Where in its list each row is read: a set has no first member, so any one is as good.
    where = np.random.default_rng(seed).random(len(values)) * (watched.aspect == "member")
    read = [
        lists[int(at * len(lists))] if known and len(lists) else None
        for lists, known, at in zip(values, values.notna(), where, strict=True)
    ]
    return pd.Series(read, index=values.index, dtype=object)


def _deciles(known: pd.Series, sides: _Sides) -> _Sides:
    """The reference's tenths; a value that fills a tenth alone has a bin of its own."""
    numbers = known.dropna().to_numpy()
    edges = np.unique(np.quantile(numbers, np.arange(1, 10) / 10, method="inverted_cdf"))
    if edges[0] == numbers.min():
        # Or a constant that falls would stay in the lowest bin, unseen.
        edges = np.insert(edges, 0, np.nextafter(edges[0], -np.inf))
    bins = [f"{i:02d}: ≤ {edge:.6g}" for i, edge in enumerate(edges)]
    bins += [f"{len(edges):02d}: > {edges[-1]:.6g}", MISSING]

    def coded(side: pd.Series) -> pd.Series:
        code = np.searchsorted(edges, side.to_numpy(), side="left")
        code = np.where(side.isna(), len(bins) - 1, code)
        return pd.Series(np.array(bins, dtype=object)[code], index=side.index)

    return coded(sides[0]), coded(sides[1])


def _named_values(known: pd.Series, sides: _Sides) -> _Sides:
    """The reference's values by name, all others as unknown."""
    values = known.dropna().unique()

    def coded(side: pd.Series) -> pd.Series:
        return side.where(side.isna() | side.isin(values), UNKNOWN).fillna(MISSING)

    return coded(sides[0]), coded(sides[1])


def _frequency_bands(known: pd.Series, sides: _Sides, requests: pd.Series | None) -> _Sides:
    """Ids by how often the reference saw them: often (head), seldom (tail), never (unknown).

    The reference knows all of its own ids, so a second sample of the very same population would
    seem to bring new ones. Its rows are therefore judged by the *other* requests alone (other
    rows, without a request key): an id of one request is unknown there. Their share is Good's
    estimate of the mass not yet seen (Good 1953, "The population frequencies of species and the
    estimation of population parameters"), which a window without drift repeats.

    The head starts at half the count of the median row, so that counts that are all alike do not
    straddle the border.
    """
    if requests is not None:
        known = known[~pd.DataFrame({"id": known, "request": requests}).duplicated()]
    counts = known.value_counts()
    was, now = (side.map(counts).fillna(0).astype(int) for side in sides)
    head = math.ceil(was[was > 0].median() / 2)

    def coded(side: pd.Series, seen: pd.Series) -> pd.Series:
        bands = np.select([side.isna(), seen <= 0, seen >= head], [MISSING, UNKNOWN, HEAD], TAIL)
        return pd.Series(bands.astype(object), index=side.index)

    return coded(sides[0], was - 1), coded(sides[1], now)


# ---------------------------------------------------------------------------- Evidently


def _datasets(was: pd.DataFrame, now: pd.DataFrame, **definition: Any) -> tuple[Any, Any]:
    """Both sides for Evidently. No list of columns is left out, so that it guesses no type."""
    from evidently import DataDefinition, Dataset

    kinds = ("numerical", "categorical", "text", "datetime", "unknown", "list")
    complete = {f"{kind}_columns": [] for kind in kinds} | definition
    return (
        Dataset.from_pandas(was, data_definition=DataDefinition(**complete)),
        Dataset.from_pandas(now, data_definition=DataDefinition(**complete)),
    )


def _drift_snapshot(pairs: dict[str, _Pair], config: MonitoringConfig, window: Window) -> Any:
    """Evidently's report on the columns that have data; None if none has."""
    sides = {name: pair.sides for name, pair in pairs.items() if pair.sides}
    if not sides:
        return None
    from evidently import Report
    from evidently.metrics import ValueDrift
    from evidently.presets import DataDriftPreset

    was, now = (
        pd.DataFrame({name: pair[i].reset_index(drop=True) for name, pair in sides.items()})
        for i in (0, 1)
    )
    was, now = _datasets(was, now, categorical_columns=list(sides))
    features = [name for name in sides if name != PROBABILITY]
    metrics: list[Any] = []
    if PROBABILITY in sides:
        pair = pairs[PROBABILITY]
        metrics += [ValueDrift(column=PROBABILITY, method=pair.method, threshold=pair.threshold)]
    if features:
        preset = DataDriftPreset(
            columns=features,
            per_column_method={name: pairs[name].method for name in features},
            per_column_threshold={name: pairs[name].threshold for name in features},
            drift_share=config.drifted_share,
        )
        metrics.append(preset)
    return Report(metrics, include_tests=True).run(now, was, timestamp=window.end)


def _columns(pairs: dict[str, _Pair], snapshot: Any) -> dict[str, ColumnDrift]:
    """Read the scores back.

    Raises:
        RuntimeError: a column has no score by the method and the threshold that were asked for.
    """
    scores: dict[tuple[str, str, float], float] = {}
    for metric in snapshot.dict()["metrics"] if snapshot else []:
        asked = metric["config"]
        if asked["type"].endswith(":ValueDrift"):
            scores[asked["column"], asked["method"], asked["threshold"]] = float(metric["value"])
    columns = {}
    for name, pair in pairs.items():
        score: float | None = None
        verdict: Literal["stable", "drifted", "no data"] = "no data"
        if pair.sides:
            key = (name, pair.method, pair.threshold)
            if key not in scores:
                raise RuntimeError(f"Evidently gave no score for {key}, only {sorted(scores)}")
            # NaN is the square root of a divergence that rounding left just below 0.
            score = 0.0 if math.isnan(scores[key]) else round(scores[key], 6)
            verdict = "drifted" if score >= pair.threshold else "stable"
        columns[name] = ColumnDrift(pair.kind, pair.method, score, pair.threshold, verdict)
    return columns


_METRICS = {"RocAuc": "auc", "LogLoss": "logloss", "RMSE": "rmse"}


def _quality(
    reference: pd.DataFrame,
    current: pd.DataFrame,
    spec: FeatureSpec,
    config: MonitoringConfig,
    window: Window,
) -> tuple[Quality, Any]:
    """Measure the labelled rows of both sides; no snapshot where they do not suffice."""
    labelled = [_sample(_labelled(frame, spec), config) for frame in (reference, current)]
    was: Figures = {"rows": len(labelled[0])}
    now: Figures = {"rows": len(labelled[1])}
    causes = []
    for name, side in zip(("reference", "current"), labelled, strict=True):
        counts = {"": len(side)}
        if spec.label.values is not None:
            counts = {
                f" {v}": int((side[_LABEL] == i).sum()) for i, v in enumerate(spec.label.values)
            }
        causes += [
            f"{name} has {count} labels{value}, fewer than min_labels {config.min_labels}"
            for value, count in counts.items()
            if count < config.min_labels
        ]
    if causes:
        return Quality(was, now, "not checked", tuple(causes)), None
    snapshot = _quality_snapshot(labelled[0], labelled[1], spec.task, window)
    for metric in snapshot.dict()["metrics"]:
        name = _METRICS[metric["config"]["type"].rpartition(":")[2]]
        now[name] = round(float(metric["value"]), 6)
        earlier = snapshot.context.get_reference_metric_result(metric["id"])
        was[name] = round(float(earlier.value), 6)
    if spec.task == "binary":
        was["calibration"], now["calibration"] = (_calibration(side) for side in labelled)
    causes = _out_of_bounds(was, now, config)
    verdict: Literal["out of bounds", "within bounds"]
    verdict = "out of bounds" if causes else "within bounds"
    return Quality(was, now, verdict, tuple(causes)), snapshot


def _labelled(frame: pd.DataFrame, spec: FeatureSpec) -> pd.DataFrame:
    """The rows with label and prediction; the label as 0 or 1 (binary) or a float."""
    if spec.label.name not in frame:
        return pd.DataFrame({_LABEL: [], PROBABILITY: []})
    frame = frame[frame[spec.label.name].notna() & frame[PROBABILITY].notna()]
    label = frame[spec.label.name].astype(float)
    if spec.label.values is not None:
        label = (label == spec.label.values[1]).astype(int)
    weight = 1 / frame[INCLUSION_PROBABILITY] if INCLUSION_PROBABILITY in frame else 1.0
    probability = frame[PROBABILITY].astype(float)
    columns = {_LABEL: label, PROBABILITY: probability, "weight": weight}
    return pd.DataFrame(columns).reset_index(drop=True)


def _quality_snapshot(was: pd.DataFrame, now: pd.DataFrame, task: str, window: Window) -> Any:
    from evidently import BinaryClassification, Regression, Report
    from evidently.metrics import RMSE, LogLoss, RocAuc

    if task == "binary":
        outcome = BinaryClassification(target=_LABEL, prediction_probas=PROBABILITY, pos_label=1)
        columns = {"categorical_columns": [_LABEL], "numerical_columns": [PROBABILITY]}
        datasets = _datasets(was, now, classification=[outcome], **columns)
    else:
        outcome = Regression(target=_LABEL, prediction=PROBABILITY)
        columns = {"numerical_columns": [_LABEL, PROBABILITY]}
        datasets = _datasets(was, now, regression=[outcome], **columns)
    metrics = [RocAuc(), LogLoss()] if task == "binary" else [RMSE()]
    return Report(metrics).run(datasets[1], datasets[0], timestamp=window.end)


def _calibration(side: pd.DataFrame) -> float:
    observed = (side["weight"] * side[_LABEL]).sum()
    return round(float((side["weight"] * side[PROBABILITY]).sum() / observed), 6)


def _out_of_bounds(was: Figures, now: Figures, config: MonitoringConfig) -> list[str]:
    causes = []
    loss = "logloss" if "logloss" in now else "rmse"
    highest = was[loss] * (1 + config.max_loss_increase)
    if now[loss] > highest:
        causes.append(
            f"{loss} {now[loss]:.4f} above {highest:.4f}, the reference's {was[loss]:.4f} "
            f"and {config.max_loss_increase:.0%}"
        )
    if "auc" in now and now["auc"] < was["auc"] - config.max_auc_drop:
        causes.append(
            f"auc {now['auc']:.4f} below the reference's {was['auc']:.4f} "
            f"by more than {config.max_auc_drop:g}"
        )
    lo, hi = config.calibration_lo, config.calibration_hi
    if "calibration" in now and not lo <= now["calibration"] <= hi:
        causes.append(f"calibration {now['calibration']:.4f} outside {lo:g} to {hi:g}")
    return causes


def _page(snapshots: list[Any], decision: Decision) -> str:
    """One page: the decision in words, then Evidently's widgets of all snapshots."""
    page = '<!DOCTYPE html>\n<html><meta charset="utf-8"><body></body></html>'
    if snapshots:
        model = snapshots[0].to_snapshot_model()
        for snapshot in snapshots[1:]:
            model.widgets = model.widgets + snapshot.to_snapshot_model().widgets
        page = type(snapshots[0]).load_model(model).get_html_str(as_iframe=False)
    verdict = "Retrain" if decision.retrain else "Do not retrain"
    reasons = "".join(f"<li>{html.escape(reason)}</li>" for reason in decision.reasons)
    banner = (
        '<div style="font: 16px sans-serif; margin: 24px">'
        f"<h1>{verdict}</h1><p>Window {decision.window.start} to {decision.window.end}; rows: "
        f"{decision.rows['reference']} reference, {decision.rows['current']} current. "
        f"Quality {decision.quality.verdict}.</p><ul>{reasons}</ul></div>"
    )
    return page.replace("<body>", f"<body>{banner}", 1)
