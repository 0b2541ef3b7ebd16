"""The benchmark of point-in-time joins: what it compares, what it counts, what it prints."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import forks

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    """``benchmarks/point_in_time.py``, which is a script and in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("point_in_time")


@pytest.fixture(scope="module")
def history(benchmark: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    small, folder = benchmark.History(days=5, users=30, items=20), tmp_path_factory.mktemp("data")
    benchmark.write_history(small, folder)
    return small, folder


def test_a_history_has_a_snapshot_of_each_key_for_each_day(history: tuple[Any, Path]) -> None:
    users = pq.read_table(history[1] / "user.parquet").to_pandas()
    assert len(users) == 5 * 30
    assert users.groupby("user")["event_timestamp"].nunique().eq(5).all()
    assert (users["created_timestamp"] - users["event_timestamp"]).unique() == ["1h"]


def test_the_stores_return_the_same_values(
    benchmark: ModuleType, history: tuple[Any, Path]
) -> None:
    small, folder = history
    before = ibis.options.default_backend
    ibis.set_backend(ibis.duckdb.connect())
    runs = [benchmark.read(store, folder, small, 200, repeats=1) for store in benchmark.STORES]
    ibis.options.default_backend = before
    assert {run["store"] for run in runs} == {"fathom", "duckdb", "dask"}
    assert len({run["checksum"] for run in runs}) == 1
    assert benchmark.read("fathom", folder, small, 201, 1)["checksum"] != runs[0]["checksum"]
    for run in runs:
        assert run["seconds"] > 0
        assert run["peak_mb"] == run["before_mb"] + run["added_mb"]


def test_a_checksum_is_of_the_values_not_of_their_order_or_type(benchmark: ModuleType) -> None:
    rows = {"user": ["a", "b", "c"], "x": [1, 2, None], "y": [1.0, 3.0, 2.0]}
    plain = benchmark.checksum(pa.table(rows))
    for same in (
        pa.table(rows).take([2, 0, 1]),
        pa.table(rows).select(["y", "user", "x"]),
        pa.table(rows | {"x": [1.0, 2.0, float("nan")]}),
        pa.table(rows | {"user": pa.array(rows["user"], pa.large_string())}),
    ):
        assert benchmark.checksum(same) == plain
    for other in (
        rows | {"y": [1.0, 2.0, 3.0]},
        rows | {"x": [2, 1, None]},
        rows | {"x": rows["y"], "y": rows["x"]},
        {name: [*values, values[0]] for name, values in rows.items()},
    ):
        assert benchmark.checksum(pa.table(other)) != plain


def test_a_store_is_left_out_where_memory_is_short(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(benchmark.NEEDED_GB, "dask", 10**6)
    figures = benchmark.measure(benchmark.History(2, 3, 4), ["dask"], 1_000_000, [])
    assert figures["stores"] == {}
    assert figures["left_out"]["dask"].startswith("needs about 1000000 GB of memory, ")
    assert "dask    left out: needs about 1000000 GB" in benchmark.table(figures)


def test_a_process_that_fails_says_why(benchmark: ModuleType, tmp_path: Path) -> None:
    history = {"days": 1, "users": 1, "items": 1}
    with pytest.raises(benchmark.BenchmarkError, match=r"write ended with 1: FileNotFoundError"):
        benchmark._apart("write", folder=str(tmp_path / "none"), history=history)


def run_of(store: str, events: int, seconds: float, peak: int) -> dict[str, Any]:
    sizes = {"peak_mb": peak, "before_mb": 500, "added_mb": peak - 500}
    return {"store": store, "events": events, "seconds": seconds, "checksum": "c0ffee"} | sizes


def test_what_was_to_be_reached_is_held_against_what_was(benchmark: ModuleType) -> None:
    found = {
        "fathom": run_of("fathom", 1_000_000, 2.0, 1000),
        "duckdb": run_of("duckdb", 1_000_000, 50.0, 4000),
        "dask": run_of("dask", 1_000_000, 150.0, 16_000),
    }
    scaling = [found["fathom"], run_of("fathom", 10_000_000, 24.0, 3072)]
    ratios = benchmark._ratios(found)
    assert ratios["duckdb"] == {"seconds": 25.0, "peak_mb": 4.0, "added_mb": 7.0}
    targets = benchmark._targets(ratios, scaling)
    assert [(target["found"], target["met"]) for target in targets] == [
        (25.0, True),  # times as fast as duckdb, of 20
        (75.0, False),  # as dask, of 100
        (4.0, True),  # times the memory of duckdb, of 3
        (3.0, True),  # GB for ten million events, of 6
        (1.2, True),  # times the seconds per event, of 1.25
    ]
    assert benchmark._verdict(targets[1]) == "MISSED     75.0 times as fast as dask (at least 100)"


def test_the_plot_has_a_point_for_each_measurement_on_both_sides(benchmark: ModuleType) -> None:
    scaling = [run_of("fathom", n * 1_000_000, 1.0 * n, 1000 * n) for n in (1, 2, 5)]
    drawn = ElementTree.fromstring(benchmark.plot(scaling))
    texts = [element.text for element in drawn.iter() if element.tag.endswith("text")]
    circles = [element for element in drawn.iter() if element.tag.endswith("circle")]
    assert len(circles) == 6
    assert {"seconds", "peak memory, GB", "1.0", "5.0", "4.9", "million events"} <= {*texts}
    heights = [float(circle.get("cy", "")) for circle in circles]
    assert heights[0] > heights[1] > heights[2] > 0  # downwards, and more is higher


def test_the_script_prints_tables_and_ends_with_one_json_object(tmp_path: Path) -> None:
    plot = tmp_path / "results" / "plot.svg"
    few = ["--stores", "fathom", "--events", "300", "--sizes", "300"]
    done = forks.python(
        "benchmarks/point_in_time.py", *few, "--json", "--plot", str(plot), folder=ROOT
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("300 events, 91 daily snapshots of 6,040 users and 4,000 items")
    figures = json.loads(lines[-1])
    assert figures["stores"]["fathom"] == figures["scaling"][0]
    assert len(figures["stores"]["fathom"]["runs"]) == 3
    assert figures["same_values"]
    assert figures["versions"].keys() >= {"feast", "duckdb", "dask"}
    assert "cores" in figures["hardware"]
    assert plot.read_text(encoding="utf-8").startswith("<svg")
