"""Training from a log larger than memory, beside training from memory: the rates should agree.

Writes a synthetic log as the encoder leaves it (13 numbers, 26 fields, 2 crosses; 272 bytes an
example), takes it out of the system's cache, and trains as the loop does on a few windows of it,
in the order of an epoch over all of it. Then as many steps on as many examples held in memory.

    python benchmarks/training/streaming.py --folder big         # 100 million rows, 27 GB on disk
    python benchmarks/training/streaming.py --rows 2000000 --window 262144 --windows 4
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

FIELDS, CROSSES, NUMBERS, WIDTH, BATCH = 26, 2, 13, 16, 4096
SIZE = 40_000  # rows of each table
CHUNK = 1 << 20
KINDS = ("memory", "disk")


def write(folder: Path, rows: int) -> None:
    """Write the split, a chunk at a time; ids follow a power law, as in a log."""
    shapes = {
        "numeric": ((rows, NUMBERS), np.float32),
        "deep_ids": ((rows, FIELDS), np.int32),
        "wide_ids": ((rows, FIELDS + CROSSES), np.int32),
        "label": ((rows,), np.float32),
    }
    folder.mkdir(parents=True, exist_ok=True)
    parts = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", dtype, shape)
        for name, (shape, dtype) in shapes.items()
    }
    draw = np.random.default_rng(0)
    starts = (np.arange(FIELDS + CROSSES) * SIZE).astype(np.int32)
    for first in range(0, rows, CHUNK):
        last = min(first + CHUNK, rows)
        spread = draw.random((last - first, FIELDS + CROSSES), np.float32)
        ids = np.minimum(np.exp(spread * np.float32(np.log(SIZE))).astype(np.int32), SIZE - 1)
        parts["numeric"][first:last] = draw.random((last - first, NUMBERS), np.float32)
        parts["deep_ids"][first:last] = ids[:, :FIELDS]
        parts["wide_ids"][first:last] = ids + starts
        parts["label"][first:last] = draw.random(last - first) < 0.3
        print(f"\r{last:,} rows written", end="", file=sys.stderr, flush=True)
    for part in parts.values():
        part.flush()
    print(file=sys.stderr)


def forget(folder: Path) -> None:
    """Take the files out of the system's cache, so that reading them is reading the disk."""
    for path in folder.glob("*.npy"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(folder: Path, kind: str, window: int, windows: int, precision: str) -> dict[str, float]:
    """Train on ``windows`` windows after a first one; the rate counts waiting for the disk."""
    from fathom import training
    from fathom.batch import Batch, Layout
    from fathom.config import TrainingConfig
    from fathom.feed import Feed
    from fathom.models import build
    from fathom.step import Optimizers, losses

    training._keep_freed_memory()
    names = {f"f{i}": (SIZE, WIDTH) for i in range(FIELDS)}
    layout = Layout(NUMBERS, names, tuple(names), (), (SIZE,) * (FIELDS + CROSSES), 0)
    config = TrainingConfig(
        hidden=(400, 400, 400),
        batch_size=BATCH,
        embedding_optimizer="rowwise_adagrad",
        precision=precision,
        device="cpu",
    )
    split = Batch.load(folder)
    if kind == "memory":
        split = split.take(np.arange((windows + 1) * window))
    model = build(layout, config)
    model.train()
    optimizers = Optimizers(model, config)
    feed = Feed(split, BATCH, window if kind == "disk" else len(split), seed=0)
    warm_up, steps = window // BATCH, windows * window // BATCH
    ends = []
    for examples in itertools.islice(feed.epoch(1), warm_up + steps):
        loss = losses(model(examples.inputs), examples.label, "binary").sum() / BATCH
        optimizers.step(loss, BATCH, 1.0)
        ends.append(time.perf_counter())
    waits = np.diff(ends[warm_up - 1 :])
    return {
        "examples_per_second": round(BATCH * steps / (ends[-1] - ends[warm_up - 1])),
        "step_ms": round(1000 * statistics.median(waits), 1),
        "longest_step_ms": round(1000 * float(waits.max()), 1),
        "steps": steps,
        "held_mb": held_mb(),
    }


def held_mb() -> int:
    """What the process holds itself; pages of mapped files, which the system may take, left out."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description="Training from disk beside training from memory.")
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--window", type=int, default=1 << 20, help="examples shuffled as one")
    parser.add_argument("--windows", type=int, default=6, help="that are timed, after a first one")
    parser.add_argument("--precision", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--folder", type=Path, help="to keep the log in, or where it is; temporary")
    parser.add_argument("--json", action="store_true", help="the last line is a JSON object")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        run = measure(given.folder, given.one, given.window, given.windows, given.precision)
        print(json.dumps(run))
        return
    if given.rows < (given.windows + 1) * given.window:
        parser.error(f"--rows must be {(given.windows + 1) * given.window:,} or more: the windows")
    with tempfile.TemporaryDirectory(prefix="fathom-") as passing:
        folder = given.folder or Path(passing)
        if not (folder / "label.npy").exists():
            write(folder, given.rows)
        found = {}
        print("          examples/s   ms a step   longest   held MB")
        for kind in KINDS:
            forget(folder)
            command = [sys.executable, __file__, "--one", kind, "--folder", str(folder)]
            command += ["--window", str(given.window), "--windows", str(given.windows)]
            command += ["--precision", given.precision]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            run = found[kind] = json.loads(done.stdout.splitlines()[-1])
            print(
                f"{kind:8}{run['examples_per_second']:12,}{run['step_ms']:12.1f}"
                f"{run['longest_step_ms']:10.1f}{run['held_mb']:10,}",
                flush=True,
            )
    if given.json:
        print(json.dumps({"benchmark": "training_streaming", "rows": given.rows, "runs": found}))


if __name__ == "__main__":
    main()
