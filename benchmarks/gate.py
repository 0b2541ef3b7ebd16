"""How often the gate is wrong: on equal models, on planted regressions, on true improvements.

Reads what a run left, as ``seeds.py`` does, trains a few models and lets the gate of
``params:gate`` judge them many times, each time on other users drawn with replacement from those of
the window. Slices are those of the evaluation. Baselines are left out: they would only block more.

Which pair is better on the users that there are is fixed; for the A/A rows it is made open: in each
draw, each user's predictions of the two models, which differ by their seed alone, change sides at
random. So neither is better, whatever the seeds have made of them.

    python benchmarks/gate.py                      # 200 draws of each row
    python benchmarks/gate.py --draws 400 --weeks 4 --json
    python benchmarks/gate.py --quick              # a few draws, on the `test` environment
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import fathom
from fathom.batch import Batch
from fathom.config import ConfigError, TrainingConfig
from fathom.encoding import Encoder
from fathom.evaluation import EvaluationConfig, Floats, Ints, Mask, Predictions, metrics
from fathom.gate import Candidate, GateConfig, Verdict, gate
from fathom.hardware import hardware, peak_memory_mb
from fathom.ranker import Ranker
from fathom.spec import EVENT_TIMESTAMP
from fathom.training import train
from seeds import InputError, asked, needed, parser, shown

EVALUATION = Path("conf/base/parameters_evaluation.yml")
FLIPPED = 0.05
#: Weeks before the end of the training split at which the training of a champion ended.
BEHIND = (2, 4, 8, 16)
#: Weeks of the window for the planted regressions.
PLANTED_WEEKS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
    """The first weeks of the test split, and its slices.

    Args:
        rows: their probabilities are not looked at. masks: slice → rows (N,).
        place: (N,) where the rows stand in the test split.
    """

    rows: Predictions
    masks: Mapping[str, Mask]
    place: Ints

    def drawn(self, generator: np.random.Generator) -> Window:
        """As many users as there are, drawn with replacement; one who is drawn twice is two."""
        order, counts = self._by_user
        starts = np.cumsum(counts) - counts
        users = generator.integers(counts.size, size=counts.size)
        sizes = counts[users]
        copy = np.repeat(np.arange(users.size), sizes)
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        chosen = order[np.repeat(starts[users], sizes) + within]
        rows = dataclasses.replace(self.rows.where(chosen), user=copy)
        masks = {name: mask[chosen] for name, mask in self.masks.items()}
        return Window(rows, masks, self.place[chosen])

    @property
    def _by_user(self) -> tuple[Ints, Ints]:
        code = self.rows.user_code
        return np.argsort(code, kind="stable"), np.bincount(code)


#: Scores of the challenger and the champion (M,) on a draw of users, and the slice that was
#: destroyed, if one was.
Pair = tuple[Floats, Floats, str | None]
Plan = Callable[[Window, np.random.Generator], Pair]


def equal(one: Floats, other: Floats) -> Plan:
    """Two models that change sides by user at random."""

    def plan(window: Window, generator: np.random.Generator) -> Pair:
        sides = generator.random(int(window.rows.user.max()) + 1) < 0.5
        swapped = sides[window.rows.user]
        first, second = one[window.place], other[window.place]
        return np.where(swapped, second, first), np.where(swapped, first, second), None

    return plan


def fixed(challenger: Floats, champion: Floats) -> Plan:
    """Two models as they are."""

    def plan(window: Window, _: np.random.Generator) -> Pair:
        return challenger[window.place], champion[window.place], None

    return plan


def destroyed(challenger: Floats, champion: Floats, how: str, names: Sequence[str]) -> Plan:
    """A challenger whose predictions in one of the slices, another one in each draw, are ruined.

    Args:
        how: ``permuted`` among the slice's rows, or ``base rate``: their mean for each of them.
    """

    def plan(window: Window, generator: np.random.Generator) -> Pair:
        name = names[generator.integers(len(names))]
        mask, scores = window.masks[name], challenger[window.place].copy()
        own = scores[mask]
        scores[mask] = generator.permutation(own) if how == "permuted" else own.mean()
        return scores, champion[window.place], name

    return plan


def judged(
    window: Window, plan: Plan, draws: int, config: GateConfig, evaluation: EvaluationConfig
) -> dict[str, Any]:
    """How often the gate promotes the challenger of a plan, and what blocks it otherwise.

    Returns:
        ``draws``, ``promoted``, its ``share`` with ``lo`` and ``hi``, ``blocked_by`` (see `causes`;
        → draws), ``missed`` (destroyed slice → draws in which it was promoted).
    """
    promoted, blocked, missed = 0, dict[str, int](), dict[str, int]()
    for draw in range(draws):
        generator = np.random.default_rng([evaluation.seed, draw])
        drawn = window.drawn(generator)
        new, old, ruined = plan(drawn, generator)
        sides = Candidate("challenger", new), Candidate("champion", old)
        found = gate(drawn.rows, *sides, {}, drawn.masks, config, evaluation)
        promoted += found.promoted
        for what in causes(found):
            blocked[what] = blocked.get(what, 0) + 1
        if found.promoted and ruined is not None:
            missed[ruined] = missed.get(ruined, 0) + 1
    lo, hi = wilson(promoted, draws)
    share = {"share": promoted / draws, "lo": lo, "hi": hi}
    return {
        **{"draws": draws, "promoted": promoted, **share},
        **{"blocked_by": blocked, "missed": missed},
    }


def causes(verdict: Verdict) -> set[str]:
    """The metrics that failed overall; ``slice`` for any slice; ``bounds`` for all else."""
    failed = {"slice" if f.part else f.metric for f in verdict.compared if not f.passed}
    return failed or (set() if verdict.promoted else {"bounds"})


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927).

    >>> [round(end, 4) for end in wilson(10, 200)]
    [0.0274, 0.0896]
    """
    z, share = 1.959964, hits / count
    middle = share + z**2 / (2 * count)
    half = z * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    scale = 1 + z**2 / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


