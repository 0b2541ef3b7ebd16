"""A small shop with a real feature store and a real ranker, for the tests of serving.

Twelve users buy from forty items for twenty days. Even users like tea, odd ones coffee.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fathom import features
from fathom.batch import Ragged
from fathom.config import TrainingConfig
from fathom.encoding import fit_encoder, with_ratios
from fathom.feature_store import (
    FeatureRepo,
    FeatureStoreConfig,
    is_packable,
    packed_name,
    write_parquet,
)
from fathom.ranker import Ranker, rows_of_frame
from fathom.spec import FeatureSpec
from fathom.tower import TowerConfig, fit_tower
from fathom.training import train

START = datetime(2024, 1, 1, tzinfo=timezone.utc)
DAYS, USERS, ITEMS, GOLDEN = 20, 12, 40, 20
GENRES = ["coffee", "tea"]

SPEC = FeatureSpec.model_validate(
    {
        "entities": {"user": "user_id", "item": "item_id", "request": "request_id"},
        "label": {"name": "bought", "values": [0, 1]},
        "columns": [
            {"name": "user_id", "kind": "categorical", "owner": "user", "wide": True},
            {"name": "city", "kind": "categorical", "owner": "user"},
            {"name": "item_id", "kind": "categorical", "owner": "item", "embedding": 4},
            {
                "name": "genre",
                "kind": "categorical",
                "owner": "item",
                "wide": True,
                "values": GENRES,
            },
            {"name": "tags", "kind": "multi", "owner": "item"},
            {"name": "shelf", "kind": "categorical", "owner": "context", "values": ["low", "top"]},
            {"name": "shop", "kind": "categorical", "owner": "context"},
            {"name": "discount", "kind": "numeric", "owner": "context"},
            {
                "name": "user_purchases",
                "kind": "numeric",
                "aggregate": {"by": ["user_id"], "measure": "count"},
            },
            {
                "name": "user_genre_purchases",
                "kind": "numeric",
                "aggregate": {"by": ["user_id", "genre"], "measure": "count"},
            },
            {
                "name": "item_purchases",
                "kind": "numeric",
                "aggregate": {"by": ["item_id"], "measure": "count"},
            },
            {
                "name": "recent_genres",
                "kind": "sequence",
                "aggregate": {"by": ["user_id"], "measure": "last", "column": "genre", "n": 3},
            },
            {
                "name": "genre_share",
                "kind": "numeric",
                "ratio": {"of": "user_genre_purchases", "to": "user_purchases"},
            },
        ],
        "crosses": [
            {"columns": ["user_id", "genre"]},
            {"columns": ["recent_genres", "genre"]},
            {"columns": ["recent_genres", "tags"]},
        ],
    }
)

#: And what each user has bought, item by item.
WITH_HISTORY = FeatureSpec.model_validate(
    SPEC.model_dump(exclude_defaults=True)
    | {
        "columns": [
            *SPEC.model_dump(exclude_defaults=True)["columns"],
            {
                "name": "user_item_purchases",
                "kind": "numeric",
                "aggregate": {"by": ["user_id", "item_id"], "measure": "count"},
            },
        ]
    }
)


def genre_of(item: int) -> str:
    return GENRES[item % 2]


def tables() -> dict[str, pa.Table]:
    """Canonical users, items and interactions."""
    random = np.random.default_rng(7)
    stamp = pa.timestamp("us", "UTC")
    bought: dict[str, list[Any]] = {"user_id": [], "item_id": [], "event_timestamp": []}
    for day in range(DAYS):
        for user in range(USERS):
            likes = [i for i in range(ITEMS) if genre_of(i) == GENRES[1 - user % 2]]
            for item in random.choice(likes, 2, replace=False).tolist():
                moment = START + timedelta(days=day, hours=12, minutes=user)
                for name, value in zip(bought, (f"u{user}", f"i{item}", moment), strict=True):
                    bought[name].append(value)
    bought["event_timestamp"] = pa.array(bought["event_timestamp"], stamp)

    def attributes(count: int, columns: dict[str, Any]) -> pa.Table:
        before = pa.array([START - timedelta(days=1)] * count, stamp)
        return pa.table({**columns, "event_timestamp": before, "created_timestamp": before})

    users, items = range(USERS), range(ITEMS)
    tags = pa.array([["green", "loose"][: i % 3] for i in items], pa.list_(pa.string()))
    return {
        "interactions": pa.table(bought),
        "users": attributes(
            USERS,
            {"user_id": [f"u{u}" for u in users], "city": [["Oslo", "Rome"][u % 2] for u in users]},
        ),
        "items": attributes(
            ITEMS,
            {
                "item_id": [f"i{i}" for i in items],
                "genre": [genre_of(i) for i in items],
                "tags": tags,
            },
        ),
    }


def feature_store(root: Path, spec: FeatureSpec = SPEC) -> FeatureRepo:
    """A materialised feature store below a folder."""
    import ibis

    made = tables()
    connection = ibis.duckdb.connect()
    connection.raw_sql("set TimeZone='UTC'")
    names = ("interactions", "users", "items")
    log = features.with_attributes(*(connection.create_table(n, made[n]) for n in names), spec)
    until = int(connection.execute(features.last_step([log], spec)))
    repo = FeatureRepo(FeatureStoreConfig(folder="features"), root)
    for name in ("users", "items"):
        write_parquet(made[name], repo.source(name))
    for view in spec.views:
        snapshot = features.snapshots(log, spec, view, until)
        write_parquet(connection.to_pyarrow(snapshot), repo.source(view) / "000020.parquet")
        if is_packable(spec, view):
            packed = features.packed(features.newest(snapshot, spec, view), spec, view)
            path = repo.source(packed_name(view)) / "000020.parquet"
            write_parquet(connection.to_pyarrow(packed), path)
    repo.apply(spec)
    repo.materialise(spec, START + timedelta(days=DAYS + 1))
    return repo


@dataclass(frozen=True)
class Artifact:
    """A saved artifact and what it scored before it was saved."""

    folder: Path
    version: str
    ranker: Ranker
    rows: list[dict[str, Any]]
    probabilities: list[float]


def plain_frame(rows: int = 400, spec: FeatureSpec = SPEC) -> dict[str, Any]:
    """Labelled rows of the spec's columns, drawn without a feature store."""
    random = np.random.default_rng(11)
    users, items = random.integers(USERS, size=rows), random.integers(ITEMS, size=rows)

    def texts(values: list[Any]) -> Any:
        array = np.empty(len(values), object)
        array[:] = values
        return array

    genres = [genre_of(i) for i in items]
    likes = np.array([g == GENRES[1 - u % 2] for g, u in zip(genres, users, strict=True)])
    frame: dict[str, Any] = {
        "user_id": texts([f"u{u}" for u in users]),
        "city": texts([[None, "Oslo", "Rome"][u % 3] for u in users]),
        "item_id": texts([f"i{i}" for i in items]),
        "genre": texts(genres),
        "tags": Ragged.of([["green", "loose"][: i % 3] for i in items]),
        "shelf": texts([["low", "top"][i % 2] for i in range(rows)]),
        "shop": texts([f"shop{u % 3}" for u in users]),
        "discount": np.where(items % 7 == 0, np.nan, items / 10).astype(np.float32),
        "user_purchases": random.integers(0, 9, size=rows).astype(np.float32),
        "user_genre_purchases": (likes * random.integers(0, 5, size=rows)).astype(np.float32),
        "item_purchases": random.integers(0, 30, size=rows).astype(np.float32),
        "recent_genres": Ragged.of([GENRES[: u % 3] for u in users]),
        "bought": (random.random(rows) < np.where(likes, 0.7, 0.1)).astype(np.int64),
    }
    if "user_item_purchases" in spec.by_name:
        frame["user_item_purchases"] = (likes * (items % 3)).astype(np.float32)
    return with_ratios(frame, spec)


