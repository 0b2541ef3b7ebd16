"""Feast's embedded online store, safe to share, exact about time and fast to read.

Feast's own SQLite store keeps one row per feature and writes without asking what it overwrites.
Here a feature view is a table with one row per entity and one column per feature, in WAL mode:

* readers never wait for a writer, and see a batch whole or not at all, whenever its writer dies;
* a row is replaced only by one with a later event timestamp, or an equal one that was not created
  earlier; of a row that brings some of the features only, the others are kept;
* moments are microseconds of UTC, whatever the machine's time zone is;
* nearest neighbours are found exactly, by comparing the query with every vector of the view.

Chosen in ``feature_store.yaml`` by class path::

    online_store:
      type: fathom.sqlite_store.WalSqliteOnlineStore
      path: /data/online.db
"""

from __future__ import annotations

import itertools
import logging
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from feast import Entity, FeatureView
from feast.infra.infra_object import InfraObject
from feast.infra.key_encoding_utils import deserialize_entity_key, serialize_entity_key
from feast.infra.online_stores.sqlite import SqliteOnlineStore, SqliteOnlineStoreConfig
from feast.infra.online_stores.sqlite import _table_id as table_id
from feast.protos.feast.core.Registry_pb2 import Registry
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import RepoConfig
from numpy.typing import NDArray
from pydantic import Field as Bounded

Floats = NDArray[np.float64]
Values = dict[str, Value]
Row = tuple[EntityKey, Values, datetime, datetime | None]
Found = tuple[datetime | None, Values | None]

METRICS = ("L2", "cosine", "inner_product")
_TYPE: Final = "fathom.sqlite_store.WalSqliteOnlineStore"
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)
#: Feast's project names cannot start with an underscore, so no view's table has this name.
_STATES = "_states"
#: How often a thread looks whether its file was replaced, by `make clean` say.
_LOOK_SECONDS = 1.0
_KEYS_PER_QUERY = 10_000
_ROWS_PER_BLOCK = 8192
#: Connections that a fork copied. SQLite forbids the child even to close them.
_inherited: list[sqlite3.Connection] = []

log = logging.getLogger(__name__)


class OnlineStoreError(RuntimeError):
    """SQLite refused; the message names the file and what to do."""


class WalSqliteOnlineStoreConfig(SqliteOnlineStoreConfig):
    """Settings of `WalSqliteOnlineStore` in ``feature_store.yaml``.

    Args:
        path: the database; relative ones are below the feature repository. SQLite keeps ``-wal``
            and ``-shm`` beside it, and needs a local disk.
        busy_timeout_seconds: how long a writer waits for another one. Readers wait for nobody.
    """

    type: Literal["fathom.sqlite_store.WalSqliteOnlineStore"] = _TYPE  # type: ignore[assignment]
    busy_timeout_seconds: float = Bounded(60.0, ge=0.0, le=3600.0)


@dataclass
class _Held:
    """A thread's connection, what it must be given up for, and when that was last looked at."""

    connection: sqlite3.Connection
    process: int
    file: tuple[int, int]
    looked: float


@dataclass(frozen=True)
class _Vectors:
    """All vectors of a view: ``keys`` of length R rising, ``matrix`` (R, D) float32."""

    state: bytes
    keys: list[bytes]
    matrix: NDArray[np.float32]


