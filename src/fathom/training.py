"""The joint training loop: one logit, one loss, each part updated from the same gradient step.

The wide part by FTRL-Proximal with L1, the deep part by AdaGrad (Cheng et al. 2016, section 3.3).
Needs torch and numpy alone, so that it runs where nothing else is installed::

    python -m fathom.training --help
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fathom import checkpoint
from fathom.batch import Batch, BatchError, Layout, held_back
from fathom.checkpoint import CheckpointError
from fathom.config import OF_THE_MACHINE, ConfigError, Task, TrainingConfig
from fathom.feed import Examples, Feed, weights
from fathom.files import remove, replacing
from fathom.models import Model, build, score
from fathom.models.tables import Tables, named_weights
from fathom.parallel import Group, Shard
from fathom.step import Optimizers, learning_rate, losses
from fathom.warm import WarmStart

#: What is reported while training: a name, its value, and the step it belongs to.
Report = Callable[[str, float, int], None]

_PROGRESS_SECONDS = 5.0
#: Steps between two looks at the loss where looking makes the host wait for the device.
_CUDA_CHECK = 100
#: A batch's loss of so many times that of an untrained model means that training diverges.
_EXPLODED = 1000.0
log = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where and why."""


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training split, or its part, gave. Losses are means per example."""

    epoch: int
    train_loss: float
    validation_loss: float
    examples_per_second: float
    seconds: float
    wide_zero_share: float | None
    examples: int


@dataclass
class Trained:
    """A trained model with the weights of its best epoch, and how it got there.

    With a cool-down, that is the last epoch, and the best one of those before was gone on from.

    ``state`` is where the weights lie that another training can start from, with the optimizers'
    state (`fathom.warm`): those before the cool-down, if there was one. It is gone if no folder for
    checkpoints was given.
    """

    model: Model
    best_epoch: int
    history: list[Epoch] = field(default_factory=list)
    state: Path | None = None


def train(
    layout: Layout,
    training: Batch,
    validation: Batch,
    config: TrainingConfig,
    task: Task,
    folder: Path | None = None,
    report: Report | None = None,
    start: WarmStart | None = None,
) -> Trained:
    """Train a model; keep the weights of the epoch with the lowest validation loss.

    With ``config.cool_down``, that share of the examples is held back for a last pass, in which the
    learning rates fall.

    Args:
        training, validation: encoded examples with labels. Validation is only ever scored.
        folder: where checkpoints are kept. If one is there of the same settings and splits, it is
            gone on from, and training ends, on a CPU bit for bit, as if it had never stopped.
        report: is told the losses and the rate as they become known.
        start: what to start from instead of random weights.

    Raises:
        TrainingError: splits are empty, unlabelled or hold what cannot be learnt from (all faults
            together), the cool-down leaves no examples or has none, or a loss is not finite or
            explodes; the message names the batch.
        CheckpointError: a checkpoint cannot be written or read.
    """
    faults = [
        f"the {name} split {fault}"
        for name, split in (("training", training), ("validation", validation))
        for fault in split.faults(layout, task)
    ]
    if faults:
        raise TrainingError("; ".join(faults))
    _keep_freed_memory()
    job = Job(layout, training, validation, config, task)
    if folder is not None:
        return _train(job, folder, report, start)
    with tempfile.TemporaryDirectory(prefix="fathom-") as passing:
        return replace(_train(job, Path(passing), report, start), state=None)


def _train(job: Job, folder: Path, report: Report | None, start: WarmStart | None) -> Trained:
    """All at once, or up to the cool-down and from there."""
    config = job.config
    if not config.cool_down:
        return Run(job, folder, report, start).finish()
    late = _late(job.training, config)
    staying = replace(config, schedule="constant")
    before = replace(job, config=staying, chosen=~late)
    found = Run(before, folder / "before-cool-down", report, start).finish()
    state, history = found.state, found.history
    del found  # two models may not fit in memory
    log.info("cool-down: the last %s examples, with falling rates", f"{int(late.sum()):,}")
    falling = replace(config, epochs=1, warmup_steps=0)
    after = replace(job, config=falling, chosen=late, after=history)
    return replace(Run(after, folder / "cool-down", report, state).finish(), state=state)


def _late(training: Batch, config: TrainingConfig) -> NDArray[np.bool_]:
    """(N,) which examples are learnt in the cool-down."""
    draw = training.draw
    if draw is None:  # examples without keys: by their places
        draw = np.random.default_rng(config.seed).random(len(training), np.float32)
    late = held_back(draw, config.cool_down)
    if late.all() or not late.any():
        raise TrainingError(
            f"training.cool_down is {config.cool_down}, which is {int(late.sum())} of "
            f"{len(training)} examples; set it to 0 for so few"
        )
    return late


@dataclass(frozen=True)
class Job:
    """What is trained, on what.

    Args:
        chosen: (N,) which of the training examples are learnt; None for all.
        after: the epochs that it goes on from.
    """

    layout: Layout
    training: Batch
    validation: Batch
    config: TrainingConfig
    task: Task
    chosen: NDArray[np.bool_] | None = None
    after: Sequence[Epoch] = ()


class Run:
    """A training on its way: what `train` does, in steps that can be taken up again.

    Args:
        start: what it takes over, or, as it is, what another part of the same training kept.
    """

    def __init__(
        self,
        job: Job,
        folder: Path,
        report: Report | None = None,
        start: WarmStart | Path | None = None,
    ) -> None:
        config = job.config
        self._job, self._config, self._folder = job, config, folder
        self._report = report or (lambda name, value, step: None)
        self._device = torch.device(_device(config.device))
        if config.threads:
            torch.set_num_threads(config.threads)
        self._group = Group.join(self._device)
        positive_weight = config.positive_weight if job.task == "binary" else 1.0
        self._validation_weight = weights(job.validation, config.use_weights, positive_weight)
        self._feed = Feed(
            job.training,
            config.batch_size,
            config.shuffle_rows,
            config.seed,
            self._device,
            weighted=config.use_weights,
            positive_weight=positive_weight,
            rank=self._group.rank,
            world=self._group.world,
            chosen=job.chosen,
        )
        self._rows = self._feed.examples
        if config.shard_tables and self._group.world > 1:
            if isinstance(start, WarmStart):
                raise TrainingError(
                    "training.shard_tables is true, and a warm start needs whole tables; start "
                    "warm in one process, or set it to false"
                )
            # One after the other, for each builds whole tables first.
            self.model = self._group.in_turn(self._spread)
        else:
            self.model = build(job.layout, config).to(self._device)
        self._optimizers = Optimizers(self.model, config, self._group)
        if isinstance(start, WarmStart):
            start.apply(self.model, self._optimizers)
        elif start is not None:
            checkpoint.load(start, self._learnt())
        self._ceiling = _EXPLODED * _initial_loss(job)
        self._key = _key(job, start)
        self._first = len(job.after) + 1
        self._steps = sum(math.ceil(epoch.examples / config.batch_size) for epoch in job.after)
        self._epoch, self._batch = self._first, 0
        self._total = torch.zeros((), dtype=torch.float64, device=self._device)
        self._best_epoch, self._best_loss = 0, math.inf
        self._history: list[Epoch] = list(job.after)
        self._seconds = self._rate = 0.0
        self._resume()

    def finish(self) -> Trained:
        """Train until the last epoch, or until validation has not improved for long enough."""
        while self._epoch < self._first + self._config.epochs and not self._stale:
            self._pass()
            self._validate()
        if self._stale:
            log.info("stopped: no better validation loss since epoch %d", self._best_epoch)
        self._tidy()
        self._group.wait()
        checkpoint.load(self._best, self._weights(), "model.")
        self.model.to("cpu").eval()
        return Trained(self.model, self._best_epoch, self._history, self._best)

    @property
    def _step(self) -> int:
        """Steps taken, those of the parts before this one included."""
        return self._steps + (self._epoch - self._first) * len(self._feed) + self._batch

    def _spread(self) -> Model:
        """A model with this process's part of each table."""
        model = build(self._job.layout, self._config)
        for part in model.modules():
            if isinstance(part, Tables):
                part.spread(self._group)
        return model.to(self._device)

    @property
    def _stale(self) -> bool:
        behind = self._epoch - 1 - self._best_epoch
        return self._best_epoch > 0 and behind > self._config.patience

    @property
    def _best(self) -> Path:
        """What was learnt by the best epoch, on disk: a second copy may not fit in memory."""
        return self._folder / f"best-{self._best_epoch:04d}"

    def _pass(self) -> None:
        """The rest of an epoch."""
        config, batches = self._config, len(self._feed)
        self.model.train()
        started = reported = saved = time.perf_counter()
        first = self._batch
        for examples in self._feed.epoch(self._epoch, first):
            step = self._step - self._steps  # of this part alone
            size = min(config.batch_size, self._rows - self._batch * config.batch_size)
            if config.dropout:
                self._draw()
            every = self._losses(examples)
            loss = every[:, -1].detach().sum()
            self._watch(loss / max(len(examples), 1), examples)
            rate = learning_rate(config, step, batches * config.epochs)
            self._optimizers.step(every.sum() / size, size, rate)
            self._total += loss
            self._batch += 1
            now = time.perf_counter()
            if now - reported > _PROGRESS_SECONDS:
                reported = now
                self._say(first, now - started)
            between = config.checkpoint_seconds
            if between and self._group.decided(now - saved > between, self._batch, self._device):
                self._save()
                saved = time.perf_counter()
        done = (batches - first) * config.batch_size
        self._seconds = time.perf_counter() - started
        self._rate = min(done, self._rows) / max(self._seconds, 1e-9)

    def _draw(self) -> None:
        """Let dropout follow from the seed and the place in the run, as the order does."""
        place = (self._config.seed, self._epoch, self._batch, self._group.rank)
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1)[0]))

    def _losses(self, examples: Examples) -> Tensor:
        """(B, H) the examples' weighted losses, by each of the model's heads."""
        heads = self.model.heads(examples.inputs)
        each = losses(heads, examples.label[:, None].expand_as(heads), self._job.task)
        return each if examples.weight is None else each * examples.weight[:, None]

    def _validate(self) -> None:
        """Close an epoch: score validation, keep the weights if they are the best."""
        self._agree()
        sums = [self._total]
        self._group.sum_(sums)
        train_loss = float(sums[0]) / self._rows
        logits = torch.from_numpy(score(self.model, self._job.validation)).float()
        label = torch.as_tensor(self._job.validation.label)
        each = losses(logits, label, self._job.task)
        if self._validation_weight is not None:
            each = each * torch.from_numpy(self._validation_weight)
        loss = float(each.mean(dtype=torch.float64))
        if not math.isfinite(loss) or not math.isfinite(train_loss):
            raise TrainingError(
                f"the loss after epoch {self._epoch} is {train_loss} in training and {loss} in "
                "validation; lower the learning rates or look for extreme inputs"
            )
        zero = self._optimizers.wide_zero_share()
        self._history.append(
            Epoch(self._epoch, train_loss, loss, self._rate, self._seconds, zero, self._rows)
        )
        last = self._first - 1 + self._config.epochs
        log.info(
            "epoch %d/%d: training loss %.4f, validation loss %.4f, %s examples/s",
            self._epoch,
            last,
            train_loss,
            loss,
            f"{self._rate:,.0f}",
        )
        step = self._step
        for name, value in (("train_loss", train_loss), ("validation_loss", loss)):
            self._report(name, value, step)
        self._report("examples_per_second", self._rate, step)
        if loss < self._best_loss:
            self._best_loss, self._best_epoch = loss, self._epoch
            self._keep_best()
        self._epoch, self._batch = self._epoch + 1, 0
        self._total.zero_()
        self._save()
        self._tidy()
        self._group.wait()

    def _agree(self) -> None:
        """Let all processes have the means of what each has kept for itself, such as moments."""
        own = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        for buffer in own:
            buffer /= self._group.world
        self._group.sum_(own)

    def _tidy(self) -> None:
        """Remove what earlier epochs had learnt, now that no checkpoint names it any more."""
        if self._group.leads:
            for older in set(self._folder.glob("best-*")) - {self._best}:
                remove(older)

    def _keep_best(self) -> None:
        learnt = self._learnt()
        if not self._group.leads:
            checkpoint.contribute(learnt)
            return
        try:
            with replacing(self._best) as temporary:
                checkpoint.save(temporary, learnt, {})
        except OSError as error:
            raise CheckpointError(
                f"the weights of epoch {self._epoch} cannot be written to {self._best} "
                f"({error.strerror or error}); make room and run the same command again"
            ) from error

    def _watch(self, loss: Tensor, examples: Examples) -> None:
        """Stop at the first batch whose mean loss is not finite, or explodes.

        On CUDA the host looks now and then only, for looking makes it wait; the batch named is then
        the last of those since it looked.
        """
        if self._device.type == "cuda" and self._batch % _CUDA_CHECK:
            return
        value = float(loss.detach())
        if math.isfinite(value) and value <= self._ceiling:
            return
        what = "explodes" if math.isfinite(value) else "is not finite"
        numeric = examples.inputs.numeric
        largest = float(numeric.abs().max()) if numeric.numel() else 0.0
        raise TrainingError(
            f"the loss {what}: {value} in batch {self._batch + 1} of epoch {self._epoch}, whose "
            f"examples are rows {_shown(examples.rows)} of the training split and whose largest "
            f"numeric input is {largest:g}; lower the learning rates, set training.clip_norm, or "
            "look for extreme inputs"
        )

    def _say(self, first: int, seconds: float) -> None:
        """Progress of the epoch: how far, the loss, the rate, and how long it will take."""
        done, all_ = self._batch, len(self._feed)
        rate = (done - first) * self._config.batch_size / seconds
        loss = float(self._total) / (done * self._config.batch_size) * self._group.world
        log.info(
            "epoch %d: %3.0f %%, loss %.4f, %s examples/s, %.0f s left",
            self._epoch,
            100 * done / all_,
            loss,
            f"{rate:,.0f}",
            (all_ - done) * self._config.batch_size / rate,
        )
        step = self._step
        self._report("running_loss", loss, step)
        self._report("examples_per_second", rate, step)

    def _weights(self) -> dict[str, Tensor | Shard]:
        return {f"model.{name}": value for name, value in named_weights(self.model).items()}

    def _learnt(self) -> dict[str, Tensor | Shard]:
        """Weights and optimizer states: what another training can start from."""
        state = {f"optimizer.{n}": value for n, value in self._optimizers.tensors().items()}
        return self._weights() | state

    def _save(self) -> None:
        total = self._total.clone()
        self._group.sum_([total])
        tensors = {**self._learnt(), "total": total}
        if not self._group.leads:
            checkpoint.contribute(tensors)
            return
        state = {
            "key": self._key,
            "epoch": self._epoch,
            "batch": self._batch,
            "best_epoch": self._best_epoch,
            "best_loss": self._best_loss if self._best_epoch else None,
            "history": [asdict(epoch) for epoch in self._history],
        }
        checkpoint.write(self._folder, self._step, tensors, state)

    def _resume(self) -> None:
        """Go on from the newest checkpoint, if it is of this very training."""
        found = checkpoint.latest(self._folder)
        state = checkpoint.state_of(found) if found else {}
        if found is None or state.get("key") != self._key:
            if found is not None and self._group.leads:
                log.info("%s is of another training: starting anew", found)
                remove(found)
            return
        checkpoint.load(found, {**self._learnt(), "total": self._total})
        if not self._group.leads:
            self._total.zero_()  # the leading process has that of all
        self._epoch, self._batch = state["epoch"], state["batch"]
        self._best_epoch = state["best_epoch"]
        self._best_loss = state["best_loss"] if self._best_epoch else math.inf
        self._history = [Epoch(**epoch) for epoch in state["history"]]
        log.info("going on from %s: epoch %d, batch %d", found, self._epoch, self._batch + 1)


