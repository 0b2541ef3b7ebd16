"""What an operator may set about validation: ``params:validation``."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

TableName = Literal["exposures", "interactions", "users", "items"]


def _in_utc(moment: datetime) -> datetime:
    """A moment without a zone is UTC."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return aware.astimezone(timezone.utc)


Moment = Annotated[datetime, AfterValidator(_in_utc)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rule(_Frozen):
    """One Great Expectations expectation beside those that follow from the spec.

    Args:
        type: the expectation's name in snake case, as ``expect_column_values_to_be_between``.
        kwargs: its arguments. ``mostly`` has no place here: rows are judged one by one, and
            ``max_quarantined_share`` says how many may be bad.
        reason: what stands beside a quarantined row; made from type and kwargs when absent.

    An expectation about the table as a whole, as ``expect_table_row_count_to_be_between``,
    quarantines no row; when it fails the batch stops.
    """

    type: str = Field(pattern=r"^expect_[a-z0-9_]+$")
    kwargs: dict[str, Any] = Field(default_factory=dict)
    reason: str | None = Field(default=None, min_length=1)


class TableRules(_Frozen):
    """How one table is validated.

    Args:
        max_quarantined_share: the batch stops when more than this share of rows is quarantined.
        duplicates: rows alike in these columns are duplicates, of which the first is kept; an
            empty list keeps all. By default request, user and item for exposures, key and
            ``event_timestamp`` for users and items, and none for interactions.
        rules: expectations beside those that follow from the spec.
    """

    max_quarantined_share: float = Field(default=0.05, ge=0, le=1)
    duplicates: tuple[str, ...] | None = None
    rules: tuple[Rule, ...] = ()


def _all_tables() -> dict[TableName, TableRules]:
    return {name: TableRules() for name in get_args(TableName)}


class ValidationConfig(_Frozen):
    """How raw tables are validated.

    Args:
        tables: the tables of this deployment, with their rules.
        now: rows from after this moment are from the future; the time of the run when absent.
        future_tolerance_seconds: how far clocks may run ahead before a row counts as such.
        earliest: exposures and interactions from before this moment are quarantined.
        quarantine_file: where the catalog keeps quarantined rows, for messages; ``{table}``
            stands for the table's name.
    """

    tables: dict[TableName, TableRules] = Field(default_factory=_all_tables, min_length=1)
    now: Moment | None = None
    future_tolerance_seconds: int = Field(default=300, ge=0, le=86_400)
    earliest: Moment | None = None
    quarantine_file: str = "data/02_intermediate/quarantine_{table}.parquet"
