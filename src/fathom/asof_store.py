"""A Feast offline store whose point-in-time join is an as-of join.

Feast's own stores join every entity row with the whole history of its key and then keep the newest
match; their cost grows with rows × history. Here each feature view is one DuckDB ``ASOF LEFT
JOIN``: both sides are sorted once and merged, on disk where memory ends, and the result is read in
record batches; a saved data set never stands in memory as a whole. Materialisation reads through
the same source reader; the rest is Feast's DuckDB store.

A source is a parquet file, a folder with parquet files at any depth, or a pattern of either. Its
files are listed once, when the job is made, so one that is added later is read by the next job;
names that start with a dot are passed over. Feast reads all other sources, into memory.

Chosen in ``feature_store.yaml`` by class path::

    offline_store:
      type: fathom.asof_store.AsofOfflineStore
"""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from glob import glob
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import ibis
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from feast.data_format import ParquetFormat
from feast.data_source import DataSource
from feast.errors import EntityTimestampInferenceException, SavedDatasetLocationAlreadyExists
from feast.feature_view import DUMMY_ENTITY_ID, FeatureView
from feast.infra.offline_stores import offline_utils
from feast.infra.offline_stores.duckdb import (
    DuckDBOfflineStore,
    DuckDBOfflineStoreConfig,
    _read_data_source,
    _write_data_source,
)
from feast.infra.offline_stores.file_source import FileSource
from feast.infra.offline_stores.ibis import pull_all_from_table_or_query_ibis
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import RepoConfig
from feast.saved_dataset import SavedDatasetStorage
from ibis.expr import datatypes as dt
from ibis.expr.types import Table
from pydantic import Field

from fathom import files

_ROW, _MOMENT = "__entity_row", "__entity_moment"
_EVENT, _CREATED, _KNOWN, _OUTDATED = "__event", "__created", "__known", "__outdated"
_UTC = "timestamp('UTC', 6)"
_EARLIEST, _LATEST = (end.replace(tzinfo=timezone.utc) for end in (datetime.min, datetime.max))
_BATCH_ROWS = 1 << 17
#: Up to so many entity rows have few keys: the others' history is dropped before it is sorted.
_FEW_ROWS = 100_000


class EntityRowsError(ValueError):
    """The entity rows lack a column, or have one that cannot be what it must be."""


class FeatureSourceError(ValueError):
    """The source of a feature view is missing or lacks a column."""


class AsofOfflineStoreConfig(DuckDBOfflineStoreConfig):
    """Configuration of `AsofOfflineStore`.

    Args:
        memory_limit: of a job's joins, beside the entity rows and the result; what is more is
            sorted on disk.
        temp_directory: where to sort on disk, in a folder of the job's own; the system's choice if
            not given.
    """

    type: Literal["fathom.asof_store.AsofOfflineStore"] = "fathom.asof_store.AsofOfflineStore"
    memory_limit: str = Field("2GB", pattern=r"^\d+(\.\d+)? ?[KMGT]i?B$")
    temp_directory: str | None = None


