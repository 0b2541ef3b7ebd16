"""Snapshots against logs small enough to summarise by hand, and against Python on random ones.

Days start at 05:00 UTC here, as midnight in New York does in winter: boundaries are multiples of
the grain counted from ``ORIGIN``, whatever a calendar or a clock change says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import ibis
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom import features
from fathom.spec import FeatureSpec

UTC = pa.timestamp("us", "UTC")
ORIGIN = datetime(2024, 1, 1, 5, tzinfo=timezone.utc)
DAY, SECOND, MICROSECOND = timedelta(days=1), timedelta(seconds=1), timedelta(microseconds=1)
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
TYPES = {
    "event_timestamp": UTC,
    "arrival_timestamp": UTC,
    "quantity": pa.float64(),
    "bought": pa.int64(),
}


@pytest.fixture(autouse=True, scope="module")
def _utc_session() -> Iterator[None]:
    connection = ibis.duckdb.connect()
    connection.raw_sql("SET TimeZone='UTC'")
    before = ibis.options.default_backend
    ibis.set_backend(connection)
    yield
    ibis.options.default_backend = before


def a_spec(*aggregates: dict[str, Any], **changes: Any) -> FeatureSpec:
    """A spec with the given aggregates; sequences are those that keep the last values."""
    columns = [
        {"name": "user_id", "kind": "categorical", "owner": "user"},
        {"name": "tier", "kind": "categorical", "owner": "user"},
        {"name": "item_id", "kind": "categorical", "owner": "item"},
        {"name": "genre", "kind": "categorical", "owner": "item"},
        {"name": "shop", "kind": "categorical", "owner": "context"},
    ]
    for named in aggregates:
        aggregate = {key: value for key, value in named.items() if key != "name"}
        kind = "sequence" if aggregate["measure"] == "last" else "numeric"
        columns.append({"name": named["name"], "kind": kind, "aggregate": aggregate})
    return FeatureSpec.model_validate(
        {
            "entities": {"user": "user_id", "item": "item_id", "request": "request_id"},
            "label": {"name": "bought", "values": [0, 1]},
            "grain_days": 1,
            "grain_origin": ORIGIN,
            "columns": columns,
        }
        | changes
    )


def a_log(*rows: dict[str, Any]) -> Any:
    """A log with the columns that any of its rows names."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return ibis.memtable(
        pa.table(
            {n: pa.array([row.get(n) for row in rows], TYPES.get(n, pa.string())) for n in names}
        )
    )


def day(number: float) -> datetime:
    """The boundary that many days after the origin."""
    return ORIGIN + number * DAY


def act(user: str | None, event: datetime, **more: Any) -> dict[str, Any]:
    return {"user_id": user, "event_timestamp": event} | more


def summarised(
    spec: FeatureSpec,
    log: Any,
    view: str = "user_id_interactions",
    until: int | None = None,
) -> list[dict[str, Any]]:
    """Rows of a view's snapshots, by key and boundary."""
    last = features.last_step([log], spec) if until is None else until
    rows = features.snapshots(log, spec, view, last).to_pyarrow().to_pylist()
    keys = [name for name in rows[0] if name not in TYPES] if rows else []
    by = list(spec.views[view][0].aggregate.by) if keys else []
    return sorted(rows, key=lambda row: (*(row[key] for key in by), row["event_timestamp"]))


def values(rows: Iterable[dict[str, Any]], name: str) -> list[tuple[datetime, Any]]:
    return [(row["event_timestamp"], row[name]) for row in rows]


COUNT = {"name": "acts", "by": ["user_id"], "measure": "count"}


# -- when a row counts ---------------------------------------------------------------------------


def test_a_row_counts_from_the_first_boundary_after_it():
    log = a_log(act("ann", day(0.5)), act("ann", day(0.75)), act("ann", day(2.5)))
    assert values(summarised(a_spec(COUNT), log), "acts") == [(day(1), 2), (day(3), 3)]


def test_a_row_on_a_boundary_is_not_in_its_snapshot_but_one_microsecond_earlier_is():
    log = a_log(act("ann", day(2)), act("bob", day(2) - MICROSECOND))
    rows = summarised(a_spec(COUNT), log)
    assert [(row["user_id"], row["event_timestamp"]) for row in rows] == [
        ("ann", day(3)),
        ("bob", day(2)),
    ]


