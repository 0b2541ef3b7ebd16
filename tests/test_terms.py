"""The terms of a wide part: named by values, whole, and the exact sum of which a logit is."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fathom.batch import Ragged
from fathom.config import TrainingConfig
from fathom.encoding import Encoder, Frame, fit_encoder
from fathom.models import Model, build, score
from fathom.models.family import MODELS
from fathom.ranker import Ranker
from fathom.spec import FeatureSpec
from fathom.terms import Term, most_terms, terms
from small_family import randomise

LISTS = ("tags", "recent")
SPEC = FeatureSpec.model_validate(
    {
        "entities": {"user": "user_id", "item": "item_id", "request": "request_id"},
        "label": {"name": "bought", "values": [0, 1]},
        "columns": [
            {"name": "user_id", "kind": "categorical", "owner": "user"},
            {"name": "item_id", "kind": "categorical", "owner": "item"},
            {"name": "genre", "kind": "categorical", "owner": "item", "wide": True},
            {"name": "tags", "kind": "multi", "owner": "item", "wide": True},
            {"name": "price", "kind": "numeric", "owner": "item", "buckets": [1, 2.5]},
            {"name": "spent", "kind": "numeric", "owner": "user"},
            {
                "name": "recent",
                "kind": "sequence",
                "embedding": {"table": "genre", "width": 8},
                "aggregate": {"by": ["user_id"], "measure": "last", "column": "genre", "n": 4},
            },
        ],
        "crosses": [
            {"columns": ["genre", "price"]},
            {"columns": ["recent", "genre"]},
            {"columns": ["tags", "spent", "recent"]},
            {"columns": ["user_id", "genre"], "buckets": 3},
            {"columns": ["recent", "tags"], "buckets": 5},
        ],
    }
)
GENRES, TAGS, USERS = ["tea", "coffee", "cocoa"], ["green", "loose", "dark"], ["ann", "bob"]


def texts(values: list[Any]) -> Any:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def frame_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rows as a frame; what a row leaves out is missing."""
    frame: dict[str, Any] = {}
    for column in SPEC.columns:
        values = [row.get(column.name) for row in rows]
        if column.name in LISTS:
            frame[column.name] = Ragged.of([value or [] for value in values])
        elif column.is_numeric:
            frame[column.name] = np.array([np.nan if v is None else v for v in values], np.float32)
        else:
            frame[column.name] = texts(values)
    return frame


def fitted() -> Encoder:
    """Every second combination of values is rarer than twice, so unknown."""
    every = itertools.product(USERS, GENRES, [TAGS[:2], TAGS[1:]], [0.5, 2.0], [GENRES[:2], []])
    rows = [
        {"user_id": u, "item_id": g, "genre": g, "tags": t, "price": p, "spent": 3.0, "recent": r}
        for u, g, t, p, r in every
    ]
    return fit_encoder(frame_of(rows[::2] + rows[:8]), SPEC)


ENCODER = fitted()
CONFIG = TrainingConfig(hidden=(4,), factors=2, device="cpu", threads=1)


def built(name: str) -> Model:
    return build(ENCODER.layout, dataclasses.replace(CONFIG, model=name)).eval()


WITH_WIDE = [name for name in sorted(MODELS) if built(name).wide is not None]


def logits(model: Model, frame: Frame) -> Any:
    return score(model, ENCODER.encode(frame))


def test_the_family_has_models_with_a_wide_part():
    assert {"wide", "wide_deep", "ensemble"} <= set(WITH_WIDE)


# -- known answers -------------------------------------------------------------------------------


@pytest.fixture
def wide() -> Model:
    """All weights are 0; a test sets those that it is about."""
    return built("wide")


