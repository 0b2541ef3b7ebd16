"""Is what is served what training saw? Exposures of a run, scored offline and by a real service.

The online store is filled as of the start of the run's last whole step (a day, by default), and
exposures of that step are sent to the service as the requests they were, one per basket. Their
probabilities are compared with those that the ranker gives to the rows of the training frame, and
the feature vectors that the service logged with those that history gives (`fathom.skew`).

    python benchmarks/skew.py                        # 10,000 exposures of `data`, or all of it
    python benchmarks/skew.py --exposures 500 --json
    python benchmarks/skew.py --quick                # 500 exposures, the `test` environment
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fathom.feature_store import FeatureRepo, FeatureStoreConfig, frame_of, write_parquet
from fathom.features import is_packable, newest, packed, packed_name
from fathom.hardware import hardware
from fathom.ranker import Ranker
from fathom.registry import Registry
from fathom.skew import SkewConfig, replay
from fathom.spec import EVENT_TIMESTAMP, FeatureSpec

START_SECONDS = 120
_NEEDED = ("04_feature/views", "05_model_input/training_frame.parquet", "06_models/registry")


class InputError(ValueError):
    """What the benchmark reads is missing."""


@dataclass(frozen=True)
class Basket:
    """The exposures of one request: what is sent, and their rows."""

    request: dict[str, Any]
    items: list[str]
    rows: list[int]


# -- the run -------------------------------------------------------------------------------------


def exposures(data: Path, spec: FeatureSpec, count: int) -> tuple[pa.Table, datetime]:
    """Rows of the training frame's last whole step, ``count`` if there are as many, and its start.

    Features advance with each step, so those of a later one are not what was online.
    """
    frame = pq.read_table(data / "05_model_input/training_frame.parquet")
    frame = frame.sort_by(EVENT_TIMESTAMP)
    last = pc.max(frame[EVENT_TIMESTAMP]).as_py().astimezone(timezone.utc)
    steps = (last - spec.grain_origin) // spec.grain
    moment = spec.grain_origin + (steps - 1) * spec.grain
    limits = [pa.scalar(m, frame[EVENT_TIMESTAMP].type) for m in (moment, moment + spec.grain)]
    step = frame.filter(
        pc.and_(
            pc.greater_equal(frame[EVENT_TIMESTAMP], limits[0]),
            pc.less(frame[EVENT_TIMESTAMP], limits[1]),
        )
    )
    # Whole requests only: the first ones, until there are enough rows.
    names = dict.fromkeys(step.slice(0, count)[spec.entities.request].to_pylist())
    kept = pc.is_in(step[spec.entities.request], pa.array(list(names)))
    return step.filter(kept), moment


def baskets(rows: pa.Table, spec: FeatureSpec) -> list[Basket]:
    """The requests that the exposures were, as `/rank` takes them."""
    keys = (spec.entities.request, spec.entities.user, EVENT_TIMESTAMP)
    context = [column.name for column in spec.raw_columns("context")]
    found: dict[tuple[Any, ...], list[int]] = {}
    plain = rows.select(dict.fromkeys([*keys, spec.entities.item, *context])).to_pylist()
    for i, row in enumerate(plain):
        found.setdefault(tuple(row[key] for key in keys), []).append(i)
    made = []
    for (_, user, moment), members in found.items():
        candidates = [
            {
                "item": plain[i][spec.entities.item],
                "context": {name: plain[i][name] for name in context},
            }
            for i in members
        ]
        request = {"user": user, "candidates": candidates, "timestamp": moment.isoformat()}
        made.append(Basket(request, [c["item"] for c in candidates], members))
    return made


def store_as_of(data: Path, folder: Path, spec: FeatureSpec, moment: datetime) -> FeatureRepo:
    """A feature store of its own with the run's history, online as of a moment."""
    import ibis

    repo = FeatureRepo(FeatureStoreConfig(folder="features"), folder)
    repo.folder.mkdir(parents=True)
    for kind in ("attributes", "views"):
        (repo.folder / kind).symlink_to((data / "04_feature" / kind).resolve())
    connection = ibis.duckdb.connect()
    connection.raw_sql("SET TimeZone='UTC'")
    for view in spec.views:
        if is_packable(spec, view):
            rows = connection.read_parquet(sorted(repo.source(view).glob("[!.]*.parquet")))
            known = rows.filter(rows[EVENT_TIMESTAMP] <= ibis.literal(moment))
            found = packed(newest(known, spec, view), spec, view)
            path = repo.source(packed_name(view)) / "000001.parquet"
            write_parquet(connection.to_pyarrow(found), path)
    repo.apply(spec)
    repo.materialise(spec, moment)
    return repo


# -- the service ---------------------------------------------------------------------------------


