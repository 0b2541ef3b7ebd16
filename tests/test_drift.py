"""Drift: what is watched, scores worked out by hand, planted changes, and the decision's words.

One window without drift and one for each way in which a window can drift, all made from the same
generator, so that a test changes one thing and looks where it shows.
"""

from __future__ import annotations

import html
import json
import re
from datetime import UTC, datetime, timedelta
from math import log, nan, sqrt
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.metrics import log_loss, roc_auc_score

from fathom.drift import (
    ColumnDrift,
    Decision,
    Monitoring,
    MonitoringConfig,
    MonitoringError,
    Watched,
    Window,
    _columns,
    _deciles,
    _Pair,
    column_kinds,
    monitor,
)
from fathom.spec import FeatureSpec

CONF = Path(__file__).parents[1] / "conf" / "base" / "parameters_monitoring.yml"
WINDOW = Window(datetime(2024, 5, 1, tzinfo=UTC), datetime(2024, 5, 8, tzinfo=UTC))
CONFIG = MonitoringConfig(min_rows=1000)
ROWS = 4000


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


def shop(seed: int, rows: int = ROWS) -> pd.DataFrame:
    """Rows of one unchanging shop: 400 products of very different popularity, counts mostly 0."""
    random = np.random.default_rng(seed)
    popularity = 1 / np.arange(1, 401)
    products = [f"p{i}" for i in range(400)]
    popular = random.choice(products, (rows, 5), p=popularity / popularity.sum())
    lengths = random.integers(0, 5, rows)
    probability = random.beta(0.5, 1, rows)
    return pd.DataFrame(
        {
            "price": np.where(random.random(rows) < 0.1, nan, random.lognormal(size=rows)),
            "visits": random.poisson(0.3, rows).astype(float),
            "channel": random.choice(["app", "web", "shop"], rows, p=[0.6, 0.3, 0.1]),
            "product": popular[:, 0],
            "tags": [sorted({"new", "red", "big"} - {t}) for t in random.choice(["new", ""], rows)],
            "history": [list(p[:n]) for p, n in zip(popular, lengths, strict=True)],
            "probability": probability,
            "bought": (random.random(rows) < probability).astype(int),
            "event_timestamp": WINDOW.start + timedelta(seconds=1) * random.integers(0, 9999, rows),
        }
    )


REFERENCE = shop(0)


def changed(frame: pd.DataFrame, seed: int = 5, share: float = 1.0, **columns: Any) -> pd.DataFrame:
    """The frame with the given columns in that share of its rows."""
    rows = np.random.default_rng(seed).random(len(frame)) < share
    result = frame.copy()
    for name, values in columns.items():
        column = values if isinstance(values, pd.Series | list) else [values] * len(frame)
        column = pd.Series(column, index=frame.index, dtype=object if name != "price" else None)
        result[name] = result[name].where(~rows, column)
    return result


def watch(
    current: pd.DataFrame, reference: pd.DataFrame = REFERENCE, labels: bool = False, **config: Any
) -> Monitoring:
    """Monitor the shop; most tests are of drift and leave the labels out, which saves half."""
    if not labels:
        current, reference = (f.drop(columns="bought") for f in (current, reference))
    settings = MonitoringConfig(**(CONFIG.model_dump() | config))
    return monitor(reference, current, SHOP, settings, WINDOW)


def drifted(decision: Decision) -> set[str]:
    return {name for name, column in decision.columns.items() if column.verdict == "drifted"}


def one_column(
    kind: str, reference: list[Any], current: list[Any], **config: Any
) -> tuple[ColumnDrift, Decision]:
    """The drift of a single column ``x``, all else equal; of a list, see the decision."""
    frames = []
    for values in (reference, current):
        frames.append(
            pd.DataFrame({"x": values, "probability": 0.5, "event_timestamp": WINDOW.start})
        )
    settings = MonitoringConfig(**({"min_rows": 10} | config))
    decision = monitor(*frames, spec({"name": "x", "kind": kind}), settings, WINDOW).decision
    return next(iter(decision.columns.values())), decision


# ---------------------------------------------------------------- configuration and what is watched


