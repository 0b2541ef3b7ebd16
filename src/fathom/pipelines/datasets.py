"""Datasets that are written at once: a crash leaves the last complete state, never half a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset
from kedro.io.core import parse_dataset_definition
from kedro.utils import load_obj

from fathom import files
from fathom.features import packed_name
from fathom.increments import Carry, Past, State, Update, file_name

if TYPE_CHECKING:
    import pyarrow as pa
    from ibis.expr.types import Table

#: Where DuckDB would spill to: the folder that the process was started in.
_BESIDE = ".tmp"


class AtomicDataset(AbstractDataset[Any, Any]):
    """Any single-file Kedro dataset, saved to a temporary sibling and then renamed.

    Args:
        dataset: definition of the dataset, with its ``filepath``.
        optional: loads as None while there is no file.
    """

    def __init__(
        self,
        dataset: dict[str, Any],
        optional: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self._definition = dict(dataset)
        self._path = Path(self._definition["filepath"])
        self._optional = optional
        self.metadata = metadata

    def _at(self, path: Path) -> AbstractDataset[Any, Any]:
        kind, arguments = parse_dataset_definition(self._definition | {"filepath": str(path)})
        inner: AbstractDataset[Any, Any] = kind(**arguments)
        return inner

    def load(self) -> Any:
        if self._optional and not self._path.exists():
            return None
        return self._at(self._path).load()

    def save(self, data: Any) -> None:
        with files.replacing(self._path) as temporary:
            self._at(temporary).save(data)

    def preview(self) -> Any:
        """What Kedro-Viz shows."""
        return self._at(self._path).preview()  # type: ignore[attr-defined]

    def _exists(self) -> bool:
        return self._path.exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._path), "dataset": str(self._definition.get("type"))}


class RecordDataset(AtomicDataset):
    """A dataclass of plain values as one JSON file.

    Args:
        type_: its class, by path.
    """

    def __init__(self, filepath: str, type_: str, metadata: dict[str, Any] | None = None) -> None:
        super().__init__({"type": "json.JSONDataset", "filepath": filepath}, metadata=metadata)
        self._type = type_

    def load(self) -> Any:
        return load_obj(self._type)(**super().load())

    def save(self, data: Any) -> None:
        super().save(dataclasses.asdict(data))


class TableDataset(AbstractDataset[Any, Any]):
    """An Ibis (or Arrow) table as one parquet file; loads as an Ibis table.

    Args:
        optional: loads as None while there is no file.
    """

    def __init__(
        self, filepath: str, optional: bool = False, metadata: dict[str, Any] | None = None
    ) -> None:
        self._path = Path(filepath)
        self._optional = optional
        self.metadata = metadata

    def load(self) -> Table | None:
        if self._optional and not self._path.exists():
            return None
        return _connection().read_parquet(self._path)

    def save(self, data: Table | pa.Table) -> None:
        with files.replacing(self._path) as temporary:
            _write(data, temporary)

    def _exists(self) -> bool:
        return self._path.exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._path)}


class TablesDataset(AbstractDataset[Any, Any]):
    """Tables by name as a folder of parquet files, replaced as a whole."""

    def __init__(self, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._path = Path(filepath)
        self.metadata = metadata

    def load(self) -> dict[str, Table]:
        con = _connection()
        return {path.stem: con.read_parquet(path) for path in sorted(self._path.glob("*.parquet"))}

    def save(self, data: Mapping[str, Table]) -> None:
        with files.replacing(self._path) as temporary:
            temporary.mkdir()
            for name, table in data.items():
                _write(table, temporary / f"{name}.parquet")

    def _exists(self) -> bool:
        return self._path.is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._path)}


class SnapshotsDataset(AbstractDataset[Any, Any]):
    """Tables by name, each a folder of parquet files that later runs add files to.

    What is saved says for each table what to do: an `Update` adds its rows as one file, named by
    its last step, or takes the place of the whole folder; None removes it; tables that are not
    named stay as they are. Loads every table as all its files together.
    """

    def __init__(self, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._path = Path(filepath)
        self.metadata = metadata

    def load(self) -> dict[str, Table]:
        con = _connection()
        tables = {path.name: sorted(path.glob("*.parquet")) for path in _folders(self._path)}
        return {name: con.read_parquet(parts) for name, parts in tables.items() if parts}

    def save(self, data: Mapping[str, Update | None]) -> None:
        for name, update in data.items():
            folder = self._path / name
            if update is None:
                _remove(folder)
                continue
            path = folder / file_name(update.until)
            with files.replacing(folder if update.anew else path) as temporary:
                if update.anew:
                    temporary.mkdir()
                    temporary /= path.name
                _write(update.rows, temporary, lineage=update.lineage)

    def _exists(self) -> bool:
        return self._path.is_dir() and any(_folders(self._path))

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._path)}


class CarryDataset(AbstractDataset[Any, Any]):
    """What each feature view hands on to the next run, as one folder per view.

    It is saved after the view's files, and records what they are. So a run that was killed leaves
    either the old record, which the new files do not contradict, or the new one.

    Args:
        views, packed: folders of the two `SnapshotsDataset` that are recorded.
    """

    _STATE = "state.json"

    def __init__(
        self, filepath: str, views: str, packed: str, metadata: dict[str, Any] | None = None
    ) -> None:
        self._path = Path(filepath)
        self._recorded = {"views": Path(views), "packed": Path(packed)}
        self.metadata = metadata

    def load(self) -> dict[str, Past]:
        """What there is; nothing on the first run. A record that cannot be read is none."""
        con = _connection()
        past = {}
        for folder in _folders(self._path):
            try:
                record = json.loads((folder / self._STATE).read_text(encoding="utf-8"))
                state, written = State.model_validate(record["state"]), record["files"]
            except (OSError, ValueError, KeyError):
                continue
            parts = {path.stem: path for path in sorted(folder.glob("*.parquet"))}
            found = self._fingerprints(folder)
            own = [name for name in {*written, *found} if name.startswith("carry/")]
            intact = all(written.get(name) == found.get(name) for name in own)
            tables = {n: con.read_parquet(p) for n, p in parts.items()} if intact else {}
            past[folder.name] = Past(state, tables, written, found)
        return past

    def save(self, data: Mapping[str, Carry | None]) -> None:
        for view, carry in data.items():
            folder = self._path / view
            if carry is None:
                _remove(folder)
                continue
            with files.replacing(folder) as temporary:
                temporary.mkdir()
                for name, table in carry.parts.items():
                    _write(table, temporary / f"{name}.parquet")
                record = {
                    "state": carry.state.model_dump(),
                    "files": self._fingerprints(temporary),
                }
                files.write_json(temporary / self._STATE, record)

    def _fingerprints(self, carried: Path) -> dict[str, str]:
        """Of all files of a view, by ``<kind>/<name>``."""
        folders = {
            "carry": carried,
            "views": self._recorded["views"] / carried.name,
            "packed": self._recorded["packed"] / packed_name(carried.name),
        }
        return {
            f"{kind}/{path.name}": _fingerprint(path)
            for kind, folder in folders.items()
            for path in sorted(folder.glob("*.parquet"))
        }

    def _exists(self) -> bool:
        return self._path.is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._path)}


class PastDataset(CarryDataset):
    """What earlier runs of a node left for it: `CarryDataset`, as the input of who writes it.

    Kedro knows no node that reads its own output, so this is an entry of its own on the same
    folder.
    """


class RawDataset(TablesDataset):
    """Raw partitions: saved as `TablesDataset`, read and checked as validation wants them.

    Args:
        table: the table's name, for messages.
        optional: an empty folder loads as None rather than as an error.
    """

    def __init__(
        self,
        filepath: str,
        table: str,
        optional: bool = False,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(filepath, metadata)
        self._table = table
        self._optional = optional

    def load(self) -> Any:
        from fathom.validation import read_partitions

        _connection()
        if self._optional and not any(self._path.glob("*.parquet")):
            return None
        return read_partitions(self._path, self._table)


class FolderDataset(AbstractDataset[Any, Any]):
    """An object that saves itself to a folder and loads itself from one.

    Args:
        type_: its class by path, with ``save(folder)`` and ``load(folder)``.
    """

    def __init__(self, filepath: str, type_: str, metadata: dict[str, Any] | None = None) -> None:
        self._path = Path(filepath)
        self._type = type_
        self.metadata = metadata

    def load(self) -> Any:
        return load_obj(self._type).load(self._path)

    def save(self, data: Any) -> None:
        with files.replacing(self._path) as temporary:
            data.save(temporary)

    def _exists(self) -> bool:
        return self._path.is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._path), "type": self._type}


def _connection() -> Any:
    """The process's one embedded DuckDB, in UTC, spilling to disk rather than out of memory."""
    import ibis

    con = ibis.get_backend()
    settings = {
        "TimeZone": "UTC",
        "preserve_insertion_order": "true",
        "memory_limit": "4GB",
        "enable_progress_bar": "false",  # it would be drawn into the log
    }
    # Results are fetched, or the connection would take the next query for an interruption.
    [(spill,)] = con.raw_sql("SELECT current_setting('temp_directory')").fetchall()
    if spill == _BESIDE:  # and not in use yet, after which it cannot be changed
        settings["temp_directory"] = str(Path(tempfile.gettempdir()) / f"fathom-{os.getpid()}")
    for name, value in settings.items():
        con.raw_sql(f"SET {name} = '{value}'").fetchall()
    return con


def _write(table: Table | pa.Table, path: Path, **metadata: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if isinstance(table, pa.Table):
        pq.write_table(table, path, coerce_timestamps="us", compression="zstd")
    else:
        table.to_parquet(
            path, compression="zstd", **({"kv_metadata": metadata} if metadata else {})
        )


def _fingerprint(path: Path) -> str:
    """Size of a parquet file, and the SHA-256 of its footer, which is cheap to read.

    The footer holds the number of rows, and sizes and bounds of each column's pieces.
    """
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 8, 0))
        length = int.from_bytes(file.read(4), "little") + 8
        file.seek(max(size - length, 0))
        return f"{size}:{hashlib.sha256(file.read()).hexdigest()}"


def _folders(path: Path) -> list[Path]:
    """Folders in a folder, but for what a killed writer left."""
    found = path.iterdir() if path.is_dir() else []
    return sorted(p for p in found if p.is_dir() and not p.name.startswith("."))


def _remove(folder: Path) -> None:
    if folder.exists():
        files.remove(folder)
