"""How a model is built and trained, beside what the spec says. Needs nothing but Python."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any


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
        wide_learning_rate, wide_l1, wide_l2: FTRL-Proximal's alpha and penalties, in units of one
            example's gradient (McMahan et al. 2013, section 3.1).
        embedding_learning_rate, deep_learning_rate: AdaGrad's.
        final_rate: share of the embedding and deep learning rates that is left at the last step of
            the last epoch; they fall linearly. FTRL-Proximal sets its own rates.
        batch_size, epochs: epochs is the most; early stopping ends sooner.
        patience: epochs without a better validation loss before training stops.
        seed: of the initial weights, the order of examples and dropout.
        device: ``cpu``, ``cuda``, or ``auto`` for CUDA where it is.
        threads: CPU threads; 0 leaves torch's own choice.
    """

    model: str = "wide_deep"
    hidden: tuple[int, ...] = (256, 128, 64)
    dropout: float = 0.0
    wide_learning_rate: float = 0.05
    wide_l1: float = 1.0
    wide_l2: float = 0.0
    embedding_learning_rate: float = 0.05
    deep_learning_rate: float = 0.05
    final_rate: float = 0.05
    batch_size: int = 2048
    epochs: int = 5
    patience: int = 1
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
        whole = (("batch_size", 1), ("epochs", 1), ("patience", 0), ("seed", 0), ("threads", 0))
        positive = ("wide_learning_rate", "embedding_learning_rate", "deep_learning_rate")
        bounds = [
            (
                name,
                getattr(self, name),
                f"a whole number of {least} or more",
                type(getattr(self, name)) is int and getattr(self, name) >= least,
            )
            for name, least in whole
        ]
        bounds += [
            (name, getattr(self, name), "a finite number above 0", _above(getattr(self, name), 0))
            for name in positive
        ]
        bounds += [
            (
                name,
                getattr(self, name),
                "a finite number of 0 or more",
                _zero(getattr(self, name)) or _above(getattr(self, name), 0),
            )
            for name in ("wide_l1", "wide_l2")
        ]
        hidden = list(self.hidden) if isinstance(self.hidden, tuple) else self.hidden
        widths_hold = isinstance(hidden, list) and all(type(w) is int and w >= 1 for w in hidden)
        return [
            *bounds,
            ("hidden", hidden, "a list of layer widths of 1 or more", widths_hold),
            (
                "final_rate",
                self.final_rate,
                "in (0, 1]",
                _above(self.final_rate, 0) and self.final_rate <= 1,
            ),
            (
                "dropout",
                self.dropout,
                "in [0, 1)",
                _zero(self.dropout) or (_above(self.dropout, 0) and self.dropout < 1),
            ),
            (
                "device",
                self.device,
                "'auto', 'cpu' or 'cuda'",
                self.device in ("auto", "cpu", "cuda"),
            ),
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
    """

    train_from: str
    validation_from: str
    test_from: str

    def __post_init__(self) -> None:
        faults = []
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
        moment = datetime.fromisoformat(getattr(self, name))
        return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)


def _zero(value: Any) -> bool:
    return value == 0 and value is not False


def _above(value: Any, bound: float) -> bool:
    numeric = isinstance(value, int | float) and not isinstance(value, bool)
    return numeric and math.isfinite(value) and value > bound
