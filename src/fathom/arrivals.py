"""What arrived: raw partitions against the journal of those that were handled before.

A partition is known by its content, the distinct rows in it, so that it is neither news when it is
only written anew nor when its rows are delivered twice. `plan` says of each what is to be done:

* new, or mended after an alert: it is taken through the steps;
* changed, and the newest there is: it still grows, and is taken through the steps again;
* known: nothing;
* empty, undated, unreadable, a copy of another, rows that came again, or older than the newest one
  handled before: an alert for a person, and no reason to train on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from fathom import files
from fathom.spec import EVENT_TIMESTAMP

#: ``open``: at a step; ``seen``: the champion was trained or measured on it; ``failed``: its
#: retraining was; ``alert``: it needs a person.
State = Literal["open", "seen", "done", "failed", "alert"]

_SUMMARY = f"""
    SELECT coalesce(sum(n), 0)::BIGINT, count(*), min(moment), max(moment), bit_xor(digest)::VARCHAR
    FROM (
        SELECT md5_number(row::VARCHAR) AS digest, count(*) AS n,
            any_value(try_cast(row.{EVENT_TIMESTAMP} AS TIMESTAMP)) AS moment
        FROM read_parquet(?) AS row GROUP BY digest
    )
"""


class ArrivalError(ValueError):
    """What was asked about partitions does not fit those that there are."""


@dataclass(frozen=True)
class Partition:
    """A raw partition.

    Args:
        name: the file's, without its suffix.
        fingerprint: of its distinct rows, in any order.
        rows: in it. repeated: those that are alike another one.
        since, until: its first and last moment; None if no row has a readable one.
        fault: why it cannot be read.
    """

    name: str
    fingerprint: str
    rows: int
    repeated: int
    since: datetime | None
    until: datetime | None
    fault: str | None = None


class Entry(BaseModel):
    """What the journal says of a partition.

    Args:
        fingerprint, rows, repeated, since, until: as of `Partition`.
        step: the last one that was begun.
        version: the champion that it was compared with.
        retrain, reasons: what was decided, and why.
        released: the version that its retraining made champion. verdict: why, or why not.
        alerts: what a person has to look at. error: what a step failed with.
        dismissed: somebody has looked at it.
        seconds: that each step took.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    state: State
    fingerprint: str
    rows: int
    repeated: int = 0
    since: datetime | None = None
    until: datetime | None = None
    step: str | None = None
    version: str | None = None
    retrain: bool | None = None
    reasons: tuple[str, ...] = ()
    released: str | None = None
    verdict: tuple[str, ...] = ()
    alerts: tuple[str, ...] = ()
    error: str | None = None
    dismissed: bool = False
    seconds: dict[str, float] = {}

    def but(self, **changes: object) -> Self:
        """A copy with some things changed."""
        return self.model_copy(update=changes)

    @property
    def trouble(self) -> tuple[str, ...]:
        """What needs a person, until somebody has dismissed it."""
        return () if self.dismissed else (*self.alerts, *([self.error] if self.error else []))


