"""This project: `fathom.training.train` as a user calls it, on the log or on a run's own data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from measuring import Clock, Task, say

from fathom.batch import Batch, Layout
from fathom.config import TrainingConfig

Splits = tuple[Layout, Batch, Batch, Batch, TrainingConfig]


class Timers:
    """Seconds of the parts of a step, each without the parts inside it; nothing on CUDA."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside: list[float] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what runs inside as ``name``'s."""
        self._inside.append(0.0)
        started = time.perf_counter()
        try:
            yield
        finally:
            spent, inner = time.perf_counter() - started, self._inside.pop()
            self.seconds[name] = self.seconds.get(name, 0.0) + spent - inner
            if self._inside:
                self._inside[-1] += spent

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        """Count all calls of a function as ``name``'s."""
        original: Callable[..., Any] = getattr(owner, attribute)

        def timed(*given: Any, **named: Any) -> Any:
            with self.part(name):
                return original(*given, **named)

        setattr(owner, attribute, timed)

    def watch_iterator(self, owner: Any, attribute: str, name: str) -> None:
        """Count the time that a generator takes to give its next as ``name``'s."""
        original: Callable[..., Iterator[Any]] = getattr(owner, attribute)

        def timed(*given: Any, **named: Any) -> Iterator[Any]:
            items, end = original(*given, **named), object()
            while True:
                with self.part(name):
                    item = next(items, end)
                if item is end:
                    return
                yield item

        setattr(owner, attribute, timed)


def watch_all() -> Timers:
    """Timers in the parts of fathom's step; they fail if a part has another name now."""
    import torch

    from fathom import step
    from fathom.feed import Feed
    from fathom.models.deep import Deep, Embeddings
    from fathom.models.wide import Wide
    from fathom.optim import SparseRows
    from fathom.training import Run

    timers = Timers()
    timers.watch(Run, "_pass", "other")
    timers.watch_iterator(Feed, "epoch", "feed")
    timers.watch(Embeddings, "forward", "gather")
    timers.watch(Wide, "forward", "gather")
    timers.watch(Deep, "forward", "layers, forward")
    timers.watch(torch.Tensor, "backward", "backward")
    timers.watch(step, "sum_duplicates", "sum duplicates")
    timers.watch(SparseRows, "update", "row updates")
    timers.watch(torch.optim.Adagrad, "step", "dense update")
    return timers


def criteo_like(task: Task) -> Splits:
    """The log as this project's encoder would have left it."""
    log = task.described()
    sizes, crosses = log["fields"], log["crosses"]
    names = [f"f{i}" for i in range(len(sizes))]
    layout = Layout(
        numeric=log["numeric"],
        tables={n: (rows, task.embedding) for n, rows in zip(names, sizes, strict=True)},
        fields=tuple(names),
        bags=(),
        wide_slots=(*sizes, *crosses),
        wide_bags=0,
    )
    starts = np.cumsum([0, *layout.wide_slots])[:-1].astype(np.int32)

    def batch(name: str) -> Batch:
        split = task.split(name)
        wide = np.concatenate([split["ids"], split["crosses"]], axis=1) + starts
        return Batch(split["numeric"], split["ids"], (), wide, (), label=split["label"])

    test = batch("test")
    config = TrainingConfig(
        hidden=task.hidden,
        wide_learning_rate=0.2,
        wide_l1=0.0,
        embedding_optimizer="rowwise_adagrad",
        embedding_learning_rate=0.03,
        deep_learning_rate=0.01,
        schedule="constant",
        batch_size=task.batch_size,
        epochs=1,
        precision=task.precision,
        checkpoint_seconds=0,
        seed=task.seed,
        device="cpu",
        threads=task.threads,
    )
    # Nothing is chosen by the score of the one epoch, so the test rows may stand in its place.
    return layout, batch("train"), test, test, config


def of_a_run(task: Task) -> Splits:
    """The encoded splits of a run and the settings it trains with."""
    import yaml

    from fathom.encoding import Encoder

    inputs = Path(task.data) / "05_model_input"
    settings = yaml.safe_load(Path(task.training).read_text(encoding="utf-8"))["training"]
    settings |= {"precision": task.precision, "threads": task.threads, "checkpoint_seconds": 0}
    splits = [Batch.load(inputs / name) for name in ("train", "validation", "test")]
    train, validation, test = splits
    return Encoder.load(inputs / "encoder").layout, train, validation, test, TrainingConfig(
        **settings | {"device": "cpu"}
    )  # fmt: skip


def main() -> None:
    task = Task.given()
    from fathom.models import score
    from fathom.training import train

    splits = of_a_run(task) if task.data else criteo_like(task)
    layout, training, validation, test, config = splits
    task = replace(task, batch_size=config.batch_size)
    timers = watch_all() if task.profile else None
    clock = Clock()
    trained = train(layout, training, validation, config, "binary")
    logits = score(trained.model, test)
    assert test.label is not None
    more: dict[str, Any] = {"epochs": len(trained.history), "batch_size": config.batch_size}
    if timers is not None:
        total = sum(timers.seconds.values())
        more["profile"] = {
            name: round(seconds / total, 4)
            for name, seconds in sorted(timers.seconds.items(), key=lambda pair: -pair[1])
        }
        more["step_ms"] = round(1000 * total / len(clock.ends), 2)
    say(task, clock, test.label, 1 / (1 + np.exp(-logits.astype(np.float64))), **more)


if __name__ == "__main__":
    main()
