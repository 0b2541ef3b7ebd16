"""torchrec: its `EmbeddingBagCollection` with Adam, or its fused tables with row-wise AdaGrad.

It has neither a Wide & Deep model nor a trainer, so the layers and the loop around its tables are
plain torch. Fused tables (`FusedEmbeddingBagCollection`, fbgemm) have widths that are multiples of
four, so the wide part is plain torch's either way.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from measuring import Clock, Task, quiet, say
from torch import Tensor, nn
from torch.nn import functional
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor
from torchrec.modules.fused_embedding_modules import FusedEmbeddingBagCollection
from torchrec.optim import RowWiseAdagrad


class WideDeep(nn.Module):
    """torchrec's tables, ReLU layers, and a fused wide table."""

    def __init__(self, log: dict[str, Any], task: Task) -> None:
        super().__init__()
        self.keys = [f"f{i}" for i in range(len(log["fields"]))]
        tables = [
            EmbeddingBagConfig(
                name=f"t{key}",
                embedding_dim=task.embedding,
                num_embeddings=rows,
                feature_names=[key],
            )
            for key, rows in zip(self.keys, log["fields"], strict=True)
        ]
        self.tables: nn.Module
        if task.variant == "fused":
            self.tables = FusedEmbeddingBagCollection(
                tables, RowWiseAdagrad, {"lr": 0.05}, device=torch.device("cpu")
            )
        else:
            self.tables = EmbeddingBagCollection(tables)
            for table in self.tables.parameters():
                nn.init.normal_(table, std=0.05)
        slots = [*log["fields"], *log["crosses"]]
        self.register_buffer("starts", torch.tensor([0, *np.cumsum(slots)[:-1].tolist()]))
        self.wide = nn.Embedding(sum(slots), 1, sparse=True)
        nn.init.zeros_(self.wide.weight)
        widths = [len(self.keys) * task.embedding + log["numeric"], *task.hidden]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1))
        self.bfloat16 = task.precision == "bfloat16"

    def forward(self, numeric: Tensor, slots: Tensor) -> Tensor:
        ids = slots[:, : len(self.keys)].t().reshape(-1)
        jagged = KeyedJaggedTensor(self.keys, ids, lengths=torch.ones_like(ids))
        embedded = self.tables(jagged).values()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16 and self.training):
            deep = self.layers(torch.cat([embedded, numeric], dim=1))
        logit: Tensor = deep.float().squeeze(1) + self.wide(slots + self.starts).sum(dim=(1, 2))
        return logit


def main() -> None:
    task = Task.given()
    log, clock = task.described(), Clock()
    train, test = ({k: torch.from_numpy(v) for k, v in task.split(s).items()} for s in
                   ("train", "test"))  # fmt: skip
    for split in (train, test):
        split["slots"] = torch.cat([split.pop("ids"), split.pop("crosses")], dim=1).long()
    with quiet():
        model = WideDeep(log, task)
    trained = list(model.layers.parameters())
    if task.variant != "fused":
        trained += model.tables.parameters()
    dense = torch.optim.Adam(trained, 1e-3, fused=True)
    wide = torch.optim.Adagrad([model.wide.weight], 0.05)
    for index in torch.randperm(len(train["label"])).split(task.batch_size):
        logit = model(train["numeric"][index], train["slots"][index])
        loss = functional.binary_cross_entropy_with_logits(logit, train["label"][index])
        dense.zero_grad()
        wide.zero_grad()
        loss.backward()  # updates the fused tables too
        dense.step()
        wide.step()
    model.eval()
    with torch.no_grad():
        rows = torch.arange(len(test["label"])).split(8192)
        logits = torch.cat([model(test["numeric"][i], test["slots"][i]) for i in rows])
    say(task, clock, test["label"].numpy(), logits.sigmoid().numpy())


if __name__ == "__main__":
    main()
