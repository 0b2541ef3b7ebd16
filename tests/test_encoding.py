"""The encoder: ids, quantiles and crosses by hand; the same in every process; never an error."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fathom.batch import Batch, Ragged
from fathom.encoding import (
    FIRST_KNOWN,
    MISSING,
    UNKNOWN,
    CrossVocabulary,
    Encoder,
    FrameError,
    Scaler,
    Vocabulary,
    bucket,
    complete,
    cross_keys,
    draws,
    evaluate_cross,
    expire,
    fit_encoder,
    hash_value,
    hash_values,
    with_ratios,
)
from fathom.spec import Cross, FeatureSpec

ROOT = Path(__file__).resolve().parents[1]
NAN = float("nan")

SPEC = FeatureSpec.model_validate(
    yaml.safe_load(
        """
        entities: {user: user_id, item: item_id, request: visit_id}
        label: {name: bought, values: [0, 1]}
        columns:
          - {name: user_id, kind: categorical, owner: user, embedding: 16, wide: true}
          - {name: genre, kind: categorical, owner: item, embedding: 4, min_count: 3, wide: true}
          - {name: tags, kind: multi, owner: item, min_count: 1, wide: true}
          - {name: price, kind: numeric, owner: context, buckets: [1, 10]}
          - {name: visits, kind: numeric, owner: user}
          - name: recent
            kind: sequence
            embedding: {table: genre, width: 4}
            aggregate: {by: [user_id], measure: last, column: genre, n: 3}
        crosses:
          - {columns: [user_id, genre], min_count: 1}
          - {columns: [recent, genre], min_count: 1}
          - {columns: [price, tags], buckets: 50}
        """
    )
)


def texts(*values: str | None) -> np.ndarray[Any, Any]:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def frame(**replaced: Any) -> dict[str, Any]:
    """Six exposures to two users."""
    return {
        "user_id": texts("u1", "u1", "u1", "u2", "u2", None),
        "genre": texts("tea", "tea", "tea", "milk", "milk", None),
        "tags": Ragged.of([["hot"], ["hot", "new"], [], ["cold"], ["new"], []]),
        "price": np.array([0.5, 5.0, 50.0, 5.0, NAN, 0.5], np.float32),
        "visits": np.array([1, 2, 3, 4, 5, 6], np.float32),
        "recent": Ragged.of([["tea"], ["milk", "tea"], [], ["tea"], ["milk"], []]),
        "bought": np.array([0, 1, 1, 0, 1, 0], np.int64),
    } | replaced


def rows_of(index: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Some rows of `frame`."""
    return {n: v.take(index) if isinstance(v, Ragged) else v[index] for n, v in frame().items()}


def keys(*values: str | None) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return hash_values(texts(*values))


def equal(one: Batch, other: Batch) -> bool:
    """Whether two batches hold the same numbers."""

    def arrays(batch: Batch) -> list[Any]:
        bags = (*batch.deep_bags, *batch.wide_bags)
        flat = [array for bag in bags for array in (bag.values, bag.offsets)]
        return [batch.numeric, batch.deep_ids, batch.wide_ids, batch.label, *flat]

    return all(np.array_equal(a, b) for a, b in zip(arrays(one), arrays(other), strict=True))


# -- hashes ---------------------------------------------------------------------------------------


def test_a_hash_is_blake2b_so_it_is_the_same_everywhere() -> None:
    """`printf tea | b2sum -l 64` prints ba6587c1bb84c490; the lowest byte comes first."""
    tea = 0x90C484BBC18765BA
    assert hash_value("tea") == tea
    assert hash_values(texts("tea", None, "tea")).tolist() == [tea, 0, tea]


def test_half_of_a_surrogate_pair_is_a_value_like_any_other() -> None:
    r"""JSON's "\ud800" is no character, yet a request may hold it."""
    assert hash_value("\ud800") not in {hash_value("?"), hash_value(""), hash_value("\ud801")}
    encoder = fit_encoder(frame(), SPEC)
    odd = encoder.encode(frame(user_id=texts(*["\ud800"] * 6)))
    assert odd.deep_ids[:, 0].tolist() == [UNKNOWN] * 6


SUBPROCESS = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from test_encoding import SPEC, fit_encoder, frame
encoder = fit_encoder(frame(), SPEC)
batch = encoder.encode(frame())
digest = hashlib.sha256(encoder.fingerprint.encode())
for part in (batch.numeric, batch.deep_ids, batch.wide_ids):
    digest.update(part.tobytes())
for bag in (*batch.deep_bags, *batch.wide_bags):
    digest.update(bag.values.tobytes() + bag.offsets.tobytes())