def give(model: Model, weight: float, feature: str, **row: Any) -> None:
    """Set the weight of what a row has in a slot, one value or combination."""
    batch = ENCODER.encode(frame_of([row]))
    place, single = ENCODER.wide_slots.index(feature), batch.wide_ids.shape[1]
    ids = batch.wide_ids[0, place : place + 1]
    if place >= single:
        ids = batch.wide_bags[place - single].values
    assert len(ids) == 1
    with torch.no_grad():
        model.wide.weight[int(ids[0])] = weight


def only(model: Model, **row: Any) -> list[Term]:
    (found,) = terms(model, ENCODER, frame_of([row]))
    return found


def test_a_term_has_the_names_of_its_values(wide):
    give(wide, 0.25, "genre_x_price", genre="tea", price=2)
    give(wide, -0.5, "genre", genre="tea")
    assert only(wide, genre="tea", price=1.5) == [
        Term("genre", {"genre": "tea"}, "values", -0.5),
        Term("genre_x_price", {"genre": "tea", "price": "1 to below 2.5"}, "values", 0.25),
    ]
    # Another price, another genre: nothing of either weight.
    assert only(wide, genre="coffee", price=0.5) == []


def test_each_combination_of_a_list_is_a_term_of_its_own_and_one_without_weight_is_none(wide):
    give(wide, 0.25, "recent_x_genre", recent=["tea"], genre="cocoa")
    give(wide, 0.5, "recent_x_genre", recent=["coffee"], genre="cocoa")
    found = only(wide, recent=["tea", "coffee", "never heard of"], genre="cocoa")
    assert found == [
        Term("recent_x_genre", {"recent": "coffee", "genre": "cocoa"}, "values", 0.5),
        Term("recent_x_genre", {"recent": "tea", "genre": "cocoa"}, "values", 0.25),
    ]


def test_what_a_list_holds_twice_adds_its_weight_twice(wide):
    give(wide, 0.25, "recent_x_genre", recent=["tea"], genre="tea")
    give(wide, 0.125, "tags", tags=["green"])
    found = only(wide, recent=["tea", "coffee", "tea"], genre="tea", tags=["green", "green"])
    assert [(term.feature, term.logit) for term in found] == [
        ("recent_x_genre", 0.5),
        ("tags", 0.25),
    ]


def test_a_term_says_when_its_weight_is_not_its_values_own(wide):
    give(wide, 1.0, "genre_x_price")  # of rows that lack either
    give(wide, 0.5, "genre", genre="never heard of")
    give(wide, 0.25, "user_id_x_genre", user_id="ann", genre="tea")
    assert only(wide, genre="mate", user_id=None) == [
        Term("genre_x_price", {"genre": "mate", "price": None}, "missing", 1.0),
        Term("genre", {"genre": "mate"}, "unknown", 0.5),
    ]
    hashed = {"user_id": "ann", "genre": "tea"}
    assert only(wide, price=1, **hashed) == [
        Term("user_id_x_genre", hashed, "bucket", 0.25),
    ]
    # In three buckets, others meet it: the term has their names, and does not claim the weight.
    users = [f"user {i}" for i in range(30)]
    shared = terms(wide, ENCODER, frame_of([{"user_id": u, "genre": "tea"} for u in users]))
    met = [[t for t in found if t.feature == "user_id_x_genre"] for found in shared]
    named = [term.values["user_id"] for found in met for term in found]
    assert 0 < len(named) < 30
    assert named == [user for user, found in zip(users, met, strict=True) if found]
    assert {(t.weight_of, t.logit) for found in met for t in found} == {("bucket", 0.25)}


def test_a_model_without_a_wide_part_has_no_terms():
    frame = frame_of([{"genre": "tea"}, {}])
    assert terms(built("deep"), ENCODER, frame) == [[], []]
    assert terms(built("wide"), ENCODER, frame_of([])) == []


def test_how_many_terms_there_can_be_is_known_beforehand():
    """One for each column or cross of single values, one for each value of a list, and products."""
    lists = {"tags": TAGS, "recent": ["tea", "tea"]}
    assert most_terms(ENCODER, frame_of([lists])) == 1 + 3 + 1 + 2 + 3 * 2 + 1 + 2 * 3
    assert most_terms(ENCODER, frame_of([{}, lists, {}])) == 20 + 2 * 3
    assert most_terms(ENCODER, frame_of([])) == 0


