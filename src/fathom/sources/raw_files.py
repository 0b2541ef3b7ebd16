"""Raw parquet, CSV and JSON-lines files as tables, with nothing lost and nothing guessed.

CSV and JSON lines are read as text, so that no value is changed or refused by a guessed type; a
line that cannot be read at all becomes a row that is empty but for `UNREADABLE_LINE`. Parquet
keeps its own types.
"""

from __future__ import annotations

import csv
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fathom.sources.canonical import Settings, first_line

if TYPE_CHECKING:
    import ibis.expr.types as ir
    from ibis.backends.duckdb import Backend

Format = Literal["parquet", "csv", "jsonl"]

#: The text of a line that is no row of the table; null on all other rows. Parquet has none.
UNREADABLE_LINE = "unreadable_line"

_SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "jsonl",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
_COMPRESSED = {".gz", ".zst"}
_REJECTED_CHARACTERS = 1000  # of a line that is quoted in quarantine
_QUOTED_LINES, _QUOTED_CHARACTERS = 5, 60  # of those that are quoted in a message
_WHOLE_LINE = "\x01"  # a delimiter that no text holds, so that a line stays in one piece


class RawTable(Settings):
    """Where a table's files are and how they are written.

    Args:
        path: a file, a folder (all its files of the format, at any depth) or a glob.
        format: ``parquet``, ``csv`` or ``jsonl`` (one JSON object per line); follows from the
            suffix where there is one.
        columns: canonical name → raw name.
        separators: canonical name → what stands between the values of a multi-valued text column.
        delimiter: between the fields of a CSV; by default a tab in ``.tsv`` and else a comma.
        quote: around CSV fields that hold a delimiter; empty where there is none.
        encoding: of a CSV or JSON-lines file.
        names: the raw column names of a CSV without a header line, in their order.
    """

    path: str = Field(min_length=1)
    format: Format | None = None
    columns: dict[str, str]
    separators: dict[str, str] = Field(default_factory=dict)
    delimiter: str | None = Field(default=None, min_length=1, max_length=4)
    quote: str = Field(default='"', max_length=1)
    encoding: Literal["utf-8", "latin-1", "utf-16"] = "utf-8"
    names: tuple[str, ...] | None = Field(default=None, min_length=1)


def load(
    connection: Backend,
    raw: RawTable,
    name: str,
    needed: Iterable[str],
    faults: list[str],
    strict: bool = False,
) -> ir.Table | None:
    """Open the files of one table.

    Args:
        connection: where the table is made, as ``raw_<name>``.
        raw: where the files are and how they are written.
        name: of the table, for messages.
        needed: raw columns that must be in every file (of JSON lines: on some line).
        faults: what is missing or unreadable is added here, so that all tables report together.
        strict: a line of a CSV that cannot be read is a fault, not a row for quarantine.

    Returns:
        The needed columns, or nothing when there are faults.
    """
    import duckdb

    files = find(raw, name, faults)
    if not files:
        return None
    formats = {raw.format or _format(file) for file in files}
    if len(formats) > 1 or None in formats:
        found = ", ".join(sorted({file.suffix or file.name for file in files}))
        faults.append(
            f"{name}: {raw.path}: cannot tell the format of '{found}'; "
            "set 'format' to parquet, csv or jsonl, and keep to one format per table"
        )
        return None
    scans: dict[str, type[_Scan]] = {"parquet": _Parquet, "csv": _Csv, "jsonl": _JsonLines}
    columns = tuple(dict.fromkeys(needed))
    job = scans[str(formats.pop())](connection, raw, name, files, columns, [], strict)
    try:
        job.run()
    except duckdb.Error as error:
        hint = "; its lines may end in different ways" if "state machine" in str(error) else ""
        job.faults.append(f"{name}: {raw.path}: {first_line(error)}; repair the file{hint}")
    faults += job.faults
    return None if job.faults else connection.table(f"raw_{name}")


