"""Snapshots that grow with their logs: what an earlier run left is kept where it still holds.

A run finds, for each feature view, what the last one *carried*: the parts that later steps need
(`fathom.aggregates.carried`) and a `State` that says what they stand on. If all of that is as it
was, the run reads only the rows that became known since, and its snapshots are appended. If
anything is not, the view is computed anew, from the whole log, and takes the place of the old one:

* its definition: aggregates, keys, grain, and the format of what is written;
* the rows of the log that were covered, by their number and a checksum of them in any order: a
  row that was changed, removed, or put in with an arrival of long ago;
* the attributes that these rows were joined with, by a checksum. Attributes of users and items
  that had not occurred, and those that hold from later on, do not matter;
* the files that were written.

Both ways end in the same rows: a computation anew is one that starts from nothing.

A view's *lineage* names the computation that its appended rows continue. While it stays the same,
rows only come after the boundary up to which the view was known, and what was read of it as of an
earlier moment is still true. The attributes that exposures read have a lineage of their own, by
the same rule: it changes when a row of `users` or `items` changes that some earlier exposure read.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from fathom import aggregates, features
from fathom.features import is_packable
from fathom.spec import ARRIVAL_TIMESTAMP, ATTRIBUTES, EVENT_TIMESTAMP, FeatureSpec

if TYPE_CHECKING:
    from ibis.expr.types import Table

    from fathom.aggregates import Parts

log = logging.getLogger(__name__)

#: Of what is carried and written. A change of the expressions that changes values raises it.
FORMAT = 1
#: What is carried under this name has no rows: it is the lineage of users' and items' attributes.
ATTRIBUTES_READ = "attributes"
#: Carried beside the parts: each key's newest snapshot, of views that are packed.
NEWEST = "__newest"
_FIRST_KNOWN = "__first_known"


class State(BaseModel):
    """What the rows of a view stand on.

    Args:
        until: the last step that they cover.
        lineage: of the computation from the whole log that they continue.
        definition: hash of what the spec says about the view.
        rests_on: what was read, each by its number of rows and a checksum: the log's rows known
            by ``until``, and the attributes of users and items that those were joined with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    until: int
    lineage: str
    definition: str
    rests_on: dict[str, str]


@dataclass(frozen=True)
class Past:
    """What an earlier run left of a view.

    Attributes:
        state, parts: what it carried.
        files: fingerprints of the view's files when it was written, by name.
        found: and now.
    """

    state: State
    parts: Mapping[str, Table]
    files: Mapping[str, str] = field(default_factory=dict)
    found: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """Rows of one table to write: a file beside those that are there, or in place of all of them.

    Attributes:
        rows: of the steps up to ``until`` that no earlier file has.
        anew: whether they take the place of all files.
        lineage: of the computation; goes into the file.
    """

    rows: Table
    until: int
    anew: bool
    lineage: str


@dataclass(frozen=True)
class Carry:
    """What a view hands on to the next run."""

    state: State
    parts: Mapping[str, Table]


@dataclass(frozen=True)
class Change:
    """What a run does to one view: each None where there is nothing to do, or nothing to pack."""

    view: str
    snapshots: Update | None = None
    packed: Update | None = None
    carry: Carry | None = None
    gone: bool = False


def file_name(step: int) -> str:
    """Name of the file whose last step this is. Names sort as steps do, before the origin too."""
    return f"{step:06d}.parquet" if step >= 0 else f"-{10**6 + step:06d}.parquet"


def changes(
    logs: Mapping[str, Table],
    attributes: Mapping[str, Table],
    spec: FeatureSpec,
    past: Mapping[str, Past],
) -> Iterator[Change]:
    """What has to be written so that every view covers the logs, one view at a time.

    Args:
        logs: ``exposures`` and ``interactions``, clean.
        attributes: ``users`` and ``items``, clean.
        past: what earlier runs left, by view.
    """
    until = int(features.last_step(logs.values(), spec).execute())
    states, reasons = _states(logs, attributes, spec, past, until)
    yield from (Change(view, gone=True) for view in past if view not in states)
    yield _attributes_read(past, states, reasons)
    for of, whole in logs.items():
        rows: dict[int | None, Table] = {}  # read once for all views of the log
        for view, columns in spec.views.items():
            aggregate = columns[0].aggregate
            assert aggregate is not None
            if aggregate.of != of:
                continue
            old = None if reasons.get(view) else past[view]
            if old and old.state.until == until:
                log.info("view %s: nothing new", view)
                yield Change(view)
                continue
            since = old.state.until if old else None
            if since not in rows:
                read = features.rows_read(whole, **attributes, spec=spec, of=of, since=since)
                rows[since] = read.cache()
            yield _change(rows[since], spec, view, states[view], old, reasons.get(view))


