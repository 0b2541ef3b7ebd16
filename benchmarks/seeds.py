"""How much of the model's quality is chance: one training per seed, measured on the test window.

Reads what a run left: the encoder, the encoded splits and who was shown each test row. What differs
between the trainings is the seed: initial weights, order of examples, dropout. The data, and so the
sampled negatives, stay the same.

    python benchmarks/seeds.py                     # three seeds of the default environment
    python benchmarks/seeds.py --seeds 5 --json
    python benchmarks/seeds.py --seeds 10 --against precision=bfloat16   # does a setting matter?
    python benchmarks/seeds.py --quick             # two seeds, one epoch, the `test` environment
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import fathom
from fathom.batch import Batch
from fathom.config import ConfigError, TrainingConfig
from fathom.encoding import Encoder
from fathom.evaluation import Metrics, Predictions, metrics
from fathom.hardware import hardware, peak_memory_mb
from fathom.ranker import Ranker
from fathom.spec import FeatureSpec
from fathom.training import train

CONFIGURED = Path("conf/base/parameters_training.yml")
_NEEDED = (
    "02_intermediate/data_hash.txt",
    *(f"05_model_input/{name}" for name in ("encoder", "train", "validation", "test")),
    "07_model_output/predictions.parquet",
)


class InputError(ValueError):
    """What the benchmark reads is missing or does not fit together."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training: its seed, its metrics on the test window, what it took."""

    seed: int
    metrics: Metrics
    best_epoch: int
    seconds: float


def measure(data: Path, config: TrainingConfig, seeds: Sequence[int]) -> dict[str, Any]:
    """Train once per seed and measure each on the test window.

    Args:
        data: the folder below which a run wrote, as ``data`` or ``data/test``.

    Returns:
        The figures, ready for JSON.

    Raises:
        InputError: the run's files are missing, all named, or are not of one run.
    """
    needed(data)
    inputs = data / "05_model_input"
    encoder = Encoder.load(inputs / "encoder")
    splits = {name: Batch.load(inputs / name) for name in ("train", "validation", "test")}
    rows = shown(data / "07_model_output/predictions.parquet", encoder.spec, splits["test"])
    runs = [_run(encoder, splits, rows, dataclasses.replace(config, seed=s)) for s in seeds]
    figures = [run.metrics for run in runs]
    return {
        "benchmark": "seeds",
        "seeds": list(seeds),
        "mean": _over(figures, statistics.fmean),
        "spread": _over(figures, statistics.stdev),
        "runs": [dataclasses.asdict(run) for run in runs],
        "sizes": {name: len(batch) for name, batch in splits.items()},
        "training": config.as_dict(),
        "spec_hash": encoder.spec.hash,
        "data_hash": (data / _NEEDED[0]).read_text(encoding="utf-8").strip(),
        "code_version": fathom.__version__,
        "hardware": hardware(),
        "peak_memory_mb": peak_memory_mb(),
    }


def needed(data: Path, more: Sequence[str] = ()) -> None:
    """Refuse a folder in which a file of a whole run, or one of ``more``, is missing."""
    missing = [path for path in (*_NEEDED, *more) if not (data / path).exists()]
    if missing:
        raise InputError(
            f"{data} has no {', '.join(missing)}; make a whole run first: kedro run"
            f"{' --env test' if data.name == 'test' else ''}"
        )


def paired(
    ours: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]], margin: float
) -> dict[str, dict[str, Any]]:
    """The mean difference of each metric between two settings, seed by seed, and how sure it is.

    Args:
        ours, others: runs of the same seeds; a difference is theirs less ours.
        margin: the two are called equivalent in a metric if its 90 % interval lies within this much
            of 0, which is two one-sided t-tests at 5 % (Schuirmann 1987).

    Returns:
        Metric → ``difference``, ``lo`` and ``hi`` (of the 90 % interval), ``equivalent``.
    """
    from scipy import stats

    found = {}
    for name in ours[0]["metrics"]:
        values = [
            (theirs["metrics"][name], mine["metrics"][name])
            for theirs, mine in zip(others, ours, strict=True)
        ]
        if any(None in pair for pair in values):
            continue
        differences = [theirs - mine for theirs, mine in values]
        mean, error = statistics.fmean(differences), statistics.stdev(differences)
        count = len(differences)
        half = float(stats.t.ppf(0.95, count - 1)) * error / count**0.5
        found[name] = {
            "difference": mean,
            "lo": mean - half,
            "hi": mean + half,
            "equivalent": -margin < mean - half and mean + half < margin,
        }
    return found


def _run(
    encoder: Encoder, splits: Mapping[str, Batch], rows: Predictions, config: TrainingConfig
) -> Run:
    """Train with the seed of ``config``; ``rows`` has everything of the test rows but scores."""
    started = time.perf_counter()
    task = encoder.spec.task
    trained = train(encoder.layout, splits["train"], splits["validation"], config, task)
    seconds = time.perf_counter() - started
    ranker = Ranker(encoder, trained.model, config)
    found = metrics(dataclasses.replace(rows, probability=ranker.score_batch(splits["test"])))
    del found["rows"]
    return Run(config.seed, found, trained.best_epoch, round(seconds, 2))