print(digest.hexdigest())
"""


def test_ids_are_the_same_in_every_process() -> None:
    printed = set()
    for seed in ("0", "1", "4711"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT / "src")}
        command = [sys.executable, "-c", SUBPROCESS, str(Path(__file__).parent)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        printed.add(done.stdout)
    assert len(printed) == 1


# -- buckets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        *[(0.0, "0"), (-0.0, "0"), (0.3, "0"), (-0.3, "0"), (0.999, "0")],
        *[(1.0, "1"), (1.5, "1"), (2.0, "2"), (3.0, "2"), (4.0, "3"), (7.9, "3"), (8.0, "4")],
        *[(-1.0, "-1"), (-2.0, "-2"), (-7.9, "-3"), (1024.0, "11")],
        *[(NAN, None), (float("inf"), "128"), (float("-inf"), "-128"), (1e300, "128")],
    ],
)
def test_without_boundaries_a_number_falls_between_powers_of_two(
    number: float, expected: str | None
) -> None:
    """Bucket k holds [2^(k-1), 2^k), bucket 0 holds (-1, 1), and the rest is mirrored."""
    assert bucket(np.array([number]), None).tolist() == [expected]


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        *[(-5.0, "0"), (0.999, "0"), (1.0, "1"), (9.99, "1"), (10.0, "2"), (99.0, "2")],
        *[(NAN, None), (float("inf"), "2"), (float("-inf"), "0")],
    ],
)
def test_boundaries_are_open_on_the_right(number: float, expected: str | None) -> None:
    assert bucket(np.array([number]), [1.0, 10.0]).tolist() == [expected]


def test_a_number_on_a_boundary_falls_the_same_way_in_both_precisions() -> None:
    """0.7 differs between float32 and float64; frames hold the one, Feast the other."""
    for kind in (np.float32, np.float64):
        assert bucket(np.array([0.7], kind), [0.7]).tolist() == ["1"]


@given(st.lists(st.floats(width=32), max_size=20))
def test_every_number_has_a_bucket_but_nan(numbers: list[float]) -> None:
    for boundaries in (None, [0.0, 1.0]):
        found = bucket(np.array(numbers, np.float32), boundaries)
        assert [text is None for text in found] == [number != number for number in numbers]


# -- crosses --------------------------------------------------------------------------------------


def test_a_cross_is_of_values_and_not_of_joined_texts() -> None:
    joined = cross_keys([keys("a-b", "a", "ab", ""), keys("c", "b-c", "", "ab")])
    assert len(set(joined.tolist())) == 4


def test_the_order_of_a_cross_matters() -> None:
    forward, backward = cross_keys([keys("a", "b"), keys("b", "a")])
    assert forward != backward
    assert cross_keys([keys("a"), keys("b"), keys("c")]) != cross_keys(
        [keys("a"), keys("c"), keys("b")]
    )


def test_a_value_crossed_with_itself_is_a_value_like_any_other() -> None:
    twice = cross_keys([keys("a", "b"), keys("a", "b")])
    assert len({0, *twice.tolist()}) == 3


def test_no_pair_of_values_is_taken_for_a_missing_one() -> None:
    """0 means missing, so no mixture may come to 0; this hash, where mixing starts, would."""
    unlucky = np.array([0x9E3779B97F4A7C15], np.uint64)
    assert cross_keys([unlucky, keys("a")]) != 0


def test_a_cross_with_a_missing_part_is_missing() -> None:
    crossed = cross_keys([keys("a", None, "a", None), keys("b", "b", None, None)])
    assert (crossed == 0).tolist() == [False, True, True, True]


def test_a_million_pairs_have_a_million_keys() -> None:
    """By the birthday bound, one collision among 64-bit keys has a chance of 3 in 100 million."""
    users = keys(*(f"user-{i}" for i in range(1000)))
    items = keys(*(f"item-{i}" for i in range(1000)))
    crossed = cross_keys([np.repeat(users, 1000), np.tile(items, 1000)])
    assert len(np.unique(crossed)) == 1_000_000
    assert 0 not in crossed
    # The keys fill their range evenly, so that hashing them into few buckets is fair: each of the
    # 256 counts is within five standard deviations (62.4) of 3906.25.
    assert np.abs(np.bincount(crossed % 256, minlength=256) - 3906.25).max() < 5 * 62.4
    random = np.random.default_rng(0).integers(1, 2**64 - 1, (2, 1_000_000), np.uint64)
    assert len(np.unique(cross_keys(list(random)))) == 1_000_000


def test_a_cross_of_lists_is_every_combination_in_each_row() -> None:
    tags = Ragged.of([["hot", "new"], [], ["cold"]])
    moods = Ragged.of([["calm", "glad"], ["calm"], ["glad"]])
    crossed = cross_keys(
        [
            Ragged(hash_values(tags.values), tags.offsets),
            Ragged(hash_values(moods.values), moods.offsets),
        ]
    )
    pairs = [("hot", "calm"), ("hot", "glad"), ("new", "calm"), ("new", "glad"), ("cold", "glad")]
    one, other = zip(*pairs, strict=True)
    assert isinstance(crossed, Ragged)
    assert crossed.offsets.tolist() == [0, 4, 4, 5]
    assert crossed.values.tolist() == cross_keys([keys(*one), keys(*other)]).tolist()


def test_the_papers_cross_is_of_each_item_of_the_history_with_the_candidate() -> None:
    evaluated = evaluate_cross(SPEC.crosses[1], SPEC, frame())  # recent × genre
    assert isinstance(evaluated, Ragged)
    #        tea×tea, (milk, tea)×tea, nothing, tea×milk, milk×milk, nothing
    expected = cross_keys(
        [keys("tea", "milk", "tea", "tea", "milk"), keys("tea", "tea", "tea", "milk", "milk")]
    )
    assert evaluated.values.tolist() == expected.tolist()
    assert evaluated.lengths.tolist() == [1, 2, 0, 1, 1, 0]


def test_values_of_a_list_that_are_missing_cross_with_nothing() -> None:
    recent = Ragged.of([["tea", None], [None], ["tea"]])
    crossed = cross_keys(
        [Ragged(hash_values(recent.values), recent.offsets), keys("milk", "milk", None)]
    )
    assert isinstance(crossed, Ragged)
    assert crossed.lengths.tolist() == [1, 0, 0]
    assert crossed.values.tolist() == cross_keys([keys("tea"), keys("milk")]).tolist()


words = st.one_of(st.none(), st.sampled_from(["a", "b", "a-b", ""]))
lists = st.lists(words, max_size=3)


@given(st.lists(st.tuples(lists, words, lists), max_size=5))
def test_a_mixed_cross_is_the_product_of_what_is_not_missing(rows: list[Any]) -> None:
    first, third = (Ragged.of([row[i] for row in rows]) for i in (0, 2))
    crossed = cross_keys(
        [
            Ragged(hash_values(first.values), first.offsets),
            keys(*(row[1] for row in rows)),
            Ragged(hash_values(third.values), third.offsets),
        ]
    )
    combined = [
        [c for c in product(one, [two], three) if None not in c] for one, two, three in rows
    ]
    flat = [combination for row in combined for combination in row]
    parts = zip(*flat, strict=True) if flat else [(), (), ()]
    assert isinstance(crossed, Ragged)
    assert crossed.lengths.tolist() == [len(row) for row in combined]
    assert crossed.values.tolist() == cross_keys([keys(*part) for part in parts]).tolist()


def test_hits_are_the_share_of_a_rows_combinations_that_training_knew() -> None:
    hits = fit_encoder(frame(), SPEC).cross_hits(
        {
            "user_id": texts("u1", "u1", "u2", None),
            "genre": texts("tea", "milk", "tea", "tea"),
            "tags": Ragged.of([["hot"], ["strange"], [], ["hot"]]),
            "price": np.array([0.5, 5.0, 0.5, NAN], np.float32),
            "visits": np.zeros(4, np.float32),
            "recent": Ragged.of([["tea"], ["milk", "tea"], [], ["strange", "tea"]]),
        }
    )
    expected = {
        # u1 was shown tea and never milk, u2 milk and never tea
        "user_id_x_genre": [1, 0, 0, NAN],
        # of what came before tea, training saw tea and milk
        "recent_x_genre": [1, 1, NAN, 0.5],
        # hashed: there is a bucket for everything
        "price_x_tags": [1, 1, NAN, NAN],
    }
    assert hits.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(hits[name], values, err_msg=name)


def test_without_crosses_there_are_no_hits() -> None:
    plain = SPEC.model_copy(update={"crosses": ()})
    assert fit_encoder(frame(), plain).cross_hits(frame()) == {}


def test_numbers_are_bucketed_before_they_are_crossed() -> None:
    one = frame(price=np.array([5.0] * 6, np.float32))
    other = frame(price=np.array([9.0] * 6, np.float32))
    apart = frame(price=np.array([10.0] * 6, np.float32))
    cross = SPEC.crosses[2]  # price × tags, boundaries 1 and 10
    crossed = [evaluate_cross(cross, SPEC, f).values.tolist() for f in (one, other, apart)]
    assert crossed[0] == crossed[1]
    assert crossed[0] != crossed[2]


def test_a_cross_with_a_vocabulary_gives_ids_by_rank() -> None:
    seen = cross_keys([keys("a", "a", "b", "c", None), keys("x", "x", "y", "z", "z")])
    vocabulary = CrossVocabulary.fit(seen, Cross(columns=("one", "two"), min_count=2))
    assert vocabulary.rows == FIRST_KNOWN + 1
    # (a, x) was seen twice; (b, y) and (c, z) once, so they share the unknown id.
    assert vocabulary.ids(seen).tolist() == [2, 2, UNKNOWN, UNKNOWN, MISSING]
    all_seen = CrossVocabulary.fit(seen, Cross(columns=("one", "two"), min_count=1))
    assert sorted(set(all_seen.ids(seen).tolist())) == [MISSING, 2, 3, 4]
    none = CrossVocabulary.fit(seen, Cross(columns=("one", "two"), min_count=9))
    assert none.rows == FIRST_KNOWN
    assert none.ids(seen).tolist() == [UNKNOWN] * 4 + [MISSING]


@given(st.lists(st.integers(0, 2**64 - 1), max_size=30), st.integers(2, 2**30))
def test_a_hashed_cross_stays_in_its_range(values: list[int], buckets: int) -> None:
    seen = np.array(values, np.uint64)
    vocabulary = CrossVocabulary.fit(seen, Cross(columns=("one", "two"), buckets=buckets))
    assert vocabulary.rows == buckets + FIRST_KNOWN
    expected = [2 + value % buckets if value else MISSING for value in values]
    assert vocabulary.ids(seen).tolist() == expected


# -- vocabularies ---------------------------------------------------------------------------------


def test_known_values_are_in_order_of_how_often_then_of_the_alphabet() -> None:
    seen = texts("b", "a", "c", "c", "c", "b", "a", "d", None, None, None, None)
    vocabulary = Vocabulary.fit([seen], min_count=2)
    assert vocabulary.values == ("c", "a", "b")
    assert vocabulary.rows == 5
    assert vocabulary.ids(texts("c", "a", "b", "d", "e", None)).tolist() == [2, 3, 4, 1, 1, 0]


def test_a_rare_value_is_unknown_in_training_too_so_that_unknown_is_trained() -> None:
    encoder = fit_encoder(frame(), SPEC)
    # "tea" was seen 6 times and "milk" 4 times by the two columns that share the table: both known.
    assert encoder.tables["genre"].values == ("tea", "milk")
    # The user u2 was seen twice, which is the least; had it been seen once, it would be unknown.
    once = fit_encoder(frame(user_id=texts("u1", "u1", "u1", "u1", "u2", None)), SPEC)
    assert once.tables["user_id"].values == ("u1",)
    trained_on = once.encode(frame(user_id=texts("u1", "u1", "u1", "u1", "u2", None)))
    assert trained_on.deep_ids[:, 0].tolist() == [2, 2, 2, 2, UNKNOWN, MISSING]


def test_a_shared_table_counts_all_its_columns_and_asks_for_the_least() -> None:
    """genre wants 3, recent the default 2; 'milk' is in 2 rows of each."""
    only = fit_encoder(frame(recent=Ragged.of([[]] * 6)), SPEC)
    assert only.tables["genre"].values == ("tea", "milk")
    rarer = fit_encoder(
        frame(
            genre=texts("tea", "tea", "tea", "milk", None, None),
            recent=Ragged.of([[], [], [], [], ["milk"], ["rum"]]),
        ),
        SPEC,
    )
    assert rarer.tables["genre"].values == ("tea", "milk")
    # The wide part reads genre alone, and by genre's own min_count of 3.
    assert rarer.wide["genre"].values == ("tea",)


# -- quantiles ------------------------------------------------------------------------------------


def test_the_ith_of_128_quantiles_is_i_minus_1_over_127() -> None:
    """Cheng et al. 2016, section 4.1: (i - 1) / (n_q - 1) for a value in the i-th quantile."""
    scaler = Scaler.fit(np.random.default_rng(0).permutation(128) * 10.0)
    for i in (1, 2, 64, 127, 128):
        assert scaler.scale(np.array([(i - 1) * 10.0]))[0] == pytest.approx((i - 1) / 127)
    # Between two quantiles the value lies between, in proportion.
    assert scaler.scale(np.array([25.0]))[0] == pytest.approx(2.5 / 127)


def test_values_beyond_the_training_range_are_at_its_ends() -> None:
    scaler = Scaler.fit(np.arange(128.0))
    far = np.array([-1.0, -1e30, float("-inf"), 128.0, 1e30, float("inf")])
    assert scaler.scale(far).tolist() == [0, 0, 0, 1, 1, 1]


def test_infinite_values_are_no_part_of_the_distribution() -> None:
    infinite = Scaler.fit(np.array([*range(128), float("inf"), float("-inf"), NAN], np.float64))
    assert infinite.quantiles.tolist() == Scaler.fit(np.arange(128.0)).quantiles.tolist()


def test_a_value_that_many_rows_share_does_not_use_up_the_range() -> None:
    scaler = Scaler.fit(np.array([0.0] * 9000 + [float(i) for i in range(1, 1001)]))
    assert scaler.scale(np.array([0.0]))[0] == 0
    # 90 % of the quantiles are 0; merged, they leave the rest of the range to the rest.
    assert 0.4 < scaler.scale(np.array([500.0]))[0] < 0.6


@pytest.mark.parametrize("value", [0.0, -3.5, 7.0])
def test_a_constant_column_says_nothing_and_breaks_nothing(value: float) -> None:
    scaler = Scaler.fit(np.full(10, value))
    assert scaler.scale(np.array([value, value + 1, NAN])).tolist() == [0.5, 0.5, 0]


def test_a_column_without_any_value_says_nothing_and_breaks_nothing() -> None:
    for values in ([NAN] * 3, [], [float("inf"), NAN]):
        scaler = Scaler.fit(np.array(values))
        assert scaler.scale(np.array([1.0, NAN])).tolist() == [0.5, 0]


finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


@given(st.lists(st.one_of(finite, st.just(NAN)), max_size=50), st.lists(finite, min_size=1))
def test_scaling_keeps_the_order_and_the_range(train: list[float], served: list[float]) -> None:
    scaled = Scaler.fit(np.array(train)).scale(np.array(sorted(served)))
    assert scaled.min() >= 0
    assert scaled.max() <= 1
    assert (np.diff(scaled) >= 0).all()


# -- the encoder ----------------------------------------------------------------------------------


def test_a_batch_by_hand() -> None:
    encoder = fit_encoder(frame(), SPEC)
    batch = encoder.encode(frame())
    # price: known 0.5, 0.5, 5, 5, 50, and one NaN; visits: 1 … 6. Each with its "is missing".
    assert batch.numeric[:, 1].tolist() == [0, 0, 0, 0, 1, 0]
    assert batch.numeric[:, 0].tolist()[:1] == [0]
    assert batch.numeric[2, 0] == 1
    assert batch.numeric[4, 0] == 0
    np.testing.assert_allclose(batch.numeric[:, 2], np.arange(6) / 5, rtol=1e-6)
    assert batch.numeric[:, 3].tolist() == [0] * 6
    # user_id: u1 = 2, u2 = 3; genre (with recent: tea 3 + 3, milk 2 + 2): tea = 2, milk = 3.
    assert batch.deep_ids.tolist() == [[2, 2], [2, 2], [2, 2], [3, 3], [3, 3], [0, 0]]
    # tags: hot and new twice, cold once: hot = 2, new = 3, cold = 4.
    assert batch.deep_bags[0].values.tolist() == [2, 2, 3, 4, 3]
    assert batch.deep_bags[0].offsets.tolist() == [0, 1, 3, 3, 4, 5, 5]
    assert batch.deep_bags[1].values.tolist() == [2, 3, 2, 2, 3]
    assert batch.label is not None
    assert batch.label.tolist() == [0, 1, 1, 0, 1, 0]
    # Wide slots in order: user_id (4 rows), genre (tea alone reaches 3 without recent: 3 rows),
    # user_id × genre (two pairs: 4 rows); then the bags tags, recent × genre, price × tags.
    layout = encoder.layout
    assert encoder.wide_slots == (
        *("user_id", "genre", "user_id_x_genre"),
        *("tags", "recent_x_genre", "price_x_tags"),
    )
    assert layout.wide_slots == (4, 3, 4, 5, 2 + 4, 2 + 50)
    assert layout.wide_bags == 3
    # The two reserved ids of each cross, at 7, 16 and 22; those of single columns do have weights.
    assert layout.inactive == (7, 8, 16, 17, 22, 23)
    assert batch.wide_ids[:, :2].tolist() == [[2, 6], [2, 6], [2, 6], [3, 5], [3, 5], [0, 4]]
    pairs = batch.wide_ids[:, 2].tolist()
    assert pairs[0] == pairs[1] == pairs[2] != pairs[3] == pairs[4]
    assert {pairs[0], pairs[3]} == {7 + 2, 7 + 3}
    assert pairs[5] == 7 + MISSING
    assert batch.wide_bags[0].values.tolist() == [11 + i for i in (2, 2, 3, 4, 3)]
    assert layout.numeric == 4
    assert layout.tables == {"user_id": (4, 16), "genre": (4, 4), "tags": (5, 8)}
    assert layout.fields == ("user_id", "genre")
    assert layout.bags == ("tags", "genre")
    assert layout.deep_width == 16 + 4 + 8 + 4 + 4
    assert (layout.user, layout.item) == (0, None)  # items have no column of their key
    # Of user_id, genre, tags, recent, and two inputs each of price and visits.
    assert layout.owners == (
        *("user", "item", "item", "user"),
        *("context", "context", "user", "user"),
    )
    assert layout.targets == (None, 1)  # recent is about genre


@pytest.mark.parametrize(
    ("keys", "places"),
    [
        ({}, (1, 2)),
        ({"user_id": {"deep": False, "wide": True}}, (None, 1)),  # the wide part's alone
        ({"item_id": {"deep": False, "wide": True}}, (1, None)),
    ],
)
def test_the_layout_says_where_the_keys_are_and_whose_each_column_is(
    keys: dict[str, dict[str, Any]], places: tuple[int | None, int | None]
) -> None:
    """Derived columns are the user's if any of their inputs is, else the context's, else item's."""

    def aggregate(*by: str) -> dict[str, Any]:
        return {"kind": "numeric", "aggregate": {"by": by, "measure": "count"}}

    text = {"kind": "categorical", "owner": "context"}
    columns: dict[str, dict[str, Any]] = {
        "weather": text,
        "user_id": text | {"owner": "user"},
        "item_id": text | {"owner": "item"},
        "price": {"kind": "numeric", "owner": "item"},
        "bought": aggregate("user_id", "item_id"),
        "sold": aggregate("item_id"),
        "sold_in_rain": aggregate("item_id", "weather"),
        "dearth": {"kind": "numeric", "ratio": {"of": "price", "to": "sold_in_rain"}},
    }
    spec = FeatureSpec.model_validate(
        {
            "entities": {"user": "user_id", "item": "item_id", "request": "visit_id"},
            "label": {"name": "bought_now", "values": [0, 1]},
            "columns": [
                {"name": name, **column, **keys.get(name, {})} for name, column in columns.items()
            ],
        }
    )
    texts_ = {name: texts("a", "a") for name in ("weather", "user_id", "item_id")}
    numbers = ("price", "bought", "sold", "sold_in_rain", "dearth")
    frame_ = texts_ | {name: np.zeros(2, np.float32) for name in numbers}
    layout = fit_encoder(frame_, spec).layout
    assert (layout.user, layout.item) == places
    known = [owner for owner, key in (("user", "user_id"), ("item", "item_id")) if key not in keys]
    of_numbers = ("item", "user", "item", "context", "context")
    twice = [owner for owner in of_numbers for _ in range(2)]  # with "is missing"
    assert layout.owners == ("context", *known, *twice)
    assert len(layout.owners) == len(layout.fields) + len(layout.bags) + layout.numeric


