"""Validation: every raw row ends up clean, in quarantine with its reasons, or a counted copy."""

from __future__ import annotations

import json
import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import ibis
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fathom.spec import FeatureSpec
from fathom.validation import (
    QuarantineError,
    RawDataError,
    RuleError,
    Validated,
    ValidationConfig,
    read_partitions,
    render_html,
    require_healthy,
    required_columns,
    validate,
    write_data_docs,
)

SPEC = FeatureSpec.model_validate(
    {
        "entities": {"user": "user_id", "item": "item_id", "request": "visit_id"},
        "label": {"name": "clicked", "values": [0, 1]},
        "columns": [
            {"name": "user_id", "kind": "categorical", "owner": "user", "nullable": False},
            {"name": "age", "kind": "numeric", "owner": "user", "minimum": 0, "maximum": 120},
            {"name": "genres", "kind": "multi", "owner": "item", "values": ["drama", "comedy"]},
            {
                "name": "channel",
                "kind": "categorical",
                "owner": "context",
                "values": ["web", "app"],
                "nullable": False,
            },
            {"name": "price", "kind": "numeric", "owner": "context", "minimum": 0},
            {
                "name": "spent",
                "kind": "numeric",
                "aggregate": {"by": ["user_id"], "measure": "sum", "column": "amount"},
            },
            {
                "name": "channel_visits",
                "kind": "numeric",
                "aggregate": {"by": ["user_id", "channel"], "measure": "count"},
            },
        ],
    }
)
NOW = "2026-03-01T00:00:00Z"
CONFIG = ValidationConfig.model_validate({"now": NOW})
GOOD: dict[str, list[Any]] = {
    "visit_id": ["v1", "v1", "v2", "v3"],
    "user_id": ["u1", "u1", "u2", "u3"],
    "item_id": ["i1", "i2", "i1", "i3"],
    "event_timestamp": ["2026-01-01T10:00:00Z"] * 4,
    "channel": ["web", "web", "app", "web"],
    "price": [1.0, 2.5, None, 0.0],
    "clicked": [0, 1, 0, 1],
}


def exposures(**columns: Any) -> ibis.Table:
    """Four good exposures, with some columns replaced."""
    return ibis.memtable(pa.table(GOOD | columns))


def checked(table: ibis.Table, **config: Any) -> Validated:
    return validate(
        table, "exposures", SPEC, ValidationConfig.model_validate({"now": NOW} | config)
    )


def reasons(result: Validated) -> list[list[str]]:
    return [list(found) for found in result.quarantine.execute()["reasons"]]


def rules(table: str, *found: dict[str, Any]) -> dict[str, Any]:
    return {"tables": {table: {"rules": list(found)}}}


def require_exact(result: Validated) -> None:
    """Rows in = clean + quarantined + duplicates, counted in the tables themselves."""
    rows = result.report.rows
    assert rows["in"] == rows["clean"] + rows["quarantined"] + rows["duplicates"]
    assert rows["clean"] == result.clean.count().execute()
    assert rows["quarantined"] == result.quarantine.count().execute()
    assert sum(part.rows_in for part in result.report.partitions) == rows["in"]
    assert sum(part.quarantined for part in result.report.partitions) == rows["quarantined"]


# -- what clean tables look like -------------------------------------------------------------------


def test_good_rows_become_canonical() -> None:
    table = exposures(
        visit_id=[1, 1, 2, 3],  # numbers as keys
        user_id=[7.0, 7.0, 8.0, 9.0],  # as pandas writes whole numbers beside missing ones
        price=["1", "2.5", None, "0"],
        clicked=[False, True, False, True],
        junk=["dropped"] * 4,
    )
    result = checked(table)
    assert dict(result.clean.schema().items()) == {
        "visit_id": ibis.dtype("string"),
        "user_id": ibis.dtype("string"),
        "item_id": ibis.dtype("string"),
        "event_timestamp": ibis.dtype("timestamp('UTC', 6)"),
        "channel": ibis.dtype("string"),
        "price": ibis.dtype("float64"),
        "clicked": ibis.dtype("int64"),
        "inclusion_probability": ibis.dtype("float64"),
        "partition": ibis.dtype("string"),
    }
    clean = result.clean.execute()
    assert clean["visit_id"].tolist() == ["1", "1", "2", "3"]
    assert clean["user_id"].tolist() == ["7", "7", "8", "9"]
    assert clean["price"].tolist()[:2] == [1.0, 2.5]
    assert clean["clicked"].tolist() == [0, 1, 0, 1]
    assert clean["inclusion_probability"].tolist() == [1.0] * 4
    assert result.report.rows == {
        "in": 4,
        "clean": 4,
        "quarantined": 0,
        "duplicates": 0,
        "reasons": {},
    }


