"""pytorch-widedeep: its `Wide` and `TabMlp`, trained by its own `Trainer` with two Adams."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch

# torchvision, which it needs for images alone, cannot be imported where its build is for another
# kind of machine than torch's, unless somebody has defined these operators.
LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for operator in ("nms", "qnms"):
    with contextlib.suppress(RuntimeError):
        LIBRARY.define(f"{operator}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")

from measuring import Clock, Task, quiet, say  # noqa: E402
from pytorch_widedeep import Trainer  # noqa: E402
from pytorch_widedeep.models import TabMlp, Wide, WideDeep  # noqa: E402


def inputs(split: dict[str, Any], starts: Any) -> dict[str, Any]:
    """Wide slots numbered through, from 1 on; and deep columns, whose ids also start at 1."""
    wide = np.concatenate([split["ids"], split["crosses"]], axis=1) + starts + 1
    return {
        "X_wide": wide,
        "X_tab": np.concatenate([split["ids"] + 1, split["numeric"]], 1).astype(np.float32),
    }


def main() -> None:
    task = Task.given()
    log, clock = task.described(), Clock()
    train, test = task.split("train"), task.split("test")
    slots = [*log["fields"], *log["crosses"]]
    starts = np.cumsum([0, *slots])[:-1].astype(np.int64)
    fields = [f"f{i}" for i in range(len(log["fields"]))]
    numbers = [f"n{i}" for i in range(log["numeric"])]
    with quiet():
        wide = Wide(input_dim=sum(slots))
        torch.nn.init.zeros_(wide.wide_linear.weight)  # its ±1 at random would not be unlearnt
        deep = TabMlp(
            column_idx={name: i for i, name in enumerate([*fields, *numbers])},
            cat_embed_input=[
                (name, n, task.embedding) for name, n in zip(fields, log["fields"], strict=True)
            ],
            continuous_cols=numbers,
            mlp_hidden_dims=list(task.hidden),
            mlp_dropout=0.0,
        )
        model = WideDeep(wide=wide, deeptabular=deep)
        trainer = Trainer(
            model,
            objective="binary",
            optimizers={
                "wide": torch.optim.Adam(model.wide.parameters(), 1e-2),
                "deeptabular": torch.optim.Adam(model.deeptabular.parameters(), 1e-3),
            },
            verbose=0,
            seed=task.seed,
            num_workers=0,
            device="cpu",
        )
        trainer.fit(
            **inputs(train, starts),
            target=train["label"].astype(np.int64),
            n_epochs=1,
            batch_size=task.batch_size,
        )
        probability = trainer.predict_proba(**inputs(test, starts), batch_size=8192)[:, 1]
    say(task, clock, test["label"], probability)


if __name__ == "__main__":
    main()
