"""DeepCTR-Torch: its `WDL`, trained by its own `fit` with Adam."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np

# It asks the package index for its newest version when imported; a benchmark asks nobody.
sys.modules["requests"] = ModuleType("requests")

from deepctr_torch.inputs import DenseFeat, SparseFeat  # noqa: E402
from deepctr_torch.models import WDL  # noqa: E402
from measuring import Clock, Task, quiet, say  # noqa: E402


def columns(split: dict[str, Any]) -> dict[str, Any]:
    """One array for each column; ids as float32, which it stacks them into anyway."""
    found = {f"f{i}": ids.astype(np.float32) for i, ids in enumerate(split["ids"].T)}
    found |= {f"x{i}": ids.astype(np.float32) for i, ids in enumerate(split["crosses"].T)}
    return found | {"numeric": split["numeric"]}


def main() -> None:
    task = Task.given()
    log, clock = task.described(), Clock()
    train, test = task.split("train"), task.split("test")
    fields = [SparseFeat(f"f{i}", n, task.embedding) for i, n in enumerate(log["fields"])]
    crosses = [SparseFeat(f"x{i}", n, task.embedding) for i, n in enumerate(log["crosses"])]
    with quiet():
        model = WDL(
            [*fields, *crosses],
            [*fields, DenseFeat("numeric", log["numeric"])],
            dnn_hidden_units=task.hidden,
            # Regularisation would pass over whole tables in every step.
            l2_reg_linear=0,
            l2_reg_embedding=0,
            init_std=0.05,  # its 0.0001 learns next to nothing in one epoch
            seed=task.seed,
        )
        model.compile("adam", "binary_crossentropy")
        model.fit(columns(train), train["label"], batch_size=task.batch_size, epochs=1, verbose=0)
        probability = model.predict(columns(test), 8192)
    say(task, clock, test["label"], probability)


if __name__ == "__main__":
    main()
