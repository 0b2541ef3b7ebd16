"""Nodes of the features pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fathom import features, increments
from fathom.increments import Carry, Past, Update
from fathom.spec import FeatureSpec

if TYPE_CHECKING:
    from ibis.expr.types import Table
else:
    Table = Any


def stamp_attributes(users: Table, items: Table, spec: FeatureSpec) -> dict[str, Table]:
    """Attributes of users and items as their feature views hold them."""
    return {
        view: features.with_stamps(table, spec, view)
        for view, table in (("users", users), ("items", items))
    }


def summarise_logs(
    exposures: Table,
    interactions: Table,
    users: Table,
    items: Table,
    past: dict[str, Past],
    spec: FeatureSpec,
) -> Iterator[tuple[dict[str, Update | None], dict[str, Update | None], dict[str, Carry | None]]]:
    """Summarise what is new in the logs for every feature view, one view after the other.

    A generator, so that Kedro saves each view before it asks for the next: what is in memory, or
    spilled from it, is of one view or two, however many there are.

    Args:
        past: what earlier runs of this node left, by view.

    Yields:
        Of one view: rows to add to its snapshots, rows to add to its packed rows, and what the
        next run goes on from. Each is empty where there is nothing to do; None removes.
    """
    logs = {"exposures": exposures, "interactions": interactions}
    for change in increments.changes(logs, {"users": users, "items": items}, spec, past):
        view, packed = change.view, features.packed_name(change.view)
        if change.gone:
            yield {view: None}, {packed: None}, {view: None}
        else:
            yield (
                {view: change.snapshots} if change.snapshots else {},
                {packed: change.packed} if change.packed else {},
                {view: change.carry} if change.carry else {},
            )


def describe_features(carried: dict[str, Past], spec: FeatureSpec) -> dict[str, Any]:
    """What the feature views cover, and which computations they continue."""
    return increments.describe(carried, spec)