def describe(past: Mapping[str, Past], spec: FeatureSpec) -> dict[str, Any]:
    """What the views cover and which computations they continue, as plain JSON.

    Returns:
        ``until`` (ISO 8601), ``lineages`` by view, and the lineage of the ``attributes``.

        Of two such descriptions, an earlier and a later one: where their lineages are equal (and
        ``until`` did not go back), every feature of an exposure before the earlier ``until``
        that was in the log then is as it was. What views are asked for as of such a moment has
        not changed, nor have the attributes that it reads.
    """
    return {
        "until": features.boundary(past[ATTRIBUTES_READ].state.until, spec).isoformat(),
        "lineages": {view: past[view].state.lineage for view in spec.views},
        "attributes": past[ATTRIBUTES_READ].state.lineage,
    }


# -- one view ------------------------------------------------------------------------------------


def _change(
    rows: Table, spec: FeatureSpec, view: str, state: State, old: Past | None, reason: str | None
) -> Change:
    """Summarise rows of a log, on top of what a view carried."""
    since, until = (old.state.until if old else None), state.until
    parts: Parts = {n: t.cache() for n, t in aggregates.parts(rows, spec, view).items()}
    if old:
        parts = aggregates.added(old.parts, parts)
    evaluated = aggregates.evaluated(parts, spec, view, until, since)
    snapshots = features.stamped(evaluated, spec, view).cache()
    count = int(snapshots.count().execute())
    carried = aggregates.carried(parts, spec, view, until)
    packed = None
    if is_packable(spec, view):
        newest = features.newest(snapshots, spec, view).cache()
        changed = newest.select(spec.entities.user).distinct()
        if old:
            newest = features.replaced(old.parts[NEWEST], newest, spec, view).cache()
        carried[NEWEST] = newest
        users = newest.semi_join(changed, spec.entities.user) if old else newest
        packed = Update(features.packed(users, spec, view), until, old is None, state.lineage)
    if reason:
        log.info("view %s: %s rows, computed anew, because %s", view, f"{count:,}", reason)
    else:
        log.info("view %s: %s rows appended", view, f"{count:,}")
    written = Update(snapshots, until, old is None, state.lineage)
    # A file that a killed run left behind is replaced, even if there is nothing to write now.
    grown = old is None or count > 0 or set(old.found) != set(old.files)
    return Change(
        view,
        snapshots=written if grown else None,
        packed=packed if grown else None,
        carry=Carry(state, carried),
    )


def _attributes_read(
    past: Mapping[str, Past], states: Mapping[str, State], reasons: Mapping[str, str]
) -> Change:
    """Carry the lineage of the attributes on, or start another."""
    reason = reasons.get(ATTRIBUTES_READ)
    if reason and ATTRIBUTES_READ in past:
        log.info("attributes: earlier exposures must be joined anew, because %s", reason)
    return Change(ATTRIBUTES_READ, carry=Carry(states[ATTRIBUTES_READ], {}))


# -- what may be kept ----------------------------------------------------------------------------


def _states(
    logs: Mapping[str, Table],
    attributes: Mapping[str, Table],
    spec: FeatureSpec,
    past: Mapping[str, Past],
    until: int,
) -> tuple[dict[str, State], dict[str, str]]:
    """The new state of every view, and why it cannot continue the old one (where it cannot)."""
    steps = {until} | {old.state.until for old in past.values() if old.state.until < until}
    states: dict[str, State] = {}
    reasons: dict[str, str] = {}
    for of, whole in logs.items():
        reads = _reads(whole, spec, of)
        sums = _checksums(whole, attributes, spec, reads, steps)
        for view, read in reads.items():
            definition, old = _definition(spec, view, read), past.get(view)
            then = {} if old is None else sums.get((view, old.state.until), {})
            reason = _reason(old, definition, then, until)
            if reason:
                reasons[view] = reason
            now = sums[view, until]
            earlier = old.state.lineage if old else None
            states[view] = State(
                until=until,
                lineage=_hash(earlier, definition, until, now)
                if reason or not earlier
                else earlier,
                definition=definition,
                rests_on=now,
            )
    return states, reasons


