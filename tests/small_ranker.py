"""A small shop with a real feature store and a real ranker, for the tests of serving.

Twelve users buy forty items for thirty days. Even users like tea, odd ones coffee.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fathom.batch import Batch
from fathom.config import TrainingConfig
from fathom.encoding import complete, fit_encoder
from fathom.feature_store import (
    FeatureRepo,
    FeatureStoreConfig,
    frame_of,
    write_parquet,
)
from fathom.ranker import Ranker, rows_of_frame
from fathom.spec import FeatureSpec

START = datetime(2024, 1, 1, tzinfo=timezone.utc)
DAYS, USERS, ITEMS = 30, 12, 40
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


def genre_of(item: int) -> str:
    return GENRES[item % 2]


def tables() -> dict[str, pa.Table]:
    """Canonical users, items, interactions and exposures."""
    random = np.random.default_rng(7)
    stamp = pa.timestamp("us", "UTC")
    before = START - timedelta(days=1)
    exposures: dict[str, list[Any]] = {
        name: []
        for name in (
            *("request_id", "user_id", "item_id", "event_timestamp", "arrival_timestamp"),
            *("shelf", "shop", "discount", "bought", "inclusion_probability"),
        )
    }
    for request in range(DAYS * USERS):
        user, day = request % USERS, request // USERS
        moment = START + timedelta(days=day, hours=12, minutes=user)
        for item in random.choice(ITEMS, 6, replace=False).tolist():
            likes = genre_of(item) == GENRES[1 - user % 2]
            row = (
                *(f"r{request}", f"u{user}", f"i{item}", moment, moment),
                *(["low", "top"][request % 2], f"shop{user % 3}", float(item % 5) / 10),
                *(int(random.random() < (0.7 if likes else 0.1)), 1.0),
            )
            for name, value in zip(exposures, row, strict=True):
                exposures[name].append(value)
    schema = {"event_timestamp": stamp, "arrival_timestamp": stamp}
    log = pa.table({n: pa.array(v, schema.get(n)) for n, v in exposures.items()})
    positive = pa.array([label == 1 for label in exposures["bought"]])
    users, items = range(USERS), range(ITEMS)
    return {
        "exposures": log,
        "interactions": log.filter(positive).drop_columns(["bought", "inclusion_probability"]),
        "users": pa.table(
            {
                "user_id": [f"u{u}" for u in users],
                "city": [["Oslo", "Rome"][u % 2] for u in users],
                "event_timestamp": pa.array([before for _ in users], stamp),
                "created_timestamp": pa.array([before for _ in users], stamp),
            }
        ),
        "items": pa.table(
            {
                "item_id": [f"i{i}" for i in items],
                "genre": [genre_of(i) for i in items],
                "tags": pa.array(
                    [["green", "loose"][: i % 3] for i in items], pa.list_(pa.string())
                ),
                "event_timestamp": pa.array([before for _ in items], stamp),
                "created_timestamp": pa.array([before for _ in items], stamp),
            }
        ),
    }


def feature_store(root: Path) -> tuple[FeatureRepo, pa.Table]:
    """A materialised feature store below a folder, and the training frame read from it."""
    import ibis

    from fathom import feature_store as store
    from fathom import features

    made = tables()
    connection = ibis.duckdb.connect()
    connection.raw_sql("set TimeZone='UTC'")
    logs = {
        name: features.with_attributes(
            connection.create_table(name, made[name]),
            connection.create_table(f"{name}_users", made["users"]),
            connection.create_table(f"{name}_items", made["items"]),
            SPEC,
        )
        for name in ("interactions",)
    }
    until = int(connection.execute(features.last_step(logs.values(), SPEC)))
    repo = FeatureRepo(FeatureStoreConfig(folder="features"), root)
    for name in ("users", "items"):
        write_parquet(made[name], repo.source(name))
    for view in SPEC.views:
        snapshot = features.snapshots(logs["interactions"], SPEC, view, until)
        write_parquet(connection.to_pyarrow(snapshot), repo.source(view))
        if store.is_packable(SPEC, view):
            packed = features.packed(snapshot, SPEC, view)
            write_parquet(connection.to_pyarrow(packed), repo.source(store.packed_name(view)))
    repo.apply(SPEC)
    frame = repo.training_frame(made["exposures"], SPEC)
    repo.materialise(SPEC, START + timedelta(days=DAYS + 1))
    return repo, frame


@dataclass(frozen=True)
class Registered:
    """A saved artifact and what it scored before it was saved."""

    folder: Path
    version: str
    ranker: Ranker
    rows: list[dict[str, Any]]
    probabilities: list[float]


def plain_frame(rows: int = 400) -> dict[str, Any]:
    """A frame of the spec's columns without a feature store: random, but labelled sensibly."""
    from fathom.batch import Ragged
    from fathom.encoding import with_ratios

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
    return with_ratios(frame, SPEC)


def register(folder: Path, frame: dict[str, Any], golden: int = 20) -> Registered:
    """Train on a frame and save the artifact, with golden requests, below a folder."""
    from fathom.training import train

    config = TrainingConfig(hidden=(8,), epochs=2, batch_size=64)
    encoder = fit_encoder(frame, SPEC)
    batch = encoder.encode(frame)
    split = int(len(batch) * 0.8)
    index = np.arange(len(batch))
    parts: tuple[Batch, Batch] = (batch.take(index[:split]), batch.take(index[split:]))
    trained = train(encoder.layout, *parts, config, "binary")
    ranker = Ranker(encoder, trained.model, config, {"trained_until": "2024-01-30", "seed": 0})
    rows = rows_of_frame(frame, SPEC, range(golden))
    probabilities = ranker.score(frame)[:golden].tolist()
    text = json.dumps({"rows": rows, "probabilities": probabilities})
    folder.mkdir(parents=True)
    version = ranker.save(folder / "new", {"golden.json": text})
    (folder / "new").rename(folder / version)
    return Registered(folder / version, version, ranker, rows, probabilities)


__all__ = ["SPEC", "Registered", "complete", "feature_store", "frame_of", "plain_frame", "register"]