def find(raw: RawTable, name: str, faults: list[str]) -> list[Path]:
    """The files of one table, in reading order; none is a fault, which is added to ``faults``."""
    path = Path(raw.path)
    if path.is_dir():
        inside = (p for p in path.rglob("*") if p.is_file() and not p.name.startswith((".", "_")))
        files = sorted(p for p in inside if raw.format in {None, _format(p)})
    elif path.is_file():
        files = [path]
    else:
        files = sorted(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    if not files:
        state = "no data file in this folder" if path.is_dir() else "no such file or folder"
        faults.append(f"{name}: {raw.path}: {state}; put the data there or correct 'path'")
    return files


def _format(file: Path) -> Format | None:
    suffixes = [s.lower() for s in file.suffixes if s.lower() not in _COMPRESSED]
    return _SUFFIXES.get(suffixes[-1]) if suffixes else None


@dataclass(frozen=True)
class _Scan(ABC):
    """One table on its way from files to ``raw_<name>``."""

    connection: Backend
    raw: RawTable
    name: str
    files: Sequence[Path]
    needed: tuple[str, ...]
    faults: list[str]
    strict: bool

    @abstractmethod
    def run(self) -> None:
        """Make the table, or add to ``faults``."""

    @property
    def target(self) -> str:
        return _quoted(f"raw_{self.name}")

    def check(self, file: Path | str, found: Iterable[str]) -> None:
        found = list(found)
        for column in self.needed:
            if column not in found:
                self.faults.append(
                    f"{self.name}: {file}: no column '{column}' (found: "
                    f"{', '.join(found) or 'none'}); correct its name in the configuration "
                    "or the file"
                )

    def read_csv(self, files: Sequence[Path], names: Sequence[str], options: str) -> str:
        """SQL that reads delimited text by position; broken lines go to a table of their own."""
        columns = ", ".join(f"{_literal(name)}: 'VARCHAR'" for name in names)
        return (
            f"read_csv({_literals(files)}, auto_detect = false, columns = {{{columns}}}, "
            f"encoding = {_literal(self.raw.encoding)}, ignore_errors = true, {options})"
        )

    def keep_rejects(self) -> str:
        """Options under which `read_csv` records the lines that it cannot read."""
        return (
            f"store_rejects = true, rejects_table = {_literal(f'rejects_{self.name}')}, "
            f"rejects_scan = {_literal(f'rejects_scan_{self.name}')}"
        )

    def add_rejects(self) -> None:
        """One row per rejected line; a line may be rejected for several reasons."""
        if self.strict:
            self.faults.extend(self._broken_lines())
            return
        self.connection.raw_sql(
            f"INSERT INTO {self.target} ({UNREADABLE_LINE}) "
            f"SELECT any_value(csv_line)[:{_REJECTED_CHARACTERS}] "
            f"FROM {_quoted(f'rejects_{self.name}')} "
            "GROUP BY scan_id, file_id, line ORDER BY scan_id, file_id, line"
        )

    def _broken_lines(self) -> list[str]:
        """The first rejected lines in words."""
        rows = self.connection.con.execute(
            "SELECT file_path, line, min(error_message), min(csv_line) "
            f"FROM {_quoted(f'rejects_{self.name}')} "
            f"JOIN {_quoted(f'rejects_scan_{self.name}')} USING (scan_id, file_id) "
            f"GROUP BY file_path, line ORDER BY file_path, line LIMIT {_QUOTED_LINES}"
        ).fetchall()
        return [
            f"{self.name}: {path}: line {line} ('{text[:_QUOTED_CHARACTERS]}'): {fault}; "
            "repair the line, or copy the file anew"
            for path, line, fault, text in rows
        ]


class _Parquet(_Scan):
    def run(self) -> None:
        import duckdb

        for file in self.files:
            try:
                rows = self.connection.con.execute(
                    f"DESCRIBE FROM read_parquet({_literals([file])})"
                ).fetchall()
            except duckdb.Error as error:
                self.faults.append(
                    f"{self.name}: {file}: {first_line(error)}; write the file anew or remove it"
                )
            else:
                self.check(file, [row[0] for row in rows])
        if not self.faults:
            self.connection.raw_sql(
                f"CREATE TEMP VIEW {self.target} AS SELECT {', '.join(map(_quoted, self.needed))} "
                f"FROM read_parquet({_literals(self.files)}, union_by_name = true)"
            )


class _Csv(_Scan):
    def run(self) -> None:
        groups: dict[tuple[str, ...], list[Path]] = {}
        for file in self.files:
            delimiter = self.raw.delimiter or ("\t" if ".tsv" in file.suffixes else ",")
            header = self.raw.names or self._header(file, delimiter)
            if not header:
                self.faults.append(f"{self.name}: {file}: is empty, without a header; remove it")
                continue
            self.check(file, header)
            if len({name.lower() for name in header}) < len(header):
                self.faults.append(
                    f"{self.name}: {file}: a column is named twice: {', '.join(header)}; rename one"
                )
            groups.setdefault((delimiter, *header), []).append(file)
        if self.faults:
            return
        selected = ", ".join(map(_quoted, self.needed))
        parts = [
            f"SELECT {selected}, NULL::VARCHAR AS {UNREADABLE_LINE} "
            f"FROM {self.read_csv(group, header, self._dialect(delimiter))}"
            for (delimiter, *header), group in groups.items()
        ]
        self.connection.raw_sql(f"CREATE TEMP TABLE {self.target} AS {' UNION ALL '.join(parts)}")
        self.add_rejects()

    def _dialect(self, delimiter: str) -> str:
        return (
            f"header = {self.raw.names is None}, delim = {_literal(delimiter)}, "
            f"quote = {_literal(self.raw.quote)}, escape = {_literal(self.raw.quote)}, "
            f"{self.keep_rejects()}"
        )

    def _header(self, file: Path, delimiter: str) -> tuple[str, ...]:
        source = self.read_csv([file], ["line"], _LINES)
        line = self.connection.con.execute(f"FROM {source} LIMIT 1").fetchone()
        if line is None or line[0] is None:
            return ()
        if len(delimiter) > 1 or not self.raw.quote:
            return tuple(line[0].split(delimiter))
        return tuple(next(csv.reader([line[0]], delimiter=delimiter, quotechar=self.raw.quote)))


class _JsonLines(_Scan):
    def run(self) -> None:
        lines = self.read_csv(self.files, ["line"], _LINES)
        parsed = "SELECT line, try_cast(line AS JSON) AS json FROM {} WHERE line IS NOT NULL"
        kinds = ", ".join(
            f"bool_or(json_exists(json, {path})), bool_or(json_type(json, {path}) = 'ARRAY')"
            for path in map(_json_path, self.needed)
        )
        seen = self.connection.con.execute(
            f"SELECT any_value(json_keys(json)), {kinds} FROM ({parsed.format(lines)})"
        ).fetchone()
        assert seen is not None
        keys, exists, lists = seen[0] or [], seen[1::2], seen[2::2]
        found = [c for c, present in zip(self.needed, exists, strict=True) if present]
        self.check(self.raw.path, dict.fromkeys([*keys, *found]))
        if self.faults:
            self.faults.append(f"{self.name}: {self.raw.path}: expects one JSON object per line")
            return
        selected = ", ".join(
            f"{_json_value(column, is_list)} AS {_quoted(column)}"
            for column, is_list in zip(self.needed, lists, strict=True)
        )
        lines = self.read_csv(self.files, ["line"], f"{_LINES}, {self.keep_rejects()}")
        self.connection.raw_sql(
            f"CREATE TEMP TABLE {self.target} AS SELECT {selected}, "
            f"CASE WHEN json IS NULL OR json_type(json) <> 'OBJECT' "
            f"THEN line[:{_REJECTED_CHARACTERS}] END AS {UNREADABLE_LINE} "
            f"FROM ({parsed.format(lines)})"
        )
        self.add_rejects()


def _json_value(column: str, is_list: bool) -> str:
    """A scalar as text; in a column that holds arrays, a list of texts (of one for a scalar)."""
    path = _json_path(column)
    text = f"json_extract_string(json, {path})"
    if not is_list:
        return text
    return (
        f"CASE WHEN json_type(json, {path}) = 'ARRAY' "
        f"THEN CAST(json_extract(json, {path}) AS VARCHAR[]) "
        f"WHEN {text} IS NOT NULL THEN [{text}] END"
    )


_LINES = f"header = false, delim = '{_WHOLE_LINE}', quote = '', escape = ''"


def _json_path(key: str) -> str:
    return _literal('$."' + key.replace('"', '\\"') + '"')


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _literal(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _literals(files: Sequence[Path]) -> str:
    return "[" + ", ".join(_literal(str(file)) for file in files) + "]"
