"""What every source hands over, and the embedded engine it is built in."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import ibis.expr.types as ir
    from ibis.backends.duckdb import Backend

#: Name of the raw partition that a row of a log belongs to.
PARTITION = "partition"
#: What stands before a raw value that could not be read as its source says it is written.
UNREADABLE = "unreadable: "
#: Attributes without a time of their own have held since before any log.
ALWAYS = "1970-01-01T00:00:00"

_MEMORY_LIMIT = "3GB"


class SourceError(ValueError):
    """Raw data is missing or unreadable; the message lists every fault at once."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        super().__init__(f"source: {count}\n" + "\n".join(f"  - {fault}" for fault in faults))


class Settings(BaseModel):
    """Base of the sources' settings: fixed once read, and closed to unknown names."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class CanonicalTables:
    """The tables of one data set under the names that the feature spec uses.

    All live in one in-memory DuckDB. Rows are as raw as they came: keys are VARCHAR, and a value
    that cannot be read is kept as text (``unreadable: 31.02.2017``), so that validation can
    quarantine the row with what was found. Timestamps are UTC, as TIMESTAMP, or as text
    ``2017-02-28 12:00:00`` where the raw files hold text or numbers.

    Attributes:
        exposures: request, user and item key, ``event_timestamp``, ``arrival_timestamp`` where
            known, context columns, label, ``inclusion_probability``, ``partition``.
        interactions: all acts of the users, whether exposed or not: user and item key,
            ``event_timestamp``, ``arrival_timestamp`` where known, further columns, ``partition``.
        users, items: key, attributes, ``event_timestamp`` from which the row holds.
    """

    exposures: ir.Table
    interactions: ir.Table | None
    users: ir.Table
    items: ir.Table


def connect() -> Backend:
    """A fresh in-memory DuckDB in UTC; what exceeds its memory spills to the temporary folder."""
    import ibis

    connection = ibis.duckdb.connect(memory_limit=_MEMORY_LIMIT)
    spill = Path(tempfile.gettempdir()) / f"fathom-{os.getpid()}"
    connection.settings["temp_directory"] = str(spill)
    connection.settings["lambda_syntax"] = "ENABLE_SINGLE_ARROW"  # as Ibis 12 writes lambdas
    return connection


def store(connection: Backend, name: str, table: ir.Table, temporary: bool = False) -> ir.Table:
    """Compute ``table`` once and keep it as ``name``, rows in their order.

    Raises:
        SourceError: the engine could not read the files behind it to their end.
    """
    import duckdb

    try:
        return connection.create_table(name, table, temp=temporary)
    except (duckdb.IOException, duckdb.InvalidInputException) as error:
        raise SourceError([f"{name}: {first_line(error)}; repair or remove the file"]) from error


def first_line(error: Exception) -> str:
    """The engine's message without the advice that follows it."""
    return str(error).strip().splitlines()[0]


@cache
def builtin(name: str, takes: tuple[str, ...], returns: str) -> Any:
    """A function of DuckDB, of one or two columns, that Ibis has no name for."""
    import ibis

    bodies = {1: lambda first: None, 2: lambda first, second: None}
    return ibis.udf.scalar.builtin(bodies[len(takes)], name=name, signature=(takes, returns))
