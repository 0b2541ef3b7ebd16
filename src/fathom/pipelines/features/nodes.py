"""Nodes of the features pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fathom.spec import CREATED_TIMESTAMP, EVENT_TIMESTAMP, FeatureSpec

if TYPE_CHECKING:
    from ibis.expr.types import Table
else:
    Table = Any

Tables = dict[str, Table]


def summarise_logs(
    exposures: Table, interactions: Table, users: Table, items: Table, spec: FeatureSpec
) -> tuple[Tables, Tables, Tables]:
    """Summarise the logs for every feature view.

    Returns:
        Attributes of users and items; snapshots by view; packed user rows by view.
    """
    from fathom import features
    from fathom.features import is_packable, packed_name

    logs = {
        name: features.with_attributes(log, users, items, spec).cache()
        for name, log in (("exposures", exposures), ("interactions", interactions))
    }
    until = int(features.last_step(logs.values(), spec).execute())
    attributes = {
        name: table.mutate(**{CREATED_TIMESTAMP: table[EVENT_TIMESTAMP]})
        for name, table in (("users", users), ("items", items))
    }
    views, packed = {}, {}
    for view, columns in spec.views.items():
        assert columns[0].aggregate is not None
        snapshots = features.snapshots(logs[columns[0].aggregate.of], spec, view, until).cache()
        views[view] = snapshots
        if is_packable(spec, view):
            packed[packed_name(view)] = features.packed(snapshots, spec, view)
    return attributes, views, packed