def test_slots_do_not_overlap_in_the_wide_table() -> None:
    encoder = fit_encoder(frame(), SPEC)
    batch, layout = encoder.encode(frame()), encoder.layout
    ends = np.cumsum(layout.wide_slots)
    starts = ends - layout.wide_slots
    single = len(layout.wide_slots) - layout.wide_bags
    slots = [*batch.wide_ids.T, *(bag.values for bag in batch.wide_bags)]
    assert batch.wide_ids.shape[1] == single
    for ids, start, end in zip(slots, starts, ends, strict=True):
        assert start <= ids.min()
        assert ids.max() < end


def test_values_that_only_validation_has_are_unknown_to_the_encoder() -> None:
    encoder = fit_encoder(rows_of(np.arange(3)), SPEC)
    later = encoder.encode(frame())
    assert encoder.tables["user_id"].values == ("u1",)
    assert later.deep_ids[3:, 0].tolist() == [UNKNOWN, UNKNOWN, MISSING]
    assert later.deep_bags[0].values.tolist() == [2, 2, 3, UNKNOWN, 3]  # cold is new
    assert later.wide_ids[3:, 2].tolist() == [3 + 3 + UNKNOWN] * 2 + [3 + 3 + MISSING]
    assert later.numeric[3:, 2].tolist() == [1, 1, 1]  # more visits than training ever saw


