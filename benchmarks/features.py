"""What another week of a log costs: all features anew, or only what it adds.

Generates a log of acts and a log of exposures with the same number of rows in every week, and
summarises them as the features pipeline does: once from nothing, and once on top of what was left
of the weeks before the last one. The two must end in the same rows. Every figure is of a process
of its own.

    python benchmarks/features.py                                  # 13, 26, 52 and 104 weeks
    python benchmarks/features.py --weeks 100 --rows 200000        # 20 million rows, one size
    python benchmarks/features.py --quick --json
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fathom
from fathom.hardware import hardware, peak_memory_mb
from fathom.spec import FeatureSpec

TABLES = ("exposures", "interactions", "users", "items")
_EXPOSURE_RATE = {"of": "exposures", "prior": 0.2, "prior_weight": 5}


class DifferenceError(RuntimeError):
    """The two ways of computing the same rows do not end in the same rows."""


def _aggregate(name: str, by: str, measure: str, **more: Any) -> dict[str, Any]:
    kind = "sequence" if measure == "last" else "numeric"
    return {
        "name": name,
        "kind": kind,
        "aggregate": {"by": by.split(), "measure": measure, **more},
    }


SPEC = FeatureSpec.model_validate(
    {
        "entities": {"user": "user_id", "item": "item_id", "request": "request_id"},
        "label": {"name": "acted", "values": [0, 1]},
        "grain_days": 7,
        "grain_origin": "2020-01-06T00:00:00Z",
        "columns": [
            {"name": "user_id", "kind": "categorical", "owner": "user"},
            {"name": "item_id", "kind": "categorical", "owner": "item"},
            {"name": "genre", "kind": "categorical", "owner": "item"},
            {"name": "shop", "kind": "categorical", "owner": "context"},
            _aggregate("user_acts", "user_id", "count"),
            _aggregate("user_acts_28d", "user_id", "count", window_days=28),
            _aggregate("user_spent", "user_id", "sum", column="amount"),
            _aggregate("user_genres", "user_id", "last", column="genre", n=10),
            _aggregate("pair_acts", "user_id item_id", "count"),
            _aggregate("pair_acts_28d", "user_id item_id", "count", window_days=28),
            _aggregate("pair_recency", "user_id item_id", "recency_days"),
            _aggregate("user_genre_acts", "user_id genre", "count"),
            _aggregate("user_genre_acts_28d", "user_id genre", "count", window_days=28),
            _aggregate("item_acts", "item_id", "count"),
            _aggregate("item_acts_28d", "item_id", "count", window_days=28),
            _aggregate("shop_item_acts", "shop item_id", "count"),
            _aggregate("shop_item_recency", "shop item_id", "recency_days"),
            _aggregate("item_rate_28d", "item_id", "rate", window_days=28, **_EXPOSURE_RATE),
            _aggregate("user_rate", "user_id", "rate", **_EXPOSURE_RATE),
        ],
    }
)


def generate(folder: Path, weeks: int, rows: int, seed: int) -> None:
    """Write the canonical tables of so many weeks with so many rows of both logs in each.

    Rows arrive at the end of their week, one in fifty of them a week later. A tenth of the items
    has most of the acts, and a user's acts are spread over all of the time.
    """
    import duckdb

    con = duckdb.connect(config={"memory_limit": "2GB"})
    con.execute("set enable_progress_bar = false")
    con.execute("set TimeZone = 'UTC'")
    users, items = max(rows // 20, 10), max(rows // 5, 20)
    start, week = int(SPEC.grain_origin.timestamp()), 7 * 86_400

    def drawn(salt: str, below: int | str) -> str:
        return f"(hash(w, n, '{salt}', {seed}) % {below})"

    moment = f"{start} + w * {week} + {drawn('moment', week)}"
    arrival = f"{start} + (w + 1 + ({drawn('late', 50)} = 0)::int) * {week} - 3600"
    popular = f"if({drawn('head', 10)} < 7, {drawn('item', items // 10)}, {drawn('item', items)})"
    for name, more in (
        ("interactions", f"({drawn('amount', 10_000)} / 100)::double amount"),
        ("exposures", f"'r' || w || '-' || n // 5 request_id, ({drawn('y', 5)} = 0)::bigint acted"),
    ):
        con.execute(
            f"""copy (
                select 'u' || {drawn("user" + name, users)} user_id, 'i' || {popular} item_id,
                    to_timestamp({moment}) event_timestamp, 's' || {drawn("shop", 200)} shop,
                    to_timestamp({arrival}) arrival_timestamp, {more}
                from range({weeks}) a(w), range({rows // 2}) b(n) order by w
            ) to '{folder / name}.parquet' (compression zstd)"""
        )
    for key, count, more in (("user", users, ""), ("item", items, ", 'g' || n % 300 genre")):
        con.execute(
            f"""copy (
                select '{key[0]}' || n {key}_id, to_timestamp(0) event_timestamp{more}
                from range({count}) t(n)
            ) to '{folder / key}s.parquet'"""
        )


def summarise(data: Path, out: Path, until: int) -> dict[str, float]:
    """One run of the features pipeline over what was known by a step; in a process of its own.

    Returns:
        Seconds, and the peak of the process's memory in MB.
    """
    warnings.filterwarnings("ignore")
    logging.disable()
    import ibis

    from fathom import features
    from fathom.pipelines import datasets
    from fathom.pipelines.features.nodes import summarise_logs

    began = time.perf_counter()
    views, packed, carry = (str(out / name) for name in ("views", "packed", "carry"))
    outputs = (
        datasets.SnapshotsDataset(views),
        datasets.SnapshotsDataset(packed),
        datasets.CarryDataset(carry, views, packed),
    )
    past = datasets.PastDataset(carry, views, packed).load()
    read = {name: ibis.read_parquet(data / f"{name}.parquet") for name in TABLES}
    for name in ("exposures", "interactions"):
        read[name] = read[name].filter(features.known_by(read[name], SPEC, until))
    for chunk in summarise_logs(**read, past=past, spec=SPEC):
        for dataset, value in zip(outputs, chunk, strict=True):
            dataset.save(value)
    return {"seconds": time.perf_counter() - began, "peak_mb": peak_memory_mb()}


def differences(first: Path, second: Path) -> int:
    """How many rows of the views in one folder are not in the other."""
    import duckdb

    con = duckdb.connect(config={"memory_limit": "4GB"})
    con.execute("set enable_progress_bar = false")
    count = 0
    for view in SPEC.views:
        one, other = (f"'{folder}/views/{view}/*.parquet'" for folder in (first, second))
        for kept, taken in ((one, other), (other, one)):
            query = f"select count(*) from (select * from {kept} except all select * from {taken})"
            found = con.execute(query).fetchone()
            assert found is not None
            count += found[0]
    return count


def measure(weeks: int, rows: int, seed: int, compare: bool) -> dict[str, Any]:
    """Full against incremental at the last week of a log of one length.

    Raises:
        DifferenceError: the rows differ.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        generate(folder, weeks, rows, seed)
        full = _apart(summarise, folder, folder / "full", weeks)
        _apart(summarise, folder, folder / "grown", weeks - 1)
        week = _apart(summarise, folder, folder / "grown", weeks)
        again = _apart(summarise, folder, folder / "grown", weeks)
        different = differences(folder / "full", folder / "grown") if compare else None
        if different:
            raise DifferenceError(f"{different:,} rows differ between full and incremental")
        size = sum(path.stat().st_size for path in (folder / "grown/carry").rglob("*.parquet"))
    return {
        "weeks": weeks,
        "rows": weeks * (rows // 2) * 2,
        "full": full,
        "week": week,
        "unchanged": again,
        "carried_mb": size / 2**20,
        "rows_that_differ": different,
    }


def _apart(work: Any, *given: Any) -> Any:
    """Call in a fresh process, whose peak of memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def table(runs: Sequence[Mapping[str, Any]]) -> str:
    """The figures as text: a row per length of the log."""
    head = ("weeks", "rows", "full s", "week s", "share", "unchanged s")
    head += ("full MB", "week MB", "carried MB")
    lines = ["".join(name.rjust(13) for name in head)]
    for run in runs:
        full, week = run["full"], run["week"]
        cells = [
            str(run["weeks"]),
            f"{run['rows']:,}",
            f"{full['seconds']:.1f}",
            f"{week['seconds']:.1f}",
            f"{week['seconds'] / full['seconds']:.2f}",
            f"{run['unchanged']['seconds']:.1f}",
            f"{full['peak_mb']:.0f}",
            f"{week['peak_mb']:.0f}",
            f"{run['carried_mb']:.0f}",
        ]
        lines.append("".join(cell.rjust(13) for cell in cells))
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Features anew against features of one more week.")
    parser.add_argument(
        "--weeks", type=int, nargs="+", help="lengths of the log (13 26 52 104; 3 6 with --quick)"
    )
    parser.add_argument("--rows", type=int, help="of both logs in a week (50,000; 4,000)")
    parser.add_argument("--seed", type=int, default=0, help="of the generated rows (%(default)s)")
    parser.add_argument(
        "--trust", action="store_true", help="do not compare the rows (it needs time and memory)"
    )
    parser.add_argument("--quick", action="store_true", help="two short logs, under a minute")
    parser.add_argument("--json", action="store_true", help="the last line is a JSON object")
    given = parser.parse_args()
    given.weeks = given.weeks or ([3, 6] if given.quick else [13, 26, 52, 104])
    given.rows = given.rows or (4_000 if given.quick else 50_000)
    if min(given.weeks) < 2 or given.rows < 100:
        parser.error(f"--weeks {given.weeks}, --rows {given.rows}: 2 weeks and 100 rows at least")
    return given


def main() -> None:
    """Run from the command line."""
    given = _arguments()
    runs = []
    for weeks in given.weeks:
        runs.append(measure(weeks, given.rows, given.seed, compare=not given.trust))
        print(table(runs[-1:]) if len(runs) == 1 else table(runs[-1:]).splitlines()[1], flush=True)
    compared = "not compared" if given.trust else "equal, every row of every view"
    print(f"\nfull and incremental: {compared}\nhardware: {hardware()}")
    if given.json:
        figures = {
            "benchmark": "features",
            "runs": runs,
            "rows_per_week": given.rows,
            "views": len(SPEC.views),
            "seed": given.seed,
            "spec_hash": SPEC.hash,
            "code_version": fathom.__version__,
            "hardware": hardware(),
        }
        print(json.dumps(figures, allow_nan=False))


if __name__ == "__main__":
    try:
        main()
    except DifferenceError as error:
        sys.exit(f"features: {error}")