def test_conf_states_the_defaults() -> None:
    stated = yaml.safe_load(CONF.read_text())["monitoring"]
    assert MonitoringConfig.model_validate(stated) == MonitoringConfig()
    assert set(stated) == set(MonitoringConfig.model_fields)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("drifted_share", 1.5, "less than or equal to 1"),
        ("numeric_threshold", 0.0, "greater than 0"),
        ("numeric_method", "ks", "'psi' or 'jensenshannon'"),
        ("min_rows", "many", "valid integer"),
        ("thresholds", {"price": -1.0}, "greater than 0"),
        ("colour", 1, "Extra inputs"),
    ],
)
def test_a_bad_setting_is_refused(key: str, value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MonitoringConfig.model_validate({key: value})


def test_every_column_is_watched_and_lists_by_their_length_and_a_value() -> None:
    assert column_kinds(SHOP) == (
        Watched("price", "numeric"),
        Watched("visits", "numeric"),
        Watched("channel", "categorical"),
        Watched("product", "categorical"),
        Watched("tags", "numeric", "length"),
        Watched("tags", "categorical", "member"),
        Watched("history", "numeric", "length"),
        Watched("history", "categorical", "first"),
        Watched("probability", "numeric"),
    )
    assert [w.name for w in column_kinds(SHOP)][4:8] == [
        "tags.length",
        "tags.member",
        "history.length",
        "history.first",
    ]


def test_a_window_is_in_utc_and_does_not_end_before_it_starts() -> None:
    assert Window(datetime(2024, 5, 1), datetime(2024, 5, 8)) == WINDOW
    with pytest.raises(ValueError, match=r"ends at 2024-05-01 .* before it starts at 2024-05-08"):
        Window(WINDOW.end, WINDOW.start)


# ---------------------------------------------------------------- scores by hand


def test_psi_of_categories_by_hand() -> None:
    # half and half against three quarters and one quarter
    column, _ = one_column(
        "categorical", ["a", "b"] * 50, ["a", "a", "a", "b"] * 25, categorical_method="psi"
    )
    by_hand = (0.5 - 0.75) * log(0.5 / 0.75) + (0.5 - 0.25) * log(0.5 / 0.25)
    assert column.score == pytest.approx(by_hand, abs=1e-6)
    assert column == ColumnDrift("categorical", "psi", column.score, 0.15, "drifted")


def test_values_that_the_reference_lacks_are_one_unknown_value() -> None:
    # 0.2 for c and d together; Evidently puts 0.0001 in the place of the reference's share of 0
    known = ["a", "b"] * 50
    current = [*known[:80], *["c", "d"] * 10]
    column, _ = one_column("categorical", known, current, categorical_method="psi")
    by_hand = 2 * (0.5 - 0.4) * log(0.5 / 0.4) + (0.0001 - 0.2) * log(0.0001 / 0.2)
    assert column.score == pytest.approx(by_hand, abs=1e-6)


def test_jensen_shannon_distance_of_categories_by_hand() -> None:
    # half and half against all in one; the mixture is (3/4, 1/4)
    column, _ = one_column("categorical", ["a", "b"] * 50, ["a"] * 100)
    was = 0.5 * log(0.5 / 0.75) + 0.5 * log(0.5 / 0.25)
    now = 1.0 * log(1.0 / 0.75)
    assert column.score == pytest.approx(sqrt((was + now) / 2), abs=1e-6)


def test_psi_of_numbers_by_hand() -> None:
    # 1 … 100 has ten tenths of ten; the window has only the upper five, twice as often. Evidently
    # puts 0.0001 in the place of a share of 0.
    numbers = [float(i) for i in range(1, 101)]
    column, _ = one_column("numeric", numbers, numbers[50:] * 2)
    by_hand = 5 * (0.1 - 0.0001) * log(0.1 / 0.0001) + 5 * (0.1 - 0.2) * log(0.1 / 0.2)
    assert column.score == pytest.approx(by_hand, abs=1e-6)
    assert column == ColumnDrift("numeric", "psi", column.score, 0.2, "drifted")


def test_an_outlier_does_not_hide_a_drift() -> None:
    """With bins of equal width, all other values would fall in the first, on both sides."""
    numbers = [float(i) for i in range(1, 101)]
    plain, _ = one_column("numeric", numbers, numbers[50:] * 2)
    outlier, _ = one_column("numeric", [*numbers[:99], 1e9], [*numbers[50:99], 1e9] * 2)
    assert outlier == plain


def test_missing_and_infinite_numbers_are_a_value_of_their_own() -> None:
    numbers = [float(i) for i in range(1, 101)]
    half = [nan if i % 2 else i for i in numbers]
    column, _ = one_column("numeric", half, numbers)
    # every tenth doubles from 0.05 to 0.1, and what was missing (0.5) is gone (0.0001)
    by_hand = 10 * 0.05 * log(2) + (0.5 - 0.0001) * log(0.5 / 0.0001)
    assert column.score == pytest.approx(by_hand, abs=1e-6)
    infinite = [float("inf") if i % 2 else i for i in numbers]
    assert one_column("numeric", infinite, half)[0].score == 0


@pytest.mark.parametrize("now", [4.0, 6.0])
def test_a_constant_is_stable_until_it_changes(now: float) -> None:
    assert one_column("numeric", [5.0] * 100, [5.0] * 100)[0].verdict == "stable"
    assert one_column("numeric", [5.0] * 100, [now] * 100)[0].verdict == "drifted"


def test_kinds_of_numbers() -> None:
    numbers = list(range(1, 101))
    for same in (
        pd.Series(numbers, dtype="Int64"),
        pd.Series(numbers, dtype="float32"),
        pd.Series(numbers, dtype=object),
    ):
        assert one_column("numeric", numbers, same)[0].score == 0
    nullable = pd.Series([*numbers[:90], *[None] * 10], dtype="Int64")
    assert one_column("numeric", [*numbers[:90], *[None] * 10], nullable)[0].score == 0
    assert one_column("numeric", [True, False] * 50, [False, True] * 50)[0].score == 0


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60),
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20),
)
def test_a_larger_number_is_never_in_a_lower_bin(was: list[float], now: list[float]) -> None:
    known = pd.Series(was)
    _, coded = _deciles(known, (known, pd.Series(sorted(now))))
    bins = [int(name[:2]) for name in coded]
    assert bins == sorted(bins)
    assert max(bins) <= 10