class Delivery(BaseModel):
    """What the journal says of the source's files: their hashes, and that of what they gave."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: dict[str, str] = {}
    content: str = ""
    alerts: tuple[str, ...] = ()
    error: str | None = None


class Journal(BaseModel):
    """All that `kedro watch` knows from one time to the next."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Delivery = Delivery()
    partitions: dict[str, Entry] = {}

    @classmethod
    def load(cls, path: Path) -> Self:
        """An empty one if there is no file.

        Raises:
            ArrivalError: the file is not a journal.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return cls()
        except ValueError as error:
            raise ArrivalError(
                f"{path} cannot be read ({error}); restore it from a backup, or remove it: what "
                "the champion was measured on then counts as seen"
            ) from error

    def save(self, path: Path) -> None:
        files.write_json(path, self.model_dump(mode="json"))

    def put(self, name: str, entry: Entry) -> Self:
        return self.model_copy(update={"partitions": {**self.partitions, name: entry}})


def look(folder: Path) -> list[Partition]:
    """Every partition of a folder, the oldest first, those without a moment last."""
    found = [_look(path) for path in folder.glob("*.parquet")]
    return sorted(found, key=lambda p: (p.since is None, p.since, p.name))


def plan(
    found: Sequence[Partition],
    known: dict[str, Entry],
    measured: datetime | None,
    replay: str | None = None,
) -> dict[str, Entry]:
    """What to do with each partition, in the order of `look`.

    Args:
        known: the journal's entries; with none, this is the first watch.
        measured: up to when the champion was trained and measured: on the first watch, what ends
            by then is taken as seen. Without a champion, all but the newest partition is.
        replay: take this partition and all later ones through the steps, whatever is known.

    Raises:
        ArrivalError: there is no partition to replay from.
    """
    dated = [p for p in found if p.since is not None]
    if not known and measured is None and len(dated) > 1:
        measured = dated[-2].until
    names = [p.name for p in found]
    if replay is not None and replay not in names:
        raise ArrivalError(f"no partition {replay!r}; there are {', '.join(names) or 'none'}")
    again = set(names[names.index(replay) :]) if replay is not None else set()
    handled = [e.since for n, e in known.items() if e.since and e.state != "alert"]
    newest = max(handled, default=None)
    originals = {p.fingerprint: p.name for p in reversed(found)}
    originals |= {p.fingerprint: p.name for p in reversed(found) if p.name in known}
    # What is gone needs nobody; what was handled stays known, or it could come back as news.
    entries = {n: e for n, e in known.items() if n not in names and not e.trouble}
    for p in found:
        before = known.get(p.name)
        original = originals[p.fingerprint]
        if p.name not in again and before is not None and before.fingerprint == p.fingerprint:
            entries[p.name] = _met_again(p, before)
        elif fault := _fault(p, None if original == p.name else original):
            entries[p.name] = _entry(p, "alert", fault)
        elif p.name in again:
            entries[p.name] = _entry(p, "open")
        elif before is None and (replay is not None or _covered(p, known, measured)):
            entries[p.name] = _entry(p, "seen")
        elif newest and p.since and p.since < newest and not (before and before.alerts):
            what = "its rows changed" if before else "it arrived"
            entries[p.name] = _entry(
                p, "alert", f"late: {what} after the one that begins {newest:%Y-%m-%d} was handled"
            )
        else:
            entries[p.name] = _entry(p, "open")
    return entries


def news(files_now: dict[str, str], content: str, before: Delivery) -> Delivery:
    """The source as it is now; with alerts if it has files that say nothing new.

    Args:
        files_now: hashes of its files, by path. content: hash of the raw tables made of them.
    """
    if files_now == before.files:
        return before.model_copy(update={"content": content, "error": None})
    first = {digest: path for path, digest in reversed(files_now.items())}
    first |= {digest: path for path, digest in before.files.items() if path in files_now}
    alerts = [
        f"duplicated: {path} has the content of {first[digest]}"
        for path, digest in files_now.items()
        if first[digest] != path
    ]
    known = before.files.values()
    added = [path for path, digest in files_now.items() if digest not in known]
    if before.files and content == before.content and added and not alerts:
        alerts = [f"empty: {', '.join(added)} came and added no row to any table"]
    return Delivery(files=files_now, content=content, alerts=tuple(alerts))


def _entry(p: Partition, state: State, *alerts: str) -> Entry:
    return Entry(
        state=state,
        fingerprint=p.fingerprint,
        rows=p.rows,
        repeated=p.repeated,
        since=p.since,
        until=p.until,
        alerts=alerts,
    )


def _covered(p: Partition, known: dict[str, Entry], measured: datetime | None) -> bool:
    """Whether this is the first watch, of a champion that was measured on the partition."""
    return not known and measured is not None and p.until is not None and p.until <= measured


def _met_again(p: Partition, before: Entry) -> Entry:
    """The same distinct rows: what is known of them, unless they came once more."""
    if p.repeated == before.repeated:
        return before
    counts = {"rows": p.rows, "repeated": p.repeated}
    if p.repeated > before.repeated:
        said = f"duplicated: {p.repeated - before.repeated} of its rows came again"
        return before.but(**counts, state="alert", alerts=(said,), dismissed=False)
    return before.but(**counts, state="done", alerts=())


def _fault(p: Partition, original: str | None) -> str | None:
    if p.fault is not None:
        return f"malformed: {p.fault}"
    if p.rows == 0:
        return "empty: it has no row; an empty delivery usually is a broken feed"
    if p.since is None:
        return f"malformed: none of its {p.rows} rows has a readable {EVENT_TIMESTAMP}"
    if original is not None:
        return f"duplicated: it has the rows of {original}"
    return None


def _look(path: Path) -> Partition:
    import duckdb

    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        try:
            found = connection.execute(_SUMMARY, [str(path)]).fetchone()
        except duckdb.Error as error:
            fault = str(error).strip().splitlines()[0]
            return Partition(path.stem, files.sha256(path), 0, 0, None, None, fault)
    assert found is not None  # aggregates have one row
    rows, distinct, since, until, digest = found
    moments = [None if m is None else m.replace(tzinfo=timezone.utc) for m in (since, until)]
    return Partition(path.stem, f"{distinct}:{digest}", rows, rows - distinct, *moments)
