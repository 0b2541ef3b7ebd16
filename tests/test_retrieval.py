"""Retrieval: exact answers, approximate ones measured against them, and lists by hand."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose
from pydantic import ValidationError

from fathom.retrieval import (
    Approximate,
    Exact,
    RetrievalConfig,
    diversify,
    draw_of,
    explore,
    recall_of,
    top_k,
)

#: Small whole numbers: products are exact in float32, and there are many ties.
WHOLE = st.integers(-3, 3).map(float)


@given(st.data())
def test_the_exact_index_gives_the_head_of_a_full_sort(data: st.DataObject) -> None:
    size, width = data.draw(st.integers(0, 60)), data.draw(st.integers(1, 4))
    vectors = data.draw(arrays(np.float32, (size, width), elements=WHOLE))
    query = data.draw(arrays(np.float32, width, elements=WHOLE))
    allowed = data.draw(st.none() | arrays(np.bool_, size))
    k = data.draw(st.integers(0, 70))
    scores = vectors @ query
    ranked = [i for i in np.lexsort((np.arange(size), -scores)) if allowed is None or allowed[i]]
    found = Exact(vectors).search(query, k, allowed)
    assert found.places.tolist() == ranked[:k]  # k of them where there are k; ties by place
    assert found.scores.tolist() == scores[ranked[:k]].tolist()


@pytest.mark.parametrize("levels", [1, 3, 100_000])
@pytest.mark.parametrize("k", [1, 100, 20_000, 50_000, 60_000])
def test_many_scores_are_sorted_as_few_are(levels: int, k: int) -> None:
    """Above some thousands a threshold is guessed; with few levels, most scores are ties."""
    scores = np.random.default_rng(0).integers(levels, size=50_000).astype(np.float32)
    found = top_k(scores, k)
    assert found.places.tolist() == np.argsort(-scores, kind="stable")[:k].tolist()


@pytest.mark.parametrize("levels", [3, 100_000])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.13, 0.01])
@pytest.mark.parametrize("k", [0, 1, 300, 40_000])
def test_many_scores_of_which_some_are_allowed(levels: int, share: float, k: int) -> None:
    draw = np.random.default_rng(1)
    scores = draw.integers(levels, size=50_000).astype(np.float32)
    allowed = draw.random(50_000) < share
    ranked = np.argsort(-scores, kind="stable")
    assert top_k(scores, k, allowed).places.tolist() == ranked[allowed[ranked]][:k].tolist()


def test_a_threshold_that_was_guessed_too_high_does_no_harm() -> None:
    scores = np.zeros(64_000, np.float32)
    scores[::64] = 1.0  # all that the sample looks at, and nothing else
    assert top_k(scores, 1_500).places.tolist()[:1_000] == list(range(0, 64_000, 64))
    assert len(top_k(scores, 1_500).places) == 1_500


def test_few_allowed_items_are_looked_up_rather_than_left_over() -> None:
    vectors = np.arange(1000, dtype=np.float32)[:, None]
    allowed = np.zeros(1000, np.bool_)
    allowed[[3, 700, 41]] = True
    assert Exact(vectors).search(np.ones(1, np.float32), 2, allowed).places.tolist() == [700, 41]
    assert Exact(vectors).search(np.ones(1, np.float32), 9, allowed).places.tolist() == [
        *(700, 41, 3)
    ]


# -- the approximate index -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def taste() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Items of 40 kinds, and users who like one each."""
    draw = np.random.default_rng(3)
    kinds = draw.standard_normal((40, 8)).astype(np.float32)
    items = kinds[draw.integers(40, size=20_000)] + 0.4 * draw.standard_normal((20_000, 8))
    users = kinds[draw.integers(40, size=60)] + 0.4 * draw.standard_normal((60, 8))
    return items.astype(np.float32), users.astype(np.float32)


@pytest.fixture(scope="module")
def approximate(taste: Any) -> Approximate:
    pytest.importorskip("faiss")
    items, users = taste
    return Approximate(Exact(items), items, users, recall=0.95, k=100)


def test_the_approximate_index_finds_the_share_that_it_says(
    taste: Any, approximate: Approximate
) -> None:
    items, users = taste
    assert approximate.recall >= 0.95
    assert approximate.probes < approximate.cells / 2  # it did not just look everywhere
    exact = Exact(items)
    shares = [
        np.isin(exact.search(u, 100).places, approximate.search(u, 100).places).mean()
        for u in users
    ]
    assert np.mean(shares) == pytest.approx(approximate.recall, abs=1e-3)
    assert recall_of(exact, exact, users, 100) == 1.0


def test_the_approximate_index_gives_dot_products_and_keeps_to_what_is_allowed(
    taste: Any, approximate: Approximate
) -> None:
    items, users = taste
    draw = np.random.default_rng(0)
    for share in (1.0, 0.5, 0.2, 0.01, 0.0):
        allowed = draw.random(len(items)) < share
        found = approximate.search(users[0], 100, allowed)
        assert len(found.places) == min(100, allowed.sum())
        assert allowed[found.places].all()
        assert_allclose(found.scores, items[found.places] @ users[0], rtol=1e-5)
        assert (np.diff(found.scores) <= 0).all()


def test_where_the_cells_hold_too_few_the_exact_index_answers(
    taste: Any, approximate: Approximate
) -> None:
    items, users = taste
    found = approximate.search(users[0], 15_000)
    assert found.places.tolist() == Exact(items).search(users[0], 15_000).places.tolist()


