"""Feast's objects, generated from a spec: entities, feature views, crosses, services.

* an entity for each key that attributes or aggregates are looked up by;
* feature views ``users`` and ``items`` with the raw attributes, and one view for each log and set
  of keys in ``spec.views``;
* for each view keyed by user and something else, a ``…_packed`` view with one row per user, which
  is what is materialised online;
* an on-demand view for each cross, calling the encoder's own function;
* feature services ``wide``, ``deep`` and ``ranker``;
* views of one ranker's learned embeddings (`embedding_view`), which are not the spec's.

Nothing here touches a registry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fathom.batch import Ragged
from fathom.encoding import Values, complete
from fathom.features import is_packable, packed_name, stored_fields, stored_name
from fathom.spec import ATTRIBUTES, CREATED_TIMESTAMP, EVENT_TIMESTAMP, Column, FeatureSpec

if TYPE_CHECKING:
    from feast import FeatureService, FeatureView, Field
    from feast.on_demand_feature_view import OnDemandFeatureView
    from feast.types import FeastType

#: Which source a feature view reads: a parquet file, or a folder of them.
Sources = Callable[[str], Path]
_FOREVER = timedelta(0)
_RECENCY = "moment of the last one, microseconds since 1970"


@dataclass(frozen=True)
class FeastObjects:
    """All objects of one spec."""

    entities: dict[str, Any]
    views: list[FeatureView]
    crosses: list[OnDemandFeatureView]
    services: list[FeatureService]

    @property
    def all(self) -> list[Any]:
        """In the order in which they can be registered."""
        return [*self.entities.values(), *self.views, *self.crosses, *self.services]


def feast_objects(spec: FeatureSpec, sources: Sources) -> FeastObjects:
    """Generate every object of a spec.

    Args:
        sources: feature view → where its rows lie.
    """
    entities = _entities(spec)
    keys: dict[str, tuple[str, ...]] = {
        "users": (spec.entities.user,),
        "items": (spec.entities.item,),
        **{view: _by(spec, view) for view in spec.views},
    }
    views = []
    for view, by in keys.items():
        if view in ATTRIBUTES and not spec.held(view):
            continue
        views.append(_view(spec, view, by, sources, entities))
        if view in spec.views and is_packable(spec, view):
            views.append(_packed_view(spec, view, by, sources, entities))
    crosses = [_cross_view(spec, i, views) for i in range(len(spec.crosses))]
    return FeastObjects(entities, views, crosses, _services(spec, views, crosses))


def embedding_view(name: str, key: str, source: Path, width: int, version: str) -> FeatureView:
    """One ranker's learned vectors of a key, searchable by nearest neighbours.

    Args:
        source: parquet of the key and ``embedding``, (``width``,) float32 each.
    """
    from feast import Entity, FeatureView, Field, ValueType
    from feast.types import Array, Float32

    return FeatureView(
        name=name,
        entities=[Entity(name=key, join_keys=[key], value_type=ValueType.STRING)],
        schema=[
            Field(
                name="embedding",
                dtype=Array(Float32),
                description=f"Learned vector of {key}",
                vector_index=True,
                vector_length=width,
                vector_search_metric="cosine",
            )
        ],
        source=_file_source(name, source),
        ttl=_FOREVER,
        online=True,
        description=f"Learned embeddings of {key}, ranker {version}",
        tags={"version": version, "width": str(width)},
    )


def _by(spec: FeatureSpec, view: str) -> tuple[str, ...]:
    aggregate = spec.views[view][0].aggregate
    assert aggregate is not None
    return aggregate.by


def _entities(spec: FeatureSpec) -> dict[str, Any]:
    from feast import Entity, ValueType

    keys = [spec.entities.user, spec.entities.item]
    for view in spec.views:
        keys += _by(spec, view)
    return {
        key: Entity(
            name=key,
            join_keys=[key],
            value_type=ValueType.STRING,
            description=spec.by_name[key].description if key in spec.by_name else "",
            owner=spec.maintainer,
            tags={"owner": spec.owner(key)},
        )
        for key in dict.fromkeys(keys)
    }


def _view(
    spec: FeatureSpec, name: str, by: tuple[str, ...], sources: Sources, entities: dict[str, Any]
) -> FeatureView:
    from feast import FeatureView

    held = ", ".join(column.name for column in spec.held(name))
    return FeatureView(
        name=name,
        entities=[entities[key] for key in by],
        schema=[_field(spec, field, column) for field, column in stored_fields(spec, name).items()],
        source=_file_source(name, sources(name)),
        # Ages are `fathom.encoding.expire`'s, offline and online: Feast's own hold offline only.
        ttl=_FOREVER,
        online=by == (spec.entities.user,),
        owner=spec.maintainer,
        description=f"{name}: {held}",
        tags={"spec": spec.hash[:12], "owner": _owner(spec, by), **_age_tag(spec, name)},
    )


def _packed_view(
    spec: FeatureSpec, view: str, by: tuple[str, ...], sources: Sources, entities: dict[str, Any]
) -> FeatureView:
    from feast import FeatureView, Field
    from feast.types import Array, String

    name = packed_name(view)
    others = [key for key in by if key != spec.entities.user]
    fields = [
        _field(spec, field, column, prefix=f"{view}__", many=True)
        for field, column in stored_fields(spec, view).items()
    ]
    return FeatureView(
        name=name,
        entities=[entities[spec.entities.user]],
        schema=[
            *(
                Field(name=f"{view}__{k}", dtype=Array(String), description=f"{k} of each value")
                for k in others
            ),
            *fields,
        ],
        source=_file_source(name, sources(name)),
        ttl=_FOREVER,
        online=True,
        owner=spec.maintainer,
        description=f"{view}, one row per user",
        tags={"spec": spec.hash[:12], "owner": "user", **_age_tag(spec, view)},
    )


def _age_tag(spec: FeatureSpec, view: str) -> dict[str, str]:
    days = spec.max_age_days.get(view)
    return {} if days is None else {"max_age_days": f"{days:g}"}


def _field(
    spec: FeatureSpec, name: str, column: Column | None, prefix: str = "", many: bool = False
) -> Field:
    from feast import Field
    from feast.types import Array, Int64

    if column is None:
        kind: FeastType = Int64
        description, tags = "Moment of the row, microseconds since 1970", {}
    else:
        kind, description = _feast_type(column), _description(column)
        tags = {"column": column.name, "kind": column.kind, "owner": spec.owner(column.name)}
        tags |= {part: "true" for part in ("wide", "deep") if getattr(column, part)}
    dtype = Array(kind) if many else kind
    return Field(name=prefix + name, dtype=dtype, description=description, tags=tags)


def _description(column: Column) -> str:
    if column.description or column.aggregate is None:
        return column.description
    a = column.aggregate
    what = _RECENCY if a.measure == "recency_days" else a.measure
    of = f" of {a.column}" if a.column else ""
    window = f" over {a.window_days} days" if a.window_days else ""
    return f"{what}{of} in {a.of} by {', '.join(a.by)}{window}"


def _feast_type(column: Column) -> FeastType:
    from feast.types import Array, Float64, Int64, String

    if column.kind in {"multi", "sequence"}:
        return Array(String)
    if column.kind == "categorical":
        return String
    measure = column.aggregate.measure if column.aggregate else None
    return {"count": Int64, "recency_days": Int64}.get(measure or "", Float64)


def _owner(spec: FeatureSpec, by: Iterable[str]) -> str:
    owners = {spec.owner(key) for key in by}
    return next(owner for owner in ("user", "context", "item") if owner in owners)


def _file_source(name: str, path: Path) -> Any:
    from feast import FileSource
    from feast.data_format import ParquetFormat

    return FileSource(
        name=f"{name}_source",
        path=str(path),
        file_format=ParquetFormat(),
        timestamp_field=EVENT_TIMESTAMP,
        created_timestamp_column=CREATED_TIMESTAMP,
    )


def _cross_view(spec: FeatureSpec, index: int, views: list[FeatureView]) -> OnDemandFeatureView:
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
                name=f"context_{declared.name}",
                schema=[Field(name=c.name, dtype=_feast_type(c)) for c in requested],
            )
        )
    text = spec.to_json()

    # Unannotated: Feast resolves annotations, and refuses any but pandas' own.
    def evaluate(inputs):  # type: ignore[no-untyped-def]
        from fathom.feast_objects import cross_of_rows

        return cross_of_rows(inputs, text, index)

    return OnDemandFeatureView(
        name=f"cross_{declared.name}",
        sources=sources,
        schema=[Field(name=declared.name, dtype=Array(Int64) if many else Int64)],
        feature_transformation=PandasTransformation(
            udf=evaluate, udf_string=f"fathom.feast_objects.cross_of_rows(inputs, spec, {index})"
        ),
        mode="pandas",
        description=f"Cross of {' and '.join(declared.columns)}: 64-bit keys, 0 when missing",
        owner=spec.maintainer,
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


def _stored(column: Column) -> str:
    return stored_name(column) if column.aggregate else column.name


def _services(
    spec: FeatureSpec, views: list[FeatureView], crosses: list[OnDemandFeatureView]
) -> list[FeatureService]:
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
    described = {
        "wide": "What the wide part reads: crosses and single columns",
        "deep": "What the deep part reads",
        "ranker": "Everything that a ranker reads; no on-demand view, so no pickled code",
    }
    services = {
        "wide": [*chosen(lambda c: c.wide or c.name in crossed), *crosses],
        "deep": chosen(lambda c: c.deep),
        "ranker": list(views),
    }
    return [
        FeatureService(
            name=name,
            features=features,
            tags=tags,
            owner=spec.maintainer,
            description=described[name],
        )
        for name, features in services.items()
        if features
    ]


def view_faults(found: FeatureView | None, wanted: FeatureView, source: Path) -> list[str]:
    """How a registered view (None: there is none) and its source differ from the spec's view."""
    if found is None:
        return [f"feature view '{wanted.name}' is not registered"]
    return _field_faults(found, wanted) + _source_faults(wanted, source)