def test_moments_with_an_offset_become_utc() -> None:
    moments = ["2026-01-01T10:00:00+02:00", "2026-01-01 10:00:00", "2026-01-01", "2025-12-31"]
    clean = checked(exposures(event_timestamp=moments)).clean.execute()
    assert [str(moment) for moment in clean["event_timestamp"]] == [
        "2026-01-01 08:00:00+00:00",
        "2026-01-01 10:00:00+00:00",
        "2026-01-01 00:00:00+00:00",
        "2025-12-31 00:00:00+00:00",
    ]


def test_users_and_items_have_their_owners_columns() -> None:
    users = ibis.memtable(
        pa.table({"user_id": ["u1"], "age": [30], "event_timestamp": ["2020-01-01"], "x": [1]})
    )
    items = ibis.memtable(
        pa.table({"item_id": ["i1"], "genres": [["drama"]], "event_timestamp": ["2020-01-01"]})
    )
    assert validate(users, "users", SPEC, CONFIG).clean.columns == (
        "user_id",
        "event_timestamp",
        "age",
        "partition",
    )
    clean = validate(items, "items", SPEC, CONFIG).clean
    assert clean.schema()["genres"] == ibis.dtype("array<string>")


def test_interactions_have_what_aggregates_read() -> None:
    assert required_columns("interactions", SPEC, CONFIG) == (
        "user_id",
        "item_id",
        "event_timestamp",
        "amount",  # summed
        "channel",  # a key that belongs to the context
    )
    table = ibis.memtable(
        pa.table(
            {
                "user_id": ["u1", "u1"],
                "item_id": ["i1", "i1"],
                "event_timestamp": ["2026-01-01"] * 2,
                "amount": [1, 1],
                "channel": ["web", "web"],
            }
        )
    )
    result = validate(table, "interactions", SPEC, CONFIG)
    assert result.clean.schema()["amount"] == ibis.dtype("float64")
    assert result.report.rows["clean"] == 2  # alike, but a log of acts may repeat itself


def test_a_regression_label_is_a_finite_number() -> None:
    raw = SPEC.model_dump() | {"task": "regression", "label": {"name": "rating", "values": None}}
    raw["columns"] = [c.model_dump(exclude_none=True) for c in SPEC.columns if c.is_raw]
    spec = FeatureSpec.model_validate(raw)
    table = exposures(rating=[4.5, math.nan, math.inf, None])
    result = validate(table, "exposures", spec, CONFIG)
    assert result.clean.execute()["rating"].tolist() == [4.5]
    assert reasons(result) == [
        ["rating is not finite"],
        ["rating is not finite"],
        ["rating is missing"],
    ]


# -- bad rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "values", "expected"),
    [
        ("user_id", ["u1", None, "u2", "u3"], "user_id is missing"),
        ("visit_id", [1.0, math.nan, 2.0, 3.0], "visit_id is not finite"),
        ("event_timestamp", ["2026-01-01", "2026-02-30"] * 2, "event_timestamp is no timestamp"),
        ("event_timestamp", ["2026-01-01", "0001-01-01"] * 2, "event_timestamp is no timestamp"),
        ("event_timestamp", ["2026-01-01", "infinity"] * 2, "event_timestamp is no timestamp"),
        ("event_timestamp", ["2026-01-01", None] * 2, "event_timestamp is missing"),
        ("event_timestamp", ["2026-01-01", "2026-03-02"] * 2, "event_timestamp is in the future"),
        ("event_timestamp", ["2026-01-01", "9999-12-31"] * 2, "event_timestamp is in the future"),
        ("clicked", [0, 2, 0, 1], "clicked is not one of 0, 1"),
        ("clicked", [0, 0.5, 0, 1], "clicked is no whole number"),
        ("clicked", ["0", "yes", "0", "1"], "clicked is no whole number"),
        ("clicked", [0, math.nan, 0, 1], "clicked is not finite"),
        ("clicked", [0, None, 0, 1], "clicked is missing"),
        ("price", [1.0, math.nan, 2.0, 3.0], "price is not finite"),
        ("price", [1.0, math.inf, 2.0, 3.0], "price is not finite"),
        ("price", [1.0, -math.inf, 2.0, 3.0], "price is not finite"),
        ("price", ["1", "1e999", "2", "3"], "price is not finite"),
        ("price", ["1", "cheap", "2", "3"], "price is no number"),
        ("price", [1.0, -0.01, 2.0, 3.0], "price is below 0"),
        ("channel", ["web", "fax", "app", "web"], "channel is not one of web, app"),
        ("channel", ["web", None, "app", "web"], "channel is missing"),
        ("inclusion_probability", [1, 0, 1, 1], "inclusion_probability is outside (0, 1]"),
        ("inclusion_probability", [1, 1.1, 1, 1], "inclusion_probability is outside (0, 1]"),
        ("inclusion_probability", [1, None, 1, 1], "inclusion_probability is missing"),
        (
            "arrival_timestamp",
            ["2026-01-02", "2025-12-31", "2026-01-02", None],
            "arrival_timestamp is before event_timestamp",
        ),
        (
            "arrival_timestamp",
            ["2026-01-02", "2026-04-01", "2026-01-02", None],
            "arrival_timestamp is in the future",
        ),
    ],
)
def test_a_bad_value_is_quarantined_with_its_one_reason(
    column: str, values: list[Any], expected: str
) -> None:
    result = checked(exposures(**{column: pa.array(values, from_pandas=False)}))
    bad = [row for row in range(4) if values[row] == values[1] or row == 1]
    assert reasons(result) == [[expected]] * len(bad)
    assert result.quarantine.execute()["row_number"].tolist() == bad
    assert result.report.rows["reasons"] == {expected: len(bad)}
    require_exact(result)


