"""What the service counts beside BentoML's own metrics (``/metrics``)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Counter


@dataclass(frozen=True)
class Metrics:
    """Prometheus counters, each under ``fathom_<name>_total``."""

    ranked_items: Counter
    unknown_items: Counter
    unknown_users: Counter
    degraded_requests: Counter
    expired_rows: Counter
    refreshes: Counter
    refresh_failures: Counter
    unlogged_rows: Counter
    popular_recommendations: Counter
    explored_items: Counter


@cache
def metrics() -> Metrics:
    """The process's counters, made on first use.

    Not before: BentoML's server says where metrics go only after it has loaded the service.
    """
    from prometheus_client import Counter

    said = {
        "ranked_items": "Candidates ranked",
        "unknown_items": "Candidates that the feature store does not know",
        "unknown_users": "Requests of users that the feature store does not know",
        "degraded_requests": "Requests ranked without the user's features: the store was down",
        "expired_rows": "Rows of features that were too old to be used",
        "refreshes": "Times that newer tables were loaded from the feature store",
        "refresh_failures": "Times that newer tables could not be loaded; the old ones stayed",
        "unlogged_rows": "Rows that the feature log had to drop",
        "popular_recommendations": "Recommendations by popularity: nothing is known of the user",
        "explored_items": "Items that chance put into a recommendation",
    }
    return Metrics(**{name: Counter(f"fathom_{name}", text) for name, text in said.items()})
