"""A Feast offline store whose point-in-time join is an as-of join.

Feast's own stores join every entity row with the whole history of its key and then keep the newest
match; their cost grows with rows × history. Here each feature view is one DuckDB ``ASOF LEFT
JOIN``: both sides are sorted once and merged. Everything else (materialisation, saved data sets,
logging) is Feast's DuckDB store, and so is the rare case that an as-of join cannot express
(``filter_by_created_timestamp``).

Chosen in ``feature_store.yaml`` by class path::

    offline_store:
      type: fathom.asof_store.AsofOfflineStore
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import ibis
import pandas as pd
import pyarrow as pa
from feast.feature_view import FeatureView
from feast.infra.offline_stores import offline_utils
from feast.infra.offline_stores.duckdb import (
    DuckDBOfflineStore,
    DuckDBOfflineStoreConfig,
    _read_data_source,
    _write_data_source,
)
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import RepoConfig
from feast.saved_dataset import SavedDatasetStorage
from ibis.expr.types import Table

_ROW = "__entity_row"
_MOMENT = "__entity_moment"
_UTC = "timestamp('UTC', 6)"


class AsofOfflineStoreConfig(DuckDBOfflineStoreConfig):
    """Configuration of `AsofOfflineStore`; it has no options of its own."""

    type: Literal["fathom.asof_store.AsofOfflineStore"] = "fathom.asof_store.AsofOfflineStore"


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
        """
        if not isinstance(entity_df, pd.DataFrame):
            raise TypeError(
                f"entity_df is a {type(entity_df).__name__}; this store takes a pandas DataFrame"
            )
        _in_utc()
        if filter_by_created_timestamp:
            return DuckDBOfflineStore.get_historical_features(
                config,
                feature_views,
                feature_refs,
                entity_df,
                registry,
                project,
                full_feature_names,
                filter_by_created_timestamp,
            )
        timestamp = offline_utils.infer_event_timestamp_from_entity_df(
            dict(zip(entity_df.columns, entity_df.dtypes, strict=True))
        )
        moments = pd.to_datetime(entity_df[timestamp], utc=True)
        views = [_view(view, feature_refs, full_feature_names, config) for view in feature_views]
        on_demand = OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry)
        return AsofRetrievalJob(
            entity_df,
            timestamp,
            views,
            on_demand,
            full_feature_names,
            RetrievalMetadata(
                features=feature_refs,
                keys=[name for name in entity_df.columns if name != timestamp],
                min_event_timestamp=moments.min(),
                max_event_timestamp=moments.max(),
            ),
            str(config.repo_path),
        )

    @staticmethod
    def pull_latest_from_table_or_query(*args: Any, **options: Any) -> RetrievalJob:
        """The newest row of each key in a span of time; see Feast's base class."""
        _in_utc()
        return DuckDBOfflineStore.pull_latest_from_table_or_query(*args, **options)

    @staticmethod
    def pull_all_from_table_or_query(*args: Any, **options: Any) -> RetrievalJob:
        """All rows in a span of time; see Feast's base class."""
        _in_utc()
        return DuckDBOfflineStore.pull_all_from_table_or_query(*args, **options)


@dataclass(frozen=True)
class _View:
    """What an as-of join needs to know of a feature view.

    ``keys`` maps the entity rows' columns to the source's; ``features`` the source's columns to
    the names in the result.
    """

    table: Table
    timestamp: str
    created: str | None
    keys: dict[str, str]
    features: dict[str, str]
    ttl: timedelta | None


