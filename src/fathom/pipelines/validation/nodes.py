"""Nodes of the validation pipeline."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.spec import ARRIVAL_TIMESTAMP, EVENT_TIMESTAMP, FeatureSpec
from fathom.validation import Validated, ValidationConfig

if TYPE_CHECKING:
    from ibis.expr.types import Table
else:
    Table = Any

Tables = dict[str, Table]


def validate_raw(
    raw_exposures: Table,
    raw_interactions: Table,
    raw_users: Table,
    raw_items: Table,
    spec: FeatureSpec,
    config: ValidationConfig,
    data_docs: str,
) -> tuple[dict[str, Validated], Tables, list[dict[str, Any]], str]:
    """Take every raw table apart into clean and quarantined rows, and say why.

    Args:
        raw_interactions: None where the source has none.
        data_docs: folder for Great Expectations' own pages.

    Returns:
        Validated tables by name; quarantined rows; reports as JSON and as one HTML page.
    """
    from fathom import validation

    raw = {
        "exposures": raw_exposures,
        "interactions": raw_interactions,
        "users": raw_users,
        "items": raw_items,
    }
    validated = {
        name: validation.validate(table, name, spec, config)  # type: ignore[arg-type]
        for name, table in raw.items()
        if table is not None
    }
    reports = [table.report for table in validated.values()]
    validation.write_data_docs(reports, Path(data_docs))
    return (
        validated,
        {name: table.quarantine for name, table in validated.items()},
        [report.as_dict() for report in reports],
        validation.render_html(reports),
    )


def accept(
    validated: dict[str, Validated], spec: FeatureSpec, config: ValidationConfig
) -> tuple[Table, Table, Table, Table, str]:
    """Hand the clean rows on, if enough of them are.

    Returns:
        Clean exposures, interactions, users and items, and the SHA-256 of all of them.

    Raises:
        QuarantineError: with every table of which too much is bad.
    """
    from fathom import validation

    validation.require_healthy([table.report for table in validated.values()], config)
    clean = {name: table.clean.cache() for name, table in validated.items()}
    if "interactions" not in clean:
        clean["interactions"] = _positives(clean["exposures"], spec)
    digest = hashlib.sha256()
    for name in sorted(clean):
        for batch in clean[name].to_pyarrow().to_batches(max_chunksize=1 << 17):
            digest.update(batch.serialize())
    tables = (clean[name] for name in ("exposures", "interactions", "users", "items"))
    return (*tables, digest.hexdigest())


def _positives(exposures: Table, spec: FeatureSpec) -> Table:
    """Where only exposures were logged, the user's acts are the positive ones among them."""
    kept = [spec.entities.user, spec.entities.item, EVENT_TIMESTAMP]
    kept += [ARRIVAL_TIMESTAMP] if ARRIVAL_TIMESTAMP in exposures.columns else []
    kept += [column.name for column in spec.raw_columns("context")]
    acts = exposures
    if spec.label.values is not None:
        acts = exposures.filter(exposures[spec.label.name] == spec.label.values[-1])
    return acts.select(*kept, spec.label.name)