@contextmanager
def service(
    ranker: Path, repo: FeatureRepo, log: Path, logged: bool = True
) -> Iterator[httpx.Client]:
    """The service as a process of its own, stopped in the end, so that its log is written."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = log.parent / "bentoml"
    environment = {
        **os.environ,
        "FATHOM_RANKER": str(ranker.resolve()),
        "FATHOM_FEATURE_STORE": json.dumps({"root": str(repo.root), **repo.config.model_dump()}),
        **({"FATHOM_FEATURE_LOG": str(log)} if logged else {}),
        "BENTOML_HOME": str(home),
        "BENTOML_DO_NOT_TRACK": "True",
        "PYTHONPATH": os.pathsep.join(sys.path[1:]),
    }
    command = ["bentoml", "serve", "fathom.service:RankingService", "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=log.parent,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30
        ) as client:
            deadline = time.monotonic() + START_SECONDS
            while not _ready(client):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the service did not start: {' '.join(command)}")
                time.sleep(0.2)
            yield client
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


def _ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz", timeout=1).status_code == 200
    except httpx.HTTPError:
        return False


def served(client: httpx.Client, asked: Sequence[Basket], rows: int) -> tuple[Any, list[float]]:
    """Probabilities by row, shape (rows,), and the seconds that each answer took."""
    probabilities, seconds = np.full(rows, np.nan), []
    for basket in asked:
        started = time.perf_counter()
        answer = client.post("/rank", json=basket.request)
        seconds.append(time.perf_counter() - started)
        answer.raise_for_status()
        if answer.json()["degraded"]:
            raise RuntimeError("an answer was degraded; the online store did not answer in time")
        found: dict[str, list[float]] = {}
        for item in answer.json()["items"]:
            found.setdefault(item["item"], []).append(item["probability"])
        for item, row in zip(basket.items, basket.rows, strict=True):
            probabilities[row] = found[item].pop(0)
    return probabilities, seconds


# -- measuring -----------------------------------------------------------------------------------


def measure(data: Path, count: int) -> dict[str, Any]:
    """Serve, score and replay.

    Raises:
        InputError: the run's files are missing, or it has no champion.
    """
    missing = [name for name in _NEEDED if not (data / name).exists()]
    registry = Registry(data / "06_models/registry")
    version = None if missing else registry.champion()
    if version is None:
        raise InputError(
            f"{data} has no {', '.join(missing) or 'champion'}; make a whole run first: kedro run"
        )
    ranker: Ranker = registry.load(version)
    spec = ranker.spec
    rows, moment = exposures(data, spec, count)
    asked = baskets(rows, spec)
    offline = ranker.score(frame_of(rows))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        repo = store_as_of(data, folder, spec, moment)
        with service(registry.path(version), repo, folder / "log") as client:
            online, seconds = served(client, asked, len(rows))
        began = time.perf_counter()
        config = SkewConfig(feature_log=str(folder / "log"))
        report = replay(repo, registry, config).as_dict()
        replayed = time.perf_counter() - began
    return {
        "version": version,
        "spec_hash": spec.hash,
        "as_of": moment.isoformat(),
        "exposures": len(rows),
        "requests": len(asked),
        "max_probability_difference": float(np.abs(online - offline).max()),
        "replay": report,
        "request_ms": {
            "median": statistics.median(seconds) * 1e3,
            "p95": float(np.percentile(seconds, 95)) * 1e3,
        },
        "replay_seconds": replayed,
        "hardware": hardware(),
    }


def table(figures: Mapping[str, Any]) -> str:
    """The figures for people."""
    replayed, times = figures["replay"], figures["request_ms"]
    lines = {
        "exposures": f"{figures['exposures']:,} in {figures['requests']:,} requests, features as "
        f"of {figures['as_of']}",
        "probabilities": "largest difference between offline and served "
        f"{figures['max_probability_difference']:.1e}",
        "feature vectors": f"{replayed['differing']:,} of {replayed['compared']:,} differ from "
        f"history, in {len(replayed['columns'])} columns",
        "request": f"{times['median']:.1f} ms median, {times['p95']:.1f} ms p95",
        "replay": f"{figures['replay_seconds']:.1f} s",
        "ranker": f"{figures['version']}, spec {figures['spec_hash'][:12]}",
        "hardware": figures["hardware"],
    }
    return "\n".join(f"{name:<16}{value}" for name, value in lines.items())


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Is what is served what training saw?")
    parser.add_argument("--data", type=Path, help="folder of a run (data; data/test with --quick)")
    parser.add_argument("--exposures", type=int, help="how many (10000; 500 with --quick)")
    parser.add_argument("--quick", action="store_true", help="few exposures, on data/test")
    parser.add_argument("--json", action="store_true", help="the last line is a JSON object")
    given = parser.parse_args()
    count = given.exposures or (500 if given.quick else 10_000)
    if count < 1:
        parser.error(f"--exposures is {count}; it must be 1 or more")
    warnings.simplefilter("ignore")
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Feast prints its progress
            figures = measure(given.data or Path("data/test" if given.quick else "data"), count)
    except InputError as error:
        raise SystemExit(f"skew: {error}") from None
    print(table(figures))
    if given.json:
        print(json.dumps(figures, allow_nan=False))


if __name__ == "__main__":
    main()
