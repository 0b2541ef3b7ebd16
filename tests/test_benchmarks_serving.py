"""The benchmarks of serving run as their users run them; `e2e/test_skew` serves a real run."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import forks

ROOT = Path(__file__).parents[1]


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    """``benchmarks/online_reads.py`` and ``skew.py``, which are scripts and in no package."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    yield importlib.import_module("online_reads"), importlib.import_module("skew")
    for name in ("online_reads", "skew"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def printed() -> list[str]:
    """The lines of a quick run."""
    done = forks.python(
        "benchmarks/online_reads.py", *("--quick", "--rounds", "10", "--json"), folder=ROOT
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


@pytest.mark.slow
def test_online_reads_prints_a_table_and_ends_with_one_json_object(printed: list[str]) -> None:
    figures = json.loads(printed[-1])
    redis = shutil.which("redis-server") is not None
    readers = ["ours, SQLite", "ours, Redis", "Feast, SQLite", "Feast, Redis"]
    expected = [name for name in readers if redis or "Redis" not in name]
    assert list(figures["plain"]) == expected
    assert [line.split("  ")[0] for line in printed[2 : 2 + len(expected)]] == expected
    for sizes in figures["plain"].values():
        assert list(sizes) == ["1", "50", "200", "500"]
        for found in sizes.values():
            assert 0 < found["median_ms"] <= found["p95_ms"]
    assert (figures["redis"], figures["run"]) == (redis, None)
    assert "cores" in figures["hardware"]
    # Ours reads one row and Feast 500: no timing, but a factor that no machine blurs.
    ours, theirs = (figures["plain"][f"{who}, SQLite"]["500"] for who in ("ours", "Feast"))
    assert ours["median_ms"] < theirs["median_ms"]


def test_without_a_run_the_benchmarks_name_what_is_missing(
    scripts: tuple[ModuleType, ModuleType], tmp_path: Path
) -> None:
    reads, replays = scripts
    with pytest.raises(reads.InputError, match=r"no 04_feature/views, .*training_frame.parquet"):
        reads.measure_run(tmp_path, tmp_path, None, 10)
    with pytest.raises(replays.InputError, match=r"no 04_feature/views, .*registry; make a whole"):
        replays.measure(tmp_path, 10)
    for name in ("04_feature/views", "06_models/registry"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "05_model_input").mkdir()
    (tmp_path / "05_model_input/training_frame.parquet").touch()
    with pytest.raises(replays.InputError, match="has no champion; make a whole run first"):
        replays.measure(tmp_path, 10)


def test_scoring_names_what_it_compares_and_how_far_scores_are_apart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    scoring = importlib.import_module("scoring")
    threads = torch.get_num_threads()
    try:
        scoring.main(["--quick", "--json"])
    finally:
        torch.set_num_threads(threads)
        sys.modules.pop("scoring", None)
    printed = capsys.readouterr().out.splitlines()
    figures = json.loads(printed[-1])
    one, divided = figures["one_thread"], figures["table_2"]
    assert set(one["scores"]) < set(one["ms"])
    assert set(divided["ms"]) == {
        *("torch, 200 on 1", "torch, 100 on 2", "torch, 50 on 4", "fast path, 200 on 1")
    }
    assert one["scores"]["fast path, with encoding"]["largest_difference"] < 1e-6
    assert one["scores"]["fast path, bfloat16"]["pairs_in_order"] > 0.9
    for name in one["ms"]:
        assert any(line.strip().startswith(name) for line in printed)


def test_agreement_counts_pairs_and_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    scoring = importlib.import_module("scoring")
    expected = np.arange(20) / 20
    swapped = expected.copy()
    swapped[[9, 10]] = swapped[[10, 9]]  # one of 190 pairs, and one of the best ten
    found = scoring.agreement(swapped, expected)
    sys.modules.pop("scoring", None)
    assert found["largest_difference"] == pytest.approx(0.05)
    assert found["pairs_in_order"] == pytest.approx(189 / 190)
    assert found["of_best_10"] == 0.9