def _reason(old: Past | None, definition: str, then: Mapping[str, str], until: int) -> str | None:
    """Why what was left of a view must not be kept, in words; None if it may.

    Args:
        then: what the view would rest on if it covered what it covered then.
    """
    if old is None:
        return "there is no earlier one"
    if old.state.definition != definition:
        return "its definition has changed"
    if old.state.until > until:
        return f"it covers step {old.state.until}, and the logs now end at step {until}"
    changed = [name for name, found in then.items() if old.state.rests_on.get(name) != found]
    if changed:
        was = ", ".join(f"{n}: {old.state.rests_on.get(n)}, now {then[n]}" for n in changed)
        return f"what it was computed from has changed ({was})"
    unfinished = file_name(until) if old.state.until < until else None
    damaged = [
        name
        for name in sorted({*old.files, *old.found})
        if old.files.get(name) != old.found.get(name)
        and not (name not in old.files and Path(name).name == unfinished)
    ]
    return f"files are not as they were written: {', '.join(damaged)}" if damaged else None


def _reads(whole: Table, spec: FeatureSpec, of: str) -> dict[str, dict[str, list[str]]]:
    """What each view of a log is computed from: view → table → columns, of a ``log`` all."""
    keys = {"users": spec.entities.user, "items": spec.entities.item}
    times = [name for name in (EVENT_TIMESTAMP, ARRIVAL_TIMESTAMP) if name in whole.columns]
    reads: dict[str, dict[str, list[str]]] = {}
    for view, columns in spec.views.items():
        aggregates = [column.aggregate for column in columns if column.aggregate]
        if aggregates[0].of != of:
            continue
        wanted = features.columns_read(columns) - set(whole.columns)
        joined = {
            table: [c.name for c in spec.columns if c.owner == owner and c.name in wanted]
            for table, owner in ATTRIBUTES.items()
        }
        read = {
            table: [keys[table], EVENT_TIMESTAMP, *names]
            for table, names in joined.items()
            if names
        }
        own = (features.columns_read(columns) - wanted) | {keys[table] for table in read}
        own |= {spec.label.name} if any(a.measure == "rate" for a in aggregates) else set()
        reads[view] = {"log": [*times, *sorted(own)], **read}
    if of == "exposures":
        reads[ATTRIBUTES_READ] = {
            table: [keys[table], EVENT_TIMESTAMP, *(c.name for c in spec.held(table))]
            for table in ATTRIBUTES
        }
    return reads


def _checksums(
    whole: Table,
    attributes: Mapping[str, Table],
    spec: FeatureSpec,
    reads: Mapping[str, Mapping[str, list[str]]],
    steps: set[int],
) -> dict[tuple[str, int], dict[str, str]]:
    """What each view rests on if it covers the log up to each step: one scan of each table."""
    keys = {"users": spec.entities.user, "items": spec.entities.item}
    found: dict[tuple[str, int], dict[str, str]] = {(v, s): {} for v in reads for s in steps}
    tables = {"log": whole}
    for table, key in keys.items():
        if any(table in read for read in reads.values()):
            known = features.known_from(whole)
            first = whole.group_by(key).agg(**{_FIRST_KNOWN: known.min()})
            tables[table] = attributes[table].inner_join(first, key)
    for name, table in tables.items():
        sums = {}
        for step in steps:
            if name == "log":
                covered = features.known_by(table, spec, step)
            else:
                # Attributes count if their key had occurred, and if they held before the boundary.
                occurred = features.before(table[_FIRST_KNOWN], spec, step)
                covered = occurred & features.before(table[EVENT_TIMESTAMP], spec, step)
            for view, read in reads.items():
                if name in read:
                    sums[f"rows {view} {step}"] = table.count(where=covered)
                    sums[f"hash {view} {step}"] = _hashes(table, read[name]).sum(where=covered)
        if sums:
            row = table.aggregate(**sums).to_pyarrow().to_pylist()[0]
            for view, step in found:
                if name in reads[view]:
                    checksum = int(row[f"hash {view} {step}"] or 0) % 2**64
                    rows = row[f"rows {view} {step}"]
                    found[view, step][name] = f"{rows:,} rows of checksum {checksum:016x}"
    return found


def _hashes(table: Table, columns: list[str]) -> Any:
    """A hash of each row, in a type that their sum fits in."""
    import ibis

    return ibis.struct({name: table[name] for name in columns}).hash().cast("decimal(38, 0)")


def _definition(spec: FeatureSpec, view: str, read: Mapping[str, list[str]]) -> str:
    """Hash of everything in the spec that the rows of a view depend on."""
    columns = spec.views.get(view, ())
    aggregates = [
        (column.name, column.aggregate.model_dump()) for column in columns if column.aggregate
    ]
    rated = any(aggregate["measure"] == "rate" for _, aggregate in aggregates)
    return _hash(
        FORMAT,
        spec.entities.model_dump(),
        spec.grain_days,
        spec.grain_origin.isoformat(),
        spec.label.model_dump() if rated else None,
        view in spec.views and spec.max_age(view) is not None,
        aggregates,
        read,
    )


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