def test_a_sequence_is_read_at_its_newest_value_and_a_set_at_any() -> None:
    """Swapping all pairs changes every first value and no set."""
    was, now = [["a", "b"]] * 100, [["b", "a"]] * 100
    _, sequence = one_column("sequence", was, now)
    _, members = one_column("multi", was * 20, now * 20)
    assert sequence.columns["x.first"].score == pytest.approx(sqrt(log(2)), abs=1e-6)
    assert members.columns["x.member"].verdict == "stable"
    assert sequence.columns["x.length"].score == members.columns["x.length"].score == 0


# ---------------------------------------------------------------- ids


def ids(counts: dict[str, int]) -> list[str]:
    return [name for name, count in counts.items() for _ in range(count)]


def test_ids_are_compared_by_how_often_the_reference_saw_them() -> None:
    # 4 ids of 20 rows, 20 of one row. Of the median row's count, 20, half is where the head
    # starts. The single ones are unknown to the rest of the reference.
    often = {f"often{i}": 20 for i in range(4)}
    reference = ids(often | {f"seldom{i}": 1 for i in range(20)})
    same = ids(often | {f"other{i}": 1 for i in range(20)})
    column, _ = one_column("categorical", reference, same, max_categories=10)
    assert column == ColumnDrift("id", "jensenshannon", 0.0, 0.15, "stable")
    # without singles: 0.8 / 0.2 against 1.0 / 0.0
    column, _ = one_column("categorical", reference, ids(often), max_categories=10)
    was = 0.8 * log(0.8 / 0.9) + 0.2 * log(0.2 / 0.1)
    assert column.score == pytest.approx(sqrt((was + log(1 / 0.9)) / 2), abs=1e-6)


def test_ids_that_never_come_twice_are_no_drift() -> None:
    column, _ = one_column(
        "categorical", [f"a{i}" for i in range(500)], [f"b{i}" for i in range(500)]
    )
    assert (column.kind, column.score) == ("id", 0.0)


def test_rows_of_one_request_are_one_sight_of_an_id() -> None:
    """Each request is one user's; by rows, a user of a single request would seem well known."""
    users = np.random.default_rng(3).integers(0, 2000, 400)

    def frame(users: np.ndarray) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "shopper": [f"u{user}" for user in users for _ in range(10)],
                "basket": [f"{id(users)}-{i}" for i in range(len(users)) for _ in range(10)],
                "probability": 0.5,
                "event_timestamp": WINDOW.start,
            }
        )

    reference, current = frame(users[:200]), frame(users[200:])
    only = spec({"name": "shopper", "kind": "categorical", "owner": "user"})
    with_key = monitor(reference, current, only, CONFIG, WINDOW).decision
    without = monitor(reference.drop(columns="basket"), current, only, CONFIG, WINDOW).decision
    assert with_key.columns["shopper"].verdict == "stable"
    assert without.columns["shopper"].verdict == "drifted"


