"""Tuning: a declared search over training settings, judged on the validation window.

Settings are drawn by Optuna's tree-structured Parzen estimator (Bergstra et al. 2011). A trial is
one training; its loss is the validation loss of its best epoch. The test window has no way in.

A study is an SQLite file of finished trials. A trial enters it as one transaction when it is over,
so a killed search leaves no half of one: the trial that it was in is simply trained again. What a
trial draws depends on the seed, its number and the trials before it, never on the process. So a
search that was killed and resumed ends with the settings of an undisturbed one, as far as training
itself is deterministic, which it is on a CPU. (Not with a budget of seconds, which ends where the
machine lets it.)

The only module that knows Optuna.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from fathom.config import OF_THE_MACHINE, ConfigError, Task, TrainingConfig
from fathom.files import locked

if TYPE_CHECKING:
    import optuna

    from fathom.batch import Batch, Layout

#: Settings that no search may choose, and why.
_REFUSED = {
    "seed": "what a seed wins by is luck",
    "positive_weight": "it changes what the loss measures, so trials could not be compared",
    "use_weights": "it changes what the loss measures, so trials could not be compared",
    **dict.fromkeys(OF_THE_MACHINE, "it says where training runs, not what it is"),
}

log = logging.getLogger(__name__)


class TuningError(RuntimeError):
    """The search found nothing; the message says why."""


class _Range(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Between(_Range):
    """Any number from ``low`` to ``high``; with ``log``, each order of magnitude is as likely."""

    low: float
    high: float
    log: bool = False

    @property
    def bounds(self) -> list[Any]:
        """The values that stand for all: if these are valid settings, the others are."""
        return [self.low, self.high]

    @property
    def faults(self) -> list[str]:
        """What is wrong with the range in itself."""
        found = _rising(self.low, self.high)
        if self.log and self.low <= 0:
            found.append(f"low is {self.low}; with log it must be above 0")
        return found

    def holds(self, value: Any) -> bool:
        """Whether a value lies in the range."""
        return bool(self.low <= value <= self.high)

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """Draw a value."""
        return trial.suggest_float(name, self.low, self.high, log=self.log)


class Steps(_Range):
    """The whole numbers ``low``, ``low + step``, … up to ``high``."""

    low: int
    high: int
    step: int = Field(ge=1)
    log: ClassVar[bool] = False

    @property
    def bounds(self) -> list[Any]:
        """As `Between.bounds`."""
        return [self.low, self.high]

    @property
    def faults(self) -> list[str]:
        """As `Between.faults`."""
        found = _rising(self.low, self.high)
        if not found and (self.high - self.low) % self.step:
            found.append(f"steps of {self.step} from {self.low} do not meet {self.high}")
        return found

    def holds(self, value: Any) -> bool:
        """As `Between.holds`."""
        return bool(self.low <= value <= self.high and (value - self.low) % self.step == 0)

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """As `Between.suggest`."""
        return trial.suggest_int(name, self.low, self.high, step=self.step)


class Choices(_Range):
    """One of the values listed, which have no order."""

    choices: list[Any] = Field(min_length=2)
    log: ClassVar[bool] = False

    @property
    def bounds(self) -> list[Any]:
        """As `Between.bounds`."""
        return self.choices

    @property
    def faults(self) -> list[str]:
        """As `Between.faults`."""
        texts = [as_text(choice) for choice in self.choices]
        twice = sorted({text for text in texts if texts.count(text) > 1})
        return [f"the choice {text} is there twice" for text in twice]

    def holds(self, value: Any) -> bool:
        """As `Between.holds`."""
        return as_text(value) in map(as_text, self.choices)

    def suggest(self, trial: optuna.Trial, name: str) -> Any:
        """As `Between.suggest`."""
        return json.loads(trial.suggest_categorical(name, [as_text(c) for c in self.choices]))


Range = Between | Steps | Choices


class TuningConfig(BaseModel):
    """What is searched, and for how long (``params:tuning``).

    Args:
        trials: trainings in all, those of an interrupted search included.
        seconds: no trial begins once the trials together took so long; null for no bound.
        seed: of the draws. The trainings have the seed of ``training``, every one the same.
        space: setting of ``training`` → its range: ``{low, high}`` (any number), ``{low, high, log:
            true}`` (each order of magnitude as likely), ``{low, high, step}`` (whole numbers) or
            ``{choices: [...]}``; null takes out what another environment declares.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    trials: int = Field(default=20, ge=1)
    seconds: float | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0)
    space: dict[str, Range] = Field(min_length=1)

    @field_validator("space", mode="before")
    @classmethod
    def _sound(cls, space: Any) -> Any:
        """Read each range as what its shape says, and name the faults of all together."""
        if not isinstance(space, Mapping):
            return space
        ranges: dict[str, Range] = {}
        faults: list[str] = []
        declarations = {n: declared for n, declared in space.items() if declared is not None}
        for name, declared in declarations.items():
            try:
                ranges[name] = _range(declared)
            except ValidationError as error:
                faults += [
                    f"{'.'.join(map(str, (name, *e['loc'])))}: {e['msg']}" for e in error.errors()
                ]
        faults += [fault for name in declarations for fault in _faults(name, ranges.get(name))]
        if faults:
            raise ValueError("; ".join(faults))
        return ranges