def _initial_loss(job: Job) -> float:
    """The mean loss of an untrained model's predictions, which training should only lower."""
    if job.task == "binary":
        return math.log(2) * max(job.config.positive_weight, 1.0)  # of 1/2, where training starts
    assert job.training.label is not None
    return float(np.mean(np.square(job.training.label, dtype=np.float64))) + 1.0


def _device(wanted: str) -> str:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise TrainingError(
            "training.device is 'cuda', but torch sees no CUDA device; set it to 'auto' or 'cpu'"
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def _keep_freed_memory() -> None:
    """Let the C library keep what is freed, for each step needs the same large blocks again.

    glibc gives blocks of more than 32 MB, and at first of 128 kB, back to the system at once, which
    has to clear every page of them anew in the next step: look-ups and sorts take twice the time.
    """
    if sys.platform != "linux":
        return
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return  # another C library
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, (1 << 31) - 1)


def _key(job: Job, start: WarmStart | Path | None) -> str:
    """What a training is told from others by: settings, start and, by samples, its splits."""
    settings = job.config.as_dict()
    for name in OF_THE_MACHINE:
        del settings[name]
    splits = (job.training, job.validation)
    samples = [split.fingerprint(max(len(split) // 1000, 1)) for split in splits]
    begun = start.fingerprint if isinstance(start, WarmStart) else None
    before = [(epoch.examples, epoch.validation_loss) for epoch in job.after]
    known = json.dumps([settings, asdict(job.layout), job.task, samples, begun, before])
    return hashlib.sha256(known.encode()).hexdigest()


def _shown(rows: NDArray[Any]) -> str:
    shown = ", ".join(f"{row:,}" for row in rows[:5])
    return f"{shown} and {len(rows) - 5:,} more" if len(rows) > 5 else shown


def main() -> None:
    """Train on encoded splits from the command line, alone or as one of ``torchrun``'s processes.

    Leaves a finished checkpoint, which the training pipeline goes on from.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fathom.training",
        description="Joint training on encoded splits; needs torch and numpy alone.",
        epilog="More processes: torchrun --nproc-per-node 2 -m fathom.training INPUT CHECKPOINTS",
    )
    parser.add_argument("input", type=Path, help="folder with job.json, train and validation")
    parser.add_argument("checkpoints", type=Path, help="folder to keep checkpoints in")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="instead of the job's")
    parser.add_argument("--threads", type=int, help="instead of the job's")
    parser.add_argument(
        "--shard-tables",
        action="store_const",
        const=True,
        help="let each process hold a part of every table, instead of the job's",
    )
    given = parser.parse_args()
    level = logging.INFO if Group.leading() else logging.WARNING  # one speaks for all
    logging.basicConfig(level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        job = _job(given.input)
        chosen = {n: v for n in OF_THE_MACHINE if (v := getattr(given, n, None)) is not None}
        config = replace(TrainingConfig(**job["training"]), **chosen)
        training, validation = (Batch.load(given.input / n) for n in ("train", "validation"))
        layout = Layout.of(job["layout"])
        trained = train(layout, training, validation, config, job["task"], given.checkpoints)
    except (TrainingError, CheckpointError, BatchError, ConfigError) as error:
        sys.exit(f"fathom.training: {error}")
    Group.leave()
    best = trained.history[trained.best_epoch - 1]
    log.info("best epoch %d: validation loss %.5f", best.epoch, best.validation_loss)


def _job(folder: Path) -> dict[str, Any]:
    """What the training pipeline's `describe_job` wrote."""
    path = folder / "job.json"
    try:
        job = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(job, dict) or not {"task", "layout", "training"} <= set(job):
            raise ValueError("it lacks task, layout or training")
    except (OSError, ValueError) as error:
        raise BatchError(
            f"{path} cannot be read ({error}); run kedro run --pipelines training first"
        ) from error
    return job


if __name__ == "__main__":
    main()