class AsofOfflineStore(DuckDBOfflineStore):
    """Feast's DuckDB offline store with as-of joins for historical features."""

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        filter_by_created_timestamp: bool = False,
    ) -> RetrievalJob:
        """Features of each entity row as they were known at its timestamp.

        Returns:
            A job whose table has the entity rows in their order, their own columns first.

        Raises:
            TypeError: ``entity_df`` is a query; this store takes data frames.
            EntityRowsError: names every column that the entity rows lack or have too many of.
            FeatureSourceError: names every source that is missing or lacks columns.
        """
        if not isinstance(entity_df, pd.DataFrame):
            raise TypeError(
                f"entity_df is a {type(entity_df).__name__}; this store takes a pandas DataFrame"
            )
        backend = _connect(config)
        views, faults = [], []
        for view in feature_views:
            try:
                views.append(_view(view, feature_refs, full_feature_names, config, backend))
            except FeatureSourceError as error:
                faults.append(f"feature view '{view.name}': {error}")
        if faults:
            raise FeatureSourceError("; ".join(faults))
        rows, timestamp = _entity_rows(entity_df, views)
        ends = pc.min_max(rows[timestamp]).as_py()
        spine = _registered(backend, _spine(rows, timestamp, views))
        few = len(rows) <= _FEW_ROWS
        joins = [_asof_join(spine, few, view, ends, filter_by_created_timestamp) for view in views]
        return AsofRetrievalJob(
            rows,
            joins,
            OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry),
            full_feature_names,
            RetrievalMetadata(
                features=feature_refs,
                keys=[name for name in rows.column_names if name != timestamp],
                min_event_timestamp=ends["min"],
                max_event_timestamp=ends["max"],
            ),
            str(config.repo_path),
        )

    @staticmethod
    def pull_latest_from_table_or_query(*args: Any, **options: Any) -> RetrievalJob:
        """The newest row of each key in a span of time; see Feast's base class.

        Raises:
            FeatureSourceError: the source is missing or lacks columns.
        """
        theirs = DuckDBOfflineStore.pull_latest_from_table_or_query
        asked = inspect.signature(theirs).bind(*args, **options).arguments
        job: Any = pull_all_from_table_or_query_ibis(**asked, **_source_reader(**asked))
        keys, created = asked["join_key_columns"], asked.get("created_timestamp_column")
        job.table = _newest(job.table, keys, asked["timestamp_field"], created)
        found: RetrievalJob = job
        return found

    @staticmethod
    def pull_all_from_table_or_query(*args: Any, **options: Any) -> RetrievalJob:
        """All rows in a span of time; see Feast's base class.

        Raises:
            FeatureSourceError: the source is missing or lacks columns.
        """
        theirs = DuckDBOfflineStore.pull_all_from_table_or_query
        asked = inspect.signature(theirs).bind(*args, **options).arguments
        return pull_all_from_table_or_query_ibis(**asked, **_source_reader(**asked))


class AsofRetrievalJob(RetrievalJob):
    """The entity rows and one as-of join per feature view, to be set side by side.

    The joins are narrow (keys, moment, the view's features) and run one after the other, so the
    memory is that of the result and of one join.
    """

    def __init__(
        self,
        rows: pa.Table,
        joins: list[Table],
        on_demand_feature_views: list[OnDemandFeatureView],
        full_feature_names: bool,
        metadata: RetrievalMetadata,
        repo_path: str,
    ) -> None:
        super().__init__()
        self._rows = rows
        self._joins = joins
        self._on_demand_feature_views = on_demand_feature_views
        self._full_feature_names = full_feature_names
        self._metadata = metadata
        self._repo_path = repo_path

    @property
    def full_feature_names(self) -> bool:
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        return self._on_demand_feature_views

    @property
    def metadata(self) -> RetrievalMetadata | None:
        return self._metadata

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self._table(pa.RecordBatchReader.read_all)

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return self._to_arrow_internal(timeout).to_pandas()

    def persist(
        self,
        storage: SavedDatasetStorage,
        allow_overwrite: bool = False,
        timeout: int | None = None,
    ) -> None:
        """Write the result where ``storage`` says: all or nothing, and not all in memory.

        (Both hold for local parquet. On-demand views take the whole result, other storage too.)

        Raises:
            SavedDatasetLocationAlreadyExists: there is one, and ``allow_overwrite`` is not given.
        """
        target: Any = storage.to_data_source()
        if not _is_local_parquet(target):
            table = ibis.memtable(self.to_arrow())
            _write_data_source(table, target, self._repo_path, "overwrite", allow_overwrite)
            return
        path = Path(FileSource.get_uri_for_file_path(self._repo_path, target.path))
        if path.exists() and not allow_overwrite:
            raise SavedDatasetLocationAlreadyExists(location=target.path)
        with files.replacing(path) as file:
            folder = file.parent
            if self._on_demand_feature_views:
                table = self.to_arrow()
            else:
                table = self._table(lambda batches: _on_disk(batches, folder))
            if path.suffix != ".parquet":
                file.mkdir()
                file /= "part-0.parquet"
            pq.write_table(table, file)

    def _table(self, collect: Callable[[pa.RecordBatchReader], pa.Table]) -> pa.Table:
        """The entity rows and their features, of which ``collect`` makes a table per view."""
        table = self._rows
        for join in self._joins:
            found = collect(_batches(join))
            for name in found.column_names:
                table = table.append_column(name, found[name])
        return table