def test_a_column_of_the_wrong_type_loses_every_row_not_its_meaning() -> None:
    """Whole numbers are no timestamps: their unit is unknown, so they are not guessed at."""
    result = checked(exposures(event_timestamp=[1767261600] * 4, price=[["a"], ["b"], None, []]))
    assert reasons(result)[0] == ["event_timestamp is no timestamp", "price is no number"]
    assert reasons(result)[2] == ["event_timestamp is no timestamp"]
    assert result.report.rows["clean"] == 0


def test_several_faults_are_several_reasons_for_one_row() -> None:
    table = exposures(
        user_id=["u1", None, "u2", "u3"],
        channel=["web", "fax", "app", "web"],
        price=[1, -1, 2, 3],
        clicked=[0, 9, 0, 1],
    )
    result = checked(table)
    assert reasons(result) == [
        [
            "user_id is missing",
            "channel is not one of web, app",
            "price is below 0",
            "clicked is not one of 0, 1",
        ]
    ]
    assert result.report.rows["quarantined"] == 1
    assert sum(result.report.rows["reasons"].values()) == 4


def test_quarantine_keeps_the_raw_values_as_text() -> None:
    table = exposures(price=[1, -7, 2, 3], junk=[None, [1, 2], None, None])
    row = checked(table).quarantine.execute().iloc[0]
    assert row["price"] == "-7"
    assert row["junk"] == "[1, 2]"
    assert row["event_timestamp"] == "2026-01-01T10:00:00Z"
    assert row["partition"] == "exposures"


def test_a_closed_set_of_a_multi_column_holds_for_every_entry() -> None:
    genres = [["drama"], ["drama", "opera"], [], None]
    table = ibis.memtable(
        pa.table(
            {
                "item_id": ["a", "b", "c", "d"],
                "genres": genres,
                "event_timestamp": ["2020-01-01"] * 4,
            }
        )
    )
    result = validate(table, "items", SPEC, CONFIG)
    assert reasons(result) == [["genres is not one of drama, comedy"]]
    assert result.clean.execute()["item_id"].tolist() == ["a", "c", "d"]


def test_text_that_is_no_list_is_no_list() -> None:
    table = ibis.memtable(
        pa.table(
            {
                "item_id": ["a", "b"],
                "genres": ["[drama, comedy]", "drama|comedy"],
                "event_timestamp": ["2020-01-01"] * 2,
            }
        )
    )
    result = validate(table, "items", SPEC, CONFIG)
    assert reasons(result) == [["genres is no list"]]
    assert list(result.clean.execute()["genres"][0]) == ["drama", "comedy"]


def test_bounds_may_have_two_sides() -> None:
    table = ibis.memtable(
        pa.table(
            {
                "user_id": ["a", "b", "c", "d"],
                "age": [0, 120, 121, -1],
                "event_timestamp": ["2020-01-01"] * 4,
            }
        )
    )
    result = validate(table, "users", SPEC, CONFIG)
    assert reasons(result) == [["age is outside [0, 120]"]] * 2


