"""How long requests wait, and who is turned away."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from fathom.admission import BusyError, LateError, Queue


@pytest.fixture
def queue() -> Iterator[Queue]:
    queue = Queue(queue_seconds=0.05, most=3)
    yield queue
    queue.close()


def soon(seconds: float = 5.0) -> float:
    return time.monotonic() + seconds


def idle(queue: Queue) -> None:
    """Wait until nothing waits, which a late request may do after its answer."""
    until = soon()
    while queue.wait_seconds and time.monotonic() < until:
        time.sleep(0.01)
    assert queue.wait_seconds == 0


def test_work_is_done_in_its_turn(queue: Queue) -> None:
    done: list[int] = []

    async def all_of_them() -> None:
        await asyncio.gather(*(queue.run(lambda i=i: done.append(i), soon()) for i in range(3)))

    asyncio.run(all_of_them())
    assert done == [0, 1, 2]
    idle(queue)


def test_what_would_wait_too_long_is_turned_away_at_once(queue: Queue) -> None:
    """Work takes 0.1 s: one may be done and none may wait behind it for more than 0.05 s."""
    ran: list[str] = []

    def work(name: str) -> None:
        time.sleep(0.1)
        ran.append(name)

    async def rush() -> list[object]:
        await queue.run(lambda: work("before"), soon())  # from now on it is known what work takes
        return await asyncio.gather(
            *(queue.run(lambda i=i: work(f"{i}"), soon()) for i in range(3)),
            return_exceptions=True,
        )

    first, *others = asyncio.run(rush())
    assert first is None
    assert [type(other) for other in others] == [BusyError, BusyError]
    assert "too many requests are waiting; try again later" in str(others[0])
    assert ran == ["before", "0"], "the others never ran"
    idle(queue)


def test_there_is_a_bound_of_requests_too(queue: Queue) -> None:
    gate = threading.Event()

    async def ask() -> bool:
        with queue.place():
            return await queue.run(gate.wait, soon())

    async def rush() -> list[object]:
        waiting = [asyncio.create_task(ask()) for _ in range(5)]
        await asyncio.sleep(0.05)
        gate.set()
        return await asyncio.gather(*waiting, return_exceptions=True)

    found = asyncio.run(rush())
    assert [type(each) for each in found] == [bool] * 3 + [BusyError] * 2
    assert isinstance(error := found[-1], BusyError)
    assert error.retry_seconds >= 1
    with queue.place(), queue.place(), queue.place():
        """All places are free again."""


def test_after_a_rush_requests_are_let_in_again(queue: Queue) -> None:
    """Slow work of before must not keep out what comes when nothing waits."""

    async def later() -> str:
        await queue.run(lambda: time.sleep(0.2), soon())
        return await queue.run(lambda: "done", soon())

    assert asyncio.run(later()) == "done"


def test_a_late_request_is_given_up_and_its_work_is_not_begun(queue: Queue) -> None:
    ran: list[str] = []

    async def late() -> list[object]:
        slow = asyncio.create_task(queue.run(lambda: time.sleep(0.3), soon()))
        await asyncio.sleep(0.05)
        other = asyncio.create_task(queue.run(lambda: ran.append("other"), soon(0.1)))
        began = time.monotonic()
        found = await asyncio.gather(other, return_exceptions=True)
        assert time.monotonic() - began < 0.2, "it does not wait for the slow one"
        await slow
        return list(found)

    (error,) = asyncio.run(late())
    assert isinstance(error, LateError)
    assert str(error) == "the deadline has passed"
    idle(queue)
    assert ran == []


def test_faults_of_the_work_are_its_askers(queue: Queue) -> None:
    def fail() -> None:
        raise ValueError("odd")

    with pytest.raises(ValueError, match="odd"):
        asyncio.run(queue.run(fail, soon()))
    idle(queue)
