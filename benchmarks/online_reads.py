"""How long the features of a request take: one user and 1 to 500 items, in one process.

Two feature views of three features each, one by user and one by item, as of the newest snapshot of
6,040 users and 4,000 items; ours, and Feast's plain ``get_online_features`` on the same rows. With
``--data``, also all features of a run's deployment for one user and 500 candidates.

    python benchmarks/online_reads.py                  # and on Redis, where redis-server is
    python benchmarks/online_reads.py --data data      # what `make run` left, beside it
    python benchmarks/online_reads.py --quick --json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from fathom.feature_store import FeatureRepo, FeatureStoreConfig, write_parquet
from fathom.hardware import hardware
from fathom.online import OnlineFeatures
from fathom.spec import FeatureSpec

USERS, ITEMS = 6_040, 4_000
SIZES = (1, 50, 200, 500)
NOW = datetime(2024, 6, 1, tzinfo=timezone.utc)
MEASURES: dict[str, dict[str, Any]] = {
    "acts": {"measure": "count"},
    "acts_28d": {"measure": "count", "window_days": 28},
    "spent": {"measure": "sum", "column": "price"},
}
Figures = dict[str, dict[str, float]]
Request = tuple[str, list[str]]


class InputError(ValueError):
    """What the benchmark reads is missing."""


def plain_spec() -> FeatureSpec:
    """Keys, and three aggregates of each."""
    columns: list[dict[str, Any]] = [
        {"name": "user", "kind": "categorical", "owner": "user"},
        {"name": "item", "kind": "categorical", "owner": "item"},
    ]
    columns += [
        {"name": f"{key}_{name}", "kind": "numeric", "aggregate": {"by": [key], **measure}}
        for key in ("user", "item")
        for name, measure in MEASURES.items()
    ]
    return FeatureSpec.model_validate(
        {
            "entities": {"user": "user", "item": "item", "request": "request"},
            "label": {"name": "bought", "values": [0, 1]},
            "columns": columns,
        }
    )


def plain_rows(key: str, count: int) -> pa.Table:
    """One snapshot row of each key."""
    draw = np.random.default_rng(0)
    stamps = pa.array([NOW - timedelta(days=1)] * count, pa.timestamp("us", "UTC"))
    return pa.table(
        {
            key: [f"{key}{i}" for i in range(count)],
            f"{key}_acts": draw.integers(0, 500, count),
            f"{key}_acts_28d": draw.integers(0, 50, count),
            f"{key}_spent": draw.random(count) * 100,
            "event_timestamp": stamps,
            "created_timestamp": stamps,
        }
    )


# -- stores --------------------------------------------------------------------------------------


@contextmanager
def redis_server() -> Iterator[dict[str, Any] | None]:
    """Feast's settings of a Redis of our own on a free port; None where there is none."""
    if shutil.which("redis-server") is None:
        yield None
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = ["--port", port, "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    server = subprocess.Popen(["redis-server", *arguments], stdout=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", int(port))):
                break
            time.sleep(0.05)
        yield {"type": "redis", "connection_string": f"127.0.0.1:{port}"}
    finally:
        server.kill()
        server.wait()


def our_store(
    folder: Path, spec: FeatureSpec, online_store: dict[str, Any] | None, project: str
) -> OnlineFeatures:
    """The features of a folder with sources, applied and materialised to an online store."""
    config = {"project": project, "folder": "features"}
    settings = config | ({"online_store": online_store} if online_store else {})
    repo = FeatureRepo(FeatureStoreConfig.model_validate(settings), folder)
    repo.apply(spec)
    newest = [
        pq.read_table(path, columns=["event_timestamp"])["event_timestamp"].to_pylist()
        for path in sorted(repo.folder.glob("views/*/*.parquet"))
    ]
    repo.materialise(spec, max(max(moments) for moments in newest))
    return OnlineFeatures.open(repo, spec)


def plain_store(folder: Path, online_store: dict[str, Any] | None, project: str) -> OnlineFeatures:
    """Ours, of the two views."""
    for key, count in (("user", USERS), ("item", ITEMS)):
        path = folder / "features/views" / f"{key}_interactions" / "000001.parquet"
        write_parquet(plain_rows(key, count), path)
    return our_store(folder, plain_spec(), online_store, project)