# ---------------------------------------------------------------- whole windows


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
def test_a_window_of_the_same_shop_asks_for_nothing(seed: int) -> None:
    decision = watch(shop(seed), labels=True).decision
    assert decision.reasons == ()
    assert not decision.retrain
    assert {column.verdict for column in decision.columns.values()} == {"stable"}
    assert decision.quality.verdict == "within bounds"


NOW = shop(1)
PLANTED = {
    "price tripled": ({"price"}, changed(NOW, price=NOW["price"] * 3)),
    "price missing": ({"price"}, changed(NOW, share=0.5, price=nan)),
    "visits double": ({"visits"}, NOW.assign(visits=NOW["visits"] + (NOW.index % 2))),
    "category gone": ({"channel"}, changed(NOW, channel=NOW["channel"].replace("shop", "app"))),
    "category new": ({"channel"}, changed(NOW, share=0.1, channel="kiosk")),
    "category missing": ({"channel"}, changed(NOW, share=0.1, channel=None)),
    "ids new": ({"product"}, changed(NOW, share=0.4, product=[f"q{i % 90}" for i in NOW.index])),
    "tags fewer": (
        {"tags.length", "tags.member"},
        changed(NOW, tags=[["big"] for _ in NOW.index]),
    ),
    "history long": (
        {"history.length"},
        changed(NOW, history=[h + h if h else h for h in NOW["history"]]),
    ),
    "history replaced": (
        {"history.first"},
        changed(NOW, history=[[f"q{i}", *h[1:]] if h else h for i, h in enumerate(NOW["history"])]),
    ),
}


@pytest.mark.parametrize("plant", PLANTED)
def test_a_planted_shift_is_found_where_it_is(plant: str) -> None:
    expected, current = PLANTED[plant]
    decision = watch(current, drifted_share=0.1).decision
    assert drifted(decision) == expected
    assert decision.retrain
    (reason,) = decision.reasons
    assert reason.startswith(f"columns: {len(expected)} of 8 drifted, share 0.{len(expected)}")
    assert " ≥ 0.1: " in reason
    for name in expected:
        column = decision.columns[name]
        assert f"{name} {column.method} {column.score:.3f} ≥ {column.threshold:g}" in reason


def test_few_drifted_columns_are_named_but_do_not_retrain() -> None:
    current = changed(NOW, price=NOW["price"] * 3, channel="app")
    two_of_eight = watch(current, drifted_share=0.26).decision
    assert not two_of_eight.retrain
    assert "2 of 8 drifted, share 0.25 < 0.26: price psi" in two_of_eight.reasons[0]
    assert watch(current, drifted_share=0.25).decision.retrain


def test_thresholds_are_respected_and_one_column_may_have_its_own() -> None:
    current = changed(NOW, price=NOW["price"] * 3)
    score = watch(current).decision.columns["price"].score
    assert score is not None
    assert watch(current, numeric_threshold=score).decision.columns["price"].verdict == "drifted"
    own = watch(current, numeric_threshold=score, thresholds={"price": score + 1e-6}).decision
    assert own.columns["price"].verdict == "stable"
    assert own.columns["price"].threshold == score + 1e-6
    assert own.columns["visits"].threshold == score


def test_shifted_predictions_alone_ask_for_a_retraining() -> None:
    current = NOW.assign(probability=NOW["probability"] ** 0.5)
    decision = watch(current, prediction_threshold=0.15).decision
    assert decision.retrain
    assert drifted(decision) == {"probability"}
    score = decision.columns["probability"].score
    assert decision.reasons == (f"prediction: probability psi {score:.3f} ≥ 0.15",)


def test_frames_are_left_as_they_are_and_any_index_will_do() -> None:
    odd = NOW.set_axis(np.arange(len(NOW))[::-1] * 7)
    before = odd.copy(deep=True)
    assert watch(odd, labels=True).decision == watch(NOW, labels=True).decision
    pd.testing.assert_frame_equal(odd, before)


