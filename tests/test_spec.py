"""The spec: every fault at once and by name; one hash everywhere; two features in three lines."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections import Counter
from datetime import date, datetime, timedelta, timezone
from difflib import ndiff
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fathom.batch import Ragged
from fathom.encoding import fit_encoder, with_ratios
from fathom.spec import MOST_BUCKETS, RESERVED, FeatureSpec, SpecError

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "conf" / "base" / "parameters_features.yml"
MOVIELENS = ROOT / "conf" / "movielens" / "parameters_features.yml"

#: A shop in ten lines; the tests bend one thing at a time.
SHOP = """
entities: {user: user_id, item: item_id, request: visit_id}
label: {name: bought, values: [0, 1]}
columns:
  - {name: user_id, kind: categorical, owner: user, nullable: false, embedding: 16}
  - {name: age, kind: numeric, owner: user, minimum: 0}
  - {name: genre, kind: categorical, owner: item, wide: true}
  - {name: tags, kind: multi, owner: item}
  - {name: price, kind: numeric, owner: context, buckets: [1, 10, 100]}
  - {name: purchases, kind: numeric, aggregate: {by: [user_id], measure: count}}
  - {name: recent, kind: sequence, embedding: {table: genre, width: 8}, aggregate: {by: [user_id], measure: last, column: genre, n: 3}}
  - {name: share, kind: numeric, ratio: {of: purchases, to: age}}
crosses:
  - {columns: [user_id, genre]}
"""  # noqa: E501


def shop(columns: str = "", crosses: str = "", **replaced: Any) -> dict[str, Any]:
    """The shop's spec as YAML gives it, with more lines and with keys replaced."""
    raw: dict[str, Any] = yaml.safe_load(SHOP)
    raw["columns"] += yaml.safe_load(columns) or []
    raw["crosses"] += yaml.safe_load(crosses) or []
    return raw | replaced


def without(raw: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name != key}


def column(line: str, **arguments: str) -> dict[str, Any]:
    """The shop with one more column."""
    return shop(columns=f"- {line}", **arguments)


def aggregate(inside: str, kind: str = "numeric", **replaced: Any) -> dict[str, Any]:
    """The shop with one more aggregate, called ``extra``."""
    return shop(columns=f"- {{name: extra, kind: {kind}, aggregate: {{{inside}}}}}", **replaced)


def faults(raw: Any) -> list[str]:
    """What `FeatureSpec` finds wrong."""
    with pytest.raises(ValidationError) as caught:
        FeatureSpec.model_validate(raw)
    (error,) = caught.value.errors()
    assert isinstance(error["ctx"]["error"], SpecError)
    return error["ctx"]["error"].faults


def load(path: Path) -> dict[str, Any]:
    features: dict[str, Any] = yaml.safe_load(path.read_text())["features"]
    return features


def python(code: str, seed: str) -> str:
    """What a process of its own prints, with its own seed for Python's ``hash``."""
    environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


# -- faults ---------------------------------------------------------------------------------------


def test_the_shop_is_sound() -> None:
    spec = FeatureSpec.model_validate(shop())
    assert len(spec.columns) == 8
    assert spec.task == "binary"


def test_three_faults_are_reported_together_each_with_its_line() -> None:
    raw = shop(
        columns="""
        - {name: weather, kind: categorical}
        - {name: humidity, kind: numeric, owner: context, minimum: 9, maximum: 1}
        """,
        crosses="- {columns: [genre, moon]}",
    )
    assert faults(raw) == [
        "weather: needs 'owner': user, item or context",
        "humidity: 'minimum' 9.0 is above 'maximum' 1.0",
        "cross genre_x_moon: 'moon' is no column",
    ]


def test_the_message_counts_the_faults_and_gives_each_a_line_of_its_own() -> None:
    assert str(SpecError(["one", "two"])) == "feature spec: 2 faults\n  - one\n  - two"
    assert str(SpecError(["one"])) == "feature spec: 1 fault\n  - one"
    with pytest.raises(ValidationError, match=r"feature spec: 1 fault\n  - spec: task: Input"):
        FeatureSpec.model_validate(shop(task="ranking"))


