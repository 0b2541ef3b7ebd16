"""The feature store: Feast objects generated from the spec, and the two ways to read them.

Offline, `FeatureRepo.training_frame` joins every exposure with what was known strictly before it.
Online, `fathom.online` serves one user row per request through Feast and holds the rest in memory.
Both end in `fathom.encoding.complete`, so a feature has one definition.

Objects, all derived from the `FeatureSpec`:

* an entity for each key that attributes or aggregates are looked up by;
* feature views ``users`` and ``items`` with the raw attributes, and one view for each log and set
  of keys in ``spec.views``;
* for each view keyed by user and something else, a ``…_packed`` view with one row per user, which
  is what is materialised online;
* an on-demand view for each cross, calling the encoder's own function;
* feature services ``wide``, ``deep`` and ``ranker``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml
from pydantic import BaseModel, ConfigDict

from fathom import files
from fathom.batch import Ragged
from fathom.encoding import Frame, Values, complete
from fathom.features import is_packable, packed_name, stored_name
from fathom.spec import ATTRIBUTES, CREATED_TIMESTAMP, EVENT_TIMESTAMP, Column, FeatureSpec

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView
    from feast.infra.registry.base_registry import BaseRegistry
    from feast.types import FeastType

CONTEXT = "context"
#: Before any row: attributes without a time of their own are stamped 1970-01-01.
_EVER = datetime(1900, 1, 1, tzinfo=timezone.utc)


class FeatureStoreError(RuntimeError):
    """The feature store is not in the state that was asked of it."""


class FeatureStoreConfig(BaseModel):
    """Where the store is and what it runs on (``params:feature_store``).

    Args:
        project: Feast's project name.
        folder: of the sources, the registry and the embedded online store.
        online_store, registry: Feast's own settings; ``{folder}`` is replaced.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    project: str = "fathom"
    folder: str = "data/04_feature"
    online_store: dict[str, Any] = {"type": "sqlite", "path": "{folder}/online.db"}
    registry: dict[str, Any] = {"registry_type": "sql", "path": "sqlite:///{folder}/registry.db"}


