"""A user's rows from Feast's online store, within a time that holds whatever the store does.

A store that is another process is asked by one thread, and whoever waits for it does so for a
bounded time. (An embedded one cannot keep silent, so it is asked directly.) When the store fails or
is late, nobody is kept waiting again: reads are refused at once while the thread goes on trying,
and served again from its first success on.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from feast import FeatureStore

#: Between two attempts to reach a store that failed.
RETRY_SECONDS = 1.0

log = logging.getLogger(__name__)


class StoreDownError(RuntimeError):
    """The online store did not answer, or did not in time."""


@dataclass(frozen=True)
class Row:
    """What one feature view holds of a user.

    Args:
        moment: the row's event timestamp, UTC; None if there is no row.
        values: field → number, text, list of texts, array of numbers, or None.
    """

    moment: datetime | None
    values: Mapping[str, Any]


class _Question:
    """What is asked of the thread; whoever asks waits for the lock."""

    def __init__(self, user: str) -> None:
        self.user = user
        self.rows: dict[str, Row] | None = None
        self.error: Exception | None = None
        self.left = False
        self.answered = threading.Lock()
        self.answered.acquire()


class UserRows:
    """Reads the rows of one user at a time. Safe to share between threads.

    Args:
        store: Feast's handle; its online store is asked, not its registry.
        key: the user key.
        views: feature view → the fields to read.
        seconds: how long a read may take, where the store is another process.
    """

    def __init__(
        self,
        store: FeatureStore,
        key: str,
        views: Mapping[str, Sequence[str]],
        seconds: float = 0.5,
    ) -> None:
        self._config, self._provider = store.config, store._get_provider()
        self._key, self._seconds = key, seconds
        self._views = [(store.get_feature_view(name), list(views[name])) for name in views]
        # SQLite runs in this process, whichever of Feast's stores is built on it.
        self._embedded = "sqlite" in str(self._config.online_store.type).lower()
        self._questions: SimpleQueue[_Question | None] = SimpleQueue()
        self._closed = threading.Event()
        self.down = False
        self._thread = threading.Thread(target=self._work, name="user rows", daemon=True)
        self._thread.start()

    def close(self, seconds: float = 0.0) -> None:
        """End the thread, and wait for it for so long."""
        self._closed.set()
        self._questions.put(None)
        self._thread.join(seconds)

    def read(self, user: str) -> dict[str, Row]:
        """The user's row in each view.

        Raises:
            StoreDownError: after ``seconds`` at the latest; at once if the last read failed and
                none has succeeded since.
        """
        if not self._views or not _is_text(user):
            return {}
        if self.down:
            raise StoreDownError("the online store is down and being tried again")
        return self._read_directly(user) if self._embedded else self._read_in_time(user)

    def _read_directly(self, user: str) -> dict[str, Row]:
        try:
            return self._ask(user)
        except Exception as error:  # whatever the vendor of the store raises
            self._fail(_kind(error))
            self._questions.put(_Question(user))  # for the thread to go on trying
            raise StoreDownError(f"the online store failed: {error}") from error

    def _read_in_time(self, user: str) -> dict[str, Row]:
        question = _Question(user)
        self._questions.put(question)
        if not question.answered.acquire(timeout=self._seconds):
            question.left = True
            self._fail(f"no answer within {self._seconds} s")
            # Behind the late read, so that its end is noticed though nobody asks any more.
            self._questions.put(_Question(user))
            raise StoreDownError(f"the online store did not answer within {self._seconds} s")
        if question.rows is None:
            raise StoreDownError(f"the online store failed: {question.error}") from question.error
        return question.rows

    def _work(self) -> None:
        while (question := self._questions.get()) is not None:
            if question.left:
                continue
            up = self._answer(question)
            question.answered.release()
            while not up and not self._closed.wait(RETRY_SECONDS):
                up = self._answer(question)

    def _answer(self, question: _Question) -> bool:
        """Ask the store; whether it is up."""
        began = time.monotonic()
        try:
            question.rows = self._ask(question.user)
        except Exception as error:
            question.error = error
            self._fail(_kind(error))
            return False
        if self.down:
            # A store that answers, but never in time, is down all the same.
            if time.monotonic() - began > self._seconds:
                return False
            self.down = False
            log.warning("the online store answers again")
        return True

    def _fail(self, reason: str) -> None:
        if not self.down:
            self.down = True
            log.warning(
                "the online store is down (%s); users count as unknown until it is back", reason
            )

    def _ask(self, user: str) -> dict[str, Row]:
        from feast.protos.feast.types.EntityKey_pb2 import EntityKey
        from feast.protos.feast.types.Value_pb2 import Value

        key = EntityKey(join_keys=[self._key], entity_values=[Value(string_val=user)])
        rows = {}
        for view, fields in self._views:
            # A copy of the fields: Feast's Redis store adds its own to the list.
            ((moment, values),) = self._provider.online_read(
                self._config, view, [key], list(fields)
            )
            plain = {name: _plain(value) for name, value in (values or {}).items()}
            there = any(value is not None for value in plain.values())
            rows[view.name] = Row(moment if there else None, plain)
        return rows


def _kind(error: Exception) -> str:
    """An error for the log, where its text may not stand: stores quote what they were asked."""
    cause = error.__cause__
    return type(error).__qualname__ + (f" by {type(cause).__qualname__}" if cause else "")


def _is_text(user: str) -> bool:
    """Whether a key can be stored at all: half of a surrogate pair cannot."""
    try:
        user.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain(value: Any) -> Any:
    """A Feast value as Python's or numpy's own; None if there is none."""
    kind = value.WhichOneof("val")
    if kind is None or kind == "null_val":
        return None
    found = getattr(value, kind)
    if not kind.endswith("list_val"):
        return found
    return list(found.val) if kind == "string_list_val" else np.array(found.val)