class AsofRetrievalJob(RetrievalJob):
    """One as-of join per feature view, each read and joined on its own, side by side.

    The joins are narrow (keys, moment, the view's features), so the memory is that of the result
    and of one join.
    """

    def __init__(
        self,
        entity_df: pd.DataFrame,
        timestamp: str,
        views: list[_View],
        on_demand_feature_views: list[OnDemandFeatureView],
        full_feature_names: bool,
        metadata: RetrievalMetadata,
        repo_path: str,
    ) -> None:
        super().__init__()
        self._entity_rows = entity_df
        self._timestamp = timestamp
        self._views = views
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
        rows = self._entity_rows
        moments = pd.to_datetime(rows[self._timestamp], utc=True).dt.as_unit("us")
        result = pa.Table.from_pandas(
            rows.assign(**{self._timestamp: moments}), preserve_index=False
        )
        # pandas cannot read back what it says of Arrow-backed lists.
        result = result.replace_schema_metadata(None)
        spine = result.append_column(_ROW, pa.array(range(len(rows)), pa.int64()))
        for view in self._views:
            joined = _asof_join(spine, self._timestamp, view)
            for name in view.features.values():
                result = result.append_column(name, joined[name])
        return result

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return self._to_arrow_internal(timeout).to_pandas()

    def persist(
        self,
        storage: SavedDatasetStorage,
        allow_overwrite: bool = False,
        timeout: int | None = None,
    ) -> None:
        """Write the result where ``storage`` says."""
        _write_data_source(
            ibis.memtable(self.to_arrow()),
            storage.to_data_source(),
            self._repo_path,
            "overwrite",
            allow_overwrite,
        )


def _in_utc() -> None:
    """Make the session's wall clock UTC's, wherever the machine is.

    Feast selects spans of time by wall clock, and takes moments without a time zone as UTC.
    """
    ibis.get_backend().raw_sql("SET TimeZone = 'UTC'")


def _asof_join(spine: pa.Table, timestamp: str, view: _View) -> pa.Table:
    """The view's features for each row of the spine, in its order."""
    keys = {f"__key{i}": entity for i, entity in enumerate(view.keys)}
    left = ibis.memtable(
        spine.select([_ROW, timestamp, *keys.values()]).rename_columns([_ROW, _MOMENT, *keys])
    )
    moment = view.table[view.timestamp].cast(_UTC)
    right = view.table.select(
        **{name: view.table[view.keys[entity]] for name, entity in keys.items()},
        **{_MOMENT: moment},
        **{new: view.table[old] for old, new in view.features.items()},
        **({"__created": view.table[view.created]} if view.created else {}),
    )
    right = right.filter(*(right[name].notnull() for name in keys))
    if view.created:
        newest = ibis.window(group_by=[*keys, _MOMENT], order_by=right["__created"].desc())
        right = right.mutate(__rank=ibis.row_number().over(newest))
        right = right.filter(right["__rank"] == 0).drop("__rank", "__created")
    joined = left.asof_join(right, on=_MOMENT, predicates=list(keys), rname="{name}_found")
    found = joined[f"{_MOMENT}_found"]
    features = {name: joined[name] for name in view.features.values()}
    if view.ttl:
        alive = found + ibis.literal(view.ttl) >= joined[_MOMENT]
        features = {name: alive.ifelse(value, None) for name, value in features.items()}
    return joined.order_by(_ROW).select(**features).to_pyarrow()


def _view(
    view: FeatureView, feature_refs: list[str], full_feature_names: bool, config: RepoConfig
) -> _View:
    """Feast's projection, join-key map, field mapping and names, resolved."""
    source = view.batch_source
    if source is None:
        raise ValueError(f"feature view '{view.name}' has no batch source and cannot be queried")
    table = _read_data_source(source, str(config.repo_path))
    table = table.rename(
        {new: old for old, new in source.field_mapping.items() if old in table.columns}
    )
    wanted = view.projection.name_to_use()  # type: ignore[no-untyped-call]
    features = [ref.split(":")[1] for ref in feature_refs if ref.split(":")[0] == wanted]
    prefix = f"{view.projection.name_alias or view.name}__" if full_feature_names else ""
    mapped = view.projection.join_key_map
    return _View(
        table=table,
        timestamp=source.timestamp_field,
        created=source.created_timestamp_column or None,
        keys={mapped.get(key.name, key.name): key.name for key in view.entity_columns},
        features={name: prefix + name for name in features},
        ttl=view.ttl or None,
    )