@dataclass(frozen=True)
class FeatureRepo:
    """The feature store of one deployment."""

    config: FeatureStoreConfig
    root: Path

    @property
    def folder(self) -> Path:
        """Absolute folder of sources, registry and online store."""
        return (self.root / self.config.folder).resolve()

    def source(self, view: str) -> Path:
        """The parquet file behind a feature view."""
        kind = "attributes" if view in ATTRIBUTES else "packed" if _is_packed(view) else "views"
        return self.folder / kind / f"{view}.parquet"

    def open(self) -> FeatureStore:
        """Feast's own handle. Its settings are also written to ``feature_store.yaml``."""
        from feast import FeatureStore

        path = self.folder / "feature_store.yaml"
        text = yaml.safe_dump(self._settings(), sort_keys=False)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            files.write_text(path, text)
        store = FeatureStore(repo_path=str(self.folder))
        _stamp_states(store.registry)
        return store

    def apply(self, spec: FeatureSpec) -> FeatureStore:
        """Make the registry hold exactly the objects of the spec.

        Raises:
            FeatureStoreError: sources are missing; names all of them.
        """
        views = self._views(spec)
        absent = [view.name for view in views if not self.source(view.name).exists()]
        if absent:
            raise FeatureStoreError(
                f"no source for feature views {absent} in {self.folder}; run the features pipeline"
            )
        store = self.open()
        crosses = [_cross_view(spec, i, views) for i in range(len(spec.crosses))]
        wanted = [*_entities(spec).values(), *views, *crosses, *_services(spec, views, crosses)]
        store.apply(wanted, objects_to_delete=_stale(store, wanted), partial=False)
        return store

    def training_frame(self, spine: pa.Table, spec: FeatureSpec) -> pa.Table:
        """Every feature of every exposure, as it was known strictly before it.

        Args:
            spine: one row per exposure: keys, ``event_timestamp``, context columns, and whatever
                should pass through (label, inclusion probability).

        Returns:
            The spine's columns and every column of the spec, in the spine's order.
        """
        import pandas as pd

        store = self.open()
        attributes = [f"{view}:{c.name}" for view, c in self._attribute_fields(spec)]
        aggregates = [
            f"{view}:{stored_name(c)}" for view, columns in spec.views.items() for c in columns
        ]
        table = spine
        # Twice, because attributes found by the first read are keys of the second.
        for references in (attributes, aggregates):
            if references:
                rows = table.to_pandas(types_mapper=pd.ArrowDtype)
                table = store.get_historical_features(rows, references).to_arrow()
        completed = complete(frame_of(table), spec)
        kept = [name for name in table.column_names if name in {*spine.column_names, *completed}]
        result = table.select([name for name in kept if not _computed(spec, name)])
        for column in spec.columns:
            if column.name not in result.column_names:
                result = result.append_column(column.name, to_arrow(completed[column.name]))
        return result

    def materialise(self, spec: FeatureSpec, until: datetime) -> None:
        """Load each user's newest row, as of ``until``, into the online store."""
        store = self.open()
        views = [view for view in self._views(spec) if view.online]
        store.materialize(
            _EVER,
            until + timedelta(microseconds=1),
            feature_views=[view.name for view in views],
        )

    def latest(self, view: str, spec: FeatureSpec) -> pa.Table:
        """The newest row of each key of a view: keys, fields, ``event_timestamp``."""
        store = self.open()
        found = store.get_feature_view(view)
        job = _offline_store(store).pull_latest_from_table_or_query(
            config=store.config,
            data_source=found.batch_source,
            join_key_columns=[key.name for key in found.entity_columns],
            feature_name_columns=[field.name for field in found.features],
            timestamp_field=EVENT_TIMESTAMP,
            created_timestamp_column=CREATED_TIMESTAMP,
            start_date=_EVER,
            end_date=datetime(2200, 1, 1, tzinfo=timezone.utc),
        )
        return job.to_arrow().drop_columns(CREATED_TIMESTAMP)

    def publish_embeddings(
        self, version: str, tables: Mapping[str, tuple[str, list[str], np.ndarray[Any, Any]]]
    ) -> None:
        """Make learned embeddings readable from Feast, stamped with the ranker's version.

        Args:
            tables: view name → (key column, keys of length R, vectors (R, D) float32).
        """
        from feast import Entity, FeatureService, Field, FileSource, ValueType
        from feast import FeatureView as View
        from feast.types import Array, Float32, String

        store = self.open()
        now = datetime.now().astimezone()
        views: list[Any] = []
        for name, (key, keys, vectors) in tables.items():
            path = self.folder / "embeddings" / version / f"{name}.parquet"
            stamps = pa.array([now] * len(keys), pa.timestamp("us", "UTC"))
            flat = pa.array(vectors.reshape(-1), pa.float32())
            offsets = pa.array(np.arange(0, vectors.size + 1, vectors.shape[1], dtype=np.int32))
            rows = pa.table(
                {
                    key: pa.array(keys, pa.string()),
                    "embedding": pa.ListArray.from_arrays(offsets, flat),
                    # On each row too: a key that this version lacks still has an older vector.
                    "version": pa.array([version] * len(keys), pa.string()),
                    EVENT_TIMESTAMP: stamps,
                    CREATED_TIMESTAMP: stamps,
                }
            )
            write_parquet(rows, path)
            views.append(
                View(
                    name=name,
                    entities=[Entity(name=key, join_keys=[key], value_type=ValueType.STRING)],
                    schema=[
                        Field(name="embedding", dtype=Array(Float32)),
                        Field(name="version", dtype=String),
                    ],
                    source=_file_source(FileSource, name, path),
                    ttl=timedelta(0),
                    online=True,
                    description=f"Learned embeddings of {key}, ranker {version}",
                    tags={"version": version, "width": str(vectors.shape[1])},
                )
            )
        service = FeatureService(name="embeddings", features=views, tags={"version": version})
        store.apply([*views, service], partial=True)
        store.materialize(
            _EVER,
            now + timedelta(seconds=1),
            feature_views=[view.name for view in views],
        )

    def _settings(self) -> dict[str, Any]:
        def fill(settings: dict[str, Any]) -> dict[str, Any]:
            return {
                key: value.replace("{folder}", str(self.folder))
                if isinstance(value, str)
                else value
                for key, value in settings.items()
            }

        return {
            "project": self.config.project,
            "provider": "local",
            "registry": fill(self.config.registry),
            "offline_store": {"type": "fathom.asof_store.AsofOfflineStore"},
            "online_store": fill(self.config.online_store),
            "entity_key_serialization_version": 3,
        }

    def _attribute_fields(self, spec: FeatureSpec) -> list[tuple[str, Column]]:
        """(view, column) of each attribute that is not itself the entity's key."""
        return [
            (view, column)
            for view, owner in ATTRIBUTES.items()
            for column in spec.raw_columns(owner)
            if column.name not in spec.keys
        ]

    def _views(self, spec: FeatureSpec) -> list[FeatureView]:
        """All feature views of the spec, without touching a registry."""
        fields: dict[str, list[Column]] = {}
        for view, column in self._attribute_fields(spec):
            fields.setdefault(view, []).append(column)
        keys = {"users": (spec.entities.user,), "items": (spec.entities.item,)}
        views = [self._view(spec, view, keys[view], columns) for view, columns in fields.items()]
        for view, columns in spec.views.items():
            by = columns[0].aggregate.by  # type: ignore[union-attr]
            views.append(self._view(spec, view, by, list(columns)))
            if is_packable(spec, view):
                views.append(self._packed_view(spec, view, by, list(columns)))
        return views

    def _view(
        self, spec: FeatureSpec, name: str, by: tuple[str, ...], columns: list[Column]
    ) -> FeatureView:
        from feast import FeatureView, Field, FileSource

        entities = _entities(spec)
        return FeatureView(
            name=name,
            entities=[entities[key] for key in by],
            schema=[
                Field(name=_stored(c), dtype=_feast_type(c), description=c.description)
                for c in columns
            ],
            source=_file_source(FileSource, name, self.source(name)),
            ttl=timedelta(0),
            online=by == (spec.entities.user,),
            description=f"{name}: {', '.join(c.name for c in columns)}",
            tags={"spec": spec.hash[:12], "owner": _owner(spec, by)},
        )

    def _packed_view(
        self, spec: FeatureSpec, view: str, by: tuple[str, ...], columns: list[Column]
    ) -> FeatureView:
        from feast import FeatureView, Field, FileSource
        from feast.types import Array, String

        name = packed_name(view)
        others = [key for key in by if key != spec.entities.user]
        return FeatureView(
            name=name,
            entities=[_entities(spec)[spec.entities.user]],
            schema=[
                *(Field(name=f"{view}__{key}", dtype=Array(String)) for key in others),
                *(
                    Field(name=f"{view}__{_stored(c)}", dtype=Array(_feast_type(c)))
                    for c in columns
                ),
            ],
            source=_file_source(FileSource, name, self.source(name)),
            ttl=timedelta(0),
            online=True,
            description=f"{view}, one row per user",
            tags={"spec": spec.hash[:12], "owner": "user"},
        )


