"""torch-rechub: its `WideDeep`, trained by its own `CTRTrainer` with Adam."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from measuring import Clock, Task, quiet, say
from torch_rechub.basic.features import DenseFeature, SparseFeature
from torch_rechub.models.ranking import WideDeep
from torch_rechub.trainers import CTRTrainer
from torch_rechub.utils.data import DataGenerator


def columns(split: dict[str, Any]) -> dict[str, Any]:
    """One array for each feature; a feature has one width, so fields come twice."""
    fields, crosses = split["ids"].T, split["crosses"].T
    deep = {f"f{i}": ids.copy() for i, ids in enumerate(fields)}
    wide = {f"w{i}": ids.copy() for i, ids in enumerate([*fields, *crosses])}
    return deep | wide | {"numeric": split["numeric"]}


def main() -> None:
    task = Task.given()
    log, clock = task.described(), Clock()
    train, test = task.split("train"), task.split("test")
    slots = [*log["fields"], *log["crosses"]]
    wide = [SparseFeature(f"w{i}", n, 1) for i, n in enumerate(slots)]
    deep = [SparseFeature(f"f{i}", n, task.embedding) for i, n in enumerate(log["fields"])]
    numeric = DenseFeature("numeric", log["numeric"])
    with quiet(), tempfile.TemporaryDirectory() as folder:
        model = WideDeep(wide, [*deep, numeric], {"dims": list(task.hidden), "dropout": 0.0})
        torch.manual_seed(task.seed)
        batches = DataGenerator(columns(train), train["label"])
        x_test = columns(test)
        loader, _, testing = batches.generate_dataloader(
            x_val=x_test,
            y_val=test["label"],
            x_test=x_test,
            y_test=test["label"],
            batch_size=task.batch_size,
        )
        # Without weight decay, which would pass over whole tables once more.
        trainer = CTRTrainer(
            model, optimizer_params={"lr": 1e-3}, n_epoch=1, model_path=folder, device="cpu"
        )
        trainer.fit(loader)
        probability = trainer.predict(model, testing)
    say(task, clock, test["label"], probability)


if __name__ == "__main__":
    main()
