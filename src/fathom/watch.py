"""`kedro watch`: each new raw partition is taken through the loop, one at a time.

A step is a ``kedro run --pipelines …`` in a process of its own, whose runner skips what is
unchanged and goes on after a kill; so nothing of the loop is here. Here is the order, and a
journal: what arrived (`fathom.arrivals`), which step each partition has reached, what was decided
and what came of it. The journal is written before and after each step, so a watch that is killed
goes on with the step that it was at.

One watch works at a time. The lock is handed to the steps' processes: if a watch is killed but not
its step, the next watch finds it held until that step has ended.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, Field

from fathom import arrivals, decisions, files
from fathom.arrivals import Entry, Journal
from fathom.registry import Registry
from fathom.runner import Fingerprints

#: What each step runs. All but the first are done for one partition after another.
PIPELINES = {
    "ingest": "ingestion",
    "validate": "validation",
    "features": "features,feature_store",
    "monitor": "monitoring",  # score, report, decide
    "retrain": "retraining",  # train, gate, promote
}
STEPS = tuple(PIPELINES)

#: Exit status of ``kedro watch --once`` when something needs a person.
NEEDS_PERSON = 3
#: What stands for the source where a partition can be named.
SOURCE = "source"
_ERROR_CHARACTERS = 500

Say = Callable[[str], None]


class WatchConfig(BaseModel):
    """``params:watch``.

    Args:
        interval_seconds: from the end of one look to the next.
        journal: what is known from one time to the next.
        logs: folder for what each step's process last said.
        history: of all decisions, to which alerts about partitions are added.
        raw, validation, decision, release: where the catalog keeps what the steps leave.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    interval_seconds: float = Field(default=3600, gt=0)
    journal: Path = Field(strict=False)
    logs: Path = Field(strict=False)
    history: Path = Field(strict=False)
    raw: Path = Field(strict=False)
    validation: Path = Field(strict=False)
    decision: Path = Field(strict=False)
    release: Path = Field(strict=False)


class StepError(RuntimeError):
    """A step's process did not end well."""


