"""The feature store: Feast's registry and stores, filled from the spec, and the ways to read them.

Offline, `FeatureRepo.training_frame` joins every exposure with what was known strictly before it.
Online, `fathom.online` serves one user row per request through Feast and holds the rest in memory.
Both end in `fathom.encoding.expire` and `complete`, so a feature has one definition.

::

    <folder>/
      attributes/, views/, packed/   sources of the feature views (the features pipeline's)
      embeddings/<version>/          learned embeddings, one folder per published ranker
      registry.db, online.db         Feast's, in the embedded deployment
      online.json                    per view, what the online store holds
      .lock                          held while the registry or the online store changes
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import (
    AbstractContextManager,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
)
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from io import StringIO
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
from fathom.encoding import FrameError, Values, complete, expire
from fathom.features import (
    is_packable,
    packed_name,
    stamp_name,
    stored_fields,
    stored_name,
)
from fathom.spec import ATTRIBUTES, CREATED_TIMESTAMP, EVENT_TIMESTAMP, FeatureSpec

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView
    from feast.infra.registry.base_registry import BaseRegistry

    from fathom.feast_objects import FeastObjects

#: Before any row: attributes without a time of their own are stamped 1970-01-01.
_EVER = datetime(1900, 1, 1, tzinfo=timezone.utc)
_END = datetime(2200, 1, 1, tzinfo=timezone.utc)
_MICROSECOND = timedelta(microseconds=1)
#: Keys whose row online is compared with the one offline after each materialisation.
_SAMPLE = 100
#: Earlier champions whose embeddings stay published.
_KEPT = 3
#: Which of Feast's services points to the champion's embeddings.
EMBEDDINGS = "embeddings"

log = logging.getLogger(__name__)


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
    online_store: dict[str, Any] = {
        "type": "fathom.sqlite_store.WalSqliteOnlineStore",
        "path": "{folder}/online.db",
    }
    registry: dict[str, Any] = {
        "registry_type": "sql",
        # Seconds that a writer waits for another one.
        "path": "sqlite:///{folder}/registry.db?timeout=60",
    }


@dataclass(frozen=True)
class FeatureRepo:
    """The feature store of one deployment. Whatever changes it holds its lock."""

    config: FeatureStoreConfig
    root: Path

    @property
    def folder(self) -> Path:
        """Absolute folder of sources, registry and online store."""
        return (self.root / self.config.folder).resolve()

    def source(self, view: str) -> Path:
        """Where a feature view's rows lie: a parquet file, or for aggregates a folder of them."""
        if view in ATTRIBUTES:
            return self.folder / "attributes" / f"{view}.parquet"
        return self.folder / ("packed" if view.endswith("_packed") else "views") / view

    def open(self) -> FeatureStore:
        """Feast's own handle. The folder need not be writable, if a registry is there already."""
        feast = _feast()
        # As Feast does with its file, so that passwords can stay in the environment.
        config = feast.RepoConfig(**yaml.safe_load(os.path.expandvars(self._settings_text())))
        config.repo_path = self.folder
        with self._opening():
            store: FeatureStore = feast.FeatureStore(str(self.folder), config)
            _stamp_states(store.registry)
        return store

    # -- filling --------------------------------------------------------------------------------

    def apply(self, spec: FeatureSpec) -> FeatureStore:
        """Make the registry hold exactly the objects of the spec.

        Raises:
            FeatureStoreError: sources are missing; names all of them.
        """
        objects = self._objects(spec)
        absent = [view.name for view in objects.views if not _has_rows(self.source(view.name))]
        if absent:
            raise FeatureStoreError(
                f"no source for feature views {absent} in {self.folder}; run the features pipeline"
            )
        with self._changing():
            self._write_settings()
            store = self.open()
            stale = _stale(store, objects.all)
            store.apply(objects.all, objects_to_delete=stale, partial=False)
            self._forget({item.name for item in stale})
        return store

    def check(self, spec: FeatureSpec) -> FeatureStore:
        """Compare the registry and the sources with the spec, before anything is read from them.

        Raises:
            FeatureStoreError: names every view that is absent, and every field that is absent or
                of another type, in the registry or in the source.
        """
        from fathom.feast_objects import view_faults

        store = self.open()
        registered = {view.name: view for view in store.list_batch_feature_views()}
        faults: list[str] = []
        for wanted in self._objects(spec).views:
            found = registered.get(wanted.name)
            faults += view_faults(found, wanted, self.source(wanted.name))
        if faults:
            raise FeatureStoreError(
                f"the feature store in {self.folder} is not the spec's: {'; '.join(faults)}; run "
                "the features and feature_store pipelines (kedro run --pipelines "
                "features,feature_store)"
            )
        return store

    def materialise(
        self, spec: FeatureSpec, until: datetime, lineages: Mapping[str, str] | None = None
    ) -> dict[str, int]:
        """Load each user's newest row, as of ``until``, into the online store.

        Only rows that are newer than the last materialisation are written, unless the view's
        source is another (`lineages`) or the online store has lost or changed rows. Afterwards a
        sample of users is read back and compared.

        Args:
            lineages: view → id of the computation that its source continues; all rows of a view
                with another id are written anew.

        Returns:
            How many rows were written, by view.

        Raises:
            FeatureStoreError: the online store does not return what was written.
        """
        with self._changing():
            store = self.check(spec)
            held = self._online()
            written = {}
            for view in (view.name for view in self._objects(spec).views if view.online):
                lineage = (lineages or {}).get(view, "")
                known = held.get(view)
                start = _EVER
                if known and known["lineage"] == lineage:
                    start = datetime.fromisoformat(known["until"]) + _MICROSECOND
                if known and datetime.fromisoformat(known["until"]) > until:
                    log.info("%s: online rows are from after %s; written anew", view, until)
                    self._forget({view})
                    _empty(store, view)
                    start = _EVER
                written[view] = self._load(store, view, start, until)
                if lost := self._differing(store, view, until):
                    log.warning(
                        "%s: %d of the sampled online rows differ; written anew", view, lost
                    )
                    # Some stores keep a row that has the same moment as the new one.
                    self._forget({view})
                    _empty(store, view)
                    written[view] = self._load(store, view, _EVER, until)
                    lost = self._differing(store, view, until)
                    if lost:
                        raise FeatureStoreError(
                            f"{lost} sampled rows of '{view}' differ between the online store and "
                            "its source right after they were written; empty the online store "
                            "and run the feature_store pipeline again"
                        )
                held[view] = {"until": until.isoformat(), "lineage": lineage}
                files.write_json(self.folder / "online.json", held)
        return written

    def materialised(self, spec: FeatureSpec) -> datetime | None:
        """The moment up to which every online view of the spec was loaded; None if one never was.

        Cheap: no call to Feast.
        """
        held = self._online()
        online = {"users"} if spec.held("users") else set()
        online |= {_online_name(spec, view) for view in spec.views if _has_user(spec, view)}
        if not online <= set(held):
            return None
        moments = [datetime.fromisoformat(held[view]["until"]) for view in online]
        return min(moments, default=None)

    def publish_embeddings(
        self,
        version: str,
        tables: Mapping[str, tuple[str, list[str], np.ndarray[Any, Any]]],
        keep: Sequence[str] = (),
    ) -> None:
        """Make a ranker's learned embeddings readable and searchable through Feast.

        They get views of their own, so those of other versions stay as they are: whoever reads
        the champion's version from the registry of rankers, and then `embeddings`, never sees a
        mixture. Feast's service ``embeddings`` points to the newest published.

        Args:
            tables: view name → (key column, keys of length R, vectors (R, D) float32).
            keep: earlier champions, the newest last; the embeddings of the last few stay for a
                roll-back, all others are removed.
        """
        from feast import FeatureService

        from fathom.feast_objects import embedding_view

        if not tables:
            return
        now = datetime.now(timezone.utc)
        self._mark(version).unlink(missing_ok=True)
        views: list[Any] = []
        for name, (key, keys, vectors) in tables.items():
            path = self.folder / EMBEDDINGS / version / f"{name}.parquet"
            write_parquet(_embedding_rows(key, keys, vectors, now), path)
            view = embedding_name(name, version)
            views.append(embedding_view(view, key, path, vectors.shape[1], version))
        with self._changing():
            self._write_settings()
            store = self.open()
            store.apply(views, partial=True)
            store.materialize(_EVER, now + timedelta(seconds=1), [view.name for view in views])
            # One row of the registry: readers of the service see the old views or the new ones.
            service = FeatureService(
                name=EMBEDDINGS,
                features=views,
                tags={"version": version},
                description=f"Learned embeddings of ranker {version}",
            )
            store.apply([service], partial=True)
            kept = {version, *list(keep)[-_KEPT:]}
            old = [v for v in _published(store) if v.tags["version"] not in kept]
            store.apply([], objects_to_delete=[*old, *_only_theirs(store, old)], partial=False)
            self._mark(version).touch()
        for folder in (self.folder / EMBEDDINGS).iterdir():
            if folder.name not in kept and not folder.name.startswith("."):
                files.remove(folder)

    def has_embeddings(self, version: str) -> bool:
        """Whether a version's embeddings are published, all of them."""
        return self._mark(version).exists()

    # -- reading --------------------------------------------------------------------------------

    def training_frame(
        self,
        spine: pa.Table,
        spec: FeatureSpec,
        user_as_of: str = EVENT_TIMESTAMP,
        tables_as_of: str = EVENT_TIMESTAMP,
    ) -> pa.Table:
        """Every feature of every exposure, as it was known strictly before it.

        Args:
            spine: one row per exposure: keys, ``event_timestamp``, context columns, and whatever
                should pass through (label, inclusion probability).
            user_as_of, tables_as_of: timestamp columns of the spine at which views with the user
                among their keys, and the other views, are looked up; a replay names the moments
                that serving had reached. Ages are measured at ``event_timestamp``.

        Returns:
            The spine's columns and every column of the spec, in the spine's order.

        Raises:
            FeatureStoreError: the registry or a source is not the spec's (`check`).
        """
        store = self.check(spec)
        table = spine
        # Attributes first, because the aggregates' keys are among them.
        for views in (tuple(ATTRIBUTES), tuple(spec.views)):
            fields: dict[str, list[str]] = {user_as_of: [], tables_as_of: []}
            for view in views:
                moment = user_as_of if _has_user(spec, view) else tables_as_of
                fields[moment] += [f"{view}:{name}" for name in _fields(spec, view)]
            for moment, references in fields.items():
                if references:
                    table = _joined(store, table, references, moment, spec)
            table = _expired(table, spec, views)
        return _completed(table, spine, spec)

    def latest(self, view: str, spec: FeatureSpec, until: datetime | None = None) -> pa.Table:
        """The newest row of each key of a view: keys, fields, ``event_timestamp``.

        Args:
            until: rows after this moment do not count.
        """
        store = self.open()
        job = _latest(store, store.get_feature_view(view), _EVER, until or _END)
        return job.to_arrow().drop_columns(CREATED_TIMESTAMP)

    def embeddings(self, view: str, version: str, keys: Sequence[str]) -> list[Any]:
        """Learned vectors by key; None where the version has none.

        Args:
            view: ``user_embeddings`` or ``item_embeddings``.
        """
        store = self.open()
        name = embedding_name(view, version)
        (key,) = store.get_feature_view(name).entities
        rows = [{key: value} for value in keys]
        found: list[Any] = store.get_online_features([f"{name}:embedding"], rows).to_dict()[
            "embedding"
        ]
        return found

    def nearest(
        self, view: str, version: str, query: Sequence[float], count: int
    ) -> list[tuple[str, float]]:
        """Keys whose vectors are nearest to a query, with 1 − cosine, the nearest first.

        Args:
            view: ``user_embeddings`` or ``item_embeddings``.
            query: of the view's width.
        """
        store = self.open()
        name = embedding_name(view, version)
        (key,) = store.get_feature_view(name).entities
        found = store.retrieve_online_documents_v2(
            features=[f"{name}:embedding"],
            query=[float(value) for value in query],
            top_k=count,
        ).to_dict()
        # Feast's answer is in the order of the keys, not of the distances.
        pairs = zip(found[key], found["distance"], strict=True)
        return sorted(pairs, key=lambda pair: (pair[1], pair[0]))

    # -- parts ----------------------------------------------------------------------------------

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

    def _settings_text(self) -> str:
        return yaml.safe_dump(self._settings(), sort_keys=False)

    def _write_settings(self) -> None:
        """For Feast's own tools; ours do not read them."""
        path, text = self.folder / "feature_store.yaml", self._settings_text()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            files.write_text(path, text)

    def _opening(self) -> AbstractContextManager[object]:
        """Feast makes a new registry's tables when it is first touched; two at once would fail."""
        if self.folder.exists() and not os.access(self.folder, os.W_OK):
            return nullcontext()
        return files.locked(self.folder / ".opening", wait=True)

    def _mark(self, version: str) -> Path:
        """Written last, so that a killed publication does not pass for a whole one."""
        return self.folder / EMBEDDINGS / version / "published"

    def _objects(self, spec: FeatureSpec) -> FeastObjects:
        from fathom.feast_objects import feast_objects

        return feast_objects(spec, self.source)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """One process at a time; others wait. The lock of a killed process is free."""
        with files.locked(self.folder / ".lock", wait=True):
            yield

    def _online(self) -> dict[str, dict[str, str]]:
        try:
            found: dict[str, dict[str, str]] = json.loads(
                (self.folder / "online.json").read_text(encoding="utf-8")
            )
        except FileNotFoundError:
            return {}
        return found

    def _forget(self, views: set[str]) -> None:
        """Their online rows went with them."""
        held = self._online()
        if views & set(held):
            left = {view: state for view, state in held.items() if view not in views}
            files.write_json(self.folder / "online.json", left)

    def _load(self, store: FeatureStore, view: str, start: datetime, until: datetime) -> int:
        """Write the newest row of each key in a span of time online; returns how many."""
        if start > until:
            return 0
        found = store.get_feature_view(view)
        rows = len(_latest(store, found, start, until, fields=()).to_arrow())
        if rows:
            # Feast prints a headline and a bar for every view; one line of the log says more.
            with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
                store.materialize(start, until + _MICROSECOND, feature_views=[view])
        log.info("%s: %s rows are new online", view, f"{rows:,}")
        return rows

    def _differing(self, store: FeatureStore, view: str, until: datetime) -> int:
        """How many of a sample of keys have another row online than offline."""
        import pandas as pd

        found = store.get_feature_view(view)
        keys = [key.name for key in found.entity_columns]
        rows = _latest(store, found, _EVER, until, fields=()).to_arrow().select(keys)
        chosen = np.random.default_rng(0).permutation(len(rows))[:_SAMPLE]
        sample = rows.take(np.sort(chosen)).to_pylist()
        if not sample:
            return 0
        references = [f"{view}:{field.name}" for field in found.features]
        moments = pd.DataFrame(sample).assign(**{EVENT_TIMESTAMP: until})
        offline = store.get_historical_features(moments, references).to_arrow().to_pydict()
        online = store.get_online_features(references, sample).to_dict()
        return sum(
            not all(_alike(online[f.name][i], offline[f.name][i]) for f in found.features)
            for i in range(len(sample))
        )


