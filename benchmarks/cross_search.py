"""Does the cross search find the crosses that are there, and no others?

Generates a log whose crosses are known, trains the deep part on it, and compares what
`fathom.cross_search` chooses with what was planted; then the same log without any cross.

    python benchmarks/cross_search.py                    # 200,000 rows, five seeds
    python benchmarks/cross_search.py --rows 50000 --json
    python benchmarks/cross_search.py --folds 1          # residuals of rows that were trained on
    python benchmarks/cross_search.py --quick            # 20,000 rows, one seed
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import fathom
from fathom.batch import Ragged
from fathom.config import TrainingConfig
from fathom.cross_search import CrossSearchConfig, Split, search
from fathom.encoding import Frame, Values, fit_encoder
from fathom.evaluation import EvaluationConfig
from fathom.hardware import hardware, peak_memory_mb
from fathom.spec import FeatureSpec

#: Column → its owner and how many values it has. Keys grow with the log.
COLUMNS = {
    "age": ("user", 4),
    "city": ("user", 12),
    "club": ("user", 30),
    "postcode": ("user", 300),
    "brand": ("item", 5),
    "genre": ("item", 15),
    "maker": ("item", 40),
    "colour": ("item", 150),
    "device": ("context", 3),
    "hour": ("context", 10),
    "shop": ("context", 25),
    "page": ("context", 60),
    "campaign": ("context", 1000),
}
RECENT = 20
#: The crosses that are there: pairs of values with an effect that neither value tells.
PLANTED = (
    ("club", "genre"),
    ("maker", "device"),
    ("hour", "page"),
    ("brand", "shop"),
    ("age", "item_id"),
    ("recent", "genre"),
)
ROWS_PER_USER, ITEMS = 50, 500
#: Standard deviations of effects on the logit.
KEY, COLUMN, CROSS, RECENT_CROSS = 0.5, 0.3, 0.8, 0.5
TRAINING = TrainingConfig(model="deep", hidden=(64, 32), epochs=3, batch_size=1024)

SPEC = FeatureSpec.model_validate(
    {
        "entities": {"user": "user_id", "item": "item_id", "request": "request_id"},
        "label": {"name": "clicked", "values": [0, 1]},
        "columns": [
            {"name": "user_id", "kind": "categorical", "owner": "user"},
            {"name": "item_id", "kind": "categorical", "owner": "item"},
            *(
                {"name": name, "kind": "categorical", "owner": owner}
                for name, (owner, _) in COLUMNS.items()
            ),
            {"name": "recent", "kind": "multi", "owner": "user"},
            {"name": "tags", "kind": "multi", "owner": "item"},
            {"name": "price", "kind": "numeric", "owner": "item"},
            {"name": "mood", "kind": "numeric", "owner": "context"},
            {"name": "stock", "kind": "numeric", "owner": "item", "buckets": [0.25, 0.5, 0.75]},
            {"name": "delay", "kind": "numeric", "owner": "context", "buckets": [0.1, 0.5]},
        ],
    }
)


@dataclass(frozen=True)
class Log:
    """A generated log, divided as time would divide it, and what was planted in it."""

    training: Frame
    validation: Frame
    planted: tuple[tuple[str, str], ...]


def planted_log(
    rows: int,
    seed: int,
    planted: Sequence[tuple[str, str]] = PLANTED,
    validation_share: float = 0.25,
) -> Log:
    """Generate a log.

    The logit is a sum of effects of each user, item and value of every column but ``campaign``,
    ``colour`` and ``postcode``; of tastes (products of users' and items' latent factors, which are
    no cross to memorise: almost no pair comes twice); of a smooth function of ``price`` and
    ``mood``; and of the planted crosses, whose effects have a mean of 0 over each column.

    Args:
        rows: of training; validation has ``validation_share`` as many more.
    """
    random = np.random.default_rng(seed)
    total = rows + int(rows * validation_share)
    users = max(rows // ROWS_PER_USER, 20)
    keys = {
        "user": random.integers(users, size=total),
        "item": (ITEMS * random.random(total) ** 1.5).astype(np.int64),  # some are popular
        "context": np.arange(total),
    }
    counts = {"user": users, "item": ITEMS, "context": total}
    codes = {"user_id": keys["user"], "item_id": keys["item"]}
    for name, (owner, values) in COLUMNS.items():
        codes[name] = random.integers(values, size=counts[owner])[keys[owner]]
    lists = {
        "recent": _lists(random, total, RECENT),
        "tags": _lists(random, ITEMS, RECENT).take(keys["item"]),
    }
    numbers = {
        **{name: random.random(ITEMS)[keys["item"]] for name in ("price", "stock")},
        **{name: random.random(total) for name in ("mood", "delay")},
    }
    logit = _singles(random, codes, users) + _smooth(random, codes, numbers, users)
    sizes = {"item_id": ITEMS, "user_id": users, **{n: size for n, (_, size) in COLUMNS.items()}}
    for first, second in planted:
        logit += _crossed(random, first, second, codes, lists, sizes)
    label = (random.random(total) < 1 / (1 + np.exp(1.2 - logit))).astype(np.int64)
    frame: dict[str, Values] = {
        **{name: _texts(name, values) for name, values in codes.items()},
        **{n: Ragged(_texts(n, lists_.values), lists_.offsets) for n, lists_ in lists.items()},
        **numbers,
        "request_id": _texts("request", np.arange(total) // 4),
        "clicked": label,
    }
    return Log(_part(frame, 0, rows), _part(frame, rows, total), tuple(planted))


def _singles(
    random: np.random.Generator, codes: Mapping[str, NDArray[Any]], users: int
) -> NDArray[np.float64]:
    """What each column tells alone."""
    logit = random.normal(0, KEY, users)[codes["user_id"]]
    logit += random.normal(0, KEY, ITEMS)[codes["item_id"]]
    for name in COLUMNS:
        if name not in {"campaign", "colour", "postcode"}:
            logit += random.normal(0, COLUMN, COLUMNS[name][1])[codes[name]]
    return logit


def _smooth(
    random: np.random.Generator,
    codes: Mapping[str, NDArray[Any]],
    numbers: Mapping[str, NDArray[Any]],
    users: int,
) -> NDArray[np.float64]:
    """What embeddings and layers are for."""
    tastes = random.normal(0, 0.7, (users, 2))[codes["user_id"]]
    traits = random.normal(0, 0.7, (ITEMS, 2))[codes["item_id"]]
    waves = np.sin(np.pi * numbers["price"]) * np.cos(np.pi * numbers["mood"])
    return (tastes * traits).sum(axis=1) + 0.7 * waves


def _crossed(
    random: np.random.Generator,
    first: str,
    second: str,
    codes: Mapping[str, NDArray[Any]],
    lists: Mapping[str, Ragged],
    sizes: Mapping[str, int],
) -> NDArray[np.float64]:
    """The effect of a cross on each row."""
    if first in lists:
        held = lists[first]
        effect = _effects(random, RECENT, sizes[second], RECENT_CROSS)
        each = effect[held.values, codes[second][held.rows]]
        return np.bincount(held.rows, each, minlength=len(held))
    effect = _effects(random, sizes[first], sizes[second], CROSS)
    return effect[codes[first], codes[second]]


def _effects(random: np.random.Generator, rows: int, columns: int, scale: float) -> NDArray[Any]:
    effect = random.normal(0, scale, (rows, columns))
    return effect - effect.mean(axis=0) - effect.mean(axis=1)[:, None] + effect.mean()


def _lists(random: np.random.Generator, rows: int, values: int) -> Ragged:
    lengths = random.integers(0, 6, rows)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    return Ragged(random.integers(values, size=offsets[-1]), offsets)


def _texts(name: str, values: NDArray[Any]) -> NDArray[Any]:
    texts = np.array([f"{name}-{value}" for value in range(int(values.max(initial=0)) + 1)], object)
    return texts[values]


def _part(frame: Mapping[str, Values], start: int, stop: int) -> dict[str, Values]:
    index = np.arange(start, stop)
    return {n: v.take(index) if isinstance(v, Ragged) else v[index] for n, v in frame.items()}


def measure(rows: int, seeds: Sequence[int], config: CrossSearchConfig) -> dict[str, Any]:
    """Search logs with the planted crosses, and the same without; figures ready for JSON."""
    runs = []
    for seed in seeds:
        for planted in (PLANTED, ()):
            runs.append(_run(planted_log(rows, seed, planted), seed, config))
    found = [run for run in runs if run["planted"]]
    hits = sum(run["hits"] for run in found)
    return {
        "benchmark": "cross_search",
        "rows": rows,
        "seeds": list(seeds),
        "precision": hits / max(sum(len(run["chosen"]) for run in found), 1),
        "recall": hits / sum(run["planted"] for run in found),
        "chosen_of_noise": [len(run["chosen"]) for run in runs if not run["planted"]],
        "seconds": statistics.fmean(run["seconds"] for run in runs),
        "runs": runs,
        "cross_search": config.model_dump(),
        "training": TRAINING.as_dict(),
        "code_version": fathom.__version__,
        "hardware": hardware(),
        "peak_memory_mb": peak_memory_mb(),
    }


def _run(log: Log, seed: int, config: CrossSearchConfig) -> dict[str, Any]:
    encoder = fit_encoder(log.training, SPEC)
    splits = [Split(frame, encoder.encode(frame)) for frame in (log.training, log.validation)]
    started = time.perf_counter()
    found = search(encoder, *splits, TRAINING, config, EvaluationConfig())
    planted = {frozenset(pair) for pair in log.planted}
    chosen = [frozenset(cross.columns) for cross in found.chosen]
    return {
        "seed": seed,
        "planted": len(planted),
        "hits": len(planted.intersection(chosen)),
        "chosen": [
            {"columns": cross.columns, "lift": cross.lift, "lo": cross.lo, "hi": cross.hi}
            for cross in found.chosen
        ],
        "missed": sorted(sorted(pair) for pair in planted.difference(chosen)),
        "candidates": len(found.candidates),
        "losses": found.losses,
        "seconds": round(time.perf_counter() - started, 2),
    }


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text: a line per log, then precision and recall."""
    lines = [
        f"{'seed':<6}{'planted':>8}{'found':>7}{'wrong':>7}"
        f"{'deep':>10}{'columns':>10}{'crosses':>10}{'seconds':>9}"
    ]
    for run in figures["runs"]:
        wrong = len(run["chosen"]) - run["hits"]
        losses = "".join(f"{run['losses'][n]:>10.5f}" for n in ("deep", "columns", "crosses"))
        lines.append(
            f"{run['seed']:<6}{run['planted']:>8}{run['hits']:>7}{wrong:>7}"
            f"{losses}{run['seconds']:>9.1f}"
        )
    candidates = figures["runs"][0]["candidates"]
    return "\n".join(
        [
            *lines,
            "",
            f"precision {figures['precision']:.3f}, recall {figures['recall']:.3f}: "
            f"{figures['rows']:,} training rows, {candidates} candidates",
            f"crosses chosen where none was planted, by seed: {figures['chosen_of_noise']}",
            "deep, columns, crosses: logloss on validation rows that chose nothing",
            f"hardware: {figures['hardware']}",
        ]
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Precision and recall of planted crosses.")
    parser.add_argument("--rows", type=int, help="training rows (200,000; 20,000)")
    parser.add_argument("--seeds", type=int, help="how many logs of either kind (5; 1)")
    parser.add_argument("--folds", type=int, default=2, help="as in the settings (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="20,000 rows, one seed")
    parser.add_argument("--json", action="store_true", help="the last line is a JSON object")
    parsed = parser.parse_args()
    parsed.rows = parsed.rows or (20_000 if parsed.quick else 200_000)
    parsed.seeds = parsed.seeds or (1 if parsed.quick else 5)
    if parsed.rows < 1000:
        parser.error(f"--rows is {parsed.rows}; 1000 is the least that can be divided")
    return parsed


def main() -> None:
    """Run from the command line."""
    given = _arguments()
    logging.basicConfig(level=logging.WARNING)
    config = CrossSearchConfig(folds=given.folds, max_crosses=20)
    figures = measure(given.rows, range(given.seeds), config)
    print(table(figures))
    if given.json:
        print(json.dumps(figures, allow_nan=False))


if __name__ == "__main__":
    main()