def test_clocks_may_run_ahead_a_little() -> None:
    moments = ["2026-03-01T00:00:10Z", "2026-03-01T00:00:11Z", "2026-01-01", "2026-01-01"]
    result = checked(exposures(event_timestamp=moments), future_tolerance_seconds=10)
    assert result.quarantine.execute()["row_number"].tolist() == [1]


def test_logs_may_have_a_beginning_but_attributes_have_none() -> None:
    moments = ["2024-12-31T23:59:59", "2025-01-01", "2026-01-01", "2026-01-01"]
    result = checked(exposures(event_timestamp=moments), earliest="2025-01-01")
    assert reasons(result) == [["event_timestamp is before 2025-01-01T00:00:00Z"]]
    users = ibis.memtable(
        pa.table({"user_id": ["u"], "age": [1], "event_timestamp": ["1990-01-01"]})
    )
    config = ValidationConfig.model_validate({"now": NOW, "earliest": "2025-01-01"})
    assert validate(users, "users", SPEC, config).report.rows["clean"] == 1


def test_without_a_moment_in_conf_now_is_now() -> None:
    ahead = datetime.now(timezone.utc).replace(year=datetime.now(timezone.utc).year + 1, day=1)
    result = checked(exposures(event_timestamp=[ahead.isoformat(), *["2026-01-01"] * 3]), now=None)
    assert reasons(result) == [["event_timestamp is in the future"]]


# -- duplicates ------------------------------------------------------------------------------------


def test_duplicates_keep_the_first_in_reading_order() -> None:
    table = exposures(
        visit_id=["v1", "v1", "v1", "v3"],
        user_id=["u1", "u1", "u1", "u3"],
        item_id=["i1", "i2", "i1", "i3"],
        clicked=[0, 1, 1, 1],
    )
    result = checked(table)
    assert result.report.rows["duplicates"] == 1
    assert result.clean.execute()["clicked"].tolist() == [0, 1, 1]
    require_exact(result)


def test_a_bad_first_copy_gives_way_to_a_good_second_one() -> None:
    table = exposures(
        visit_id=["v1"] * 4, user_id=["u1"] * 4, item_id=["i1"] * 4, clicked=[7, 1, 0, 7]
    )
    result = checked(table)
    assert result.clean.execute()["clicked"].tolist() == [1]
    assert result.report.rows["quarantined"] == 2
    assert result.report.rows["duplicates"] == 1


def test_users_repeat_only_at_the_same_moment() -> None:
    table = ibis.memtable(
        pa.table(
            {
                "user_id": ["u1", "u1", "u1"],
                "age": [30, 31, 99],
                "event_timestamp": ["2020-01-01", "2021-01-01", "2020-01-01"],
            }
        )
    )
    result = validate(table, "users", SPEC, CONFIG)
    assert result.clean.execute()["age"].tolist() == [30, 31]


def test_what_tells_duplicates_may_be_configured() -> None:
    table = exposures()  # visit_id: v1, v1, v2, v3
    by_visit = {"tables": {"exposures": {"duplicates": ["visit_id"]}}}
    assert checked(table, **by_visit).report.rows["duplicates"] == 1
    unknown = {"tables": {"exposures": {"duplicates": ["visit"]}}}
    with pytest.raises(RawDataError, match="told by visit, which is no column of exposures"):
        checked(table, **unknown)


# -- rules in conf ---------------------------------------------------------------------------------


def test_a_rule_in_conf_quarantines_like_those_of_the_spec() -> None:
    text = """
    tables:
      exposures:
        rules:
          - type: expect_column_values_to_be_between
            kwargs: {column: quantity, min_value: 0, strict_min: true}
          - type: expect_column_values_to_match_regex
            kwargs: {column: item_id, regex: "^i[0-9]$"}
            reason: item_id has no shape of ours
    """
    table = exposures(quantity=["1", "0", None, "2"], item_id=["i1", "i2", "i1", "x"])
    result = checked(table, **yaml.safe_load(text))
    assert reasons(result) == [
        ["quantity: values to be between (min_value 0, strict_min True)"],
        ["item_id has no shape of ours"],
    ]
    assert result.clean.schema()["quantity"] == ibis.dtype("float64")  # a rule reads it: kept


def test_a_rule_may_compare_columns_and_hold_for_some_rows_only() -> None:
    pair = {
        "type": "expect_column_pair_values_a_to_be_greater_than_b",
        "kwargs": {"column_A": "list_price", "column_B": "price", "or_equal": True},
        "reason": "price is above the list price",
    }
    web_only = {
        "type": "expect_column_values_to_be_between",
        "kwargs": {
            "column": "price",
            "max_value": 2,
            "row_condition": {
                "type": "comparison",
                "column": {"name": "channel"},
                "operator": "==",
                "parameter": "web",
            },
        },
        "reason": "price is above 2 on the web",
    }
    table = exposures(list_price=[1.0, 2.0, 3.0, 3.0], price=[1.0, 2.5, 3.0, 1.0])
    result = checked(table, **rules("exposures", pair, web_only))
    assert reasons(result) == [["price is above the list price", "price is above 2 on the web"]]