# -- the training frame --------------------------------------------------------------------------


def _fields(spec: FeatureSpec, view: str) -> list[str]:
    return list(stored_fields(spec, view))


def _joined(
    store: FeatureStore, table: pa.Table, references: list[str], moment: str, spec: FeatureSpec
) -> pa.Table:
    """The table with features, as of one of its timestamp columns."""
    import pandas as pd

    views = dict.fromkeys(reference.split(":")[0] for reference in references)
    keys = list(dict.fromkeys(key for view in views for key in _by(spec, view)))
    # Feast finds the entity rows' moment by its name. Only what the joins need goes through it.
    rows = table.select([*keys, moment]).rename_columns([*keys, EVENT_TIMESTAMP])
    found = store.get_historical_features(rows.to_pandas(types_mapper=pd.ArrowDtype), references)
    features = found.to_arrow()
    for reference in references:
        name = reference.split(":")[1]
        table = table.append_column(name, features[name])
    return table


def _expired(table: pa.Table, spec: FeatureSpec, views: Iterable[str]) -> pa.Table:
    """The table without what was too old when the exposure happened, and without the moments."""
    aged = [view for view in views if spec.max_age(view)]
    if not aged:
        return table
    names = [name for view in aged for name in _fields(spec, view)]
    kept, _ = expire(frame_of(table.select([EVENT_TIMESTAMP, *names])), spec, aged)
    stamps = {stamp_name(view) for view in aged}
    for name in names:
        place = table.schema.get_field_index(name)
        if name not in stamps:
            table = table.set_column(place, name, to_arrow(kept[name]))
    return table.drop_columns(sorted(stamps))


