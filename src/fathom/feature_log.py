"""The prediction log: what the model saw and said of every candidate that was ranked.

Scoring hands a request over and goes on; a thread turns it into Arrow and writes segments, each a
parquet file that appears whole or not at all::

    <folder>/<version>/<moment of writing>-<random>.parquet

A row has the candidate's feature vector, as of when it was, its probability and its place in the
answer, and how the request was answered: by whom, whether degraded, in how many milliseconds.

A crash loses the open segment alone. What does not fit the queue or the disk's share is dropped,
the first counted, the second oldest first; scoring never waits. `fathom.skew` and
`fathom.outcomes` read it back.
"""

from __future__ import annotations

import shutil
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from queue import Empty, SimpleQueue

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fathom import files
from fathom.batch import Ragged
from fathom.encoding import Frame, Values
from fathom.online import Known, user_views
from fathom.service_log import about, log
from fathom.spec import EVENT_TIMESTAMP, FeatureSpec

PROBABILITY = "probability"
#: Columns that are not the spec's, whose names never start with an underscore.
REQUEST, CANDIDATE, VERSION = "_request", "_candidate", "_version"
USER_KNOWN, ITEM_KNOWN, DEGRADED, EXPIRED = "_user_known", "_item_known", "_degraded", "_expired"
#: Where the item stood in the answer, if it did; of a recommendation, how probable that was.
SLOT, PROPENSITY = "_slot", "_propensity"
#: Whether the champion or a canary has answered, or a shadow has only scored; and how long it took.
HOW, MILLISECONDS = "_how", "_milliseconds"
USER_AS_OF, TABLES_AS_OF, ROW = "_user_as_of", "_tables_as_of", "_row_"
MOMENT = pa.timestamp("us", "UTC")
#: Small tables are joined before there are too many of them.
_TABLES = 256
#: After so long, a segment that was not finished never will be.
_LEFT_SECONDS = 3600.0


@dataclass(frozen=True)
class Served:
    """One ranked request. Legend: N candidates.

    Args:
        request: its id.
        items: the N item keys.
        frame: every column of the spec, N rows, as the model saw it.
        probabilities: (N,).
        how: ``champion``, ``canary`` or ``shadow``: for whom it was scored.
        seconds: from when the request was read to when its items were in order.
        slots: (N,) the place of each in the answer, 0 for the first, -1 for none.
        propensities: (N,) of a recommendation, the probability with which each was to be shown.
    """

    request: str
    user: str
    items: Sequence[str]
    moment: datetime
    frame: Frame
    known: Known
    probabilities: NDArray[np.float64]
    how: str = "champion"
    seconds: float | None = None
    slots: NDArray[np.int64] | None = None
    propensities: NDArray[np.float64] | None = None