def test_a_late_row_counts_from_when_it_arrived():
    log = a_log(
        act("ann", day(0.5), arrival_timestamp=day(0.6)),
        act("ann", day(0.5), arrival_timestamp=day(4)),  # strictly before, so known at day 5
        act("ann", day(1.5), arrival_timestamp=None),  # no arrival known: its event time is all
        act("ann", day(2.5), arrival_timestamp=day(0)),  # nothing arrives before it happens
    )
    assert values(summarised(a_spec(COUNT), log), "acts") == [
        (day(1), 1),
        (day(2), 2),
        (day(3), 3),
        (day(5), 4),
    ]


def test_without_the_arrival_time_the_late_row_would_leak():
    late = a_log(
        act("ann", day(0.5), arrival_timestamp=day(0.6)),
        act("ann", day(0.5), arrival_timestamp=day(4)),
    )
    honest = summarised(a_spec(COUNT), late)
    leaky = summarised(a_spec(COUNT), late.drop("arrival_timestamp"))
    assert values(honest, "acts")[0] == (day(1), 1)
    assert values(leaky, "acts")[0] == (day(1), 2)


def test_boundaries_are_counted_from_the_origin_before_it_as_after_it():
    log = a_log(
        act("ann", day(-1.5)),
        act("ann", day(-1)),
        act("ann", -MICROSECOND + ORIGIN),
        act("ann", ORIGIN),
    )
    rows = summarised(a_spec(COUNT), log)
    assert values(rows, "acts") == [(day(-1), 1), (day(0), 3), (day(1), 4)]


def test_a_clock_change_moves_no_boundary():
    """New York sprang forward on 10 March 2024 and fell back on 3 November: 23 and 25 hours."""
    spring = datetime(2024, 3, 10, 7, tzinfo=timezone.utc)
    autumn = datetime(2024, 11, 3, 6, tzinfo=timezone.utc)
    log = a_log(*(act("ann", moment + k * DAY) for moment in (spring, autumn) for k in (-1, 0, 1)))
    boundaries = [moment for moment, _ in values(summarised(a_spec(COUNT), log), "acts")]
    assert {(boundary - ORIGIN) % DAY for boundary in boundaries} == {timedelta(0)}
    assert len(boundaries) == 6


@pytest.mark.parametrize("session", ["Asia/Kolkata", "America/New_York"])
def test_the_time_zone_of_the_session_changes_nothing(session: str):
    rows = [act("ann", day(1) - SECOND), act("ann", day(69.9)), act("ann", day(300.01))]
    spec = a_spec(COUNT, {"name": "age", "by": ["user_id"], "measure": "recency_days"})
    expected = summarised(spec, a_log(*rows))
    connection = ibis.duckdb.connect()
    connection.raw_sql(f"SET TimeZone='{session}'")
    log = connection.create_table("log", a_log(*rows).to_pyarrow())
    found = features.snapshots(log, spec, "user_id_interactions", features.last_step([log], spec))
    assert sorted(found.to_pyarrow().to_pylist(), key=lambda r: r["event_timestamp"]) == expected


def test_moments_past_2038_are_counted():
    """Seconds since 1970 leave 32 bits there."""
    log = a_log(act("ann", datetime(2050, 6, 1, 5, tzinfo=timezone.utc)))
    boundary = datetime(2050, 6, 2, 5, tzinfo=timezone.utc)
    assert values(summarised(a_spec(COUNT), log), "acts") == [(boundary, 1)]


def test_a_grain_of_a_week_advances_weekly():
    log = a_log(act("ann", day(0)), act("ann", day(6.99)), act("ann", day(7)))
    rows = summarised(a_spec(COUNT, grain_days=7), log)
    assert values(rows, "acts") == [(day(7), 2), (day(14), 3)]


def test_the_last_step_covers_every_row_of_all_logs():
    spec = a_spec(COUNT)
    early, late = a_log(act("ann", day(0.5))), a_log(act("ann", day(6)))
    assert features.last_step([early], spec).execute() == 1
    assert features.last_step([early, late], spec).execute() == 7
    arrived = a_log(act("ann", day(0.5), arrival_timestamp=day(9.5)))
    assert features.last_step([early, late, arrived], spec).execute() == 10


def test_nothing_is_written_past_until():
    windowed = {"name": "recent", "by": ["user_id"], "measure": "count", "window_days": 2}
    log = a_log(act("ann", day(0.5)), act("ann", day(3.5)))
    until_3 = summarised(a_spec(windowed), log, until=3)
    assert values(until_3, "recent") == [(day(1), 1), (day(3), 0)]
    until_6 = summarised(a_spec(windowed), log, until=6)
    assert values(until_6, "recent") == [(day(1), 1), (day(3), 0), (day(4), 1), (day(6), 0)]