def _completed(table: pa.Table, spine: pa.Table, spec: FeatureSpec) -> pa.Table:
    """All columns of the spec from what the joins gave; numbers last, in the spec's order."""
    numeric = [column for column in spec.columns if column.is_numeric]
    others = {column.name for column in spec.columns if not column.is_numeric}
    absent = sorted((others | {c.name for c in numeric if c.is_raw}) - set(table.column_names))
    if absent:
        raise FrameError([f"absent columns {absent}; the spec needs them"])
    sources = {stored_name(c) if c.aggregate else c.name for c in numeric if c.ratio is None}
    frame = frame_of(table.select([EVENT_TIMESTAMP, *sorted(sources)]))
    completed = complete(frame, spec.model_copy(update={"columns": tuple(numeric)}))
    passed = {*spine.column_names, *others} - {column.name for column in numeric}
    result = table.select([name for name in table.column_names if name in passed])
    for column in numeric:
        result = result.append_column(column.name, to_arrow(completed[column.name]))
    return result


# -- Feast ---------------------------------------------------------------------------------------


def _feast() -> Any:
    """Feast, without typeguard's checks of what its functions are given.

    To add them, typeguard parses and compiles Feast's own source anew: four fifths of the seconds
    that importing Feast takes, at every start of a service.
    """
    import typeguard

    checked = typeguard.typechecked
    typeguard.typechecked = lambda target: target  # type: ignore[assignment]
    try:
        import feast
    finally:
        typeguard.typechecked = checked
    return feast


