"""How fast are candidates ranked: the network alone, and the service with all of it.

Two measurements. ``network``: the shape of the paper's deep part (1,200 inputs, layers of 1024,
512 and 256) for 500 candidates of one user, by torch as it is trained and by the fast path.
``service``: requests over HTTP to the service as a process, features looked up, on the champion of
a run.

    python benchmarks/ranking.py                       # both; the second on what `make run` left
    python benchmarks/ranking.py --cores 2 --json
    python benchmarks/ranking.py --quick               # fewer requests, the `test` environment
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
import yaml

from fathom.config import TrainingConfig
from fathom.encoding import Encoder, Frame, Values, fit_encoder
from fathom.fast import FastScorer
from fathom.feature_store import FeatureRepo, FeatureStoreConfig
from fathom.hardware import hardware
from fathom.lookup import spread_frame
from fathom.models import Inputs, build
from fathom.ranker import Ranker
from fathom.registry import Registry
from fathom.spec import FeatureSpec
from replay import InputError, service

SIZES = (50, 200, 500, 1000)
#: Of the paper's network: columns of 32 that users, items and contexts have, and numbers.
OWNERS, WIDTH, NUMBERS = {"user": 12, "item": 18, "context": 6}, 32, 24
HIDDEN = (1024, 512, 256)
VALUES, CANDIDATES = 5_000, 500


# -- the network ---------------------------------------------------------------------------------


def paper_spec() -> FeatureSpec:
    """36 columns of width 32 and 24 numbers (two inputs each): 1,200 inputs."""
    columns: list[dict[str, Any]] = [
        {"name": f"{owner}{i}", "kind": "categorical", "owner": owner, "embedding": WIDTH}
        for owner, count in OWNERS.items()
        for i in range(count)
    ]
    columns += [
        {"name": f"number{i}", "kind": "numeric", "owner": "item" if i % 2 else "user"}
        for i in range(NUMBERS)
    ]
    entities = {"user": "user0", "item": "item0", "request": "request"}
    label = {"name": "clicked", "values": [0, 1]}
    return FeatureSpec.model_validate({"entities": entities, "label": label, "columns": columns})


def drawn(spec: FeatureSpec, rows: int, seed: int = 0) -> dict[str, Values]:
    """Random rows of the columns."""
    draw = np.random.default_rng(seed)
    frame: dict[str, Values] = {}
    for column in spec.columns:
        if column.is_numeric:
            frame[column.name] = draw.random(rows).astype(np.float32)
        else:
            values = np.empty(rows, object)
            values[:] = [f"v{i}" for i in draw.integers(0, VALUES, rows)]
            frame[column.name] = values
    return frame


def network(rounds: int) -> dict[str, Any]:
    """Milliseconds for 500 candidates of one user, one thread."""
    spec = paper_spec()
    encoder = fit_encoder(drawn(spec, 20 * VALUES), spec)
    assert encoder.layout.deep_width == 1200
    config = TrainingConfig(model="deep", hidden=HIDDEN)
    model = build(encoder.layout, config).eval()
    ranker = Ranker(encoder, model, config)
    fast = FastScorer(ranker)
    columns = _of_one_user(drawn(spec, CANDIDATES, 1), spec)
    frame = spread_frame(columns, CANDIDATES)
    inputs = Inputs.of(encoder.encode(frame))
    difference = np.abs(ranker.score(frame) - fast.score(columns, CANDIDATES)).max()

    def eager() -> None:
        with torch.inference_mode():
            model(inputs)

    acts: dict[str, Callable[[], object]] = {
        "torch, encoded already": eager,
        "torch, with encoding": lambda: ranker.score(frame),
        "fast path, with encoding": lambda: fast.score(columns, CANDIDATES),
    }
    found: dict[str, list[float]] = {name: [] for name in acts}
    for turn in range(rounds + 3):  # interleaved, the first ones to warm up
        for name, act in acts.items():
            started = time.perf_counter()
            act()
            if turn >= 3:
                found[name].append(time.perf_counter() - started)
    return {
        "candidates": CANDIDATES,
        "largest_difference": float(difference),
        "ms": {name: _quantiles(seconds) for name, seconds in found.items()},
    }


def _of_one_user(frame: Frame, spec: FeatureSpec) -> dict[str, Values]:
    """The rows as candidates of one user: what is not the item's is the first row's for all."""
    return {
        name: values if spec.owner(name) == "item" else values[:1]  # type: ignore[index]
        for name, values in frame.items()
    }


# -- the service ---------------------------------------------------------------------------------


def asked(data: Path, spec: FeatureSpec, size: int, count: int) -> list[dict[str, Any]]:
    """Requests of known users with known items, in the context of one of their exposures."""
    keys = spec.entities
    context = [column.name for column in spec.raw_columns("context")]
    read = pq.read_table(data / "05_model_input/test.parquet").slice(0, 200_000)
    rows = read.select(list(dict.fromkeys([keys.user, keys.item, *context]))).to_pylist()
    items = list(dict.fromkeys(row[keys.item] for row in rows))
    if len(items) < size:
        raise InputError(f"{data} has {len(items)} items in its test split; {size} are asked for")
    draw = np.random.default_rng(size)
    golden = json.loads((_champion(data) / "golden.json").read_text(encoding="utf-8"))
    found = []
    for row in draw.choice(len(rows), count):
        chosen = draw.choice(len(items), size, replace=False)
        found.append(
            {
                "user": rows[row][keys.user],
                "context": {name: rows[row][name] for name in context},
                "candidates": [items[i] for i in chosen],
                "timestamp": golden.get("timestamp"),
            }
        )
    return found


def _champion(data: Path) -> Path:
    registry = Registry(data / "06_models/registry")
    version = registry.champion()
    if version is None:
        raise InputError(f"{data} has no champion; make a whole run first: kedro run")
    return registry.path(version)


def over_http(data: Path, cores: int, requests: int, seconds: float) -> dict[str, Any]:
    """Latencies by number of candidates with one connection, and a rush of requests."""
    folder = _champion(data)
    encoder = Encoder.load(folder)
    settings = yaml.safe_load(Path("conf/base/parameters.yml").read_text(encoding="utf-8"))
    config = {"project": settings["feature_store"]["project"], "folder": f"{data}/04_feature"}
    repo = FeatureRepo(FeatureStoreConfig.model_validate(config), Path.cwd())
    os.environ["OMP_NUM_THREADS"] = str(cores)
    with (
        tempfile.TemporaryDirectory() as temporary,
        service(folder, repo, Path(temporary) / "log", logged=False) as client,
    ):
        server = _server(client)
        for process in (server, *server.children(recursive=True)):
            process.cpu_affinity(list(range(cores)))
        latencies = {}
        for size in SIZES:
            bodies = [json.dumps(r) for r in asked(data, encoder.spec, size, requests)]
            taken = [_timed(client, body) for body in bodies]
            kept = taken[len(taken) // 10 :]
            latencies[size] = _quantiles(kept) | {
                "requests_per_second": 1 / statistics.fmean(kept),
                "items_per_second": size / statistics.fmean(kept),
            }
        rush = _rush(client, asked(data, encoder.spec, 200, 200), seconds)
        memory = sum(p.memory_info().rss for p in (server, *server.children(recursive=True)))
    return {"cores": cores, "latency": latencies, "rush": rush, "memory_mb": memory / 2**20}


def _server(client: httpx.Client) -> psutil.Process:
    port = client.base_url.port
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
            process = psutil.Process(connection.pid)
            while "bentoml" in " ".join((parent := process.parent()).cmdline()):
                process = parent
            return process
    raise RuntimeError(f"nothing listens on port {port}")


def _timed(client: httpx.Client, body: str) -> float:
    started = time.perf_counter()
    client.post("/rank", content=body).raise_for_status()
    return time.perf_counter() - started


def _rush(
    client: httpx.Client, requests: Sequence[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    """At a rate that can be sustained, then at twice of it: latencies of what is let in."""
    bodies = [json.dumps(request) for request in requests]
    alone = statistics.fmean(_timed(client, body) for body in bodies[:50])
    rate = 0.7 / alone
    found = {}
    for name, times in (("sustained", 1.0), ("twice", 2.0), ("after", 1.0)):
        found[name] = _at_rate(client, bodies, times * rate, seconds if times > 1 else seconds / 2)
    return found


def _at_rate(
    client: httpx.Client, bodies: Sequence[str], rate: float, seconds: float
) -> dict[str, Any]:
    """Requests at moments that do not wait for answers (an open loop)."""
    statuses: list[int] = []
    taken: list[float] = []

    def ask(body: str) -> None:
        started = time.perf_counter()
        status = client.post("/rank", content=body).status_code
        statuses.append(status)
        if status == 200:
            taken.append(time.perf_counter() - started)

    draw = np.random.default_rng(0)
    threads = []
    moment = time.perf_counter()
    until = moment + seconds
    while moment < until:
        moment += float(draw.exponential(1 / rate))
        time.sleep(max(0.0, moment - time.perf_counter()))
        threads.append(threading.Thread(target=ask, args=(bodies[len(threads) % len(bodies)],)))
        threads[-1].start()
    for thread in threads:
        thread.join()
    counts = {str(status): statuses.count(status) for status in sorted(set(statuses))}
    return {"rate": rate, "statuses": counts, **_quantiles(taken)}


def _quantiles(seconds: Sequence[float]) -> dict[str, float]:
    p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1e3
    return {"p50_ms": float(p50), "p99_ms": float(p99)}


# -- the command ---------------------------------------------------------------------------------


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text."""
    paper, served = figures["network"], figures["service"]
    lines = [f"{paper['candidates']} candidates, 1,200 inputs, layers {HIDDEN}, one thread"]
    base = paper["ms"]["torch, encoded already"]["p50_ms"]
    for name, found in paper["ms"].items():
        times = base / found["p50_ms"]
        lines.append(
            f"  {name:28}{found['p50_ms']:9.2f} ms  p99 {found['p99_ms']:.2f}  {times:.2f}x"
        )
    lines.append(f"  largest difference of a probability: {paper['largest_difference']:.1e}")
    lines += ["", f"over HTTP with features, one connection, {served['cores']} core(s)"]
    lines.append("  candidates      p50 ms    p99 ms  requests/s     items/s")
    for size, found in served["latency"].items():
        lines.append(
            f"  {size:10}{found['p50_ms']:12.2f}{found['p99_ms']:10.2f}"
            f"{found['requests_per_second']:12.0f}{found['items_per_second']:12,.0f}"
        )
    lines += ["", "open loop, 200 candidates"]
    for name, found in served["rush"].items():
        lines.append(
            f"  {name:10}{found['rate']:8.0f}/s  p50 {found['p50_ms']:.1f} ms  p99 "
            f"{found['p99_ms']:.1f} ms  {found['statuses']}"
        )
    lines.append(f"memory of the service: {served['memory_mb']:,.0f} MB")
    return "\n".join([*lines, f"hardware: {figures['hardware']}"])


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="How fast candidates are ranked.")
    parser.add_argument("--data", type=Path, help="folder of a run (data; data/test with --quick)")
    parser.add_argument("--cores", type=int, default=1, help="of the service (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer requests, on data/test")
    parser.add_argument("--json", action="store_true", help="the last line is a JSON object")
    given = parser.parse_args()
    data = given.data or Path("data/test" if given.quick else "data")
    torch.set_num_threads(1)
    try:
        served = over_http(data, given.cores, 20 if given.quick else 300, 3 if given.quick else 60)
    except InputError as error:
        raise SystemExit(f"ranking: {error}") from None
    figures = {
        "benchmark": "ranking",
        "network": network(5 if given.quick else 50),
        "service": served,
        "hardware": hardware(),
    }
    print(table(figures))
    if given.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
