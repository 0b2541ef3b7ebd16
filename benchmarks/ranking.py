"""How fast are candidates ranked, features looked up, over HTTP? And what happens in a rush?

The service as a process, on the champion of a run; beside it whole rows sent to ``/predict``, as to
a server of models. (``online_reads.py`` has Feast's own reads of as many rows.)

    python benchmarks/ranking.py                       # on what `make run` left
    python benchmarks/ranking.py --cores 2 --json
    python benchmarks/ranking.py --quick               # fewer requests, the `test` environment
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pyarrow.parquet as pq
import torch
import yaml

from fathom.encoding import Encoder
from fathom.fast import FastScorer
from fathom.feature_store import FeatureRepo, FeatureStoreConfig, frame_of
from fathom.hardware import hardware
from fathom.ranker import Ranker, rows_of_frame
from fathom.registry import Registry
from fathom.spec import FeatureSpec
from scoring import agreement, quantiles
from skew import InputError, service

SIZES = (1000, 500, 200, 50)
CANDIDATES = 200


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
    spec = Encoder.load(folder).spec
    os.environ["OMP_NUM_THREADS"] = str(cores)
    with (
        tempfile.TemporaryDirectory() as temporary,
        service(folder, _repo(data), Path(temporary) / "log", logged=False) as client,
    ):
        server = _server(client)
        for process in (server, *server.children(recursive=True)):
            process.cpu_affinity(list(range(cores)))
        # What is kept of items is computed when they are first seen, so one size comes twice.
        sizes = {f"{CANDIDATES} first seen": CANDIDATES, **{f"{size}": size for size in SIZES}}
        found = {
            f"/rank, {name}": _latency(client, "/rank", asked(data, spec, size, requests))
            for name, size in sizes.items()
        }
        rows = _rows(data, spec, CANDIDATES)
        found[f"/predict, {CANDIDATES}"] = _latency(client, "/predict", [{"rows": rows}] * requests)
        before = _memory_mb(server)
        rush = _rush(client, asked(data, spec, CANDIDATES, 200), seconds)
        memory = {"before the rush": before, "after": _memory_mb(server)}
    return {"cores": cores, "latency": found, "rush": rush, "memory_mb": memory}


def _memory_mb(server: psutil.Process) -> float:
    """Resident memory of the service's processes, MiB."""
    processes = (server, *server.children(recursive=True))
    return float(sum(process.memory_info().rss for process in processes)) / 2**20


def _repo(data: Path) -> FeatureRepo:
    settings = yaml.safe_load(Path("conf/base/parameters.yml").read_text(encoding="utf-8"))
    config = {"project": settings["feature_store"]["project"], "folder": f"{data}/04_feature"}
    return FeatureRepo(FeatureStoreConfig.model_validate(config), Path.cwd())


def _rows(data: Path, spec: FeatureSpec, count: int) -> list[dict[str, Any]]:
    """Rows of the test split, as ``/predict`` takes them."""
    frame = frame_of(pq.read_table(data / "05_model_input/test.parquet").slice(0, count))
    return rows_of_frame(frame, spec, range(count))


def _latency(
    client: httpx.Client, path: str, requests: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    connection = _connection(client)
    bodies = [json.dumps(request) for request in requests]
    taken = [_timed(connection, path, body)[1] for body in bodies]
    connection.close()
    kept = taken[len(taken) // 10 :]
    sent = requests[0].get("candidates") or requests[0]["rows"]
    rate = 1 / statistics.fmean(kept)
    return quantiles(kept) | {"requests_per_second": rate, "items_per_second": len(sent) * rate}


def _connection(client: httpx.Client) -> http.client.HTTPConnection:
    """A client that takes less of the time than httpx."""
    return http.client.HTTPConnection("127.0.0.1", client.base_url.port, timeout=30)


def precision(data: Path) -> dict[str, float]:
    """How far bfloat16 moves the champion's scores, on rows of the test split."""
    ranker = Ranker.load(_champion(data))
    table = pq.read_table(data / "05_model_input/test.parquet").slice(0, 2_000)
    frame = {n: v for n, v in frame_of(table).items() if n in ranker.spec.by_name}
    half = FastScorer(ranker, precision="bfloat16").score(frame, len(table))
    return agreement(half, ranker.score(frame))


def _server(client: httpx.Client) -> psutil.Process:
    port = client.base_url.port
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port:
            process = psutil.Process(connection.pid)
            while "bentoml" in " ".join((parent := process.parent()).cmdline()):
                process = parent
            return process
    raise RuntimeError(f"nothing listens on port {port}")


def _timed(connection: http.client.HTTPConnection, path: str, body: str) -> tuple[int, float]:
    """An answer's status, and seconds until all of it was there."""
    started = time.perf_counter()
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    answer.read()
    return answer.status, time.perf_counter() - started


def _rush(
    client: httpx.Client, requests: Sequence[dict[str, Any]], seconds: float
) -> dict[str, Any]:
    """At a rate that can be sustained, then at twice of it: latencies of what is let in."""
    bodies = [json.dumps(request) for request in requests]
    alone = 1 / _latency(client, "/rank", requests[:50])["requests_per_second"]
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
        connection = _connection(client)
        status, seconds = _timed(connection, "/rank", body)
        connection.close()
        statuses.append(status)
        if status == 200:
            taken.append(seconds)

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
    return {"rate": rate, "statuses": counts, **quantiles(taken)}


# -- the command ---------------------------------------------------------------------------------


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text."""
    served, half = figures["service"], figures["bfloat16"]
    lines = [f"over HTTP with features, one connection, {served['cores']} core(s)"]
    lines.append("  candidates              p50 ms    p99 ms  requests/s     items/s")
    for name, found in served["latency"].items():
        lines.append(
            f"  {name:18}{found['p50_ms']:12.2f}{found['p99_ms']:10.2f}"
            f"{found['requests_per_second']:12.0f}{found['items_per_second']:12,.0f}"
        )
    lines += ["", f"open loop, {CANDIDATES} candidates"]
    for name, found in served["rush"].items():
        lines.append(
            f"  {name:10}{found['rate']:8.0f}/s  p50 {found['p50_ms']:.1f} ms  p99 "
            f"{found['p99_ms']:.1f} ms  {found['statuses']}"
        )
    memory = ", ".join(f"{mb:,.0f} {when}" for when, mb in served["memory_mb"].items())
    lines.append(f"memory of the service, MiB: {memory}")
    lines.append(
        f"bfloat16: probabilities differ by {half['largest_difference']:.1e} at most, "
        f"{half['pairs_in_order']:.2%} of pairs in order"
    )
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
        "service": served,
        "bfloat16": precision(data),
        "hardware": hardware(),
    }
    print(table(figures))
    if given.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