def test_a_rule_about_the_whole_table_stops_the_batch_but_quarantines_nothing() -> None:
    rule = {"type": "expect_table_row_count_to_be_between", "kwargs": {"min_value": 1000}}
    result = checked(exposures(), **rules("exposures", rule))
    assert result.report.rows["clean"] == 4
    assert not result.report.is_healthy
    with pytest.raises(QuarantineError, match=r"row count to be between \(min_value 1000\), but"):
        require_healthy([result.report], CONFIG)


def test_all_faulty_rules_are_reported_together() -> None:
    faulty = [
        {"type": "expect_column_values_to_be_betwen", "kwargs": {"column": "price"}},
        {"type": "expect_column_values_to_be_unique", "kwargs": {"column": "price"}},
        {"type": "expect_column_values_to_be_in_set", "kwargs": {"columns": ["price"]}},
        {
            "type": "expect_column_values_to_not_be_null",
            "kwargs": {"column": "price", "mostly": 0.9},
        },
    ]
    with pytest.raises(RuleError) as caught:
        checked(exposures(), **rules("exposures", *faulty))
    assert len(caught.value.faults) == 4
    assert "did you mean expect_column_values_to_be_between" in caught.value.faults[0]
    assert "list the columns under 'duplicates'" in caught.value.faults[1]
    assert "column" in caught.value.faults[2]
    assert "'max_quarantined_share'" in caught.value.faults[3]


def test_a_rule_that_cannot_run_is_reported() -> None:
    rule = {
        "type": "expect_column_values_to_be_between",
        "kwargs": {"column": "channel", "min_value": "a", "max_value": 3},
    }
    with pytest.raises(RuleError, match="expect_column_values_to_be_between"):
        checked(exposures(), **rules("exposures", rule))


def test_a_wrong_config_names_the_line() -> None:
    wrong = {"tables": {"exposures": {"max_quarantined_share": 5}, "clicks": {}}, "noww": 1}
    with pytest.raises(ValidationError) as caught:
        ValidationConfig.model_validate(wrong)
    text = str(caught.value)
    assert "tables.exposures.max_quarantined_share" in text
    assert "tables.clicks" in text
    assert "noww" in text


# -- reading ---------------------------------------------------------------------------------------


def write(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(GOOD | columns), path)
    return path


def test_partitions_are_read_in_order_of_their_names(tmp_path: Path) -> None:
    write(tmp_path / "week_02.parquet", visit_id=["w2"] * 4)
    write(tmp_path / "week_01.parquet", visit_id=["w1"] * 4)
    table = read_partitions(tmp_path, "exposures").execute().sort_values("row_number")
    assert table["partition"].tolist() == ["week_01"] * 4 + ["week_02"] * 4
    assert table["visit_id"].tolist() == ["w1"] * 4 + ["w2"] * 4
    assert table["row_number"].tolist() == list(range(8))


def test_a_single_file_is_a_table_of_one_partition(tmp_path: Path) -> None:
    path = write(tmp_path / "all.parquet")
    assert set(read_partitions(path, "exposures").execute()["partition"]) == {"all"}


def test_types_that_differ_between_files_meet(tmp_path: Path) -> None:
    """Each delivery has the types its writer had that day; the keys stay the same keys."""
    a = {
        "visit_id": list("abcd"),
        "user_id": [1, 2, 3, 4],
        "price": [1, 2, 3, 4],
        "note": pa.nulls(4),
    }
    b = {"visit_id": list("efgh"), "user_id": [1.0, 2.0, 3.0, None], "price": [1.5] * 4}
    c = {"visit_id": list("ijkl"), "user_id": ["1", "2", "3", "4"], "price": ["1.5"] * 4}
    moments = pd.to_datetime(["2026-01-01T10:00:00"] * 4).astype("datetime64[ns]")
    write(tmp_path / "a.parquet", **a)
    write(tmp_path / "b.parquet", **b, event_timestamp=moments)
    required = required_columns("exposures", SPEC, CONFIG)
    table = read_partitions(tmp_path, "exposures", required)
    assert table.schema()["user_id"] == ibis.dtype("float64")
    write(tmp_path / "c.parquet", **c, event_timestamp=moments.tz_localize("Europe/Berlin"))
    result = checked(read_partitions(tmp_path, "exposures", required))
    clean = result.clean.execute()
    assert clean["user_id"].tolist() == ["1", "2", "3", "4", "1", "2", "3", "1", "2", "3", "4"]
    assert clean["price"].tolist() == [1, 2, 3, 4] + [1.5] * 7
    assert [str(moment) for moment in clean["event_timestamp"][[0, 4, 7]]] == [
        "2026-01-01 10:00:00+00:00",
        "2026-01-01 10:00:00+00:00",
        "2026-01-01 09:00:00+00:00",
    ]
    assert reasons(result) == [["user_id is missing"]]