def test_a_sample_is_drawn_by_seed() -> None:
    first, again, other = (watch(NOW, sample_rows=1500, seed=seed).decision for seed in (0, 0, 1))
    assert first == again
    assert first.columns["price"] != other.columns["price"]
    assert first.rows == {"reference": ROWS, "current": ROWS}


# ---------------------------------------------------------------- quality


def test_quality_is_measured_as_scikit_learn_does() -> None:
    quality = watch(NOW, labels=True).decision.quality
    for side, frame in ((quality.reference, REFERENCE), (quality.current, NOW)):
        bought, probability = frame["bought"], frame["probability"]
        assert side == {
            "rows": ROWS,
            "auc": pytest.approx(roc_auc_score(bought, probability), abs=1e-6),
            "logloss": pytest.approx(log_loss(bought, probability), abs=1e-6),
            "calibration": pytest.approx(probability.sum() / bought.sum(), abs=1e-6),
        }


def test_a_quality_collapse_is_found_though_nothing_else_moved() -> None:
    shuffled = NOW["bought"].sample(frac=1, random_state=0).to_numpy()
    decision = watch(NOW.assign(bought=shuffled), labels=True).decision
    assert decision.retrain
    assert drifted(decision) == set()
    assert decision.quality.verdict == "out of bounds"
    loss, auc = decision.reasons
    assert re.match(r"quality: logloss \d\.\d+ above 0\.\d+, the reference's 0\.\d+ and 10%", loss)
    assert re.match(r"quality: auc 0\.[45]\d+ below the reference's 0\.\d+ by more than 0.02", auc)
    assert decision.quality.causes == tuple(r.removeprefix("quality: ") for r in (loss, auc))


def test_calibration_has_bounds() -> None:
    decision = watch(NOW.assign(bought=1 - NOW["bought"]), labels=True).decision
    assert re.match(r"quality: calibration 0\.[45]\d+ outside 0.8 to 1.25", decision.reasons[-1])


def test_calibration_counts_a_row_for_all_that_it_stands_for() -> None:
    """Where one negative in four is kept, the bare model would seem to promise far too little."""
    population = shop(8, 12_000)
    kept = (population["bought"] == 1) | (np.random.default_rng(0).random(12_000) < 0.25)
    bare = population[kept]
    stated = bare.assign(inclusion_probability=bare["bought"].map({1: 1.0, 0: 0.25}))
    unweighted = watch(bare, bare, labels=True).decision.quality
    weighted = watch(stated, stated, labels=True).decision.quality
    assert unweighted.verdict == "out of bounds"
    assert unweighted.current["calibration"] < 0.8
    assert weighted.verdict == "within bounds"
    assert weighted.current["calibration"] == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize(
    ("bought", "causes"),
    [
        (None, ("current has 0 labels 0, ", "current has 0 labels 1, ")),
        (
            [1, 0] * 800 + [None] * 2400,
            ("current has 800 labels 0, ", "current has 800 labels 1, "),
        ),
        ([0] * ROWS, ("current has 0 labels 1, ",)),
    ],
)
def test_without_enough_labels_there_is_no_verdict_on_quality(
    bought: Any, causes: tuple[str, ...]
) -> None:
    decision = watch(NOW.assign(bought=bought), labels=True).decision
    assert decision.quality.verdict == "not checked"
    assert decision.quality.causes == tuple(f"{c}fewer than min_labels 1000" for c in causes)
    assert "auc" not in decision.quality.current
    assert (decision.retrain, decision.reasons) == (False, ())


def test_labels_may_be_absent_or_late() -> None:
    none = watch(NOW).decision.quality
    assert none.verdict == "not checked"
    assert none.causes[0] == "reference has 0 labels 0, fewer than min_labels 1000"
    late = NOW.assign(bought=NOW["bought"].where(NOW.index < 3500))
    quality = watch(late, labels=True).decision.quality
    assert quality.verdict == "within bounds"
    expected = roc_auc_score(NOW["bought"][:3500], NOW["probability"][:3500])
    assert quality.current["auc"] == pytest.approx(expected, abs=1e-6)


def test_the_last_label_value_is_the_positive_one() -> None:
    two = spec({"name": "price", "kind": "numeric"}, label={"name": "bought", "values": (1, 2)})
    reference = REFERENCE.assign(bought=REFERENCE["bought"] + 1)
    quality = monitor(reference, reference, two, CONFIG, WINDOW).decision.quality
    assert quality.current == watch(REFERENCE, labels=True).decision.quality.current


