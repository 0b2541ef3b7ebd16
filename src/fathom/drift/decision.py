"""The decision: whether to retrain, from what that is expected to win back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter

from fathom.drift.config import PROBABILITY, MonitoringConfig, Window
from fathom.drift.health import Trace
from fathom.drift.measure import Measurement

Severity = Literal["none", "minor", "major", "critical"]
#: In this order.
SEVERITIES: tuple[Severity, ...] = ("none", "minor", "major", "critical")
#: Columns that a reason names.
_NAMED = 5


@dataclass(frozen=True)
class Decision:
    """Whether to retrain, and what speaks for it or is to be known beside it.

    Attributes:
        reasons: each starts with what it is about: ``loss``, ``features``, ``growth``, ``data``,
            ``waiting``.
        severity: of the expected loss: below half of ``min_loss``, below it, below
            ``critical_loss``, or above.
        alerts: faults of the data. They ask for a person; while there are any, nothing is
            retrained, since that would teach the model the fault.
        version: the champion that was measured.
        evidence: ``expected_loss`` (a share of the loss), ``confirmed`` (whether labels say so),
            ``columns``, ``quality``, ``won``, ``rows``, ``trace``.
    """

    retrain: bool
    reasons: tuple[str, ...]
    severity: Severity
    alerts: tuple[str, ...]
    window: Window
    version: str | None = None
    evidence: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The contract of ``decision.json``, made of what JSON has."""
        plain: dict[str, Any] = TypeAdapter(Decision).dump_python(self, mode="json")
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Decision:
        """Read what `to_json` gave; what others added to it is left out."""
        known = {name: plain[name] for name in cls.__dataclass_fields__ if name in plain}
        return TypeAdapter(Decision).validate_python(known)

    @property
    def trace(self) -> Trace | None:
        """What the next window is compared with."""
        found = self.evidence.get("trace")
        return Trace(**found) if found else None


def last_sound(history: Sequence[Decision], version: str | None) -> Trace | None:
    """The trace of the newest window of this champion that had no faults."""
    for decision in reversed(history):
        if decision.version == version and not decision.alerts and decision.trace:
            return decision.trace
    return None


def decide(
    found: Measurement,
    history: Sequence[Decision],
    config: MonitoringConfig,
    version: str | None = None,
    outgrown: str | None = None,
    waits: str | None = None,
) -> Decision:
    """Weigh a window.

    Where labels have arrived, they decide: the loss that a retraining is expected to win back is
    what corrections of the model's errors did win on users that they were not learnt on, beyond
    what windows without drift show. Where they have not, drifted features are weighed by how much
    the model leans on them; that bounds what they can cost rather than telling it, so it has to be
    a multiple of what labels would have to say.

    Args:
        outgrown: why the data ask for a retraining, if there are so many more of them than the
            champion has learnt from. That waits for the cool-down alone.
        waits: why a retraining would be of no use yet, whatever asks for it.
        history: earlier decisions, oldest first. Those of this window are left out, so that a
            window that is weighed again gives the same.
    """
    history = [past for past in history if past.window.end < found.window.end]
    confirmed = found.won is not None
    expected = found.won.excess if found.won is not None else found.at_stake
    scale = 1.0 if confirmed else config.unconfirmed_loss / config.min_loss
    severity = _severity(expected / scale, config)
    reasons = [*_loss(found, expected, config), *_features(found, confirmed)]
    reasons += [f"data: {cause}" for cause in found.unlabelled]
    asks = SEVERITIES.index(severity) >= SEVERITIES.index("major")
    if outgrown is not None:
        reasons.append(outgrown)
    retrain = severity == "critical"
    if not retrain and (asks or outgrown is not None):
        few = _too_few_in_a_row(history, config, version) if asks else []
        cooling = _cooling_down(history, config)
        retrain = not cooling and (outgrown is not None or not few)
        reasons += few + cooling
    if found.faults and (asks or outgrown is not None):
        reasons.append("waiting: a fault of the data is no training set; mend it first")
    if waits is not None and (asks or outgrown is not None):
        reasons.append(waits)
    retrain = retrain and not found.faults and waits is None
    evidence = {
        "expected_loss": round(expected, 6),
        "confirmed": confirmed,
        "columns": {name: vars(column) for name, column in found.columns.items()},
        "quality": found.quality,
        "won": None if found.won is None else vars(found.won),
        "rows": found.rows,
        "trace": vars(found.trace),
    }
    return Decision(
        retrain, tuple(reasons), severity, found.faults, found.window, version, evidence
    )


def _severity(expected: float, config: MonitoringConfig) -> Severity:
    if expected >= config.critical_loss:
        return "critical"
    if expected >= config.min_loss:
        return "major"
    return "minor" if expected >= config.min_loss / 2 else "none"


def _loss(found: Measurement, expected: float, config: MonitoringConfig) -> list[str]:
    if found.won is None:
        return []
    won = found.won
    by = sorted(won.columns.items(), key=lambda pair: -pair[1])[:_NAMED]
    named = ", ".join(f"{name} {gain:.2%}" for name, gain in by if gain > 0)
    if won.share <= won.bound:
        return [
            f"loss: {won.share:.2%} could be won back, as in windows without drift (at most "
            f"{won.bound:.2%})"
        ]
    return [
        f"loss: {won.share:.2%} could be won back, {expected:.2%} more than is usual "
        f"({'≥' if expected >= config.min_loss else '<'} {config.min_loss:.2%}), by {named}"
    ]


def _features(found: Measurement, confirmed: bool) -> list[str]:
    drifted = {
        name: column
        for name, column in found.columns.items()
        if column.verdict == "drifted" and name != PROBABILITY
    }
    reasons = []
    if drifted:
        order = sorted(drifted, key=lambda name: (-drifted[name].at_stake, name))
        named = "; ".join(
            f"{name} {drifted[name].method} {drifted[name].score:.3f} ≥ "
            f"{drifted[name].threshold:.3g}"
            for name in order[:_NAMED]
        )
        more = f"; and {len(order) - _NAMED} more" if len(order) > _NAMED else ""
        reasons.append(
            f"features: {len(drifted)} of {len(found.columns) - 1} drifted; by how much the model "
            f"leans on them, {found.at_stake:.2%} of the loss is at stake"
            f"{'' if confirmed else ', unconfirmed by labels'}: {named}{more}"
        )
    output = found.columns.get(PROBABILITY)
    if output is not None and output.verdict == "drifted":
        reasons.append(
            f"features: predictions drifted: {output.method} {output.score:.3f} ≥ "
            f"{output.threshold:.3g}"
        )
    return reasons


def _too_few_in_a_row(
    history: Sequence[Decision], config: MonitoringConfig, version: str | None
) -> list[str]:
    """Why a window's word is not enough yet; empty if it is."""
    earlier = list(history)[-(config.persistence - 1) :] if config.persistence > 1 else []
    asking = [
        past
        for past in earlier
        if past.version == version and past.severity in ("major", "critical") and not past.alerts
    ]
    if len(asking) == config.persistence - 1:
        return []
    return [f"waiting: window {len(asking) + 1} of {config.persistence} in a row that asks for it"]


def _cooling_down(history: Sequence[Decision], config: MonitoringConfig) -> list[str]:
    """Why it is too soon after a retraining; empty if it is not."""
    since = next((n for n, past in enumerate(reversed(history)) if past.retrain), config.cool_down)
    if since >= config.cool_down:
        return []
    return [
        f"waiting: {since + 1} windows since the last retraining, and the cool-down is "
        f"{config.cool_down}"
    ]