def test_faults_of_every_part_are_reported_together() -> None:
    raw = {
        "task": "ranking",
        "grain_days": 0,
        "grain_origin": "soon",
        "entities": {"user": "User"},
        "label": {"name": "bought", "values": ["0", "1"]},
        "colums": [],
        "columns": [
            {"name": "age", "kind": "number", "owner": "user"},
            {"name": "Age", "kind": "numeric", "owner": "user"},
            "genre",
            {"name": ["x"], "kind": "numeric", "owner": "user"},
            {"name": "gap", "kind": "numeric", "aggregate": {"by": ["age"], "measure": "sum"}},
            {"name": "part", "kind": "numeric", "ratio": {"of": "gone", "to": "age"}},
        ],
        "crosses": [{"columns": ["age"]}, {"columns": ["age", "gone"], "buckets": 1}],
    }
    found = faults(raw)
    for start in (
        "spec: task: Input should be 'binary' or 'regression' (got 'ranking')",
        "spec: grain_days: Input should be greater than or equal to 1 (got 0)",
        "spec: colums: Extra inputs are not permitted (got ())",
        "grain_origin: 'soon' is no ISO 8601 moment, as 2017-01-02T05:00:00Z",
        "entities: user: String should match pattern",
        "entities: item: Field required",
        "entities: request: Field required",
        "label: values.0: Input should be a valid integer (got '0')",
        "label: values.1: Input should be a valid integer (got '1')",
        "age: kind: Input should be 'categorical', 'multi', 'numeric' or 'sequence' (got 'number')",
        "Age: name: String should match pattern",
        "columns[2]: Input should be a valid dictionary",
        "columns[3]: name: Input should be a valid string",
        "crosses[0]: columns: Tuple should have at least 2 items",
        "crosses[1]: buckets: Input should be greater than or equal to 2 (got 1)",
        "gap: measure 'sum' needs 'column'",
        "part: ratio of 'gone', which is no column",
    ):
        assert [fault for fault in found if fault.startswith(start)], (start, found)
    # Nothing is said about `age` not existing: its line is wrong, and that is said already.
    assert len(found) == 17


def test_a_fault_shows_what_was_found_and_cuts_it_when_it_is_long() -> None:
    (fault,) = faults(shop(colums=[{"name": f"feature_{i}"} for i in range(50)]))
    assert fault.startswith("spec: colums: Extra inputs are not permitted (got ({'name': 'feature_")
    assert fault.endswith("...)")
    assert len(fault) < 140


AGGREGATE_FAULTS = [
    (
        "by: [user_id], measure: sum",
        "measure 'sum' needs 'column', the log's column it reads",
    ),
    (
        "by: [user_id], measure: mean",
        "measure 'mean' needs 'column', the log's column it reads",
    ),
    (
        "by: [user_id], measure: count, column: price",
        "measure 'count' reads no column; remove 'column: price'",
    ),
    (
        "by: [user_id], measure: recency_days, column: price",
        "measure 'recency_days' reads no column; remove 'column: price'",
    ),
    (
        "of: exposures, by: [user_id], measure: rate, prior_weight: 1, column: price",
        "measure 'rate' reads no column; remove 'column: price'",
    ),
    (
        "by: [user_id], measure: count, n: 3",
        "measure 'count' keeps no values; remove 'n: 3'",
    ),
    (
        "by: [user_id], measure: recency_days, window_days: 7",
        "measure 'recency_days' has no window; remove 'window_days'",
    ),
    (
        "by: [user_id], measure: rate, prior_weight: 1",
        "measure 'rate' is of labels, so it needs 'of: exposures'",
    ),
    (
        "of: exposures, by: [user_id], measure: rate",
        "measure 'rate' needs a 'prior_weight' above 0, or new keys have no rate",
    ),
    ("by: [moon], measure: count", "by 'moon', which is no key and no column"),
    ("by: [tags], measure: count", "by 'tags', which is not a raw categorical column"),
    ("by: [age], measure: count", "by 'age', which is not a raw categorical column"),
    ("by: [recent], measure: count", "by 'recent', which is not a raw categorical column"),
    (
        "by: [user_id, user_id], measure: count",
        "by ['user_id', 'user_id'], which names a key twice",
    ),
]

