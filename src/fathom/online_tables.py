"""What serving holds in memory: the newest rows of every feature view that has no user key.

A generation of tables is loaded as of one moment and never changed; a newer one takes its place.
Legend: R rows of a table, N candidates of a request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fathom.aggregates import view_keys
from fathom.encoding import Values, complete
from fathom.feature_store import FeatureRepo, frame_of, to_arrow
from fathom.features import stamp_name, stored_name
from fathom.lookup import Codes, Index, Numbers, ordered
from fathom.spec import EVENT_TIMESTAMP, Column, FeatureSpec

AllCodes = Mapping[str, Codes]

_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


@dataclass(frozen=True)
class KeyedTable:
    """A feature view's newest rows, found by the codes of their keys.

    Args:
        columns: R + 1 values each, the last for what is not there: columns of the spec as
            `fathom.encoding.complete` gives them, but for those that depend on the moment.
        ageing: fields that depend on the moment, as stored, likewise.
        stamps: (R + 1,) each row's own moment in microseconds since 1970, if the view can be too
            old (`FeatureSpec.max_age_days`).
        there: (R + 1,) whether there is a row.
        keys: (R + 1,) codes of the attributes that are keys of other views.
    """

    index: Index
    columns: Mapping[str, Values]
    ageing: Mapping[str, Values]
    stamps: NDArray[np.float64] | None
    there: NDArray[np.bool_]
    keys: Mapping[str, Numbers]

    @classmethod
    def of(
        cls, table: pa.Table, by: Sequence[str], spec: FeatureSpec, view: str, codes: AllCodes
    ) -> KeyedTable:
        """Index the newest row of each key of a view.

        Args:
            table: the keys, the fields of `fathom.features.stored_fields`, ``event_timestamp``.
            codes: of every key column; the table's own keys are all known to them.
        """
        index, places = Index.of(
            [codes[key].of_arrow(table[key]) for key in by], [codes[key].size for key in by]
        )
        size = index.missing
        stored = frame_of(table.drop_columns([*by, EVENT_TIMESTAMP]))
        raw = {name: ordered(values, places, size) for name, values in stored.items()}
        held = spec.held(view)
        ageing = [stored_name(column) for column in held if depends_on_the_moment(column)]
        lasting = [column for column in held if not depends_on_the_moment(column)]
        no_moment = {EVENT_TIMESTAMP: np.zeros(size + 1, "datetime64[us]")}
        there = np.zeros(size + 1, np.bool_)
        there[places] = True
        return cls(
            index,
            complete(raw | no_moment, part(spec, lasting)),
            {name: raw[name] for name in ageing},
            np.asarray(raw[stamp_name(view)]) if stamp_name(view) in raw else None,
            there,
            {name: codes[name].of_arrow(to_arrow(raw[name])) for name in codes if name in raw},
        )


@dataclass(frozen=True)
class Tables:
    """One generation of tables.

    Args:
        as_of: the moment whose state they are.
        codes: of every key column of the spec's views but the user.
        views: feature view → table.
        source: what they were loaded from; it differs when there is something newer to load.
    """

    as_of: datetime
    codes: AllCodes
    views: Mapping[str, KeyedTable]
    source: object

    @classmethod
    def load(cls, repo: FeatureRepo, spec: FeatureSpec) -> Tables:
        """Read the state of the last materialisation, or all there is if there was none."""
        views = tables_of(spec)
        source = source_of(repo, spec)
        until = repo.materialised(spec)
        rows = {view: repo.latest(view, spec, until) for view in views}
        columns: dict[str, list[pa.ChunkedArray]] = {key: [] for key in keys_of(spec)}
        for table in rows.values():
            for name in table.column_names:
                if name in columns:
                    columns[name].append(table[name])
        codes = {key: Codes(parts) for key, parts in columns.items()}
        newest = [pc.max(table[EVENT_TIMESTAMP]).as_py() for table in rows.values() if len(table)]
        as_of = until or max(newest, default=_EPOCH)
        tables = {
            view: KeyedTable.of(rows[view], by, spec, view, codes) for view, by in views.items()
        }
        return cls(as_of, codes, tables, source)


def source_of(repo: FeatureRepo, spec: FeatureSpec) -> object:
    """What tables would be loaded from now; cheap, and equal only if nothing has changed."""
    files: list[Path] = []
    for view in tables_of(spec):
        path = repo.source(view)
        files += sorted(path.glob("[!.]*.parquet")) if path.is_dir() else [path]
    states = [(path, path.stat()) for path in files]
    return (
        repo.materialised(spec),
        tuple((str(path), state.st_mtime_ns, state.st_size) for path, state in states),
    )


def tables_of(spec: FeatureSpec) -> dict[str, tuple[str, ...]]:
    """Feature views that are held in memory: view → its keys, those of the item last."""
    views: dict[str, tuple[str, ...]] = (
        {"items": (spec.entities.item,)} if spec.held("items") else {}
    )
    for view in spec.views:
        by = view_keys(spec, view)
        if spec.entities.user not in by:
            # What all candidates share comes first, so that they lie side by side in the index.
            views[view] = tuple(sorted(by, key=lambda key: spec.owner(key) == "item"))
    return views


def keys_of(spec: FeatureSpec) -> list[str]:
    """Key columns of the spec's views, but for the user; the item in any case."""
    keys = [key for view in spec.views for key in view_keys(spec, view)]
    return [key for key in dict.fromkeys([spec.entities.item, *keys]) if key != spec.entities.user]


def part(spec: FeatureSpec, columns: Sequence[Column]) -> FeatureSpec:
    """The spec with some of its columns, as `fathom.encoding.complete` takes it."""
    return spec.model_copy(update={"columns": tuple(columns), "crosses": ()})


def depends_on_the_moment(column: Column) -> bool:
    """Whether a column is measured when it is read rather than stored."""
    return column.aggregate is not None and stored_name(column) != column.name