class Watch:
    """What looks at the partitions and runs the steps.

    Args:
        registry: of the versions.
        options: for every ``kedro run``, as ``--env``. params: for its ``--params``.
        say: takes lines for the operator.
    """

    def __init__(
        self,
        config: WatchConfig,
        registry: Registry,
        options: Sequence[str],
        params: str | None,
        say: Say,
    ) -> None:
        self._config = config
        self._registry = registry
        self._options = list(options)
        self._params = params
        self._say = say
        self._journal = Journal()
        self._lock: IO[str] | None = None

    def run(self, interval: float | None, replay: str | None, dismiss: Sequence[str]) -> int:
        """Look once, or for ever, every ``interval`` seconds.

        Args:
            replay: the partition from which all are taken through the steps (again).
            dismiss: partitions, or `SOURCE`, whose trouble somebody has looked at.

        Returns:
            The exit status: `NEEDS_PERSON`, or 0, also if another watch is at work.
        """
        try:
            with files.locked(self._config.journal.with_suffix(".lock")) as self._lock:
                while True:
                    status = self.look(replay, dismiss)
                    if interval is None:
                        return status
                    replay, dismiss = None, ()
                    time.sleep(interval)
        except BlockingIOError:
            self._say("another watch is at work; this one leaves")
            return 0

    def look(self, replay: str | None = None, dismiss: Sequence[str] = ()) -> int:
        """Take every partition that there is something to do with through the steps.

        Raises:
            ArrivalError: the journal cannot be read; no such partition.
        """
        self._journal = Journal.load(self._config.journal)
        for name in dismiss:
            self._dismiss(name)
        try:
            self._step("ingest")
        except StepError as error:
            self._alert(SOURCE, [f"malformed: {error}"])
            source = self._journal.source.model_copy(update={"error": str(error)})
            self._save(self._journal.model_copy(update={"source": source}))
            return self._sum_up()
        self._take_stock(replay)
        pending = [n for n, e in self._journal.partitions.items() if e.state == "open"]
        for name in pending:
            if self._journal.partitions[name].state != "open":
                continue  # the champion that came meanwhile was measured on it
            began = time.perf_counter()
            self._announce(name)
            if not self._take_through(name, covering=replay is None):
                break
            self._say(f"  {'':9} {_duration(time.perf_counter() - began)} in all")
        return self._sum_up()

    def _take_stock(self, replay: str | None) -> None:
        """Write down what there is, before anything is done about it."""
        config, before = self._config, self._journal
        found = arrivals.look(config.raw / "exposures")
        champion = self._registry.champion()
        measured = None if champion is None else self._measured(champion)
        entries = arrivals.plan(found, before.partitions, measured, replay)
        listed = _read(self._listed)
        content = Fingerprints()(config.raw, "*.parquet")
        source = arrivals.news(listed, content, before.source)
        raised = {n: e for n, e in entries.items() if e.alerts and e != before.partitions.get(n)}
        for name, entry in raised.items():
            self._alert(name, entry.alerts, entry)
            self._block(name, *(f"ALERT: {alert}" for alert in entry.alerts))
        if source.alerts and source.alerts != before.source.alerts:
            self._alert(SOURCE, source.alerts)
            self._block(SOURCE, *(f"ALERT: {alert}" for alert in source.alerts))
        if not before.partitions and (seen := [n for n, e in entries.items() if e.state == "seen"]):
            by = f"champion {champion} was" if champion else "there is no champion that was"
            self._say(f"{len(seen)} partitions up to {seen[-1]} are taken as seen: {by} measured")
        self._save(Journal(source=source, partitions=entries))

    def _take_through(self, name: str, covering: bool) -> bool:
        """All steps of a partition, from where it is; whether those of the next one can follow."""
        entry = self._journal.partitions[name]
        window = f"window.since={_text(entry.since)},window.until={_text(entry.until)}"
        begin = STEPS.index(entry.step) if entry.step in STEPS else 1
        for step in STEPS[begin:]:
            entry = self._put(name, entry.but(step=step, error=None))
            if step == "retrain" and self._registry.champion() != entry.version:
                # It was killed after it had promoted what it trained, or somebody else promoted.
                entry = entry.but(released=self._registry.champion())
                self._say(f"  {step:9} champion {entry.released} has come meanwhile")
                break
            began = time.perf_counter()
            try:
                self._step(step, window if step in {"monitor", "retrain"} else "")
            except StepError as error:
                state = "failed" if step == "retrain" else "open"
                self._put(name, entry.but(state=state, error=str(error)))
                self._say(f"  {step:9} FAILED: {error}")
                return step == "retrain"
            took = round(time.perf_counter() - began, 1)
            entry = entry.but(seconds={**entry.seconds, step: took})
            entry, said, goes_on = self._after(step, name, entry)
            self._say(f"  {step:9} {said} ({_duration(took)})")
            if not goes_on:
                break
        if entry.alerts and entry.step != "monitor":  # which has written its own
            self._alert(name, entry.alerts, entry)
        self._put(name, entry.but(state="alert" if entry.alerts else "done"))
        if entry.released and covering:
            self._cover(entry.released)
        return True

    def _after(self, step: str, name: str, entry: Entry) -> tuple[Entry, str, bool]:
        """What a step left: the entry, a line about it, and whether to go on."""
        if step == "validate":
            faults = self._too_bad(name, entry)
            return entry.but(alerts=faults), "; ".join(faults) or "sound", not faults
        if step == "monitor":
            found = _read(self._config.decision)
            alerts, reasons = (tuple(found.get(key, ())) for key in ("alerts", "reasons"))
            retrain = bool(found["retrain"]) and not alerts
            decided = "retrain" if retrain else "ALERT, no retraining" if alerts else "keep"
            said = "; ".join([*alerts, *reasons]) or "nothing asks for a retraining"
            changes = {"version": found["version"], "retrain": retrain, "reasons": reasons}
            return entry.but(**changes, alerts=alerts), f"{decided}: {said}", retrain
        if step == "retrain":
            found = _read(self._config.release)
            verdict = tuple(found["reasons"])
            released = found["version"] if found["promoted"] else None
            said = f"{'promoted' if released else 'refused'} {found['version']}: "
            return entry.but(released=released, verdict=verdict), said + "; ".join(verdict), False
        return entry, "done", True

    def _too_bad(self, name: str, entry: Entry) -> tuple[str, ...]:
        """What validation let pass in all the log, but is too much for one partition."""
        tables = {table["table"]: table for table in _read(self._config.validation)}
        bound = tables["exposures"]["max_quarantined_share"]
        faults = []
        for rows in tables["exposures"]["partitions"]:
            if rows["partition"] == name and rows["quarantined"] > bound * rows["rows_in"]:
                share = rows["quarantined"] / rows["rows_in"]
                faults.append(f"malformed: {share:.1%} of its rows are in quarantine")
        if entry.repeated > bound * entry.rows:
            faults.append(f"duplicated: {entry.repeated / entry.rows:.1%} of its rows are repeated")
        return tuple(f"{fault}, more than {bound:.1%}" for fault in faults)

    def _cover(self, version: str) -> None:
        """What waits, and the new champion was measured on, is no longer compared with it."""
        measured = self._measured(version)
        for name, entry in self._journal.partitions.items():
            if entry.state == "open" and entry.until and entry.until <= measured:
                self._put(name, entry.but(state="seen", version=version))
                self._block(name, f"seen: champion {version} was measured on it")

    def _measured(self, version: str) -> datetime:
        """The newest exposure of a version's test window."""
        golden = _read(self._registry.path(version) / "golden.json")
        return datetime.fromisoformat(golden["timestamp"])

    @property
    def _listed(self) -> Path:
        """Where ingestion lists the source's files."""
        return self._config.raw / "source_files.json"

    def _step(self, step: str, window: str = "") -> None:
        """Run a step's pipelines in a process of its own, which holds the lock as well."""
        params = ",".join(part for part in (self._params, window) if part)
        command = [sys.executable, "-m", "kedro", "run", "--pipelines", PIPELINES[step]]
        command += [*self._options, *(["--params", params] if params else [])]
        said = self._config.logs / f"{step}.log"
        said.parent.mkdir(parents=True, exist_ok=True)
        with open(said, "wb") as log:
            code = _launch(command, log, self._lock)
        if code:
            lines = said.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            how = f"ended by signal {-code}" if code < 0 else (lines or ["no word"])[-1].strip()
            raise StepError(f"{how[:_ERROR_CHARACTERS]} (see {said})")

    def _alert(self, name: str, alerts: Sequence[str], entry: Entry | None = None) -> None:
        """Add alerts about a partition, or the source, to the history of decisions."""
        # Without what makes a decision of the monitor's: it leaves others' lines as they are.
        found: dict[str, Any] = {
            "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "partition": name,
            "version": self._registry.champion(),
            "alerts": list(alerts),
        }
        if entry is not None:
            window = {"start": _text(entry.since), "end": _text(entry.until)}
            found |= {"fingerprint": entry.fingerprint, "window": window}
            found |= {"version": entry.version or found["version"]}
        elif self._listed.exists():
            found |= {"fingerprint": files.sha256(self._listed)}
        decisions.append(self._config.history, found)

    def _dismiss(self, name: str) -> None:
        journal = self._journal
        if name == SOURCE:
            source = journal.source.model_copy(update={"alerts": (), "error": None})
            self._save(journal.model_copy(update={"source": source}))
        elif name in journal.partitions:
            self._put(name, journal.partitions[name].but(dismissed=True))
        else:
            known = ", ".join([SOURCE, *journal.partitions])
            raise arrivals.ArrivalError(f"no partition {name!r} to dismiss; there are {known}")

    def _sum_up(self) -> int:
        """Say what needs a person; the exit status."""
        source = self._journal.source
        trouble = {SOURCE: (*source.alerts, *([source.error] if source.error else []))}
        trouble |= {name: entry.trouble for name, entry in self._journal.partitions.items()}
        lines = [f"  {name}: {each}" for name, found in trouble.items() for each in found]
        if not lines:
            self._say(f"champion: {self._registry.champion() or 'none yet'}; nothing needs you")
            return 0
        self._say("\n".join(["This needs you:", *lines]))
        return NEEDS_PERSON

    def _announce(self, name: str) -> None:
        entry = self._journal.partitions[name]
        when = f"{entry.since:%Y-%m-%d %H:%M} to {entry.until:%Y-%m-%d %H:%M}"
        going_on = f", goes on with {entry.step}" if entry.step else ""
        self._block(name, f"{entry.rows:,} rows, {when}{going_on}")

    def _block(self, name: str, *lines: str) -> None:
        self._say("\n".join([name, *(f"  {line}" for line in lines)]))

    def _put(self, name: str, entry: Entry) -> Entry:
        self._save(self._journal.put(name, entry))
        return entry

    def _save(self, journal: Journal) -> None:
        journal.save(self._config.journal)
        self._journal = journal


def _launch(command: list[str], log: IO[bytes], lock: IO[str] | None) -> int:
    """Run a command to its end, with the lock in its hands, too; its exit status."""
    held = () if lock is None else (lock.fileno(),)
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=held, check=False
    ).returncode


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _text(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
