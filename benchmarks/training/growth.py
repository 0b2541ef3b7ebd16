"""What a step costs as tables grow: it should follow the rows touched, not the rows there are.

26 fields of equal size and 2 crosses, embeddings of 16, layers of 400, batches of 4096 with ids
drawn by a power law, as in a log; each size in a process of its own.

    python benchmarks/training/growth.py                 # 1, 5, 20 and 50 million rows; 6 GB
    python benchmarks/training/growth.py --rows 100000 200000 --json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

import numpy as np

FIELDS, CROSSES, WIDTH = 26, 2, 16
WARM_UP, STEPS = 10, 40


def measure(rows: int, batch_size: int) -> dict[str, float]:
    """Train `STEPS` steps of tables with ``rows`` rows in all."""
    import torch

    from fathom import training
    from fathom.batch import Batch, Layout
    from fathom.config import TrainingConfig
    from fathom.feed import Feed
    from fathom.hardware import peak_memory_mb
    from fathom.models import build
    from fathom.step import Optimizers, losses

    training._keep_freed_memory()
    draw, examples = np.random.default_rng(0), batch_size * (WARM_UP + STEPS)
    size = rows // FIELDS

    def ids(fields: int) -> np.ndarray:
        return (size ** draw.random((examples, fields))).astype(np.int32)

    fields = {f"f{i}": (size, WIDTH) for i in range(FIELDS)}
    slots = (size,) * (FIELDS + CROSSES)
    layout = Layout(13, fields, tuple(fields), (), slots, 0)
    single = np.minimum(ids(FIELDS), size - 1)
    wide = np.concatenate([single, np.minimum(ids(CROSSES), size - 1)], axis=1)
    batch = Batch(
        numeric=draw.normal(size=(examples, 13)).astype(np.float32),
        deep_ids=single,
        deep_bags=(),
        wide_ids=wide + (np.arange(FIELDS + CROSSES) * size).astype(np.int32),
        wide_bags=(),
        label=(draw.random(examples) < 0.3).astype(np.float32),
    )
    config = TrainingConfig(
        hidden=(400, 400, 400),
        batch_size=batch_size,
        embedding_optimizer="rowwise_adagrad",
        precision="bfloat16",
        device="cpu",
    )
    model = build(layout, config)
    model.train()
    optimizers = Optimizers(model, config)
    seconds = []
    for examples_ in Feed(batch, batch_size, examples, seed=0).epoch(1):
        started = time.perf_counter()
        loss = losses(model(examples_.inputs), examples_.label, "binary").sum() / batch_size
        optimizers.step(loss, batch_size, 1.0)
        seconds.append(time.perf_counter() - started)
    weights = sum(w.numel() for w in model.parameters())
    states = sum(t.numel() for t in optimizers.tensors().values())
    held = 4 * (weights + states) / (1 << 20)
    data = sum(a.nbytes for a in (batch.numeric, single, batch.wide_ids)) / (1 << 20)
    return {
        "rows": rows,
        "step_ms": round(1000 * statistics.median(seconds[WARM_UP:]), 1),
        "weights_and_states_mb": round(held),
        "peak_mb": peak_memory_mb() - round(data),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What a step costs as tables grow.")
    sizes = [1_000_000, 5_000_000, 20_000_000, 50_000_000]
    parser.add_argument("--rows", type=int, nargs="+", default=sizes, help="of all tables together")
    parser.add_argument("--batch", type=int, default=4096, help="examples a step (%(default)s)")
    parser.add_argument("--json", action="store_true", help="the last line is a JSON object")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one, given.batch)))
        return
    found = []
    print("      rows   ms a step   weights and states MB   peak MB")
    for rows in given.rows:
        command = [sys.executable, __file__, "--one", str(rows), "--batch", str(given.batch)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
        run = found[-1]
        held, peak = run["weights_and_states_mb"], run["peak_mb"]
        print(f"{rows:10,}{run['step_ms']:12.1f}{held:24,}{peak:10,}", flush=True)
    if given.json:
        print(json.dumps({"benchmark": "training_growth", "runs": found}))


if __name__ == "__main__":
    main()