SEQUENCE_FAULTS = [
    (
        "by: [user_id], measure: last, n: 3",
        "measure 'last' needs 'column', the log's column it reads",
    ),
    (
        "by: [user_id], measure: last, column: genre",
        "measure 'last' needs 'n', how many values to keep",
    ),
    (
        "by: [user_id, genre], measure: last, column: genre, n: 3",
        "measure 'last' is by one key, not by ['user_id', 'genre']",
    ),
    (
        "by: [user_id], measure: last, column: genre, n: 3, window_days: 7",
        "measure 'last' has no window; remove 'window_days'",
    ),
    ("by: [user_id], measure: count", "measure 'count' does not give a sequence column"),
]


@pytest.mark.parametrize(("inside", "fault"), AGGREGATE_FAULTS)
def test_a_fault_of_an_aggregate(inside: str, fault: str) -> None:
    assert faults(aggregate(inside)) == [f"extra: {fault}"]


@pytest.mark.parametrize(("inside", "fault"), SEQUENCE_FAULTS)
def test_a_fault_of_a_history(inside: str, fault: str) -> None:
    assert f"extra: {fault}" in faults(aggregate(inside, kind="sequence"))


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        *[
            (
                f"{{name: {name}, kind: numeric, owner: user}}",
                "the name is reserved; choose another",
            )
            for name in sorted(RESERVED)
        ],
        ("{name: extra, kind: numeric}", "needs 'owner': user, item or context"),
        (
            "{name: extra, kind: numeric, owner: user, ratio: {of: age, to: price}}",
            "its owner follows from its keys; remove 'owner: user'",
        ),
        (
            "{name: extra, kind: numeric, owner: item, aggregate: {by: [item_id], measure: count}}",
            "its owner follows from its keys; remove 'owner: item'",
        ),
        (
            "{name: extra, kind: numeric, ratio: {of: age, to: price}, "
            "aggregate: {by: [user_id], measure: count}}",
            "is both an aggregate and a ratio; keep one",
        ),
        (
            "{name: extra, kind: categorical, ratio: {of: age, to: price}}",
            "a ratio is numeric, not categorical",
        ),
        (
            "{name: extra, kind: categorical, aggregate: {by: [user_id], measure: count}}",
            "measure 'count' is numeric, not categorical",
        ),
        (
            "{name: extra, kind: categorical, "
            "aggregate: {by: [user_id], measure: last, column: genre, n: 3}}",
            "measure 'last' does not give a categorical column",
        ),
        (
            "{name: extra, kind: numeric, owner: user, values: [a]}",
            "a numeric column has neither 'values' nor 'embedding'",
        ),
        (
            "{name: extra, kind: numeric, owner: user, embedding: 4}",
            "a numeric column has neither 'values' nor 'embedding'",
        ),
        (
            "{name: extra, kind: numeric, owner: user, wide: true}",
            "a numeric column is wide only through a cross; remove 'wide: true'",
        ),
        (
            "{name: extra, kind: multi, owner: user, minimum: 0}",
            "'minimum' and 'maximum' are for numeric columns, not multi",
        ),
        (
            "{name: extra, kind: categorical, owner: user, maximum: 9}",
            "'minimum' and 'maximum' are for numeric columns, not categorical",
        ),
        (
            "{name: extra, kind: categorical, owner: user, buckets: [1]}",
            "'buckets' are for numeric columns, not categorical",
        ),
        (
            "{name: extra, kind: numeric, owner: user, buckets: [2, 1]}",
            "'buckets' must rise: [2.0, 1.0]",
        ),
        (
            "{name: extra, kind: numeric, owner: user, buckets: [1, 1]}",
            "'buckets' must rise: [1.0, 1.0]",
        ),
        (
            "{name: extra, kind: numeric, owner: user, minimum: 2, maximum: 1}",
            "'minimum' 2.0 is above 'maximum' 1.0",
        ),
        (
            "{name: age, kind: numeric, owner: user}",
            "declared 2 times; names are unique",
        ),
        (
            "{name: extra, kind: categorical, owner: user, embedding: {table: user_id, width: 8}}",
            "embedding table 'user_id' has width 8 here and 16 at user_id",
        ),
        (  # a column without `embedding` has a table of its own, of width 8
            "{name: extra, kind: multi, owner: user, embedding: {table: tags, width: 4}}",
            "embedding table 'tags' has width 4 here and 8 at tags",
        ),
        (
            "{name: extra, kind: numeric, ratio: {of: moon, to: age}}",
            "ratio of 'moon', which is no column",
        ),
        (
            "{name: extra, kind: numeric, ratio: {of: age, to: moon}}",
            "ratio of 'moon', which is no column",
        ),
        (
            "{name: extra, kind: numeric, ratio: {of: genre, to: age}}",
            "ratio of 'genre', which is not a plain number",
        ),
        (
            "{name: extra, kind: numeric, ratio: {of: age, to: share}}",
            "ratio of 'share', which is not a plain number",
        ),
        (
            "{name: extra, kind: numeric, ratio: {of: extra, to: age}}",
            "ratio of 'extra', which is not a plain number",
        ),
        (
            "{name: item_id, kind: multi, owner: item}",
            "is a key, so it is categorical with 'owner: item'",
        ),
        (
            "{name: item_id, kind: categorical, owner: user}",
            "is a key, so it is categorical with 'owner: item'",
        ),
        (
            "{name: visit_id, kind: categorical, owner: user}",
            "is a key, so it is categorical with 'owner: context'",
        ),
    ],
)
def test_a_fault_of_a_column(line: str, fault: str) -> None:
    found = faults(column(line))
    assert f"{yaml.safe_load(line)['name']}: {fault}" in found
    assert len(found) <= 2, found