def test_repaired_rows_of_the_quarantine_can_be_handed_in_again(tmp_path: Path) -> None:
    result = checked(exposures(user_id=[1.0, 2.0, 3.0, 4.0], price=[1, -7, 2, 3]))
    rejected = result.quarantine.execute()
    rejected["price"] = rejected["price"].str.removeprefix("-")
    rejected.to_parquet(tmp_path / "repaired.parquet")
    again = checked(read_partitions(tmp_path, "exposures"))
    assert again.report.rows["clean"] == 1
    row = again.clean.execute().iloc[0]
    assert (row["user_id"], row["price"], row["partition"]) == ("2", 7.0, "exposures")


def test_all_damaged_files_are_reported_together(tmp_path: Path) -> None:
    write(tmp_path / "good.parquet")
    pq.write_table(pa.table(GOOD).slice(0, 0), tmp_path / "empty.parquet")
    write(tmp_path / "narrow.parquet")
    pq.write_table(pa.table(GOOD).drop_columns(["price", "channel"]), tmp_path / "narrow.parquet")
    whole = write(tmp_path / "short.parquet").read_bytes()
    (tmp_path / "short.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.parquet").write_text("visit_id,user_id\n")
    with pytest.raises(RawDataError) as caught:
        read_partitions(tmp_path, "exposures", required_columns("exposures", SPEC, CONFIG))
    assert [fault.split(" (")[0].split(";")[0] for fault in caught.value.faults] == [
        "short.parquet: truncated or unreadable",
        "text.parquet: truncated or unreadable",
        "empty.parquet: has 0 rows",
        "narrow.parquet: lacks channel, price",
    ]
    message = str(caught.value)
    assert message.startswith("raw exposures: 4 faults")
    assert "replace the file with a complete copy, or remove it" in message
    assert "an empty delivery usually is a broken feed; remove the file to skip it" in message


