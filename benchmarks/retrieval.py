"""How long retrieval takes, and how much of the exact answer an approximate index finds.

Items of a thousand tastes in 32 dimensions whose sizes fall as a factorisation's do, with one of
them for popularity, and users of the same tastes; 500 items are retrieved on one thread.
``uniform`` items have no taste, which is the worst there is for an index by cells. With ``--data``,
what the tower of a run retrieves of its test window.

    pip install 'fathom[retrieval]'         # Faiss, for the approximate index
    python benchmarks/retrieval.py
    python benchmarks/retrieval.py --data data
    python benchmarks/retrieval.py --quick --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from fathom.hardware import hardware
from fathom.retrieval import Approximate, Exact, Floats, Index, NoIndexError, recall_of

DIMENSIONS, TASTES, QUERIES, RETRIEVED = 32, 1_000, 100, 500
SIZES, QUICK = (100_000, 1_000_000), (20_000,)


def catalogue(size: int, kind: str) -> tuple[Floats, Floats]:
    """Items (size, 32), and users (100, 32)."""
    draw = np.random.default_rng(size)
    if kind == "uniform":
        items = draw.standard_normal((size, DIMENSIONS), np.float32)
        return items, draw.standard_normal((QUERIES, DIMENSIONS), np.float32)
    scale = (1 / np.sqrt(1 + np.arange(DIMENSIONS))).astype(np.float32)
    tastes = draw.standard_normal((TASTES, DIMENSIONS), np.float32)

    def near(count: int) -> Floats:
        noise = draw.standard_normal((count, DIMENSIONS), np.float32)
        found: Floats = (tastes[draw.integers(TASTES, size=count)] + 0.5 * noise) * scale
        return found

    items, users = near(size), near(QUERIES)
    items[:, 0], users[:, 0] = draw.normal(-2, 0.7, size), 1.0
    return items, users


def median_ms(search: Callable[[Floats], Any], users: Floats) -> dict[str, float]:
    """The middle and the 95th percentile of single searches, after one round."""
    seconds = []
    for number in range(2 * len(users)):
        began = time.perf_counter()
        search(users[number % len(users)])
        seconds.append(time.perf_counter() - began)
    kept = sorted(seconds[len(users) :])
    return {"p50_ms": 1e3 * statistics.median(kept), "p95_ms": 1e3 * kept[int(0.95 * len(kept))]}


def measure(size: int, kind: str, recall: float) -> dict[str, dict[str, float]]:
    """Figures of each index."""
    items, users = catalogue(size, kind)
    began = time.perf_counter()
    exact = Exact(items)
    found = {"exact": _figures(exact, exact, users, time.perf_counter() - began)}
    half = np.random.default_rng(0).random(size) < 0.5
    found["exact, half allowed"] = found["exact"] | median_ms(
        lambda user: exact.search(user, RETRIEVED, half), users
    )
    try:
        began = time.perf_counter()
        index = Approximate(exact, items, users[: QUERIES // 2], recall, RETRIEVED)
    except NoIndexError:
        return found
    built = time.perf_counter() - began
    # Recall of users that the number of cells was not chosen on.
    found["approximate"] = _figures(index, exact, users[QUERIES // 2 :], built)
    found["approximate"] |= {"probes": index.probes, "cells": index.cells}
    found["approximate, half allowed"] = found["approximate"] | median_ms(
        lambda user: index.search(user, RETRIEVED, half), users
    )
    return found


def _figures(index: Index, exact: Exact, users: Floats, seconds: float) -> dict[str, float]:
    return {
        "build_s": seconds,
        **median_ms(lambda user: index.search(user, RETRIEVED), users),
        "recall_at_100": recall_of(index, exact, users, 100),
        "recall_at_500": recall_of(index, exact, users, RETRIEVED),
    }


def of_a_run(data: Path) -> dict[str, Any]:
    """What a run's tower retrieves of its validation and test windows."""
    from fathom.batch import Batch
    from fathom.encoding import Encoder
    from fathom.tower import TowerConfig, fit_tower
    from fathom.tower import measure as measured

    inputs = data / "05_model_input"
    if not inputs.is_dir():
        raise SystemExit(f"{inputs} is not there; run make run, or give the folder of a run")
    encoder = Encoder.load(inputs / "encoder")
    began = time.perf_counter()
    tower = fit_tower(encoder, Batch.load(inputs / "train"), TowerConfig())
    taken = time.perf_counter() - began
    windows = {
        name: measured(tower, encoder, Batch.load(inputs / name)) for name in ("validation", "test")
    }
    return {"seconds": taken, **windows}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="20,000 items")
    parser.add_argument("--recall", type=float, default=0.95, help="what is asked of the index")
    parser.add_argument("--data", type=Path, help="a run's data folder")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    asked = parser.parse_args(arguments)
    figures: dict[str, Any] = {"hardware": hardware(), "indexes": {}, "run": None}
    print(
        f"{'items':>9}  {'kind':<8}  {'index':<26}{'build s':>9}{'p50 ms':>9}{'p95 ms':>9}"
        f"{'recall@100':>12}{'recall@500':>12}"
    )
    with threadpool_limits(1):
        for size in QUICK if asked.quick else SIZES:
            for kind in ("tastes", "uniform"):
                found = measure(size, kind, asked.recall)
                figures["indexes"][f"{size} {kind}"] = found
                for name, row in found.items():
                    print(
                        f"{size:>9,}  {kind:<8}  {name:<26}{row['build_s']:>9.2f}"
                        f"{row['p50_ms']:>9.2f}{row['p95_ms']:>9.2f}"
                        f"{row['recall_at_100']:>12.3f}{row['recall_at_500']:>12.3f}"
                    )
        if asked.data:
            figures["run"] = run = of_a_run(asked.data)
            print(f"\ntower of {asked.data}: {run['seconds']:.1f} s")
            for window in ("validation", "test"):
                for name in ("recall_at_100", "recall_at_500"):
                    shares = run[window].get(name, {})
                    print(
                        f"  {window:<12}{name:<16}"
                        + ", ".join(f"{who} {share:.4f}" for who, share in shares.items())
                    )
    if asked.json:
        print(json.dumps(figures))


if __name__ == "__main__":
    main()
