"""The year again, week by week, as if live: what each policy of retraining would have cost and won.

Every week is scored by what a policy has deployed at its start; then the policy decides, with what
is labelled by then and nothing later. Trainings are those of `fathom.retraining`. Two policies that
need the same one, on the same data from the same start, share it: it is trained once, and charged
to each.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

import fathom
from fathom import drift
from fathom.config import SplitConfig
from fathom.evaluation import (
    LOSS,
    Interval,
    Predictions,
    metrics,
    paired_interval,
)
from fathom.gate import Candidate, GateConfig, gate
from fathom.hardware import hardware
from fathom.retraining import (
    Base,
    Recipe,
    Start,
    Window,
    base_from,
    catch_up,
    newest_split,
    nothing_newer,
    outgrown,
    retrain,
    trained_until,
    utc,
)
from fathom.spec import EVENT_TIMESTAMP, INCLUSION_PROBABILITY, FeatureSpec

if TYPE_CHECKING:
    import pyarrow as pa

WEEK = timedelta(days=7)
#: The reference is what a ranker did not learn from: the first weeks after its training data, as
#: far as they are known.
REFERENCE = 4 * WEEK
#: Whom the others are compared with.
YARDSTICK = "weekly"
#: What ``kedro watch`` does.
OURS = "fathom"

log = logging.getLogger(__name__)


class ReplayConfig(BaseModel):
    """``params:replay``.

    Args:
        first_weeks: weeks from ``split.train_from`` that the first champion, which all policies
            begin with, is trained and validated on; the replay begins after them.
        weeks: how many are replayed; None: all that there are.
        fixed_weeks: weeks between two retrainings of the policy ``fixed``.
        policies: which, of those in `POLICIES`; ``weekly`` is what the others are compared with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    first_weeks: int = Field(default=10, ge=2)
    weeks: int | None = Field(default=None, ge=2)
    fixed_weeks: int = Field(default=4, ge=1)
    policies: tuple[str, ...] = ("never", "weekly", "fixed", "fathom", "drift_only", "weekly_warm")


class ReplayError(ValueError):
    """The replay cannot begin; the message says why."""


@dataclass(frozen=True)
class Policy:
    """When to retrain, and how.

    Args:
        said: in words.
        every: weeks between two retrainings; 0 for none.
        start: of every training.
        watched: whether drift decides on retraining, and the gate on promotion; otherwise all that
            is trained is deployed.
        growing: whether data that have outgrown the deployed one ask for a retraining too.
    """

    said: str
    every: int
    start: Start = "fresh"
    watched: bool = False
    growing: bool = False


POLICIES = {
    "never": Policy("the first champion for ever", 0),
    "weekly": Policy("fresh every week, deployed unseen", 1),
    "fixed": Policy("fresh every few weeks, deployed unseen", 4),
    "fathom": Policy(
        "drift and growth decide, warm or else fresh, gate, catching up",
        1,
        "warm",
        watched=True,
        growing=True,
    ),
    "drift_only": Policy("the same, but drift alone decides", 1, "warm", watched=True),
    "weekly_warm": Policy("warm every week, deployed unseen", 1, "warm"),
}


@dataclass(frozen=True)
class Log:
    """The point-in-time training frame in memory, to be cut by time.

    Args:
        table: of every column of the spec, keys, label, and ``event_timestamp``, in time's order.
    """

    table: pa.Table
    spec: FeatureSpec

    @classmethod
    def of(cls, training_frame: Any, spec: FeatureSpec) -> Log:
        """From an Ibis table."""
        own = (*spec.keys, EVENT_TIMESTAMP, spec.label.name, INCLUSION_PROBABILITY)
        columns = dict.fromkeys([*own, *(column.name for column in spec.columns)])
        return cls(training_frame.select(*columns).to_pyarrow().sort_by(EVENT_TIMESTAMP), spec)

    @cached_property
    def moments(self) -> NDArray[np.datetime64]:
        """(N,) rising."""
        found: NDArray[np.datetime64] = self.table[EVENT_TIMESTAMP].to_numpy()
        return found.astype("datetime64[us]")

    def rows(self, start: datetime, end: datetime) -> pa.Table:
        """The exposures from ``start`` to before ``end``."""
        bounds = [np.datetime64(moment.replace(tzinfo=None), "us") for moment in (start, end)]
        first, last = np.searchsorted(self.moments, bounds)
        return self.table.slice(first, last - first)

    def window(self, start: datetime, end: datetime) -> Window:
        """The same as a frame."""
        from fathom.feature_store import frame_of

        return Window(frame_of(self.rows(start, end)))


