"""Does a warm start reach what a fresh one reaches, in a quarter of its steps?

Cuts the training frame that a run left by time. A champion is trained up to a cut-off; some weeks
later, on all data by then, one model is trained fresh and another starts warm from the champion.
All three are scored on the week that follows. Those of a seed share that seed.

    python benchmarks/warm_start.py --json
    python benchmarks/warm_start.py --cutoffs 22 30 --weeks 1 4 --seeds 5
    python benchmarks/warm_start.py --quick             # the `test` environment
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

import fathom
from fathom.config import ConfigError, SplitConfig, TrainingConfig
from fathom.encoding import Encoder
from fathom.evaluation import EvaluationConfig
from fathom.hardware import hardware, peak_memory_mb
from fathom.replay import WEEK, Log
from fathom.retraining import Recipe, Retrained, RetrainingConfig, base_from, retrain
from seeds import CONFIGURED, InputError, asked, needed, parser

#: A warm start may take this share of the fresh one's steps.
TARGET = 0.25
_FRAME = "05_model_input/training_frame.parquet"
#: No warm start is followed by a fresh one here: they are compared.
_ALONE = 1e9


@dataclass(frozen=True)
class Case:
    """One champion, and what was trained some weeks later.

    Args:
        champion, fresh, warm: losses on the week after ``until``.
    """

    cutoff: str
    until: str
    seed: int
    champion: float
    fresh: float
    warm: float
    fresh_steps: int
    warm_steps: int

    @property
    def above(self) -> float:
        """By how much the warm one's loss exceeds the fresh one's."""
        return self.warm - self.fresh

    @property
    def share(self) -> float:
        """Of the fresh one's steps, what the warm one took."""
        return self.warm_steps / self.fresh_steps


@dataclass(frozen=True)
class Plan:
    """What is trained: weeks from the log's first to the cut-off, and from there to now."""

    cutoffs: Sequence[int]
    weeks: Sequence[int]


def measure(
    data: Path,
    config: TrainingConfig,
    retraining: RetrainingConfig,
    train_from: datetime,
    seeds: Sequence[int],
    plan: Plan,
) -> dict[str, Any]:
    """Train champions, fresh ones and warm ones.

    Returns:
        The figures, ready for JSON.

    Raises:
        InputError: the run's files are missing, all named, or the log is too short for the plan.
    """
    import ibis

    needed(data, [_FRAME])
    spec = Encoder.load(data / "05_model_input/encoder").spec
    log = Log.of(ibis.duckdb.connect().read_parquet(data / _FRAME), spec)
    last = train_from + (max(plan.cutoffs) + max(plan.weeks) + 1) * WEEK
    newest = log.moments[-1].item()
    if last.replace(tzinfo=None) > newest + WEEK:
        raise InputError(f"the log ends at {newest}, and the plan at {last}; lower --cutoffs")
    lone = retraining.model_copy(update={"fresh_margin": _ALONE, "fresh_growth": _ALONE})
    cases = []
    for seed in seeds:
        training = dataclasses.replace(config, seed=seed)
        recipe = Recipe(spec, training, lone, EvaluationConfig(resamples=20))
        for cutoff in plan.cutoffs:
            moments = [train_from, train_from + cutoff * WEEK]
            cases += _cases(log, recipe, moments, plan)
    return {
        "benchmark": "warm_start",
        "seeds": list(seeds),
        "cases": [dataclasses.asdict(case) for case in cases],
        "summary": _summary(cases),
        "target": TARGET,
        "training": config.as_dict(),
        "retraining": retraining.model_dump(),
        "spec_hash": spec.hash,
        "data_hash": (data / "02_intermediate/data_hash.txt").read_text(encoding="utf-8").strip(),
        "code_version": fathom.__version__,
        "hardware": hardware(),
        "peak_memory_mb": peak_memory_mb(),
    }


