"""How often does monitoring cry wolf, how soon does it see planted drift, and what does it cost?

Reads what a run left: the champion, its reference and the window that it was validated on, which
it did not learn from. A third of the requests is the reference, the others are what comes. Days are
drawn anew for each week to come, from the same four weeks, and users within them: a world that
stays as it is, in which no row was seen before.

    python benchmarks/drift.py                   # 20 years without drift, then planted drifts
    python benchmarks/drift.py --years 5 --draws 2 --json
    python benchmarks/drift.py --quick           # a few weeks, on what `--env test` left
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from numpy.typing import NDArray

from fathom import drift
from fathom.drift import PROBABILITY, Decision, Delivery, MonitoringConfig, Reference, Window
from fathom.hardware import hardware, peak_memory_mb
from fathom.ranker import Ranker
from fathom.registry import Registry
from fathom.spec import EVENT_TIMESTAMP, Column
from seeds import InputError

Floats = NDArray[np.float64]
VALIDATION, REGISTRY = "05_model_input/validation.parquet", "06_models/registry"
DAYS, WEEKS = 7, 52
#: Share of the users that come in a week.
PRESENT = 0.8
#: Share of the loss from which a drift has to be seen within two windows.
DEAR = 0.01
#: Windows before a planted drift, and those in which it must be seen at the latest.
SOUND, HORIZON = 2, 6
_START = datetime(2030, 1, 7, tzinfo=timezone.utc)


@dataclass(frozen=True)
class World:
    """A champion, its reference, and rows of other requests of the same users and days.

    Attributes:
        pool: the rows that weeks are drawn from, scored.
        days: (N,) day of each.
    """

    champion: Ranker
    reference: Reference
    pool: pd.DataFrame
    days: NDArray[np.int64]

    def week(self, number: int, draw: np.random.Generator) -> tuple[pd.DataFrame, Window]:
        """A week that is to come: days of the pool on the same weekdays, and users, drawn."""
        start = _START + timedelta(days=DAYS * number)
        user = self.champion.spec.entities.user
        there = np.unique(self.days)
        parts = []
        for place in range(DAYS):
            same = there[there % DAYS == place]
            chosen = self.pool[self.days == draw.choice(same if len(same) else there)]
            codes, users = pd.factorize(chosen[user])
            here = draw.random(len(users)) < PRESENT
            part = chosen[here[codes]].copy()
            part[EVENT_TIMESTAMP] = start + timedelta(days=place, hours=12)
            parts.append(part)
        end = start + timedelta(days=DAYS) - timedelta(microseconds=1)
        return pd.concat(parts, ignore_index=True), Window(start, end)


def worlds(data: Path, config: MonitoringConfig, seeds: Sequence[int]) -> Iterator[World]:
    """A world for each seed: another split of the requests.

    Raises:
        InputError: the run's files are missing.
    """
    for path in (VALIDATION, f"{REGISTRY}/champion.json"):
        if not (data / path).exists():
            raise InputError(f"{data} has no {path}; make a whole run first: kedro run")
    registry = Registry(data / REGISTRY)
    champion = registry.load(str(registry.champion()))
    spec = champion.spec
    rows = pq.read_table(data / VALIDATION, columns=drift.watched_columns(spec))
    requests = np.array(rows[spec.entities.request].to_pylist(), object)
    keys, codes = np.unique(requests, return_inverse=True)
    scored = drift.scored(champion, rows)
    moments = pd.to_datetime(scored[EVENT_TIMESTAMP], utc=True)
    days = ((moments - moments.min()) // pd.Timedelta(days=1)).to_numpy(np.int64)
    for seed in seeds:
        draw = np.random.default_rng(seed)
        other = (draw.permutation(len(keys)) % 3 > 0)[codes]
        own = np.flatnonzero(~other)
        own = np.sort(draw.choice(own, min(20_000, len(own)), replace=False))
        reference = drift.reference_of(champion, rows.take(own), config)
        yield World(champion, reference, scored[other].reset_index(drop=True), days[other])


# ---------------------------------------------------------------------------- no drift


def quiet(world: World, weeks: int, seed: int) -> dict[str, Any]:
    """A year in which nothing changes: how often was a retraining asked for, or an alert given?"""
    draw = np.random.default_rng([seed, 1])
    history: list[Decision] = []
    named = 0
    for number in range(weeks):
        rows, window = world.week(number, draw)
        decision = _watch(world, rows, window, history)
        named += any(c["verdict"] == "drifted" for c in decision.evidence["columns"].values())
        history.append(decision)
    return {
        "retrainings": sum(decision.retrain for decision in history),
        "alerts": sum(bool(decision.alerts) for decision in history),
        "windows_with_drifted_columns": named,
        "asking": sum(decision.severity in ("major", "critical") for decision in history),
    }


def _watch(
    world: World, rows: pd.DataFrame, window: Window, history: Sequence[Decision]
) -> Decision:
    found = drift.measure(
        world.reference, rows, window, drift.last_sound(history, "champion"), Delivery()
    )
    return drift.decide(found, history, world.reference.config, "champion")


# ---------------------------------------------------------------------------- planted drift


@dataclass(frozen=True)
class Planted:
    """A week's rows after something has changed.

    Attributes:
        rows: scored anew where features changed.
        shift: (N,) log-odds by which the truth has moved; the labels follow it.
    """

    rows: pd.DataFrame
    shift: Floats | None = None


Plant = Callable[[World, pd.DataFrame, float, int, np.random.Generator], Planted]


def _rescored(world: World, rows: pd.DataFrame) -> pd.DataFrame:
    columns = drift.watched_columns(world.champion.spec)
    return drift.scored(world.champion, pa.Table.from_pandas(rows[columns], preserve_index=False))


def _leaned(world: World, wanted: Callable[[Column], bool]) -> Column:
    """The column of a sort that the model leans on most."""
    columns = [column for column in world.champion.spec.columns if wanted(column)]
    return max(columns, key=lambda column: world.reference.leaning.get(column.name, 0.0))


def _few_values(world: World) -> Column:
    """A plain category that is no key."""
    spec, forms = world.champion.spec, world.reference.forms
    return _leaned(
        world,
        lambda c: (
            c.kind == "categorical"
            and forms[c.name].kind == "categorical"
            and c.name not in (spec.entities.user, spec.entities.item)
            and spec.owner(c.name) == "item"
        ),
    )


def vanished_category(
    world: World, rows: pd.DataFrame, size: float, week: int, draw: np.random.Generator
) -> Planted:
    """A share of the rows of the commonest category is shown no more."""
    name = _few_values(world).name
    gone = (rows[name] == rows[name].mode()[0]) & (draw.random(len(rows)) < size)
    return Planted(rows[~gone].reset_index(drop=True))


def unit_change(
    world: World, rows: pd.DataFrame, size: float, week: int, draw: np.random.Generator
) -> Planted:
    """The number that the model leans on most is given in another unit, by a factor."""
    name = _leaned(world, lambda c: c.kind == "numeric").name
    return Planted(_rescored(world, rows.assign(**{name: rows[name] * size})))


def new_store(
    world: World, rows: pd.DataFrame, size: float, week: int, draw: np.random.Generator
) -> Planted:
    """A share of the requests comes from a place that nobody knows, and that has no past."""
    spec = world.champion.spec
    place = _leaned(
        world,
        lambda c: c.kind == "categorical" and spec.owner(c.name) == "context" and not c.values,
    ).name
    chosen = _chosen(rows, spec.entities.request, size, draw)
    changed = {place: rows[place].mask(chosen, "never seen")}
    for column in spec.columns:
        aggregate = column.aggregate
        if aggregate is not None and place in aggregate.by:
            past = np.nan if aggregate.measure == "recency_days" else 0.0
            changed[column.name] = rows[column.name].mask(chosen, past)
    for column in spec.columns:
        if column.ratio is not None and column.ratio.of in changed:
            changed[column.name] = rows[column.name].mask(chosen, 0.0)
    return Planted(_rescored(world, rows.assign(**changed)))


def shifted_scale(
    world: World, rows: pd.DataFrame, size: float, week: int, draw: np.random.Generator
) -> Planted:
    """All amounts of one kind grow by a factor, as prices do; here the items' sales."""
    spec = world.champion.spec
    most = _leaned(world, lambda c: c.aggregate is not None and c.aggregate.measure == "count")
    assert most.aggregate is not None
    same = [
        c.name
        for c in spec.columns
        if c.aggregate is not None
        and c.aggregate.measure == "count"
        and c.aggregate.by == most.aggregate.by
    ]
    return Planted(_rescored(world, rows.assign(**{name: rows[name] * size for name in same})))


