"""What validation found, as plain data, and the decision whether the batch may go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from fathom.validation.config import TableName, ValidationConfig
from fathom.validation.fields import rules_of

_TOP_REASONS = 3

#: Rows of a table: ``in`` = ``clean`` + ``quarantined`` + ``duplicates``, exactly. A row with
#: several reasons counts once for each of them under ``reasons``.
Rows = TypedDict(
    "Rows",
    {"in": int, "clean": int, "quarantined": int, "duplicates": int, "reasons": dict[str, int]},
)


@dataclass(frozen=True)
class PartitionRows:
    """Rows of one raw partition."""

    partition: str
    rows_in: int
    clean: int
    quarantined: int
    duplicates: int


@dataclass(frozen=True)
class ExpectationReport:
    """One expectation of the suite.

    Args:
        type, columns: Great Expectations' name, and the columns or helper columns it reads.
        claim: what holds for a good row, in words.
        reason: what stands beside a row that breaks it.
        success: whether it holds.
        unexpected: rows that break it; None for an expectation about the whole table, whose
            finding is in ``observed``.
    """

    type: str
    columns: tuple[str, ...]
    claim: str
    reason: str
    success: bool
    unexpected: int | None
    observed: str = ""


@dataclass(frozen=True)
class TableReport:
    """What validation found in one table.

    Args:
        table: its name.
        moment: when it was validated, ISO 8601 in UTC.
        rows: see `Rows`; reasons by falling count.
        max_quarantined_share: the bound above which the batch stops.
        partitions: in reading order.
        expectations: in the order of the suite.
        examples: reason → the first rows with it, raw values as text.
        gx: Great Expectations' own result, as JSON types and without its lists of rows.
    """

    table: TableName
    moment: str
    rows: Rows
    max_quarantined_share: float
    partitions: tuple[PartitionRows, ...]
    expectations: tuple[ExpectationReport, ...]
    examples: dict[str, tuple[dict[str, str | None], ...]]
    gx: dict[str, Any]

    @property
    def quarantined_share(self) -> float:
        """Quarantined rows per row read, in [0, 1]."""
        return self.rows["quarantined"] / self.rows["in"] if self.rows["in"] else 0.0

    @property
    def failed_as_a_whole(self) -> tuple[ExpectationReport, ...]:
        """Expectations about the whole table that do not hold."""
        return tuple(e for e in self.expectations if e.unexpected is None and not e.success)

    @property
    def is_healthy(self) -> bool:
        """Whether the batch may go on, by the bound that stood when it was validated."""
        return self.quarantined_share <= self.max_quarantined_share and not self.failed_as_a_whole

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON types."""
        return asdict(self)


class QuarantineError(RuntimeError):
    """Too many rows are bad, so nothing downstream may run; names every such table."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("validation stops the batch\n" + "\n".join(f"  - {f}" for f in faults))


def require_healthy(reports: Sequence[TableReport], config: ValidationConfig) -> None:
    """Stop the batch where a table has too many bad rows.

    Raises:
        QuarantineError: with all tables over their bound, and all that fail as a whole.
    """
    faults = []
    for report in reports:
        bound = rules_of(report.table, config).max_quarantined_share
        if report.quarantined_share > bound:
            faults.append(_too_many(report, bound, config))
        faults += [
            f"{report.table}: {expectation.reason}, but it is {expectation.observed}; repair the "
            "source, or correct the rule in params:validation"
            for expectation in report.failed_as_a_whole
        ]
    if faults:
        raise QuarantineError(faults)


def _too_many(report: TableReport, bound: float, config: ValidationConfig) -> str:
    reasons = list(report.rows["reasons"].items())
    top = ", ".join(
        f"{reason} ({count:,} row{'s' if count > 1 else ''})"
        for reason, count in reasons[:_TOP_REASONS]
    )
    rest = len(reasons) - _TOP_REASONS
    top += f" and {rest} more" if rest > 0 else ""
    return (
        f"{report.table}: {report.quarantined_share:.2%} of {report.rows['in']:,} rows are "
        f"quarantined, above the bound of {bound:.2%}: {top}; the rows are in "
        f"{config.quarantine_file.format(table=report.table)}; repair the source and run again, "
        f"or raise validation.tables.{report.table}.max_quarantined_share"
    )