def test_rows_without_a_key_are_left_out():
    pairs = {"name": "pairs", "by": ["user_id", "item_id"], "measure": "count"}
    log = a_log(
        act("ann", day(0.5), item_id=None),
        act(None, day(0.5), item_id="tea"),
        act("ann", day(0.5), item_id="tea"),
    )
    rows = summarised(a_spec(COUNT, pairs), log, "user_id_item_id_interactions")
    assert [(row["user_id"], row["item_id"], row["pairs"]) for row in rows] == [("ann", "tea", 1)]
    assert values(summarised(a_spec(COUNT), log), "acts") == [(day(1), 2)]


def test_a_snapshot_is_stamped_with_its_boundary_and_has_no_column_of_the_work():
    rows = summarised(a_spec(COUNT), a_log(act("ann", day(0.5))))
    assert rows == [
        {
            "user_id": "ann",
            "event_timestamp": day(1),
            "created_timestamp": day(1),
            "acts": 1,
        }
    ]


# -- the measures --------------------------------------------------------------------------------


def test_a_windowed_count_falls_when_a_row_leaves_the_window():
    windowed = {"name": "recent", "by": ["user_id"], "measure": "count", "window_days": 3}
    log = a_log(act("ann", day(0.5)), act("ann", day(2.5)), act("bob", day(9.5)))
    rows = [row for row in summarised(a_spec(COUNT, windowed), log) if row["user_id"] == "ann"]
    # Known from day 1 on, the first row is in the windows that end on days 1, 2 and 3.
    assert values(rows, "recent") == [(day(1), 1), (day(3), 2), (day(4), 1), (day(6), 0)]
    assert values(rows, "acts") == [(day(1), 1), (day(3), 2), (day(4), 2), (day(6), 2)]


def test_windows_of_different_widths_share_a_view():
    log = a_log(act("ann", day(0.5)), act("zoe", day(8.5)))
    spec = a_spec(
        *(
            {"name": f"recent_{w}", "by": ["user_id"], "measure": "count", "window_days": w}
            for w in (1, 4)
        )
    )
    rows = [row for row in summarised(spec, log) if row["user_id"] == "ann"]
    assert [(r["event_timestamp"], r["recent_1"], r["recent_4"]) for r in rows] == [
        (day(1), 1, 1),
        (day(2), 0, 1),
        (day(5), 0, 0),
    ]


def test_a_sum_is_exact_whatever_the_order_of_rows():
    spent = {"name": "spent", "by": ["user_id"], "measure": "sum", "column": "quantity"}
    prices = [0.1, 0.2, 0.3, 1e9, -1e9, 0.000001]
    assert sum(prices) != 0.600001  # binary floats lose the small ones beside the large
    for ordered in (prices, prices[::-1]):
        log = a_log(*(act("ann", day(0.5), quantity=price) for price in ordered))
        assert values(summarised(a_spec(spent), log), "spent") == [(day(1), 0.600001)]


def test_a_mean_is_of_the_rows_that_have_a_value():
    mean = {"name": "mean", "by": ["user_id"], "measure": "mean", "column": "quantity"}
    log = a_log(
        act("ann", day(0.5), quantity=None),
        act("ann", day(1.5), quantity=4.0),
        act("ann", day(2.5), quantity=7.0),
        act("ann", day(3.5), quantity=None),
    )
    assert values(summarised(a_spec(mean), log), "mean") == [
        (day(1), None),
        (day(2), 4.0),
        (day(3), 5.5),
        (day(4), 5.5),
    ]


def test_an_emptied_window_has_no_mean_and_a_sum_of_nothing():
    shared = {"by": ["user_id"], "column": "quantity", "window_days": 1}
    spec = a_spec(
        {"name": "mean", "measure": "mean", **shared}, {"name": "sum", "measure": "sum", **shared}
    )
    log = a_log(act("ann", day(0.5), quantity=3.0), act("zoe", day(5.5), quantity=1.0))
    rows = [row for row in summarised(spec, log) if row["user_id"] == "ann"]
    assert values(rows, "mean") == [(day(1), 3.0), (day(2), None)]
    assert values(rows, "sum") == [(day(1), 3.0), (day(2), 0.0)]


