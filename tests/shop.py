"""A shop that never changes, and a model that is right about it, for the tests of drift.

Four weeks of it are the reference, the week after is the window. A test changes one thing and
looks where it shows.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from functools import cache
from math import nan
from typing import Any

import numpy as np
import pandas as pd

from fathom.drift import (
    Delivery,
    Measurement,
    MonitoringConfig,
    Reference,
    Trace,
    Window,
    measure,
)
from fathom.spec import FeatureSpec

START = datetime(2024, 4, 1, tzinfo=UTC)
WINDOW = Window(START + timedelta(days=28), START + timedelta(days=35))
CONFIG = MonitoringConfig(min_rows=1000, min_labels=300, draws=40)
WEEK = 4000


def spec(*columns: dict[str, Any], **more: Any) -> FeatureSpec:
    """A spec of context columns, as short as possible."""
    return FeatureSpec.model_validate(
        {
            "entities": {"user": "shopper", "item": "product", "request": "basket"},
            "label": {"name": "bought", "values": (0, 1)},
            "columns": [{"owner": "context"} | column for column in columns],
        }
        | more
    )


SHOP = spec(
    {"name": "price", "kind": "numeric"},
    {"name": "visits", "kind": "numeric"},
    {"name": "channel", "kind": "categorical"},
    {"name": "product", "kind": "categorical", "owner": "item"},
    {"name": "tags", "kind": "multi"},
    {"name": "history", "kind": "sequence"},
)
#: By how much each channel raises the log-odds of buying.
CHANNELS = {"app": 1.0, "web": -1.0, "shop": -2.0}


def shop(
    seed: int, rows: int = WEEK, window: Window = WINDOW, mix: Any = (0.6, 0.3, 0.1)
) -> pd.DataFrame:
    """Rows of the shop, five to a basket: 400 products of very different popularity.

    Args:
        mix: shares of the channels, or a function that says them by weekday (rows,).
    """
    random = np.random.default_rng(seed)
    popularity = 1 / np.arange(1, 401)
    products = [f"p{i}" for i in range(400)]
    popular = random.choice(products, (rows, 5), p=popularity / popularity.sum())
    lengths = random.integers(0, 5, rows)
    baskets = np.arange(rows) // 5
    seconds = random.random(baskets[-1] + 1) * (window.end - window.start).total_seconds()
    moments = pd.Series(window.start + pd.to_timedelta(seconds[baskets], unit="s"))
    shares = np.broadcast_to(
        mix(moments.dt.weekday.to_numpy()) if callable(mix) else mix, (rows, 3)
    )
    places = (random.random((rows, 1)) > shares.cumsum(axis=1)[:, :2]).sum(axis=1)
    logit = np.array(list(CHANNELS.values()))[places] + random.normal(size=rows)
    probability = 1 / (1 + np.exp(-logit))
    return pd.DataFrame(
        {
            "shopper": [f"u{i}" for i in random.integers(0, 500, baskets[-1] + 1)[baskets]],
            "basket": [f"{seed}-{i}" for i in baskets],
            "price": np.where(random.random(rows) < 0.1, nan, random.lognormal(size=rows)),
            "visits": random.poisson(0.3, rows).astype(float),
            "channel": np.array(list(CHANNELS))[places],
            "product": popular[:, 0],
            "tags": [sorted({"new", "red", "big"} - {t}) for t in random.choice(["new", ""], rows)],
            "history": [list(p[:n]) for p, n in zip(popular, lengths, strict=True)],
            "probability": probability,
            "bought": (random.random(rows) < probability).astype(int),
            "event_timestamp": moments,
        }
    ).astype({"channel": object})


def past(seed: int = 0, weeks: int = 4, **more: Any) -> pd.DataFrame:
    """The weeks before the window."""
    before = Window(WINDOW.start - timedelta(weeks=weeks), WINDOW.start - timedelta(seconds=1))
    return shop(seed, weeks * WEEK, before, **more)


def changed(frame: pd.DataFrame, seed: int = 5, share: float = 1.0, **columns: Any) -> pd.DataFrame:
    """The frame with the given columns in that share of its rows, drawn without looking at them."""
    rows = np.random.default_rng(seed).random(len(frame)) < share
    result = frame.copy()
    for name, values in columns.items():
        column = values if isinstance(values, pd.Series | list) else [values] * len(frame)
        column = pd.Series(column, index=frame.index, dtype=frame[name].dtype)
        result[name] = result[name].where(~rows, column)
    return result


@cache
def reference(labels: bool = True) -> Reference:
    """Of the shop's four weeks; calibrated but once."""
    frame = past()
    leaning = {"channel": 0.1, "price": 0.02}
    return Reference.of(
        frame if labels else frame.drop(columns="bought"), SHOP, CONFIG, {}, leaning
    )


@cache
def week(seed: int = 1) -> pd.DataFrame:
    """A window without drift."""
    return shop(seed)


def watch(
    current: pd.DataFrame,
    before: Trace | None = None,
    delivery: Delivery | None = None,
    labels: bool = True,
) -> Measurement:
    """Measure a window of the shop."""
    return measure(reference(labels), current, WINDOW, before, delivery)


def drifted(found: Measurement) -> set[str]:
    return {name for name, column in found.columns.items() if column.verdict == "drifted"}