def label_rate_step(
    world: World, rows: pd.DataFrame, size: float, week: int, draw: np.random.Generator
) -> Planted:
    """All log-odds move by so much, at once."""
    return Planted(rows, np.full(len(rows), size))


def taste_change(
    world: World, rows: pd.DataFrame, size: float, week: int, draw: np.random.Generator
) -> Planted:
    """Each category gains or loses so many log-odds a week, for as long as it lasts."""
    name = _few_values(world).name
    ways = {
        value: 1 if i % 2 else -1 for i, value in enumerate(sorted(rows[name].dropna().unique()))
    }
    return Planted(rows, rows[name].map(ways).fillna(0).to_numpy(np.float64) * size * (week + 1))


def broken_feed(
    world: World, rows: pd.DataFrame, size: float, week: int, draw: np.random.Generator
) -> Planted:
    """The raw category that the model leans on most is missing in a share of the requests."""
    spec = world.champion.spec
    name = _leaned(world, lambda c: c.kind == "categorical" and c.aggregate is None).name
    chosen = _chosen(rows, spec.entities.request, size, draw)
    return Planted(_rescored(world, rows.assign(**{name: rows[name].mask(chosen, None)})))


def stuck_feed(
    world: World, rows: pd.DataFrame, size: float, week: int, draw: np.random.Generator
) -> Planted:
    """The number that the model leans on most is 0 in a share of the requests."""
    name = _leaned(world, lambda c: c.kind == "numeric").name
    chosen = _chosen(rows, world.champion.spec.entities.request, size, draw)
    return Planted(_rescored(world, rows.assign(**{name: rows[name].mask(chosen, 0.0)})))