class Shop:
    """What a run left, and the models that are trained on it; scores of the test split (N,)."""

    def __init__(self, data: Path, config: TrainingConfig) -> None:
        import ibis

        from fathom.pipelines.evaluation.nodes import slice_masks

        needed(data, [f"05_model_input/{name}.parquet" for name in ("train", "test")])
        inputs = data / "05_model_input"
        self.data, self.config = data, config
        self.encoder = Encoder.load(inputs / "encoder")
        self.splits = {name: Batch.load(inputs / name) for name in ("train", "validation", "test")}
        spec, connection = self.encoder.spec, ibis.duckdb.connect()
        frames = [connection.read_parquet(str(inputs / f"{n}.parquet")) for n in ("train", "test")]
        self.trained_at, self.shown_at = (
            frame.select(EVENT_TIMESTAMP).to_pyarrow()[EVENT_TIMESTAMP].to_pylist()
            for frame in frames
        )
        if len(self.trained_at) != len(self.splits["train"]):
            raise InputError(f"{inputs} is not of one run; run it again")
        self.rows = shown(data / "07_model_output/predictions.parquet", spec, self.splits["test"])
        self.masks = slice_masks(*frames, spec)

    def window(self, weeks: int) -> Window:
        """The test split's first weeks: the newest that a model trained just before it meets."""
        end = min(self.shown_at) + timedelta(weeks=weeks)
        kept = np.array([moment < end for moment in self.shown_at])
        masks = {name: mask[kept] for name, mask in self.masks.items()}
        return Window(self.rows.where(kept), masks, np.flatnonzero(kept))

    def scores(self, seed: int, behind: int = 0, flipped: float = 0.0) -> Floats:
        """Train and score.

        Args:
            behind: the last weeks of the training split that are not trained on.
            flipped: share of the training labels that is turned over.
        """
        end: datetime = max(self.trained_at) - timedelta(weeks=behind)
        kept = np.array([moment <= end for moment in self.trained_at])
        examples = self.splits["train"].take(np.flatnonzero(kept))
        assert examples.label is not None
        turned = np.random.default_rng(seed).random(len(examples)) < flipped
        labels = np.where(turned, 1 - examples.label, examples.label).astype(np.float32)
        examples = dataclasses.replace(examples, label=labels)
        config = dataclasses.replace(self.config, seed=seed)
        layout, task = self.encoder.layout, self.encoder.spec.task
        trained = train(layout, examples, self.splits["validation"], config, task)
        scored = Ranker(self.encoder, trained.model, config).score_batch(self.splits["test"])
        return np.asarray(scored, np.float64)


