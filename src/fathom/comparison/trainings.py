"""The trainings of a comparison: each model tuned alike, then trained with several seeds.

A model is searched by `fathom.tuning`, on the validation window, with as many trials as every
other. Its best settings are trained once with each seed; each training scores the test window once,
when it is over, and nothing is chosen by that.

A finished training is a folder, written at once and named by all that it follows from: settings,
layout, splits and the version of Fathom. So a comparison that is killed goes on after its last
finished trial or training, a second run trains nothing, and what is asked for twice (a width of the
ladder that tuning chose, too) is trained once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fathom import files
from fathom.comparison.config import ComparisonConfig
from fathom.config import OF_THE_MACHINE, ConfigError, TrainingConfig
from fathom.evaluation import Floats
from fathom.tuning import TuningError, search

if TYPE_CHECKING:
    from fathom.batch import Batch
    from fathom.encoding import Encoder
    from fathom.models import Model

#: The two that the ladder compares: trained jointly, and apart.
JOINT, APART = "wide_deep", "ensemble"
_FIGURES, _SCORES, _STUDY, _LOCK = "figures.json", "scores.npy", "tuning.db", ".lock"

log = logging.getLogger(__name__)


class ComparisonError(ValueError):
    """A comparison cannot be made; the message says why and what to do."""


@dataclass(frozen=True)
class Splits:
    """Encoded examples with labels; the test split is scored only."""

    training: Batch
    validation: Batch
    test: Batch


@dataclass
class Trainings:
    """What was trained.

    Args:
        models: of each model ``trials`` (`fathom.tuning.TuningResult`), ``settings`` (the best),
            ``trainings`` (keys, by seed in the order of the configuration) and ``error`` (why there
            is none, else None).
        ladder: of each width of the hidden layers ``hidden``, and for each of the two models its
            ``trainings``.
        figures: of each training by its key ``model``, ``seed``, ``settings``, ``validation_loss``,
            ``best_epoch``, ``parameters``, ``layer_parameters`` (those of no table), ``nonzero``
            (parameters that are not 0), ``bytes`` (of the weights on disk), ``seconds``,
            ``scoring_us`` (per row), ``hardware`` and ``error`` (None if it did not fail).
        scores: of each training that did not fail, by its key, probabilities of the test rows (N,).
    """

    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    ladder: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    scores: dict[str, Floats] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """All but the scores, ready for JSON."""
        return {"models": self.models, "ladder": self.ladder, "trainings": self.figures}


def train_all(
    encoder: Encoder,
    splits: Splits,
    base: TrainingConfig,
    config: ComparisonConfig,
    folder: Path,
) -> Trainings:
    """Make a comparison's trainings, or find them where an earlier run left them.

    A model that cannot be built of this spec, or whose trainings all fail, is recorded with the
    reason, and the comparison goes on.

    Args:
        base: all settings that are not searched.
        folder: of the searches and finished trainings; a second process waits for the first.

    Raises:
        ComparisonError: names every model that there is not; or no model could be trained.
    """
    from fathom.models.family import MODELS

    if unknown := [name for name in config.models if name not in MODELS]:
        raise ComparisonError(
            f"comparison.models has {', '.join(unknown)}; there are {', '.join(MODELS)}: correct "
            "the name or set it to null"
        )
    if config.epochs is not None:
        base = dataclasses.replace(base, epochs=config.epochs)
    with files.locked(folder / _LOCK, wait=True):
        return _Run(encoder, splits, base, config, folder).finish()


class _Run:
    def __init__(
        self,
        encoder: Encoder,
        splits: Splits,
        base: TrainingConfig,
        config: ComparisonConfig,
        folder: Path,
    ) -> None:
        self._encoder, self._splits, self._base = encoder, splits, base
        self._config, self._folder = config, folder
        self._data = _hash(splits)
        self._found = Trainings()
        self._seconds: list[float] = []
        self._done = 0
        each = config.trials + len(config.seeds)
        steps = 2 * len(config.ladder) if {JOINT, APART} <= config.models.keys() else 0
        self._all = each * len(config.models) + steps * len(config.seeds)

    def finish(self) -> Trainings:
        for name in self._config.models:
            self._found.models[name] = self._compete(name)
        self._climb()
        if not self._found.scores:
            reasons = {name: model["error"] for name, model in self._found.models.items()}
            raise ComparisonError(f"no model could be trained: {reasons}; see comparison.models")
        return self._found

    def _compete(self, name: str) -> dict[str, Any]:
        """Tune a model and train its best settings with every seed."""
        config, encoder, splits = self._config, self._encoder, self._splits
        base = dataclasses.replace(self._base, model=name)
        log.info("%s: tuning, %d trials", name, config.trials)
        try:
            tuned = search(
                encoder.layout,
                splits.training,
                splits.validation,
                base,
                config.tuning(name),
                encoder.spec.task,
                self._folder / _STUDY,
            )
        except TuningError as error:
            log.warning("%s is left out: %s", name, error)
            self._count([], config.trials + len(config.seeds))
            return {"settings": None, "trials": [], "trainings": [], "error": str(error)}
        self._count([trial["seconds"] for trial in tuned.trials], config.trials)
        keys = self._with_seeds(dataclasses.replace(base, **tuned.best))
        errors = [self._found.figures[key]["error"] for key in keys]
        return {
            "settings": tuned.best,
            "trials": tuned.trials,
            "trainings": keys,
            "error": None if None in errors else errors[0],
        }

    def _climb(self) -> None:
        """Joint training and the ensemble at each width of the ladder."""
        best = {name: self._found.models.get(name) for name in (JOINT, APART)}
        if not self._config.ladder or not all(m and m["settings"] for m in best.values()):
            return
        settings = {
            name: dataclasses.replace(self._base, model=name, **model["settings"])
            for name, model in best.items()
            if model
        }
        widths = [tuple(w) for w in self._config.ladder] + [s.hidden for s in settings.values()]
        for hidden in dict.fromkeys(widths):
            step: dict[str, Any] = {"hidden": list(hidden)}
            for name, chosen in settings.items():
                step[name] = self._with_seeds(dataclasses.replace(chosen, hidden=hidden))
            self._found.ladder.append(step)

    def _with_seeds(self, settings: TrainingConfig) -> list[str]:
        """Keys of the trainings with each seed, made if they are not there."""
        keys = []
        for seed in self._config.seeds:
            seeded = dataclasses.replace(settings, seed=seed)
            key = self._key(seeded)
            if key not in self._found.figures:
                self._obtain(key, seeded)
            keys.append(key)
            self._count([self._found.figures[key]["seconds"]], 1)
        return keys

    def _obtain(self, key: str, settings: TrainingConfig) -> None:
        folder = self._folder / key
        if not folder.is_dir():
            log.info("%s: training with seed %d", settings.model, settings.seed)
            figures, scores = self._train(settings)
            with files.replacing(folder) as temporary:
                temporary.mkdir()
                if scores is not None:
                    np.save(temporary / _SCORES, scores)
                files.write_json(temporary / _FIGURES, figures)
        self._found.figures[key] = json.loads((folder / _FIGURES).read_text(encoding="utf-8"))
        if (folder / _SCORES).exists():
            self._found.scores[key] = np.load(folder / _SCORES)

    def _train(self, settings: TrainingConfig) -> tuple[dict[str, Any], Floats | None]:
        """One training and its scores; a failed one has figures that say why."""
        from fathom.hardware import hardware
        from fathom.ranker import Ranker
        from fathom.training import TrainingError, train

        splits, encoder = self._splits, self._encoder
        figures: dict[str, Any] = {
            "model": settings.model,
            "seed": settings.seed,
            "settings": _settings(settings),
            "hardware": hardware(),
        }
        started = time.perf_counter()
        try:
            trained = train(
                encoder.layout, splits.training, splits.validation, settings, encoder.spec.task
            )
        except (TrainingError, ConfigError) as error:
            seconds = round(time.perf_counter() - started, 3)
            return {**figures, "seconds": seconds, "error": str(error)}, None
        seconds = round(time.perf_counter() - started, 3)
        ranker = Ranker(encoder, trained.model, settings)
        started = time.perf_counter()
        scores = ranker.score_batch(splits.test)
        scoring = time.perf_counter() - started
        return {
            **figures,
            "validation_loss": trained.history[trained.best_epoch - 1].validation_loss,
            "best_epoch": trained.best_epoch,
            **_sizes(trained.model),
            "bytes": _bytes(ranker),
            "seconds": seconds,
            "scoring_us": round(1e6 * scoring / max(len(scores), 1), 3),
            "error": None,
        }, scores

    def _key(self, settings: TrainingConfig) -> str:
        """What a training is told from others by."""
        import fathom

        layout = dataclasses.asdict(self._encoder.layout)
        known = [fathom.__version__, _settings(settings), layout, self._encoder.spec.task]
        digest = hashlib.sha256(json.dumps([*known, self._data]).encode())
        return f"{settings.model}-{settings.seed}-{digest.hexdigest()[:16]}"

    def _count(self, seconds: list[float], trainings: int) -> None:
        """Say how far it is, and how long the rest takes at the mean of what is done."""
        self._seconds += seconds
        self._done += trainings
        left = max(self._all - self._done, 0)
        mean = sum(self._seconds) / max(len(self._seconds), 1)
        log.info(
            "comparison: %d of %d trainings, about %.0f min left",
            min(self._done, self._all),
            self._all,
            left * mean / 60,
        )


def _settings(config: TrainingConfig) -> dict[str, Any]:
    """What a training is, whatever machine it runs on."""
    return {name: v for name, v in config.as_dict().items() if name not in OF_THE_MACHINE}


def _sizes(model: Model) -> dict[str, int]:
    from fathom.models.tables import Tables

    rows = {id(w) for part in model.modules() if isinstance(part, Tables) for w in part.stored}
    weights = list(model.parameters())
    return {
        "parameters": sum(weight.numel() for weight in weights),
        "layer_parameters": sum(weight.numel() for weight in weights if id(weight) not in rows),
        "nonzero": sum(int((weight != 0).sum()) for weight in weights),
    }


def _bytes(ranker: Any) -> int:
    """Size of the weights as an artifact holds them."""
    with tempfile.TemporaryDirectory(prefix="fathom-") as passing:
        ranker.save(Path(passing))
        return (Path(passing) / "weights.safetensors").stat().st_size


def _hash(splits: Splits) -> str:
    """SHA-256 of all arrays of all splits."""
    digest = hashlib.sha256()
    for batch in (splits.training, splits.validation, splits.test):
        for name, array in _arrays(batch):
            digest.update(f"{name}{array.shape}{array.dtype}".encode())
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _arrays(part: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    values: Mapping[str, Any] = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
    for name, value in values.items():
        if isinstance(value, tuple):
            for number, bag in enumerate(value):
                yield from _arrays(bag, f"{prefix}{name}{number}.")
        elif value is not None:
            yield f"{prefix}{name}", value
