"""Point-in-time joins: this project's offline store beside Feast's own, through Feast's interface.

A million events, each with the newest of 91 daily snapshots of its user and of its item. Every
store reads the same files for the same entity rows in a process of its own, so that its peak of
memory is its alone, and must return the same values. Then this project's alone, on more events.

    python benchmarks/point_in_time.py
    python benchmarks/point_in_time.py --plot benchmarks/results/point_in_time.svg --json
    python benchmarks/point_in_time.py --stores fathom duckdb --events 200000 --sizes
    python benchmarks/point_in_time.py --quick      # this project's store alone, and few events
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

import fathom
from fathom.files import write_text
from fathom.hardware import hardware, peak_memory_mb

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

STORES = {"fathom": "fathom.asof_store.AsofOfflineStore", "duckdb": "duckdb", "dask": "dask"}
REPEATS = {"fathom": 3, "duckdb": 3, "dask": 1}
#: What a store needs for a million events, measured; it is left out where that much is not free.
NEEDED_GB = {"fathom": 1, "duckdb": 8, "dask": 19}
SIZES = (1_000_000, 2_000_000, 5_000_000, 10_000_000)
QUICK_SIZES = (50_000, 100_000)
SEED = 7
START = "2024-01-01"


@dataclass(frozen=True)
class History:
    """The feature views: daily snapshots of users and of items, three features each."""

    days: int = 91
    users: int = 6_040
    items: int = 4_000

    @property
    def counts(self) -> dict[str, int]:
        return {"user": self.users, "item": self.items}


QUICK_HISTORY = History(days=20, users=600, items=400)
TARGETED = (History(), SIZES[0])


class BenchmarkError(RuntimeError):
    """A store's process failed."""


# -- what is measured ----------------------------------------------------------------------------