def embedding_name(view: str, version: str) -> str:
    """Name of a version's own feature view of embeddings."""
    return f"{view}_{version.replace('-', '_')}"


def _has_user(spec: FeatureSpec, view: str) -> bool:
    """Whether the user is among a view's keys."""
    return view == "users" or (view in spec.views and spec.entities.user in _by(spec, view))


def _by(spec: FeatureSpec, view: str) -> tuple[str, ...]:
    if view in ATTRIBUTES:
        return (spec.entities.user if view == "users" else spec.entities.item,)
    aggregate = spec.views[view][0].aggregate
    assert aggregate is not None
    return aggregate.by


def _online_name(spec: FeatureSpec, view: str) -> str:
    return packed_name(view) if is_packable(spec, view) else view


def _has_rows(source: Path) -> bool:
    return source.is_file() or any(source.glob("[!.]*.parquet"))


def _latest(
    store: FeatureStore,
    view: FeatureView,
    start: datetime,
    end: datetime,
    fields: Sequence[str] | None = None,
) -> Any:
    """A job for the newest row of each key in a span of time; all fields unless they are named."""
    from fathom.asof_store import AsofOfflineStore

    named = [field.name for field in view.features] if fields is None else list(fields)
    assert view.batch_source is not None
    return AsofOfflineStore.pull_latest_from_table_or_query(
        config=store.config,
        data_source=view.batch_source,
        join_key_columns=[key.name for key in view.entity_columns],
        feature_name_columns=named,
        timestamp_field=EVENT_TIMESTAMP,
        created_timestamp_column=CREATED_TIMESTAMP,
        start_date=start,
        end_date=end,
    )