@dataclass(frozen=True)
class TuningResult:
    """What a search found.

    Args:
        best: tuned setting → its value in the trial of the lowest loss.
        best_loss: the validation loss of that trial.
        trials: of each ``number`` (from 0), ``settings``, ``validation_loss``, ``best_epoch``,
            ``seconds``, ``state`` (``complete`` or ``failed``) and ``error``. A failed trial has
            neither loss nor epoch, another no error: they are None.
    """

    best: dict[str, Any]
    best_loss: float
    trials: list[dict[str, Any]]


def search(
    layout: Layout,
    training: Batch,
    validation: Batch,
    base: TrainingConfig,
    config: TuningConfig,
    task: Task,
    storage: Path,
) -> TuningResult:
    """Train once for each trial; settings that are not searched are those of ``base``.

    The first trial is ``base`` itself if it lies in the space, so that the best is never worse.
    A trial whose training fails (the loss explodes) is recorded as failed, and the search goes on.

    Args:
        training, validation: encoded examples with labels.
        storage: the SQLite file. It holds a study for each space, base, seed and pair of splits:
            one that is there is resumed, also to go on to more trials than it was to have.

    Raises:
        TuningError: every trial failed.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with locked(storage.with_name(storage.name + ".lock"), wait=True):
        stored = optuna.create_study(
            storage=f"sqlite:///{storage.resolve()}",
            study_name=_name(layout, training, validation, base, config, task),
            load_if_exists=True,
        )
        # Draws are made in a copy in memory; what is stored is only ever finished.
        study = optuna.create_study()
        study.add_trials(stored.trials[: config.trials])
        if study.trials:
            log.info("going on after %d of %d trials", len(study.trials), config.trials)
        while (number := len(study.trials)) < config.trials and not _spent(study, config):
            trial = _ask(study, number, base, config)
            settings = {name: range_.suggest(trial, name) for name, range_ in config.space.items()}
            trial.set_user_attr("settings", settings)
            loss = _run(trial, layout, training, validation, base, settings, task)
            failed = optuna.trial.TrialState.FAIL if loss is None else None
            stored.add_trial(study.tell(trial, loss, state=failed))
            outcome = "failed" if loss is None else f"validation loss {loss:.5f}"
            log.info("trial %d of %d: %s, %s", number + 1, config.trials, outcome, settings)
    return _result(study)


def as_text(value: Any) -> str:
    """A setting as one text, which it can be read back from: Optuna and axes know no lists."""
    return json.dumps(value)


def _ask(
    study: optuna.Study, number: int, base: TrainingConfig, config: TuningConfig
) -> optuna.Trial:
    """The trial of this number, with a generator of its own."""
    import numpy as np
    import optuna

    seed = int(np.random.SeedSequence([config.seed, number]).generate_state(1)[0])
    study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=False)
    values = base.as_dict()
    if number == 0 and all(range_.holds(values[n]) for n, range_ in config.space.items()):
        study.enqueue_trial(
            {
                name: as_text(values[name]) if isinstance(range_, Choices) else values[name]
                for name, range_ in config.space.items()
            }
        )
    return study.ask()


def _run(
    trial: optuna.Trial,
    layout: Layout,
    training: Batch,
    validation: Batch,
    base: TrainingConfig,
    settings: dict[str, Any],
    task: Task,
) -> float | None:
    """The loss of a trial; None if its training failed."""
    from fathom.training import TrainingError, train

    started = time.perf_counter()
    loss = None
    try:
        replaced = dataclasses.replace(base, **settings)
        trained = train(layout, training, validation, replaced, task)
        loss = trained.history[trained.best_epoch - 1].validation_loss
        trial.set_user_attr("best_epoch", trained.best_epoch)
    except (TrainingError, ConfigError) as error:
        trial.set_user_attr("error", str(error))
    trial.set_user_attr("seconds", round(time.perf_counter() - started, 3))
    return loss


def _spent(study: optuna.Study, config: TuningConfig) -> bool:
    seconds = sum(trial.user_attrs["seconds"] for trial in study.trials)
    return bool(seconds >= (config.seconds or math.inf))


def _result(study: optuna.Study) -> TuningResult:
    trials = []
    for trial in study.trials:
        known = trial.user_attrs
        trials.append(
            {
                "number": trial.number,
                "settings": known["settings"],
                "validation_loss": trial.value,
                "best_epoch": known.get("best_epoch"),
                "seconds": known["seconds"],
                "state": "failed" if "error" in known else "complete",
                "error": known.get("error"),
            }
        )
    complete = [trial for trial in trials if trial["state"] == "complete"]
    if not complete:
        raise TuningError(
            f"all {len(trials)} trials failed, the last one because {trials[-1]['error']}; "
            "narrow the ranges of tuning.space"
        )
    best = min(complete, key=lambda trial: trial["validation_loss"])
    return TuningResult(best["settings"], best["validation_loss"], trials)


def _name(
    layout: Layout,
    training: Batch,
    validation: Batch,
    base: TrainingConfig,
    config: TuningConfig,
    task: Task,
) -> str:
    """What a study is told from others by. How many trials it has is no part of it."""
    import fathom

    fixed = base.as_dict()
    for name in {*config.space, *OF_THE_MACHINE}:
        del fixed[name]
    space = {name: range_.model_dump() for name, range_ in config.space.items()}
    known = [fathom.__version__, space, config.seed, fixed, dataclasses.asdict(layout), task]
    known += [split.fingerprint() for split in (training, validation)]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]


def _range(declared: Any) -> Range:
    """A declared range as what its shape says it is."""
    if isinstance(declared, _Range):
        return declared  # type: ignore[return-value]
    keys = declared if isinstance(declared, Mapping) else ()
    kind = Choices if "choices" in keys else Steps if "step" in keys else Between
    return kind.model_validate(declared)


def _faults(name: str, range_: Range | None) -> list[str]:
    settings = [field.name for field in dataclasses.fields(TrainingConfig)]
    if name not in settings:
        return [f"{name} is no setting of training; there are {', '.join(settings)}"]
    if name in _REFUSED:
        return [f"{name} cannot be tuned: {_REFUSED[name]}"]
    faults = [] if range_ is None else [f"{name}: {fault}" for fault in range_.faults]
    for value in [] if range_ is None else range_.bounds:
        try:
            dataclasses.replace(TrainingConfig(), **{name: value})
        except ConfigError as error:
            faults.append(str(error))
    return faults


def _rising(low: float, high: float) -> list[str]:
    return [] if low < high else [f"low is {low} and high {high}; low must be below high"]
