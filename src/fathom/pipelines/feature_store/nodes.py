"""Nodes of the feature store pipeline."""

from __future__ import annotations

import logging
import os
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.feature_store import FeatureStoreConfig
from fathom.spec import EVENT_TIMESTAMP, INCLUSION_PROBABILITY, FeatureSpec

if TYPE_CHECKING:
    from ibis.expr.types import Table

    from fathom.feature_store import FeatureRepo
else:
    Table = FeatureRepo = Any

_PARTITION = "partition"

log = logging.getLogger(__name__)


def apply_spec(
    spec: FeatureSpec, config: FeatureStoreConfig, features_state: dict[str, Any]
) -> dict[str, Any]:
    """Make Feast's registry hold exactly the spec's objects.

    Returns:
        What is registered; the newest moment that the aggregates cover; which computation each
        view continues.
    """
    from fathom.feature_store import FeatureRepo

    repo = FeatureRepo(config, Path.cwd())
    store = repo.apply(spec)
    return {
        "spec_hash": spec.hash,
        "views": sorted(v.name for v in store.list_batch_feature_views() if "spec" in v.tags),
        "crosses": [cross.name for cross in spec.crosses],
        **features_state,
        "needs": _databases(repo),
    }


def read_training_frame(
    exposures: Table,
    feature_store_state: dict[str, Any],
    previous_training_frame: Table | None,
    previous_training_frame_state: dict[str, Any] | None,
    spec: FeatureSpec,
    config: FeatureStoreConfig,
) -> tuple[Table, dict[str, Any]]:
    """Every feature of every clean exposure, as known strictly before it, in the log's order.

    Features of an exposure never change while its partition, the spec, the attributes and the
    computations that the views continue stay the same; then only new partitions are read.

    Args:
        previous_training_frame, previous_training_frame_state: what the last run returned.

    Returns:
        The frame, and what it was read from.
    """
    import ibis

    from fathom.feature_store import FeatureRepo

    columns = [
        *spec.keys,
        EVENT_TIMESTAMP,
        spec.label.name,
        INCLUSION_PROBABILITY,
        *(column.name for column in spec.raw_columns("context")),
    ]
    wanted = exposures.select(*dict.fromkeys([*columns, _PARTITION]))
    state = {
        "spec_hash": spec.hash,
        "lineages": feature_store_state["lineages"],
        "attributes": feature_store_state["attributes"],
        "until": feature_store_state["until"],
        "partitions": _fingerprints(wanted),
    }
    kept = _reusable(previous_training_frame, previous_training_frame_state, state)
    new = wanted.filter(~wanted[_PARTITION].isin(kept)) if kept else wanted
    spine = new.drop(_PARTITION).to_pyarrow()
    log.info("joining %s exposures; %d partitions are as they were", f"{len(spine):,}", len(kept))
    frame = FeatureRepo(config, Path.cwd()).training_frame(spine, spec)
    if not kept:
        return ibis.memtable(frame), state  # as the union below, which gives the same bytes
    assert previous_training_frame is not None
    return ibis.union(previous_training_frame, ibis.memtable(frame)), state


def materialise_online(
    feature_store_state: dict[str, Any], spec: FeatureSpec, config: FeatureStoreConfig
) -> dict[str, Any]:
    """Load what is new of every user's newest row into the online store.

    Returns:
        Until when. (Not how much was new, or a run that finds nothing new would look different.)
    """
    from fathom.feature_store import FeatureRepo

    until = datetime.fromisoformat(feature_store_state["until"])
    repo = FeatureRepo(config, Path.cwd())
    repo.materialise(spec, until, feature_store_state["lineages"])
    return {"until": until.isoformat(), "needs": _databases(repo)}


def _databases(repo: FeatureRepo) -> list[str]:
    """What the embedded registry and online store lie in; if it is gone, so is what was done."""
    return [os.path.relpath(path) for path in sorted(repo.folder.glob("*.db"))]


def _fingerprints(table: Table) -> dict[str, list[int]]:
    """Rows, and a checksum of them in any order, of each partition."""
    import ibis

    row = ibis.literal(0, "int64")
    for name in table.columns:
        # A column's hash is rotated by its place, or two columns' swapped values would cancel out.
        row = (row * 31 + table[name].hash() % 2_147_483_647) % 2_147_483_647
    found = table.group_by(_PARTITION).agg(rows=table.count(), checksum=row.sum()).to_pyarrow()
    return {p[_PARTITION]: [p["rows"], int(p["checksum"])] for p in found.to_pylist()}


def _reusable(frame: Table | None, before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """Partitions whose rows of the last frame still hold; none if any does not."""
    if frame is None or not before:
        return []
    alike = all(before[name] == now[name] for name in ("spec_hash", "lineages", "attributes"))
    held: dict[str, list[int]] = before["partitions"]
    back = datetime.fromisoformat(before["until"]) > datetime.fromisoformat(now["until"])
    changed = any(now["partitions"].get(name) != found for name, found in held.items())
    if changed or back or not alike:
        return []
    rows = int(frame.count().execute())
    # A run that died between writing the frame and writing this leaves a frame that has more.
    return list(held) if rows == sum(count for count, _ in held.values()) else []
