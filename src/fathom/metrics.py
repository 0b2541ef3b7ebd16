"""What the service counts and measures (``/metrics``).

BentoML's own metrics are off: they keep a time series for every path that anybody asks for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge, Histogram

#: Upper bounds of durations, seconds.
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0)


#: Where a request's own seconds by stage are kept beside, by the thread that answers it.
OWN_STAGES: ContextVar[dict[str, float] | None] = ContextVar("own stages", default=None)
#: When the request was read that a thread answers, by `time.perf_counter`.
ASKED: ContextVar[float | None] = ContextVar("asked", default=None)


def took() -> float | None:
    """Seconds since the request was read that this thread answers."""
    asked = ASKED.get()
    return None if asked is None else time.perf_counter() - asked


@dataclass(frozen=True)
class Metrics:
    """Prometheus counters, each under ``fathom_<name>_total``, and a few others.

    Args:
        requests: by ``path`` and ``status`` (``fathom_requests_total``).
        request_seconds: from a request's first byte to the last of its answer, by ``path``.
        requests_in_progress: by ``path``.
        stages: seconds of a request by its ``stage``: ``wait`` for its turn, then ``parse``,
            ``features``, ``score``, ``explain`` and ``write`` (``fathom_stage_seconds``).
        trials: requests by the ``role`` of who was on trial with them (``canary``, ``shadow``,
            ``probation``) and the ``outcome``: ``answered``, ``failed`` or ``busy``.
        rollbacks: times that the service stopped using a ranker, by its ``role``: ``challenger``
            or ``champion``.
        challenger_share: of the users whose requests a challenger gets, by ``mode``
            (``fathom_challenger_share``); 0 without one.
        models: 1 for the ``version`` that serves, 0 for those before (``fathom_model``).
        tables_as_of: the moment whose state the features of items and contexts are, in seconds
            since 1970 (``fathom_tables_as_of_seconds``).
    """

    ranked_items: Counter
    unknown_items: Counter
    unknown_users: Counter
    degraded_requests: Counter
    expired_rows: Counter
    refreshes: Counter
    refresh_failures: Counter
    unlogged_rows: Counter
    swaps: Counter
    swap_failures: Counter
    turned_away: Counter
    late: Counter
    refused_keys: Counter
    popular_recommendations: Counter
    explored_items: Counter
    requests: Counter
    request_seconds: Histogram
    requests_in_progress: Gauge
    stages: Histogram
    trials: Counter
    rollbacks: Counter
    challenger_share: Gauge
    models: Gauge
    tables_as_of: Gauge

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a part of a request."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.took(name, time.perf_counter() - began)

    def took(self, name: str, seconds: float) -> None:
        """Count how long a part of a request took."""
        self.stages.labels(stage=name).observe(seconds)
        own = OWN_STAGES.get()
        if own is not None:
            own[name] = seconds


@cache
def metrics() -> Metrics:
    """The process's counters, made on first use.

    Not before: BentoML's server says where metrics go only after it has loaded the service.
    """
    from prometheus_client import Counter, Gauge, Histogram

    said = {
        "ranked_items": "Candidates ranked",
        "unknown_items": "Candidates that the feature store does not know",
        "unknown_users": "Requests of users that the feature store does not know",
        "degraded_requests": "Requests ranked without the user's features: the store was down",
        "expired_rows": "Rows of features that were too old to be used",
        "refreshes": "Times that newer tables were loaded from the feature store",
        "refresh_failures": "Times that newer tables could not be loaded; the old ones stayed",
        "unlogged_rows": "Rows that the feature log had to drop",
        "swaps": "Times that a new champion was put in charge",
        "swap_failures": "Times that a new champion could not be put in charge; the old one stayed",
        "turned_away": "Requests that would have waited too long",
        "late": "Requests that were not done by their deadline",
        "refused_keys": "Requests without a valid API key",
        "popular_recommendations": "Recommendations by popularity: nothing is known of the user",
        "explored_items": "Items that chance put into a recommendation",
    }
    found = Metrics(
        **{name: Counter(f"fathom_{name}", text) for name, text in said.items()},
        requests=Counter("fathom_requests", "Requests", ["path", "status"]),
        request_seconds=Histogram(
            "fathom_request_seconds", "Seconds of a request", ["path"], buckets=_SECONDS
        ),
        requests_in_progress=Gauge(
            "fathom_requests_in_progress",
            "Requests that are being answered",
            ["path"],
            multiprocess_mode="livesum",
        ),
        stages=Histogram(
            "fathom_stage_seconds", "Seconds of a request by stage", ["stage"], buckets=_SECONDS
        ),
        trials=Counter("fathom_trials", "Requests of rankers on trial", ["role", "outcome"]),
        rollbacks=Counter(
            "fathom_rollbacks", "Times that a ranker was found wanting while it served", ["role"]
        ),
        challenger_share=Gauge(
            "fathom_challenger_share",
            "Share of the users whose requests a challenger gets",
            ["mode"],
            multiprocess_mode="mostrecent",
        ),
        models=Gauge(
            "fathom_model",
            "1 for the version that serves",
            ["version"],
            multiprocess_mode="mostrecent",
        ),
        tables_as_of=Gauge(
            "fathom_tables_as_of_seconds",
            "The moment of the features of items and contexts, seconds since 1970",
            multiprocess_mode="mostrecent",
        ),
    )
    # From the start, so that a first increase is seen as one.
    for role in ("canary", "shadow", "probation"):
        for outcome in ("answered", "failed", "busy"):
            found.trials.labels(role=role, outcome=outcome)
    for role in ("challenger", "champion"):
        found.rollbacks.labels(role=role)
    for mode in ("canary", "shadow"):
        found.challenger_share.labels(mode=mode).set(0)
    return found


def exposition() -> tuple[bytes, str]:
    """All metrics as Prometheus reads them, of all worker processes; and their content type."""
    from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
    from prometheus_client.exposition import CONTENT_TYPE_LATEST
    from prometheus_client.multiprocess import MultiProcessCollector
    from prometheus_client.values import MutexValue, ValueClass

    registry = REGISTRY
    # By what the values are kept in, which was decided at the import: BentoML's server sets
    # PROMETHEUS_MULTIPROC_DIR before it, and others may set it after.
    if ValueClass is not MutexValue:
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry), CONTENT_TYPE_LATEST