def test_without_faiss_the_message_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['faiss'] = None\n"
        "import numpy as np; from fathom.retrieval import *\n"
        "v = np.ones((7, 2), np.float32)\n"
        "try: Approximate(Exact(v), v, v)\n"
        "except NoIndexError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code.replace("import *", "import Approximate, Exact, NoIndexError")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Faiss is not installed: pip install 'fathom[retrieval]'" in done.stdout


# -- diversity -----------------------------------------------------------------------------------


def test_maximal_marginal_relevance_by_hand() -> None:
    """A and B are alike, C is unlike both, D is the opposite of A."""
    vectors = np.array([[1, 0], [2, 0], [0, 1], [-1, 0]], np.float32)
    relevance = np.array([1.0, 0.9, 0.5, 0.0])
    # With 0.5: A first. Then B 0.45 - 0.5, C 0.25 - 0, D 0 + 0.5: D. Then B, which is as A,
    # 0.45 - 0.5; C 0.25 - 0: C.
    assert diversify(relevance, vectors, 4, 0.5).tolist() == [0, 3, 2, 1]
    # With 0.2: A. Then B 0.72 - 0.2, C 0.4, D 0 + 0.2: B, C, D.
    assert diversify(relevance, vectors, 4, 0.2).tolist() == [0, 1, 2, 3]
    # With 0.4: A. Then B 0.54 - 0.4, C 0.3, D 0.4: D. Then B 0.14, C 0.3.
    assert diversify(relevance, vectors, 3, 0.4).tolist() == [0, 3, 2]
    # The scale of relevance is no matter: regression predicts what it likes.
    assert diversify(100 * relevance - 7, vectors, 4, 0.5).tolist() == [0, 3, 2, 1]


def test_without_diversity_relevance_decides_and_then_the_place() -> None:
    vectors = np.ones((4, 2), np.float32)
    assert diversify(np.array([0.1, 0.7, 0.7, 0.2]), vectors, 3, 0.0).tolist() == [1, 2, 3]
    assert diversify(np.array([0.5, 0.5]), vectors[:2], 5, 1.0).tolist() == [0, 1]
    assert diversify(np.zeros(0), vectors[:0], 5, 0.5).tolist() == []


@given(st.integers(1, 30), st.integers(1, 30), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_diversity_changes_the_order_and_nothing_else(
    pool: int, k: int, diversity: float, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    vectors = draw.standard_normal((pool, 3)).astype(np.float32)
    places = diversify(draw.random(pool), vectors, k, diversity).tolist()
    assert len(places) == len(set(places)) == min(k, pool)
    assert set(places) <= set(range(pool))


# -- exploration ---------------------------------------------------------------------------------


def test_propensities_by_hand() -> None:
    """4 slots, 10 items, a share of 0.3: one explored slot, or two with probability 0.2."""
    slots = explore(np.arange(4), 10, 0.3, np.random.default_rng(0))
    # One explored: 3 stay, and 7 share the slot. Two: 2 stay, and 8 share two slots.
    expected = [1, 1, 0.8 * 1 + 0.2 * 2 / 8, *[0.8 * 1 / 7 + 0.2 * 2 / 8] * 7]
    assert_allclose(slots.propensity, expected)


@given(st.integers(1, 20), st.integers(0, 20), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_propensities_sum_to_the_slots(k: int, more: int, share: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    order = draw.permutation(k + more)[:k]
    slots = explore(order, k + more, share, draw)
    assert slots.propensity.sum() == pytest.approx(k)
    assert (slots.propensity >= 0).all()
    assert (slots.propensity <= 1 + 1e-12).all()
    assert len(set(slots.places.tolist())) == k
    assert (slots.propensity[slots.places] > 0).all()
    kept = slots.places[~slots.explored].tolist()
    assert kept == order[: len(kept)].tolist()  # the best keep their order


def test_propensities_are_what_happens() -> None:
    order, pool, share, rounds = np.array([5, 0, 3, 7, 2]), 12, 0.37, 20_000
    shown, explored = np.zeros(pool), 0
    for number in range(rounds):
        slots = explore(order, pool, share, draw_of(f"request {number}"))
        shown[slots.places] += 1
        explored += int(slots.explored.sum())
    assert_allclose(shown / rounds, slots.propensity, atol=0.015)
    assert explored / (rounds * len(order)) == pytest.approx(share, abs=0.005)


def test_nothing_is_explored_unless_asked_for_and_all_if_all_is() -> None:
    order = np.array([2, 0, 1])
    none = explore(order, 9, 0.0, draw_of("a"))
    assert none.places.tolist() == [2, 0, 1]
    assert none.propensity.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    everything = explore(order, 9, 1.0, draw_of("a"))
    assert everything.explored.all()
    assert_allclose(everything.propensity, 1 / 3)


def test_a_request_asked_again_is_answered_alike() -> None:
    first, again, other = (
        explore(np.arange(10), 100, 0.5, draw_of(name)).places.tolist() for name in "aab"
    )
    assert first == again != other


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pool", 0), ("pool", 10_001), ("exact_items", -1), ("recall", 0.0), ("recall", 1.1),
        ("exploration", -0.1), ("exploration", 1.1), ("diversity", 1.1), ("probes", 3),
    ],
)  # fmt: skip
def test_a_setting_out_of_bounds_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=name):
        RetrievalConfig(**{name: value})