def test_damage_below_a_whole_footer_is_found(tmp_path: Path) -> None:
    path = tmp_path / "bits.parquet"
    pq.write_table(pa.table(GOOD), path, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[30] ^= 0xFF  # within the first page of data
    path.write_bytes(content)
    assert pq.read_metadata(path).num_rows == 4
    with pytest.raises(RawDataError, match=r"bits\.parquet: truncated or unreadable"):
        read_partitions(tmp_path, "exposures")


def test_a_folder_without_files_is_reported(tmp_path: Path) -> None:
    with pytest.raises(RawDataError, match=r"holds no \*\.parquet file; run the source first"):
        read_partitions(tmp_path / "nowhere", "users")


def test_columns_need_only_be_in_every_file_if_required(tmp_path: Path) -> None:
    write(tmp_path / "old.parquet")
    write(tmp_path / "new.parquet", device=["phone"] * 4)
    with pytest.raises(RawDataError, match=r"old\.parquet: lacks device"):
        read_partitions(tmp_path, "exposures")
    table = read_partitions(tmp_path, "exposures", required_columns("exposures", SPEC, CONFIG))
    assert table.count().execute() == 8


def test_missing_columns_fail_the_batch_before_any_row_is_judged() -> None:
    table = exposures().drop("clicked", "channel")
    with pytest.raises(RawDataError) as caught:
        checked(table)
    assert [fault.split(";")[0] for fault in caught.value.faults] == [
        "column channel is missing",
        "column clicked is missing",
    ]


def test_rows_must_be_told_apart() -> None:
    with pytest.raises(RawDataError, match="row_number must differ from row to row"):
        checked(exposures(row_number=[0, 1, 1, 2]))
    result = checked(exposures(row_number=[3, 2, 1, 0], clicked=[0, 1, 1, 1]))
    assert result.clean.execute()["clicked"].tolist() == [1, 1, 1, 0]  # in order of the numbers


# -- the share that stops a batch ------------------------------------------------------------------


def test_all_tables_over_their_bound_are_reported_together(tmp_path: Path) -> None:
    config = ValidationConfig.model_validate(
        {
            "now": NOW,
            "tables": {
                "exposures": {"max_quarantined_share": 0.2},
                "users": {"max_quarantined_share": 0.5},
                "items": {"max_quarantined_share": 0.1},
            },
            "quarantine_file": "data/bad/{table}.parquet",
        }
    )
    found = {
        "exposures": exposures(price=[-1, 2, 3, 4]),
        "users": ibis.memtable(
            pa.table({"user_id": ["a", "b"], "age": [-1, 2], "event_timestamp": ["2020-01-01"] * 2})
        ),
        "items": ibis.memtable(
            pa.table({"item_id": [None], "genres": [["drama"]], "event_timestamp": ["2020-01-01"]})
        ),
    }
    reports = [validate(found[name], name, SPEC, config).report for name in config.tables]
    with pytest.raises(QuarantineError) as caught:
        require_healthy(reports, config)
    assert caught.value.faults == [
        "exposures: 25.00% of 4 rows are quarantined, above the bound of 20.00%: price is below 0 "
        "(1 row); the rows are in data/bad/exposures.parquet; repair the source and run again, or "
        "raise validation.tables.exposures.max_quarantined_share",
        "items: 100.00% of 1 rows are quarantined, above the bound of 10.00%: item_id is missing "
        "(1 row); the rows are in data/bad/items.parquet; repair the source and run again, or "
        "raise validation.tables.items.max_quarantined_share",
    ]
    require_healthy([reports[1]], config)  # half is not above a half


def test_an_empty_table_is_clean() -> None:
    result = checked(ibis.memtable(pa.table(GOOD).slice(0, 0)))
    assert result.report.rows["in"] == 0
    assert result.report.quarantined_share == 0
    require_exact(result)


# -- any table -------------------------------------------------------------------------------------

GOOD_VALUES: dict[str, list[Any]] = {
    "visit_id": ["v1", "v2"],
    "user_id": ["u1", ""],
    "item_id": ["i1", "i2"],
    "event_timestamp": ["2026-01-01", "2026-01-01T05:00:00-05:00"],
    "arrival_timestamp": ["2026-01-01T12:00:00Z", None],
    "channel": ["web", "app"],
    "price": ["1", None],
    "clicked": [0.0, 1.0],
    "inclusion_probability": [1.0, 0.25],
}
BAD_VALUES: dict[str, list[Any]] = {
    "visit_id": [None],
    "user_id": [None],
    "item_id": [None],
    "event_timestamp": ["2027-01-01", "soon", "-infinity", None],
    "arrival_timestamp": ["2020-01-01", "2027-01-01", "x"],
    "channel": ["fax", None],
    "price": ["-1", "nan", "inf", "cheap"],
    "clicked": [2.0, 0.5, math.nan, None],
    "inclusion_probability": [0.0, 1.5, -math.inf, None],
}
GOOD_ROWS = st.fixed_dictionaries({k: st.sampled_from(v) for k, v in GOOD_VALUES.items()})
FAULTS = st.fixed_dictionaries({}, optional={k: st.sampled_from(v) for k, v in BAD_VALUES.items()})
SCHEMA = pa.schema(
    [(k, pa.string() if isinstance(v[0], str) else pa.float64()) for k, v in GOOD_VALUES.items()]
)


@settings(max_examples=12)
@given(st.lists(st.tuples(GOOD_ROWS, st.none() | FAULTS), min_size=1, max_size=30))
def test_no_row_is_lost_and_clean_rows_stay_clean(
    drawn: list[tuple[dict[str, Any], dict[str, Any] | None]],
) -> None:
    rows = [good | (faults or {}) for good, faults in drawn]
    first = checked(ibis.memtable(pa.Table.from_pylist(rows, schema=SCHEMA)))
    require_exact(first)
    good = [row for row, (_, faults) in zip(rows, drawn, strict=True) if not faults]
    kept = {(row["visit_id"], row["user_id"], row["item_id"]): row for row in reversed(good)}
    assert first.report.rows["quarantined"] == len(rows) - len(good)
    assert first.report.rows["duplicates"] == len(good) - len(kept)
    for row in first.clean.execute().itertuples():
        assert kept[row.visit_id, row.user_id, row.item_id]["clicked"] == row.clicked
    again = checked(first.clean)
    assert again.report.rows["in"] == again.report.rows["clean"] == len(kept)


# -- reports ---------------------------------------------------------------------------------------


def test_the_report_counts_rows_by_partition_and_expectation() -> None:
    report = checked(exposures(partition=["a", "a", "b", "b"], clicked=[5, 0, 1, 1])).report
    assert [(p.partition, p.rows_in, p.clean, p.quarantined) for p in report.partitions] == [
        ("a", 2, 1, 1),
        ("b", 2, 2, 0),
    ]
    broken = [e for e in report.expectations if not e.success]
    assert [(e.type, e.columns, e.claim, e.unexpected) for e in broken] == [
        ("expect_column_values_to_be_in_set", ("clicked",), "clicked is one of 0, 1", 1)
    ]
    assert report.examples["clicked is not one of 0, 1"][0]["clicked"] == "5"
    assert json.loads(json.dumps(report.as_dict())) is not None


def test_great_expectations_own_result_shows_casts_as_expectations() -> None:
    gx = checked(exposures(price=["1", "cheap", "2", "nan"])).report.gx
    by_column = {
        entry["expectation_config"]["kwargs"]["column"]: entry["result"]
        for entry in gx["results"]
        if not entry["success"]
    }
    assert by_column["price: number"]["unexpected_count"] == 1
    assert by_column["price: finite"]["unexpected_count"] == 1
    assert gx["suite_name"] == "exposures"


def test_the_suite_follows_from_the_spec() -> None:
    """One more line in the spec is one more set of expectations, and no Python."""
    before = {e.claim for e in checked(exposures()).report.expectations}
    raw = SPEC.model_dump(mode="json", exclude_none=True)
    raw["columns"].append(
        {"name": "rank", "kind": "numeric", "owner": "context", "minimum": 1, "nullable": False}
    )
    spec = FeatureSpec.model_validate(raw)
    table = exposures(rank=[1, 2, 0, 3])
    result = validate(table, "exposures", spec, CONFIG)
    after = {e.claim for e in result.report.expectations}
    assert after - before == {
        "rank is given",
        "rank is a number",
        "rank is finite",
        "rank is at least 1",
    }
    assert reasons(result) == [["rank is below 1"]]


def test_the_page_stands_alone_and_escapes_raw_values() -> None:
    table = exposures(
        channel=["web", '<script>alert("x")</script>', "app", "web"],
        partition=["<b>", "<b>", "<b>", "<b>"],
    )
    page = render_html([checked(table).report])
    assert "<script" not in page
    assert "<b>" not in page.replace('<p class="bad"><b>The batch stops</b>', "")
    assert "&lt;script&gt;alert(&quot;x&quot;)&lt;/script&gt;" in page
    for outside in ("http:", "https:", "src=", "@import", "url(", "<link"):
        assert outside not in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert "The batch stops" in page
    assert "25.00% quarantined, above the bound of 5.00%" in page


def test_the_page_says_when_all_is_well() -> None:
    page = render_html([checked(exposures()).report])
    assert "The batch may go on" in page
    assert "No row is quarantined" in page


def test_data_docs_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    table = exposures(channel=["web", "<script>alert(1)</script>", "app", "web"])
    users = ibis.memtable(
        pa.table({"user_id": ["u"], "age": [1], "event_timestamp": ["2020-01-01"]})
    )
    reports = [checked(table).report, validate(users, "users", SPEC, CONFIG).report]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "stale.html").write_text("from the run before")
    write_data_docs(reports, tmp_path / "docs")
    pages = {path.relative_to(tmp_path / "docs").parts[:2] for path in tmp_path.rglob("*.html")}
    assert pages >= {
        ("index.html",),
        ("validations", "exposures"),
        ("validations", "users"),
        ("expectations", "exposures.html"),
        ("expectations", "users.html"),
    }
    assert not (tmp_path / "docs" / "stale.html").exists()
    (page,) = (tmp_path / "docs" / "validations" / "exposures").rglob("*.html")
    assert "<script>alert(1)" not in page.read_text()
    assert "alert(1)" in page.read_text()
    assert [*home.iterdir(), *here.iterdir()] == []


def test_validation_is_deterministic() -> None:
    table = exposures(price=[-1, 2, -1, 4], clicked=[3, 0, 3, 9])
    first, second = checked(table), checked(table)
    assert first.report == second.report
    assert render_html([first.report]) == render_html([second.report])
    assert first.clean.execute().equals(second.clean.execute())


def test_the_configuration_of_the_default_data_set_is_valid() -> None:
    base = Path(__file__).parents[1] / "conf" / "base" / "parameters_validation.yml"
    config = ValidationConfig.model_validate(yaml.safe_load(base.read_text())["validation"])
    assert set(config.tables) == {"exposures", "interactions", "users", "items"}
