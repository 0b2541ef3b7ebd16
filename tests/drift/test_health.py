"""A feed that broke is told from a world that changed, and each fault is named with its remedy."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fathom.drift import Delivery, Reference, Trace, measure
from fathom.spec import FeatureSpec
from shop import CONFIG, SHOP, WINDOW, changed, past, reference, shop, spec, watch, week

MEND = "mend the source rather than retrain on it"


def faults(current: pd.DataFrame, **more: Any) -> list[str]:
    return list(watch(current, **more).faults)


def only_fault(current: pd.DataFrame, **more: Any) -> str:
    (fault,) = faults(current, **more)
    return fault


# ---------------------------------------------------------------- missing values


@pytest.mark.parametrize("column", ["price", "channel"])
def test_values_that_go_missing_are_a_fault(column: str) -> None:
    fault = only_fault(changed(week(), share=0.2, **{column: None}))
    numbers = r"\d+\.\d% missing, before (10\.\d|0\.0)%; a rise of 1\.0% is a fault of the source"
    assert re.fullmatch(f"{column}: {numbers}; mend it rather than retrain on it", fault)


@pytest.mark.parametrize("column", ["price", "channel", "product"])
def test_a_column_that_is_all_null_is_an_outage(column: str) -> None:
    assert only_fault(week().assign(**{column: None})) == f"{column}: all null; {MEND}"


def test_fewer_missing_values_are_no_fault() -> None:
    assert faults(week().assign(price=week()["price"].fillna(1.7))) == []


def test_computed_columns_may_lack_values() -> None:
    """Nothing happened yet: of many new users, say. That is drift, and nobody's fault."""
    counted = spec(
        {"name": "shopper", "kind": "categorical", "owner": "user"},
        {"name": "price", "kind": "numeric"},
        {"name": "visits", "kind": "numeric", "owner": None}
        | {"aggregate": {"by": ["shopper"], "measure": "count"}},
    )
    kept = Reference.of(past(), counted, CONFIG)
    assert kept.computed == {"visits", "probability"}
    current = changed(week(), share=0.3, visits=None, price=None)
    found = measure(kept, current, WINDOW)
    assert found.columns["visits"].verdict == "drifted"
    assert [fault.split(":")[0] for fault in found.faults] == ["price"]


# ---------------------------------------------------------------- one value for some rows


def test_a_flood_of_one_value_is_a_stuck_feed() -> None:
    fault = only_fault(changed(week(), share=0.6, visits=0.0))
    stuck = r"visits: 6\d\.\d% of the rows changed to 01: ≤ 0 and the others stayed as they were"
    assert re.fullmatch(f"{stuck}, as where a feed is stuck; {MEND}", fault)


def test_labels_tell_a_stuck_feed_from_more_of_one_kind() -> None:
    """A fifth of the rows says `shop`. If they are of the shop they buy as little as its others."""
    stuck = changed(week(), share=0.2, channel="shop")
    assert "rows changed to shop" in only_fault(stuck)
    # Without labels both look the same, and it takes a flood.
    assert faults(stuck, labels=False) == []
    shares = week()["channel"].value_counts(normalize=True)
    mix = [shares[name] * 0.8 + 0.2 * (name == "shop") for name in ("app", "web", "shop")]
    assert faults(shop(1, mix=tuple(mix))) == []


def test_a_new_value_is_no_stuck_feed() -> None:
    assert faults(changed(week(), share=0.6, channel="kiosk")) == []


def test_a_new_channel_that_has_no_past_yet_is_no_stuck_feed() -> None:
    """Its count of 0 is true. The same count for a channel that is known is a broken feed."""
    counted = {"name": "sales", "kind": "numeric"}
    counted |= {"aggregate": {"by": ["channel"], "measure": "count"}}
    plain = {"name": "channel", "kind": "categorical"}
    watched = FeatureSpec.model_validate(
        SHOP.model_dump(include={"entities", "label"})
        | {"columns": [plain | {"owner": "context"}, counted]}
    )
    sales = {"app": 900.0, "web": 500.0, "shop": 100.0}

    def of(frame: pd.DataFrame) -> pd.DataFrame:
        return frame.assign(sales=frame["channel"].map(sales))

    kept = Reference.of(of(past()), watched, CONFIG)
    stuck = changed(of(week()), share=0.6, sales=0.0)
    new = changed(stuck, share=0.6, channel="kiosk")  # the same rows, by the same seed
    (fault,) = measure(kept, stuck, WINDOW).faults
    assert re.match(r"sales: \d\d\.\d% of the rows changed to 00: ≤ ", fault)
    assert measure(kept, new, WINDOW).faults == ()


