"""A window beside the reference: what drifted, quality, what the model leans on, bad input."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from math import sqrt
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from sklearn.metrics import log_loss, roc_auc_score

from fathom.drift import MonitoringError, Reference, Window, leaning, measure
from shop import (
    CONFIG,
    SHOP,
    WEEK,
    WINDOW,
    changed,
    drifted,
    past,
    reference,
    shop,
    spec,
    watch,
    week,
)

NOW = week()
PLANTED = {
    "price tripled": ({"price"}, NOW.assign(price=NOW["price"] * 3)),
    "visits double": ({"visits"}, NOW.assign(visits=NOW["visits"] + (NOW.index % 2))),
    "category gone": ({"channel"}, changed(NOW, channel=NOW["channel"].replace("shop", "app"))),
    "category new": ({"channel"}, changed(NOW, share=0.1, channel="kiosk")),
    "ids new": ({"product"}, changed(NOW, share=0.4, product=[f"q{i % 90}" for i in NOW.index])),
    "tags fewer": ({"tags.length", "tags.member"}, changed(NOW, tags=[["big"] for _ in NOW.index])),
    "history long": (
        {"history.length"},
        changed(NOW, history=[h + h if h else h for h in NOW["history"]]),
    ),
    "history replaced": (
        {"history.first"},
        changed(NOW, history=[[f"q{i}", *h[1:]] if h else h for i, h in enumerate(NOW["history"])]),
    ),
    "predictions": ({"probability"}, NOW.assign(probability=NOW["probability"] ** 0.5)),
}


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_shift_is_found_where_it_is(plant: str) -> None:
    expected, current = PLANTED[plant]
    assert drifted(watch(current, labels=False)) == expected


def test_one_column_may_have_a_threshold_of_its_own() -> None:
    current = NOW.assign(price=NOW["price"] * 3)
    score = watch(current).columns["price"].score
    assert score is not None
    for threshold, verdict in ((score, "drifted"), (score + 1e-5, "stable")):
        settings = CONFIG.model_copy(update={"thresholds": {"price": threshold}})
        column = measure(Reference.of(past(), SHOP, settings), current, WINDOW).columns["price"]
        assert (column.threshold, column.verdict) == (pytest.approx(threshold), verdict)


def test_what_is_at_stake_is_how_much_the_model_leans_on_what_moved() -> None:
    """A tenth of the rows has a new channel, on which a tenth of the loss leans."""
    column = watch(changed(NOW, share=0.1, channel="kiosk")).columns["channel"]
    usual = reference().usual(7, WEEK, WEEK).moved["channel"]
    share = (changed(NOW, share=0.1, channel="kiosk")["channel"] == "kiosk").mean()
    assert column.leaning == 0.1
    assert column.at_stake == pytest.approx(0.1 * (share - usual), abs=0.002)
    assert watch(NOW).at_stake == 0
    assert watch(PLANTED["visits double"][1]).at_stake == 0  # the model does not look at it


@pytest.mark.parametrize("column", ["price", "channel", "product", "history", "probability"])
def test_a_column_without_data_has_no_score(column: str) -> None:
    found = watch(NOW.assign(**{column: None})).columns
    for name in {"history": ["history.length", "history.first"]}.get(column, [column]):
        assert (found[name].score, found[name].verdict) == (None, "no data")


def test_a_column_that_the_reference_lacks_has_none_either() -> None:
    kept = Reference.of(past().assign(price=None), SHOP, CONFIG)
    column = measure(kept, NOW, WINDOW).columns["price"]
    assert (column.score, column.threshold, column.verdict) == (None, 0.0, "no data")


def test_rows_of_the_window_are_counted_before_it_was_sampled() -> None:
    found = measure(reference(), NOW.head(3000), WINDOW, total=70_000)
    assert found.rows == {"reference": 4 * WEEK, "current": 70_000, "sampled": 3000}
    assert found.trace.rows_per_day == 10_000


def test_frames_are_left_as_they_are_and_any_index_will_do() -> None:
    odd = NOW.set_axis(np.arange(len(NOW))[::-1] * 7)
    before = odd.copy(deep=True)
    found, plain = watch(odd), watch(NOW)
    assert (found.columns, found.won, found.quality) == (plain.columns, plain.won, plain.quality)
    pd.testing.assert_frame_equal(odd, before)


# ---------------------------------------------------------------- quality


def test_quality_is_measured_as_scikit_learn_does() -> None:
    quality = watch(NOW).quality
    for side, frame in (("reference", past()), ("current", NOW)):
        bought, probability = frame["bought"], frame["probability"]
        assert quality[side]["rows"] == len(frame)
        assert quality[side]["auc"] == pytest.approx(roc_auc_score(bought, probability))
        assert quality[side]["logloss"] == pytest.approx(log_loss(bought, probability))
        assert quality[side]["calibration"] == pytest.approx(probability.sum() / bought.sum())


def test_late_labels_are_left_out() -> None:
    late = watch(NOW.assign(bought=NOW["bought"].where(NOW.index < 3500)))
    expected = roc_auc_score(NOW["bought"][:3500], NOW["probability"][:3500])
    assert late.quality["current"]["auc"] == pytest.approx(expected)
    assert late.rows["current"] == WEEK


def test_what_can_be_won_back_is_found_where_it_is() -> None:
    """The shop sells far more than it did, which the model does not know."""
    current = shop(1)
    luck = np.random.default_rng(9).random(len(current))
    logit = np.log(current["probability"] / (1 - current["probability"]))
    right = 1 / (1 + np.exp(-logit - 1.5 * (current["channel"] == "shop")))
    won = watch(current.assign(bought=(luck < right).astype(int))).won
    assert won is not None
    assert max(won.columns, key=lambda name: won.columns[name]) == "channel"
    assert won.share > won.bound
    assert won.excess == won.share - won.usual > 0.003


def test_a_shift_of_all_predictions_is_of_no_column_that_is_all_alike() -> None:
    won = watch(NOW.assign(product=None, probability=NOW["probability"] ** 0.5)).won
    assert won is not None
    assert next(iter(won.columns)) == "(all rows)"
    assert "product" not in won.columns


@pytest.mark.parametrize(
    ("bought", "causes"),
    [
        (None, ("window has 0 labels 0, ", "window has 0 labels 1, ")),
        ([1, 0] * 200 + [None] * 3600, ("window has 200 labels 0, ", "window has 200 labels 1, ")),
        ([0] * WEEK, ("window has 0 labels 1, ",)),
    ],
)
def test_too_few_labels_do_not_tell(bought: Any, causes: tuple[str, ...]) -> None:
    found = watch(NOW.assign(bought=bought))
    assert found.unlabelled == tuple(f"{cause}fewer than min_labels 300" for cause in causes)
    assert (found.won, found.quality, found.labelled) == (None, {}, None)


def test_labels_may_be_absent_on_either_side() -> None:
    assert watch(NOW, labels=False).unlabelled[0] == (
        "reference has 0 labels 0, fewer than min_labels 300"
    )
    assert watch(NOW.drop(columns="bought")).unlabelled[0].startswith("window has 0 labels 0")


def test_a_regression_is_measured_by_its_error() -> None:
    stars = spec(
        {"name": "price", "kind": "numeric"},
        task="regression",
        label={"name": "stars", "values": None},
    )

    def frame(rows: pd.DataFrame, seed: int, off: float = 0.0) -> pd.DataFrame:
        random = np.random.default_rng(seed)
        right = random.normal(3, 1, len(rows))
        noise = random.normal(size=len(rows))
        return rows.assign(probability=right + off, stars=right + noise)

    kept = Reference.of(frame(past(), 0), stars, CONFIG)
    found = measure(kept, frame(NOW, 1, off=0.5), WINDOW)
    current = frame(NOW, 1, off=0.5)
    rmse = sqrt(((current["stars"] - current["probability"]) ** 2).mean())
    assert found.quality["current"]["rmse"] == pytest.approx(rmse)
    # of a mean squared error of 1 + 0.25, the 0.25
    assert found.won is not None
    assert found.won.share == pytest.approx(0.2, abs=0.03)
    few = measure(kept, current.assign(stars=current["stars"].where(NOW.index < 9)), WINDOW)
    assert few.unlabelled == ("window has 9 labels, fewer than min_labels 300",)


# ---------------------------------------------------------------- leaning


def test_the_model_leans_on_the_column_that_matters() -> None:
    random = np.random.default_rng(0)
    price, visits = random.normal(size=(2, 4000))
    label = (random.random(4000) < 1 / (1 + np.exp(-2 * price))).astype(int)
    rows = pa.table({"price": price, "visits": visits, "bought": label})
    two = spec({"name": "price", "kind": "numeric"}, {"name": "visits", "kind": "numeric"})

    def score(table: pa.Table) -> np.ndarray:
        return 1 / (1 + np.exp(-2 * table["price"].to_numpy()))

    found = leaning(score, rows, two, CONFIG)
    shuffled = np.mean([log_loss(label, score(rows.take(random.permutation(4000)))) for _ in "abc"])
    by_hand = shuffled / log_loss(label, score(rows)) - 1
    assert found == {"price": pytest.approx(by_hand, rel=0.1), "visits": 0.0}
    assert leaning(score, rows, two, CONFIG) == found
    fewer = CONFIG.model_copy(update={"leaning_rows": 1000})
    assert leaning(score, rows, two, fewer)["price"] == pytest.approx(by_hand, rel=0.2)


def test_without_labels_it_is_not_known_what_the_model_leans_on() -> None:
    rows = pa.table({"price": [1.0, 2.0], "bought": pa.array([None, None], pa.int64())})
    one = spec({"name": "price", "kind": "numeric"})
    assert leaning(lambda table: np.ones(len(table)), rows, one, CONFIG) == {}


# ---------------------------------------------------------------- bad input


def test_all_faults_are_reported_together() -> None:
    bad = NOW.drop(columns=["price", "tags"]).assign(
        channel=7, history="p1", bought=3, probability=1.5
    )
    bad.loc[:9, "event_timestamp"] = WINDOW.end + timedelta(days=1)
    with pytest.raises(MonitoringError) as caught:
        watch(bad)
    assert caught.value.faults == [
        "current: lacks the columns price, tags",
        "current: channel: categorical columns hold strings, found integer, first 7",
        "current: history: sequence columns hold lists, found 'p1'",
        "current: bought: [3] not among [0, 1]",
        "current: probability: 1.5 to 1.5, not within 0 to 1",
        "current: event_timestamp: 10 rows lie outside the window 2024-04-29T00:00:00+00:00 to "
        "2024-05-06T00:00:00+00:00; select the rows by it",
    ]


def test_times_without_a_zone_are_utc_and_bad_ones_lie_outside() -> None:
    naive = NOW.assign(event_timestamp=NOW["event_timestamp"].dt.tz_localize(None))
    assert watch(naive).columns == watch(NOW).columns
    with pytest.raises(MonitoringError, match="4000 rows lie outside the window"):
        watch(NOW.assign(event_timestamp="yesterday"))


def test_a_window_is_in_utc_and_does_not_end_before_it_starts() -> None:
    naive = Window(datetime(2024, 4, 29), datetime(2024, 5, 6))
    assert naive == WINDOW == Window(datetime(2024, 4, 29, tzinfo=UTC), WINDOW.end)
    with pytest.raises(ValueError, match=r"ends at 2024-04-29 .* before it starts at 2024-05-06"):
        Window(WINDOW.end, WINDOW.start)


@pytest.mark.parametrize("rows", [0, 999])
def test_a_small_window_gets_no_verdict(rows: int) -> None:
    trace = watch(NOW).trace
    found = watch(NOW.iloc[:rows].assign(price=1e9), before=trace)
    assert found.unlabelled == (f"current has {rows} rows, fewer than min_rows 1000: no verdict",)
    assert found.rows == {"reference": 4 * WEEK, "current": rows, "sampled": rows}
    assert (found.columns, found.faults, found.won) == ({}, (), None)
    assert found.trace == trace  # for the next window, which is compared with the one before


def test_a_small_reference_gives_no_verdict_either() -> None:
    found = measure(Reference.of(past().iloc[:500], SHOP, CONFIG), NOW, WINDOW)
    assert "reference has 500 rows" in found.unlabelled[0]