@pytest.mark.parametrize(
    ("line", "faulty"),
    [
        ("{columns: [genre, moon]}", ["cross genre_x_moon: 'moon' is no column"]),
        ("{columns: [genre, genre]}", ["cross genre_x_genre: a column is crossed with itself"]),
        ("{columns: [user_id, genre]}", ["cross user_id_x_genre: declared 2 times"]),
        (
            f"{{columns: [genre, tags], buckets: {MOST_BUCKETS}}}\n"
            "- {columns: [genre, age], buckets: 2}",
            [f"crosses: {MOST_BUCKETS + 2} buckets in all; {MOST_BUCKETS} is the most"],
        ),
    ],
)
def test_a_fault_of_a_cross(line: str, faulty: list[str]) -> None:
    assert faults(shop(crosses=f"- {line}")) == faulty


def test_a_cross_may_not_be_called_as_a_column_is() -> None:
    raw = column("{name: user_id_x_genre, kind: categorical, owner: context, wide: true}")
    assert faults(raw) == ["cross user_id_x_genre: a column has the same name"]


def test_two_crosses_may_not_come_to_one_name() -> None:
    # (a_x_b, c) and (a, b_x_c) are different columns with one name: a_x_b_x_c.
    raw = shop(
        columns="".join(
            f"- {{name: {name}, kind: categorical, owner: context}}\n"
            for name in ("a", "a_x_b", "c", "b_x_c")
        ),
        crosses="- {columns: [a_x_b, c]}\n- {columns: [a, b_x_c]}",
    )
    assert faults(raw) == ["cross a_x_b_x_c: declared 2 times"]


def test_aggregates_by_different_keys_may_not_come_to_one_view() -> None:
    # Both views would be called a_b_c_interactions, and one would be summed by the other's keys.
    raw = shop(
        columns="".join(
            f"- {{name: {name}, kind: categorical, owner: context}}\n"
            for name in ("a", "a_b", "b_c", "c")
        )
        + "- {name: first, kind: numeric, aggregate: {by: [a_b, c], measure: count}}\n"
        + "- {name: second, kind: numeric, aggregate: {by: [a, b_c], measure: count}}\n"
    )
    assert faults(raw) == [
        "second: by ['a', 'b_c'] makes the view 'a_b_c_interactions', and so does by "
        "['a_b', 'c'] at first; rename a key"
    ]