def write_history(history: History, folder: Path) -> None:
    """Write ``user.parquet`` and ``item.parquet``: key, two times, three features."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    day = np.timedelta64(1, "D").astype("timedelta64[us]")
    for seed, (key, count) in enumerate(history.counts.items()):
        random, rows = np.random.default_rng(seed), history.days * count
        moments = np.repeat(np.datetime64(START, "us") + np.arange(history.days) * day, count)
        columns = {
            key: np.tile(_keys(key, count), history.days),
            "event_timestamp": pa.array(moments, pa.timestamp("us", "UTC")),
            "created_timestamp": pa.array(moments + day // 24, pa.timestamp("us", "UTC")),
            f"{key}_count": random.integers(0, 1000, rows),
            f"{key}_rate": random.random(rows),
            f"{key}_score": random.normal(size=rows),
        }
        pq.write_table(pa.table(columns), folder / f"{key}.parquet")


def entity_rows(history: History, events: int) -> pd.DataFrame:
    """Users, items and moments drawn evenly: ``events`` rows, the same for every store."""
    import numpy as np
    import pandas as pd

    random = np.random.default_rng(SEED)
    columns = {
        key: _keys(key, count)[random.integers(0, count, events)]
        for key, count in history.counts.items()
    }
    microseconds = random.integers(0, history.days * 86_400_000_000, events)
    moments = np.datetime64(START, "us") + microseconds.astype("timedelta64[us]")
    return pd.DataFrame(columns | {"event_timestamp": pd.to_datetime(moments, utc=True)})


def _keys(key: str, count: int) -> Any:
    import numpy as np

    return np.array([f"{key[0]}{number}" for number in range(count)], object)


def read(store: str, folder: Path, history: History, events: int, repeats: int) -> dict[str, Any]:
    """Read the features of the events from the history in ``folder``; in this process.

    Returns:
        Seconds of each read; memory in MB before the first one, and the peak since the process
        began; and a checksum of the values, whatever their order and types.
    """
    features = _feature_store(store, folder, history)
    names = [
        f"{key}s:{key}_{name}" for key in history.counts for name in ("count", "rate", "score")
    ]
    rows = entity_rows(history, events)
    features.get_historical_features(rows[:10], names).to_arrow()  # imports, first calls
    gc.collect()
    before = psutil.Process().memory_info().rss >> 20
    seconds, table = [], None
    for _ in range(repeats):
        table = None
        gc.collect()
        started = time.perf_counter()
        table = features.get_historical_features(rows, names).to_arrow()
        seconds.append(round(time.perf_counter() - started, 3))
    peak = peak_memory_mb()
    return {
        "store": store,
        "events": events,
        "seconds": statistics.median(seconds),
        "runs": seconds,
        "peak_mb": peak,
        "before_mb": before,
        "added_mb": peak - before,
        "checksum": checksum(table),
    }


def _feature_store(store: str, folder: Path, history: History) -> Any:
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.types import Float64, Int64

    objects: list[Any] = []
    for key in history.counts:
        entity = Entity(name=key, join_keys=[key], value_type=ValueType.STRING)
        source = FileSource(
            name=f"{key}_source",
            path=str(folder / f"{key}.parquet"),
            timestamp_field="event_timestamp",
            created_timestamp_column="created_timestamp",
        )
        kinds = {"count": Int64, "rate": Float64, "score": Float64}
        schema = [Field(name=f"{key}_{name}", dtype=kind) for name, kind in kinds.items()]
        view = FeatureView(
            name=f"{key}s", entities=[entity], schema=schema, source=source, ttl=timedelta(0)
        )
        objects += [entity, view]
    features = FeatureStore(
        config=RepoConfig(
            project="benchmark",
            provider="local",
            registry=str(folder / f"{store}.db"),
            offline_store={"type": STORES[store]},
            online_store={"type": "sqlite", "path": str(folder / f"{store}_online.db")},
            entity_key_serialization_version=3,
            repo_path=folder,
        )
    )
    features.apply(objects)
    return features


def checksum(table: pa.Table) -> str:
    """A sum over the rows of a hash of each one's values; 1 and 1.0 are equal, and NaN and null."""
    import numpy as np
    import pandas as pd

    rows = np.zeros(table.num_rows, np.uint64)
    for name in sorted(table.column_names):
        values = table[name].to_pandas()
        if pd.api.types.is_datetime64_any_dtype(values):
            values = pd.to_datetime(values, utc=True).dt.as_unit("us").astype("int64")
        elif pd.api.types.is_numeric_dtype(values):
            values = values.astype("float64")
        # A column's place in the order of names tells equal values of two columns apart.
        rows = rows * np.uint64(1_000_003) + pd.util.hash_array(values.to_numpy())
    mixed = pd.util.hash_array(rows)
    return f"{int(mixed.sum(dtype=np.uint64)):016x}"


# -- one process for each measurement ------------------------------------------------------------