def test_fitting_looks_at_nothing_but_what_it_is_given() -> None:
    one = fit_encoder(frame(), SPEC)
    other = fit_encoder(frame(bought=np.zeros(6)), SPEC)
    unlabelled = {name: values for name, values in frame().items() if name != "bought"}
    assert one.fingerprint == other.fingerprint == fit_encoder(unlabelled, SPEC).fingerprint


def test_a_frame_without_label_gives_a_batch_without_label() -> None:
    encoder = fit_encoder(frame(), SPEC)
    served = {name: values for name, values in frame().items() if name != "bought"}
    assert encoder.encode(served).label is None


def test_a_draw_is_the_exposures_own_whatever_is_around_it() -> None:
    frame = {
        name: np.array([f"{name}{row % size}" for row in range(1000)], object)
        for name, size in zip(SPEC.keys, (7, 30, 250), strict=True)
    }
    drawn = draws(frame, SPEC)
    assert drawn is not None
    assert drawn.dtype == np.float32
    assert 0 <= drawn.min() < drawn.max() < 1
    assert 0.07 < (drawn < 0.1).mean() < 0.13  # uniform
    some = np.array([900, 3, 41])
    alone = draws({name: values[some] for name, values in frame.items()}, SPEC)
    assert alone is not None
    assert alone.tolist() == drawn[some].tolist()
    numbered = frame | {SPEC.keys[2]: np.arange(1000)}
    assert np.array_equal(
        draws(numbered, SPEC), draws(numbered | {SPEC.keys[2]: np.arange(1000).astype(str)}, SPEC)
    )
    del frame[SPEC.keys[2]]
    assert draws(frame, SPEC) is None


