"""A window of the shop with something to say, and Evidently's report of it, made but once."""

from __future__ import annotations

import pytest

from fathom.drift import Decision, Measurement, Report, decide, report
from shop import CONFIG, changed, reference, watch, week


@pytest.fixture(scope="session")
def found() -> Measurement:
    """Prices tripled, no product, and other predictions."""
    current = changed(week(), price=week()["price"] * 3, product=None)
    return watch(current.assign(probability=week()["probability"] ** 0.5))


@pytest.fixture(scope="session")
def decision(found: Measurement) -> Decision:
    return decide(found, (), CONFIG, "v1")


@pytest.fixture(scope="session")
def made(found: Measurement, decision: Decision) -> Report:
    return report(reference(), found, decision)
