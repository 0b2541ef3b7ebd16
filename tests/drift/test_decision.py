"""The decision: what a window is expected to cost, how often it said so, and what forbids it."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from fathom.drift import (
    ColumnDrift,
    Decision,
    Measurement,
    Severity,
    Trace,
    Window,
    Won,
    decide,
    last_sound,
    nothing_to_watch,
)
from shop import CONFIG, WINDOW, changed, watch, week

BOUND = 0.001


def measured(
    won: float | None = 0.0,
    at_stake: float = 0.0,
    faults: tuple[str, ...] = (),
    weeks: int = 0,
) -> Measurement:
    """A window in which so much can be won back; with None, labels do not tell.

    Args:
        weeks: after `WINDOW`.
    """
    later = timedelta(weeks=weeks)
    verdict = "drifted" if at_stake else "stable"
    channel = ColumnDrift("categorical", "jensenshannon", 0.3, 0.1, verdict, 0.2, at_stake)
    return Measurement(
        Window(WINDOW.start + later, WINDOW.end + later),
        {"reference": 16000, "current": 4000},
        {"channel": channel, "probability": replace(channel, verdict="stable", at_stake=0.0)},
        {},
        None if won is None else Won(won + BOUND, BOUND, 1.5 * BOUND, {"channel": won}),
        ("window has 0 labels 1, fewer than min_labels 300",) if won is None else (),
        faults,
        Trace({"channel": [0.5, 0.5]}, {}, 571.0 + weeks),
        {},
        None,
    )


def series(*windows: float | Measurement, version: str = "v1", **config: Any) -> list[Decision]:
    """Decide on windows, week after week, each with the history so far."""
    settings = CONFIG.model_copy(update=config)
    history: list[Decision] = []
    for week_, window in enumerate(windows):
        found = window if isinstance(window, Measurement) else measured(window, weeks=week_)
        history.append(decide(found, history, settings, version))
    return history


# ---------------------------------------------------------------- what it is expected to cost


@pytest.mark.parametrize(
    ("won", "severity"),
    [
        (0.0, "none"),
        (0.0024, "none"),
        (0.0026, "minor"),
        (0.0049, "minor"),
        (0.0051, "major"),
        (0.0199, "major"),
        (0.0201, "critical"),
    ],
)
def test_severity_is_of_the_loss_that_can_be_won_back(won: float, severity: Severity) -> None:
    decision = decide(measured(won), (), CONFIG)
    assert decision.severity == severity
    if won:
        assert decision.evidence["expected_loss"] == pytest.approx(won)
    assert decision.evidence["confirmed"] is True


def test_a_window_like_those_without_drift_asks_for_nothing() -> None:
    decision = decide(measured(0.0004), (), CONFIG)
    assert (decision.retrain, decision.severity) == (False, "none")
    assert decision.evidence["expected_loss"] == 0
    assert decision.reasons == (
        "loss: 0.14% could be won back, as in windows without drift (at most 0.15%)",
    )


def test_a_reason_says_how_much_and_by_what() -> None:
    assert decide(measured(0.03), (), CONFIG).reasons == (
        "loss: 3.10% could be won back, 3.00% more than is usual (≥ 0.50%), by channel 3.00%",
    )
    assert "(< 0.50%)" in decide(measured(0.003), (), CONFIG).reasons[0]


def test_drift_that_costs_nothing_does_not_retrain() -> None:
    """Labels have the word: the model is right about the new mix, too."""
    first, second = series(measured(0.0, at_stake=0.3), measured(0.0, at_stake=0.3, weeks=1))
    assert (second.retrain, second.severity) == (False, "none")
    assert second.reasons[1] == (
        "features: 1 of 1 drifted; by how much the model leans on them, 30.00% of the loss is at "
        "stake: channel jensenshannon 0.300 ≥ 0.1"
    )
    assert first.severity == "none"


# ---------------------------------------------------------------- without labels


@pytest.mark.parametrize(
    ("at_stake", "severity"),
    [(0.024, "none"), (0.026, "minor"), (0.051, "major"), (0.19, "major"), (0.21, "critical")],
)
def test_without_labels_drifted_features_have_to_put_more_at_stake(
    at_stake: float, severity: Severity
) -> None:
    """Ten times as much here: `unconfirmed_loss` 0.05 stands where `min_loss` 0.005 would."""
    decision = decide(measured(None, at_stake), (), CONFIG)
    assert decision.severity == severity
    assert decision.evidence["confirmed"] is False
    features, data = decision.reasons[:2]
    assert "at stake, unconfirmed by labels: channel" in features
    assert data == "data: window has 0 labels 1, fewer than min_labels 300"


# ---------------------------------------------------------------- in time


def test_a_second_window_has_to_ask_for_it_too() -> None:
    first, second = series(0.01, 0.01)
    assert (first.retrain, second.retrain) == (False, True)
    assert first.reasons[-1] == "waiting: window 1 of 2 in a row that asks for it"
    assert "waiting" not in "".join(second.reasons)


def test_windows_that_ask_have_to_follow_one_another() -> None:
    assert [d.retrain for d in series(0.01, 0.001, 0.01, 0.01)] == [False, False, False, True]
    found = series(0.01, 0.01, 0.01, persistence=3)
    assert [d.retrain for d in found] == [False, False, True]
    assert found[1].reasons[-1] == "waiting: window 2 of 3 in a row that asks for it"
    assert series(0.01, persistence=1)[0].retrain


def test_after_a_retraining_comes_a_cool_down() -> None:
    found = series(0.01, 0.01, 0.01, 0.01, 0.01)
    assert [d.retrain for d in found] == [False, True, False, False, True]
    assert found[2].reasons[-1] == (
        "waiting: 1 windows since the last retraining, and the cool-down is 2"
    )
    assert found[3].reasons[-1].startswith("waiting: 2 windows")
    assert [d.retrain for d in series(0.01, 0.01, 0.01, cool_down=0)] == [False, True, True]


def test_a_critical_window_waits_for_nothing() -> None:
    assert [d.retrain for d in series(0.03, 0.03)] == [True, True]


def test_what_another_champion_did_does_not_count_but_its_retraining_does() -> None:
    asked = series(0.01, version="v0")
    later = decide(measured(0.01, weeks=1), asked, CONFIG, "v1")
    assert later.reasons[-1] == "waiting: window 1 of 2 in a row that asks for it"
    # v1 is what the retraining of week 1 brought; it is given time.
    retrained = series(0.01, 0.01, version="v0")
    cooling = [*retrained, decide(measured(0.01, weeks=2), retrained, CONFIG, "v1")]
    last = decide(measured(0.01, weeks=3), cooling, CONFIG, "v1")
    assert "cool-down" in last.reasons[-1]
    assert not last.retrain


def test_a_window_that_is_decided_again_gives_the_same() -> None:
    history = series(0.01, 0.01, 0.01)
    for place, decision in enumerate(history):
        again = decide(measured(0.01, weeks=place), history, CONFIG, "v1")
        assert again == decision


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize("won", [0.01, 0.03])
def test_alerts_never_retrain(won: float) -> None:
    alerts = ("price: all null; mend the source rather than retrain on it",)
    (_, second) = series(0.01, measured(won, faults=alerts, weeks=1))
    assert second.alerts == alerts
    assert not second.retrain
    assert second.reasons[-1] == ("waiting: a fault of the data is no training set; mend it first")


def test_a_window_with_a_fault_does_not_ask() -> None:
    faulty = measured(0.01, faults=("rows: 9 a day",))
    assert [d.retrain for d in series(faulty, 0.01, 0.01)] == [False, False, True]


def test_the_last_sound_window_is_this_champions_newest_without_faults() -> None:
    faulty = measured(faults=("rows: 9 a day",), weeks=2)
    history = [*series(0.0, 0.0, faulty), *series(measured(weeks=3), version="v2")]
    trace = last_sound(history, "v1")
    assert trace == measured(weeks=1).trace
    assert last_sound(history, "v3") is None
    assert last_sound([], "v1") is None


def test_a_small_window_is_not_decided_on() -> None:
    decision = decide(watch(week().iloc[:10]), series(0.01), CONFIG, "v1")
    assert (decision.retrain, decision.severity, decision.alerts) == (False, "none", ())
    assert decision.reasons == ("data: current has 10 rows, fewer than min_rows 1000: no verdict",)


def test_without_a_champion_there_is_a_model_to_train() -> None:
    decision = nothing_to_watch(WINDOW)
    assert (decision.retrain, decision.version) == (True, None)
    assert "there is no champion" in decision.reasons[0]


# ---------------------------------------------------------------- what comes out


def test_a_decision_survives_json() -> None:
    """A whole one, with everything that a window can have."""
    current = changed(week(), price=week()["price"] * 3, product=None)
    decision = decide(watch(current), (), CONFIG, "v1")
    plain = json.loads(json.dumps(decision.to_json(), allow_nan=False))
    again = Decision.from_json(plain | {"bento_tag": "added by others"})
    assert again.to_json() == plain
    assert again.trace == decision.trace == watch(current).trace
    assert list(plain) == [
        "retrain",
        "reasons",
        "severity",
        "alerts",
        "window",
        "version",
        "evidence",
    ]
    assert plain["window"] == {"start": "2024-04-29T00:00:00Z", "end": "2024-05-06T00:00:00Z"}
    assert plain["evidence"]["columns"]["product"]["verdict"] == "no data"
    assert set(plain["evidence"]) == {
        "expected_loss",
        "confirmed",
        "columns",
        "quality",
        "won",
        "rows",
        "trace",
    }


def test_many_drifted_features_are_named_by_what_they_put_at_stake() -> None:
    drift = ColumnDrift("numeric", "psi", 0.3, 0.1, "drifted")
    columns = {f"c{i}": replace(drift, at_stake=i / 100) for i in range(8)}
    output = {"probability": replace(drift, score=0.25)}
    found = replace(measured(0.0), columns=columns | output)
    features, predictions = decide(found, (), CONFIG).reasons[1:]
    assert features.startswith("features: 8 of 8 drifted; ")
    assert ": c7 psi 0.300 ≥ 0.1; c6 psi" in features
    assert features.endswith("; c3 psi 0.300 ≥ 0.1; and 3 more")
    assert predictions == "features: predictions drifted: psi 0.250 ≥ 0.1"


# ---------------------------------------------------------------- growth

GROWTH = "growth: there are 1.60 times the rows that the champion has learnt from (≥ 1.5)"


def test_data_that_have_outgrown_the_champion_ask_at_once() -> None:
    decision = decide(measured(0.0), (), CONFIG, "v1", GROWTH)
    assert (decision.retrain, decision.severity) == (True, "none")
    assert GROWTH in decision.reasons


def test_growth_waits_for_the_cool_down_and_for_sound_data() -> None:
    (first,) = series(0.03)
    assert first.retrain
    again = decide(measured(0.0, weeks=1), [first], CONFIG, "v2", GROWTH)
    assert not again.retrain
    assert (
        again.reasons[-1] == "waiting: 1 windows since the last retraining, and the cool-down is 2"
    )
    broken = decide(measured(0.0, faults=("price: all null",)), (), CONFIG, "v1", GROWTH)
    assert not broken.retrain
    assert "waiting: a fault of the data is no training set; mend it first" in broken.reasons


def test_whatever_asks_waits_until_there_is_something_newer_to_learn() -> None:
    why = "waiting: the champion has learnt what there is"
    for asking in (
        decide(measured(0.03), (), CONFIG, "v1", None, why),
        decide(measured(0.0), (), CONFIG, "v1", GROWTH, why),
    ):
        assert not asking.retrain
        assert asking.reasons[-1] == why
    assert why not in decide(measured(0.0), (), CONFIG, "v1", None, why).reasons