def test_a_rate_starts_from_its_prior_and_returns_to_it():
    rate = {"of": "exposures", "by": ["item_id"], "measure": "rate"}
    prior = {"prior": 0.2, "prior_weight": 5}
    spec = a_spec(
        {"name": "rate", **rate, **prior},
        {"name": "recent", **rate, **prior, "window_days": 2},
    )
    log = a_log(
        act("ann", day(0.5), item_id="tea", bought=1),
        act("bob", day(0.5), item_id="tea", bought=0),
        act("ann", day(5.5), item_id="tea", bought=0),
    )
    rows = summarised(spec, log, "item_id_exposures")
    # (1 + 0.2·5) / (2 + 5) = 2/7, then (1 + 1) / (3 + 5) = 1/4; the window empties on day 3.
    assert values(rows, "rate") == [(day(1), 2 / 7), (day(3), 2 / 7), (day(6), 0.25)]
    assert values(rows, "recent") == [(day(1), 2 / 7), (day(3), 0.2), (day(6), 1 / 6)]


def test_a_rate_counts_the_positive_label_by_its_value():
    """Labels of 1 and 2, of which 2 is the positive one: a sum of labels would be 3."""
    rate = {"of": "exposures", "by": ["user_id"], "measure": "rate", "prior": 0, "prior_weight": 2}
    spec = a_spec({"name": "rate", **rate}, label={"name": "bought", "values": [1, 2]})
    log = a_log(act("ann", day(0.5), bought=1), act("ann", day(0.5), bought=2))
    assert values(summarised(spec, log, "user_id_exposures"), "rate") == [(day(1), 1 / 4)]


def test_recency_is_the_last_event_in_microseconds_even_if_another_arrives_later():
    recency = {"name": "age", "by": ["user_id"], "measure": "recency_days"}
    newest = datetime(2024, 1, 1, 17, 30, 0, 999_999, tzinfo=timezone.utc)
    log = a_log(
        act("ann", newest, arrival_timestamp=newest),
        act("ann", newest - DAY, arrival_timestamp=newest + 2 * DAY),
    )
    microseconds = (newest - EPOCH) // MICROSECOND
    spec = a_spec(recency)
    assert features.stored_name(spec.by_name["age"]) == "age__last_us"
    assert values(summarised(spec, log), "age__last_us") == [
        (day(1), microseconds),
        (day(3), microseconds),
    ]


def test_recency_before_1970_is_negative():
    recency = {"name": "age", "by": ["user_id"], "measure": "recency_days"}
    log = a_log(act("ann", EPOCH - MICROSECOND))
    assert [value for _, value in values(summarised(a_spec(recency), log), "age__last_us")] == [-1]


LAST = {"name": "recent", "by": ["user_id"], "measure": "last", "column": "item_id", "n": 3}


def test_a_history_is_newest_first_and_keeps_n_values():
    items = ["tea", "rye", "oat", "jam"]
    log = a_log(*(act("ann", day(k + 0.5), item_id=item) for k, item in enumerate(items)))
    assert values(summarised(a_spec(LAST), log), "recent") == [
        (day(1), ["tea"]),
        (day(2), ["rye", "tea"]),
        (day(3), ["oat", "rye", "tea"]),
        (day(4), ["jam", "oat", "rye"]),
    ]


def test_rows_of_one_moment_are_ordered_by_value_and_repeat():
    moment = day(0.5)
    log = a_log(
        *(act("ann", moment, item_id=item) for item in ("jam", "tea", "jam")),
        act("ann", moment - SECOND, item_id="zest"),
    )
    assert values(summarised(a_spec(LAST), log), "recent") == [(day(1), ["tea", "jam", "jam"])]


def test_a_row_that_arrives_late_leads_the_history_when_it_arrives():
    """A snapshot is never rewritten, so what became known last stands first."""
    log = a_log(
        act("ann", day(0.5), item_id="late", arrival_timestamp=day(2.5)),
        act("ann", day(1.5), item_id="prompt", arrival_timestamp=day(1.5)),
    )
    assert values(summarised(a_spec(LAST), log), "recent") == [
        (day(2), ["prompt"]),
        (day(3), ["late", "prompt"]),
    ]


def test_a_history_skips_missing_values_and_lasts_beyond_a_window():
    windowed = {"name": "acts_2d", "by": ["user_id"], "measure": "count", "window_days": 2}
    log = a_log(
        act("ann", day(0.5), item_id=None),
        act("ann", day(1.5), item_id="tea"),
        act("ann", day(2.5), item_id=None),
        act("bob", day(9.5), item_id="rye"),
    )
    rows = [row for row in summarised(a_spec(LAST, windowed), log) if row["user_id"] == "ann"]
    assert [(r["event_timestamp"], r["acts_2d"], r["recent"]) for r in rows] == [
        (day(1), 1, None),
        (day(2), 2, ["tea"]),
        (day(3), 2, ["tea"]),
        (day(4), 1, ["tea"]),
        (day(5), 0, ["tea"]),
    ]