def _chosen(
    rows: pd.DataFrame, request: str, share: float, draw: np.random.Generator
) -> NDArray[np.bool_]:
    codes, requests = pd.factorize(rows[request])
    return (draw.random(len(requests)) < share)[codes]


#: What is planted, at which sizes, and whether it is a fault of the data.
PLANTS: tuple[tuple[Plant, tuple[float, ...], bool], ...] = (
    (vanished_category, (0.5, 1.0), False),
    (new_store, (0.05, 0.2, 0.5), False),
    (shifted_scale, (1.2, 1.5, 1.9), False),
    (label_rate_step, (0.1, 0.2, 0.3, 0.5), False),
    (taste_change, (0.05, 0.1, 0.2), False),
    (unit_change, (0.5, 2.0, 7.0, 24.0), True),
    (broken_feed, (0.02, 0.1, 0.3, 1.0), True),
    (stuck_feed, (0.05, 0.2, 0.5, 1.0), True),
)


def planted(world: World, plant: Plant, size: float, seed: int) -> dict[str, Any]:
    """Plant a drift after some sound weeks; see when it is seen, and what is done."""
    draw = np.random.default_rng([seed, 2])
    history: list[Decision] = []
    for number in range(SOUND):
        rows, window = world.week(number, draw)
        history.append(_watch(world, rows, window, history))
    costs, named, acted, action = [], None, None, "nothing"
    for week in range(HORIZON):
        rows, window = world.week(SOUND + week, draw)
        made = plant(world, rows, size, week, draw)
        after, before = _relabelled(world, made, draw), rows
        costs.append(_cost(world, after, before, made.shift))
        decision = _watch(world, after, window, history)
        history.append(decision)
        columns = decision.evidence["columns"]
        if named is None and any(c["verdict"] == "drifted" for c in columns.values()):
            named = week + 1
        if decision.alerts or decision.retrain:
            acted, action = week + 1, "alert" if decision.alerts else "retrain"
            break
    dear = next((week for week, cost in enumerate(costs) if cost >= DEAR), None)
    late = acted - dear if acted is not None and dear is not None else None
    return {"cost": costs[-1], "named": named, "acted": acted, "late": late, "action": action}