def _apart(task: str, **given: Any) -> Any:
    """Run `read` or `write_history` in a process of its own and return what it returns."""
    # The peak of a new process starts from that of its parent, so this one stays small.
    done = subprocess.run(
        [sys.executable, __file__, "--task", json.dumps({"task": task} | given)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        who = f"{task} {given.get('store', '')}".strip()
        if done.returncode < 0:
            raise BenchmarkError(f"{who} was ended by signal {-done.returncode}: out of memory?")
        said = done.stderr.strip().splitlines() or ["nothing"]
        raise BenchmarkError(f"{who} ended with {done.returncode}: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def _task(task: str, folder: str, history: Mapping[str, int], **given: Any) -> None:
    if task == "write":
        result: Any = write_history(History(**history), Path(folder))
    else:
        result = read(folder=Path(folder), history=History(**history), **given)
    print(json.dumps(result))


def measure(
    history: History, stores: Sequence[str], events: int, sizes: Sequence[int]
) -> dict[str, Any]:
    """Compare the stores on ``events`` events, then read ``sizes`` events with the first of them.

    Returns:
        The figures, ready for JSON.
    """
    found: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        here = {"folder": folder, "history": asdict(history)}
        _apart("write", **here)
        for store in stores:
            needed = NEEDED_GB[store] * events / 1e6
            free = psutil.virtual_memory().available / (1 << 30)
            if free < needed:
                left_out[store] = f"needs about {needed:.0f} GB of memory, {free:.0f} GB are free"
                continue
            try:
                found[store] = _apart(
                    "read", **here, store=store, events=events, repeats=REPEATS[store]
                )
            except BenchmarkError as error:
                left_out[store] = str(error)
        ours = found.get("fathom")
        scaling = [
            ours
            if ours and size == events
            else _apart("read", **here, store="fathom", events=size, repeats=REPEATS["fathom"])
            for size in sizes
        ]
    ratios = _ratios(found)
    return {
        "benchmark": "point_in_time",
        "history": asdict(history),
        "events": events,
        "stores": found,
        "left_out": left_out,
        "against_fathom": ratios,
        "same_values": len({run["checksum"] for run in found.values()}) <= 1,
        "scaling": scaling,
        "targets": _targets(ratios, scaling) if (history, events) == TARGETED else [],
        "seed": SEED,
        "code_version": fathom.__version__,
        "versions": {
            name: version(name) for name in ("feast", "duckdb", "dask", "pandas", "pyarrow")
        },
        "hardware": hardware(),
    }


def _ratios(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """How many times as long, and as much memory, each other store took."""
    ours = found.get("fathom")
    return {
        store: {
            name: round(run[name] / ours[name], 2) for name in ("seconds", "peak_mb", "added_mb")
        }
        for store, run in found.items()
        if ours and store != "fathom"
    }


def _targets(
    ratios: Mapping[str, Mapping[str, float]], scaling: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """What was to be reached, what was, and whether it is; of what was measured."""
    found: list[tuple[str, float, float]] = [
        (f"times as fast as {store}", ratios[store]["seconds"], least)
        for store, least in {"duckdb": 20, "dask": 100}.items()
        if store in ratios
    ]
    if "duckdb" in ratios:
        found.append(("duckdb's peak memory over fathom's", ratios["duckdb"]["peak_mb"], 3))
    targets = [{"what": w, "found": f, "at_least": b, "met": f >= b} for w, f, b in found]
    for run in scaling:
        if run["events"] == 10_000_000:
            gigabytes = round(run["peak_mb"] / 1024, 2)
            what = "GB of peak memory for ten million events"
            targets.append({"what": what, "found": gigabytes, "at_most": 6, "met": gigabytes <= 6})
    if len(scaling) > 1:
        first, last = (run["seconds"] / run["events"] for run in (scaling[0], scaling[-1]))
        growth, what = round(last / first, 2), "times the seconds per event at the most events"
        targets.append({"what": what, "found": growth, "at_most": 1.25, "met": growth <= 1.25})
    return targets


# -- tables and the plot -------------------------------------------------------------------------


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text: a row per store, then a row per number of events."""
    history = History(**figures["history"])
    lines = [
        f"{figures['events']:,} events, {history.days} daily snapshots of {history.users:,} users "
        f"and {history.items:,} items, 6 features, text keys",
        "",
        "store   seconds    times  peak MB    times  added MB    times",
    ]
    for store, run in figures["stores"].items():
        lines.append(f"{store:7}")
        for name, width, form in (
            ("seconds", 8, ".2f"),
            ("peak_mb", 9, ","),
            ("added_mb", 10, ","),
        ):
            times = figures["against_fathom"].get(store, {}).get(name, 1.0)
            lines[-1] += f"{run[name]:{width}{form}}{times:9.1f}"
    lines += [f"{store:7} left out: {why}" for store, why in figures["left_out"].items()]
    if len(figures["stores"]) > 1:
        equal = "yes" if figures["same_values"] else "NO, they differ"
        lines += ["", f"all return the same values: {equal}"]
    lines += ["", "events of fathom  seconds  per million  peak MB  added MB"]
    lines += [
        f"{run['events']:16,}{run['seconds']:9.2f}{run['seconds'] / run['events'] * 1e6:13.2f}"
        f"{run['peak_mb']:9,}{run['added_mb']:10,}"
        for run in figures["scaling"]
    ]
    lines += ["", *(_verdict(target) for target in figures["targets"])]
    return "\n".join(
        [
            *lines,
            "",
            "times: as much as fathom; seconds: median of 3 (dask: of 1); peak: of the process;",
            "added: above what the process held before, with Feast and the events in memory",
            f"versions: {', '.join(f'{k} {v}' for k, v in figures['versions'].items())}",
            f"hardware: {figures['hardware']}",
        ]
    )


def _verdict(target: Mapping[str, Any]) -> str:
    word = next(word for word in ("at_least", "at_most") if word in target)
    verdict = "met" if target["met"] else "MISSED"
    bound = f"{word.replace('_', ' ')} {target[word]}"
    return f"{verdict:7}{target['found']:8} {target['what']} ({bound})"


def plot(scaling: Sequence[Mapping[str, Any]]) -> str:
    """Seconds and memory against the number of events, as SVG; dashed: from nothing to the last."""
    panels = [("seconds", 1.0, "seconds"), ("peak_mb", 1024.0, "peak memory, GB")]
    most = max(run["events"] for run in scaling)
    width, height, left, top = 320, 220, 50, 40
    parts = []
    for panel, (name, unit, title) in enumerate(panels):
        values = [run[name] / unit for run in scaling]
        highest, x0 = max(values), left + panel * (width + 2 * left)
        points = [
            (x0 + width * run["events"] / most, top + height * (1 - value / highest / 1.1))
            for run, value in zip(scaling, values, strict=True)
        ]
        bottom = top + height
        parts += [
            f'<text x="{x0}" y="{top - 15}" font-weight="bold">{title}</text>',
            f'<path d="M{x0} {top}V{bottom}H{x0 + width}" fill="none" stroke="#888"/>',
            f'<path d="M{x0} {bottom}L{points[-1][0]:.1f} {points[-1][1]:.1f}" stroke="#bbb" '
            'stroke-dasharray="4"/>',
            f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" fill="none" '
            'stroke="#1565c0" stroke-width="2"/>',
        ]
        for (x, y), run, value in zip(points, scaling, values, strict=True):
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#1565c0"/>',
                f'<text x="{x:.1f}" y="{y - 9:.1f}" text-anchor="middle">{value:.1f}</text>',
                f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">'
                f"{run['events'] / 1e6:g}</text>",
            ]
        parts.append(
            f'<text x="{x0 + width / 2}" y="{bottom + 36}" text-anchor="middle">'
            "million events</text>"
        )
    size = f'width="{2 * (width + 2 * left)}" height="{top + height + 50}"'
    style = 'font-family="sans-serif" font-size="12"'
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>\n'
        f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
    )


# -- command line --------------------------------------------------------------------------------


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Point-in-time joins of this project and Feast's.")
    parser.add_argument(
        "--stores", nargs="+", choices=STORES, default=list(STORES), help="to compare (%(default)s)"
    )
    parser.add_argument("--events", type=int, default=SIZES[0], help="to compare on (%(default)s)")
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=SIZES, help="numbers of events for fathom alone"
    )
    parser.add_argument("--plot", type=Path, help="file to draw the second table in, as SVG")
    parser.add_argument("--quick", action="store_true", help="fathom alone, on few events")
    parser.add_argument("--json", action="store_true", help="the last line is a JSON object")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.quick:
        parsed.stores, parsed.events, parsed.sizes = ["fathom"], QUICK_SIZES[0], QUICK_SIZES
    return parsed


def main() -> None:
    """Run from the command line."""
    given = _arguments()
    if given.task:
        _task(**given.task)
        return
    history = QUICK_HISTORY if given.quick else History()
    try:
        figures = measure(history, given.stores, given.events, given.sizes)
    except BenchmarkError as error:
        raise SystemExit(f"point_in_time: {error}") from None
    print(table(figures))
    if given.plot:
        write_text(given.plot, plot(figures["scaling"]))
    if given.json:
        print(json.dumps(figures, allow_nan=False))
    if not figures["same_values"]:
        raise SystemExit("point_in_time: the stores return different values")


if __name__ == "__main__":
    main()
