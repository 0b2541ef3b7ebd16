"""A small feature store with one of everything: each kind of key, measure and cross.

Thirty-six days of a few users and items, drawn with a fixed seed. Some rows arrive late, some
values are missing, one item changes its genre, and some users and items have no attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fathom.feature_store import FeatureRepo, FeatureStoreConfig
from fathom.spec import FeatureSpec

START = datetime(2024, 1, 1, 6, tzinfo=timezone.utc)
DAY, SECOND = timedelta(days=1), timedelta(seconds=1)
DAYS, USERS, ITEMS = 36, 8, 14
GENRES, SHOPS, TIERS = ["coffee", "tea", "bread"], ["north", "south"], ["gold", "plain"]
STAMP = pa.timestamp("us", "UTC")
TEXTS = pa.list_(pa.string())


def aggregate(name: str, by: str, measure: str, **more: Any) -> dict[str, Any]:
    kind = "sequence" if measure == "last" else "numeric"
    return {
        "name": name,
        "kind": kind,
        "aggregate": {"by": by.split(), "measure": measure, **more},
    }


RATE = {"of": "exposures", "prior": 0.2, "prior_weight": 5}
COLUMNS: list[dict[str, Any]] = [
    {"name": "user_id", "kind": "categorical", "owner": "user", "wide": True},
    {"name": "tier", "kind": "categorical", "owner": "user"},
    {"name": "age", "kind": "numeric", "owner": "user"},
    {"name": "hobbies", "kind": "multi", "owner": "user"},
    {"name": "item_id", "kind": "categorical", "owner": "item"},
    {"name": "genre", "kind": "categorical", "owner": "item", "wide": True},
    {"name": "price", "kind": "numeric", "owner": "item", "deep": False},
    {"name": "tags", "kind": "multi", "owner": "item", "deep": False},
    {"name": "shop", "kind": "categorical", "owner": "context", "wide": True},
    {"name": "slot", "kind": "categorical", "owner": "context"},
    {"name": "discount", "kind": "numeric", "owner": "context", "buckets": [0.1, 0.25]},
    {"name": "searches", "kind": "multi", "owner": "context"},
    aggregate("user_acts", "user_id", "count"),
    aggregate("user_acts_3d", "user_id", "count", window_days=3),
    aggregate("user_spent", "user_id", "sum", column="quantity"),
    aggregate("user_recency", "user_id", "recency_days"),
    aggregate("recent_genres", "user_id", "last", column="genre", n=3),
    aggregate("recent_items", "user_id", "last", column="item_id", n=4),
    aggregate("user_rate", "user_id", "rate", **RATE),
    aggregate("pair_acts", "user_id item_id", "count"),
    aggregate("pair_recency", "user_id item_id", "recency_days"),
    aggregate("pair_mean_2d", "user_id item_id", "mean", column="quantity", window_days=2),
    aggregate("user_genre_acts", "user_id genre", "count"),
    aggregate("user_genre_spent", "user_id genre", "sum", column="quantity"),
    aggregate("user_shop_genre_acts", "user_id shop genre", "count"),
    aggregate("user_tier_acts", "user_id tier", "count"),
    aggregate("item_acts", "item_id", "count"),
    aggregate("item_recency", "item_id", "recency_days"),
    aggregate("item_mean", "item_id", "mean", column="quantity"),
    aggregate("item_shops", "item_id", "last", column="shop", n=2),
    aggregate("item_rate_4d", "item_id", "rate", window_days=4, **RATE) | {"buckets": [0.3, 0.45]},
    aggregate("genre_acts", "genre", "count"),
    aggregate("shop_acts", "shop", "count"),
    aggregate("shop_item_acts_5d", "shop item_id", "count", window_days=5),
    aggregate("shop_item_recency", "shop item_id", "recency_days"),
    aggregate("slot_item_rate", "slot item_id", "rate", **RATE),
    aggregate("tier_acts", "tier", "count"),
    aggregate("tier_genre_rate", "tier genre", "rate", **RATE),
    {"name": "pair_share", "kind": "numeric", "ratio": {"of": "pair_acts", "to": "user_acts"}},
    {"name": "price_share", "kind": "numeric", "ratio": {"of": "price", "to": "user_spent"}},
]
CROSSES: list[dict[str, Any]] = [
    {"columns": ["user_id", "genre"]},
    {"columns": ["genre", "shop"]},
    {"columns": ["recent_genres", "genre"]},
    {"columns": ["recent_genres", "tags", "slot"]},
    {"columns": ["searches", "genre"]},
    {"columns": ["user_acts", "genre"]},
    {"columns": ["item_rate_4d", "discount"]},
    {"columns": ["pair_share", "user_recency"]},
]


def a_spec(
    columns: list[dict[str, Any]] = COLUMNS, crosses: list[dict[str, Any]] = CROSSES
) -> FeatureSpec:
    return FeatureSpec.model_validate(
        {
            "entities": {"user": "user_id", "item": "item_id", "request": "request_id"},
            "label": {"name": "bought", "values": [0, 1]},
            "grain_days": 1,
            "grain_origin": START,
            "columns": columns,
            "crosses": crosses,
        }
    )


SPEC = a_spec()
_TYPES = {
    **dict.fromkeys(("event_timestamp", "arrival_timestamp", "created_timestamp"), STAMP),
    **dict.fromkeys(
        ("quantity", "discount", "age", "price", "inclusion_probability"), pa.float64()
    ),
    **dict.fromkeys(("hobbies", "tags", "searches"), TEXTS),
    "bought": pa.int64(),
}


def a_table(rows: list[dict[str, Any]], *names: str) -> pa.Table:
    """An Arrow table of canonical types; columns in the order of the first row, or as named."""
    return pa.table(
        {
            name: pa.array([row.get(name) for row in rows], _TYPES.get(name, pa.string()))
            for name in names or rows[0]
        }
    )


def generated(seed: int = 3) -> dict[str, pa.Table]:
    """Canonical exposures, interactions, users and items."""
    random = np.random.default_rng(seed)

    def some(values: list[Any], missing: float = 0.1) -> Any:
        return None if random.random() < missing else values[random.integers(len(values))]

    exposures, interactions = [], []
    for k in range(DAYS * 25):
        moment = START + timedelta(days=DAYS * random.random())
        late = timedelta(days=3) if random.random() < 0.2 else timedelta(0)
        row = {
            "request_id": f"r{k // 3}",
            "user_id": f"u{random.integers(USERS)}",
            "item_id": f"i{random.integers(ITEMS)}",
            "event_timestamp": moment,
            "arrival_timestamp": some([moment + late]),
            "shop": some(SHOPS),
        }
        shown = {
            "slot": some(["top", "end"]),
            "discount": some([0.0, 0.1, 0.25]),
            "searches": some([["tea"], ["tea", "rye"], []]),
            "bought": int(random.integers(2)),
            "inclusion_probability": 1.0,
        }
        exposures.append(row | shown)
        if shown["bought"]:
            interactions.append(row | {"quantity": some([0.1, 0.2, 3.0], missing=0.3)})
    before = {"event_timestamp": START - DAY}
    users = [
        {
            "user_id": f"u{u}",
            "tier": [*TIERS, None][u % 3],
            "age": [20.1, None][u % 2],
            "hobbies": [["chess"], [], ["go", "tea"], None][u % 4],
            **before,
        }
        for u in range(USERS - 1)  # the last one has no attributes
    ]
    items = [
        {
            "item_id": f"i{i}",
            "genre": [*GENRES, None][i % 4],
            "price": [0.1, 2.5, None][i % 3],
            "tags": [["green", "loose"], ["green"], [], None][i % 4],
            **before,
        }
        for i in range(ITEMS - 1)
    ]
    items.append(items[0] | {"genre": "tea", "event_timestamp": START + 8 * DAY})
    return {
        "exposures": a_table(exposures),
        "interactions": a_table(interactions),
        "users": a_table(users),
        "items": a_table(items),
    }


@dataclass(frozen=True)
class Store:
    """A feature store that is applied and materialised.

    ``until`` is the newest boundary: everything known by then is both offline and online.
    """

    repo: FeatureRepo
    spec: FeatureSpec
    tables: Mapping[str, pa.Table]
    until: datetime


def written(folder: Path, spec: FeatureSpec, tables: Mapping[str, pa.Table]) -> Store:
    """Sources of every feature view of a spec, as the features pipeline writes them.

    Where an earlier call wrote some, what is new in the tables is added to them.
    """
    import ibis

    from fathom.pipelines import datasets
    from fathom.pipelines.features import nodes

    repo = FeatureRepo(FeatureStoreConfig(folder="features"), folder)
    views, packed, carry = (str(repo.folder / name) for name in ("views", "packed", "carry"))
    outputs = (
        datasets.SnapshotsDataset(views),
        datasets.SnapshotsDataset(packed),
        datasets.CarryDataset(carry, views, packed),
    )
    past = datasets.PastDataset(carry, views, packed).load()
    read = {name: ibis.memtable(table) for name, table in tables.items()}
    for chunk in nodes.summarise_logs(**read, past=past, spec=spec):
        for dataset, data in zip(outputs, chunk, strict=True):
            dataset.save(data)
    attributes = nodes.stamp_attributes(read["users"], read["items"], spec)
    datasets.TablesDataset(str(repo.folder / "attributes")).save(attributes)
    until = nodes.describe_features(outputs[-1].load(), spec)["until"]
    return Store(repo, spec, tables, datetime.fromisoformat(until))


def ready(folder: Path, spec: FeatureSpec = SPEC, seed: int = 3) -> Store:
    """A store that answers online reads too."""
    store = written(folder, spec, generated(seed))
    store.repo.apply(spec)
    store.repo.materialise(spec, store.until)
    return store


def probes(store: Store, count: int = 60, seed: int = 5) -> pa.Table:
    """Exposures after the newest boundary, known and unknown users and items among them."""
    random = np.random.default_rng(seed)
    rows = [
        {
            "request_id": f"p{k}",
            "user_id": f"u{random.integers(USERS + 2)}",
            "item_id": f"i{random.integers(ITEMS + 2)}",
            "event_timestamp": store.until + timedelta(hours=23.9 * random.random()),
            "shop": [*SHOPS, "new", None][random.integers(4)],
            "slot": ["top", "end", "new", None][random.integers(4)],
            "discount": [0.1, 0.25, None][random.integers(3)],
            "searches": [["tea"], ["rye", "tea"], [], None][random.integers(4)],
            "bought": int(random.integers(2)),
        }
        for k in range(count)
    ]
    return a_table(rows)