@pytest.mark.parametrize(
    ("raw", "faulty"),
    [
        ([], ["expected a mapping, got list"]),
        (None, ["expected a mapping, got NoneType"]),
        (shop() | {"columns": 5}, ["columns: expected a list, got int", "is no column"]),
        (shop() | {"columns": []}, ["columns: needs one line or more", "is no column"]),
        (without(shop(), "columns"), ["columns: needs one line or more", "is no column"]),
        (shop() | {"crosses": {"columns": []}}, ["crosses: expected a list, got dict"]),
        (without(shop(), "label"), ["spec: label: Field required"]),
        (without(shop(), "entities"), ["spec: entities: Field required"]),
        (
            shop(entities={"user": "user_id", "item": "user_id", "request": "visit_id"}),
            [
                "entities: user, item and request must differ: ['user_id', 'visit_id']",
                "user_id: is a key, so it is categorical with 'owner: item'",
            ],
        ),
        (
            shop(entities={"user": "user_id", "item": "item_id", "request": "split"}),
            ["entities: 'split' is reserved; choose another"],
        ),
        (shop(label={"name": "reasons"}), ["label reasons: the name is reserved; choose another"]),
        (shop(label={"name": "item_id"}), ["label item_id: is also a key"]),
        (
            shop(label={"name": "price"}),
            ["label price: is also a column, which would leak the answer"],
        ),
        (
            shop(label={"name": "bought", "values": None}),
            ["label bought: a binary task needs 'values', the positive last"],
        ),
        (
            shop(label={"name": "bought", "values": [1, 1]}),
            ["label bought: 'values' must differ: [1, 1]"],
        ),
        (shop(task="regression"), ["label bought: a regression label has 'values: null'"]),
        (
            shop(grain_origin=date(2017, 1, 2)),
            ["grain_origin: datetime.date(2017, 1, 2) is no ISO 8601"],
        ),
        (
            shop(grain_origin="0001-01-01T00:00:00+05:00"),
            ["grain_origin: '0001-01-01T00:00:00+05:00'"],
        ),
        (
            aggregate("by: [user_id], measure: count, window_days: 10", grain_days=7),
            ["extra: window_days 10 is no multiple of grain_days 7"],
        ),
        (
            aggregate("by: [user_id], measure: count, window_days: 10", grain_days=0),
            ["spec: grain_days: Input should be greater than or equal to 1 (got 0)"],
        ),
        (
            shop(max_age_days={"users": 0}),
            ["spec: max_age_days.users: Input should be greater than 0 (got 0)"],
        ),
        (
            shop(max_age_days={"user": 3}),
            ["max_age_days: 'user' is no feature view; there are ['users', 'items', 'user_id_int"],
        ),
    ],
)
def test_a_fault_of_the_whole(raw: Any, faulty: list[str]) -> None:
    found = faults(raw)
    for part in faulty:
        assert [fault for fault in found if part in fault], (part, found)
    if "is no column" not in faulty:
        assert len(found) == len(faulty), found


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("numeric", 'minimum: "3"', "minimum: Input should be a valid number (got '3')"),
        ("categorical", 'min_count: "3"', "min_count: Input should be a valid integer (got '3')"),
        ("categorical", "min_count: 3.0", "min_count: Input should be a valid integer (got 3.0)"),
        ("categorical", "min_count: 0", "min_count: Input should be greater than or equal to 1"),
        ("categorical", "wide: 1", "wide: Input should be a valid boolean (got 1)"),
        ("categorical", "values: [0, 1]", "values.0: Input should be a valid string (got 0)"),
        ("categorical", "values: []", "values: Tuple should have at least 1 item"),
        ("categorical", "embedding: true", "embedding: Input should be a valid dictionary"),
        ("categorical", "embedding: 0", "embedding.width: Input should be greater than or equal"),
        ("categorical", "embed: 8", "embed: Extra inputs are not permitted (got 8)"),
        ("numeric", "buckets: [.inf]", "buckets.0: Input should be a finite number (got inf)"),
        ("numeric", "maximum: .nan", "maximum: Input should be a finite number (got nan)"),
        ("numeric", "ratio: {of: a, to: b, plus: 0}", "ratio.plus: Input should be greater than 0"),
        ("numbers", "owner: user", "kind: Input should be 'categorical', 'multi', 'numeric' or"),
        (
            "numeric",
            "owner: shop",
            "owner: Input should be 'user', 'item' or 'context' (got 'shop'",
        ),
        ("sequence", "aggregate: {by: []}", "aggregate.by: Tuple should have at least 1 item"),
    ],
)
def test_nothing_is_coerced_and_bounds_hold(kind: str, more: str, message: str) -> None:
    found = faults(column(f"{{name: extra, kind: {kind}, {more}}}"))
    assert found[0].startswith(f"extra: {message}")
    assert all(fault.startswith("extra: ") for fault in found)


def test_a_name_is_short_lower_case_and_starts_with_a_letter() -> None:
    for name in ("x" * 64, "Age", "1st", "_x", "user-age", ""):
        (fault,) = faults(column(f"{{name: '{name}', kind: numeric, owner: user}}"))
        assert ": name: String should " in fault
    assert FeatureSpec.model_validate(column(f"{{name: {'x' * 63}, kind: numeric, owner: user}}"))