# -- tables and frames ---------------------------------------------------------------------------


def frame_of(table: pa.Table) -> dict[str, Values]:
    """An Arrow table as a frame (see `fathom.encoding`); equal strings share one object."""
    return {name: _values(table[name]) for name in table.column_names}


def to_arrow(values: Values) -> pa.Array:
    """A frame's column as Arrow; the inverse of `frame_of`."""
    if isinstance(values, Ragged):
        return pa.ListArray.from_arrays(
            pa.array(values.offsets.astype(np.int32)), pa.array(values.values, pa.string())
        )
    return pa.array(values, from_pandas=False)


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write atomically, with the microsecond timestamps that Feast's reader needs."""
    import pyarrow.parquet as pq

    with files.replacing(path) as temporary:
        pq.write_table(table, temporary, coerce_timestamps="us", compression="zstd")


def _values(column: pa.ChunkedArray) -> Values:
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])
        flat = _values(pa.chunked_array([pc.list_flatten(column).combine_chunks()]))
        assert not isinstance(flat, Ragged)
        return Ragged(flat, offsets)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        encoded = column.cast(pa.string()).dictionary_encode().unify_dictionaries()
        if encoded.num_chunks == 0:
            return np.empty(0, object)
        distinct = np.array([*encoded.chunk(0).dictionary.to_pylist(), None], object)
        codes = [pc.fill_null(c.indices, len(distinct) - 1).to_numpy() for c in encoded.chunks]
        taken: np.ndarray[Any, Any] = distinct[np.concatenate(codes)]
        return taken
    if pa.types.is_timestamp(kind):
        moments: np.ndarray[Any, Any] = column.cast(pa.timestamp("us")).to_numpy()
        return moments
    if pa.types.is_decimal(kind) or pa.types.is_boolean(kind):
        column = column.cast(pa.float64())
    numbers: np.ndarray[Any, Any] = column.to_numpy()
    return numbers