def test_names_of_columns_cannot_collide_with_those_of_the_work():
    columns = [
        {"name": name, "kind": "categorical", "owner": "context"}
        for name in ("step", "rank", "n", "positives", "last_event")
    ]
    names = [column["name"] for column in columns]
    aggregates = [
        {"name": f"by_{name}", "kind": "numeric", "aggregate": {"by": [name], "measure": "count"}}
        for name in names
    ]
    history = {"by": ["rank"], "measure": "last", "column": "step", "n": 2}
    turned = {"by": ["rank"], "measure": "sum", "column": "quantity"}
    spec = a_spec(
        columns=[
            *({"name": n, "kind": "categorical", "owner": o} for n, o in OWNED),
            *columns,
            *aggregates,
            {"name": "steps_right", "kind": "sequence", "aggregate": history},
            {"name": "sum_quantity", "kind": "numeric", "aggregate": turned},
        ]
    )
    log = a_log(act("ann", day(0.5), quantity=2.0, **dict.fromkeys(names, "a")))
    for name in names:
        assert values(summarised(spec, log, f"{name}_interactions"), f"by_{name}") == [(day(1), 1)]
    row = summarised(spec, log, "rank_interactions")[0]
    assert (row["steps_right"], row["sum_quantity"]) == (["a"], 2.0)


OWNED = (("user_id", "user"), ("item_id", "item"))


# -- attributes as of the row --------------------------------------------------------------------

GENRE_COUNT = {"name": "genre_acts", "by": ["user_id", "genre"], "measure": "count"}


def items_table(*rows: tuple[str, datetime, str | None]) -> Any:
    keys, moments, genres = zip(*rows, strict=True)
    return ibis.memtable(
        pa.table(
            {
                "item_id": pa.array(keys, pa.string()),
                "event_timestamp": pa.array(moments, UTC),
                "genre": pa.array(genres, pa.string()),
            }
        )
    )


def users_table() -> Any:
    return ibis.memtable(
        pa.table(
            {
                "user_id": ["ann"],
                "event_timestamp": pa.array([day(0)], UTC),
                "tier": ["gold"],
            }
        )
    )


def test_attributes_are_those_that_held_when_the_row_happened():
    log = a_log(
        *(
            act("ann", moment, item_id="tea", shop="north")
            for moment in (day(0), day(2) - MICROSECOND, day(2), day(9))
        ),
        act("ann", day(9), item_id="unlisted", shop="north"),
    )
    items = items_table(("tea", day(1), "drinks"), ("tea", day(2), "herbs"), ("rye", day(0), "x"))
    joined = features.with_attributes(log, users_table(), items, a_spec(GENRE_COUNT))
    assert joined.columns == (*log.columns, "genre")
    rows = joined.to_pyarrow().to_pylist()
    found = sorted((row["item_id"], row["event_timestamp"], row["genre"]) for row in rows)
    assert found == [
        ("tea", day(0), None),  # before the item was listed
        ("tea", day(2) - MICROSECOND, "drinks"),
        ("tea", day(2), "herbs"),
        ("tea", day(9), "herbs"),
        ("unlisted", day(9), None),
    ]


def test_a_later_attribute_moves_no_earlier_count():
    log = a_log(act("ann", day(0.5), item_id="tea"), act("ann", day(2.5), item_id="tea"))
    items = items_table(("tea", day(0), "drinks"), ("tea", day(2), "herbs"))
    spec = a_spec(GENRE_COUNT)
    joined = features.with_attributes(log, users_table(), items, spec)
    rows = summarised(spec, joined, "user_id_genre_interactions")
    assert [(r["genre"], r["event_timestamp"], r["genre_acts"]) for r in rows] == [
        ("drinks", day(1), 1),
        ("herbs", day(3), 1),
    ]
    # What the guard prevents: the newest genre, looked up for rows of any age.
    newest = log.mutate(genre=ibis.literal("herbs"))
    leaky = summarised(spec, newest, "user_id_genre_interactions")
    assert [(r["genre"], r["genre_acts"]) for r in leaky] == [("herbs", 1), ("herbs", 2)]


def test_only_attributes_that_aggregates_read_are_added():
    log = a_log(act("ann", day(0.5), item_id="tea", shop="north"))
    items = items_table(("tea", day(0), "drinks"))
    assert features.with_attributes(log, users_table(), items, a_spec(COUNT)) is log
    by_tier = {"name": "tier_acts", "by": ["tier"], "measure": "count"}
    last_genres = {"name": "g", "by": ["user_id"], "measure": "last", "column": "genre", "n": 2}
    both = features.with_attributes(log, users_table(), items, a_spec(by_tier, last_genres))
    assert both.columns == (*log.columns, "tier", "genre")
    assert both.to_pyarrow().select(["tier", "genre"]).to_pylist() == [
        {"tier": "gold", "genre": "drinks"}
    ]