def test_the_last_of_the_labels_values_is_the_positive_one() -> None:
    spec = SPEC.model_copy(update={"label": SPEC.label.model_copy(update={"values": (5, 3)})})
    batch = fit_encoder(frame(), spec).encode(frame(bought=np.array([3, 5, 3, 5, 5, NAN])))
    assert batch.label is not None
    assert batch.label.tolist() == [1, 0, 1, 0, 0, 0]
    assert batch.label.dtype == np.float32


def test_a_regression_label_is_itself() -> None:
    label = SPEC.label.model_copy(update={"values": None})
    spec = SPEC.model_copy(update={"task": "regression", "label": label})
    batch = fit_encoder(frame(), spec).encode(frame(bought=np.array([1.5, -2, 0, 9, 1, 1])))
    assert batch.label is not None
    assert batch.label.tolist() == [1.5, -2, 0, 9, 1, 1]


any_text = st.one_of(st.none(), st.sampled_from(["u1", "tea", "hot"]), st.text())
any_list = st.lists(any_text, max_size=3)
any_number = st.floats(width=32)
any_row = st.tuples(any_text, any_text, any_list, any_number, any_number, any_list)


@given(st.lists(any_row, max_size=6))
def test_encoding_never_fails_and_every_id_is_in_its_table(rows: list[Any]) -> None:
    encoder = fit_encoder(frame(), SPEC)
    user, genre, tags, price, visits, recent = ([row[i] for row in rows] for i in range(6))
    batch = encoder.encode(
        {
            "user_id": texts(*user),
            "genre": texts(*genre),
            "tags": Ragged.of(tags),
            "price": np.array(price, np.float32),
            "visits": np.array(visits, np.float32),
            "recent": Ragged.of(recent),
        }
    )
    layout = encoder.layout
    assert len(batch) == len(rows)
    assert ((batch.numeric >= 0) & (batch.numeric <= 1)).all()
    deep = [*batch.deep_ids.T, *(bag.values for bag in batch.deep_bags)]
    for table, ids in zip((*layout.fields, *layout.bags), deep, strict=True):
        assert ((ids >= 0) & (ids < layout.tables[table][0])).all()
    wide = [*batch.wide_ids.T, *(bag.values for bag in batch.wide_bags)]
    ends = np.cumsum(layout.wide_slots)
    for ids, size, end in zip(wide, layout.wide_slots, ends, strict=True):
        assert ((ids >= end - size) & (ids < end)).all()


@given(st.lists(st.integers(0, 5), max_size=6))
def test_a_row_is_encoded_alike_alone_and_among_others(chosen: list[int]) -> None:
    """A served request has one row or two hundred; training has a million."""
    encoder = fit_encoder(frame(), SPEC)
    index = np.array(chosen, np.int64)
    assert equal(encoder.encode(rows_of(index)), encoder.encode(frame()).take(index))


def test_a_spec_without_numbers_without_crosses_or_without_ids() -> None:
    for names in (["price", "visits"], ["user_id"], ["tags"]):
        spec = SPEC.model_copy(
            update={"columns": tuple(SPEC.by_name[n] for n in names), "crosses": ()}
        )
        spec = FeatureSpec.from_json(spec.to_json())
        encoder = fit_encoder(frame(), spec)
        batch = encoder.encode(frame())
        assert len(batch) == 6
        assert batch.numeric.shape == (6, encoder.layout.numeric)
        assert batch.deep_ids.shape == (6, len(encoder.layout.fields))
        assert batch.wide_ids.shape[1] + len(batch.wide_bags) == len(encoder.layout.wide_slots)