def exposures(rows: int = 800, days: int = 7, **replaced: Any) -> pa.Table:
    """Labelled rows as a training frame has them, five to a request, spread over the first days."""
    columns = {
        name: [part.tolist() for part in np.split(values.values, values.offsets[1:-1])]
        if isinstance(values, Ragged)
        else values
        for name, values in (plain_frame(rows) | replaced).items()
    }
    moments = [START + timedelta(days=days) * (i / (rows - 1)) for i in range(rows)]
    columns["request_id"] = [f"r{i // 5}" for i in range(rows)]
    columns["event_timestamp"] = pa.array(moments, pa.timestamp("us", "UTC"))
    return pa.table(columns)


def register(
    folder: Path, model: str = "wide_deep", spec: FeatureSpec = SPEC, factors: int = 0
) -> Artifact:
    """Train, and save the artifact with golden requests below a folder."""
    frame = plain_frame(spec=spec)
    config = TrainingConfig(model=model, hidden=(8,), epochs=2, batch_size=64)
    encoder = fit_encoder(frame, spec)
    batch = encoder.encode(frame)
    training, validation = np.split(np.arange(len(batch)), [len(batch) * 4 // 5])
    trained = train(encoder.layout, batch.take(training), batch.take(validation), config, "binary")
    provenance = {"trained_from": "2024-01-01", "trained_until": "2024-01-30", "seed": 0}
    provenance |= {"rows": {"train": len(training)}}
    tower = fit_tower(encoder, batch.take(training), TowerConfig(factors=factors))
    ranker = Ranker(encoder, trained.model, config, provenance, tower)
    rows = rows_of_frame(frame, spec, range(GOLDEN))
    probabilities = ranker.score(frame)[:GOLDEN].tolist()
    golden = json.dumps({"rows": rows, "probabilities": probabilities})
    version = ranker.save(folder / "new", {"golden.json": golden})
    (folder / "new").rename(folder / version)
    return Artifact(folder / version, version, ranker, rows, probabilities)
