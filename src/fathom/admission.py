"""A bound on how long requests wait: those that would wait longer are turned away at once.

Work is done on one thread, in the order in which it came. A request is admitted if what is before
it will be done within ``queue_seconds``, by the mean duration of the last requests; and it is given
up at its deadline. So an admitted request is answered in about the time that it takes when there is
no rush, and a rush costs those that are turned away, who may ask again.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

#: Weight of the newest duration in the mean of the last ones.
_WEIGHT = 0.1

T = TypeVar("T")


class BusyError(RuntimeError):
    """There is too much before this request; it may be tried again after ``retry_seconds``."""

    def __init__(self, retry_seconds: int) -> None:
        super().__init__("too many requests are waiting; try again later")
        self.retry_seconds = retry_seconds


class LateError(RuntimeError):
    """A request was not done by its deadline."""


class Queue:
    """One thread, and the requests that wait for it. Asked from an event loop.

    Args:
        queue_seconds: how long a request may have to wait, as far as can be told.
        most: requests that may be inside at once, reading their bodies included.
    """

    def __init__(self, queue_seconds: float, most: int = 64) -> None:
        self._thread = ThreadPoolExecutor(1, "scoring")
        self._queue_seconds, self._most = queue_seconds, most
        self._inside, self._waiting, self._mean = 0, 0, 0.0
        self._lock = threading.Lock()

    @property
    def wait_seconds(self) -> float:
        """How long a new request would wait, as far as can be told."""
        return self._waiting * self._mean

    @contextmanager
    def place(self) -> Iterator[None]:
        """One of the places, for as long as a request takes.

        Raises:
            BusyError: all are taken.
        """
        if self._inside >= self._most:
            raise self._busy()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    async def run(self, work: Callable[[], T], deadline: float) -> T:
        """Do work in its turn.

        Args:
            deadline: by `time.monotonic`.

        Raises:
            BusyError: too much is before it; nothing was done.
            LateError: it was not done in time. If it had begun, it ends for nobody.
        """
        # One that waits for nothing is always let in: the mean may be of another kind of work.
        if self._waiting and self.wait_seconds > self._queue_seconds:
            raise self._busy()
        left = deadline - time.monotonic()
        with self._lock:
            self._waiting += 1
        future = self._thread.submit(self._timed, work, deadline)
        future.add_done_callback(self._done)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), max(left, 0.001))
        except TimeoutError as error:
            raise LateError("the deadline has passed") from error

    def offer(self, work: Callable[[], None], most: int) -> bool:
        """Do work some time, for nobody, unless so much is waiting; whether it will be done."""
        with self._lock:
            if self._waiting >= most:
                return False
            self._waiting += 1
        try:
            self._thread.submit(work).add_done_callback(self._done)
        except RuntimeError:  # the queue was closed
            return False
        return True

    def _busy(self) -> BusyError:
        return BusyError(max(1, round(self.wait_seconds)))

    def close(self) -> None:
        """Give up what is waiting."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _timed(self, work: Callable[[], T], deadline: float) -> T:
        began = time.monotonic()
        if began > deadline:
            raise LateError("the deadline passed before its turn")
        try:
            return work()
        finally:
            taken = time.monotonic() - began
            self._mean += _WEIGHT * (taken - self._mean) if self._mean else taken

    def _done(self, _: Future[T]) -> None:
        with self._lock:
            self._waiting -= 1