def test_a_line_with_a_fault_brings_no_other_line_down() -> None:
    """Lines that refer to a faulty line are not called faulty for it."""
    raw = shop(
        columns="""
        - {name: weather, kind: categoric, owner: context}
        - {name: weather_visits, kind: numeric, aggregate: {by: [weather], measure: count}}
        - {name: weather_share, kind: numeric, ratio: {of: weather_visits, to: age}}
        """,
        crosses="- {columns: [weather, genre]}",
    )
    (fault,) = faults(raw)
    assert fault.startswith("weather: kind: ")


# -- what a sound spec is -------------------------------------------------------------------------


def test_a_spec_is_frozen_down_to_its_columns() -> None:
    spec = FeatureSpec.model_validate(shop())
    with pytest.raises(ValidationError, match="frozen"):
        spec.task = "regression"
    with pytest.raises(ValidationError, match="frozen"):
        spec.columns[0].wide = True
    with pytest.raises(ValidationError, match="frozen"):
        spec.columns[5].aggregate.window_days = 7  # type: ignore[union-attr]


def test_reading_a_spec_changes_nothing_of_what_was_read() -> None:
    raw = shop()
    before = copy.deepcopy(raw)
    FeatureSpec.model_validate(raw)
    assert raw == before


def test_a_spec_passes_where_a_spec_is_asked_for() -> None:
    spec = FeatureSpec.model_validate(shop())
    assert FeatureSpec.model_validate(spec) is spec


def test_a_spec_can_be_put_together_from_its_parts() -> None:
    spec = FeatureSpec.model_validate(shop())
    parts = {"entities": spec.entities, "label": spec.label, "crosses": spec.crosses}
    assert FeatureSpec(**parts, columns=spec.columns) == spec
    twice = (*spec.columns, spec.columns[1])
    assert faults(parts | {"columns": twice}) == ["age: declared 2 times; names are unique"]


def test_embedding_16_is_short_for_a_table_of_its_own() -> None:
    short = FeatureSpec.model_validate(shop())
    raw = shop()
    raw["columns"][0]["embedding"] = {"table": "user_id", "width": 16}
    assert FeatureSpec.model_validate(raw).hash == short.hash


def test_regression_has_a_label_without_values() -> None:
    raw = shop(task="regression", label={"name": "stars", "values": None})
    spec = FeatureSpec.model_validate(raw)
    assert spec.task == "regression"
    assert spec.label.values is None


def test_owners_follow_from_the_inputs() -> None:
    spec = FeatureSpec.model_validate(
        shop(
            columns="""
            - {name: store, kind: categorical, owner: context}
            - {name: item_sales, kind: numeric, aggregate: {by: [item_id], measure: count}}
            - {name: genre_sales, kind: numeric, aggregate: {by: [genre], measure: count}}
            - {name: shelf_sales, kind: numeric, aggregate: {by: [item_id, store], measure: count}}
            - {name: user_sales, kind: numeric, aggregate: {by: [store, user_id], measure: count}}
            - {name: visit_sales, kind: numeric, aggregate: {by: [visit_id], measure: count}}
            - {name: item_share, kind: numeric, ratio: {of: item_sales, to: genre_sales}}
            - {name: store_share, kind: numeric, ratio: {of: item_sales, to: shelf_sales}}
            - {name: user_share, kind: numeric, ratio: {of: item_sales, to: purchases}}
            """
        )
    )
    owners = {
        # keys and raw columns: as declared
        **{"user_id": "user", "item_id": "item", "visit_id": "context"},
        **{"age": "user", "genre": "item", "price": "context"},
        # aggregates and ratios: the user's if any input is, else the context's, else the item's
        **{"purchases": "user", "recent": "user", "share": "user"},
        **{"item_sales": "item", "genre_sales": "item", "item_share": "item"},
        **{"shelf_sales": "context", "visit_sales": "context", "store_share": "context"},
        **{"user_sales": "user", "user_share": "user"},
    }
    assert {name: spec.owner(name) for name in owners} == owners
    with pytest.raises(KeyError, match="moon"):
        spec.owner("moon")


