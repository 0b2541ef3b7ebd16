"""Validation of raw data: spec → Great Expectations suite; clean rows, quarantine, report.

The flow is `read_partitions` → `validate` for each table → `require_healthy` for all of them.
The suite follows from the `FeatureSpec`: keys, moments and label are there, values can be read
as their column's type, numbers are finite and within bounds, closed sets are kept, nothing is
from the future. Rules in conf come on top. Nothing is lost: every raw row ends up clean, in
quarantine with all its reasons, or counted as a later copy of another.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fathom.validation import expectations as _expectations
from fathom.validation.config import Rule, TableName, TableRules, ValidationConfig
from fathom.validation.expectations import RuleError
from fathom.validation.fields import required_columns
from fathom.validation.page import render_html
from fathom.validation.partitions import RawDataError, read_partitions, together
from fathom.validation.quarantine import Validated, validate
from fathom.validation.report import (
    ExpectationReport,
    PartitionRows,
    QuarantineError,
    Rows,
    TableReport,
    require_healthy,
)

__all__ = [
    "ExpectationReport",
    "PartitionRows",
    "QuarantineError",
    "RawDataError",
    "Rows",
    "Rule",
    "RuleError",
    "TableName",
    "TableReport",
    "TableRules",
    "Validated",
    "ValidationConfig",
    "read_partitions",
    "render_html",
    "require_healthy",
    "required_columns",
    "together",
    "validate",
    "write_data_docs",
]


def write_data_docs(results: Sequence[TableReport], folder: Path) -> None:
    """Write Great Expectations' Data Docs about all tables to a folder, atomically.

    The site loads its style sheets from the network, so it looks plain on a closed one;
    `render_html` gives a page that does not.

    Args:
        results: the reports of the tables.
        folder: replaced as a whole; open its ``index.html``.
    """
    _expectations.write_data_docs([report.gx for report in results], folder)
