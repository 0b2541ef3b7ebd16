"""Datasets that are written at once: a crash leaves the last complete state, never half a file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kedro.io import AbstractDataset
from kedro.io.core import parse_dataset_definition
from kedro.utils import load_obj

from fathom import files

if TYPE_CHECKING:
    import pyarrow as pa
    from ibis.expr.types import Table


class AtomicDataset(AbstractDataset[Any, Any]):
    """Any single-file Kedro dataset, saved to a temporary sibling and then renamed.

    Args:
        dataset: definition of the dataset, with its ``filepath``.
    """

    def __init__(self, dataset: dict[str, Any], metadata: dict[str, Any] | None = None) -> None:
        self._definition = dict(dataset)
        self._path = Path(self._definition["filepath"])
        self.metadata = metadata

    def _at(self, path: Path) -> AbstractDataset[Any, Any]:
        kind, arguments = parse_dataset_definition(self._definition | {"filepath": str(path)})
        inner: AbstractDataset[Any, Any] = kind(**arguments)
        return inner

    def load(self) -> Any:
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


class TableDataset(AbstractDataset[Any, Any]):
    """An Ibis (or Arrow) table as one parquet file; loads as an Ibis table."""

    def __init__(self, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._path = Path(filepath)
        self.metadata = metadata

    def load(self) -> Table:
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
    con.raw_sql("SET TimeZone = 'UTC'")
    con.raw_sql("SET preserve_insertion_order = true")
    con.raw_sql("SET memory_limit = '4GB'")
    return con


def _write(table: Table | pa.Table, path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if isinstance(table, pa.Table):
        pq.write_table(table, path, coerce_timestamps="us", compression="zstd")
    else:
        table.to_parquet(path, compression="zstd")