class WalSqliteOnlineStore(SqliteOnlineStore):
    """Feast's online store on SQLite in WAL mode. Safe to share between threads and processes."""

    _versioned_read_supported = True  # which Feast otherwise finds out by importing every store

    def __init__(self) -> None:
        self._thread = threading.local()
        self._vectors: dict[tuple[str, str], _Vectors] = {}
        self._loading = threading.Lock()

    # -- Feast's interface -----------------------------------------------------------------------

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[Row],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Write rows in one transaction, each unless a newer one is stored.

        Raises:
            OnlineStoreError: nothing was written.
        """
        name = _name(config, table)
        with self._transaction(config, "write to") as connection:
            extra = dict.fromkeys(itertools.chain.from_iterable(row[1] for row in data), "BYTES")
            _add_columns(connection, name, extra | _types(table))
            for features, rows in itertools.groupby(data, key=lambda row: tuple(row[1])):
                connection.executemany(_upsert(name, features), _encoded(rows, config))
            _mark(connection, name)
        if progress:
            progress(len(data))

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[Found]:
        """The row of each key: event timestamp in UTC and the features that were written.

        Raises:
            OnlineStoreError: the view was never applied to this database, or it cannot be read.
        """
        features = tuple(requested_features or [field.name for field in table.features])
        keys = [_key(key, config) for key in entity_keys]
        try:
            found = _select(self._get_conn(config), _name(config, table), features, keys)
        except sqlite3.Error as error:
            raise _fault("read", self._get_db_path(config), error) from error
        return [_decoded(found.get(key), features) for key in keys]

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """Give each view its table. Values of a feature that was dropped or retyped go."""
        with self._transaction(config, "apply feature views to") as connection:
            for view in tables_to_keep:
                name = _name(config, view)
                held = _columns(connection, name)
                if held and "event_us" not in held:
                    log.warning(
                        "%s: %s was written by Feast's own SqliteOnlineStore and starts empty; "
                        "materialise it again",
                        self._get_db_path(config),
                        name,
                    )
                    connection.execute(f"DROP TABLE {_quoted(name)}")
                _drop_columns(connection, name, view)
                _add_columns(connection, name, _types(view))
                _mark(connection, name)
            _drop(connection, [_name(config, view) for view in tables_to_delete])

    def plan(self, config: RepoConfig, desired_registry_proto: Registry) -> list[InfraObject]:
        """Nothing that Feast could make by itself: `update` makes the tables."""
        return []

    def teardown(
        self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]
    ) -> None:
        """Drop the views' tables. The file stays: other processes may have it open."""
        with self._transaction(config, "tear down") as connection:
            _drop(connection, [_name(config, view) for view in tables])

    def retrieve_online_documents_v2(
        self,
        config: RepoConfig,
        table: FeatureView,
        requested_features: list[str],
        embedding: list[float] | None,
        top_k: int,
        distance_metric: str | None = None,
        query_string: str | None = None,
        filters: Any = None,
        include_feature_view_version_metadata: bool = False,
    ) -> list[tuple[datetime | None, EntityKey | None, Values | None]]:
        """The ``top_k`` rows nearest to a vector, with their ``distance``, **in key order**.

        Of rows equally near, the first in the order of stored keys are taken. They are returned
        by key rather than by distance because Feast 0.67 joins the keys of its answer with the
        values as though they were: in any other order each key would get another one's values.

        Args:
            embedding: the query, as wide as the vectors of the view's vector field.
            distance_metric: ``L2`` (Euclidean), ``cosine`` (1 − cosine) or ``inner_product``
                (negated, so that less is nearer for every metric).

        Raises:
            ValueError: an argument is out of bounds, or asks for search by text or by filters.
            OnlineStoreError: the view was never applied to this database, or it cannot be read.
        """
        if embedding is None or query_string is not None or filters is not None:
            raise ValueError(
                f"query_string={query_string!r} and filters={filters!r}: "
                "this store searches by vector alone; pass an embedding and no others"
            )
        found = self._nearest(config, table, requested_features, embedding, top_k, distance_metric)
        return [
            (moment, key, {**(values or {}), "distance": Value(float_val=distance)})
            for (moment, values), key, distance in sorted(found, key=lambda row: _rank(row[1]))
        ]

    def retrieve_online_documents(
        self,
        config: RepoConfig,
        table: FeatureView,
        requested_features: list[str],
        embedding: list[float],
        top_k: int,
        distance_metric: str | None = None,
    ) -> list[tuple[datetime | None, EntityKey | None, Value | None, Value | None, Value | None]]:
        """Feast's older form: event timestamp, key, vector twice and distance, nearest first."""
        field = _vector_field(table)
        found = self._nearest(config, table, [field], embedding, top_k, distance_metric)
        return [
            (moment, key, values[field], values[field], Value(float_val=distance))
            for (moment, values), key, distance in found
            if values
        ]

    # -- vectors ---------------------------------------------------------------------------------

    def _nearest(
        self,
        config: RepoConfig,
        table: FeatureView,
        features: list[str],
        embedding: Sequence[float],
        top_k: int,
        metric: str | None,
    ) -> list[tuple[Found, EntityKey, float]]:
        """Rows with key and distance, nearest first, all of one moment."""
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be 1 or more")
        name, field = _name(config, table), _vector_field(table)
        with self._transaction(config, "read", "DEFERRED") as connection:
            vectors = self._loaded(connection, name, field)
            try:
                far = distances(vectors.matrix, embedding, metric or config.online_store.similarity)
            except ValueError as error:
                raise ValueError(f"{table.name}:{field}: {error}") from None
            chosen = _smallest(far, top_k)
            keys = [vectors.keys[i] for i in chosen]
            rows = _select(connection, name, tuple(features), keys)
        version = config.entity_key_serialization_version
        return [
            (_decoded(rows[key], features), deserialize_entity_key(key, version), float(distance))
            for key, distance in zip(keys, far[chosen], strict=True)
        ]

    def _loaded(self, connection: sqlite3.Connection, name: str, field: str) -> _Vectors:
        """The vectors as the transaction sees them; read again only after a write."""
        query = f"SELECT state FROM {_STATES} WHERE name = ?"
        state = (connection.execute(query, (name,)).fetchone() or (b"",))[0]
        held = self._vectors.get((name, field))
        if held is None or held.state != state:
            with self._loading:
                held = self._vectors.get((name, field))
                if held is None or held.state != state:
                    held = self._vectors[name, field] = _load(connection, name, field, state)
        return held

    # -- connections -----------------------------------------------------------------------------

    def _get_conn(self, config: RepoConfig) -> sqlite3.Connection:
        """This thread's connection; a new one after a fork or when the file was replaced."""
        held: _Held | None = getattr(self._thread, "held", None)
        now, process = time.monotonic(), os.getpid()
        if held and held.process == process and now < held.looked + _LOOK_SECONDS:
            return held.connection
        path = self._get_db_path(config)
        if held and held.process == process and held.file == _identity(path):
            held.looked = now
            return held.connection
        if held and held.process == process:
            held.connection.close()
        elif held:
            _inherited.append(held.connection)
        connection = _connect(path, config.online_store.busy_timeout_seconds)
        self._thread.held = _Held(connection, process, _identity(path), now)
        return connection

    @contextmanager
    def _transaction(
        self, config: RepoConfig, act: str, kind: Literal["IMMEDIATE", "DEFERRED"] = "IMMEDIATE"
    ) -> Iterator[sqlite3.Connection]:
        try:
            connection = self._get_conn(config)
            connection.execute(f"BEGIN {kind}")
            try:
                yield connection
                connection.execute("COMMIT")
            finally:
                if connection.in_transaction:
                    connection.rollback()
        except sqlite3.Error as error:
            raise _fault(act, self._get_db_path(config), error) from error


