"""Features of a request against those of the training frame: the same numbers, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import small_store
from fathom.batch import Ragged
from fathom.encoding import fit_encoder
from fathom.feature_store import frame_of
from fathom.online import KeyedTable, OnlineFeatures
from small_store import COLUMNS, DAY, ITEMS, SPEC, START, USERS, a_spec, a_table

Request = tuple[str, dict[str, Any], list[dict[str, Any]], datetime]


@pytest.fixture(scope="module", params=[3, 8], ids="seed {}".format)
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> small_store.Store:
    return small_store.ready(tmp_path_factory.mktemp("online"), seed=request.param)


@pytest.fixture(scope="module")
def online(store: small_store.Store) -> OnlineFeatures:
    return OnlineFeatures.open(store.repo, SPEC)


def requests(store: small_store.Store) -> list[Request]:
    """One of every user, known or not, after the newest boundary, with candidates of all kinds."""
    random = np.random.default_rng(2)
    made = []
    for user in range(USERS + 1):
        moment = store.until + timedelta(microseconds=int(random.integers(86_400_000_000)))
        context = {
            "shop": ["north", "south", "new", None][user % 4],
            "discount": [0.1, None][user % 2],
            "searches": [["rye", "tea"], [], None][user % 3],
        }
        candidates = [
            {"item_id": f"i{i}", "slot": ["top", "end", "new", None][(i + user) % 4]}
            | ({"discount": i / 10} if i % 3 == 0 else {})
            for i in random.permutation(ITEMS + 2).tolist()
        ]
        made.append((f"u{user}", context, candidates, moment))
    return made


@pytest.fixture(scope="module")
def trained(store: small_store.Store) -> list[dict[str, Any]]:
    """The same candidates as rows of a training frame, request by request."""
    rows = [
        {"request_id": "r", "user_id": user, "event_timestamp": moment} | context | candidate
        for user, context, candidates, moment in requests(store)
        for candidate in candidates
    ]
    names = ("request_id", "user_id", "item_id", "event_timestamp")
    spine = a_table(rows, *names, "shop", "slot", "discount", "searches")
    frame = store.repo.training_frame(spine, SPEC)
    return [frame_of(frame.slice(k, ITEMS + 2)) for k in range(0, len(rows), ITEMS + 2)]


def lists(values: Ragged) -> list[list[Any]]:
    return [values.values[start:end].tolist() for start, end in pairwise(values.offsets)]


def assert_equal_frames(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    for column in SPEC.columns:
        ours, theirs = found[column.name], expected[column.name]
        if isinstance(theirs, Ragged):
            assert lists(ours) == lists(theirs), column.name
        else:
            assert ours.dtype == theirs.dtype, column.name
            np.testing.assert_array_equal(ours, theirs, column.name, strict=True)


# -- the same as in training ---------------------------------------------------------------------


def test_a_request_sees_the_features_of_the_training_frame(
    store: small_store.Store, online: OnlineFeatures, trained: list[dict[str, Any]]
):
    seen: dict[str, set[Any]] = {}
    for request, expected in zip(requests(store), trained, strict=True):
        found, _ = online.frame(*request)
        assert found.keys() == SPEC.by_name.keys()
        assert_equal_frames(found, expected)
        for name, values in found.items():
            plain = values.values if isinstance(values, Ragged) else values
            seen.setdefault(name, set()).update(plain.tolist())
    # Equal because both are empty would prove nothing.
    constant = {name for name, values in seen.items() if len(values) < 2}
    assert constant == set()


def test_the_model_gets_the_same_batch(
    store: small_store.Store, online: OnlineFeatures, trained: list[dict[str, Any]]
):
    encoder = fit_encoder(trained[1], SPEC)
    served = encoder.encode(online.frame(*requests(store)[1])[0])
    expected = encoder.encode(trained[1])
    np.testing.assert_array_equal(served.numeric, expected.numeric)
    np.testing.assert_array_equal(served.deep_ids, expected.deep_ids)
    np.testing.assert_array_equal(served.wide_ids, expected.wide_ids)
    for ours, theirs in zip(served.wide_bags, expected.wide_bags, strict=True):
        np.testing.assert_array_equal(ours.values, theirs.values)
        np.testing.assert_array_equal(ours.offsets, theirs.offsets)


def test_candidates_keep_their_order_and_their_copies(
    store: small_store.Store, online: OnlineFeatures
):
    user, context, candidates, moment = requests(store)[2]
    found, known = online.frame(user, context, candidates, moment)
    shuffled = [candidates[3], candidates[0], candidates[3]]
    picked, picked_known = online.frame(user, context, shuffled, moment)
    order = np.array([3, 0, 3])
    assert picked["item_id"].tolist() == [c["item_id"] for c in shuffled]
    assert picked_known.items.tolist() == known.items[order].tolist()
    for name, values in found.items():
        if isinstance(values, Ragged):
            assert lists(picked[name]) == lists(values.take(order))
        else:
            np.testing.assert_array_equal(picked[name], values[order], name)


def test_no_candidates_are_a_frame_of_no_rows(store: small_store.Store, online: OnlineFeatures):
    found, known = online.frame("u1", {}, [], store.until)
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(SPEC.by_name, 0)
    assert len(known.items) == 0


def test_a_candidates_own_context_comes_before_the_shared_one(
    store: small_store.Store, online: OnlineFeatures
):
    context = {"shop": "north", "slot": "top", "searches": ["tea"]}
    candidates = [
        {"item_id": "i1"},
        {"item_id": "i1", "slot": "end", "shop": "south", "searches": ["a", "b"], "discount": 0.5},
        {"item_id": "i1", "slot": None},
    ]
    found, _ = online.frame("u1", context, candidates, store.until)
    assert found["slot"].tolist() == ["top", "end", None]
    assert found["shop"].tolist() == ["north", "south", "north"]
    assert lists(found["searches"]) == [["tea"], ["a", "b"], ["tea"]]
    np.testing.assert_array_equal(
        found["discount"],
        np.float32([np.nan, 0.5, np.nan]),
        strict=True,
    )
    acts = found["shop_item_acts_5d"]
    assert acts[0] == acts[2]
    rates = found["slot_item_rate"]
    assert rates[2] == np.float32(0.2)
    assert rates[0] != rates[1]


def test_a_moment_is_the_same_in_every_time_zone_and_utc_without_one(
    store: small_store.Store, online: OnlineFeatures
):
    user, context, candidates, moment = requests(store)[1]
    here, _ = online.frame(user, context, candidates, moment)
    for same in (
        moment.astimezone(timezone(timedelta(hours=-5))),
        moment.replace(tzinfo=None),
    ):
        there, _ = online.frame(user, context, candidates, same)
        assert_equal_frames(there, here)
    later, _ = online.frame(user, context, candidates, moment + DAY)
    np.testing.assert_allclose(
        later["user_recency"],
        here["user_recency"] + np.float32(1),
        rtol=1e-6,
    )


def test_threads_may_share_it(store: small_store.Store, online: OnlineFeatures):
    made = requests(store)
    expected = [online.frame(*request)[0] for request in made]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda request: online.frame(*request)[0], made * 3))
    for ours, theirs in zip(found, expected * 3, strict=True):
        assert_equal_frames(ours, theirs)


# -- who is known --------------------------------------------------------------------------------


def test_known_is_who_has_attributes_or_a_past(store: small_store.Store, online: OnlineFeatures):
    attributes, past = ("i3",), (f"i{ITEMS - 1}",)  # the last one is in the logs alone
    unknown = ("nothing", "")
    candidates = [{"item_id": item} for item in (*attributes, *past, *unknown)]
    for user, expected in (("u1", True), (f"u{USERS - 1}", True), ("nobody", False)):
        _, known = online.frame(user, {}, candidates, store.until)
        assert known.user is expected
        assert known.items.tolist() == [True, True, False, False]


def test_the_unknown_get_the_defaults_of_training(online: OnlineFeatures):
    found, _ = online.frame("nobody", {}, [{"item_id": "nothing"}], START)
    first = {name: v[0] for name, v in found.items() if not isinstance(v, Ragged)}
    assert (first["user_acts"], first["pair_acts"], first["item_acts"]) == (0, 0, 0)
    assert first["user_rate"] == first["slot_item_rate"] == np.float32(0.2)
    assert np.isnan([first[n] for n in ("user_recency", "item_mean", "price", "age")]).all()
    assert first["tier"] is first["genre"] is None
    assert lists(found["recent_items"]) == lists(found["item_shops"]) == [[]]


def named(names: str) -> list[dict[str, Any]]:
    return [column for column in COLUMNS if column["name"] in names.split()]


def test_a_spec_without_attributes_knows_items_by_their_past(tmp_path: Path):
    spec = a_spec(named("user_id item_id item_acts"), [])
    made = small_store.ready(tmp_path, spec)
    online = OnlineFeatures.open(made.repo, spec)
    candidates = [{"item_id": "i1"}, {"item_id": "nothing"}]
    found, known = online.frame("u1", {}, candidates, made.until)
    acts = made.tables["interactions"]["item_id"].to_pylist().count("i1")
    assert found["item_acts"].tolist() == [acts, 0]
    assert known.items.tolist() == [True, False]
    assert known.user is False  # nothing of users is kept


def test_a_user_is_served_from_one_read(store: small_store.Store, monkeypatch: pytest.MonkeyPatch):
    """The cost of an online read grows with rows, so a request reads one, whatever it ranks."""
    feast, read = store.repo.open(), []
    genuine = feast.get_online_features

    def counted(**arguments: Any) -> Any:
        read.append(arguments["entity_rows"])
        return genuine(**arguments)

    monkeypatch.setattr(feast, "get_online_features", counted)
    opened = OnlineFeatures.open(store.repo, SPEC)
    online = OnlineFeatures(feast, SPEC, opened._tables)
    online.frame("u3", {}, [{"item_id": f"i{k % ITEMS}"} for k in range(200)], store.until)
    assert read == [[{"user_id": "u3"}]]


def test_a_column_named_in_the_request_cannot_replace_a_feature(
    store: small_store.Store, online: OnlineFeatures
):
    context = {"shop": "north", "user_acts": 1e6, "tier": "forged"}
    candidates = [{"item_id": "i1", "genre": "forged", "item_acts": 1e6}]
    forged, _ = online.frame("u1", context, candidates, store.until)
    honest, _ = online.frame("u1", {"shop": "north"}, [{"item_id": "i1"}], store.until)
    assert_equal_frames(forged, honest)


# -- tables in memory ----------------------------------------------------------------------------


def test_rows_are_found_by_key_and_the_unknown_get_what_is_missing():
    table = pa.table(
        {
            "shop": ["b", "a", "a"],
            "item": ["x", "x", "y"],
            "count": pa.array([1, 2, 3], pa.int64()),
            "word": ["one", None, "three"],
            "many": pa.array([["p"], None, ["q", "r"]], pa.list_(pa.string())),
            "event_timestamp": pa.array([START] * 3),
        }
    )
    keyed = KeyedTable.of(table, ["shop", "item"])
    assert set(keyed.columns) == {"count", "word", "many"}
    shops, items = (
        np.array(v, object) for v in (["a", "b", "b", None, "a"], ["y", "x", "y", "x", "x"])
    )
    found = keyed.take(keyed.find([shops, items]))
    np.testing.assert_array_equal(found["count"], [3, 1, np.nan, np.nan, 2])
    assert found["word"].tolist() == ["three", "one", None, None, None]
    assert lists(found["many"]) == [["q", "r"], ["p"], [], [], []]


def test_keys_are_not_joined_as_texts():
    table = pa.table({"a": ["x-y", "x"], "b": ["z", "y-z"], "n": [1.0, 2.0]})
    keyed = KeyedTable.of(table, ["a", "b"])
    parts = [np.array(values, object) for values in (["x", "x-y", "z"], ["y-z", "z", "x-y"])]
    np.testing.assert_array_equal(keyed.take(keyed.find(parts))["n"], [2.0, 1.0, np.nan])


def test_an_empty_table_knows_nobody():
    lists_of_text = pa.list_(pa.string())
    table = pa.table({"a": pa.array([], pa.string()), "n": pa.array([], pa.float64())})
    keyed = KeyedTable.of(table.append_column("m", pa.array([], lists_of_text)), ["a"])
    rows = keyed.find([np.array(["x", None], object)])
    assert rows.tolist() == [0, 0]
    assert len(keyed.keys) == 0
    found = keyed.take(rows)
    assert np.isnan(found["n"]).all()
    assert lists(found["m"]) == [[], []]


KEYS = st.sampled_from(["", "a", "b", "c", "ä", "a-b"])


@given(
    held=st.dictionaries(st.tuples(KEYS, KEYS), st.floats(allow_nan=False), max_size=12),
    asked=st.lists(st.tuples(KEYS, KEYS), max_size=12),
)
def test_a_keyed_table_is_a_dictionary(
    held: dict[tuple[str, str], float], asked: list[tuple[str, str]]
):
    table = pa.table(
        {
            "a": pa.array([a for a, _ in held], pa.string()),
            "b": pa.array([b for _, b in held], pa.string()),
            "n": pa.array(list(held.values()), pa.float64()),
        }
    )
    keyed = KeyedTable.of(table, ["a", "b"])
    parts = [np.array([key[i] for key in asked], object) for i in (0, 1)]
    found = keyed.take(keyed.find(parts))["n"]
    expected = np.array([held.get(key, np.nan) for key in asked], np.float64)
    np.testing.assert_array_equal(found, expected)