# -- Feast objects -------------------------------------------------------------------------------


def _is_packed(view: str) -> bool:
    return view.endswith("_packed")


def _stored(column: Column) -> str:
    return stored_name(column) if column.aggregate else column.name


def _computed(spec: FeatureSpec, name: str) -> bool:
    """Whether `complete` changes the column, so that its stored form must not be kept."""
    column = spec.by_name.get(name)
    return column is not None and column.is_numeric


def _owner(spec: FeatureSpec, by: Iterable[str]) -> str:
    owners = {spec.owner(key) for key in by}
    return next(owner for owner in ("user", "context", "item") if owner in owners)


def _feast_type(column: Column) -> FeastType:
    from feast.types import Array, Float64, Int64, String

    if column.kind in {"multi", "sequence"}:
        return Array(String)
    if column.kind == "categorical":
        return String
    measure = column.aggregate.measure if column.aggregate else None
    return {"count": Int64, "recency_days": Int64}.get(measure or "", Float64)


def _file_source(kind: Any, name: str, path: Path) -> Any:
    return kind(
        name=f"{name}_source",
        path=str(path),
        timestamp_field=EVENT_TIMESTAMP,
        created_timestamp_column=CREATED_TIMESTAMP,
    )


def _entities(spec: FeatureSpec) -> dict[str, Any]:
    from feast import Entity, ValueType

    keys = [spec.entities.user, spec.entities.item]
    for columns in spec.views.values():
        keys += columns[0].aggregate.by  # type: ignore[union-attr]
    return {
        key: Entity(
            name=key,
            join_keys=[key],
            value_type=ValueType.STRING,
            description=spec.by_name[key].description if key in spec.by_name else "",
            tags={"owner": spec.owner(key)},
        )
        for key in dict.fromkeys(keys)
    }


def _cross_view(spec: FeatureSpec, index: int, views: list[FeatureView]) -> Any:
    """An on-demand view that computes one cross with the encoder's own function.

    Columns that no feature view holds (keys and context) are taken from the request.
    """
    from feast import Field, RequestSource
    from feast.on_demand_feature_view import OnDemandFeatureView
    from feast.transformation.pandas_transformation import PandasTransformation
    from feast.types import Array, Int64

    declared = spec.crosses[index]
    columns = [spec.by_name[name] for name in declared.columns]
    many = any(column.kind in {"multi", "sequence"} for column in columns)
    held = {field.name: view for view in views for field in view.features}
    requested = [column for column in columns if column.name not in held]
    sources: list[Any] = list(
        {held[c.name].name: held[c.name] for c in columns if c.name in held}.values()
    )
    if requested:
        sources.append(
            RequestSource(
                name=f"{CONTEXT}_{declared.name}",
                schema=[Field(name=c.name, dtype=_feast_type(c)) for c in requested],
            )
        )
    text = spec.to_json()

    # Unannotated: Feast resolves annotations, and refuses any but pandas' own.
    def evaluate(inputs):  # type: ignore[no-untyped-def]
        from fathom.feature_store import cross_of_rows

        return cross_of_rows(inputs, text, index)

    return OnDemandFeatureView(
        name=f"cross_{declared.name}",
        sources=sources,
        schema=[Field(name=declared.name, dtype=Array(Int64) if many else Int64)],
        feature_transformation=PandasTransformation(
            udf=evaluate, udf_string=f"fathom.feature_store.cross_of_rows(inputs, spec, {index})"
        ),
        mode="pandas",
        description=f"Cross of {' and '.join(declared.columns)}: 64-bit keys, 0 when missing",
        tags={"spec": spec.hash[:12]},
    )


def cross_of_rows(inputs: Any, spec_json: str, index: int) -> Any:
    """Evaluate a spec's cross on a data frame of raw values; the body of the on-demand views.

    Args:
        inputs: pandas, one column for each column of the cross; lists for multi-valued ones.

    Returns:
        A data frame of one column, the cross's name: keys as signed 64-bit integers.
    """
    import pandas as pd

    from fathom.encoding import evaluate_cross

    spec = FeatureSpec.from_json(spec_json)
    declared = spec.crosses[index]
    columns = [spec.by_name[name] for name in declared.columns]
    frame = {column.name: _column(column, inputs[column.name]) for column in columns}
    # Values from the store get the defaults of a training frame; those of a request have them.
    held = spec.model_copy(update={"columns": tuple(c for c in columns if not _asked(c))})
    moments = np.zeros(len(inputs), "datetime64[us]")
    frame |= complete(frame | {EVENT_TIMESTAMP: moments}, held)
    keys = evaluate_cross(declared, spec, frame)
    if isinstance(keys, Ragged):
        signed = keys.values.view(np.int64)
        lists = [signed[start:end].tolist() for start, end in pairwise(keys.offsets)]
        return pd.DataFrame({declared.name: lists}, index=inputs.index)
    return pd.DataFrame({declared.name: keys.view(np.int64)}, index=inputs.index)