def measure(
    shop: Shop,
    weeks: Sequence[int],
    draws: int,
    config: GateConfig,
    evaluation: EvaluationConfig,
    behind: Sequence[int] = BEHIND,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train the models and judge every row of the table; a line is said as soon as it is known."""
    seed = shop.config.seed
    first, second = shop.scores(seed), shop.scores(seed + 1)
    older = {count: shop.scores(seed + 1, behind=count) for count in behind}
    windows = {count: shop.window(count) for count in weeks}
    rows: list[dict[str, Any]] = []

    def row(kind: str, title: str, plan: Plan, window: int, gain: float | None) -> None:
        started = time.perf_counter()
        found = judged(windows[window], plan, draws, config, evaluation)
        found |= {"kind": kind, "title": title, "weeks": window, "gain": gain}
        rows.append(found | {"seconds": round(time.perf_counter() - started, 1)})
        say(line(rows[-1]))

    say(HEAD)
    for count in weeks:
        row("A/A", "seeds, sides at random", equal(first, second), count, None)
    planted = PLANTED_WEEKS if PLANTED_WEEKS in windows else weeks[-1]
    flipped = shop.scores(seed, flipped=FLIPPED)
    title = f"{FLIPPED:.0%} of the training labels flipped"
    row("planted", title, fixed(flipped, second), planted, _gain(shop, flipped, second))
    large = windows[planted]
    names = [
        name
        for name, mask in large.masks.items()
        if mask.sum() >= evaluation.min_slice_rows
        and np.unique(large.rows.user[mask]).size >= config.min_slice_users
    ]
    best = older[behind[-1]]
    for how in ("permuted", "base rate") if names else ():
        title = f"{behind[-1]} weeks newer, one slice {how}"
        row("planted", title, destroyed(first, best, how, names), planted, _gain(shop, first, best))
    for back, scores in older.items():
        for count in weeks:
            title = f"{back} weeks newer"
            row("better", title, fixed(first, scores), count, _gain(shop, first, scores))
    return {
        "benchmark": "gate",
        "rows": rows,
        "slices": names,
        "weeks": {count: [w.rows.label.size, _users(w)] for count, w in windows.items()},
        "gate": config.model_dump(),
        "evaluation": evaluation.model_dump(),
        "training": shop.config.as_dict(),
        "spec_hash": shop.encoder.spec.hash,
        "data_hash": (shop.data / "02_intermediate/data_hash.txt").read_text("utf-8").strip(),
        "code_version": fathom.__version__,
        "hardware": hardware(),
        "peak_memory_mb": peak_memory_mb(),
    }


def _gain(shop: Shop, challenger: Floats, champion: Floats) -> float:
    """How much lower the challenger's loss is on the whole test split."""
    old, new = (
        metrics(dataclasses.replace(shop.rows, probability=scores))["logloss"]
        for scores in (champion, challenger)
    )
    assert old is not None
    assert new is not None
    return old - new


def _users(window: Window) -> int:
    return int(window.rows.user_code.max()) + 1


HEAD = (
    f"{'':9}{'challenger':38}{'gain':>9}{'weeks':>7}{'draws':>7}{'promoted':>10}"
    f"{'95 % interval':>18}  blocked by"
)


def line(row: Mapping[str, Any]) -> str:
    """A row of the table as text."""
    gain = "" if row["gain"] is None else f"{row['gain']:+.5f}"
    ends = f"{row['lo']:.1%} … {row['hi']:.1%}"
    causes = ", ".join(f"{name} {count}" for name, count in sorted(row["blocked_by"].items()))
    missed = ", ".join(f"{name} {count}" for name, count in sorted(row["missed"].items()))
    return (
        f"{row['kind']:9}{row['title']:38}{gain:>9}{row['weeks']:>7}{row['draws']:>7}"
        f"{row['share']:>10.1%}{ends:>18}  {causes}{'; missed: ' + missed if missed else ''}"
    )


def below(figures: Mapping[str, Any]) -> Iterator[str]:
    """What the table stands on, as text."""
    yield "gain: logloss of the champion less the challenger's on the whole test split"
    for weeks, (rows, users) in figures["weeks"].items():
        yield f"{weeks} weeks: {rows:,} rows of {users:,} users"
    yield f"destroyed slices: {len(figures['slices'])}, another one in each draw"
    yield (
        f"model: {figures['training']['model']}, spec {figures['spec_hash'][:12]}, "
        f"data {figures['data_hash'][:12]}"
    )
    yield f"hardware: {figures['hardware']}"


def main() -> None:
    """Run from the command line."""
    options = parser("How often the gate promotes what it should not, or blocks what it should.")
    options.add_argument("--draws", type=int, help="of users, for each row (200; 20)")
    options.add_argument(
        "--weeks", type=int, nargs="+", help="of the window (1 2 4 9; 9)", metavar="WEEKS"
    )
    try:
        given, training, _ = asked(options, fewest=2)
        conf = yaml.safe_load(EVALUATION.read_text(encoding="utf-8"))
        config = GateConfig.model_validate(conf["gate"] | {"baselines": []})
        small = {"min_slice_rows": 200, "resamples": 50} if given.quick else {}
        evaluation = EvaluationConfig.model_validate(conf["evaluation"] | small)
        figures = measure(
            Shop(given.data, training),
            given.weeks or ([9] if given.quick else [1, 2, 4, 9]),
            given.draws or (20 if given.quick else 200),
            config,
            evaluation,
            behind=BEHIND[-1:] if given.quick else BEHIND,
        )
    except (InputError, ConfigError) as error:
        raise SystemExit(f"gate: {error}") from None
    print("", *below(figures), sep="\n")
    if given.json:
        print(json.dumps(figures, allow_nan=False))


if __name__ == "__main__":
    main()