def test_regression_is_measured_by_its_error() -> None:
    stars = spec(
        {"name": "price", "kind": "numeric"},
        task="regression",
        label={"name": "stars", "values": None},
    )
    noise = np.random.default_rng(0).normal(size=ROWS)
    predicted = np.random.default_rng(1).normal(3, 1, ROWS)
    reference = REFERENCE.assign(probability=predicted, stars=predicted + noise)
    worse = REFERENCE.assign(probability=predicted, stars=predicted + 1.2 * noise)
    same = monitor(reference, reference, stars, CONFIG, WINDOW).decision
    assert (same.retrain, same.quality.verdict) == (False, "within bounds")
    rmse = sqrt((noise**2).mean())
    assert same.quality.current == {"rows": ROWS, "rmse": pytest.approx(rmse, abs=1e-6)}
    decision = monitor(reference, worse, stars, CONFIG, WINDOW).decision
    assert decision.retrain
    assert decision.reasons == (
        f"quality: rmse {1.2 * rmse:.4f} above {1.1 * rmse:.4f}, "
        f"the reference's {rmse:.4f} and 10%",
    )


# ---------------------------------------------------------------- bad input


def test_all_faults_are_reported_together() -> None:
    bad_reference = REFERENCE.drop(columns=["visits", "probability"])
    bad_reference["price"] = "cheap"
    bad = NOW.drop(columns=["price", "tags"]).assign(
        channel=7, history="p1", bought=3, probability=1.5
    )
    bad.loc[:9, "event_timestamp"] = WINDOW.end + timedelta(days=1)
    with pytest.raises(MonitoringError) as caught:
        watch(bad, bad_reference, labels=True, thresholds={"prise": 0.3})
    assert caught.value.faults == [
        "reference: lacks the columns visits, probability",
        "reference: price: numeric columns hold numbers, found string, first 'cheap'",
        "current: lacks the columns price, tags",
        "current: channel: categorical columns hold strings, found integer, first 7",
        "current: history: sequence columns hold lists, found 'p1'",
        "current: bought: [3] not among [0, 1]",
        "current: probability: 1.5 to 1.5, not within 0 to 1",
        "thresholds: 'prise' is not watched; choose from price, visits, channel, product, "
        "tags.length, tags.member, history.length, history.first, probability",
        "current: event_timestamp: 10 rows lie outside the window 2024-05-01T00:00:00+00:00 to "
        "2024-05-08T00:00:00+00:00; select the rows by it",
    ]
    assert "monitoring: 9 faults\n  - reference: lacks" in str(caught.value)


def test_times_without_a_zone_are_utc_and_bad_ones_lie_outside() -> None:
    naive = NOW.assign(event_timestamp=NOW["event_timestamp"].dt.tz_localize(None))
    assert watch(naive).decision == watch(NOW).decision
    with pytest.raises(MonitoringError, match="4000 rows lie outside the window"):
        watch(NOW.assign(event_timestamp="yesterday"))


def test_an_empty_reference_is_a_fault() -> None:
    with pytest.raises(MonitoringError, match="reference: has no rows; build it from the champion"):
        watch(NOW, REFERENCE.iloc[:0])


@pytest.mark.parametrize("rows", [0, 999])
def test_a_small_window_gets_no_verdict(rows: int) -> None:
    monitoring = watch(NOW.iloc[:rows].assign(price=1e9))
    decision = monitoring.decision
    assert not decision.retrain
    assert decision.reasons == (
        f"data: current has {rows} rows, fewer than min_rows 1000: no verdict",
    )
    assert decision.rows == {"reference": ROWS, "current": rows}
    assert (decision.columns, monitoring.evidently) == ({}, {})
    assert decision.reasons[0] in monitoring.html


@pytest.mark.parametrize("column", ["price", "channel", "product", "history", "probability"])
def test_a_column_without_data_is_an_outage_and_not_drift(column: str) -> None:
    decision = watch(NOW.assign(**{column: None}), drifted_share=0.1).decision
    names = {"history": ["history.length", "history.first"]}.get(column, [column])
    for name in names:
        assert (decision.columns[name].score, decision.columns[name].verdict) == (None, "no data")
    assert not decision.retrain
    assert decision.reasons == (
        f"data: {', '.join(names)}: all null in the reference or in the window, so not compared; "
        "mend the source rather than retrain on it",
    )