def test_columns_are_found_by_what_they_are() -> None:
    spec = FeatureSpec.model_validate(shop())
    names = [c.name for c in spec.columns]
    assert list(spec.by_name) == names
    assert spec.keys == ("user_id", "item_id", "visit_id")
    raw = ["user_id", "age", "genre", "tags", "price"]
    assert [c.name for c in spec.raw_columns()] == raw
    assert [c.name for c in spec.raw_columns("user")] == ["user_id", "age"]
    assert [c.name for c in spec.raw_columns("item", "context")] == ["genre", "tags", "price"]
    assert [c.name for c in spec.aggregates] == ["purchases", "recent"]
    assert [c.name for c in spec.columns if c.is_numeric] == ["age", "price", "purchases", "share"]
    assert spec.crosses[0].name == "user_id_x_genre"


def test_a_view_holds_the_aggregates_of_one_log_by_the_same_keys() -> None:
    spec = FeatureSpec.model_validate(
        shop(
            columns="""
            - {name: a, kind: numeric, aggregate: {of: exposures, by: [user_id], measure: count}}
            - {name: b, kind: numeric, aggregate: {by: [user_id, genre], measure: count}}
            - {name: c, kind: numeric, aggregate: {by: [user_id], measure: recency_days}}
            """
        )
    )
    assert {view: [c.name for c in columns] for view, columns in spec.views.items()} == {
        "user_id_interactions": ["purchases", "recent", "c"],
        "user_id_exposures": ["a"],
        "user_id_genre_interactions": ["b"],
    }


def test_a_view_may_have_an_age_and_holds_its_columns_but_for_the_key() -> None:
    spec = FeatureSpec.model_validate(shop(max_age_days={"items": 30, "user_id_interactions": 0.5}))
    assert spec.max_age("items") == timedelta(days=30)
    assert spec.max_age("user_id_interactions") == timedelta(hours=12)
    assert spec.max_age("users") is None
    assert [column.name for column in spec.held("user_id_interactions")] == ["purchases", "recent"]
    assert "item_id" not in [column.name for column in spec.held("items")]
    assert "genre" in [column.name for column in spec.held("items")]


def test_columns_that_name_one_embedding_table_share_it() -> None:
    spec = FeatureSpec.model_validate(
        shop(columns="- {name: hidden, kind: categorical, owner: user, deep: false, wide: true}")
    )
    tables = {name: (width, [c.name for c in cs]) for name, (width, cs) in spec.tables.items()}
    assert tables == {
        "user_id": (16, ["user_id"]),
        "genre": (8, ["genre", "recent"]),
        "tags": (8, ["tags"]),
    }


def test_aggregates_advance_in_steps_from_a_moment_in_utc() -> None:
    spec = FeatureSpec.model_validate(shop(grain_days=7, grain_origin="2017-01-02T01:00:00-05:00"))
    assert spec.grain == timedelta(days=7)
    assert spec.grain_origin == datetime(2017, 1, 2, 6, tzinfo=timezone.utc)
    # However one moment is written, it is the same spec.
    for same in ("2017-01-02T06:00:00Z", "2017-01-02 06:00", datetime(2017, 1, 2, 6)):
        other = FeatureSpec.model_validate(shop(grain_days=7, grain_origin=same))
        assert other.hash == spec.hash


# -- the hash -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [BASE, MOVIELENS], ids=lambda path: path.parent.name)
def test_the_deployments_specs_load_and_survive_json(path: Path) -> None:
    spec = FeatureSpec.model_validate(load(path))
    again = FeatureSpec.from_json(spec.to_json())
    assert again == spec
    assert again.hash == spec.hash
    assert again.to_json() == spec.to_json()


def test_the_hash_is_the_same_in_every_process() -> None:
    code = (
        "import yaml; from fathom.spec import FeatureSpec; "
        f"raw = yaml.safe_load(open({str(BASE)!r}))['features']; "
        "print(FeatureSpec.model_validate(raw).hash)"
    )
    expected = FeatureSpec.model_validate(load(BASE)).hash
    assert {python(code, seed).strip() for seed in ("0", "1", "4711")} == {expected}


def shuffled(value: Any, random: Any) -> Any:
    """The same YAML with the keys of every mapping in another order; lists keep theirs."""
    if isinstance(value, dict):
        keys = list(value)
        random.shuffle(keys)
        return {key: shuffled(value[key], random) for key in keys}
    return [shuffled(item, random) for item in value] if isinstance(value, list) else value


@given(st.randoms(use_true_random=False))
def test_the_hash_does_not_depend_on_the_order_of_keys(random: Any) -> None:
    spec = FeatureSpec.model_validate(shop())
    assert FeatureSpec.model_validate(shuffled(shop(), random)).hash == spec.hash


