"""Data that come split: ``train.csv``, ``valid.csv`` and ``test.csv``, as BARS publishes them.

This project divides a log by time (``params:split``). The rows of published splits have no times,
or times that the split does not follow, so every row has the moment of its split (`MOMENTS`), by
which ``params:split`` finds it again. Aggregates over such a log would know of the splits before a
row's own, and nothing of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, model_validator

from fathom.sources import tables
from fathom.sources.canonical import CanonicalTables, Settings, SourceError, connect, store
from fathom.sources.raw_files import UNREADABLE_LINE, RawTable, load
from fathom.sources.times import Timestamp
from fathom.spec import Name

if TYPE_CHECKING:
    import ibis.expr.types as ir
    from ibis.backends.duckdb import Backend

#: When the rows of each split happened, UTC; a day each, so that each is a raw partition.
MOMENTS = {
    "train": "2000-01-01T00:00:00",
    "validation": "2000-01-02T00:00:00",
    "test": "2000-01-03T00:00:00",
}
#: Raw columns that a source adds to those of its files.
MOMENT, ROW, EVERYONE = "_moment", "_row", "_everyone"
_FILES = {"train": "train.csv", "validation": "valid.csv", "test": "test.csv"}


class SplitFiles(Settings):
    """Settings of a source of three CSV files with a header.

    Args:
        path: folder that holds ``train.csv``, ``valid.csv`` and ``test.csv``.
        user, item, request: canonical names of the keys, as in the spec's ``entities``. Without a
            column of the files, all rows are of one user or one item, and each is a request.
        columns: canonical name → raw name.
        label: what counts as positive; it needs a column.
        rows: only so many of the first rows of each file, to try things out; all when absent.
    """

    type: Literal["split_files"] = "split_files"
    path: str = Field(min_length=1)
    user: Name
    item: Name
    request: Name
    columns: dict[str, str]
    label: tables.Label
    rows: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _labelled(self) -> Self:
        if self.label.column is None:
            raise ValueError("label needs 'column': the files hold positives and negatives")
        return self

    def files(self) -> list[Path]:
        """The files that there are to read; `read` names those that are missing."""
        return [path for path in self._paths().values() if path.is_file()]

    def read(self) -> CanonicalTables:
        """Read the three files; the rows of each keep their order.

        Raises:
            SourceError: files, columns or fields of a line are missing; all are named.
        """
        label = str(self.label.column)
        needed = [label, *self.columns.values()]
        faults = missing(self._paths().values(), f"a header and the columns {', '.join(needed)}")
        if faults:
            raise SourceError(faults)
        connection = connect()
        opened = {}
        for split, path in self._paths().items():
            raw = RawTable(path=str(path), format="csv", columns=self.columns)
            opened[split] = load(connection, raw, split, needed, faults, strict=True)
        if faults:
            raise SourceError(faults)
        keys = {self.user: EVERYONE, self.item: EVERYONE, self.request: ROW}
        config = described(self.user, self.item, self.request, keys | self.columns, self.label)
        return together(connection, self._parts(connection, opened), config)

    def _parts(self, connection: Backend, opened: dict[str, Any]) -> Iterator[ir.Table]:
        """The rows of each split; what was read is let go of when they have been taken over."""
        for split, table in opened.items():
            yield dated(table, split).drop(UNREADABLE_LINE).limit(self.rows)
            connection.drop_table(f"raw_{split}")

    def _paths(self) -> dict[str, Path]:
        return {split: Path(self.path) / name for split, name in _FILES.items()}


def missing(paths: Iterable[Path], expected: str) -> list[str]:
    """A fault for each file that is not there, which says what is expected of it."""
    return [
        f"{path}: no such file; put your copy there, with {expected}, or correct 'path'"
        for path in paths
        if not path.is_file()
    ]


def dated(table: ir.Table, split: str) -> ir.Table:
    """The rows of a stored table, each with the moment of its split and a name of its own."""
    import ibis

    return table.mutate(
        **{
            MOMENT: ibis.timestamp(MOMENTS[split]),
            ROW: f"{split}-" + table.rowid().cast("string"),
            EVERYONE: ibis.literal("all"),
        }
    )


def together(
    connection: Backend, parts: Iterable[ir.Table], config: tables.Tables
) -> CanonicalTables:
    """The canonical tables of all splits' rows, one split after the other; a union may mix them."""
    name, log = "splits", None
    for part in parts:
        if log is None:
            log = store(connection, name, part, temporary=True)
        else:
            connection.insert(name, part)
    found = tables.canonical(connection, {"exposures": log}, config)
    connection.drop_table(name)
    return found


def described(
    user: str, item: str, request: str, columns: dict[str, str], label: tables.Label
) -> tables.Tables:
    """How `fathom.sources.tables.canonical` reads a log of such rows."""
    return tables.Tables(
        user=user,
        item=item,
        request=request,
        partition_by="day",
        exposures=tables.Exposures(
            path="splits",  # opened already
            columns=columns,
            timestamp=Timestamp(column=MOMENT),
            label=label,
        ),
    )