def feasts_store(folder: Path, online_store: dict[str, Any]) -> Any:
    """Feast as its own documentation sets it up, with both views online."""
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, ValueType
    from feast.types import Float64, Int64

    settings = {
        "project": "peer",
        "provider": "local",
        "registry": {"registry_type": "sql", "path": f"sqlite:///{folder}/registry.db"},
        "offline_store": {"type": "duckdb"},
        "online_store": online_store,
        "entity_key_serialization_version": 3,
    }
    folder.mkdir(parents=True)
    (folder / "feature_store.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    objects: list[Any] = []
    for key, count in (("user", USERS), ("item", ITEMS)):
        path = folder / f"{key}.parquet"
        write_parquet(plain_rows(key, count), path)
        entity = Entity(name=key, join_keys=[key], value_type=ValueType.STRING)
        types = {"acts": Int64, "acts_28d": Int64, "spent": Float64}
        objects += [
            entity,
            FeatureView(
                name=f"{key}_view",
                entities=[entity],
                schema=[Field(name=f"{key}_{name}", dtype=kind) for name, kind in types.items()],
                source=FileSource(path=str(path), timestamp_field="event_timestamp"),
                ttl=timedelta(0),
            ),
        ]
    store = FeatureStore(repo_path=str(folder))
    store.apply(objects)
    store.materialize(NOW - timedelta(days=30), NOW)
    return store


# -- measuring -----------------------------------------------------------------------------------


def timed(act: Callable[[Request], object], requests: Sequence[Request]) -> dict[str, float]:
    """Median and 95th percentile of an act, in milliseconds, after some to warm up."""
    for request in requests[: max(3, len(requests) // 10)]:
        act(request)
    seconds = []
    for request in requests:
        started = time.perf_counter()
        act(request)
        seconds.append(time.perf_counter() - started)
    return {
        "median_ms": statistics.median(seconds) * 1e3,
        "p95_ms": float(np.percentile(seconds, 95)) * 1e3,
    }


def reads(online: OnlineFeatures, context: Mapping[str, Any], moment: datetime) -> Any:
    """What a request does: from keys to the frame that the encoder takes."""
    item = online.spec.entities.item

    def frame(request: Request) -> object:
        user, items = request
        return online.frame(user, context, [{item: key} for key in items], moment)

    return frame


def feasts_reads(store: Any) -> Callable[[Request], object]:
    """All rows through Feast, as plain Python."""
    references = [f"{key}_view:{key}_{name}" for key in ("user", "item") for name in MEASURES]

    def read(request: Request) -> object:
        user, items = request
        rows = [{"user": user, "item": item} for item in items]
        return store.get_online_features(references, rows).to_dict()

    return read


def plain_requests(count: int, items: int) -> list[Request]:
    """Users and items at random; each request has other ones."""
    draw = np.random.default_rng(1)
    return [
        (
            f"user{draw.integers(USERS)}",
            [f"item{i}" for i in draw.choice(ITEMS, items, replace=False)],
        )
        for _ in range(count)
    ]


def measure_plain(folder: Path, redis: dict[str, Any] | None, rounds: int) -> dict[str, Figures]:
    """Reader → number of items → figures."""
    readers: dict[str, Callable[[Request], object]] = {}
    ours = plain_store(folder / "ours", None, "ours")
    readers["ours, SQLite"] = reads(ours, {}, NOW)
    peer = {"type": "sqlite", "path": str(folder / "peer/online.db")}
    readers["Feast, SQLite"] = feasts_reads(feasts_store(folder / "peer", peer))
    if redis:
        cached = plain_store(folder / "ours_redis", redis, "ours")
        readers["ours, Redis"] = reads(cached, {}, NOW)
        readers["Feast, Redis"] = feasts_reads(feasts_store(folder / "peer_redis", redis))
    figures: dict[str, Figures] = {}
    for name, reader in sorted(readers.items(), key=lambda pair: not pair[0].startswith("ours")):
        figures[name] = {}
        for size in SIZES:
            # Feast takes some 60 ms for 500 rows.
            count = rounds if name.startswith("ours") else max(10, rounds // 5)
            figures[name][str(size)] = timed(reader, plain_requests(count, size))
    return figures


def measure_run(
    data: Path, folder: Path, redis: dict[str, Any] | None, rounds: int
) -> dict[str, Any]:
    """All features of a run's deployment, for one user and 500 candidates of its newest week.

    Raises:
        InputError: the run's files are missing.
    """
    needed = ("04_feature/views", "05_model_input/training_frame.parquet")
    spec_path = data / "05_model_input/encoder/spec.json"
    missing = [name for name in needed if not (data / name).exists()]
    if missing or not spec_path.exists():
        raise InputError(f"{data} has no {', '.join([*missing]) or spec_path}; run: make run")
    spec = FeatureSpec.from_json(spec_path.read_text(encoding="utf-8"))
    frame = pq.read_table(
        data / "05_model_input/training_frame.parquet",
        columns=[
            *dict.fromkeys([*spec.keys, *(c.name for c in spec.raw_columns("context"))]),
            "event_timestamp",
        ],
    ).sort_by("event_timestamp")
    newest = frame.slice(max(0, len(frame) - 50_000))
    shown = list(dict.fromkeys(newest[spec.entities.item].to_pylist()))
    users = list(dict.fromkeys(newest[spec.entities.user].to_pylist()))
    draw = np.random.default_rng(2)
    count = min(500, len(shown))
    requests = [
        (
            users[int(draw.integers(len(users)))],
            [shown[i] for i in draw.choice(len(shown), count, replace=False)],
        )
        for _ in range(rounds)
    ]
    last = newest.slice(len(newest) - 1).to_pylist()[0]
    context = {column.name: last[column.name] for column in spec.raw_columns("context")}
    figures: Figures = {}
    views = len(spec.views)
    for name, settings in {"ours, SQLite": None, "ours, Redis": redis}.items():
        if name.endswith("Redis") and redis is None:
            continue
        target = folder / name.replace(", ", "_")
        target.mkdir()
        # The run's own registry and online store stay as they are.
        (target / "features").mkdir()
        for kind in ("attributes", "views", "packed"):
            (target / "features" / kind).symlink_to((data / "04_feature" / kind).resolve())
        online = our_store(target, spec, settings, "run")
        moment = last["event_timestamp"] + timedelta(days=1)
        figures[name] = timed(reads(online, context, moment), requests)
    return {
        "candidates": count,
        "columns": len(spec.columns),
        "views": views,
        "spec_hash": spec.hash,
        "readers": figures,
    }


# -- the tables ----------------------------------------------------------------------------------


def table(figures: Mapping[str, Any]) -> str:
    """The figures for people."""
    lines = [
        "One user and some items, two views of three features: milliseconds, median (p95)",
        "items".ljust(16) + "".join(str(size).rjust(18) for size in SIZES),
    ]

    def cell(found: Mapping[str, float]) -> str:
        return f"{found['median_ms']:.2f} ({found['p95_ms']:.2f})".rjust(18)

    for name, sizes in figures["plain"].items():
        lines.append(name.ljust(16) + "".join(cell(sizes[str(size)]) for size in SIZES))
    if not figures["redis"]:
        lines.append("Redis: skipped, there is no redis-server on the path")
    run = figures["run"]
    if run:
        lines += [
            "",
            f"A run's deployment, {run['columns']} columns of {run['views']} views, one user and "
            f"{run['candidates']} candidates",
            *(name.ljust(16) + cell(found) for name, found in run["readers"].items()),
        ]
    return "\n".join([*lines, "", f"hardware: {figures['hardware']}"])


def measure(data: Path | None, rounds: int) -> dict[str, Any]:
    """All figures, ready for JSON."""
    quiet = contextlib.redirect_stdout(io.StringIO())  # Feast prints its progress
    with tempfile.TemporaryDirectory() as name, redis_server() as redis, quiet:
        folder = Path(name)
        return {
            "rounds": rounds,
            "redis": redis is not None,
            "plain": measure_plain(folder, redis, rounds),
            "run": measure_run(data, folder, redis, rounds) if data else None,
            "hardware": hardware(),
        }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="How long the features of a request take.")
    parser.add_argument("--data", type=Path, help="folder of a run, to measure its features too")
    parser.add_argument("--rounds", type=int, help="requests per figure (1000; 50 with --quick)")
    parser.add_argument("--quick", action="store_true", help="few requests")
    parser.add_argument("--json", action="store_true", help="the last line is a JSON object")
    given = parser.parse_args()
    rounds = given.rounds or (50 if given.quick else 1000)
    if rounds < 10:
        parser.error(f"--rounds is {rounds}; a 95th percentile needs 10 or more")
    warnings.simplefilter("ignore")
    try:
        figures = measure(given.data, rounds)
    except InputError as error:
        raise SystemExit(f"online_reads: {error}") from None
    print(table(figures))
    if given.json:
        print(json.dumps(figures, allow_nan=False))


if __name__ == "__main__":
    main()