# -- frames that do not fit -----------------------------------------------------------------------


def test_all_faults_of_a_frame_are_reported_together() -> None:
    wrong = frame(
        genre=Ragged.of([["tea"]] * 6),
        tags=texts(*["hot"] * 6),
        price=texts("1", "2", "3", "4", "5", "6"),
        recent=Ragged.of([[1], ["tea"], [], [], [], []]),
        bought=np.zeros(4),
    )
    del wrong["user_id"], wrong["visits"]
    encoder = fit_encoder(frame(), SPEC)
    message = (
        "frame: absent columns ['user_id', 'visits']; the spec needs them; "
        "columns differ in length: [4, 6]; "
        "genre is categorical, so it holds one value per row; "
        "tags is multi, so it holds a list per row; "
        "price is numeric, so it holds numbers or NaN, not object; "
        "recent is sequence, so it holds text or None, not int"
    )
    for act in (lambda: fit_encoder(wrong, SPEC), lambda: encoder.encode(wrong)):
        with pytest.raises(FrameError, match=f"^{re.escape(message)}$"):
            act()


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (np.arange(6), "int"),
        (np.arange(6.0), "float"),
        (texts("a", "b", None, NAN, 3, "c"), "float or int"),  # type: ignore[arg-type]
    ],
)
def test_ids_that_are_numbers_are_refused_since_served_ones_are_text(
    values: Any, found: str
) -> None:
    """Else every served id would be unknown, without a word."""
    fault = f"user_id is categorical, so it holds text or None, not {found}"
    with pytest.raises(FrameError, match=re.escape(fault)):
        fit_encoder(frame(user_id=values), SPEC)


def test_texts_of_numpy_are_texts_and_whole_numbers_are_numbers() -> None:
    encoder = fit_encoder(frame(), SPEC)
    user_id = np.array(["u1", "u1", "u1", "u2", "u2", "u9"])
    visits = np.arange(1, 7)
    batch = encoder.encode(frame(user_id=user_id, visits=visits))
    assert batch.deep_ids[:, 0].tolist() == [2, 2, 2, 3, 3, UNKNOWN]
    assert batch.numeric[:, 2].tolist() == encoder.encode(frame()).numeric[:, 2].tolist()


# -- completing what a feature store returns ------------------------------------------------------

STORED = FeatureSpec.model_validate(
    yaml.safe_load(
        """
        entities: {user: user_id, item: item_id, request: visit_id}
        label: {name: bought}
        columns:
          - {name: genre, kind: categorical, owner: item}
          - {name: price, kind: numeric, owner: context}
          - {name: buys, kind: numeric, aggregate: {by: [user_id], measure: count}}
          - {name: spent, kind: numeric, aggregate: {by: [user_id], measure: sum, column: price}}
          - {name: usual, kind: numeric, aggregate: {by: [user_id], measure: mean, column: price}}
          - {name: age_days, kind: numeric, aggregate: {by: [user_id], measure: recency_days}}
          - {name: liked, kind: numeric, aggregate: {of: exposures, by: [item_id], measure: rate, prior: 0.2, prior_weight: 5}}
          - {name: recent, kind: sequence, aggregate: {by: [user_id], measure: last, column: genre, n: 3}}
          - {name: per_buy, kind: numeric, ratio: {of: spent, to: buys}}
          - {name: dear, kind: numeric, ratio: {of: price, to: usual, plus: 0.5}}
        """  # noqa: E501
    )
)


def stored(**replaced: Any) -> dict[str, Any]:
    """Two exposures: of a known user, and of one the store has never heard of."""
    return {
        "genre": texts("tea", None),
        "price": np.array([3.0, NAN]),
        "buys": np.array([4.0, NAN]),
        "spent": np.array([10.0, NAN]),
        "usual": np.array([2.5, NAN]),
        "age_days__last_us": np.array([1_500_000_000_000_000.0, NAN]),
        "liked": np.array([0.75, NAN]),
        "recent": Ragged.of([["tea", "milk"], []]),
        "event_timestamp": np.array([1_500_000_000_000_000] * 2, "datetime64[us]"),
    } | replaced


def test_a_key_without_a_snapshot_has_defaults() -> None:
    known, unknown = (
        {name: values[i] for name, values in complete(stored(), STORED).items() if name != "recent"}
        for i in (0, 1)
    )
    assert (known["buys"], known["spent"], known["usual"], known["liked"]) == (4, 10, 2.5, 0.75)
    assert (unknown["buys"], unknown["spent"]) == (0, 0)  # nothing in the log: none, and no money
    assert unknown["liked"] == np.float32(0.2)  # no exposure yet: what is likely beforehand
    assert np.isnan(unknown["usual"])  # the mean of nothing is not 0
    assert np.isnan(unknown["age_days"])  # never, which is not long ago
    assert np.isnan(unknown["price"])  # raw values are as they came
    assert unknown["genre"] is None


def test_completing_gives_the_columns_of_the_spec_and_nothing_else() -> None:
    completed = complete(stored(surplus=np.zeros(2)), STORED)
    assert set(completed) == set(STORED.by_name)
    for column in STORED.columns:
        values = completed[column.name]
        if column.is_numeric:
            assert not isinstance(values, Ragged)
            assert values.dtype == np.float32
    assert fit_encoder(completed, STORED).encode(completed)


@pytest.mark.parametrize(
    ("microseconds", "days"),
    [
        (0, 0.0),
        (1, 1 / 86_400e6),
        (86_400_000_000, 1.0),
        (86_400_000_001, 1.0 + 1 / 86_400e6),
        (36 * 3600 * 1_000_000, 1.5),
        (365 * 86_400_000_000, 365.0),
    ],
)
def test_recency_is_the_age_of_the_last_event_in_days(microseconds: int, days: float) -> None:
    last = 1_500_000_000_123_456
    found = complete(
        stored(
            age_days__last_us=np.array([float(last), NAN]),
            event_timestamp=np.array([last + microseconds] * 2, "datetime64[us]"),
        ),
        STORED,
    )["age_days"]
    assert not isinstance(found, Ragged)
    assert found[0] == np.float32(days)
    assert np.isnan(found[1])


