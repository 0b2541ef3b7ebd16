"""How a model is built and trained, beside what the spec says. Needs nothing but Python."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Literal

Task = Literal["binary", "regression"]

#: Settings of a training that say where and how it runs, not what it is.
OF_THE_MACHINE = ("device", "threads", "checkpoint_seconds", "shard_tables")


class ConfigError(ValueError):
    """A setting is out of bounds; the message lists every fault at once."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("; ".join(faults))


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of the joint training (``params:training``).

    Args:
        model: a name in `fathom.models.MODELS`.
        hidden: widths of the deep part's ReLU layers.
        dropout: share of each hidden layer's activations dropped in training.
        cross_layers, cross_rank, cross_experts: of ``dcn`` and ``dcn_v2``; with a rank of 0 the
            second has full matrices, else a mixture of so many experts of that rank.
        factors: width of the vectors that ``deepfm``, ``dot_product`` and ``neumf`` multiply.
        activation, attention_width: of ``din``: ``dice``, ``prelu`` or ``relu``, and the width of
            the layer that weighs a history.
        wide_learning_rate, wide_l1, wide_l2: FTRL-Proximal's alpha and penalties, in units of one
            example's gradient (McMahan et al. 2013, section 3.1).
        embedding_optimizer: ``adagrad`` (a sum of squares for each weight), ``rowwise_adagrad``
            (one for each row: less memory, and faster), or ``ftrl``, by which whole rows can become
            zero.
        embedding_l1, embedding_l2, embedding_group_l1: penalties of ``ftrl``; the last drops rows.
        embedding_learning_rate, deep_learning_rate: AdaGrad's (or FTRL's alpha).
        schedule, warmup_steps, final_rate: the AdaGrad learning rates rise from 0 over the first
            steps, then fall to ``final_rate`` of themselves at the last step of the last epoch:
            ``linear``, ``cosine``, or not at all (``constant``). FTRL-Proximal sets its own rates.
        cool_down: share of the examples that is learnt last, in one pass, while the rates fall;
            until then they stay, and ``epochs`` are passes over all others. A warm start goes back
            to before the cool-down (Hägele et al. 2024, "Scaling laws and compute-optimal training
            beyond fixed training durations"). Keys tell which examples (`Batch.draw`). 0: none.
        clip_norm: bound of the norm of the deep part's gradient, embeddings included; 0 for none.
        positive_weight: how much a positive example counts, against 1 for a negative one. Other
            than 1 it moves all probabilities.
        use_weights: whether examples count by their weight, the inverse of their inclusion
            probability. Probabilities are then those of the log before it was sampled.
        batch_size, epochs: epochs is the most; early stopping ends sooner.
        patience: epochs without a better validation loss before training stops.
        shuffle_rows: examples that are shuffled as one. A split with more of them is shuffled in
            windows of so many, of blocks in random order, and streamed from disk.
        precision: ``float32``, or ``bfloat16`` for the hidden layers' products. Weights, the wide
            part and scoring are float32 always.
        checkpoint_seconds: time between two checkpoints within an epoch; 0 for none but the one at
            the end of each.
        shard_tables: whether processes that train together each hold a part of every table's rows,
            rather than all; for tables that are too large for one device.
        seed: of the initial weights, the order of examples and dropout.
        device: ``cpu``, ``cuda``, or ``auto`` for CUDA where it is.
        threads: CPU threads; 0 leaves torch's own choice.
    """

    model: str = "wide_deep"
    hidden: tuple[int, ...] = (256, 128, 64)
    dropout: float = 0.0
    cross_layers: int = 2
    cross_rank: int = 0
    cross_experts: int = 4
    factors: int = 16
    activation: str = "dice"
    attention_width: int = 36
    wide_learning_rate: float = 0.05
    wide_l1: float = 1.0
    wide_l2: float = 0.0
    embedding_optimizer: str = "adagrad"
    embedding_learning_rate: float = 0.05
    embedding_l1: float = 0.0
    embedding_l2: float = 0.0
    embedding_group_l1: float = 0.0
    deep_learning_rate: float = 0.05
    schedule: str = "linear"
    warmup_steps: int = 0
    final_rate: float = 0.05
    cool_down: float = 0.0
    clip_norm: float = 0.0
    positive_weight: float = 1.0
    use_weights: bool = False
    batch_size: int = 2048
    epochs: int = 5
    patience: int = 1
    shuffle_rows: int = 4_194_304
    precision: str = "float32"
    checkpoint_seconds: float = 300.0
    shard_tables: bool = False
    seed: int = 0
    device: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.hidden, list):
            object.__setattr__(self, "hidden", tuple(self.hidden))
        faults = [
            f"training.{name} is {value!r}; it must be {bound}"
            for name, value, bound, holds in self._bounds()
            if not holds
        ]
        if faults:
            raise ConfigError(faults)

    def _bounds(self) -> list[tuple[str, Any, str, bool]]:
        least = {
            **dict.fromkeys(("batch_size", "epochs", "shuffle_rows"), 1),
            **dict.fromkeys(("cross_layers", "cross_experts", "factors", "attention_width"), 1),
            **dict.fromkeys(("cross_rank", "patience", "seed", "threads", "warmup_steps"), 0),
        }
        positive = (
            "wide_learning_rate",
            "embedding_learning_rate",
            "deep_learning_rate",
            "positive_weight",
        )
        not_negative = (
            "wide_l1",
            "wide_l2",
            "embedding_l1",
            "embedding_l2",
            "embedding_group_l1",
            "clip_norm",
            "checkpoint_seconds",
        )
        choices = {
            "embedding_optimizer": ("adagrad", "rowwise_adagrad", "ftrl"),
            "activation": ("dice", "prelu", "relu"),
            "schedule": ("linear", "cosine", "constant"),
            "precision": ("float32", "bfloat16"),
            "device": ("auto", "cpu", "cuda"),
            "use_weights": (True, False),
            "shard_tables": (True, False),
        }

        def value(name: str) -> Any:
            return getattr(self, name)

        bounds: list[tuple[str, Any, str, bool]] = []
        for name, bound in least.items():
            holds = type(value(name)) is int and value(name) >= bound
            bounds.append((name, value(name), f"a whole number of {bound} or more", holds))
        for name in positive:
            bounds.append((name, value(name), "a finite number above 0", _above(value(name), 0)))
        for name in not_negative:
            holds = _zero(value(name)) or _above(value(name), 0)
            bounds.append((name, value(name), "a finite number of 0 or more", holds))
        for name, allowed in choices.items():
            holds = any(value(name) == a and type(value(name)) is type(a) for a in allowed)
            words = [repr(choice) for choice in allowed]
            bounds.append((name, value(name), f"{', '.join(words[:-1])} or {words[-1]}", holds))
        hidden = list(self.hidden) if isinstance(self.hidden, tuple) else self.hidden
        widths_hold = isinstance(hidden, list) and all(type(w) is int and w >= 1 for w in hidden)
        rate = self.final_rate

        def share(name: str) -> tuple[str, Any, str, bool]:
            holds = _zero(value(name)) or (_above(value(name), 0) and value(name) < 1)
            return name, value(name), "in [0, 1)", holds

        return [
            *bounds,
            ("hidden", hidden, "a list of layer widths of 1 or more", widths_hold),
            ("final_rate", rate, "in (0, 1]", _above(rate, 0) and rate <= 1),
            share("dropout"),
            share("cool_down"),
        ]

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return dataclasses.asdict(self) | {"hidden": list(self.hidden)}


@dataclass(frozen=True)
class SplitConfig:
    """Where time divides the exposures (``params:split``), as ISO 8601 moments, UTC by default.

    Args:
        train_from: earlier exposures only feed the aggregates, whose histories are short there.
        validation_from: early stopping and every choice look at what lies from here ...
        test_from: ... to here; what lies after is only reported.
        without: spans that belong to no split, from and to, both included: of an outage, say.
    """

    train_from: str
    validation_from: str
    test_from: str
    without: tuple[tuple[str, str], ...] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        faults = []
        object.__setattr__(self, "without", tuple(tuple(span) for span in self.without))
        for span in self.without:
            try:
                start, end = (moment_of(text) for text in span)
            except (TypeError, ValueError):
                start, end = 1, 0  # type: ignore[assignment]
            if end < start:
                faults.append(
                    f"split.without has {list(span)!r}; it must be two ISO 8601 moments that do "
                    "not fall"
                )
        for name in ("train_from", "validation_from", "test_from"):
            try:
                self.moment(name)
            except (TypeError, ValueError):
                faults.append(
                    f"split.{name} is {getattr(self, name)!r}; it must be an ISO 8601 moment, "
                    "as 2017-10-30T04:00:00Z"
                )
        if not faults and not (
            self.moment("train_from") < self.moment("validation_from") < self.moment("test_from")
        ):
            faults.append(
                f"split must rise: train_from {self.train_from}, validation_from "
                f"{self.validation_from}, test_from {self.test_from}"
            )
        if faults:
            raise ConfigError(faults)

    def moment(self, name: str) -> datetime:
        """A boundary as an aware moment."""
        return moment_of(getattr(self, name))

    @property
    def spans(self) -> list[tuple[datetime, datetime]]:
        """``without`` as aware moments."""
        return [(moment_of(start), moment_of(end)) for start, end in self.without]


def moment_of(text: str) -> datetime:
    """An aware moment from ISO 8601, UTC by default."""
    moment = datetime.fromisoformat(text)
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _zero(value: Any) -> bool:
    return value == 0 and value is not False


def _above(value: Any, bound: float) -> bool:
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return numeric and math.isfinite(value) and value > bound
