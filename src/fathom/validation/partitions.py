"""Raw parquet partitions → one table, after every file has been read through once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import ibis
    from ibis.expr.datatypes import DataType
    from pyarrow import Schema

PARTITION = "partition"
ROW_NUMBER = "row_number"
REASONS = "reasons"
#: Canonical moments; nanoseconds are refused by Feast's DuckDB reader.
UTC = "timestamp('UTC', 6)"

_FILE = "filename"
_FILE_ROW = "file_row_number"
_BATCH_ROWS = 1 << 16


class RawDataError(ValueError):
    """Raw data cannot be validated row by row; the message lists every fault at once."""

    def __init__(self, table: str, faults: list[str]) -> None:
        self.table, self.faults = table, faults
        count = f"{len(faults)} fault{'s' if len(faults) > 1 else ''}"
        super().__init__(f"raw {table}: {count}\n" + "\n".join(f"  - {fault}" for fault in faults))


@dataclass(frozen=True)
class _File:
    path: Path
    rows: int
    schema: Schema


def read_partitions(
    folder: Path, table: str, required: Collection[str] | None = None
) -> ibis.Table:
    """Read all ``*.parquet`` files of a folder, or one such file, as one table.

    Every file's footer and content are read through first, so that no later stage meets a
    damaged page. Columns are matched by name; a column that the files hold in different types
    becomes a number if all are numbers, a moment if all are moments, and text otherwise.

    Args:
        folder: of the partitions, which are ordered by file name; or a single file.
        table: name for messages.
        required: columns that each file must have (see `required_columns`); by default every
            column that any of the files has.

    Returns:
        The rows with their raw columns, ``partition`` (from the file's name, where the file
        does not say) and ``row_number``, which counts all rows in reading order from 0. A
        ``reasons`` column is left out, so that rows from quarantine can be repaired and handed
        in again.

    Raises:
        RawDataError: with all faults of all files.
    """
    folder = Path(folder).resolve()
    paths = [folder] if folder.is_file() else sorted(folder.glob("*.parquet"))
    if not paths:
        fault = f"{folder}: holds no *.parquet file; run the source first, or correct the path"
        raise RawDataError(table, [fault])
    files: list[_File] = []
    faults: list[str] = []
    for path in paths:
        try:
            files.append(_read_through(path))
        except (OSError, ValueError) as error:
            faults.append(
                f"{path.name}: truncated or unreadable ({_first_line(error)}); replace the file "
                "with a complete copy, or remove it"
            )
    faults += [
        f"{file.path.name}: has 0 rows; an empty delivery usually is a broken feed; remove the "
        "file to skip it"
        for file in files
        if file.rows == 0
    ]
    everything = dict.fromkeys(name for file in files for name in file.schema.names)
    for file in files:
        wanted = everything if required is None else required
        missing = [name for name in wanted if name not in file.schema.names]
        if missing:
            faults.append(
                f"{file.path.name}: lacks {', '.join(missing)}; it has "
                f"{', '.join(file.schema.names)}"
            )
    if faults:
        raise RawDataError(table, faults)
    return _numbered(files)


def together(tables: Sequence[ibis.Table]) -> ibis.Table:
    """Tables of `read_partitions` as one; what one of them does not have is missing."""
    import ibis

    found = [dict(table.schema().items()) for table in tables]
    names = dict.fromkeys(name for schema in found for name in schema)
    types = {name: _common(schema[name] for schema in found if name in schema) for name in names}
    parts, before = [], 0
    for table in tables:
        part = _conform(table, types)
        parts.append(part.mutate(**{ROW_NUMBER: part[ROW_NUMBER] + before}))
        before += table.count().to_pyarrow().as_py()
    return ibis.union(*parts)


def _read_through(path: Path) -> _File:
    """Decode every page of a file once; a footer can be whole where the content is not."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        rows = sum(batch.num_rows for batch in file.iter_batches(batch_size=_BATCH_ROWS))
        if rows != file.metadata.num_rows:
            raise ValueError(f"{rows} of {file.metadata.num_rows} rows")
        return _File(path, rows, file.schema_arrow)


def _numbered(files: list[_File]) -> ibis.Table:
    """All files as one table, in which each row knows its place."""
    import ibis
    import pyarrow as pa

    groups: dict[str, list[_File]] = {}
    for file in files:
        groups.setdefault(str(file.schema.remove_metadata()), []).append(file)
    tables = [_group(group) for group in groups.values()]
    found = [dict(table.schema().items()) for table in tables]
    names = dict.fromkeys(name for file in files for name in file.schema.names)
    types = {
        name: _common(schema[name] for schema in found if name in schema)
        for name in (*names, _FILE, _FILE_ROW)
        if name not in {ROW_NUMBER, REASONS}
    }
    rows = ibis.union(*[_conform(table, types) for table in tables])
    starts, start = [], 0
    for file in files:
        starts.append(start)
        start += file.rows
    places = ibis.memtable(
        pa.table(
            {
                "place_file": [str(file.path) for file in files],
                "place_partition": [file.path.stem for file in files],
                "place_start": pa.array(starts, pa.int64()),
            }
        )
    )
    rows = rows.left_join(places, rows[_FILE] == places.place_file)
    partition = rows.place_partition
    if PARTITION in names:
        partition = ibis.coalesce(rows[PARTITION].cast("string"), partition)
    rows = rows.mutate(
        **{PARTITION: partition, ROW_NUMBER: rows.place_start + rows[_FILE_ROW].cast("int64")}
    )
    return rows.drop("place_file", "place_partition", "place_start", _FILE, _FILE_ROW)


def _group(files: list[_File]) -> ibis.Table:
    """Files of one schema. A column without any value has no type, so it is left to the others."""
    import ibis
    import pyarrow as pa

    table = ibis.read_parquet(
        [str(file.path) for file in files],
        filename=True,
        file_row_number=True,
        hive_partitioning=False,
    )
    return table.drop([field.name for field in files[0].schema if pa.types.is_null(field.type)])


def _common(types: Iterable[DataType]) -> DataType:
    """The type that holds a column's values from all files."""
    import ibis.expr.datatypes as dt

    found = list(dict.fromkeys(types)) or [dt.string]
    if len(found) == 1:
        return found[0]
    if all(t.is_numeric() and not t.is_boolean() for t in found):
        return dt.highest_precedence(found)
    if all(t.is_timestamp() or t.is_date() for t in found):
        return dt.dtype(UTC)
    return dt.string


def _conform(table: ibis.Table, types: dict[str, DataType]) -> ibis.Table:
    import ibis

    def column(name: str, wanted: DataType) -> Any:
        if name not in table.columns:
            return ibis.null(wanted)
        found = table[name]
        if found.type() == wanted:
            return found
        return as_text(found) if wanted.is_string() else found.cast(wanted)

    return table.select(**{name: column(name, wanted) for name, wanted in types.items()})


def as_text(column: Any) -> Any:
    """A column as text; whole numbers without a fraction, so that the key 7.0 is the key 7."""
    kind = column.type()
    if not (kind.is_floating() or kind.is_decimal()):
        return column.cast("string")
    number = column.cast("float64")
    whole = (number % 1 == 0) & (number.abs() < 2.0**63)
    return whole.ifelse(number.try_cast("int64").cast("string"), number.cast("string"))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