def _relabelled(world: World, made: Planted, draw: np.random.Generator) -> pd.DataFrame:
    """The rows with labels that follow the shift: as many turn as the model's odds say."""
    if made.shift is None:
        return made.rows
    label = world.champion.spec.label
    p = np.clip(made.rows[PROBABILITY].to_numpy(np.float64), 1e-7, 1 - 1e-7)
    moved = 1 / (1 + (1 - p) / p * np.exp(-made.shift))
    y = (made.rows[label.name] == label.values[-1]).to_numpy()
    up = draw.random(len(p)) < np.clip((moved - p) / (1 - p), 0, 1)
    down = draw.random(len(p)) < np.clip((p - moved) / p, 0, 1)
    turned = np.where(y, ~down, up)
    return made.rows.assign(**{label.name: np.where(turned, label.values[-1], label.values[0])})


def _cost(world: World, after: pd.DataFrame, before: pd.DataFrame, shift: Floats | None) -> float:
    """Share by which the champion's loss is above what it would be without the drift.

    Of features that are damaged: above its own loss on the same rows undamaged. Of labels that
    follow a shift: above the loss of a model that knows the shift. Of rows that are left out: of
    the rows that are left, nothing.
    """
    loss = _loss(world, after, after[PROBABILITY].to_numpy(np.float64))
    if shift is not None:
        p = np.clip(after[PROBABILITY].to_numpy(np.float64), 1e-7, 1 - 1e-7)
        knowing = _loss(world, after, 1 / (1 + (1 - p) / p * np.exp(-shift)))
    elif len(after) == len(before):
        knowing = _loss(world, before, before[PROBABILITY].to_numpy(np.float64))
    else:
        knowing = loss
    return loss / knowing - 1


def _loss(world: World, rows: pd.DataFrame, probability: Floats) -> float:
    label = world.champion.spec.label
    y = (rows[label.name] == label.values[-1]).to_numpy()
    p = np.clip(probability, 1e-7, 1 - 1e-7)
    return float(-np.where(y, np.log(p), np.log1p(-p)).mean())


# ---------------------------------------------------------------------------- the cost


def seconds(world: World, rows: Sequence[int]) -> dict[int, float]:
    """Of scoring, measuring, deciding and Evidently's report, by how long the window's log is."""
    import ibis

    spec, config = world.champion.spec, world.reference.config
    columns = drift.watched_columns(spec)
    table = pa.Table.from_pandas(world.pool[columns], preserve_index=False)
    requests = table[spec.entities.request].cast(pa.string())
    found = {}
    for count in rows:
        copies = math.ceil(count / len(table))
        request = table.schema.get_field_index(spec.entities.request)
        parts = [
            table.set_column(request, spec.entities.request, _suffixed(requests, i))
            for i in range(copies)
        ]
        log = ibis.memtable(pa.concat_tables(parts).slice(0, count))
        began = time.perf_counter()
        sample = drift.sampled(log, spec, config.sample_rows).to_pyarrow()
        scored = drift.scored(world.champion, sample)
        moments = pd.to_datetime(scored[EVENT_TIMESTAMP], utc=True)
        window = Window(moments.min().to_pydatetime(), moments.max().to_pydatetime())
        reference = Reference.of(drift.scored(world.champion, table.slice(0, 20_000)), spec, config)
        measured = drift.measure(reference, scored, window, total=count)
        drift.report(reference, measured, drift.decide(measured, [], config))
        found[count] = time.perf_counter() - began
    return found


def _suffixed(requests: Any, copy: int) -> Any:
    """Other requests, so that copies of a log are a longer one."""
    return pc.binary_join_element_wise(requests, str(copy), "-")


# ---------------------------------------------------------------------------- figures