def _empty(store: FeatureStore, view: str) -> None:
    """Remove a view's rows from the online store."""
    found = store.get_feature_view(view)
    for gone, kept in (([found], []), ([], [found])):
        store._get_provider().update_infra(store.project, gone, kept, [], [], partial=True)


def _alike(online: Any, offline: Any) -> bool:
    """Equal, but for what an online store cannot tell apart: no value and NaN, no list and none."""
    if isinstance(online, list | tuple) or isinstance(offline, list | tuple):
        left, right = online or [], offline or []
        return len(left) == len(right) and all(map(_alike, left, right))
    absent = [value is None or value != value for value in (online, offline)]
    return all(absent) or (not any(absent) and bool(online == offline))


def _embedding_rows(key: str, keys: list[str], vectors: Any, moment: datetime) -> pa.Table:
    offsets = pa.array(np.arange(0, vectors.size + 1, vectors.shape[1], dtype=np.int32))
    stamps = pa.array([moment] * len(keys), pa.timestamp("us", "UTC"))
    return pa.table(
        {
            key: pa.array(keys, pa.string()),
            "embedding": pa.ListArray.from_arrays(offsets, pa.array(vectors.reshape(-1))),
            EVENT_TIMESTAMP: stamps,
            CREATED_TIMESTAMP: stamps,
        }
    )


def _published(store: FeatureStore) -> list[FeatureView]:
    """Views of embeddings, of whatever version."""
    return [view for view in store.list_batch_feature_views() if "version" in view.tags]


def _only_theirs(store: FeatureStore, views: Iterable[FeatureView]) -> list[Any]:
    """Data sources that no other view reads."""
    names = {view.batch_source.name for view in views if view.batch_source}
    return [source for source in store.list_data_sources() if source.name in names]


def _stale(store: FeatureStore, wanted: list[Any]) -> list[Any]:
    """Registered objects that the spec no longer has; embeddings and theirs are not the spec's."""
    from feast.feature_view import DUMMY_ENTITY_NAME

    published = _published(store)
    registered: list[Any] = [
        *(item for item in store.list_feature_services() if "version" not in item.tags),
        *store.list_on_demand_feature_views(),
        *(v for v in store.list_batch_feature_views() if "version" not in v.tags),
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