def test_recency_does_not_depend_on_the_unit_of_the_moment() -> None:
    moments = stored()["event_timestamp"] + np.timedelta64(3, "D")
    for unit in ("datetime64[us]", "datetime64[ns]", "datetime64[s]"):
        found = complete(stored(event_timestamp=moments.astype(unit)), STORED)["age_days"]
        assert not isinstance(found, Ragged)
        assert found[0] == 3


def test_ratios_by_hand() -> None:
    completed = complete(stored(), STORED)
    assert completed["per_buy"].tolist() == [10 / (4 + 1), 0]
    assert completed["dear"].tolist() == [3 / (2.5 + 0.5), 0]  # a missing part counts as 0


def test_a_ratio_whose_divisor_is_0_is_missing() -> None:
    frame = {"spent": np.array([1.0, 0.0, 2.0]), "buys": np.array([-1.0, -1.0, -2.0])}
    frame |= {"price": np.zeros(3), "usual": np.zeros(3)}
    ratio = with_ratios(frame, STORED)["per_buy"]
    assert not isinstance(ratio, Ragged)
    assert np.isnan(ratio[:2]).all()
    assert ratio[2] == -2


def test_all_fields_that_the_store_did_not_return_are_named() -> None:
    poor = stored()
    del poor["event_timestamp"], poor["buys"], poor["age_days__last_us"]
    message = "frame: absent columns ['age_days__last_us', 'buys', 'event_timestamp']; the spec"
    with pytest.raises(FrameError, match=re.escape(message)):
        complete(poor, STORED)


# -- what is too old ------------------------------------------------------------------------------

AGED = STORED.model_copy(update={"max_age_days": {"user_id_interactions": 2.0, "items": 0.5}})
DAY_US = 86_400_000_000


def aged(*ages_us: int, **replaced: Any) -> dict[str, Any]:
    """The two exposures of `stored`, whose user's row is that old, and whose item's is new."""
    now = 1_500_000_000_000_000
    stamps = {"user_id_interactions__at_us": np.array([now - age for age in ages_us], np.float64)}
    return stored(items__at_us=np.array([now, now], np.float64), **stamps, **replaced)


def test_a_row_is_missing_a_microsecond_after_its_age_and_not_before() -> None:
    values = {name: np.array([4.0, 5.0]) for name in ("buys", "spent", "usual")}
    history = Ragged.of([["tea"], ["milk", "tea"]])
    frame = aged(2 * DAY_US, 2 * DAY_US + 1, recent=history, liked=np.array([0.5, 0.5]), **values)
    kept, expired = expire(frame, AGED, ["user_id_interactions"])
    assert expired == 1
    for name in values:
        np.testing.assert_array_equal(np.asarray(kept[name]), [values[name][0], NAN])
    assert isinstance(kept["recent"], Ragged)
    assert kept["recent"].offsets.tolist() == [0, 1, 1]
    assert kept["recent"].values.tolist() == ["tea"]
    assert np.asarray(kept["liked"]).tolist() == [0.5, 0.5]  # of another view
    assert np.asarray(frame["buys"]).tolist() == [4.0, 5.0]  # what was given is as it was
    completed = complete(kept, AGED)
    assert np.asarray(completed["buys"]).tolist() == [4, 0]


def test_only_the_views_that_are_named_age_and_only_those_with_an_age() -> None:
    frame = aged(9 * DAY_US, 9 * DAY_US)
    for views in (["items"], ["users", "item_id_exposures"], []):
        kept, expired = expire(frame, AGED, views)
        assert expired == 0
        assert {name: id(values) for name, values in kept.items()} == {
            name: id(values) for name, values in frame.items()
        }


def test_who_has_no_row_is_missing_and_not_expired() -> None:
    frame = aged(0, 0)
    frame["user_id_interactions__at_us"] = np.array([NAN, NAN])
    kept, expired = expire(frame, AGED, ["user_id_interactions"])
    assert expired == 0
    assert kept["buys"] is frame["buys"]


def test_texts_expire_to_none() -> None:
    frame = aged(0, 0, genre=texts("tea", "milk"))
    frame["items__at_us"] -= [DAY_US, 0]
    kept, expired = expire(frame, AGED, ["items"])
    assert (expired, np.asarray(kept["genre"]).tolist()) == (1, [None, "milk"])


# -- on disk --------------------------------------------------------------------------------------


def test_a_loaded_encoder_encodes_as_the_saved_one(tmp_path: Path) -> None:
    encoder = fit_encoder(frame(), SPEC)
    encoder.save(tmp_path)
    loaded = Encoder.load(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("encoder.safetensors", "spec.json", "vocabularies.json")
    ]
    assert loaded.spec == encoder.spec
    assert loaded.layout == encoder.layout
    assert loaded.fingerprint == encoder.fingerprint
    unseen = frame(user_id=texts("u1", "new", None, "ü", "", "u2"))
    for served in (frame(), unseen):
        assert equal(loaded.encode(served), encoder.encode(served))


def test_an_encoder_without_crosses_or_numbers_survives_too(tmp_path: Path) -> None:
    for i, names in enumerate((["price"], ["user_id"], ["tags", "genre"])):
        spec = SPEC.model_copy(
            update={"columns": tuple(SPEC.by_name[n] for n in names), "crosses": ()}
        )
        encoder = fit_encoder(frame(), FeatureSpec.from_json(spec.to_json()))
        encoder.save(tmp_path / str(i))
        loaded = Encoder.load(tmp_path / str(i))
        assert loaded.fingerprint == encoder.fingerprint
        assert equal(loaded.encode(frame()), encoder.encode(frame()))


def test_a_cross_that_no_pair_was_frequent_enough_for_survives_too(tmp_path: Path) -> None:
    cross = Cross(columns=("user_id", "genre"), min_count=100)
    encoder = fit_encoder(frame(), SPEC.model_copy(update={"crosses": (cross,)}))
    assert len(encoder.crosses["user_id_x_genre"].keys) == 0
    encoder.save(tmp_path)
    assert equal(Encoder.load(tmp_path).encode(frame()), encoder.encode(frame()))