def test_the_hash_does_not_depend_on_how_a_number_is_written() -> None:
    one, other = shop(), shop()
    one["columns"][4]["buckets"] = [1, 10, 100]
    other["columns"][4]["buckets"] = [1.0, 10.0, 1e2]
    assert FeatureSpec.model_validate(one).hash == FeatureSpec.model_validate(other).hash


@pytest.mark.parametrize(
    "changed",
    [
        shop(grain_days=7),
        shop(label={"name": "clicked"}),
        shop(label={"name": "bought", "values": [1, 0]}),
        shop(grain_origin="2017-01-02"),
        shop() | {"columns": shop()["columns"][::-1]},
        column("{name: extra, kind: numeric, owner: user}"),
        shop(crosses="- {columns: [genre, tags]}"),
        shop() | {"crosses": [{"columns": ["genre", "user_id"]}]},
    ],
)
def test_the_hash_changes_with_the_content(changed: dict[str, Any]) -> None:
    assert FeatureSpec.model_validate(changed).hash != FeatureSpec.model_validate(shop()).hash


# -- adding a feature -----------------------------------------------------------------------------


def random_frame(spec: FeatureSpec, rows: int = 100) -> dict[str, Any]:
    """Some value for every column of any spec."""
    random = np.random.default_rng(3)
    frame: dict[str, Any] = {}
    for c in spec.columns:
        words = np.array([*(c.values or ("red", "green", "blue")), None], object)
        if c.ratio is not None:
            continue
        if c.kind == "numeric":
            frame[c.name] = random.integers(0, 20, rows).astype(np.float32)
        elif c.kind == "categorical":
            frame[c.name] = words[random.integers(0, len(words), rows)]
        else:
            lengths = random.integers(0, 3, rows)
            frame[c.name] = Ragged.of(
                [words[random.integers(0, len(words) - 1, n)].tolist() for n in lengths]
            )
    return with_ratios(frame, spec)


def lines_of_the_how_to() -> list[str]:
    """The first YAML that docs/how-to/add-a-feature.md tells people to add."""
    text = (ROOT / "docs" / "how-to" / "add-a-feature.md").read_text()
    lines = text.split("```yaml\n", 1)[1].split("```", 1)[0].splitlines(keepends=True)
    assert len(lines) == 3
    return lines


def test_two_features_and_their_cross_are_three_lines_of_yaml() -> None:
    text = BASE.read_text()
    categorical, numeric, cross = lines_of_the_how_to()
    more = text.replace("  columns:\n", f"  columns:\n{categorical}{numeric}", 1)
    more = more.replace("  crosses:\n", f"  crosses:\n{cross}", 1)
    changed = [line for line in ndiff(text.splitlines(), more.splitlines()) if line[0] in "+-"]
    assert [line[0] for line in changed] == ["+", "+", "+"]

    before = FeatureSpec.model_validate(yaml.safe_load(text)["features"])
    after = FeatureSpec.model_validate(yaml.safe_load(more)["features"])
    frame = random_frame(after)
    encoder = fit_encoder(frame, after)
    old, new = fit_encoder(frame, before).layout, encoder.layout

    assert new.numeric == old.numeric + 2  # the spend, and whether it is missing
    assert len(new.fields) == len(old.fields) + 1
    assert new.tables == old.tables | {"kids_count": (2 + 3, 2)}  # missing, unknown, three values
    assert new.deep_width == old.deep_width + 2 + 2
    assert len(new.wide_slots) == len(old.wide_slots) + 1
    rows = new.wide_slots[encoder.wide_slots.index("kids_count_x_household_spend_28d")]
    spend = np.frexp(frame["household_spend_28d"])[1].tolist()  # powers of 2
    pairs = Counter(pair for pair in zip(frame["kids_count"], spend, strict=True) if pair[0])
    assert rows == 2 + sum(count >= 4 for count in pairs.values())
    assert rows > 2
    assert new.wide_rows == old.wide_rows + rows

    batch = encoder.encode(frame)
    assert batch.numeric.shape == (len(batch), new.numeric)
    assert batch.deep_ids.shape == (len(batch), len(new.fields))
    assert batch.wide_ids.shape[1] + len(batch.wide_bags) == len(new.wide_slots)
