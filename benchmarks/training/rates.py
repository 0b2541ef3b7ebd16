"""Which learning rates `with_fathom.py` uses: the best on rows held out of the training rows.

    python benchmarks/training/rates.py LOG        # LOG: what --cache DIR of training.py left

The last tenth of the training rows is held out; the test rows are not read. One epoch for each pair
of rates, seed 0.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from fathom.batch import Batch, Layout
from fathom.config import TrainingConfig
from fathom.training import train

WIDE, EMBEDDING = (0.05, 0.1, 0.2, 0.4), (0.01, 0.03, 0.1)
BASE = TrainingConfig(
    hidden=(400, 400, 400),
    wide_l1=0.0,
    embedding_optimizer="rowwise_adagrad",
    deep_learning_rate=0.01,
    schedule="constant",
    batch_size=4096,
    epochs=1,
    precision="bfloat16",
    device="cpu",
)


def main() -> None:
    folder = Path(sys.argv[1])
    log = json.loads((folder / "log.json").read_text(encoding="utf-8"))
    names = [f"f{i}" for i in range(len(log["fields"]))]
    tables = {name: (rows, 16) for name, rows in zip(names, log["fields"], strict=True)}
    slots = (*log["fields"], *log["crosses"])
    layout = Layout(log["numeric"], tables, tuple(names), (), slots, 0)
    starts = np.cumsum([0, *slots])[:-1].astype(np.int32)
    parts = {n: np.load(folder / f"train.{n}.npy") for n in ("numeric", "ids", "crosses", "label")}
    wide = np.concatenate([parts["ids"], parts["crosses"]], axis=1).astype(np.int32) + starts
    whole = Batch(
        parts["numeric"], parts["ids"].astype(np.int32), (), wide, (), parts["label"].astype("f4")
    )
    rows = np.arange(len(whole))
    fitted, held_out = whole.take(rows[: -len(rows) // 10]), whole.take(rows[-len(rows) // 10 :])
    for embedding in EMBEDDING:
        for rate in WIDE:
            config = replace(BASE, wide_learning_rate=rate, embedding_learning_rate=embedding)
            loss = train(layout, fitted, held_out, config, "binary").history[0].validation_loss
            print(f"wide {rate}, embeddings {embedding}: logloss {loss:.5f}", flush=True)


if __name__ == "__main__":
    main()
