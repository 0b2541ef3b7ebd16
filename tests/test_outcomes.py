"""Outcomes: each served row gets its label when it is due, once, and nothing looks ahead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fathom import outcomes
from fathom.feature_log import FeatureLog, Served, rows_of, together
from fathom.online import Known
from fathom.outcomes import LABELLED, LATE, OutcomesConfig, OutcomesError
from small_ranker import SPEC, plain_frame

NOON = datetime(2024, 2, 1, 12, tzinfo=timezone.utc)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
STAMP = pa.timestamp("us", "UTC")


def served(
    request: str = "r1",
    user: str = "u1",
    items: Sequence[str] = ("i1", "i2"),
    at: datetime = NOON,
    **changes: Any,
) -> Served:
    """A request of which all items were shown, in their order."""
    frame = plain_frame(len(items))
    known = Known(True, np.ones(len(items), np.bool_), 0, False, at, at, {})
    found = Served(
        request,
        user,
        list(items),
        at,
        {name: frame[name] for name in SPEC.by_name},
        known,
        np.full(len(items), 0.5),
        slots=np.arange(len(items)),
    )
    return replace(found, **changes)


def log_of(*requests: Served, version: str = "v1") -> ibis.Table:
    return ibis.memtable(together([rows_of(each, SPEC, version) for each in requests]))


def acts(*found: tuple[str, str, datetime, datetime]) -> ibis.Table:
    """User, item, when, and when it was known."""
    names = ("user_id", "item_id", "event_timestamp", "arrival_timestamp")
    kinds = (pa.string(), pa.string(), STAMP, STAMP)
    columns = zip(*found, strict=True) if found else ([] for _ in names)
    arrays = [pa.array(list(c), kind) for c, kind in zip(columns, kinds, strict=True)]
    return ibis.memtable(pa.table(arrays, list(names)))


def told(*found: tuple[str, str, str, int, datetime]) -> ibis.Table:
    """Request, user, item, label and when it was known."""
    names = ("request_id", "user_id", "item_id", "bought", "event_timestamp")
    kinds = (pa.string(), pa.string(), pa.string(), pa.int64(), STAMP)
    columns = zip(*found, strict=True)
    arrays = [pa.array(list(c), kind) for c, kind in zip(columns, kinds, strict=True)]
    return ibis.memtable(pa.table(arrays, list(names)))


def config(**changes: Any) -> OutcomesConfig:
    return OutcomesConfig(
        **{"prediction_log": "log", "horizon_hours": 2, "grace_hours": 1} | changes
    )


def labels(
    log: ibis.Table,
    interactions: ibis.Table | None = None,
    explicit: ibis.Table | None = None,
    **changes: Any,
) -> dict[tuple[str, str], int | None]:
    """(request, item) → label; every row once."""
    rows = joined(log, interactions, explicit, **changes).to_pyarrow().to_pylist()
    found = {(row["_request"], row["item_id"]): row["bought"] for row in rows}
    assert len(found) == len(rows)
    return found


def joined(
    log: ibis.Table,
    interactions: ibis.Table | None = None,
    explicit: ibis.Table | None = None,
    **changes: Any,
) -> ibis.Table:
    chosen = config(**changes)
    until = outcomes.watermark(chosen, interactions, explicit)
    rows = outcomes.served(log, SPEC, chosen.shown)
    return outcomes.with_outcomes(rows, SPEC, chosen, interactions, explicit, until)


def as_of(moment: datetime) -> str:
    return moment.isoformat()


# -- labels --------------------------------------------------------------------------------------


def test_a_label_comes_when_horizon_and_grace_are_over() -> None:
    """Two hours and one: what was served at noon is labelled at three, and not before."""
    bought = acts(("u1", "i1", NOON + HOUR, NOON + HOUR))
    before, after = as_of(NOON + 2.99 * HOUR), as_of(NOON + 3 * HOUR)
    assert labels(log_of(served()), bought, as_of=before) == {
        ("r1", "i1"): None,
        ("r1", "i2"): None,
    }
    assert labels(log_of(served()), bought, as_of=after) == {("r1", "i1"): 1, ("r1", "i2"): 0}


@pytest.mark.parametrize(
    ("user", "item", "after", "label"),
    [
        ("u1", "i1", 0 * HOUR, 1),
        ("u1", "i1", 2 * HOUR - timedelta(microseconds=1), 1),
        ("u1", "i1", 2 * HOUR, 0),
        ("u1", "i1", -timedelta(microseconds=1), 0),
        ("u2", "i1", HOUR, 0),
        ("u1", "i9", HOUR, 0),
    ],
)
def test_an_act_counts_for_its_user_and_item_within_the_horizon(
    user: str, item: str, after: timedelta, label: int
) -> None:
    found = labels(
        log_of(served()), acts((user, item, NOON + after, NOON + after)), as_of=as_of(NOON + DAY)
    )
    assert found[("r1", "i1")] == label
    assert found[("r1", "i2")] == 0


def test_an_act_that_has_not_arrived_is_not_known_and_one_that_is_late_mends_the_label() -> None:
    bought = acts(("u1", "i1", NOON + HOUR, NOON + 5 * HOUR))
    early = joined(log_of(served()), bought, as_of=as_of(NOON + 4 * HOUR))
    assert early.bought.to_pyarrow().to_pylist() == [0, 0]
    assert outcomes.report(early, SPEC, None)["late"] == 0
    mended = joined(log_of(served()), bought, as_of=as_of(NOON + 5 * HOUR))
    by_item = {row["item_id"]: row for row in mended.to_pyarrow().to_pylist()}
    assert (by_item["i1"]["bought"], by_item["i1"][LATE]) == (1, True)
    assert by_item["i1"][LABELLED] == NOON + 5 * HOUR
    assert (by_item["i2"]["bought"], by_item["i2"][LATE]) == (0, False)
    assert outcomes.report(mended, SPEC, None)["late"] == 1


def test_outcomes_are_known_up_to_the_newest_that_arrived() -> None:
    """So a feed that stops does not make negatives of what it did not bring."""
    log = log_of(served())
    stopped = acts(("u9", "i9", NOON + HOUR, NOON + HOUR))
    assert set(labels(log, stopped).values()) == {None}
    going_on = acts(("u9", "i9", NOON + HOUR, NOON + 3 * HOUR))
    assert set(labels(log, going_on).values()) == {0}


def test_explicit_outcomes_come_first_and_the_newest_of_each_row_counts() -> None:
    bought = acts(("u1", "i1", NOON + HOUR, NOON + HOUR))
    explicit = told(
        ("r1", "u1", "i1", 0, NOON + HOUR),
        ("r1", "u1", "i2", 0, NOON + HOUR),
        ("r1", "u1", "i2", 1, NOON + 2 * HOUR),
        ("r9", "u1", "i1", 1, NOON),
    )
    log, late = log_of(served()), as_of(NOON + DAY)
    assert labels(log, bought, explicit, as_of=late) == {("r1", "i1"): 0, ("r1", "i2"): 1}
    report = outcomes.report(joined(log, bought, explicit, as_of=late), SPEC, explicit)
    assert report["unmatched"] == 1
    alone = labels(log, bought, None, as_of=late, from_interactions=False)
    assert alone == {("r1", "i1"): 0, ("r1", "i2"): 0}


def test_what_was_not_shown_is_no_row_and_what_was_asked_twice_is_one() -> None:
    again = served(at=NOON + timedelta(seconds=1), probabilities=np.array([0.25, 0.75]))
    half = served("r2", slots=np.array([-1, 0]))
    twice = served("r3", items=["i1", "i1"])
    rows = outcomes.served(log_of(served(), again, half, twice), SPEC).to_pyarrow().to_pylist()
    found = {(r["_request"], r["item_id"], r["_slot"], r["probability"]) for r in rows}
    assert found == {
        ("r1", "i1", 0, 0.25),
        ("r1", "i2", 1, 0.75),
        ("r2", "i2", 0, 0.5),
        ("r3", "i1", 0, 0.5),
    }
    first = outcomes.served(log_of(served()), SPEC, shown=1).to_pyarrow()
    assert first["item_id"].to_pylist() == ["i1"]


def test_a_late_canary_gives_way_to_the_champion_that_answered_and_a_shadow_stays_beside() -> None:
    log = log_of(served()).union(log_of(served(how="canary"), version="v2"))
    log = log.union(log_of(served(how="shadow"), version="v3"))
    rows = outcomes.served(log, SPEC).to_pyarrow().to_pylist()
    found = sorted((row["item_id"], row["_how"], row["_version"]) for row in rows)
    assert found == [
        ("i1", "champion", "v1"),
        ("i1", "shadow", "v3"),
        ("i2", "champion", "v1"),
        ("i2", "shadow", "v3"),
    ]
    bought = acts(("u1", "i1", NOON + HOUR, NOON + DAY))
    labelled = joined(log, bought)
    assert outcomes.report(labelled, SPEC, None) == {
        "rows": 4,
        "positive": 2,
        "negative": 2,
        "waiting": 0,
        "late": 2,
        "unmatched": 0,
        "by": {"v1": {"champion": 2}, "v3": {"shadow": 2}},
    }
    assert outcomes.exposures(labelled, SPEC).count().to_pyarrow().as_py() == 2


# -- the next training log -----------------------------------------------------------------------


def test_exposures_are_canonical_and_arrive_when_their_label_is_decided() -> None:
    recommended = served(propensities=np.array([1.0, 0.25]))
    labelled = joined(log_of(recommended), acts(("u1", "i1", NOON + HOUR, NOON + 3 * HOUR)))
    found = outcomes.exposures(labelled, SPEC)
    assert list(found.columns) == [
        *("request_id", "user_id", "item_id", "event_timestamp", "arrival_timestamp"),
        *("shelf", "shop", "discount", "bought", "inclusion_probability", "partition"),
    ]
    first, second = found.order_by("item_id").to_pyarrow().to_pylist()
    assert first["event_timestamp"] == NOON
    # Positive or not: nobody who counts exposures at two may see the positive one alone.
    assert first["arrival_timestamp"] == second["arrival_timestamp"] == NOON + 3 * HOUR
    assert (first["bought"], second["bought"]) == (1, 0)
    assert (first["inclusion_probability"], second["inclusion_probability"]) == (1.0, 0.25)
    assert first["partition"] == "served-2024-02-01"
    frame = plain_frame(2)
    assert [first["shop"], second["shop"]] == frame["shop"].tolist()
    discounts = [None if np.isnan(d) else float(d) for d in frame["discount"]]
    assert [first["discount"], second["discount"]] == discounts


@settings(max_examples=6, deadline=None)
@given(
    events=st.lists(
        st.tuples(
            st.sampled_from(["u1", "u2"]),
            st.sampled_from(["i1", "i2"]),
            st.integers(-1, 8),
            st.integers(0, 6),
        ),
        max_size=6,
    ),
    first=st.integers(0, 16),
    later=st.integers(0, 16),
)
def test_labels_are_what_an_endless_wait_would_say_of_what_is_known(
    events: list[tuple[str, str, int, int]], first: int, later: int
) -> None:
    """And merging run after run ends with the exposures of the last, each once."""
    requests = [("r1", "u1", 0), ("r2", "u2", 1), ("r3", "u1", 5)]
    log = log_of(*(served(r, u, at=NOON + h * HOUR) for r, u, h in requests))
    found = [(u, i, NOON + h * HOUR, NOON + (h + d) * HOUR) for u, i, h, d in events]
    past: ibis.Table | None = None
    for until in sorted((first, later)):
        rows = joined(log, acts(*found), as_of=as_of(NOON + until * HOUR))
        expected = {}
        for request, user, hour in requests:
            for item in ("i1", "i2"):
                seen = any(
                    (u, i) == (user, item) and hour <= h < hour + 2 and h + d <= until
                    for u, i, h, d in events
                )
                expected[request, item] = int(seen) if hour + 3 <= until else None
        table = rows.to_pyarrow().to_pylist()
        assert {(r["_request"], r["item_id"]): r["bought"] for r in table} == expected
        assert all(r[LABELLED] is None or r[LABELLED] <= NOON + until * HOUR for r in table)
        past = outcomes.merged(past, outcomes.exposures(rows, SPEC), SPEC).cache()
    assert past is not None
    merged = past.to_pyarrow().to_pylist()
    labelled = {key: label for key, label in expected.items() if label is not None}
    assert {(r["request_id"], r["item_id"]): r["bought"] for r in merged} == labelled
    assert len(merged) == len(labelled)


def test_exposures_whose_log_is_gone_stay() -> None:
    late = acts(("u9", "i9", NOON, NOON + DAY))
    old = outcomes.exposures(joined(log_of(served("old")), late), SPEC)
    new = outcomes.exposures(joined(log_of(served("new")), late), SPEC)
    found = outcomes.merged(old.cache(), new, SPEC).to_pyarrow()
    assert sorted(found["request_id"].to_pylist()) == ["new", "new", "old", "old"]


# -- files ---------------------------------------------------------------------------------------


def test_a_log_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert outcomes.read_log(tmp_path / "nowhere") is None
    for version in ("v1", "v2"):
        log = FeatureLog(tmp_path, SPEC, version)
        log.put(served(f"of {version}"))
        log.close()
    found = outcomes.read_log(tmp_path)
    assert found is not None
    requests = found["_request"].to_pyarrow().to_pylist()
    assert requests == ["of v1"] * 2 + ["of v2"] * 2


def test_all_that_is_missing_is_named() -> None:
    with pytest.raises(OutcomesError) as caught:
        outcomes.require(False, None, config())
    assert str(caught.value) == (
        "log holds no segment of a prediction log; serve with --feature-log, or correct "
        "outcomes.prediction_log; nothing that could be an outcome has arrived; add interactions "
        "or raw outcomes"
    )
    outcomes.require(True, NOON, config())


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"horizon_hours": 0}, "horizon_hours"),
        ({"grace_hours": -1}, "grace_hours"),
        ({"shown": 0}, "shown"),
        ({"as_of": "soon"}, "Invalid isoformat string: 'soon'"),
        ({"calibration_lo": 2.0}, "calibration_lo 2.0 must be below calibration_hi 1.25"),
    ],
)
def test_a_setting_out_of_bounds_is_named(changes: dict[str, Any], fault: str) -> None:
    with pytest.raises(ValidationError, match=fault):
        config(**changes)
