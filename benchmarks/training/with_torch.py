"""Plain torch, as one would write it: one fused table, sparse gradients, AdaGrad for its rows."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from measuring import Clock, Task, say
from torch import Tensor, nn
from torch.nn import functional


class WideDeep(nn.Module):
    """All fields' embeddings in one table, and all wide slots' weights in another."""

    def __init__(self, fields: list[int], crosses: list[int], numeric: int, task: Task) -> None:
        super().__init__()
        slots = [*fields, *crosses]
        starts = torch.tensor([0, *np.cumsum(slots)[:-1].tolist()])
        self.register_buffer("starts", starts)
        self.fields, self.bfloat16 = len(fields), task.precision == "bfloat16"
        self.table = nn.Embedding(sum(fields), task.embedding, sparse=True)
        self.wide = nn.Embedding(sum(slots), 1, sparse=True)
        nn.init.normal_(self.table.weight, std=0.05)
        nn.init.zeros_(self.wide.weight)
        widths = [len(fields) * task.embedding + numeric, *task.hidden]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], 1))

    def forward(self, numeric: Tensor, slots: Tensor) -> Tensor:
        rows = slots + self.starts
        embedded = self.table(rows[:, : self.fields]).flatten(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16 and self.training):
            deep = self.layers(torch.cat([embedded, numeric], dim=1))
        logit: Tensor = deep.float().squeeze(1) + self.wide(rows).sum(dim=(1, 2))
        return logit


def main() -> None:
    task = Task.given()
    log, clock = task.described(), Clock()
    train, test = ({k: torch.from_numpy(v) for k, v in task.split(s).items()} for s in
                   ("train", "test"))  # fmt: skip
    for split in (train, test):
        split["slots"] = torch.cat([split.pop("ids"), split.pop("crosses")], dim=1)
    model = WideDeep(log["fields"], log["crosses"], log["numeric"], task)
    dense = torch.optim.Adam(model.layers.parameters(), 1e-3, fused=True)
    tables = [model.table.weight, model.wide.weight]
    sparse = torch.optim.Adagrad(tables, 0.05)
    order = torch.randperm(len(train["label"]))
    for index in order.split(task.batch_size):
        logit = model(train["numeric"][index], train["slots"][index])
        loss = functional.binary_cross_entropy_with_logits(logit, train["label"][index])
        dense.zero_grad()
        sparse.zero_grad()
        loss.backward()
        dense.step()
        sparse.step()
    model.eval()
    with torch.no_grad():
        rows = torch.arange(len(test["label"])).split(8192)
        logits = torch.cat([model(test["numeric"][i], test["slots"][i]) for i in rows])
    say(task, clock, test["label"].numpy(), logits.sigmoid().numpy())


if __name__ == "__main__":
    main()