def _asked(column: Column) -> bool:
    """Whether the column's value is not what a view holds, but computed from it at the moment."""
    return column.ratio is not None or (
        column.aggregate is not None and stored_name(column) != column.name
    )


def _column(column: Column, values: Any) -> Values:
    if column.kind in {"multi", "sequence"}:
        return Ragged.of([list(v) if v is not None and np.ndim(v) else [] for v in values])
    if column.is_numeric:
        return np.asarray(values, np.float32)
    texts = np.empty(len(values), object)
    texts[:] = [value if isinstance(value, str) else None for value in values]
    return texts


def _services(spec: FeatureSpec, views: list[FeatureView], crosses: list[Any]) -> list[Any]:
    """``wide``: what the wide part reads; ``deep``: the deep part; ``ranker``: all but crosses.

    On-demand views carry pickled code in the registry, so the service that the serving process
    uses, ``ranker``, has none.
    """
    from feast import FeatureService

    crossed = {name for cross in spec.crosses for name in cross.columns}

    def chosen(keep: Callable[[Column], bool]) -> list[Any]:
        kept = [column for column in spec.columns if keep(column)]
        parts = {name for c in kept if c.ratio for name in (c.ratio.of, c.ratio.to)}
        names = {column.name for column in kept} | parts
        wanted = {_stored(c) for c in spec.columns if c.name in names and c.ratio is None}
        picked = []
        for view in views:
            fields = [field.name for field in view.features if field.name in wanted]
            if fields:
                picked.append(view[fields])
        return picked

    tags = {"spec": spec.hash[:12]}
    services = {
        "wide": [*chosen(lambda c: c.wide or c.name in crossed), *crosses],
        "deep": chosen(lambda c: c.deep),
        "ranker": list(views),
    }
    return [
        FeatureService(name=name, features=features, tags=tags)
        for name, features in services.items()
        if features
    ]


def _stale(store: FeatureStore, wanted: list[Any]) -> list[Any]:
    """Registered objects that the spec no longer has; embeddings and theirs are not the spec's."""
    from feast.feature_view import DUMMY_ENTITY_NAME

    views = store.list_batch_feature_views()
    published = [view for view in views if "version" in view.tags]
    registered: list[Any] = [
        *(item for item in store.list_feature_services() if "version" not in item.tags),
        *store.list_on_demand_feature_views(),
        *(view for view in views if view not in published),
        *(item for item in store.list_entities() if item.name != DUMMY_ENTITY_NAME),
        *store.list_data_sources(),
    ]
    names = {_identity(item) for item in wanted}
    for item in [*wanted, *published]:
        names |= {_identity(source) for source in _sources(item)}
    names |= {("Entity", name) for view in published for name in view.entities}
    return [item for item in registered if _identity(item) not in names]


def _identity(item: Any) -> tuple[str, str]:
    return type(item).__name__, item.name


def _sources(item: Any) -> list[Any]:
    """The data sources that come and go with a feature view."""
    requested = getattr(item, "source_request_sources", {}).values()
    batch = getattr(item, "batch_source", None)
    return [*requested, *([batch] if batch else [])]


def _stamp_states(registry: BaseRegistry) -> None:
    """Give each state of the registry that is read a version of its own.

    Feast caches a registry's objects by the state's address in memory and its version, which the
    SQL registry leaves empty: a new state at the address of a collected one would pass for it.
    """
    read = registry.proto

    def stamped() -> Any:
        state = read()
        state.version_id = str(uuid4())
        return state

    registry.proto = stamped  # type: ignore[method-assign]
    registry.refresh()


def _offline_store(store: FeatureStore) -> Any:
    from fathom.asof_store import AsofOfflineStore

    assert isinstance(store.config.offline_store.type, str)
    return AsofOfflineStore


__all__ = ["FeatureRepo", "FeatureStoreConfig", "FeatureStoreError", "Frame"]
