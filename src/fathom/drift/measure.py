"""What a window shows, measured against the champion's reference; nothing is decided here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fathom import evaluation
from fathom.drift import health, scores
from fathom.drift.config import PROBABILITY, Method, MonitoringConfig, MonitoringError, Window
from fathom.drift.forms import Codes, Kind, values_of
from fathom.drift.frames import faults_of
from fathom.drift.health import Compared, Delivery, Labels, Trace
from fathom.drift.reference import Labelled, Reference, Usual
from fathom.evaluation import Metrics, Predictions
from fathom.spec import FeatureSpec

if TYPE_CHECKING:
    import pyarrow as pa

    from fathom.evaluation import Floats


@dataclass(frozen=True)
class ColumnDrift:
    """How far one watched column has moved.

    Attributes:
        score, threshold: it has drifted from the threshold on.
        leaning: share by which the loss grows if the model cannot use the column.
        at_stake: that, for the share of rows that moved beyond what is usual.
    """

    kind: Kind
    method: Method
    score: float | None
    threshold: float
    verdict: Literal["stable", "drifted", "no data"]
    leaning: float = 0.0
    at_stake: float = 0.0


@dataclass(frozen=True)
class Won:
    """What labels say that a retraining would win back, as shares of the window's loss.

    Attributes:
        share: estimated of the window (`fathom.drift.recoverable`).
        usual: of the median window without drift.
        bound: what windows without drift do not exceed.
        columns: by which columns.
    """

    share: float
    usual: float
    bound: float
    columns: dict[str, float]

    @property
    def excess(self) -> float:
        """Beyond what is usual; 0 where the window does not stand out."""
        return self.share - max(self.usual, 0.0) if self.share > self.bound else 0.0


@dataclass(frozen=True)
class Measurement:
    """A window beside the reference.

    Attributes:
        rows: of the ``reference``, of the window (``current``), and those ``sampled`` of it.
        quality: metrics of the labelled rows of both sides, see
            `fathom.evaluation.metrics`; empty where labels do not suffice.
        won: None where labels do not suffice; ``unlabelled`` says why.
        faults: of the data, see `fathom.drift.health`.
        trace: for the next window.
        counts: watched column → rows in each bin, of the reference and of the window.
        labelled: the rows that quality was measured on.
    """

    window: Window
    rows: dict[str, int]
    columns: dict[str, ColumnDrift]
    quality: dict[str, Metrics]
    won: Won | None
    unlabelled: tuple[str, ...]
    faults: tuple[str, ...]
    trace: Trace
    counts: dict[str, tuple[Codes, Codes]]
    labelled: Labelled | None

    @property
    def at_stake(self) -> float:
        """Share of the loss that drifted features put at stake, all together."""
        return sum(column.at_stake for column in self.columns.values())


def measure(
    reference: Reference,
    current: pd.DataFrame,
    window: Window,
    before: Trace | None = None,
    delivery: Delivery | None = None,
    total: int | None = None,
) -> Measurement:
    """Measure a window.

    Args:
        current: one row per exposure: the spec's columns as raw values (lists for multi and
            sequence columns), ``<cross>.hits``, ``probability`` (for regression, the predicted
            number), ``event_timestamp`` and, where labels have arrived, the label (null where
            not). Keys of user and request count if they are there.
        window: where the rows lie.
        before: trace of the last sound window; the reference's own by default.
        total: rows of the window, if ``current`` is a sample of them.

    Raises:
        MonitoringError: absent or mistyped columns, values out of their domain, rows outside of
            the window: all listed at once.
    """
    spec, config = reference.spec, reference.config
    if found := faults_of(current, "current", spec, window):
        raise MonitoringError(found)
    total = len(current) if total is None else total
    rows = {"reference": len(reference.day), "current": total, "sampled": len(current)}
    few = tuple(
        f"{side} has {n} rows, fewer than min_rows {config.min_rows}: no verdict"
        for side, n in (("reference", len(reference.day)), ("current", total))
        if n < config.min_rows
    )
    empty = Trace({}, {}, None)
    if few:
        return Measurement(window, rows, {}, {}, None, few, (), before or empty, {}, None)
    current = current.reset_index(drop=True)
    codes = reference.coded(current)
    labelled = Labelled.of(current, spec)
    unlabelled = _too_few(reference.labelled, "reference", spec, config)
    unlabelled += _too_few(labelled, "window", spec, config)
    days = max(1, math.ceil((window.end - window.start).total_seconds() / 86_400))
    usual = reference.usual(days, len(current), 0 if unlabelled else len(labelled.rows))
    counts = {
        name: (
            reference.counts(name, reference.codes[name]),
            reference.counts(name, column),
        )
        for name, column in codes.items()
    }
    columns = {name: _drift(reference, name, *counts[name], usual) for name in counts}
    won = None
    if not unlabelled:
        back = labelled.recoverable(codes)
        won = Won(back.share, usual.won, usual.most_won, back.columns)
    sides = {"reference": reference.labelled, "current": labelled}
    quality = {} if unlabelled else {name: _quality(side) for name, side in sides.items()}
    trace = Trace(
        {name: _shares(now) for name, (_, now) in counts.items()},
        health.tenths(reference.numbers_of(current)),
        total / days,
    )
    before = before or reference.trace
    compared = [
        _compared(reference, name, current, column, before, usual, labelled if won else None)
        for name, column in codes.items()
        if name != PROBABILITY
    ]
    faults = health.faults(trace, before, compared, delivery or Delivery(), config)
    faults += _alike(labelled, spec, config)
    return Measurement(
        window,
        rows,
        columns,
        quality,
        won,
        tuple(unlabelled),
        tuple(faults),
        trace,
        counts,
        None if unlabelled else labelled,
    )


def leaning(
    score: Callable[[pa.Table], Floats], rows: pa.Table, spec: FeatureSpec, config: MonitoringConfig
) -> dict[str, float]:
    """How much the model leans on each column: the share by which its loss grows without it.

    Each column's values are shuffled over the rows (Breiman 2001, "Random forests", section 10),
    which keeps what is usual of them and takes away what they say of their row.

    Args:
        score: probabilities (N,) of rows.
        rows: (N) of the reference, with the label.
    """
    import pyarrow.compute as pc

    draw = np.random.default_rng(config.seed)
    known = np.flatnonzero(pc.is_valid(rows[spec.label.name]).to_numpy())
    if len(known) > config.leaning_rows:
        known = np.sort(draw.choice(known, config.leaning_rows, replace=False))
    rows = rows.take(known)
    if not len(rows):
        return {}
    order = draw.permutation(len(rows))
    label = rows[spec.label.name].to_numpy()
    if spec.label.values is not None:
        label = label == spec.label.values[-1]
    loss = evaluation.LOSS[spec.task]

    def measured(table: pa.Table) -> float:
        alone = np.arange(len(table))
        made = Predictions(label.astype(np.float64), score(table), alone, alone, task=spec.task)
        return float(evaluation.metrics(made)[loss] or 0.0)

    whole = measured(rows)
    found = {}
    for column in spec.columns:
        place = rows.schema.get_field_index(column.name)
        shuffled = rows.set_column(place, rows.schema.field(place), rows[column.name].take(order))
        found[column.name] = max(measured(shuffled) / whole - 1, 0.0) if whole else 0.0
    return found


def _drift(reference: Reference, name: str, was: Codes, now: Codes, usual: Usual) -> ColumnDrift:
    form, config = reference.forms[name], reference.config
    stated = config.thresholds.get(name)
    threshold = stated if stated is not None else usual.scores.get(name, math.inf)
    weight = reference.leaning.get(form.watched.column, 0.0)
    if was[-1] == was.sum() or now[-1] == now.sum():
        return ColumnDrift(form.kind, form.method, None, _finite(threshold), "no data", weight)
    score = scores.score(form.method, was, now)
    drifted = score >= threshold
    beyond = max(scores.moved(was, now) - usual.moved.get(name, 0.0), 0.0)
    return ColumnDrift(
        form.kind,
        form.method,
        round(score, 6),
        round(_finite(threshold), 6),
        "drifted" if drifted else "stable",
        round(weight, 6),
        round(weight * beyond, 6) if drifted else 0.0,
    )


def _finite(threshold: float) -> float:
    """Thresholds are written as JSON, which has no infinity; a column without data has none."""
    return threshold if math.isfinite(threshold) else 0.0


def _shares(counts: Codes) -> list[float]:
    return [round(float(share), 6) for share in counts / counts.sum()]


def _compared(
    reference: Reference,
    name: str,
    current: pd.DataFrame,
    codes: Codes,
    before: Trace,
    usual: Usual,
    labelled: Labelled | None,
) -> Compared:
    """A column as `fathom.drift.health` looks at it; without labels where they do not suffice."""
    bins = reference.forms[name].bins
    labels = None
    if labelled is not None:
        was = reference.labelled
        rates = was.rates(reference.codes[name], bins), labelled.rates(codes, bins)
        labels = Labels(*rates, float(was.label.mean()))
    return Compared(
        name,
        bins,
        np.array(before.shares.get(name, ())),
        reference.counts(name, codes),
        usual.moved.get(name, 0.0),
        usual.missing.get(name, 0.0),
        name in reference.computed,
        reference.keys.get(name, ()),
        labels,
        lambda place: _is_one_value(reference, name, current, codes == place),
    )


def _is_one_value(
    reference: Reference, name: str, current: pd.DataFrame, inside: NDArray[np.bool_]
) -> bool:
    """Whether most rows of a bin have one and the same value, as a feed gives them."""
    form = reference.forms[name]
    if form.watched.aspect == "hits":
        return False
    if form.kind != "numeric":
        return form.kind == "categorical"
    values = values_of(current[inside], form.watched, reference.config.seed)
    return len(values) == 0 or bool(values.value_counts(dropna=False).iloc[0] > len(values) / 2)


def _too_few(
    labelled: Labelled, side: str, spec: FeatureSpec, config: MonitoringConfig
) -> tuple[str, ...]:
    """Why labels do not suffice on a side; none where they do."""
    counts = {"": len(labelled.rows)}
    if spec.label.values is not None:
        counts = {
            f" {value}": int((labelled.label == i).sum())
            for i, value in enumerate(spec.label.values)
        }
    return tuple(
        f"{side} has {count} labels{value}, fewer than min_labels {config.min_labels}"
        for value, count in counts.items()
        if count < config.min_labels
    )


def _alike(labelled: Labelled, spec: FeatureSpec, config: MonitoringConfig) -> list[str]:
    alike = labelled.task == "binary" and len(np.unique(labelled.label)) < 2
    if not alike or len(labelled.rows) < config.min_labels:
        return []
    return [
        f"{spec.label.name}: all {len(labelled.rows):,} labels are alike; look whether outcomes "
        "arrive"
    ]


def _quality(labelled: Labelled) -> Metrics:
    made = Predictions(
        labelled.label,
        labelled.probability,
        labelled.user,
        labelled.request,
        task=labelled.task,
    )
    return evaluation.metrics(made)
