"""Features of a request against those of the training frame: the same numbers, bit for bit."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

import small_store
from fathom.batch import Ragged
from fathom.encoding import fit_encoder
from fathom.feature_store import FeatureRepo, frame_of
from fathom.lookup import Codes
from fathom.online import OnlineFeatures, user_views
from fathom.online_tables import KeyedTable
from fathom.spec import FeatureSpec
from small_store import COLUMNS, DAY, ITEMS, SPEC, START, USERS, a_spec, a_table, aggregate

Request = tuple[str, dict[str, Any], list[dict[str, Any]], datetime]


@pytest.fixture(scope="module", params=[3, 8], ids="seed {}".format)
def store(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> small_store.Store:
    return small_store.ready(tmp_path_factory.mktemp("online"), seed=request.param)


@pytest.fixture(scope="module")
def online(store: small_store.Store) -> OnlineFeatures:
    return OnlineFeatures.open(store.repo, SPEC)


def requests(store: small_store.Store, later: timedelta = timedelta(0)) -> list[Request]:
    """One of every user, known or not, after the newest boundary, with candidates of all kinds."""
    random = np.random.default_rng(2)
    made = []
    for user in range(USERS + 1):
        within = timedelta(microseconds=int(random.integers(86_400_000_000)))
        moment = store.until + later + within
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
    return offline(store, requests(store))


def offline(store: small_store.Store, made: list[Request]) -> list[dict[str, Any]]:
    rows = [
        {"request_id": "r", "user_id": user, "event_timestamp": moment} | context | candidate
        for user, context, candidates, moment in made
        for candidate in candidates
    ]
    names = ("request_id", "user_id", "item_id", "event_timestamp")
    spine = a_table(rows, *names, "shop", "slot", "discount", "searches")
    frame = store.repo.training_frame(spine, store.spec)
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


def test_a_user_is_served_from_one_read_of_each_view(
    store: small_store.Store, online: OnlineFeatures, monkeypatch: pytest.MonkeyPatch
):
    """The cost of an online read grows with rows, so a request reads one, whatever it ranks."""
    read: list[tuple[str, int]] = []
    provider = online._rows._provider
    genuine = provider.online_read

    def counted(config: Any, view: Any, keys: list[Any], fields: list[str]) -> Any:
        read.append((view.name, len(keys)))
        return genuine(config, view, keys, fields)

    monkeypatch.setattr(provider, "online_read", counted)
    online.frame("u3", {}, [{"item_id": f"i{k % ITEMS}"} for k in range(200)], store.until)
    assert sorted(read) == sorted((view, 1) for view in user_views(SPEC))


def test_a_column_named_in_the_request_cannot_replace_a_feature(
    store: small_store.Store, online: OnlineFeatures
):
    context = {"shop": "north", "user_acts": 1e6, "tier": "forged"}
    candidates = [{"item_id": "i1", "genre": "forged", "item_acts": 1e6}]
    forged, _ = online.frame("u1", context, candidates, store.until)
    honest, _ = online.frame("u1", {"shop": "north"}, [{"item_id": "i1"}], store.until)
    assert_equal_frames(forged, honest)


# -- ages ----------------------------------------------------------------------------------------

#: Of attributes, of views by user, by item, by context, by attributes, and of packed ones.
AGES = {
    "users": 45.0,
    "items": 30.0,
    "user_id_interactions": 2.5,
    "user_id_exposures": 1.0,
    "user_id_item_id_interactions": 5.0,
    "user_id_shop_genre_interactions": 4.0,
    "item_id_interactions": 3.0,
    "shop_interactions": 2.0,
    "slot_item_id_exposures": 6.0,
    "tier_interactions": 9.0,
}


@pytest.fixture(scope="module")
def aged(tmp_path_factory: pytest.TempPathFactory) -> tuple[small_store.Store, OnlineFeatures]:
    spec = FeatureSpec.model_validate(SPEC.model_dump(mode="json") | {"max_age_days": AGES})
    made = small_store.ready(tmp_path_factory.mktemp("aged"), spec)
    return made, OnlineFeatures.open(made.repo, spec)


def test_what_is_too_old_is_missing_as_in_training(
    aged: tuple[small_store.Store, OnlineFeatures],
):
    store, online = aged
    counts = []
    for days in (0, 2, 4, 8, 60):
        made = requests(store, timedelta(days=days))
        expired = 0
        for request, expected in zip(made, offline(store, made), strict=True):
            found, known = online.frame(*request)
            assert_equal_frames(found, expected)
            expired += known.expired
        counts.append(expired)
    assert 0 < counts[0] < max(counts)


def test_a_row_may_be_as_old_as_its_view_allows_and_no_older(
    aged: tuple[small_store.Store, OnlineFeatures],
):
    """Attributes are stamped a day before the start, but for the item that changed later."""
    _, online = aged
    edge = START - DAY + timedelta(days=AGES["items"])
    for late, kept in ((timedelta(0), True), (timedelta(microseconds=1), False)):
        candidates = [{"item_id": "i1"}, {"item_id": "i0"}]
        found, known = online.frame("nobody", {}, candidates, edge + late)
        assert [genre is not None for genre in found["genre"]] == [kept, True]
        # What is looked up by an attribute that is missing is missing, too.
        assert (found["genre_acts"][0] > 0) == kept
        assert known.items.all()  # the store has met it all the same
    edge = START - DAY + timedelta(days=AGES["users"])
    for late, kept in ((timedelta(0), True), (timedelta(microseconds=1), False)):
        found, known = online.frame("u0", {}, [{"item_id": "i1"}], edge + late)
        assert (found["tier"][0] is not None) == kept
        assert known.user


def test_nothing_expires_without_an_age(store: small_store.Store, online: OnlineFeatures):
    far = store.until + timedelta(days=9000)
    found, known = online.frame("u1", {}, [{"item_id": "i1"}], far)
    assert known.expired == 0
    assert found["genre"][0] is not None


# -- when the online store is down ---------------------------------------------------------------


def test_without_the_online_store_a_known_user_is_ranked_as_an_unknown_one(
    store: small_store.Store, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("fathom.user_rows.RETRY_SECONDS", 0.02)
    online = OnlineFeatures.open(store.repo, SPEC)
    _, context, candidates, moment = requests(store)[2]
    stranger, _ = online.frame("nobody", context, candidates, moment)
    expected, known = online.frame("u2", context, candidates, moment)
    assert (known.user, known.degraded, online.degraded) == (True, False, False)

    with monkeypatch.context() as stopped:

        def refuse(*_: Any) -> None:
            raise ConnectionError("connection refused")

        stopped.setattr(online._rows._provider, "online_read", refuse)
        for _ in range(3):
            found, known = online.frame("u2", context, candidates, moment)
            assert (known.user, known.degraded, online.degraded) == (False, True, True)
            assert known.items.sum() == ITEMS
            assert known.user_as_of == known.tables_as_of == store.until
            assert_equal_frames(found, stranger | {"user_id": found["user_id"]})
            assert set(found["user_id"]) == {"u2"}

    deadline = time.monotonic() + 10
    while online.degraded:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    found, known = online.frame("u2", context, candidates, moment)
    assert (known.user, known.degraded) == (True, False)
    assert_equal_frames(found, expected)
    online.close()


# -- newer tables --------------------------------------------------------------------------------


def known_before(tables: Mapping[str, pa.Table], moment: datetime) -> dict[str, pa.Table]:
    """The tables as a deployment has them at a moment: what has happened and arrived by then."""
    cut = {}
    for name, table in tables.items():
        limit = pa.scalar(moment, small_store.STAMP)
        known = pc.less(table["event_timestamp"], limit)
        if "arrival_timestamp" in table.column_names:
            arrived = pc.fill_null(pc.less(table["arrival_timestamp"], limit), True)
            known = pc.and_(known, arrived)
        cut[name] = table.filter(known)
    return cut


@pytest.fixture(scope="module")
def growing(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[small_store.Store, small_store.Store]:
    """Two states of one deployment, a week apart, each in a folder of its own."""
    folder = tmp_path_factory.mktemp("growing")
    tables = small_store.generated()
    week = known_before(tables, START + timedelta(days=29))
    made = []
    for name, held in (("earlier", week), ("later", tables)):
        written = small_store.written(folder / name, SPEC, held)
        written.repo.apply(SPEC)
        written.repo.materialise(SPEC, written.until)
        made.append(written)
    return made[0], made[1]


def test_newer_features_of_items_are_loaded_when_there_are_any(tmp_path: Path):
    tables = small_store.generated()
    before = small_store.written(tmp_path, SPEC, known_before(tables, START + timedelta(days=29)))
    before.repo.apply(SPEC)
    before.repo.materialise(SPEC, before.until)
    online = OnlineFeatures.open(before.repo, SPEC)
    assert not online.refresh()
    assert online.tables_as_of == before.until

    after = small_store.written(tmp_path, SPEC, tables)
    assert after.until > before.until
    # Sources are there before the online store has their rows: tables wait for those.
    online.refresh()
    assert online.tables_as_of == before.until
    after.repo.materialise(SPEC, after.until)
    _, known = online.frame("u1", {}, [{"item_id": "i1"}], after.until)
    assert (known.user_as_of, known.tables_as_of) == (after.until, before.until)
    assert online.refresh()
    assert not online.refresh()
    made = requests(after)
    for request, expected in zip(made, offline(after, made), strict=True):
        found, known = online.frame(*request)
        assert_equal_frames(found, expected)
        assert known.user_as_of == known.tables_as_of == after.until


def test_a_refresh_that_fails_leaves_the_tables_as_they_are(
    growing: tuple[small_store.Store, small_store.Store],
):
    store, _ = growing
    online = OnlineFeatures.open(store.repo, SPEC)
    request = requests(store)[1]
    before, _ = online.frame(*request)
    path = store.repo.source("items")
    whole = path.read_bytes()
    path.write_bytes(b"half a fi")
    for _ in range(2):
        with pytest.raises(Exception, match=r"(?i)parquet"):
            online.refresh()
        after, known = online.frame(*request)
        assert_equal_frames(after, before)
        assert known.tables_as_of == store.until
    path.write_bytes(whole)
    assert online.refresh()
    assert_equal_frames(online.frame(*request)[0], before)


def test_requests_see_one_generation_of_tables_while_they_are_exchanged(
    growing: tuple[small_store.Store, small_store.Store], tmp_path: Path
):
    """Threads rank without a pause while the deployment changes to and fro below them."""
    current = tmp_path / "current"

    def point(store: small_store.Store) -> None:
        link = tmp_path / "link"
        link.symlink_to(store.repo.root)
        link.rename(current)

    point(growing[0])
    online = OnlineFeatures.open(FeatureRepo(growing[0].repo.config, current), SPEC)
    user, context, candidates, _ = requests(growing[0])[3]
    request = (user, context, candidates, growing[1].until)
    expected = {}
    for store in growing[1], growing[0]:
        point(store)
        assert online.refresh()
        frame, known = online.frame(*request)
        expected[known.tables_as_of] = frame
    assert expected.keys() == {store.until for store in growing}
    assert not np.array_equal(*(frame["item_acts"] for frame in expected.values()))

    done, seen = threading.Event(), []

    def hammer(_: int) -> int:
        count = 0
        while not done.is_set():
            frame, known = online.frame(*request)
            assert_equal_frames(frame, expected[known.tables_as_of])
            seen.append(known.tables_as_of)
            count += 1
        return count

    with ThreadPoolExecutor(2) as pool:
        counts = pool.map(hammer, range(2))
        for turn in range(5):
            point(growing[(turn + 1) % 2])
            assert online.refresh()
        done.set()
        assert min(counts) > 0
    assert set(seen) == set(expected)


# -- tables in memory ----------------------------------------------------------------------------


def a_keyed_table(rows: list[tuple[str, str, float | None]]) -> tuple[KeyedTable, dict[str, Codes]]:
    """Of the view by shop and item, with one mean."""
    mean = aggregate("mean", "shop item_id", "mean", column="quantity")
    spec = a_spec([*named("user_id item_id shop"), mean], [])
    names = ("shop", "item_id", "mean")
    table = pa.table(
        {
            name: pa.array([row[i] for row in rows], pa.string() if i < 2 else pa.float64())
            for i, name in enumerate(names)
        }
        | {"event_timestamp": pa.array([START] * len(rows), small_store.STAMP)}
    )
    by, view = names[:2], "shop_item_id_interactions"
    codes = {key: Codes([table[key]]) for key in by}
    return KeyedTable.of(table, by, spec, view, codes), codes


KEYS = st.sampled_from(["", "a", "b", "c", "ä", "a-b"])


@given(
    held=st.dictionaries(st.tuples(KEYS, KEYS), st.floats(width=32, allow_nan=False), max_size=12),
    asked=st.lists(st.tuples(KEYS, KEYS), max_size=12),
)
def test_a_keyed_table_is_a_dictionary(
    held: dict[tuple[str, str], float], asked: list[tuple[str, str]]
):
    keyed, codes = a_keyed_table([(*key, value) for key, value in held.items()])
    parts = [
        codes[name].of([key[i] for key in asked], {}) for i, name in enumerate(("shop", "item_id"))
    ]
    rows = keyed.index.find(parts)
    expected = np.array([held.get(key, np.nan) for key in asked], np.float32)
    np.testing.assert_array_equal(keyed.columns["mean"].take(rows), expected)
    assert keyed.there.take(rows).tolist() == [key in held for key in asked]


def test_an_empty_table_knows_nobody():
    keyed, codes = a_keyed_table([])
    rows = keyed.index.find([codes["shop"].of(["x"], {}), codes["item_id"].of(["y", None], {})])
    assert np.isnan(np.asarray(keyed.columns["mean"].take(rows))).all()
    assert not keyed.there.take(rows).any()