def test_the_fingerprint_changes_with_any_content() -> None:
    encoder = fit_encoder(frame(), SPEC)
    cross = encoder.crosses["user_id_x_genre"]
    changed = {
        "a table's order": replace(
            encoder, tables=encoder.tables | {"genre": Vocabulary(("milk", "tea"))}
        ),
        "a table": replace(encoder, tables=encoder.tables | {"genre": Vocabulary(("tea",))}),
        "a wide column": replace(encoder, wide=encoder.wide | {"genre": Vocabulary(())}),
        "a quantile": replace(
            encoder, scalers=encoder.scalers | {"visits": Scaler(np.array([1.0, 2.0]))}
        ),
        "a cross key": replace(
            encoder,
            crosses=encoder.crosses
            | {"user_id_x_genre": CrossVocabulary(cross.keys + np.uint64(1), None)},
        ),
        "one key fewer": replace(
            encoder,
            crosses=encoder.crosses | {"user_id_x_genre": CrossVocabulary(cross.keys[:1], None)},
        ),
        "the spec": replace(encoder, spec=SPEC.model_copy(update={"grain_days": 2})),
    }
    fingerprints = {name: other.fingerprint for name, other in changed.items()}
    assert len({encoder.fingerprint, *fingerprints.values()}) == 1 + len(changed), fingerprints
    assert fit_encoder(frame(), SPEC).fingerprint == encoder.fingerprint


def test_the_fingerprint_says_where_one_array_ends_and_the_next_begins() -> None:
    """Else keys of one cross that spell the next one's name could stand for that cross."""
    spec = SPEC.model_copy(
        update={
            "columns": tuple(SPEC.by_name[name] for name in ("user_id", "genre", "tags")),
            "crosses": (
                Cross(columns=("genre", "tags")),
                Cross(columns=("user_id", "genre")),
            ),
        }
    )
    encoder = fit_encoder(frame(), spec)
    name = b"cross/user_id_x_genre"
    filled = name + b"." * (-len(name) % 8)  # a whole number of 8-byte keys
    spelled = np.frombuffer(filled, np.uint64)
    none = np.zeros(0, np.uint64)

    def with_keys(one: Any, other: Any) -> Encoder:
        made = {
            "genre_x_tags": CrossVocabulary(one, None),
            "user_id_x_genre": CrossVocabulary(other, None),
        }
        return replace(encoder, crosses=made)

    # Joined without lengths, both would read: name one, name other, padding, name other.
    tail = np.frombuffer(b"." * (-len(name) % 8) + name, np.uint64)
    assert with_keys(spelled, none).fingerprint != with_keys(none, tail).fingerprint


# -- a warm start's keys, and the weights of a sampled log ---------------------------------------


def shop(genres: list[str], users: list[str]) -> dict[str, Any]:
    """One row for each genre with each user, three times over, which is what `genre` asks for."""
    rows = [(genre, user) for genre in genres for user in users] * 3
    count = len(rows)
    texts = {
        "genre": np.array([genre for genre, _ in rows], object),
        "user_id": np.array([user for _, user in rows], object),
    }
    return {
        **texts,
        "tags": Ragged.of([["new"]] * count),
        "recent": Ragged.of([[genre] for genre, _ in rows]),
        "price": np.arange(count, dtype=np.float32),
        "visits": np.arange(count, dtype=np.float32),
    }


def test_rows_of_an_older_encoder_are_found_by_key() -> None:
    old = fit_encoder(shop(["drama", "comedy"], ["ann", "bob"]), SPEC)
    new = fit_encoder(shop(["action", "comedy"], ["bob", "cid", "ann"]), SPEC)
    rows = new.rows_of(old)
    users = {**{MISSING: MISSING, UNKNOWN: UNKNOWN}}
    for key, row in {value: i for i, value in enumerate(new.tables["user_id"].values, 2)}.items():
        known = old.tables["user_id"].values
        users[row] = known.index(key) + FIRST_KNOWN if key in known else -1
    assert rows["user_id"].tolist() == [users[i] for i in range(len(users))]
    assert sorted(rows["user_id"].tolist()) == [-1, 0, 1, 2, 3]  # cid is new
    assert sorted(rows["genre"].tolist()) == [
        -1,
        0,
        1,
        old.tables["genre"].ids(np.array(["comedy"], object))[0],
    ]

    # The wide table: an example that both know has the same ids, at their old places.
    assert len(rows["wide"]) == new.layout.wide_rows
    one = {
        name: values.take(np.array([0])) if isinstance(values, Ragged) else values[:1]
        for name, values in shop(["comedy"], ["ann"]).items()
    }
    before, after = old.encode(one), new.encode(one)
    assert rows["wide"][after.wide_ids].tolist() == before.wide_ids.tolist()
    for earlier, later in zip(before.wide_bags, after.wide_bags, strict=True):
        assert rows["wide"][later.values].tolist() == earlier.values.tolist()


def test_every_row_of_the_same_encoder_is_its_own() -> None:
    encoder = fit_encoder(shop(["drama", "comedy"], ["ann", "bob"]), SPEC)
    for rows in encoder.rows_of(encoder).values():
        assert rows.tolist() == list(range(len(rows)))


def test_a_cross_that_is_hashed_otherwise_has_no_old_rows() -> None:
    keys = np.array([1, 5], np.uint64)
    named, hashed = CrossVocabulary(keys, None), CrossVocabulary(keys[:0], 3)
    assert hashed.rows_of(CrossVocabulary(keys[:0], 3)).tolist() == [0, 1, 2, 3, 4]
    assert hashed.rows_of(CrossVocabulary(keys[:0], 4)).tolist() == [-1] * 5
    assert hashed.rows_of(named).tolist() == [-1] * 5
    assert named.rows_of(CrossVocabulary(keys[1:], None)).tolist() == [0, 1, -1, 2]


def test_a_weight_is_the_inverse_of_the_inclusion_probability() -> None:
    frame = shop(["drama", "comedy"], ["ann"])
    encoder = fit_encoder(frame, SPEC)
    assert encoder.encode(frame).weight is None
    chances = np.array([1, 0.25, 0.5, 1, 1, 0.1])
    weight = encoder.encode(frame | {"inclusion_probability": chances}).weight
    assert weight is not None
    assert weight.tolist() == pytest.approx([1, 4, 2, 1, 1, 10])
    assert encoder.encode(frame | {"inclusion_probability": np.ones(6)}).weight is None


@pytest.mark.parametrize("odd", [0.0, -0.1, 1.1, NAN])
def test_an_inclusion_probability_is_a_probability(odd: float) -> None:
    frame = shop(["drama", "comedy"], ["ann"])
    encoder = fit_encoder(frame, SPEC)
    chances = np.array([1, 1, 1, 1, odd, odd])
    with pytest.raises(FrameError, match=r"inclusion_probability: 2 values are not in \(0, 1\]"):
        encoder.encode(frame | {"inclusion_probability": chances})
