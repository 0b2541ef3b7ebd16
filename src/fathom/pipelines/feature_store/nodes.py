"""Nodes of the feature store pipeline."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.feature_store import FeatureStoreConfig
from fathom.spec import EVENT_TIMESTAMP, INCLUSION_PROBABILITY, FeatureSpec

if TYPE_CHECKING:
    from ibis.expr.types import Table
    from pyarrow import Table as ArrowTable
else:
    Table = ArrowTable = Any

Tables = dict[str, Table]


def apply_spec(
    spec: FeatureSpec,
    config: FeatureStoreConfig,
    attributes: Tables,
    views: Tables,
    packed_views: Tables,
) -> dict[str, Any]:
    """Make Feast's registry hold exactly the spec's objects.

    Returns:
        What is registered, and the newest moment that the aggregates cover.
    """
    from fathom.feature_store import FeatureRepo

    FeatureRepo(config, Path.cwd()).apply(spec)
    newest = [table[EVENT_TIMESTAMP].max().to_pyarrow().as_py() for table in views.values()]
    newest += [table[EVENT_TIMESTAMP].max().to_pyarrow().as_py() for table in attributes.values()]
    return {
        "spec_hash": spec.hash,
        "views": [*attributes, *views, *packed_views],
        "crosses": [cross.name for cross in spec.crosses],
        "until": max(moment for moment in newest if moment is not None).isoformat(),
    }


def read_training_frame(
    exposures: Table,
    feature_store_state: dict[str, Any],
    spec: FeatureSpec,
    config: FeatureStoreConfig,
) -> ArrowTable:
    """Every feature of every clean exposure, as known strictly before it, in the log's order."""
    from fathom.feature_store import FeatureRepo

    columns = [
        *spec.keys,
        EVENT_TIMESTAMP,
        spec.label.name,
        INCLUSION_PROBABILITY,
        *(column.name for column in spec.raw_columns("context")),
    ]
    spine = exposures.select(*dict.fromkeys(columns)).to_pyarrow()
    return FeatureRepo(config, Path.cwd()).training_frame(spine, spec)


def materialise_online(
    feature_store_state: dict[str, Any], spec: FeatureSpec, config: FeatureStoreConfig
) -> dict[str, Any]:
    """Load every user's newest row into the online store."""
    from fathom.feature_store import FeatureRepo

    until = datetime.fromisoformat(feature_store_state["until"])
    FeatureRepo(config, Path.cwd()).materialise(spec, until)
    return {"until": until.isoformat()}