def _cases(log: Log, recipe: Recipe, moments: Sequence[datetime], plan: Plan) -> list[Case]:
    """A champion up to a cut-off, and one case for each number of weeks after it."""
    begin, cutoff = moments
    cases = []

    def trained(until: datetime, base: Any, recipe: Recipe, folder: Path) -> Retrained:
        windows = (log.window(begin, until), log.window(until, until + WEEK))
        return retrain(*windows, recipe, base, "benchmark", folder)

    with tempfile.TemporaryDirectory(prefix="fathom-") as passing:
        folder = Path(passing)
        split = SplitConfig(*(m.isoformat() for m in (begin, cutoff, cutoff + WEEK)))
        champion = trained(cutoff, None, recipe, folder / "champion").chosen
        base = base_from(champion, recipe.training, split)
        for weeks in plan.weeks:
            until = cutoff + weeks * WEEK
            fresh = trained(until, None, recipe, folder / f"{weeks}").chosen
            warm = trained(until, base, recipe, folder / f"{weeks}-warm").chosen
            assert warm.against is not None
            cases.append(
                Case(
                    cutoff.date().isoformat(),
                    until.date().isoformat(),
                    recipe.training.seed,
                    warm.loss - warm.against.difference,
                    fresh.loss,
                    warm.loss,
                    fresh.steps,
                    warm.steps,
                )
            )
    return cases


def _summary(cases: Sequence[Case]) -> dict[str, Any]:
    """How far warm starts end above fresh ones, over all cases; the spread is over them."""
    above = [case.above for case in cases]
    won = [case.champion - case.fresh for case in cases]
    return {
        "steps_share": statistics.fmean(case.share for case in cases),
        "largest_share": max(case.share for case in cases),
        "above_fresh": statistics.fmean(above),
        "spread": statistics.stdev(above) if len(above) > 1 else 0.0,
        "reached": sum(value <= 0 for value in above),
        "cases": len(above),
        # Of what a fresh one wins over the champion, on average.
        "won_share": 1 - sum(above) / sum(won) if sum(won) > 0 else None,
    }


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text: a row per cut-off and weeks, means over seeds, then the sums."""
    head = ("champion until", "now", "champion", "fresh", "warm", "less fresh", "steps")
    lines = ["".join(name.rjust(15) for name in head)]
    cases = [Case(**case) for case in figures["cases"]]
    for cutoff, until in dict.fromkeys((case.cutoff, case.until) for case in cases):
        mine = [case for case in cases if (case.cutoff, case.until) == (cutoff, until)]

        def mean(name: str, mine: Sequence[Case] = mine) -> float:
            return statistics.fmean(getattr(case, name) for case in mine)

        losses = [f"{mean(name):.5f}" for name in ("champion", "fresh", "warm")]
        cells = (cutoff, until, *losses, f"{mean('above'):+.5f}", f"{mean('share'):.0%}")
        lines.append("".join(cell.rjust(15) for cell in cells))
    found = figures["summary"]
    held = found["above_fresh"] <= 0 and found["largest_share"] <= figures["target"]
    won = "" if found["won_share"] is None else f", {found['won_share']:.0%} of what it wins"
    lines += [
        "",
        f"losses of the week after; means over {len(figures['seeds'])} seeds",
        f"{'HELD  ' if held else 'MISSED'} {found['above_fresh']:+.5f} ± {found['spread']:.5f} of "
        f"fresh{won}, reached in {found['reached']} of {found['cases']}, in "
        f"{found['steps_share']:.0%} of its steps (at most {found['largest_share']:.0%})",
    ]
    training = figures["training"]
    lines += [
        "",
        f"model: {training['model']}, spec {figures['spec_hash'][:12]}, data "
        f"{figures['data_hash'][:12]}",
        f"hardware: {figures['hardware']}",
    ]
    return "\n".join(lines)


def _configured(name: str) -> Any:
    return yaml.safe_load(CONFIGURED.with_name(name).read_text(encoding="utf-8"))


def main() -> None:
    """Run from the command line."""
    options = parser("Validation loss of warm and fresh starts, by steps.")
    options.add_argument(
        "--cutoffs", type=int, nargs="+", help="weeks that champions train on (22 30 36; 20)"
    )
    options.add_argument("--weeks", type=int, nargs="+", help="weeks since then (1 2 4; 4)")
    try:
        given, config, seeds = asked(options, fewest=1)
        retraining = RetrainingConfig(**_configured("parameters_retraining.yml")["retraining"])
        plan = Plan(
            given.cutoffs or ([20] if given.quick else [22, 30, 36]),
            given.weeks or ([4] if given.quick else [1, 2, 4]),
        )
        train_from = SplitConfig(**_configured("parameters.yml")["split"]).moment("train_from")
        figures = measure(given.data, config, retraining, train_from, seeds, plan)
    except (InputError, ConfigError, TypeError, yaml.YAMLError) as error:
        raise SystemExit(f"warm_start: {error}") from None
    print(table(figures))
    if given.json:
        print(json.dumps(figures, allow_nan=False))


if __name__ == "__main__":
    main()
