"""Drift: the newest window against the champion's reference, as a report and a decision.

The flow: `Reference.of` the champion's held-out rows → `measure` a window → `decide`, with what
was decided before → `report`. Nothing here trains or promotes.

* Columns are compared in bins that are fitted on the reference (`fathom.drift.forms`), and have
  drifted where they lie further off than windows without drift do (`fathom.drift.reference`).
* What decides is not their number but the loss that a retraining is expected to win back
  (`fathom.drift.recoverable`), in several windows in a row (`fathom.drift.decision`).
* Faults of the data alert, and keep a retraining from learning them (`fathom.drift.health`).
"""

from __future__ import annotations

from fathom.drift.champion import reference_of, sampled, scored, watched_columns
from fathom.drift.config import PROBABILITY, MonitoringConfig, MonitoringError, Window
from fathom.drift.decision import SEVERITIES, Decision, Severity, decide, last_sound
from fathom.drift.forms import Watched, watched_of
from fathom.drift.health import Delivery, Trace
from fathom.drift.measure import ColumnDrift, Measurement, Won, leaning, measure
from fathom.drift.page import Report, report
from fathom.drift.recoverable import Recoverable, recoverable
from fathom.drift.reference import Reference

__all__ = [
    "PROBABILITY",
    "SEVERITIES",
    "ColumnDrift",
    "Decision",
    "Delivery",
    "Measurement",
    "MonitoringConfig",
    "MonitoringError",
    "Recoverable",
    "Reference",
    "Report",
    "Severity",
    "Trace",
    "Watched",
    "Window",
    "Won",
    "decide",
    "last_sound",
    "leaning",
    "measure",
    "nothing_to_watch",
    "recoverable",
    "reference_of",
    "report",
    "sampled",
    "scored",
    "watched_columns",
    "watched_of",
]


def nothing_to_watch(window: Window) -> Decision:
    """What to say of a window when no model is in charge yet."""
    reason = (
        "data: there is no champion, so nothing to compare with; train one that passes the gate"
    )
    return Decision(True, (reason,), "critical", (), window)
