"""What is wrong with a frame that monitoring is given."""

from __future__ import annotations

import numpy as np
import pandas as pd

from fathom.drift.config import PROBABILITY, Window
from fathom.spec import EVENT_TIMESTAMP, FeatureSpec

_TYPES = {
    "numeric": ("numbers", {"integer", "floating", "mixed-integer-float", "boolean", "decimal"}),
    # Strings, because the id 1 reads 1.0 as soon as a neighbour is missing.
    "categorical": ("strings", {"string"}),
}


def faults_of(
    frame: pd.DataFrame, side: str, spec: FeatureSpec, window: Window | None
) -> list[str]:
    """Absent and mistyped columns, values out of their domain, rows outside of the window."""
    faults = []
    kinds = {column.name: column.kind for column in spec.columns}
    kinds |= dict.fromkeys([f"{cross.name}.hits" for cross in spec.crosses], "numeric")
    kinds[PROBABILITY] = "numeric"
    if absent := [name for name in (*kinds, EVENT_TIMESTAMP) if name not in frame]:
        faults.append(f"{side}: lacks the columns {', '.join(absent)}")
    for name, kind in kinds.items():
        if name in frame and (fault := _type_fault(frame[name], kind)):
            faults.append(f"{side}: {name}: {fault}")
    faults += [f"{side}: {fault}" for fault in _output_faults(frame, spec)]
    if window is not None and EVENT_TIMESTAMP in frame:
        times = pd.to_datetime(frame[EVENT_TIMESTAMP], utc=True, errors="coerce")
        if outside := int((~times.between(window.start, window.end)).sum()):
            faults.append(
                f"{side}: {EVENT_TIMESTAMP}: {outside} rows lie outside the window "
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