# -- the join ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _View:
    """What an as-of join needs to know of a feature view.

    ``table`` has the names that the source maps its columns to. ``keys`` maps its key columns to
    those of the entity rows; ``features`` its columns to the names in the result.
    """

    name: str
    table: Table
    timestamp: str
    created: str | None
    keys: dict[str, str]
    features: dict[str, str]
    ttl: timedelta | None


def _asof_join(
    spine: Table,
    few: bool,
    view: _View,
    ends: dict[str, datetime | None],
    filter_by_created_timestamp: bool,
) -> Table:
    """The view's features for each row of the spine, in its order.

    Args:
        few: whether the spine has few rows.
        ends: the first and last moment of the spine.
    """
    keys = {f"__key{i}": entity for i, entity in enumerate(view.keys.values())}
    rows = spine.select(_ROW, _MOMENT, **{name: spine[key] for name, key in keys.items()})
    history = _history(view, ends)
    if few and keys:
        history = history.semi_join(rows.select(*keys).distinct(), list(keys))
    known = rows[_MOMENT]
    if view.created and filter_by_created_timestamp:
        history = _as_created(history, list(keys))
    elif view.created:
        created = history[_CREATED].fill_null(_EARLIEST)
        history = history.mutate(**{_KNOWN: _at(history[_EVENT], created)})
        known = known.isnull().ifelse(None, _at(known, ibis.literal(_LATEST)))
    else:
        history = history.mutate(**{_KNOWN: history[_EVENT]})
    rows = rows.mutate(**{_KNOWN: known})
    joined = rows.asof_join(
        history, on=rows[_KNOWN] >= history[_KNOWN], predicates=list(keys), rname="{name}_found"
    )
    features = {name: joined[name] for name in view.features.values()}
    if view.ttl:
        alive = joined[_EVENT] + _span(view.ttl) >= joined[_MOMENT]
        features = {name: alive.ifelse(value, None) for name, value in features.items()}
    return joined.order_by(_ROW).select(**features)


def _history(view: _View, ends: dict[str, datetime | None]) -> Table:
    """The view's keys, times and features, of rows that moments between ``ends`` can see."""
    table, first, last = view.table, ends["min"], ends["max"]
    history = table.select(
        **{f"__key{i}": table[key] for i, key in enumerate(view.keys)},
        **{_EVENT: table[view.timestamp].cast(_UTC)},
        **({_CREATED: table[view.created].cast(_UTC)} if view.created else {}),
        **{new: table[old] for old, new in view.features.items()},
    )
    if first and last:
        history = history.filter(history[_EVENT] <= ibis.literal(last))
        if view.ttl and first - _EARLIEST > view.ttl:
            history = history.filter(history[_EVENT] >= ibis.literal(first - view.ttl))
    return history


def _as_created(history: Table, keys: list[str]) -> Table:
    """A row is known from its event or its creation on, whichever is later.

    One that came after a newer one is left out, as it never counts. Of those that are left, the
    last to be known is always the newest, and an as-of join finds it.
    """
    history = history.filter(history[_CREATED].notnull())
    history = history.mutate(**{_KNOWN: ibis.greatest(history[_EVENT], history[_CREATED])})
    newest_first = [history[_EVENT].desc(), history[_CREATED].desc()]
    newer = ibis.window(group_by=keys, order_by=newest_first, rows=(None, -1))
    history = history.mutate(**{_OUTDATED: history[_KNOWN].min().over(newer)})
    return history.filter(history[_OUTDATED].isnull() | (history[_KNOWN] < history[_OUTDATED]))


def _at(event: Any, created: Any) -> Any:
    """A time of two parts: that of the event and, where events tie, that of the creation."""
    return ibis.struct({"event": event, "created": created})


def _batches(join: Table) -> pa.RecordBatchReader:
    """A query's rows as they come (Ibis 12 asks DuckDB 2 for them by a name that is gone)."""
    backend = join.get_backend()
    batches = backend.con.sql(backend.compile(join)).to_arrow_reader(_BATCH_ROWS)
    return batches.cast(join.schema().to_pyarrow())


def _on_disk(batches: pa.RecordBatchReader, folder: Path) -> pa.Table:
    """The batches as a table in a file below ``folder``, read from there where it is used."""
    path = str(folder / f"{uuid4().hex}.arrow")
    with pa.ipc.new_file(path, batches.schema) as file:
        for batch in batches:
            file.write_batch(batch)
    return pa.ipc.open_file(pa.memory_map(path)).read_all()