def test_a_log_keeps_an_attribute_that_it_has_itself():
    log = a_log(act("ann", day(0.5), item_id="tea", genre="as written in the log"))
    items = items_table(("tea", day(0), "drinks"))
    assert features.with_attributes(log, users_table(), items, a_spec(GENRE_COUNT)) is log


# -- packed rows ---------------------------------------------------------------------------------


def packed_rows(spec: FeatureSpec, log: Any, view: str, until: int) -> list[dict[str, Any]]:
    newest = features.newest(features.snapshots(log, spec, view, until), spec, view)
    return features.packed(newest, spec, view).to_pyarrow().to_pylist()


def test_packed_gathers_each_users_newest_values():
    spec = a_spec(
        {"name": "pairs", "by": ["user_id", "item_id"], "measure": "count"},
        {"name": "pairs_2d", "by": ["user_id", "item_id"], "measure": "count", "window_days": 2},
        {"name": "age", "by": ["user_id", "item_id"], "measure": "recency_days"},
        {"name": "m", "by": ["user_id", "item_id"], "measure": "mean", "column": "quantity"},
    )
    view = "user_id_item_id_interactions"
    log = a_log(
        act("ann", day(0.5), item_id="tea", quantity=1.0),
        act("ann", day(1.5), item_id="tea", quantity=2.0),
        act("ann", day(5.5), item_id="jam", quantity=None),
        act("bob", day(0.5), item_id="rye", quantity=4.0),
    )
    last = {row["user_id"]: row for row in packed_rows(spec, log, view, 6)}
    us = [(day(k) - EPOCH) // MICROSECOND for k in (0.5, 1.5, 5.5)]
    assert last["ann"][f"{view}__item_id"] == ["jam", "tea"]
    assert last["ann"][f"{view}__pairs"] == [1, 2]
    assert last["ann"][f"{view}__pairs_2d"] == [1, 0]
    assert last["ann"][f"{view}__age__last_us"] == [us[2], us[1]]
    assert last["ann"][f"{view}__m"] == [None, 1.5]
    assert last["bob"][f"{view}__item_id"] == ["rye"]
    # A user's row is of the newest boundary at which one of its values changed.
    assert last["ann"]["event_timestamp"] == last["ann"]["created_timestamp"] == day(6)
    assert last["bob"]["event_timestamp"] == day(3)  # when the row left the window of two days


def test_packed_is_as_of_the_newest_row_even_where_its_value_is_missing():
    """After its window has emptied, a mean is missing; the one before it must not come back."""
    of = {"by": ["user_id", "item_id"], "measure": "mean", "column": "quantity", "window_days": 1}
    spec = a_spec({"name": "mean", **of})
    view = "user_id_item_id_interactions"
    log = a_log(act("ann", day(0.5), item_id="tea", quantity=1.0))
    row = packed_rows(spec, log, view, 4)[0]
    assert row[f"{view}__mean"] == [None]


def test_packed_lists_are_in_the_order_of_their_keys_and_side_by_side():
    mean = {"by": ["user_id", "item_id"], "measure": "mean", "column": "quantity"}
    spec = a_spec({"name": "mean", **mean})
    view = "user_id_item_id_interactions"
    numbers = [k * 7919 % 3000 for k in range(3000)]  # every number once, in no order
    log = a_log(
        *(
            act("ann", day(0.5), item_id=f"{n:04}", quantity=None if n % 3 else float(n))
            for n in numbers
        )
    )
    row = packed_rows(spec, log, view, 1)[0]
    assert row[f"{view}__item_id"] == [f"{n:04}" for n in range(3000)]
    assert row[f"{view}__mean"] == [None if n % 3 else float(n) for n in range(3000)]


def test_views_with_a_maximal_age_hold_the_moment_of_each_row():
    pairs = {"name": "pairs", "by": ["user_id", "item_id"], "measure": "count"}
    view = "user_id_item_id_interactions"
    log = a_log(
        act("ann", day(0.5), item_id="tea"),
        act("ann", day(0.7), item_id="jam"),
        act("ann", day(1.5), item_id="tea"),
    )
    spec = a_spec(pairs, COUNT, max_age_days={view: 30, "users": 365})
    first, second = ((day(k) - EPOCH) // MICROSECOND for k in (1, 2))
    found = summarised(spec, log, view)
    stamps = [(row["item_id"], row[features.stamp_name(view)]) for row in found]
    assert stamps == [("jam", first), ("tea", first), ("tea", second)]
    row = packed_rows(spec, log, view, 2)[0]
    assert row[f"{view}__item_id"] == ["jam", "tea"]
    assert row[f"{view}__{view}__at_us"] == [first, second]
    assert row["event_timestamp"] == day(2)
    # A view without a maximal age has no such field, of aggregates or of attributes.
    assert "user_id_interactions__at_us" not in summarised(spec, log)[0]
    [user] = features.with_stamps(users_table(), spec, "users").to_pyarrow().to_pylist()
    assert user["users__at_us"] == (day(0) - EPOCH) // MICROSECOND
    assert user["created_timestamp"] == user["event_timestamp"] == day(0)
    items = features.with_stamps(items_table(("tea", day(1), "herbs")), spec, "items")
    assert items.columns == ("item_id", "event_timestamp", "genre", "created_timestamp")


# -- the same on every run -----------------------------------------------------------------------

EVERYTHING = [
    COUNT,
    {"name": "acts_2d", "by": ["user_id"], "measure": "count", "window_days": 2},
    {"name": "spent", "by": ["user_id"], "measure": "sum", "column": "quantity"},
    {
        "name": "spent_3d",
        "by": ["user_id"],
        "measure": "sum",
        "column": "quantity",
        "window_days": 3,
    },
    {"name": "mean", "by": ["user_id"], "measure": "mean", "column": "quantity"},
    {"name": "age", "by": ["user_id"], "measure": "recency_days"},
    LAST,
]
RATES = [
    {
        "name": f"rate{window or ''}",
        "of": "exposures",
        "by": ["user_id"],
        "measure": "rate",
        "prior": 0.25,
        "prior_weight": 2,
        "window_days": window,
    }
    for window in (None, 2)
]


def everything() -> FeatureSpec:
    return a_spec(*EVERYTHING, *RATES)


def test_threads_and_the_order_of_rows_change_nothing():
    """Each user, moment and item comes four times, so equal rows must count alike too."""
    rows = [
        act(
            f"user{k * 7 % 11}",
            day(k * 13 % 40 / 4),
            item_id=f"item{k % 8}",
            quantity=k * 0.1,
            bought=k % 3 // 2,
        )
        for k in range(2000)
    ]
    spec, found = everything(), []
    for threads, ordered in ((1, rows), (4, rows), (4, rows[::-1]), (1, rows[1::2] + rows[::2])):
        connection = ibis.duckdb.connect(threads=threads)
        connection.raw_sql("SET TimeZone='UTC'")
        log = connection.create_table("log", a_log(*ordered).to_pyarrow())
        found.append([summarised(spec, log, view) for view in spec.views])
    assert len(found[0][0]) > 100
    assert all(other == found[0] for other in found[1:])


# -- against Python ------------------------------------------------------------------------------

TIMES = st.builds(
    lambda days, offset: day(days) + offset,
    st.integers(-2, 6),
    st.sampled_from([timedelta(0), -MICROSECOND, MICROSECOND, DAY / 3, DAY / 2]),
)
ROWS = st.fixed_dictionaries(
    {
        "user_id": st.sampled_from(["ann", "bob", None]),
        "event_timestamp": TIMES,
        "arrival_timestamp": st.none() | TIMES,
        "item_id": st.sampled_from(["tea", "jam", "rye", None]),
        "quantity": st.none() | st.integers(-(10**9), 10**9).map(lambda n: n / 1000),
        "bought": st.sampled_from([0, 1]),
    }
)


def known_from(row: dict[str, Any]) -> datetime:
    return max(row["event_timestamp"], row["arrival_timestamp"] or row["event_timestamp"])


def step(moment: datetime) -> int:
    """Of the first boundary strictly after a moment."""
    return (moment - ORIGIN) // DAY + 1


def recomputed(rows: list[dict[str, Any]], user: str, boundary: datetime) -> dict[str, Any]:
    """Every value of a user at a boundary, from the rows known strictly before it."""
    known = [row for row in rows if row["user_id"] == user and known_from(row) < boundary]

    def within(days: int | None) -> list[dict[str, Any]]:
        return [row for row in known if days is None or known_from(row) >= boundary - days * DAY]

    def numbers(days: int | None) -> list[Decimal]:
        found = [row["quantity"] for row in within(days)]
        return [Decimal(str(value)) for value in found if value is not None]

    def rate(days: int | None) -> float:
        labels = [row["bought"] for row in within(days)]
        return (sum(labels) + 0.5) / (len(labels) + 2)

    history = [row for row in known if row["item_id"] is not None]
    history.sort(key=lambda r: (step(known_from(r)), r["event_timestamp"], r["item_id"]))
    events = [(row["event_timestamp"] - EPOCH) // MICROSECOND for row in known]
    return {
        "acts": len(known),
        "acts_2d": len(within(2)),
        "spent": float(sum(numbers(None))),
        "spent_3d": float(sum(numbers(3))),
        "mean": float(sum(numbers(None))) / len(numbers(None)) if numbers(None) else None,
        "age__last_us": max(events, default=None),
        "recent": [row["item_id"] for row in history[::-1][:3]],
        "rate": rate(None),
        "rate2": rate(2),
    }


def defaults(row: dict[str, Any] | None, names: Iterable[str]) -> dict[str, Any]:
    """What a feature frame shows: nothing summed is 0, no history is empty, no rows the prior."""
    absent = {"spent": 0.0, "spent_3d": 0.0, "acts": 0, "acts_2d": 0, "recent": []}
    absent |= {"rate": 0.25, "rate2": 0.25}
    found = row or {}
    return {n: absent.get(n) if found.get(n) is None else found[n] for n in names}


VIEWS = {
    "user_id_interactions": (
        *("acts", "acts_2d", "spent", "spent_3d", "mean", "age__last_us", "recent"),
    ),
    "user_id_exposures": ("rate", "rate2"),
}


@given(rows=st.lists(ROWS, min_size=1, max_size=12), exposures=st.lists(TIMES, max_size=8))
def test_every_snapshot_and_every_exposure_see_exactly_what_was_known(
    rows: list[dict[str, Any]], exposures: list[datetime]
):
    spec, log = everything(), a_log(*rows)
    until = features.last_step([log], spec).execute()
    for view, names in VIEWS.items():
        found = summarised(spec, log, view, until)
        for row in found:
            expected = recomputed(rows, row["user_id"], row["event_timestamp"])
            assert defaults(row, names) == {name: expected[name] for name in names}
        for user in ("ann", "bob"):
            for moment in exposures:
                if step(moment) > until + 1:
                    continue  # past the newest boundary's own step, windows are not known yet
                seen = [r for r in found if r["user_id"] == user and r["event_timestamp"] <= moment]
                last_boundary = ORIGIN + (step(moment) - 1) * DAY
                expected = recomputed(rows, user, last_boundary)
                assert defaults(seen[-1] if seen else None, names) == {
                    name: expected[name] for name in names
                }


@given(rows=st.lists(ROWS, min_size=1, max_size=12))
def test_a_snapshot_is_written_exactly_where_rows_arrive_or_leave_a_window(
    rows: list[dict[str, Any]],
):
    spec, log = everything(), a_log(*rows)
    until = features.last_step([log], spec).execute()
    for view, widths in (("user_id_interactions", (0, 2, 3)), ("user_id_exposures", (0, 2))):
        changes = {
            (row["user_id"], ORIGIN + (step(known_from(row)) + width) * DAY)
            for row in rows
            for width in widths
            if row["user_id"] is not None and step(known_from(row)) + width <= until
        }
        found = [(r["user_id"], r["event_timestamp"]) for r in summarised(spec, log, view, until)]
        assert sorted(changes) == found


def test_equal_rows_of_one_moment_all_count_in_a_history():
    """Three packs of the same type in one basket are three purchases, on every run."""
    many = 400
    moment = datetime(2017, 1, 3, 12, tzinfo=timezone.utc)
    log = ibis.memtable(
        pa.table(
            {
                "user": [f"u{i % 100}" for i in range(many)],
                "item": ["i"] * many,
                "genre": ["yogurt"] * many,
                "event_timestamp": pa.array([moment] * many, pa.timestamp("us", "UTC")),
            }
        )
    )
    spec = FeatureSpec.model_validate(
        {
            "entities": {"user": "user", "item": "item", "request": "request"},
            "label": {"name": "y"},
            "columns": [
                {"name": "genre", "kind": "categorical", "owner": "item"},
                {
                    "name": "recent",
                    "kind": "sequence",
                    "aggregate": {"by": ["user"], "measure": "last", "column": "genre", "n": 3},
                },
            ],
        }
    )
    histories = features.snapshots(log, spec, "user_interactions", 10**9).to_pyarrow()["recent"]
    assert {len(history) for history in histories.to_pylist()} == {3}
