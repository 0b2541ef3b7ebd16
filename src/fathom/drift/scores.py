"""Distances between two sets of shares, as Evidently computes them.

Thresholds rest on hundreds of windows for every column, which Evidently would take hours for. A
test holds both equal, and so does every report (`fathom.drift.page`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathom.drift.config import Method

Floats = NDArray[np.float64]


def score(method: Method, was: NDArray[np.int64], now: NDArray[np.int64]) -> float:
    """The distance of two counts (B,) of the same bins.

    ``psi``: Σ (p - q) ln(p / q). ``jensenshannon``: the square root of the mean Kullback-Leibler
    divergence of both from their mean, in nats.
    """
    there = (was + now) > 0
    p, q = _shares(was[there], method), _shares(now[there], method)
    if method == "psi":
        return float(((p - q) * np.log(p / q)).sum())
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * np.log(p / middle), 0) + np.where(
            q > 0, q * np.log(q / middle), 0
        )
    return float(np.sqrt(max(terms.sum() / 2, 0.0)))


def moved(was: NDArray[Any], now: NDArray[Any]) -> float:
    """The share of rows that lie in another bin than before, at least (total variation)."""
    return float(np.abs(was / was.sum() - now / now.sum()).sum() / 2)


def _shares(counts: NDArray[np.int64], method: Method) -> Floats:
    """Shares; for PSI, Evidently's stand-in where there is none."""
    shares = counts / counts.sum()
    if method == "psi" and (shares == 0).any():
        least = shares[shares > 0].min()
        shares[shares == 0] = least / 10**6 if least <= 0.0001 else 0.0001
    return np.asarray(shares, np.float64)