# -- entity rows ---------------------------------------------------------------------------------


def _entity_rows(entity_df: pd.DataFrame, views: list[_View]) -> tuple[pa.Table, str]:
    """The entity rows as Arrow, with their moments in UTC, and the name of the moments' column."""
    names = list(entity_df.columns)
    faults, timestamp = [], ""
    try:
        timestamp = offline_utils.infer_event_timestamp_from_entity_df(
            dict(zip(names, entity_df.dtypes, strict=True))
        )
    except EntityTimestampInferenceException:
        faults.append("it has no column 'event_timestamp', nor exactly one of moments")
    else:
        if _holds_numbers(entity_df[timestamp]):
            faults.append(f"its '{timestamp}' holds numbers: convert them with pandas.to_datetime")
    for view in views:
        missing = sorted({*view.keys.values()}.difference(names))
        taken = sorted({*view.features.values()}.intersection(names))
        if missing:
            faults.append(f"it lacks {missing}, by which feature view '{view.name}' is keyed")
        if taken:
            faults.append(
                f"its {taken} are also features of feature view '{view.name}': rename them, or "
                "ask for full feature names"
            )
    if not faults:
        moments = pd.to_datetime(entity_df[timestamp], utc=True).dt.as_unit("us")
        others = [name for name in names if name != timestamp]
        columns = pa.Table.from_pandas(entity_df, columns=others, preserve_index=False)
        rows = pa.table({n: moments if n == timestamp else columns[n] for n in names})
        faults = [fault for view in views for fault in _mistyped(rows, view)]
    if faults:
        raise EntityRowsError(f"entity_df has the columns {names}, but {'; '.join(faults)}")
    # Without what pandas says of its columns: it cannot read that of Arrow-backed lists.
    return rows.replace_schema_metadata(None), timestamp


def _holds_numbers(values: pd.Series) -> bool:
    if values.dtype != object:
        return bool(pd.api.types.is_numeric_dtype(values))
    return pd.api.types.infer_dtype(values) in {"integer", "floating", "mixed-integer-float"}


def _mistyped(rows: pa.Table, view: _View) -> list[str]:
    """The keys that cannot equal those of the source, in words."""
    faults = []
    for key, name in view.keys.items():
        ours = dt.DataType.from_pyarrow(rows.schema.field(name).type)
        theirs = view.table[key].type()
        alike = type(ours) is type(theirs) or (ours.is_numeric() and theirs.is_numeric())
        if not alike and not ours.is_null():
            faults.append(
                f"its '{name}' is {ours}, where feature view '{view.name}' has {theirs}: convert it"
            )
    return faults