def shown(path: Path, spec: FeatureSpec, test: Batch) -> Predictions:
    """The test rows as the run's evaluation saw them: labels, users, requests."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    table = table.filter(pc.equal(table["split"], "test"))

    def codes(name: str) -> Any:
        encoded = table[name].combine_chunks().dictionary_encode()
        return encoded.indices.to_numpy().astype(np.int64)

    outcome = table[spec.label.name].to_numpy()
    label = outcome if spec.label.values is None else outcome == spec.label.values[-1]
    if test.label is None or not np.array_equal(label.astype(np.float32), test.label):
        raise InputError(f"{path} is not of the run that encoded the test split; run it again")
    return Predictions(
        label=label.astype(np.float64),
        probability=table["probability"].to_numpy(),
        user=codes(spec.entities.user),
        request=codes(spec.entities.request),
        task=spec.task,
    )


def _over(figures: Sequence[Metrics], summary: Any) -> Metrics:
    """A summary of each metric over the runs; None where it is undefined in one of them."""
    columns = {name: [found[name] for found in figures] for name in figures[0]}
    return {
        name: None if None in values else float(summary(values)) for name, values in columns.items()
    }


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text: a row per seed, then mean and spread."""
    names = list(figures["mean"])
    lines = ["seed".ljust(8) + "".join(name.rjust(13) for name in (*names, "epoch", "seconds"))]

    def row(title: str, values: Mapping[str, Any], *more: str) -> None:
        cells = ["-" if values[n] is None else f"{values[n]:.5f}" for n in names]
        lines.append(title.ljust(8) + "".join(cell.rjust(13) for cell in (*cells, *more)))

    for run in figures["runs"]:
        row(str(run["seed"]), run["metrics"], str(run["best_epoch"]), f"{run['seconds']:.1f}")
    row("mean", figures["mean"])
    row("spread", figures["spread"])
    rows = ", ".join(f"{count:,} {name}" for name, count in figures["sizes"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"spread: sample standard deviation over {len(figures['seeds'])} seeds",
            f"exposures: {rows}",
            f"model: {figures['training']['model']}, spec {figures['spec_hash'][:12]}, "
            f"data {figures['data_hash'][:12]}",
            f"hardware: {figures['hardware']}",
        ]
    )


def against(figures: Mapping[str, Any], settings: str, margin: float) -> str:
    """The paired differences as text."""
    lines = ["", f"with {settings}, less without, seed by seed"]
    lines.append("metric".ljust(16) + "difference".rjust(12) + "90 % interval".rjust(26))
    for name, found in figures.items():
        verdict = f"within {margin:g}" if found["equivalent"] else "not shown to be equal"
        interval = f"{found['lo']:+.5f} … {found['hi']:+.5f}"
        lines.append(f"{name:16}{found['difference']:+12.5f}{interval:>26}  {verdict}")
    return "\n".join(lines)


def parser(description: str) -> argparse.ArgumentParser:
    """What every benchmark is told that trains with several seeds on what a run left."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--data", type=Path, help="folder of a run (data; data/test with --quick)")
    options.add_argument(
        "--training", type=Path, default=CONFIGURED, help="settings of the model (%(default)s)"
    )
    options.add_argument("--seeds", type=int, help="how many, from the configured one on (3; 2)")
    options.add_argument("--quick", action="store_true", help="2 seeds, 1 epoch, on data/test")
    options.add_argument("--json", action="store_true", help="the last line is a JSON object")
    return options


def asked(
    options: argparse.ArgumentParser, fewest: int
) -> tuple[argparse.Namespace, TrainingConfig, range]:
    """The command line's options, what is trained, and with which seeds.

    Raises:
        ConfigError: the settings are not of a training.
    """
    given = options.parse_args()
    if given.seeds is None:
        given.seeds = 2 if given.quick else 3
    if given.seeds < fewest:
        options.error(f"--seeds is {given.seeds}; give {fewest} or more")
    given.data = given.data or Path("data/test" if given.quick else "data")
    config = TrainingConfig(
        **yaml.safe_load(given.training.read_text(encoding="utf-8"))["training"]
    )
    if given.quick:
        config = dataclasses.replace(config, epochs=1)
    return given, config, range(config.seed, config.seed + given.seeds)


def main() -> None:
    """Run from the command line."""
    options = parser("Mean and spread of the model over seeds.")
    options.add_argument(
        "--against",
        nargs="+",
        metavar="SETTING=VALUE",
        help="train each seed once more with these, as precision=bfloat16, and compare in pairs",
    )
    options.add_argument(
        "--margin", type=float, default=0.0005, help="what counts as no difference (%(default)s)"
    )
    try:
        given, config, seeds = asked(options, fewest=2)
        figures = measure(given.data, config, seeds)
        if given.against:
            others = yaml.safe_load("\n".join(s.replace("=", ": ", 1) for s in given.against))
            other = measure(given.data, dataclasses.replace(config, **others), seeds)
            figures["against"] = {
                "settings": others,
                "runs": other["runs"],
                "margin": given.margin,
                "differences": paired(figures["runs"], other["runs"], given.margin),
            }
    except (InputError, ConfigError, TypeError, yaml.YAMLError) as error:
        raise SystemExit(f"seeds: {error}") from None
    print(table(figures))
    if given.against:
        differences = figures["against"]["differences"]
        print(against(differences, " ".join(given.against), given.margin))
    if given.json:
        print(json.dumps(figures, allow_nan=False))


if __name__ == "__main__":
    main()
