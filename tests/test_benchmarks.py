"""The benchmarks run as their users run them: as scripts, on what a run left."""

from __future__ import annotations

import importlib
import json
import shutil
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import fathom
import forks
from fathom.config import TrainingConfig
from fathom.drift import MonitoringConfig
from fathom.encoding import fit_encoder
from fathom.evaluation import EvaluationConfig, Predictions
from fathom.feature_store import to_arrow
from fathom.gate import Compared, GateConfig, Verdict
from fathom.registry import Registry
from small_ranker import SPEC, exposures, plain_frame, register

ROOT = Path(__file__).parents[1]
METRICS = ["auc", "logloss", "user_auc", "ndcg_at_10", "calibration", "ece"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run of a small shop leaves below its data folder."""
    folder = tmp_path_factory.mktemp("data")
    frame = plain_frame(400)
    inputs = folder / "05_model_input"
    encoder = fit_encoder(frame, SPEC)
    encoder.save(inputs / "encoder")
    batch = encoder.encode(frame)
    splits = {"train": range(240), "validation": range(240, 300), "test": range(300, 400)}
    for name, rows in splits.items():
        batch.take(np.array(rows)).save(inputs / name)
        part = {column: to_arrow(values).take(list(rows)) for column, values in frame.items()}
        pq.write_table(pa.table(part), inputs / f"{name}.parquet")
    shown = {name: frame[name][240:].tolist() for name in ("user_id", "item_id", "bought")}
    shown["request_id"] = [f"r{row // 5}" for row in range(160)]
    shown["split"] = ["validation"] * 60 + ["test"] * 100
    shown["probability"] = [0.5] * 160
    (folder / "07_model_output").mkdir()
    pq.write_table(pa.table(shown), folder / "07_model_output" / "predictions.parquet")
    (folder / "02_intermediate").mkdir()
    (folder / "02_intermediate" / "data_hash.txt").write_text("c0ffee")
    return folder


@pytest.fixture(scope="module")
def seeds() -> Iterator[ModuleType]:
    """``benchmarks/seeds.py``, which is a script and in no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("seeds")


@pytest.fixture(scope="module")
def printed(data: Path) -> list[str]:
    """The lines that a quick run prints."""
    done = forks.python(
        "benchmarks/seeds.py", *("--quick", "--json", "--data", str(data)), folder=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_seeds_prints_a_table_and_ends_with_one_json_object(printed: list[str]) -> None:
    assert [line.split()[0] for line in printed[:5]] == ["seed", "0", "1", "mean", "spread"]
    figures = json.loads(printed[-1])
    first, second = figures["runs"]
    assert (first["seed"], second["seed"]) == (0, 1) == tuple(figures["seeds"])
    assert list(first["metrics"]) == METRICS
    assert first["metrics"] != second["metrics"]  # another seed is another model
    for name in METRICS:
        values = [run["metrics"][name] for run in figures["runs"]]
        assert figures["mean"][name] == pytest.approx(statistics.fmean(values))
        assert figures["spread"][name] == pytest.approx(statistics.stdev(values))
        assert f"{figures['mean'][name]:.5f}" in printed[3]


def test_seeds_says_what_its_figures_stand_on(printed: list[str]) -> None:
    figures = json.loads(printed[-1])
    assert figures["sizes"] == {"train": 240, "validation": 60, "test": 100}
    assert figures["spec_hash"] == SPEC.hash
    assert figures["data_hash"] == "c0ffee"
    assert figures["code_version"] == fathom.__version__
    assert "cores" in figures["hardware"]
    assert figures["training"]["epochs"] == 1  # quick
    assert figures["training"]["model"] == "wide_deep"


def test_a_seed_gives_the_same_figures_whichever_stand_beside_it(
    seeds: ModuleType, data: Path
) -> None:
    config = TrainingConfig(hidden=(4,), epochs=1, batch_size=64)
    two, three = (seeds.measure(data, config, range(3, end)) for end in (5, 6))
    assert three["seeds"] == [3, 4, 5]
    assert [run["metrics"] for run in two["runs"]] == [run["metrics"] for run in three["runs"][:2]]


def test_without_a_run_seeds_names_what_is_missing_and_how_to_make_it(
    seeds: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(
        seeds.InputError,
        match=r"05_model_input/encoder, .*predictions\.parquet; .*: kedro run --env test$",
    ):
        seeds.measure(tmp_path / "test", TrainingConfig(), range(2))


def test_splits_and_predictions_of_different_runs_are_not_mixed(
    seeds: ModuleType, data: Path, tmp_path: Path
) -> None:
    for name in ("02_intermediate", "05_model_input"):
        (tmp_path / name).symlink_to(data / name)
    rows = pq.read_table(data / "07_model_output" / "predictions.parquet")
    (tmp_path / "07_model_output").mkdir()
    pq.write_table(rows.slice(0, 159), tmp_path / "07_model_output" / "predictions.parquet")
    with pytest.raises(seeds.InputError, match="not of the run that encoded the test split"):
        seeds.measure(tmp_path, TrainingConfig(), range(2))


def test_pairs_of_seeds_tell_a_difference_from_chance(seeds: ModuleType) -> None:
    """By hand: differences 1, 2, 3 have mean 2 and standard error 1/sqrt(3); t(0.95, 2) is 2.92."""

    def runs(*losses: float) -> list[dict[str, Any]]:
        return [{"metrics": {"logloss": loss, "user_auc": None}} for loss in losses]

    found = seeds.paired(runs(5, 5, 5), runs(6, 7, 8), margin=4.0)
    assert set(found) == {"logloss"}, "what is undefined in a run is not compared"
    assert found["logloss"]["difference"] == 2
    assert found["logloss"]["lo"] == pytest.approx(2 - 2.9200 / 3**0.5, abs=1e-3)
    assert found["logloss"]["hi"] == pytest.approx(2 + 2.9200 / 3**0.5, abs=1e-3)
    assert found["logloss"]["equivalent"]
    assert not seeds.paired(runs(5, 5, 5), runs(6, 7, 8), margin=3.0)["logloss"]["equivalent"]


def test_a_spread_needs_two_seeds(
    seeds: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["seeds.py", "--seeds", "1"])
    with pytest.raises(SystemExit):
        seeds.main()
    assert "--seeds is 1; give 2 or more" in capsys.readouterr().err


@pytest.mark.slow
def test_features_counts_a_week_and_all_weeks_alike_and_says_what_each_costs() -> None:
    command = ["benchmarks/features.py", "--weeks", "3", "--rows", "400", "--json"]
    done = forks.python(*command, folder=ROOT)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "full and incremental: equal, every row of every view" in done.stdout
    figures = json.loads(done.stdout.splitlines()[-1])
    (run,) = figures["runs"]
    assert {"full", "week", "unchanged"} <= set(run)
    assert run["week"]["seconds"] > 0


def test_features_needs_a_week_before_the_last() -> None:
    done = forks.python("benchmarks/features.py", "--weeks", "1", folder=ROOT)
    assert done.returncode == 2
    assert "--weeks [1], --rows 50000: 2 weeks and 100 rows at least" in done.stderr


# -- wide_parts.py -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide_parts(seeds: ModuleType) -> ModuleType:
    """``benchmarks/wide_parts.py``, which stands beside ``seeds.py``."""
    return importlib.import_module("wide_parts")


def test_wide_parts_are_the_specs_none_all_pairs_and_what_the_search_chose(
    wide_parts: ModuleType, tmp_path: Path
) -> None:
    chosen = tmp_path / "chosen.yml"

    def parts() -> dict[str, Any]:
        return {part.name: part for part in wide_parts.wide_parts(SPEC, chosen)}

    assert list(parts()) == ["the spec's", "the spec's, no L1", "none (deep)", "all pairs"]
    chosen.write_text("features:\n  crosses: [] # none is sure to gain\n")
    assert "cross_search's" not in parts(), "it chose none, which is trained already"
    chosen.write_text("features:\n  crosses:\n  - {columns: [city, genre], min_count: 3}\n")
    found = parts()
    assert found["the spec's"].crosses == SPEC.crosses
    assert [cross.name for cross in found["cross_search's"].crosses] == ["city_x_genre"]
    assert (found["none (deep)"].crosses, found["none (deep)"].settings) == ((), {"model": "deep"})
    ids = [column for column in SPEC.columns if not column.is_numeric]
    assert len(found["all pairs"].crosses) == len(ids) * (len(ids) - 1) // 2


def test_wide_parts_trains_and_measures_each(wide_parts: ModuleType, data: Path) -> None:
    config = TrainingConfig(hidden=(4,), epochs=1, batch_size=64, wide_l1=3.0)
    figures = wide_parts.measure(data, config, range(2))
    assert figures["sizes"] == {"train": 240, "validation": 60, "test": 100}
    rows = {row["name"]: row for row in figures["wide_parts"]}
    own, free, none, pairs = rows.values()
    assert none["crosses"] == []
    assert none["wide_nonzero"] == 0
    assert pairs["wide_rows"] > own["wide_rows"] == free["wide_rows"]
    assert free["wide_nonzero"] > own["wide_nonzero"], "L1 makes zeros"
    assert own["logloss_difference"]["difference"] == 0.0
    printed = wide_parts.table(figures).splitlines()
    assert printed[1].startswith("the spec's")
    assert f"{pairs['logloss_difference']['difference']:+.5f}" in printed[4]


def test_wide_parts_names_what_is_missing(wide_parts: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"05_model_input/train\.parquet, .*: kedro run$"):
        wide_parts.measure(tmp_path, TrainingConfig(), range(2))


# -- gate.py -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gate(seeds: ModuleType) -> ModuleType:
    """``benchmarks/gate.py``, which stands beside ``seeds.py``."""
    return importlib.import_module("gate")


def small_window(gate: ModuleType) -> Any:
    """Four users with one, two, three and four rows; their places are 100 and on."""
    user = np.array([7, 5, 5, 9, 9, 9, 2, 2, 2, 2])
    rows = Predictions(np.tile([0.0, 1.0], 5), np.zeros(10), user, user)
    return gate.Window(rows, {"even": np.arange(10) % 2 == 0}, 100 + np.arange(10))


def test_a_draw_of_users_holds_all_rows_of_each_as_often_as_drawn(gate: ModuleType) -> None:
    window, sizes = small_window(gate), []
    for seed in range(50):
        drawn = window.drawn(np.random.default_rng(seed))
        assert drawn.rows.user.max() == 3, "as many users as there are"
        for copy in range(4):
            places = np.sort(drawn.place[drawn.rows.user == copy]) - 100
            whose = np.unique(window.rows.user[places])
            assert whose.size == 1
            assert places.tolist() == np.flatnonzero(window.rows.user == whose[0]).tolist()
        assert np.array_equal(drawn.masks["even"], drawn.place % 2 == 0)
        assert np.array_equal(drawn.rows.label, window.rows.label[drawn.place - 100])
        sizes.append(drawn.place.size)
    assert 4 <= min(sizes) < 10 < max(sizes) <= 16


def test_equal_models_change_sides_by_user_and_neither_more_often(gate: ModuleType) -> None:
    window, first = small_window(gate), 0
    plan = gate.equal(np.full(110, 0.25), np.full(110, 0.75))
    for seed in range(400):
        generator = np.random.default_rng(seed)
        drawn = window.drawn(generator)
        new, old, ruined = plan(drawn, generator)
        assert ruined is None
        assert np.array_equal(new + old, np.ones(drawn.place.size)), "each row has both"
        for copy in range(4):
            assert len(set(new[drawn.rows.user == copy])) == 1
        first += new[0] == 0.25
    assert 160 < first < 240  # half, within four binomial deviations


@pytest.mark.parametrize("how", ["permuted", "base rate"])
def test_one_slice_is_destroyed_and_nothing_else(gate: ModuleType, how: str) -> None:
    window, scores = small_window(gate), np.linspace(0, 1, 110)
    plan = gate.destroyed(scores, np.zeros(110), how, ["even"])
    new, old, ruined = plan(window, np.random.default_rng(1))
    even, was = window.masks["even"], scores[100:]
    assert ruined == "even"
    assert not old.any()
    assert np.array_equal(new[~even], was[~even])
    assert new[even].mean() == pytest.approx(was[even].mean())
    assert not np.array_equal(new[even], was[even])
    assert (len(set(new[even])) == 1) == (how == "base rate")
    assert np.array_equal(scores, np.linspace(0, 1, 110)), "what was given stays as it is"


def test_what_blocks_a_challenger_is_counted_by_metric_slice_or_bounds(gate: ModuleType) -> None:
    def found(part: str | None, metric: str, passed: bool) -> Compared:
        return Compared(part, metric, 10, 5, 0.0, 0.0, 0.0, 0.0, passed)

    passed = [found(None, "logloss", True), found("even", "auc", True)]
    failed = [found(None, "auc", False), found("a", "auc", False), found("b", "logloss", False)]
    assert gate.causes(Verdict(True, [], passed)) == set()
    assert gate.causes(Verdict(False, [], passed)) == {"bounds"}
    assert gate.causes(Verdict(False, [], [*passed, *failed])) == {"auc", "slice"}


def test_the_gate_is_judged_on_what_a_plan_makes(gate: ModuleType) -> None:
    random = np.random.default_rng(0)
    truth = random.uniform(0.05, 0.95, 3000)
    label, user = (random.random(3000) < truth).astype(float), np.arange(3000) % 60
    window = gate.Window(Predictions(label, np.zeros(3000), user, user), {}, np.arange(3000))
    settings = GateConfig(baselines=()), EvaluationConfig(resamples=20)
    worse = np.clip(truth + random.normal(0, 0.3, 3000), 0.02, 0.98)
    better = gate.judged(window, gate.fixed(truth, worse), 10, *settings)
    assert (better["promoted"], better["share"], better["blocked_by"]) == (10, 1.0, {})
    regressed = gate.judged(window, gate.fixed(worse, truth), 10, *settings)
    assert (regressed["promoted"], regressed["blocked_by"]["logloss"]) == (0, 10)
    assert (regressed["lo"], round(regressed["hi"], 3)) == (0.0, 0.278)
    shown = gate.line(regressed | {"kind": "planted", "title": "x", "weeks": 4, "gain": -0.5})
    assert "-0.50000      4     10      0.0%      0.0% … 27.8%" in shown


def test_warm_start_compares_champion_fresh_and_warm_on_the_week_that_follows(
    data: Path, tmp_path: Path
) -> None:
    from test_replay import RECIPE, START, table

    year = tmp_path / "data"
    shutil.copytree(data, year)
    log = table()
    log = log.append_column("inclusion_probability", pa.array([1.0] * log.num_rows))
    pq.write_table(log, year / "05_model_input" / "training_frame.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        warm_start = importlib.import_module("warm_start")
    training = replace(RECIPE.training, cool_down=0.1)
    given = (training, RECIPE.retraining, START, [0, 1], warm_start.Plan([4], [1, 2]))
    figures = warm_start.measure(year, *given)
    json.dumps(figures)
    assert [(case["until"], case["seed"]) for case in figures["cases"]] == [
        ("2024-02-05", 0),
        ("2024-02-12", 0),
        ("2024-02-05", 1),
        ("2024-02-12", 1),
    ]
    first = figures["cases"][0]  # 5 weeks of 140 rows in batches of 32; 1 of them is new
    assert 22 <= first["fresh_steps"] <= 23  # and a tenth of them is held back
    assert 5 <= first["warm_steps"] <= 8
    above = [case["warm"] - case["fresh"] for case in figures["cases"]]
    assert figures["summary"]["above_fresh"] == pytest.approx(statistics.fmean(above))
    lines = warm_start.table(figures).splitlines()
    assert sum(line.startswith(("HELD", "MISSED")) for line in lines) == 1
    with pytest.raises(warm_start.InputError, match="lower --cutoffs"):
        warm_start.measure(year, *given[:-1], warm_start.Plan([40], [1]))


# -- drift -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModuleType, Any]]:
    """``benchmarks/drift.py``, and a small shop's world for it."""
    folder = tmp_path_factory.mktemp("drift")
    ranker = register(folder).ranker
    versions = Registry(folder / "06_models" / "registry")
    versions.promote(versions.register(ranker.save), "the first")
    (folder / "05_model_input").mkdir()
    pq.write_table(exposures(4000, days=28), folder / "05_model_input" / "validation.parquet")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    module = importlib.import_module("drift")
    config = MonitoringConfig(min_rows=100, min_labels=20, draws=20, leaning_rows=200)
    yield module, next(module.worlds(folder, config, [0]))
    sys.path.remove(str(ROOT / "benchmarks"))
    del sys.modules["drift"]


def test_a_quiet_year_is_of_rows_that_the_reference_does_not_hold(world: Any) -> None:
    module, shop = world
    rows, window = shop.week(3, np.random.default_rng(0))
    assert rows["event_timestamp"].between(window.start, window.end).all()
    assert set(rows["request_id"]) < set(shop.pool["request_id"])
    assert len(set(shop.pool["request_id"])) + len(set(shop.reference.labelled.request)) == 800
    found = module.quiet(shop, 3, 0)
    assert set(found) == {"retrainings", "alerts", "windows_with_drifted_columns", "asking"}
    assert all(0 <= count <= 3 for count in found.values())


def test_each_drift_is_planted_where_it_says(world: Any) -> None:
    module, shop = world
    rows, _ = shop.week(0, np.random.default_rng(0))
    for plant, sizes, _ in module.PLANTS:
        made = plant(shop, rows, sizes[-1], 0, np.random.default_rng(1))
        changed = made.shift is not None or len(made.rows) < len(rows)
        same = set(rows) & set(made.rows) - {"probability"}
        changed = changed or any(
            made.rows[name].astype(str).tolist() != rows[name].astype(str).tolist() for name in same
        )
        assert changed, plant.__name__


def test_a_drift_of_labels_costs_what_knowing_it_would_win(world: Any) -> None:
    """Labels that follow a shift: the champion's loss is above that of the one that knows it."""
    module, shop = world
    draw = np.random.default_rng(2)
    rows, _ = shop.week(0, draw)
    rows = pd.concat([rows] * 20, ignore_index=True)
    truth = draw.random(len(rows)) < rows["probability"]
    made = module.label_rate_step(shop, rows.assign(bought=truth.astype(int)), 1.0, 0, draw)
    after = module._relabelled(shop, made, draw)
    p, q = rows["probability"], 1 / (1 + (1 / rows["probability"] - 1) * np.exp(-1.0))
    by_hand = -(q * np.log(p) + (1 - q) * np.log(1 - p)).mean()
    by_hand /= -(q * np.log(q) + (1 - q) * np.log(1 - q)).mean()
    assert module._cost(shop, after, rows, made.shift) == pytest.approx(by_hand - 1, rel=0.1)


def test_the_rate_of_false_retrainings_has_an_exact_interval(world: Any) -> None:
    low, high = world[0]._poisson(0, 240)
    assert (low, high) == (0.0, pytest.approx(3.689 / 240, rel=1e-3))  # -ln 0.025, by hand


def test_drift_names_what_is_missing(world: Any, tmp_path: Path) -> None:
    with pytest.raises(world[0].InputError, match=r"has no 05_model_input/validation\.parquet; m"):
        next(world[0].worlds(tmp_path, MonitoringConfig(), [0]))