def _field_faults(found: FeatureView, wanted: FeatureView) -> list[str]:
    view = wanted.name
    has = {field.name: field.dtype for field in found.features}
    wants = {field.name: field.dtype for field in wanted.features}
    faults = [f"'{view}' has no field '{name}'" for name in wants if name not in has]
    faults += [
        f"'{view}' has a field '{name}' that the spec has not" for name in has.keys() - wants
    ]
    faults += [
        f"field '{name}' of '{view}' is {has[name]}, the spec has {kind}"
        for name, kind in wants.items()
        if name in has and has[name] != kind
    ]
    keys = [[key.name for key in side.entity_columns] for side in (found, wanted)]
    if found.entity_columns and sorted(keys[0]) != sorted(wanted.join_keys or keys[0]):
        faults.append(f"'{view}' is keyed by {keys[0]}, the spec has {wanted.join_keys}")
    return faults


def _source_faults(view: FeatureView, source: Path) -> list[str]:
    """Columns that a view's files lack, or have of another type."""
    import pyarrow.parquet as pq

    paths = [source] if source.is_file() else sorted(source.glob("[!.]*.parquet"))
    if not paths:
        return [f"'{view.name}' has no rows: {source} is empty"]
    faults = []
    for path in paths:
        schema = pq.read_schema(path)
        for field in view.features:
            if field.name not in schema.names:
                faults.append(f"{path} has no column '{field.name}' of '{view.name}'")
            elif not _holds(schema.field(field.name).type, field.dtype):
                kind = schema.field(field.name).type
                faults.append(
                    f"column '{field.name}' of {path} is {kind}, '{view.name}' has {field.dtype}"
                )
        lacking = [name for name in (*view.join_keys, EVENT_TIMESTAMP) if name not in schema.names]
        faults += [f"{path} has no column '{name}', a key of '{view.name}'" for name in lacking]
    return faults


def _holds(kind: pa.DataType, wanted: Any) -> bool:
    """Whether a column of an Arrow type can be read as a Feast type."""
    from feast.types import Array, Int64, String

    if pa.types.is_null(kind):
        return True
    if isinstance(wanted, Array):
        lists = pa.types.is_list(kind) or pa.types.is_large_list(kind)
        return bool(lists and _holds(kind.value_type, wanted.base_type))
    if wanted == String:
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
    if wanted == Int64:
        return bool(pa.types.is_integer(kind))
    numbers = (pa.types.is_floating, pa.types.is_integer, pa.types.is_decimal)
    return any(is_one(kind) for is_one in numbers)
