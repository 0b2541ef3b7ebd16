"""Thresholds rest on the champion's own days: windows without drift stay below, and just below."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fathom.drift import MonitoringConfig, MonitoringError, Reference, scores
from fathom.drift.reference import Labelled, Usual, _drawn_days
from shop import CONFIG, SHOP, START, WEEK, drifted, past, reference, shop, spec, watch, week


def usual(frame: pd.DataFrame, labelled: int = 0, **config: Any) -> Usual:
    """What is usual for a week of the shop, by a reference of these rows."""
    settings = MonitoringConfig(**(CONFIG.model_dump() | config))
    return Reference.of(frame, SHOP, settings).usual(7, WEEK, labelled)


# ---------------------------------------------------------------- calibration


def test_windows_without_drift_are_hardly_ever_called_drifted() -> None:
    """In one window in a hundred any column may be, so that two of thirty are a few too many."""
    found = [watch(shop(seed)) for seed in range(100, 130)]
    assert sum(bool(drifted(window)) for window in found) <= 2
    assert [window.faults for window in found] == [()] * 30
    assert max(window.won.excess for window in found if window.won) == 0


def test_thresholds_lie_just_above_what_windows_without_drift_show() -> None:
    """Or drift would hide below them, above all in columns of few bins, or of rare ones."""
    kept = reference()
    thresholds = kept.usual(7, WEEK, 0)
    was = {name: kept.counts(name, codes) for name, codes in kept.codes.items()}
    coded = [kept.coded(shop(seed)) for seed in range(200, 260)]
    for name, form in kept.forms.items():
        windows = [kept.counts(name, codes[name]) for codes in coded]
        highest = max(scores.score(form.method, was[name], now) for now in windows)
        # PSI jumps where a rare bin is empty, which makes the draws of such a column wider.
        assert highest < thresholds.scores[name] < 5 * highest, name
        moved = max(scores.moved(was[name], now) for now in windows)
        assert moved < 1.2 * thresholds.moved[name] < 5 * moved, name


def test_a_smaller_window_may_lie_further_off() -> None:
    small, large = (reference().usual(7, rows, 0).scores for rows in (500, WEEK))
    assert all(small[name] > 1.5 * large[name] for name in ("price", "channel", "history.first"))


def test_the_weeks_rhythm_is_no_drift_and_hides_none() -> None:
    """At weekends the shop is full; seven days hold one weekend, whichever they are."""

    def rhythm(weekday: np.ndarray) -> np.ndarray:
        return np.where(weekday[:, None] >= 5, [[0.1, 0.2, 0.7]], [[0.7, 0.2, 0.1]])

    frame = past(mix=rhythm)
    plain, weekly = usual(past()).scores["channel"], usual(frame).scores["channel"]
    assert weekly < 2 * plain
    kept = Reference.of(frame, SHOP, CONFIG)
    was = kept.counts("channel", kept.codes["channel"])
    for mix, expected in ((rhythm, False), (lambda day: rhythm(day + 1), True)):
        now = kept.counts("channel", kept.coded(shop(3, mix=mix))["channel"])
        assert (scores.score("jensenshannon", was, now) >= weekly) == expected


def test_a_drawn_window_has_the_weekdays_of_a_real_one_and_no_day_twice() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        days = _drawn_days(np.arange(28), 7, draw)
        assert sorted(days % 7) == list(range(7))
        first, second = _drawn_days(np.arange(28), 2, draw) % 7
        assert (first + 1) % 7 == second
        # of days that miss all Mondays, another takes their place
        assert len(set(_drawn_days(np.arange(28)[np.arange(28) % 7 > 0], 14, draw))) == 14


def test_too_short_a_reference_uses_the_stated_thresholds() -> None:
    two_weeks, less = past(weeks=2), past(weeks=2)
    less = less[less["event_timestamp"] < START + timedelta(days=27)]
    stated = usual(less, numeric_threshold=0.3, categorical_threshold=0.25)
    assert stated.scores["price"] == stated.scores["tags.length"] == 0.3
    assert stated.scores["channel"] == stated.scores["product"] == 0.25
    assert (stated.won, stated.most_won) == (0.0, 0.0)
    assert usual(two_weeks).scores["price"] < 0.1


def test_what_a_model_could_win_back_anyway_is_usual() -> None:
    """A model that is always too sure: each window shows it, and none stands out by it."""
    frame = past()
    frame["probability"] = frame["probability"].where(frame["channel"] != "shop", 0.5)
    typical = usual(frame, labelled=WEEK)
    assert 0.02 < typical.won < typical.most_won < 2 * typical.won
    assert usual(frame).won == 0.0


def test_a_reference_is_the_same_again() -> None:
    frame, odd = past(), past().set_axis(np.arange(4 * WEEK)[::-1] * 7)
    before = odd.copy(deep=True)
    assert usual(frame, WEEK) == usual(odd, WEEK) == reference().usual(7, WEEK, WEEK)
    pd.testing.assert_frame_equal(odd, before)
    assert usual(frame, WEEK, seed=1) != usual(frame, WEEK)


# ---------------------------------------------------------------- labels


def test_rows_count_as_labelled_where_there_is_a_label_and_a_prediction() -> None:
    frame = (
        week()
        .head(6)
        .assign(bought=[1, 0, None, 1, None, 0], probability=[0.5, 0.1, 0.2, None, None, 0.3])
    )
    found = Labelled.of(frame, SHOP)
    assert found.rows.tolist() == [0, 1, 5]
    assert found.label.tolist() == [1, 0, 0]
    assert found.logit[0] == 0
    none = Labelled.of(frame.drop(columns="bought"), SHOP)
    assert (len(none.rows), len(none.label), len(none.fold)) == (0, 0, 0)


def test_the_last_label_value_is_the_positive_one() -> None:
    two = spec({"name": "price", "kind": "numeric"}, label={"name": "bought", "values": (1, 2)})
    found = Labelled.of(week().assign(bought=week()["bought"] + 1), two)
    assert found.label.tolist() == week()["bought"].tolist()


def test_a_user_is_in_the_same_quarter_in_every_frame() -> None:
    quarters = {}
    for frame in (week(1), week(2)):
        of_users = pd.Series(Labelled.of(frame, SHOP).fold).groupby(frame["shopper"])
        assert (of_users.min() == of_users.max()).all()
        quarters[len(quarters)] = of_users.min()
    both = pd.concat(quarters, axis=1).dropna()
    assert (both[0] == both[1]).all()
    assert both[0].value_counts(normalize=True).between(0.15, 0.35).tolist() == [True] * 4


# ---------------------------------------------------------------- bad input


def test_a_reference_without_rows_is_a_fault() -> None:
    with pytest.raises(MonitoringError, match="reference: has no rows; build it from the champion"):
        Reference.of(week().iloc[:0], SHOP, CONFIG)


def test_all_faults_of_a_reference_are_reported_together() -> None:
    bad = week().drop(columns=["visits", "probability"]).assign(price="cheap")
    with pytest.raises(MonitoringError) as caught:
        Reference.of(bad, SHOP, CONFIG.model_copy(update={"thresholds": {"prise": 0.3}}))
    assert caught.value.faults == [
        "reference: lacks the columns visits, probability",
        "reference: price: numeric columns hold numbers, found string, first 'cheap'",
        "thresholds: 'prise' is not watched; choose from price, visits, channel, product, "
        "tags.length, tags.member, history.length, history.first, probability",
    ]
    assert str(caught.value).startswith("monitoring: 3 faults\n  - reference: lacks")
