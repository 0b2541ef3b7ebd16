"""What is the choice of crosses worth? The same training with other wide parts.

Reads what a run left: the training frame's splits, the encoder's spec and who was shown each test
row; and the crosses that ``kedro run --pipelines cross_search`` chose, if it has been run. Each
wide part is encoded anew and trained with every seed; the deep part is the same throughout.

    python benchmarks/wide_parts.py                # three seeds of the default environment
    python benchmarks/wide_parts.py --seeds 5 --json
    python benchmarks/wide_parts.py --quick        # two seeds, one epoch, the `test` environment
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import fathom
from fathom.comparison.evidence import Measured, Window, difference
from fathom.config import ConfigError, TrainingConfig
from fathom.encoding import Encoder, fit_encoder
from fathom.evaluation import EvaluationConfig
from fathom.feature_store import frame_of
from fathom.hardware import hardware, peak_memory_mb
from fathom.ranker import Ranker
from fathom.spec import Cross, FeatureSpec
from fathom.training import train
from seeds import InputError, asked, needed, parser, shown

CHOSEN = "08_reporting/chosen_crosses.yml"
#: What the others are compared with.
OWN = "the spec's"
_FRAMES = tuple(f"05_model_input/{name}.parquet" for name in ("train", "validation", "test"))
#: Keys of a pair that fewer training rows have share one id.
_MIN_COUNT = 4


@dataclasses.dataclass(frozen=True)
class WidePart:
    """A choice of crosses, and what differs from the training that is configured."""

    name: str
    crosses: tuple[Cross, ...]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def wide_parts(spec: FeatureSpec, chosen: Path) -> Iterator[WidePart]:
    """The choices that are compared; the search's only if it has left one."""
    yield WidePart(OWN, spec.crosses)
    yield WidePart("the spec's, no L1", spec.crosses, {"wide_l1": 0.0})
    yield WidePart("none (deep)", (), {"model": "deep"})
    if chosen.exists():
        found = yaml.safe_load(chosen.read_text(encoding="utf-8"))["features"]["crosses"]
        crosses = tuple(Cross.model_validate_json(json.dumps(cross)) for cross in found)
        if crosses:
            yield WidePart("cross_search's", crosses)
    ids = [column.name for column in spec.columns if not column.is_numeric]
    pairs = itertools.combinations(ids, 2)
    crosses = tuple(Cross(columns=pair, min_count=_MIN_COUNT) for pair in pairs)
    yield WidePart("all pairs", crosses)


def measure(data: Path, config: TrainingConfig, seeds: Sequence[int]) -> dict[str, Any]:
    """Train each wide part with each seed, and measure on the test window.

    Args:
        data: the folder below which a run wrote, as ``data`` or ``data/test``.

    Returns:
        The figures, ready for JSON; differences are less `OWN`, with intervals over users and
        seeds (`fathom.comparison.evidence.difference`).

    Raises:
        InputError: the run's files are missing, all named, or are not of one run.
    """
    import pyarrow.parquet as pq

    needed(data, _FRAMES)
    spec = Encoder.load(data / "05_model_input/encoder").spec
    frames = [frame_of(pq.read_table(data / path)) for path in _FRAMES]
    window: Window | None = None
    measured: dict[str, Measured] = {}
    rows = []
    for part in wide_parts(spec, data / CHOSEN):
        encoder = fit_encoder(frames[0], spec.model_copy(update={"crosses": part.crosses}))
        first, second, test = (encoder.encode(frame) for frame in frames)
        if window is None:
            path = data / "07_model_output/predictions.parquet"
            window = Window(shown(path, spec, test), {}, EvaluationConfig())
        scores, losses, kept, seconds = [], [], [], []
        for seed in seeds:
            started = time.perf_counter()
            own = dataclasses.replace(config, seed=seed, **part.settings)
            trained = train(encoder.layout, first, second, own, spec.task)
            seconds.append(time.perf_counter() - started)
            best = trained.history[trained.best_epoch - 1]
            losses.append(best.validation_loss)
            zero = 1.0 if best.wide_zero_share is None else best.wide_zero_share
            kept.append((1 - zero) * encoder.layout.wide_rows)
            scores.append(Ranker(encoder, trained.model, own).score_batch(test))
        measured[part.name] = window.measure(scores)
        rows.append(
            {
                "name": part.name,
                "crosses": [cross.name for cross in part.crosses],
                "settings": dict(part.settings),
                "wide_rows": encoder.layout.wide_rows,
                "wide_nonzero": round(float(np.mean(kept))),
                "validation_loss": float(np.mean(losses)),
                "seconds": round(float(np.mean(seconds)), 1),
            }
        )
    assert window is not None
    for row in rows:
        own, other = measured[row["name"]], measured[OWN]
        for metric in window.compared:
            row[metric] = own.mean(None, metric)
            row[f"{metric}_spread"] = own.spread(None, metric)
            found = difference(own, other, None, metric, window.config)
            row[f"{metric}_difference"] = dataclasses.asdict(found) if found else None
    return {
        "benchmark": "wide_parts",
        "loss": window.loss,
        "metrics": list(window.compared),
        "wide_parts": rows,
        "seeds": list(seeds),
        "sizes": {"train": len(first), "validation": len(second), "test": len(test)},
        "training": config.as_dict(),
        "spec_hash": spec.hash,
        "data_hash": (data / "02_intermediate/data_hash.txt").read_text(encoding="utf-8").strip(),
        "code_version": fathom.__version__,
        "hardware": hardware(),
        "peak_memory_mb": peak_memory_mb(),
    }


def table(figures: Mapping[str, Any]) -> str:
    """The figures as text, a row per wide part."""
    loss = figures["loss"]
    names = ("crosses", "rows", "not zero", "validation", "test", "spread", "less the spec's")
    lines = ["wide part".ljust(20) + "".join(name.rjust(12) for name in names[:-1])]
    lines[0] += f"  {names[-1]}"
    for row in figures["wide_parts"]:
        cells = [
            f"{len(row['crosses'])}",
            f"{row['wide_rows']:,}",
            f"{row['wide_nonzero']:,}",
            f"{row['validation_loss']:.5f}",
            f"{row[loss]:.5f}",
            "-" if row[f"{loss}_spread"] is None else f"{row[f'{loss}_spread']:.5f}",
        ]
        found, against = row[f"{loss}_difference"], ""
        if found is not None and row["name"] != OWN:
            against = f"  {found['difference']:+.5f} ({found['lo']:+.5f} to {found['hi']:+.5f})"
        lines.append(row["name"].ljust(20) + "".join(cell.rjust(12) for cell in cells) + against)
    rows = ", ".join(f"{count:,} {name}" for name, count in figures["sizes"].items())
    return "\n".join(
        [
            *lines,
            "",
            f"{loss}, seeds {figures['seeds']}; 95 % intervals over users and seeds",
            f"exposures: {rows}",
            f"spec {figures['spec_hash'][:12]}, data {figures['data_hash'][:12]}",
            f"hardware: {figures['hardware']}, peak {figures['peak_memory_mb']:,.0f} MB",
        ]
    )


def main() -> None:
    """Run from the command line."""
    try:
        given, config, seeds = asked(parser("What the choice of crosses is worth."), fewest=1)
        figures = measure(given.data, config, seeds)
    except (InputError, ConfigError) as error:
        raise SystemExit(f"wide_parts: {error}") from None
    print(table(figures))
    if given.json:
        print(json.dumps(figures, allow_nan=False))


if __name__ == "__main__":
    main()