def test_where_the_others_moved_too_it_is_a_change_of_the_world() -> None:
    assert faults(shop(1, mix=(0.02, 0.18, 0.8))) == []


# ---------------------------------------------------------------- numbers of another unit


@pytest.mark.parametrize("factor", [100, 2.5, 0.01])
def test_numbers_that_all_change_by_one_factor_have_another_unit(factor: float) -> None:
    fault = only_fault(week().assign(price=week()["price"] * factor))
    number = float(fault.removeprefix("price: all its numbers are ").split(" ")[0])
    assert number == pytest.approx(factor, rel=0.1)
    assert fault.endswith("times what they were; if its unit changed, convert it in the source")


@pytest.mark.parametrize("change", ["prices rise", "the half doubles", "all shift"])
def test_numbers_that_move_otherwise_are_no_fault(change: str) -> None:
    price = week()["price"]
    moved = {
        "prices rise": price * 1.5,  # less than the factor 2 of the settings
        "the half doubles": price * np.where(price.index % 2, 5, 1),
        "all shift": price + 5,
    }
    found = watch(week().assign(price=moved[change]))
    assert found.columns["price"].verdict == "drifted"
    assert found.faults == ()


# ---------------------------------------------------------------- the last sound window


def test_a_window_is_compared_with_the_last_sound_one() -> None:
    """Prices that rose long ago are what they are; those that fall back at once are a fault."""
    high = week(1).assign(price=week(1)["price"] * 3)
    assert "price: all its numbers" in only_fault(high)
    before = watch(high).trace
    again = week(2).assign(price=week(2)["price"] * 3)
    assert faults(again, before=before) == []
    assert re.match(r"price: all its numbers are 0\.3\d+ times", only_fault(week(2), before=before))


def test_rows_that_stay_away_are_a_fault() -> None:
    before = watch(week()).trace
    assert before.rows_per_day == pytest.approx(4000 / 7)
    fault = only_fault(shop(2, 1500), before=before)
    assert fault == (
        "rows: 214 a day, 38% of the 571 before; below 50% a part of the feed is missing"
    )
    assert faults(shop(2, 2100), before=before) == []
    assert faults(shop(2, 1500)) == []  # the reference is a sample, and says nothing of volume


def test_a_trace_of_other_columns_is_not_compared() -> None:
    """A new champion may have bins of its own."""
    assert faults(week(), before=Trace({"channel": [1.0], "colour": [0.5, 0.5]}, {})) == []


# ---------------------------------------------------------------- the delivery


def test_the_delivery_is_judged_by_quarantine_and_age() -> None:
    settings = CONFIG.model_copy(update={"max_age_hours": 48.0})
    strict = Reference.of(past(), SHOP, settings)
    sound = Delivery(rows_in=10_000, quarantined=50, age_hours=48.0)
    assert measure(strict, week(), WINDOW, delivery=sound).faults == ()
    broken = Delivery(rows_in=10_000, quarantined=51, age_hours=49.5)
    assert measure(strict, week(), WINDOW, delivery=broken).faults == (
        "validation: 0.51% of 10,000 rows are in quarantine, more than max_quarantined_share "
        "0.50%; its report says why",
        "freshness: the newest exposure is 49.5 hours old, more than max_age_hours 48; look "
        "whether deliveries arrive",
    )
    # no bound on age by default
    assert len(faults(week(), delivery=broken)) == 1


@pytest.mark.parametrize("label", [0, 1])
def test_labels_that_are_all_alike_are_a_fault(label: int) -> None:
    found = watch(week().assign(bought=label))
    assert found.faults == ("bought: all 4,000 labels are alike; look whether outcomes arrive",)
    assert found.won is None


def test_a_few_labels_that_are_alike_or_none_are_no_fault() -> None:
    few = week()["bought"].where(week().index < 200) * 0
    assert faults(week().assign(bought=few)) == []
    assert faults(week().assign(bought=None)) == []


def test_faults_are_listed_together() -> None:
    both = changed(week(), channel=None).assign(price=week()["price"] * 10)
    found = faults(both, delivery=Delivery(100, 10), before=reference().trace)
    assert [fault.split(":")[0] for fault in found] == ["channel", "price", "validation"]