def _span(time: timedelta) -> Any:
    """A span of time. (Ibis refuses one of days and microseconds together as a literal.)"""
    return ibis.interval(microseconds=time // timedelta(microseconds=1))


def _spine(rows: pa.Table, timestamp: str, views: list[_View]) -> pa.Table:
    """What the joins need of the entity rows: their numbers, moments and keys."""
    spine = {_ROW: np.arange(len(rows)), _MOMENT: rows[timestamp]}
    for view in views:
        for key, name in view.keys.items():
            missing = pa.types.is_null(rows[name].type)  # all of them: what they would be is lost
            kind = view.table[key].type().to_pyarrow() if missing else rows[name].type
            spine[name] = rows[name].cast(kind)
    return pa.table(spine)


def _newest(table: Table, keys: list[str], event: str, created: str | None) -> Table:
    """The newest row of each key; by a third of the work of Feast's window over all rows."""
    # A row whose creation is not known gives way to one of the same moment whose is.
    rank = {"event": table[event]}
    if created:
        rank["created"] = table[created].cast(_UTC).fill_null(ibis.literal(_EARLIEST, _UTC))
    others = ibis.struct({name: table[name] for name in table.columns if name not in keys})
    newest = table.group_by(keys).aggregate(_row=others.argmax(ibis.struct(rank)))
    return newest.unpack("_row").select(*table.columns)


# -- sources -------------------------------------------------------------------------------------


def _connect(config: RepoConfig) -> Any:
    """A DuckDB of the job's own, so that no other query of the process meets its settings.

    Its wall clock is UTC's, wherever the machine is: Feast selects spans of time by wall clock, and
    takes moments without a time zone as UTC.
    """
    settings = config.offline_store
    folder = Path(settings.temp_directory or tempfile.gettempdir())
    folder.mkdir(parents=True, exist_ok=True)
    backend = ibis.duckdb.connect(
        memory_limit=settings.memory_limit,
        temp_directory=str(folder / f"fathom-{uuid4().hex}"),  # made when needed, and removed
    )
    backend.raw_sql("SET TimeZone = 'UTC'")
    return backend


def _registered(backend: Any, rows: pa.Table) -> Table:
    name = f"arrow_{uuid4().hex}"
    backend.con.register(name, rows)
    return backend.table(name)


def _view(
    view: FeatureView,
    feature_refs: list[str],
    full_feature_names: bool,
    config: RepoConfig,
    backend: Any,
) -> _View:
    """Feast's projection, join-key map, field mapping and names, resolved."""
    source = view.batch_source
    if source is None:
        raise FeatureSourceError("it has no batch source, so it has no history to read")
    table = _read(source, str(config.repo_path), backend)
    table = table.rename(
        {new: old for old, new in source.field_mapping.items() if old in table.columns}
    )
    wanted = view.projection.name_to_use()  # type: ignore[no-untyped-call]
    features = [ref.split(":")[1] for ref in feature_refs if ref.split(":")[0] == wanted]
    prefix = f"{view.projection.name_alias or view.name}__" if full_feature_names else ""
    mapped = view.projection.join_key_map
    keys = [key.name for key in view.entity_columns if key.name != DUMMY_ENTITY_ID]
    created = source.created_timestamp_column or None
    _require([*keys, *features, source.timestamp_field, created], table, source)
    return _View(
        name=wanted,
        table=table,
        timestamp=source.timestamp_field,
        created=created,
        keys={key: mapped.get(key, key) for key in keys},
        features={name: prefix + name for name in features},
        ttl=view.ttl or None,
    )


def _source_reader(
    config: RepoConfig,
    join_key_columns: list[str],
    feature_name_columns: list[str],
    timestamp_field: str,
    created_timestamp_column: str | None = None,
    **_: Any,
) -> dict[str, Any]:
    """What Feast's functions on Ibis need to read and write sources as this store does."""
    backend = _connect(config)
    columns = [*join_key_columns, *feature_name_columns, timestamp_field, created_timestamp_column]

    def read(source: DataSource, repo_path: str) -> Table:
        table = _read(source, repo_path, backend)
        _require(columns, table, source)
        return table

    store = config.offline_store
    return {
        "data_source_reader": read,
        "data_source_writer": _write_data_source,
        "staging_location": store.staging_location,
        "staging_location_endpoint_override": store.staging_location_endpoint_override,
    }


def _read(source: Any, repo_path: str, backend: Any) -> Table:
    if not _is_local_parquet(source):
        return _registered(backend, _read_data_source(source, repo_path).to_pyarrow())
    # Feast's writers take a path from the repository on, its DuckDB reader from the working folder.
    paths = [Path(FileSource.get_uri_for_file_path(repo_path, source.path)), Path(source.path)]
    found = next(filter(None, map(_parquet_files, paths)), None)
    if found is None:
        raise FeatureSourceError(
            f"source '{source.name}' has no parquet files at {paths[0]}: run what writes them, or "
            "correct the path"
        )
    return backend.read_parquet(found, union_by_name=True)


def _parquet_files(path: Path) -> list[str]:
    """The files that a path means now: itself, those below it, or those that match it."""
    if path.is_file():
        return [str(path)]
    found = set()
    for root in [path] if path.is_dir() else map(Path, glob(str(path), recursive=True)):
        for file in root.rglob("*.parquet") if root.is_dir() else [root]:
            hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
            if file.suffix == ".parquet" and file.is_file() and not hidden:
                found.add(str(file))
    return sorted(found)


def _require(columns: Iterable[str | None], table: Table, source: DataSource) -> None:
    absent = sorted({name for name in columns if name}.difference(table.columns))
    if absent:
        raise FeatureSourceError(
            f"{getattr(source, 'path', source.name)} has no columns {absent}, only "
            f"{sorted(table.columns)}: write them, or ask for others"
        )


def _is_local_parquet(source: Any) -> bool:
    return (
        isinstance(source, FileSource)
        and isinstance(source.file_format, ParquetFormat | None)
        and "://" not in source.path
    )
