"""What a request must hold beyond its form: values of the spec's columns, and not too many.

`fathom.api` checks the form; what is found here is said in the same way, all faults together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from fathom import api
from fathom.batch import Ragged
from fathom.spec import Column, FeatureSpec

if TYPE_CHECKING:
    from fathom.encoding import Values
    from fathom.ranker import Ranker

Faults = list[dict[str, str]]


def candidates_of(
    given: Sequence[str | api.Candidate],
    shared: dict[str, Any],
    spec: FeatureSpec,
    faults: Faults,
) -> list[dict[str, Any]]:
    """Each candidate's item key and own context, after checking all context against the spec.

    Args:
        shared: the context that they share; without candidates, it must be whole.
        faults: where faults are added.

    Raises:
        RefusedError: there are too many faults to name.
    """
    columns = {column.name: column for column in spec.raw_columns("context")}
    both = [(c, {}) if isinstance(c, str) else (c.item, c.context) for c in given]
    places = {"context": shared}
    places |= {f"candidates[{i}].context": own for i, (_, own) in enumerate(both) if own}
    api.bound_unknown(places.values(), columns)
    for place, own in places.items():
        fault = f"is no context column; remove it (there are {list(columns)})"
        faults += [{"field": f"{place}.{n}", "fault": fault} for n in own if n not in columns]
    # A column may be left out of the shared context if each candidate has its own value of it.
    own_names = {name for _, own in both for name in own}
    first = [c for c in columns.values() if c.name in shared or not own_names]
    _check(first, [shared], spec, "context", faults)
    if own_names and not faults:
        left = [c for c in columns.values() if c.name in own_names or c.name not in shared]
        _check(left, [shared | own for _, own in both], spec, "candidates[{}].context", faults)
    return [{spec.entities.item: item, **own} for item, own in both]


def _check(
    columns: Sequence[Column],
    rows: Sequence[Mapping[str, Any]],
    spec: FeatureSpec,
    place: str,
    faults: Faults,
) -> None:
    """Check some columns' values as those of whole rows are checked."""
    part = spec.model_copy(update={"columns": tuple(columns)})
    chosen = [{c.name: row[c.name] for c in columns if c.name in row} for row in rows]
    try:
        checked_frame(chosen, part, place)
    except api.RefusedError as error:
        faults += error.faults


def checked_frame(
    rows: Sequence[Mapping[str, Any]], spec: FeatureSpec, place: str
) -> dict[str, Values]:
    """Rows to a frame.

    Args:
        place: where a row stands in the request, ``{}`` for its number.

    Raises:
        RefusedError: rows are at fault.
    """
    from fathom.ranker import RowError, frame_of_rows

    api.bound_unknown(rows, spec.by_name)
    faults = api.list_faults(rows, spec.columns, place)
    try:
        if not faults:
            return frame_of_rows(rows, spec)
    except RowError as error:
        faults = [
            {"field": f"{place.format(f['row'])}.{f['field']}", "fault": f["fault"]}
            for f in error.faults
        ]
    raise api.refused(faults)


def bound_crosses(columns: Mapping[str, Values], spec: FeatureSpec, count: int) -> None:
    """Refuse what would make too many combinations in a cross of several lists."""
    for cross in spec.crosses:
        lists = {name: part for name in cross.columns if isinstance(part := columns[name], Ragged)}
        if len(lists) > 1:
            by_row = reduce(np.multiply, (part.lengths for part in lists.values()))
            made = int(by_row.sum()) * (count if len(by_row) == 1 else 1)
            if made > api.MAX_COMBINATIONS:
                fault = (
                    f"make {made:,} combinations; at most {api.MAX_COMBINATIONS:,} are allowed, "
                    "so shorten the lists or split the request"
                )
                raise api.refused([{"field": " and ".join(lists), "fault": fault}])


def bound_terms(frame: Mapping[str, Values], ranker: Ranker) -> None:
    """Refuse to name more terms than one answer may have."""
    from fathom.terms import most_terms

    made = most_terms(ranker.encoder, frame) if ranker.model.wide is not None else 0
    if made > api.MAX_TERMS:
        fault = (
            f"is true, which makes up to {made:,} terms; at most {api.MAX_TERMS:,} are allowed, so "
            "rank without it, then ask again for the first candidates alone"
        )
        raise api.refused([{"field": "explain", "fault": fault}])


def attribution_faults(candidates: int, ranker: Ranker) -> Faults:
    """Why deep logits cannot be attributed, if they cannot."""
    fault = None
    if ranker.model.deep is None:
        fault = (
            f"but the model, {ranker.config.model}, has no deep part; leave it out: all of its "
            "terms are exact, and 'explain' names them"
        )
    elif candidates > api.MAX_ATTRIBUTED:
        fault = (
            f"for {candidates:,} candidates; at most {api.MAX_ATTRIBUTED:,} can be attributed at "
            "once, so rank without it, then ask again for the first candidates alone"
        )
    return [{"field": "attribute", "fault": f"is true, {fault}"}] if fault else []