# -- any row -------------------------------------------------------------------------------------


def one_of(values: list[str]) -> st.SearchStrategy[str | None]:
    return st.sampled_from([*values, "never heard of", "", None])


NUMBER = st.none() | st.sampled_from([-3.0, 0.0, 0.5, 1.0, 2.0, 2.5, 3.0, 1e30])
ROW = st.fixed_dictionaries(
    {
        "user_id": one_of(USERS),
        "item_id": one_of(GENRES),
        "genre": one_of(GENRES),
        "tags": st.lists(one_of(TAGS), max_size=5),
        "price": NUMBER,
        "spent": NUMBER,
        "recent": st.lists(one_of(GENRES), max_size=5),
    }
)


@pytest.mark.parametrize("name", WITH_WIDE)
@given(rows=st.lists(ROW, min_size=1, max_size=5), seed=st.integers(0, 99))
def test_terms_deep_logit_and_bias_sum_to_the_logit(name: str, rows: list[Any], seed: int):
    model = built(name)
    randomise(model, seed)
    frame = frame_of(rows)
    ranker = Ranker(ENCODER, model, CONFIG)
    parts, found = ranker.explain(frame), ranker.terms(frame)
    sums = [sum(term.logit for term in row) for row in found]
    logit = np.array(sums) + parts["deep"] + parts["bias"]
    np.testing.assert_allclose(logit, logits(model, frame), rtol=0, atol=1e-6)
    for slot in ENCODER.wide_slots:
        by_slot = [sum(t.logit for t in row if t.feature == slot) for row in found]
        np.testing.assert_allclose(by_slot, parts[slot], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", WITH_WIDE)
@given(row=ROW, seed=st.integers(0, 99))
def test_terms_are_of_just_the_values_that_a_row_has(name: str, row: Any, seed: int):
    """Each combination alone, as a row of single values, has the term that it has among others."""
    model = built(name)
    randomise(model, seed)
    (found,) = terms(model, ENCODER, frame_of([row]))
    crosses = {cross.name: cross.columns for cross in SPEC.crosses}
    expected: dict[Any, float] = {}
    for slot in ENCODER.wide_slots:
        columns = crosses.get(slot, (slot,))
        values = [row[c] if c in LISTS else [row[c]] for c in columns]
        for combination in itertools.product(*values):
            alone = {
                c: [value] if c in LISTS else value
                for c, value in zip(columns, combination, strict=True)
            }
            (theirs,) = terms(model, ENCODER, frame_of([alone]))
            for term in theirs:
                if term.feature == slot:
                    key = (slot, *term.values.items(), term.weight_of)
                    expected[key] = expected.get(key, 0.0) + term.logit
    named = {(t.feature, *t.values.items(), t.weight_of): t.logit for t in found}
    assert named == pytest.approx(expected, abs=1e-12)
    assert len(named) == len(found)
    assert [abs(t.logit) for t in found] == sorted((abs(t.logit) for t in found), reverse=True)


def test_long_lists_sum_to_within_a_millionth_too():
    """Half a million combinations: a sum in float32 would be off by tens."""
    model = built("wide_deep")
    randomise(model, 3)
    with torch.no_grad():
        model.wide.weight.abs_()
    row = {"recent": ["tea", "coffee"] * 250, "tags": ["green", "dark"] * 250, "spent": 3.0}
    frame = frame_of([row])
    ranker = Ranker(ENCODER, model, CONFIG)
    parts = ranker.explain(frame)
    total = sum(term.logit for term in ranker.terms(frame)[0])
    assert total > 100_000
    assert total + parts["deep"] + parts["bias"] == pytest.approx(logits(model, frame), abs=1e-6)
