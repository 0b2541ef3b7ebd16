"""Nodes of the validation pipeline."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.spec import ARRIVAL_TIMESTAMP, EVENT_TIMESTAMP, FeatureSpec
from fathom.validation import TableReport, Validated, ValidationConfig

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
    served_exposures: Table = None,
) -> tuple[Tables, Tables, list[dict[str, Any]], str, dict[str, Any]]:
    """Take every raw table apart into clean and quarantined rows, and say why.

    Args:
        raw_interactions: None where the source has none.
        data_docs: folder for Great Expectations' own pages.
        served_exposures: what was served and is labelled, beside the source's; None if nothing is.

    Returns:
        Clean rows; quarantined rows; reports as JSON and as one HTML page; the receipt for the
        data docs, which holds until a row that is from the future no longer is.
    """
    from fathom import validation

    if served_exposures is not None:
        raw_exposures = validation.together([raw_exposures, served_exposures])
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
        {name: table.clean for name, table in validated.items()},
        {name: table.quarantine for name, table in validated.items()},
        [report.as_dict() for report in reports],
        validation.render_html(reports),
        {"covers": [data_docs], "expires": _expiry(validated, config)},
    )


def accept(
    validated: Tables,
    validation_report: list[dict[str, Any]],
    spec: FeatureSpec,
    config: ValidationConfig,
) -> tuple[Table, Table, Table, Table, str]:
    """Hand the clean rows on, if enough of them are.

    Args:
        validated: clean rows by table. validation_report: what was found in the same tables.

    Returns:
        Clean exposures, interactions, users and items, and the SHA-256 of all of them.

    Raises:
        QuarantineError: with every table of which too much is bad.
    """
    from fathom import validation

    validation.require_healthy([_report(found) for found in validation_report], config)
    clean = dict(validated)
    if "interactions" not in clean:
        clean["interactions"] = _positives(clean["exposures"], spec)
    digest = hashlib.sha256()
    for name in sorted(clean):
        for batch in clean[name].to_pyarrow().to_batches(max_chunksize=1 << 17):
            digest.update(batch.serialize())
    tables = (clean[name] for name in ("exposures", "interactions", "users", "items"))
    return (*tables, digest.hexdigest())


def _expiry(validated: dict[str, Validated], config: ValidationConfig) -> str | None:
    """When a row that is from the future arrives in the present; None if there is none."""
    if config.now is not None:
        return None
    moments = []
    for table in validated.values():
        for column in (EVENT_TIMESTAMP, ARRIVAL_TIMESTAMP):
            reason = f"{column} is in the future"
            if reason in table.report.rows["reasons"]:
                rows = table.quarantine.filter(table.quarantine["reasons"].contains(reason))
                first = rows[column].try_cast("timestamp('UTC', 6)").min()
                moments.append(first.to_pyarrow().as_py())
    tolerance = timedelta(seconds=config.future_tolerance_seconds)
    return (min(moments) - tolerance).isoformat() if moments else None


def _report(found: dict[str, Any]) -> TableReport:
    """A report as it was before it was saved as JSON."""
    from fathom.validation import ExpectationReport, PartitionRows

    partitions = tuple(PartitionRows(**partition) for partition in found["partitions"])
    expectations = tuple(ExpectationReport(**each) for each in found["expectations"])
    return TableReport(**found | {"partitions": partitions, "expectations": expectations})


def _positives(exposures: Table, spec: FeatureSpec) -> Table:
    """Where only exposures were logged, the user's acts are the positive ones among them."""
    kept = [spec.entities.user, spec.entities.item, EVENT_TIMESTAMP]
    kept += [ARRIVAL_TIMESTAMP] if ARRIVAL_TIMESTAMP in exposures.columns else []
    kept += [column.name for column in spec.raw_columns("context")]
    acts = exposures
    if spec.label.values is not None:
        acts = exposures.filter(exposures[spec.label.name] == spec.label.values[-1])
    return acts.select(*kept, spec.label.name)
