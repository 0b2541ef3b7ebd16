"""A ranking, the one thread that it answers on, and how its newest requests went."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass

from fathom.admission import Queue
from fathom.guard import Newest
from fathom.metrics import ASKED, OWN_STAGES, metrics
from fathom.ranking import Answer, Ranking
from fathom.serving import ServingConfig

Method = Callable[[Ranking, bytes, str], Answer]


@dataclass(frozen=True)
class Ask:
    """A request that was read.

    Args:
        method: of `Ranking`, that answers it.
        read: when, by `time.perf_counter`.
        stages: its seconds by stage are put here.
        stamped: whether the answer names its version and the request.
        by_user: whether it is of one user, and so may be a challenger's.
    """

    method: Method
    body: bytes
    request_id: str
    read: float
    stages: dict[str, float]
    stamped: bool
    by_user: bool


@dataclass(frozen=True)
class Answered:
    """An answer as JSON, and whose it is."""

    version: str
    content: bytes


class Lane:
    """A ranking, the one thread that it answers on, and its newest requests."""

    def __init__(self, ranking: Ranking, config: ServingConfig) -> None:
        self.ranking = ranking
        self.queue = Queue(config.queue_seconds)
        self.newest = Newest(config.rollout.newest)

    async def answer(self, ask: Ask, deadline: float) -> Answered:
        """Answer in its turn; raises as `Queue.run` and the ask's method do."""
        content = await self.queue.run(lambda: self._answer(ask), deadline)
        return Answered(self.ranking.version, content)

    def _answer(self, ask: Ask) -> bytes:
        began = time.perf_counter()
        OWN_STAGES.set(ask.stages)
        ASKED.set(ask.read)
        metrics().took("wait", began - ask.read)
        stamp = {"version": self.ranking.version, "request_id": ask.request_id}
        found = ask.method(self.ranking, ask.body, ask.request_id)
        with metrics().stage("write"):
            content = as_json((stamp if ask.stamped else {}) | found)
        if ask.by_user:
            self.newest.took(time.perf_counter() - began)
        return content

    def shadow(self, ask: Ask) -> None:
        """Score what another has answered, for nobody."""
        began = time.perf_counter()
        ASKED.set(began)
        ask.method(self.ranking, ask.body, ask.request_id)
        self.newest.took(time.perf_counter() - began)

    def close(self, *others: Lane) -> None:
        """End the background work, but for what others share."""
        self.queue.close()
        self.ranking.close(*(lane.ranking for lane in others))


def as_json(answer: Answer) -> bytes:
    """An answer's text."""
    return json.dumps(answer, allow_nan=False, separators=(",", ":")).encode()
