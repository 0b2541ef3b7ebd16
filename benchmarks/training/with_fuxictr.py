"""FuxiCTR: Wide & Deep of its own layers, trained by its own `fit` with Adam.

The model is that of its repository (``model_zoo/WideDeep``), which its package leaves out. Numbers
are embedded as ids are, so the first layer is wider than elsewhere: 39 × 16.
"""

from __future__ import annotations

import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from fuxictr.features import FeatureMap
from fuxictr.pytorch.dataloaders import RankDataLoader
from fuxictr.pytorch.layers import FeatureEmbedding, LogisticRegression, MLP_Block
from fuxictr.pytorch.models import BaseModel
from fuxictr.pytorch.torch_utils import seed_everything
from measuring import Clock, Task, quiet, say


class WideDeep(BaseModel):
    """A linear model over all features and crosses, and layers over the features' embeddings."""

    def __init__(self, features: FeatureMap, crosses: list[str], task: Task, folder: str) -> None:
        super().__init__(
            features, "WideDeep", model_root=folder, metrics=["AUC"], verbose=0, gpu=-1
        )
        self.wide = LogisticRegression(features)
        self.embedding = FeatureEmbedding(
            features, task.embedding, not_required_feature_columns=crosses
        )
        self.deep = MLP_Block(
            (len(features.features) - len(crosses)) * task.embedding,
            hidden_units=list(task.hidden),
            output_dim=1,
        )
        self.compile("adam", "binary_crossentropy", 1e-3)
        self.reset_parameters()
        self.model_to_device()

    def forward(self, inputs: dict[str, Any]) -> dict[str, Any]:
        found = self.get_inputs(inputs)
        logit = self.wide(found) + self.deep(self.embedding(found).flatten(start_dim=1))
        return {"y_pred": self.output_activation(logit)}


def feature_map(log: dict[str, Any], folder: str) -> FeatureMap:
    """What it has to know of each column."""
    found = FeatureMap("log", folder)
    columns = {f"n{i}": {"type": "numeric"} for i in range(log["numeric"])}
    for kind, name in (("fields", "f"), ("crosses", "x")):
        for i, size in enumerate(log[kind]):
            columns[f"{name}{i}"] = {"type": "categorical", "vocab_size": size}
    found.features = OrderedDict((name, spec | {"source": ""}) for name, spec in columns.items())
    found.labels, found.num_fields = ["label"], len(columns)
    found.set_column_index()
    return found


def columns(split: dict[str, Any]) -> dict[str, Any]:
    """One array for each column."""
    parts = {"n": "numeric", "f": "ids", "x": "crosses"}
    found = {
        f"{name}{i}": values for name, part in parts.items() for i, values in
        enumerate(split[part].T)
    }  # fmt: skip
    return found | {"label": split["label"]}


def main() -> None:
    task = Task.given()
    log, clock = task.described(), Clock()
    seed_everything(task.seed)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        for name in ("train", "test"):
            np.savez(Path(folder) / f"{name}.npz", **columns(task.split(name)))
        features = feature_map(log, folder)
        crosses = [f"x{i}" for i in range(len(log["crosses"]))]
        (Path(folder) / features.dataset_id).mkdir()  # where it keeps its best weights
        model = WideDeep(features, crosses, task, folder)
        training, testing = RankDataLoader(
            features,
            train_data=f"{folder}/train.npz",
            valid_data=f"{folder}/test.npz",
            stage="train",
            batch_size=task.batch_size,
        )
        model.fit(training, epochs=1, validation_data=testing)
        probability = model.predict(testing)
    say(task, clock, task.split("test")["label"], probability)


if __name__ == "__main__":
    main()