def test_a_window_without_any_data_still_has_a_decision() -> None:
    names = [*(column.name for column in SHOP.columns), "probability"]
    monitoring = watch(NOW.assign(**dict.fromkeys(names)))
    assert {column.verdict for column in monitoring.decision.columns.values()} == {"no data"}
    assert not monitoring.decision.retrain
    assert monitoring.evidently == {}


# ---------------------------------------------------------------- what comes out


@pytest.fixture(scope="module")
def found() -> Monitoring:
    """A window in which everything but the quality has something to say."""
    current = changed(NOW, price=NOW["price"] * 3, product=None)
    return watch(current.assign(probability=NOW["probability"] ** 0.5), labels=True)


def test_the_decision_survives_json(found: Monitoring) -> None:
    plain = json.loads(json.dumps(found.decision.to_json(), allow_nan=False))
    assert Decision.from_json(plain) == found.decision
    assert list(plain) == ["retrain", "reasons", "window", "columns", "quality", "rows"]
    assert plain["retrain"] is True
    assert plain["window"] == {"start": "2024-05-01T00:00:00Z", "end": "2024-05-08T00:00:00Z"}
    assert list(plain["columns"]) == [watched.name for watched in column_kinds(SHOP)]
    assert plain["columns"]["product"] == {
        "kind": "id",
        "method": "jensenshannon",
        "score": None,
        "threshold": 0.15,
        "verdict": "no data",
    }
    assert set(plain["quality"]) == {"reference", "current", "verdict", "causes"}


def test_evidently_judges_as_the_decision_does(found: Monitoring) -> None:
    """Its tests, which the page shows, pass and fail column by column as the verdicts say."""
    tests = {
        test["metric_config"]["params"]["column"]: test["status"]
        for test in found.evidently["drift"]["tests"]
        if test["id"] == "drift"
    }
    verdicts = {
        name: "FAIL" if column.verdict == "drifted" else "SUCCESS"
        for name, column in found.decision.columns.items()
        if column.verdict != "no data"
    }
    assert tests == verdicts
    assert set(tests.values()) == {"FAIL", "SUCCESS"}


@pytest.mark.parametrize(("share", "status"), [(0.26, "SUCCESS"), (0.25, "FAIL")])
def test_evidently_counts_columns_as_the_decision_does(share: float, status: str) -> None:
    monitoring = watch(changed(NOW, price=1.0, channel="app"), drifted_share=share)
    (test,) = (
        t
        for t in monitoring.evidently["drift"]["tests"]
        if t["metric_config"]["params"]["type"].endswith("DriftedColumnsCount")
    )
    assert test["status"] == status
    assert monitoring.decision.retrain == (status == "FAIL")


def test_the_page_needs_no_network_and_says_why(found: Monitoring) -> None:
    page = found.html
    assert "<h1>Retrain</h1>" in page
    assert all(html.escape(reason) in page for reason in found.decision.reasons)
    assert "share 0.14 &lt; 0.3" in page
    for widget in ("Drift in column", "probability", "ROC Curve"):
        assert widget in page
    loads = r"""<(?:script|link|img|iframe)[^>]+(?:src|href)\s*=|url\(['"]?https?:|@import\s+url"""
    assert re.findall(loads, re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)) == []


def test_a_score_that_was_not_asked_for_is_not_taken() -> None:
    """A later Evidently that renames a method or applies its own threshold must not pass."""
    config = {"type": "evidently:metric_v2:ValueDrift", "column": "x", "method": "psi"}
    metric = {"config": config | {"threshold": 0.1}, "value": 0.01}
    snapshot = SimpleNamespace(dict=lambda: {"metrics": [metric]})
    side = pd.Series(["a"])
    asked = {"x": _Pair("numeric", "psi", 0.2, (side, side))}
    with pytest.raises(RuntimeError, match=r"no score for \('x', 'psi', 0.2\), only .*0\.1"):
        _columns(asked, snapshot)


def test_without_a_champion_there_is_nothing_to_watch_and_a_model_to_train() -> None:
    from fathom.drift import nothing_to_watch

    moment = datetime(2026, 1, 1, tzinfo=UTC)
    found = nothing_to_watch(Window(moment, moment))
    assert found.decision.retrain
    assert "there is no champion" in found.decision.reasons[0]
    assert "there is no champion" in found.html