@dataclass(frozen=True)
class Training:
    """A ranker that was trained, and what that took, whoever asked for it.

    Args:
        split: of the training; of one that has caught up, that of what was judged.
        judged: what passed the gate, if this one is that caught up.
    """

    base: Base
    split: SplitConfig
    started: tuple[Start, ...]
    examples: int
    seconds: float
    judged: Base | None = None


@dataclass
class Line:
    """A policy on its way through the weeks: who is deployed, and what it has done and spent."""

    policy: Policy
    training: Training
    decisions: list[drift.Decision] = field(default_factory=list)
    weeks: list[dict[str, Any]] = field(default_factory=list)
    scores: list[NDArray[np.float64]] = field(default_factory=list)
    examples: int = 0
    seconds: float = 0.0

    def charge(self, training: Training) -> None:
        """Put a training on the account."""
        self.examples += training.examples
        self.seconds += training.seconds


@dataclass
class Replay:
    """The year's replay.

    Args:
        log: the training frame.
        train_from: where training begins.
        folder: where checkpoints are kept; a replay that was killed trains nothing twice.
    """

    log: Log
    recipe: Recipe
    monitoring: drift.MonitoringConfig
    gate: GateConfig
    config: ReplayConfig
    train_from: datetime
    folder: Path
    _trainings: dict[tuple[Any, ...], Training] = field(default_factory=dict)
    _references: dict[tuple[str, datetime], drift.Reference] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """All weeks, then the sums.

        Returns:
            ``weeks``, ``totals`` by policy, and what they stand on; ready for JSON.

        Raises:
            ReplayError: there are too few weeks, or a policy is not known.
        """
        starts = self._starts()
        first = self._fresh(starts[0])
        lines = {name: Line(self._policy(name), first) for name in self.config.policies}
        shown = []
        for number, now in enumerate(starts):
            live = self.log.window(now, now + WEEK)
            scored: dict[str, NDArray[np.float64]] = {}
            for line in lines.values():
                done = self._step(line, number, now)
                base = line.training.base
                if base.version not in scored:
                    scored[base.version] = base.ranker.score(live.frame)
                line.scores.append(scored[base.version])
                line.weeks.append(done | self._measured(live, scored[base.version], base))
            shown.append(live)
            log.info("%s: %s", now.date(), _said(lines))
        return self._figures(starts, shown, lines)

    def _starts(self) -> list[datetime]:
        begin = self.train_from + self.config.first_weeks * WEEK
        newest = utc(self.log.moments[-1].item())
        count = (newest - begin) // WEEK + 1
        if self.config.weeks is not None:
            count = min(count, self.config.weeks)
        if count < 2:
            raise ReplayError(
                f"the log ends at {newest}, and the replay begins at {begin}; lower "
                "params:replay.first_weeks"
            )
        return [begin + week * WEEK for week in range(count)]

    def _policy(self, name: str) -> Policy:
        if name not in POLICIES:
            raise ReplayError(f"no policy {name!r}; there are {', '.join(POLICIES)}")
        policy = POLICIES[name]
        return replace(policy, every=self.config.fixed_weeks) if name == "fixed" else policy

    # -- a week of a policy ----------------------------------------------------------------------

    def _step(self, line: Line, number: int, now: datetime) -> dict[str, Any]:
        """What a policy does at the start of a week, with what is known by then."""
        policy = line.policy
        done: dict[str, Any] = {"retrained": False, "promoted": False, "reasons": [], "started": []}
        if not policy.every or number == 0 or number % policy.every:
            return done
        if policy.watched:
            decision = self._decision(line, now)
            line.decisions.append(decision)
            done["reasons"] = list(decision.reasons)
            if not decision.retrain:
                return done
            training = self._trained(self._split(now), line.training.base)
            promoted, reasons = self._judged(line.training.base, training)
            done["reasons"] += reasons
            if promoted and self.recipe.retraining.catch_up:
                line.charge(training)
                training = self._caught_up(training, now)
        elif policy.start == "warm":
            base = line.training.base
            training, promoted = self._trained(self._ungated(now), base, checked=False), True
        else:
            training, promoted = self._fresh(now), True
        line.charge(training)
        if promoted:
            line.training = training
        started = list(training.started)
        return done | {"retrained": True, "promoted": promoted, "started": started}

    def _split(self, now: datetime) -> SplitConfig:
        return newest_split(now, self.log.spec, self.recipe.retraining, self.train_from)

    def _outgrown(self, line: Line, split: SplitConfig) -> str | None:
        if not line.policy.growing:
            return None
        rows = self.log.rows(*(split.moment(name) for name in ("train_from", "validation_from")))
        provenance = line.training.base.ranker.provenance
        return outgrown(rows.num_rows, provenance, self.recipe.retraining)

    def _decision(self, line: Line, now: datetime) -> drift.Decision:
        """Whether last week asks for a retraining, by what is known of the deployed one."""
        training = line.training
        ranker, version = training.base.ranker, training.base.version
        since = training.split.moment("validation_from")
        until = min(since + REFERENCE, now - WEEK)
        if training.judged is not None:  # which alone has not learnt from what was there then
            until = min(until, trained_until(ranker.provenance))
        known = (version, until)
        if known not in self._references:
            rows = self._sampled(self.log.rows(since, until))
            if training.judged is not None:
                scores = drift.scored(training.judged.ranker, rows)[drift.PROBABILITY]
                rows = rows.append_column(drift.PROBABILITY, [scores.to_numpy()])
            self._references[known] = drift.reference_of(ranker, rows, self.monitoring)
        live = self.log.rows(now - WEEK, now)
        found = drift.measure(
            self._references[known],
            drift.scored(ranker, self._sampled(live)),
            drift.Window(now - WEEK, now),
            drift.last_sound(line.decisions, version),
            total=live.num_rows,
        )
        split = self._split(now)
        why = self._outgrown(line, split)
        waits = nothing_newer(ranker.provenance, split.moment("validation_from"))
        return drift.decide(found, line.decisions, self.monitoring, version, why, waits)

    def _sampled(self, rows: pa.Table) -> pa.Table:
        """As much of some exposures as monitoring looks at."""
        import ibis

        spec = self.log.spec
        watched = ibis.memtable(rows.select(drift.watched_columns(spec)))
        return drift.sampled(watched, spec, self.monitoring.sample_rows).to_pyarrow()

    def _judged(self, champion: Base, training: Training) -> tuple[bool, list[str]]:
        """The gate's verdict on the newest labelled window, but for baselines and slices."""
        moment = training.split.moment("test_from")
        window = self.log.window(moment, moment + timedelta(days=self.recipe.retraining.test_days))

        def side(base: Base) -> Candidate:
            return Candidate(base.version, base.ranker.score(window.frame))

        challenger = side(training.base)
        rows = window.predictions(self.log.spec, challenger.probability)
        bounds = self.gate.model_copy(update={"baselines": ()})
        verdict = gate(rows, challenger, side(champion), {}, {}, bounds, self.recipe.evaluation)
        return verdict.promoted, [text for text in verdict.reasons if text.startswith("fail")]

    # -- trainings -------------------------------------------------------------------------------

    def _ungated(self, now: datetime) -> SplitConfig:
        """All that is labelled, the newest days for validation; no window for a gate."""
        validation = now - timedelta(days=self.recipe.retraining.validation_days)
        return SplitConfig(*(m.isoformat() for m in (self.train_from, validation, now)))

    def _fresh(self, now: datetime) -> Training:
        return self._trained(self._ungated(now), None)

    def _trained(self, split: SplitConfig, base: Base | None, checked: bool = True) -> Training:
        """Train, or take what was trained; ``checked``: as to whether a warm start will do."""
        key = (split.validation_from, split.test_from, base.version if base else None)
        if key not in self._trainings:
            settings = self.recipe.retraining
            if not checked:
                settings = settings.model_copy(update={"fresh_margin": math.inf})
            started = time.perf_counter()
            train, validation, test = (
                split.moment(name) for name in ("train_from", "validation_from", "test_from")
            )
            done = retrain(
                self.log.window(train, validation),
                self.log.window(validation, test),
                replace(self.recipe, retraining=settings),
                base,
                "as the policy asks",
                self.folder / f"{validation:%Y%m%d}-{test:%Y%m%d}-{key[-1] or 'fresh'}",
            )
            self._trainings[key] = Training(
                base_from(done.chosen, self.recipe.training, split, done.base),
                split,
                tuple(tried.start for tried in done.attempts),
                sum(tried.examples for tried in done.attempts),
                time.perf_counter() - started,
            )
        return self._trainings[key]

    def _caught_up(self, training: Training, now: datetime) -> Training:
        """What is deployed for what passed the gate; only what that took more."""
        judged, split = training.base, training.split
        key = (now, judged.version)
        if key not in self._trainings:
            started = time.perf_counter()
            found = catch_up(
                self.log.window(split.moment("train_from"), now),
                self.log.window(split.moment("test_from"), now),
                self.recipe,
                judged,
                self.folder / f"{now:%Y%m%d}-{judged.version}-caught-up",
            )
            seconds = time.perf_counter() - started
            if found is None:
                self._trainings[key] = replace(training, examples=0, seconds=seconds)
            else:
                challenged, whole = judged.ranker.provenance["from"], (judged.version, now)
                self._trainings[key] = replace(
                    training,
                    base=base_from(found, self.recipe.training, split, challenged, whole),
                    examples=found.examples,
                    seconds=seconds,
                    judged=judged,
                )
        return self._trainings[key]

    # -- figures ---------------------------------------------------------------------------------

    def _measured(self, live: Window, scores: NDArray[np.float64], base: Base) -> dict[str, Any]:
        found = metrics(live.predictions(self.log.spec, scores))
        names = (LOSS[self.log.spec.task], "auc", "calibration")
        return {"version": base.version} | {name: found.get(name) for name in names}

    def _figures(
        self, starts: Sequence[datetime], shown: Sequence[Window], lines: Mapping[str, Line]
    ) -> dict[str, Any]:
        everything = self.log.window(starts[0], starts[-1] + WEEK)
        sides = {
            name: everything.predictions(self.log.spec, np.concatenate(line.scores))
            for name, line in lines.items()
        }
        return {
            "weeks": [
                {
                    "start": now.isoformat(),
                    "rows": len(live.moments),
                    "policies": {name: line.weeks[number] for name, line in lines.items()},
                }
                for number, (now, live) in enumerate(zip(starts, shown, strict=True))
            ],
            "totals": {
                name: self._total(line, sides[name], sides.get(YARDSTICK))
                for name, line in lines.items()
            },
            "policies": {name: line.policy.said for name, line in lines.items()},
            "loss": LOSS[self.log.spec.task],
            "settings": {
                "replay": self.config.model_dump(),
                "retraining": self.recipe.retraining.model_dump(),
                "training": self.recipe.training.as_dict(),
            },
            "spec_hash": self.log.spec.hash,
            "code_version": fathom.__version__,
            "hardware": hardware(),
        }

    def _total(
        self, line: Line, side: Predictions, yardstick: Predictions | None
    ) -> dict[str, Any]:
        found = metrics(side)
        against: Mapping[str, Interval | None] = {}
        if yardstick is not None and yardstick is not side:
            against = paired_interval(yardstick, side, self.recipe.evaluation)
        kept = (LOSS[self.log.spec.task], "auc", "calibration")
        return {
            **{name: found.get(name) for name in kept},
            f"against_{YARDSTICK}": {
                name: asdict(interval) for name in kept if (interval := against.get(name))
            },
            "retrained": sum(week["retrained"] for week in line.weeks),
            "promoted": sum(week["promoted"] for week in line.weeks),
            "examples": line.examples,
            "seconds": round(line.seconds, 1),
        }


def _said(lines: Mapping[str, Line]) -> str:
    """A week in one line."""
    words = []
    for name, line in lines.items():
        week = line.weeks[-1]
        done = "promoted" if week["promoted"] else "refused" if week["retrained"] else "kept"
        loss = next(week[name] for name in ("logloss", "rmse") if name in week)
        words.append(f"{name} {loss:.4f} {done}")
    return ", ".join(words)
