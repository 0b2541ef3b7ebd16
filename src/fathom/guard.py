"""Whether a ranker on trial may go on: its newest requests beside those of the one before it."""

from __future__ import annotations

import math
from collections import deque
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

#: Requests between two looks at them, which take as long as ranking a few candidates.
_EVERY = 10


class RolloutConfig(BaseModel):
    """How a challenger and a new champion are tried (``params:serving``, ``rollout``).

    A request that a ranker on trial does not answer is answered by the one before it, so these
    bounds decide when the trial ends, not what it costs.

    Args:
        probation_seconds: how long a champion's predecessor stays ready to take over; 0: not at
            all.
        patience_seconds: a request that a ranker on trial has not answered by then counts as an
            error, and is answered by the one before it.
        newest: requests that are judged, of each ranker.
        min_requests: p99 is compared from so many on; errors count as if there were so many.
        max_error_share: of the newest requests.
        max_latency_ratio: its p99 over that of the one before it.
        latency_floor_seconds: a p99 below this is never too long.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    probation_seconds: float = Field(default=600.0, ge=0, le=86_400)
    patience_seconds: float = Field(default=1.0, gt=0, le=30)
    newest: int = Field(default=500, ge=20, le=100_000)
    min_requests: int = Field(default=100, ge=10, le=100_000)
    max_error_share: float = Field(default=0.02, ge=0, lt=1)
    max_latency_ratio: float = Field(default=2.0, gt=1, le=1000)
    latency_floor_seconds: float = Field(default=0.02, ge=0, le=30)

    @model_validator(mode="after")
    def _can_be_reached(self) -> Self:
        if self.min_requests > self.newest:
            raise ValueError(
                f"min_requests is {self.min_requests}; it must be at most newest, {self.newest}, "
                "or p99 is never compared"
            )
        return self

    def fault(self, tried: Newest, before: Newest) -> str | None:
        """Why a ranker on trial must not go on; None if it may.

        Args:
            tried: its newest requests.
            before: those of the ranker that it is compared with.
        """
        seconds = tried.seconds()
        errors = int(np.isnan(seconds).sum())
        if errors > self.max_error_share * max(len(seconds), self.min_requests):
            return (
                f"{errors} of its newest {len(seconds)} requests failed; at most "
                f"{self.max_error_share:.1%} may"
            )
        ours, theirs = (found[~np.isnan(found)] for found in (seconds, before.seconds()))
        if min(len(ours), len(theirs)) < self.min_requests:
            return None
        slow, usual = float(np.quantile(ours, 0.99)), float(np.quantile(theirs, 0.99))
        if slow > max(self.max_latency_ratio * usual, self.latency_floor_seconds):
            return (
                f"p99 of its newest {len(ours)} requests is {slow * 1e3:.1f} ms, beside "
                f"{usual * 1e3:.1f} ms before; at most {self.max_latency_ratio:g} times as long "
                f"is allowed, and {self.latency_floor_seconds * 1e3:g} ms always"
            )
        return None


class Newest:
    """The newest requests of a ranker. Safe to share between threads.

    Args:
        most: how many are kept.
    """

    def __init__(self, most: int) -> None:
        self._seconds: deque[float] = deque(maxlen=most)
        self._count = 0

    def took(self, seconds: float) -> None:
        """Count one that was answered."""
        self._seconds.append(seconds)
        self._count += 1

    def failed(self) -> None:
        """Count one that was not."""
        self.took(math.nan)

    @property
    def is_due(self) -> bool:
        """Whether they are worth a look: after each that failed, and now and then."""
        return self._count > 0 and (math.isnan(self._seconds[-1]) or self._count % _EVERY == 0)

    def seconds(self) -> NDArray[np.float64]:
        """(n,) how long each took; NaN for those that failed."""
        # A copy at once: others go on counting.
        return np.array(self._seconds.copy(), np.float64)