# -- SQLite --------------------------------------------------------------------------------------


def _connect(path: str, busy_timeout_seconds: float) -> sqlite3.Connection:
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OnlineStoreError(
            f"cannot open the online store {path}: {error}; name a path that can be written"
        ) from error
    connection = sqlite3.connect(
        path,
        timeout=busy_timeout_seconds,
        isolation_level=None,
        check_same_thread=False,  # whichever thread lets go of it last closes it
    )
    deadline = time.monotonic() + busy_timeout_seconds
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            break
        except sqlite3.Error as error:
            # SQLite does not wait when several processes meet at a new file to switch its mode.
            if not _is(error, "SQLITE_BUSY") or time.monotonic() > deadline:
                connection.close()
                raise
            time.sleep(0.01)
    if mode != "wal":
        connection.close()
        raise OnlineStoreError(
            f"{path} cannot be switched to WAL mode, it stays in {mode!r}; "
            "put the online store on a local disk"
        )
    # In WAL mode NORMAL can lose the last batches in a power cut but never damages the file.
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(f"PRAGMA journal_size_limit = {64 << 20}")
    return connection


def _identity(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return (0, 0)
    return found.st_dev, found.st_ino


def _select(
    connection: sqlite3.Connection, name: str, features: tuple[str, ...], keys: list[bytes]
) -> dict[bytes, tuple[Any, ...]]:
    """Stored rows by key: key, event_us, then the features' bytes."""
    found = {}
    for start in range(0, len(keys), _KEYS_PER_QUERY):
        some = keys[start : start + _KEYS_PER_QUERY]
        for row in connection.execute(_selection(name, features, len(some)), some):
            found[row[0]] = row
    return found


@lru_cache(maxsize=256)
def _selection(name: str, features: tuple[str, ...], count: int) -> str:
    # Qualified, because SQLite takes a quoted name that is no column for a text.
    columns = ", ".join(
        ["t.entity_key", "t.event_us", *(f"t.{_quoted(_column(f))}" for f in features)]
    )
    marks = ", ".join("?" * count)
    return f"SELECT {columns} FROM {_quoted(name)} AS t WHERE t.entity_key IN ({marks})"


def _upsert(name: str, features: tuple[str, ...]) -> str:
    columns = ["event_us", "created_us", *(_quoted(_column(feature)) for feature in features)]
    return f"""
        INSERT INTO {_quoted(name)} AS t (entity_key, {", ".join(columns)})
        VALUES ({", ".join("?" * (len(columns) + 1))})
        ON CONFLICT (entity_key) DO UPDATE
        SET {", ".join(f"{column} = excluded.{column}" for column in columns)}
        WHERE excluded.event_us > t.event_us
        OR (excluded.event_us = t.event_us AND ifnull(excluded.created_us >= t.created_us, TRUE))
    """


def _columns(connection: sqlite3.Connection, name: str) -> dict[str, str]:
    """Declared type of each column; none if there is no such table."""
    return dict(connection.execute("SELECT name, type FROM pragma_table_info(?)", (name,)))


def _add_columns(connection: sqlite3.Connection, name: str, features: dict[str, str]) -> None:
    """Make a view's table, or what it lacks. A column's type is Feast's of the feature."""
    connection.execute(f"CREATE TABLE IF NOT EXISTS {_STATES} (name TEXT PRIMARY KEY, state BLOB)")
    connection.execute(
        f"CREATE TABLE IF NOT EXISTS {_quoted(name)} "
        "(entity_key BLOB PRIMARY KEY NOT NULL, event_us INTEGER NOT NULL, created_us INTEGER)"
    )
    held = _columns(connection, name)
    for feature, kind in features.items():
        if _column(feature) not in held:
            connection.execute(
                f"ALTER TABLE {_quoted(name)} ADD COLUMN {_quoted(_column(feature))} {kind}"
            )


def _drop_columns(connection: sqlite3.Connection, name: str, view: FeatureView) -> None:
    """Drop features that the view no longer has, or has with another type."""
    types = {_column(feature): kind for feature, kind in _types(view).items()}
    # On-demand views also store what they were computed from.
    known = types.keys() | {_column(field.name) for field in getattr(view, "schema", ())}
    for column, kind in _columns(connection, name).items():
        dropped = column.startswith(_column("")) and column not in known
        if dropped or types.get(column, kind) != kind:
            connection.execute(f"ALTER TABLE {_quoted(name)} DROP COLUMN {_quoted(column)}")


def _mark(connection: sqlite3.Connection, name: str) -> None:
    """Tell whoever holds the view's vectors that they changed."""
    connection.execute(f"INSERT OR REPLACE INTO {_STATES} VALUES (?, randomblob(16))", (name,))


def _drop(connection: sqlite3.Connection, names: Iterable[str]) -> None:
    for name in names:
        connection.execute(f"DROP TABLE IF EXISTS {_quoted(name)}")


def _is(error: sqlite3.Error, *codes: str) -> bool:
    return getattr(error, "sqlite_errorname", "").startswith(codes)


def _fault(act: str, path: str, error: sqlite3.Error) -> OnlineStoreError:
    remedies = {
        ("SQLITE_FULL",): "free some space and repeat; what was stored before is intact",
        ("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_AUTH"): (
            "this user must be able to write the file, its -wal and -shm, and their folder"
        ),
        ("SQLITE_BUSY", "SQLITE_LOCKED"): (
            "another process is writing; repeat when it is done, or raise busy_timeout_seconds"
        ),
        ("SQLITE_CORRUPT", "SQLITE_NOTADB"): (
            "delete it with its -wal and -shm, apply the feature views and materialise again"
        ),
        ("SQLITE_IOERR",): "the disk or its file system fails; see the system's log",
        ("SQLITE_ERROR",): (
            "apply the feature views to this online store and materialise them again"
        ),
    }
    remedy = next((text for codes, text in remedies.items() if _is(error, *codes)), "")
    reason = f"{error}; {remedy}" if remedy else str(error)
    return OnlineStoreError(f"cannot {act} the online store {path}: {reason}")


# -- names and values ----------------------------------------------------------------------------


def _name(config: RepoConfig, table: FeatureView) -> str:
    versioned = config.registry.enable_online_feature_view_versioning
    return str(table_id(config.project, table, versioned))


def _column(feature: str) -> str:
    return f"f_{feature}"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _types(view: FeatureView) -> dict[str, str]:
    return {field.name: field.dtype.to_value_type().name for field in view.features}


def _key(key: EntityKey, config: RepoConfig) -> bytes:
    return bytes(serialize_entity_key(key, config.entity_key_serialization_version))


def _encoded(rows: Iterable[Row], config: RepoConfig) -> Iterator[tuple[Any, ...]]:
    for key, values, event, created in rows:
        blobs = (value.SerializeToString() for value in values.values())
        yield (_key(key, config), _microseconds(event), _microseconds(created), *blobs)


def _decoded(row: tuple[Any, ...] | None, features: Sequence[str]) -> Found:
    if row is None:
        return None, None
    values = {
        feature: Value.FromString(blob)
        for feature, blob in zip(features, row[2:], strict=True)
        if blob is not None
    }
    return (_EPOCH + row[1] * _MICROSECOND, values) if values else (None, None)


def _microseconds(moment: datetime | None) -> int | None:
    """Since 1970 in UTC, which moments without a zone are taken to be in."""
    if moment is None or moment != moment:  # NaT, pandas' missing moment
        return None
    aware = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return (aware - _EPOCH) // _MICROSECOND


def _rank(key: EntityKey) -> tuple[Any, ...]:
    """Feast's own order of keys."""
    return tuple(getattr(value, value.WhichOneof("val")) for value in key.entity_values)


# -- exact search --------------------------------------------------------------------------------


def distances(
    matrix: NDArray[np.float32], query: Sequence[float], metric: str
) -> NDArray[np.float32]:
    """Distance of each row to the query: less is nearer for every metric.

    Args:
        matrix: (R, D).
        query: D finite numbers.
        metric: one of `METRICS`, in upper or lower case: the Euclidean distance; one less the
            cosine, which is 1 for a vector of zeros; the inner product, negated.

    Returns:
        (R,), computed in double precision for each row by itself and then rounded, so that equal
        rows are equally far.

    Raises:
        ValueError: names the metric, the width or the values of the query.
    """
    known = {name.lower(): name for name in METRICS}
    if metric.lower() not in known:
        raise ValueError(f"the distance metric is {metric!r}; it must be one of {list(METRICS)}")
    point = np.asarray(query, np.float64)
    if point.ndim != 1 or not np.isfinite(point).all():
        raise ValueError(f"the query has shape {point.shape}; it must be finite numbers in a row")
    if len(matrix) and point.shape != matrix.shape[1:]:
        raise ValueError(
            f"the query has {len(point)} numbers, the stored vectors have {matrix.shape[1]}"
        )
    far = np.empty(len(matrix), np.float32)
    for start in range(0, len(matrix), _ROWS_PER_BLOCK):
        block = matrix[start : start + _ROWS_PER_BLOCK].astype(np.float64)
        far[start : start + len(block)] = _distances(block, point, known[metric.lower()])
    return far


def _distances(block: Floats, point: Floats, metric: str) -> Floats:
    if metric == "L2":
        return _lengths(block - point)
    product: Floats = np.einsum("rd,d->r", block, point)
    if metric == "inner_product":
        return -product
    norms = _lengths(block) * _lengths(point[None, :])
    return 1.0 - np.divide(product, norms, out=np.zeros_like(product), where=norms > 0.0)


def _lengths(rows: Floats) -> Floats:
    lengths: Floats = np.sqrt(np.einsum("rd,rd->r", rows, rows))
    return lengths


def _smallest(far: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Rows of the ``count`` smallest, rising; of equal ones the first."""
    if count < len(far):
        limit = np.partition(far, count - 1)[count - 1]
        near = np.flatnonzero(~(far > limit))
    else:
        near = np.arange(len(far))
    order: NDArray[np.int64] = near[np.argsort(far[near], kind="stable")][:count]
    return order


def _vector_field(table: FeatureView) -> str:
    types = _types(table)
    fields = [f for f in table.features if types[f.name] in {"FLOAT_LIST", "DOUBLE_LIST"}]
    chosen = [field.name for field in fields if field.vector_index] or [f.name for f in fields]
    if len(chosen) != 1:
        raise ValueError(
            f"feature view {table.name} has the vector fields {chosen}; "
            "mark exactly one with vector_index=True"
        )
    return str(chosen[0])


def _load(connection: sqlite3.Connection, name: str, field: str, state: bytes) -> _Vectors:
    column = f"t.{_quoted(_column(field))}"
    query = f"SELECT t.entity_key, {column} FROM {_quoted(name)} AS t WHERE length({column}) > 0"
    keys, vectors = [], []
    for key, blob in connection.execute(f"{query} ORDER BY t.entity_key"):
        value = Value.FromString(blob)
        vector = value.float_list_val.val or value.double_list_val.val
        if vector:
            keys.append(key)
            vectors.append(vector)
    widths = sorted({len(vector) for vector in vectors})
    if len(widths) > 1:
        raise ValueError(
            f"{name}:{field} holds vectors of {widths} numbers; they must be one width"
        )
    width = widths[0] if widths else 0
    return _Vectors(state, keys, np.array(vectors, np.float32).reshape(len(keys), width))