def measure(
    data: Path, config: MonitoringConfig, years: int, weeks: int, draws: int, rows: Sequence[int]
) -> dict[str, Any]:
    """All figures, ready for JSON.

    Raises:
        InputError: the run's files are missing.
    """
    calm = []
    for seed, world in enumerate(worlds(data, config, range(years))):
        calm.append(quiet(world, weeks, seed))
        print(f"year {seed + 1} of {years} without drift: {calm[-1]}", flush=True)
    months = years * weeks * DAYS / (365.25 / 12)
    count = sum(year["retrainings"] for year in calm)
    found: dict[str, list[dict[str, Any]]] = {}
    for seed, world in enumerate(worlds(data, config, range(100, 100 + draws))):
        for plant, sizes, _ in PLANTS:
            for size in sizes:
                result = planted(world, plant, size, seed)
                found.setdefault(f"{plant.__name__} {size:g}", []).append(result)
        print(f"draw {seed + 1} of {draws} of planted drifts", flush=True)
    times = {}
    for world in worlds(data, config, [0]):
        times = seconds(world, rows)
    return {
        "benchmark": "drift",
        "years": calm,
        "months": months,
        "false_retrainings_per_month": count / months,
        "interval": _poisson(count, months),
        "planted": found,
        "seconds": times,
        "settings": config.model_dump(),
        "hardware": hardware(),
        "peak_memory_mb": peak_memory_mb(),
    }


def _poisson(count: int, months: float) -> tuple[float, float]:
    """The exact 95 % interval of a rate (Garwood 1936)."""
    from scipy import stats

    low = stats.chi2.ppf(0.025, 2 * count) / 2 if count else 0.0
    return float(low / months), float(stats.chi2.ppf(0.975, 2 * count + 2) / 2 / months)


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text."""
    lo, hi = figures["interval"]
    calm = figures["years"]
    lines = [
        f"{len(calm)} years without drift: {figures['false_retrainings_per_month']:.3f} false "
        f"retrainings a month (95 % interval {lo:.3f} to {hi:.3f}); windows with an alert: "
        f"{sum(year['alerts'] for year in calm)}, with a drifted column: "
        f"{sum(year['windows_with_drifted_columns'] for year in calm)}",
        "",
        f"{'planted':28}{'cost':>9}{'named':>8}{'acted':>8}{'late':>8}{'in 2':>7}  action",
    ]
    for name, runs in figures["planted"].items():
        cost = np.mean([run["cost"] for run in runs])
        actions = sorted({run["action"] for run in runs})
        soon = sum(run["late"] is not None and run["late"] <= 2 for run in runs)
        lines.append(
            f"{name:28}{cost:>9.2%}{_median(runs, 'named'):>8}{_median(runs, 'acted'):>8}"
            f"{_median(runs, 'late'):>8}{soon:>4}/{len(runs)}  {', '.join(actions)}"
        )
    lines += ["", "cost: share of the loss, in the window that was acted on or else the last one"]
    lines += [
        "named, acted: median window in which a column was, or a retraining or alert came",
        f"late, in 2: the same from the first window on that cost {DEAR:.0%}, and how often in two",
    ]
    lines += [f"{count:>12,} rows: {took:.1f} s" for count, took in figures["seconds"].items()]
    return "\n".join([*lines, f"hardware: {figures['hardware']}"])


def _median(runs: Sequence[Mapping[str, Any]], name: str) -> str:
    values = [run[name] for run in runs if run[name] is not None]
    return f"{np.median(values):g}" if len(values) * 2 > len(runs) else "never"


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="What monitoring sees, and what it costs.")
    parser.add_argument("--data", type=Path, help="folder of a whole run: data")
    parser.add_argument("--years", type=int, help="without drift: 20")
    parser.add_argument("--draws", type=int, help="of each planted drift: 5")
    parser.add_argument("--quick", action="store_true", help="a few weeks, on what --env test left")
    parser.add_argument("--json", action="store_true", help="the figures as the last line")
    given = parser.parse_args()
    base = Path(__file__).parents[1] / "conf"
    config = yaml.safe_load((base / "base/parameters_monitoring.yml").read_text())["monitoring"]
    if given.quick:
        config |= yaml.safe_load((base / "test/parameters.yml").read_text())["monitoring"]
    data = given.data or Path("data/test" if given.quick else "data")
    years = given.years or (1 if given.quick else 20)
    draws = given.draws or (1 if given.quick else 5)
    rows = (1_000,) if given.quick else (30_000, 300_000, 3_000_000)
    try:
        figures = measure(
            data, MonitoringConfig(**config), years, 4 if given.quick else WEEKS, draws, rows
        )
    except InputError as error:
        raise SystemExit(f"drift: {error}") from None
    print(table(figures))
    if given.json:
        print(json.dumps(figures, allow_nan=False))


if __name__ == "__main__":
    main()