class FeatureLog:
    """Writes served requests in the background.

    Args:
        most_bytes: of all segments in the folder, whichever version's; the oldest go first.
        segment_rows, segment_seconds: a segment is closed when it has as many rows, or is as old.
        queued_rows: how many may wait to be written.
        dropped: called with the number of rows that had to be dropped.
    """

    def __init__(
        self,
        folder: Path,
        spec: FeatureSpec,
        version: str,
        most_bytes: int = 1 << 30,
        segment_rows: int = 50_000,
        segment_seconds: float = 60.0,
        queued_rows: int = 200_000,
        dropped: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._folder, self._spec, self._version = folder, spec, version
        self._most_bytes, self._dropped = most_bytes, dropped
        self._segment_rows, self._segment_seconds = segment_rows, segment_seconds
        self._queued_rows, self._waiting = queued_rows, 0
        self._queue: SimpleQueue[Served | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="feature log", daemon=True)
        self._thread.start()

    def put(self, served: Served) -> bool:
        """Hand a request over; False if there was no room for it. Never waits."""
        rows = len(served.items)
        with self._lock:
            room = self._waiting + rows <= self._queued_rows
            self._waiting += rows if room else 0
        if room:
            self._queue.put(served)
        else:
            self._dropped(rows)
        return room

    def close(self, seconds: float = 10.0) -> None:
        """Write what is left, for as long as that takes but for ``seconds`` at most."""
        self._queue.put(None)
        self._thread.join(seconds)

    def _work(self) -> None:
        pending: list[pa.Table] = []
        rows, opened = 0, 0.0
        _tidy(self._folder)
        while True:
            left = max(opened + self._segment_seconds - time.monotonic(), 0.0) if rows else None
            try:
                served = self._queue.get(timeout=left)
            except Empty:
                served = None
            else:
                if served is None:
                    self._write(pending)
                    return
            if served is not None:
                opened = opened if rows else time.monotonic()
                pending += self._converted(served)
                rows += len(served.items)
                if len(pending) > _TABLES:
                    pending = [pa.concat_tables(pending).combine_chunks()]
            if served is None or rows >= self._segment_rows:
                self._write(pending)
                pending, rows = [], 0

    def _converted(self, served: Served) -> list[pa.Table]:
        with self._lock:
            self._waiting -= len(served.items)
        try:
            return [rows_of(served, self._spec, self._version)]
        except Exception:
            log.exception(
                "request %s cannot be logged", served.request, extra=about(served.request)
            )
            self._dropped(len(served.items))
            return []

    def _write(self, pending: Sequence[pa.Table]) -> None:
        import pyarrow.parquet as pq

        if not pending:
            return
        moment = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%fZ")
        path = self._folder / self._version / f"{moment}-{uuid.uuid4().hex[:8]}.parquet"
        try:
            with files.replacing(path) as temporary:
                pq.write_table(pa.concat_tables(pending), temporary, compression="zstd")
            self._make_room()
        except Exception:
            log.exception("%s: cannot write a segment of the feature log", self._folder)
            self._dropped(sum(map(len, pending)))

    def _make_room(self) -> None:
        found = sorted(segments(self._folder), key=lambda path: path.name)
        sizes = [path.stat().st_size for path in found]
        total = sum(sizes)
        for path, size in zip(found[:-1], sizes, strict=False):
            if total <= self._most_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


def segments(folder: Path) -> list[Path]:
    """The complete segments in a log, by version and then by age."""
    return sorted(folder.glob("[!.]*/[!.]*.parquet"))


def together(parts: Sequence[pa.Table]) -> pa.Table:
    """Segments as one table; what those of an earlier release did not hold is missing."""
    return pa.concat_tables(parts, promote_options="default")


def _tidy(folder: Path) -> None:
    """Remove what writers that were killed left; those that write now are not that old."""
    for path in folder.glob("[!.]*/.*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFT_SECONDS:
                shutil.rmtree(path)


def rows_of(served: Served, spec: FeatureSpec, version: str) -> pa.Table:
    """A request as rows of the log, one for each candidate."""
    count, known = len(served.items), served.known
    names = [spec.entities.user, spec.entities.item, EVENT_TIMESTAMP]
    fields: list[pa.Array] = [
        _all(served.user, pa.string(), count),
        pa.array(list(served.items), pa.string()),
        _all(_utc(served.moment), MOMENT, count),
    ]
    own = {
        REQUEST: _all(served.request, pa.string(), count),
        CANDIDATE: pa.array(np.arange(count), pa.int32()),
        VERSION: _all(version, pa.string(), count),
        USER_KNOWN: _all(known.user, pa.bool_(), count),
        ITEM_KNOWN: pa.array(known.items),
        DEGRADED: _all(known.degraded, pa.bool_(), count),
        EXPIRED: _all(known.expired, pa.int32(), count),
        USER_AS_OF: _all(known.user_as_of, MOMENT, count),
        TABLES_AS_OF: _all(known.tables_as_of, MOMENT, count),
        PROBABILITY: pa.array(served.probabilities, pa.float64()),
        HOW: _all(served.how, pa.string(), count),
        MILLISECONDS: _all(_milliseconds(served.seconds), pa.float64(), count),
        SLOT: _slots(served.slots, count),
        PROPENSITY: pa.array(
            [None] * count if served.propensities is None else served.propensities, pa.float64()
        ),
    }
    own |= {f"{ROW}{v}": _all(known.rows.get(v), MOMENT, count) for v in user_views(spec)}
    for column in spec.columns:
        if column.name not in names:
            names.append(column.name)
            fields.append(_arrow(served.frame[column.name]))
    return pa.table([*fields, *own.values()], [*names, *own])


def _arrow(values: Values) -> pa.Array:
    """A column exactly as it is: float32 with its NaN, texts, lists of texts."""
    if isinstance(values, Ragged):
        texts = pa.array(values.values, pa.string())
        return pa.ListArray.from_arrays(pa.array(values.offsets, pa.int32()), texts)
    kind = pa.string() if values.dtype == object else pa.float32()
    return pa.array(values, kind, from_pandas=False)


def _slots(slots: NDArray[np.int64] | None, count: int) -> pa.Array:
    found = np.full(count, -1) if slots is None else slots
    return pa.array(found, pa.int32(), mask=found < 0)


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3


def _all(value: object, kind: pa.DataType, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(value, kind), count)


def _utc(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
