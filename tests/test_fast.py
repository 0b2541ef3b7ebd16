"""The fast path gives the reference's scores, whatever the candidates share."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.batch import Ragged
from fathom.config import TrainingConfig
from fathom.encoding import Values, fit_encoder
from fathom.fast import HALF_TOLERANCE, FastScorer
from fathom.lookup import spread_frame
from fathom.ranker import Ranker
from fathom.spec import FeatureSpec
from fathom.training import train
from small_ranker import SPEC, plain_frame

#: Crosses of two lists, of a list and one value, of a number, and one that is hashed.
CROSSES: list[dict[str, Any]] = [
    {"columns": ["user_id", "genre"], "min_count": 1},
    {"columns": ["recent_genres", "genre"], "min_count": 1},
    {"columns": ["recent_genres", "tags"], "min_count": 1},
    {"columns": ["tags", "discount"], "min_count": 1},
    {"columns": ["shop", "shelf", "item_id"], "buckets": 16},
]
CROSSED = FeatureSpec.model_validate(SPEC.model_dump(mode="json") | {"crosses": CROSSES})
FAST = ("wide", "deep", "wide_deep", "ensemble")
FRAME = plain_frame(400)
CONFIG = TrainingConfig(
    hidden=(8, 4), epochs=1, batch_size=64, wide_l1=0.1, wide_learning_rate=0.3, threads=1
)


def ranker(spec: FeatureSpec = CROSSED, **settings: Any) -> Ranker:
    encoder = fit_encoder(FRAME, spec)
    batch = encoder.encode(FRAME)
    config = dataclasses.replace(CONFIG, **settings)
    return Ranker(encoder, train(encoder.layout, batch, batch, config, spec.task).model, config)


@pytest.fixture(scope="module", params=FAST)
def fast(request: pytest.FixtureRequest) -> Ranker:
    return ranker(model=request.param)


def rows(values: Values, chosen: list[int]) -> Values:
    index = np.array(chosen, np.int64)
    return values.take(index) if isinstance(values, Ragged) else values[index]


@st.composite
def requests(draw: st.DrawFn) -> tuple[dict[str, Values], int]:
    """Columns of one row or of N: rows of the frame, some values of which are missing or new."""
    count = draw(st.integers(1, 12))
    columns: dict[str, Values] = {}
    for column in CROSSED.columns:
        size = 1 if draw(st.booleans()) else count
        chosen = draw(st.lists(st.integers(0, 399), min_size=size, max_size=size))
        values = rows(FRAME[column.name], chosen)
        odd = draw(st.sampled_from(["as they are", "missing", "new"]))
        if not isinstance(values, Ragged) and odd != "as they are":
            new: Any = float("inf") if column.is_numeric else "never seen"
            missing: Any = np.nan if column.is_numeric else None
            values = values.copy()
            values[0] = missing if odd == "missing" else new
        columns[column.name] = values
    return columns, count


@given(requests())
@settings(max_examples=60, deadline=None)
def test_a_score_is_the_references(fast: Ranker, request: tuple[dict[str, Values], int]) -> None:
    columns, count = request
    expected = fast.score(spread_frame(columns, count))
    for most_bytes in (1 << 20, 3 * 4 * 8, 0):  # room for all items, for three, and for none
        scorer = FastScorer(fast, most_bytes)
        for _ in range(2):  # the second time with items that are known
            found = scorer.score(columns, count)
            assert found.shape == (count,)
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model", ["deep", "wide_deep", "ensemble"])
def test_in_bfloat16_scores_are_near_and_the_best_stays_the_best(model: str) -> None:
    layered = ranker(model=model, hidden=(64, 32))
    columns = {n: rows(v, [3] if n == "city" else list(range(200))) for n, v in FRAME.items()}
    expected = layered.score(spread_frame(columns, 200))
    half = FastScorer(layered, precision="bfloat16")
    found = half.score(columns, 200)
    assert half.tolerance == HALF_TOLERANCE
    assert 0 < np.abs(found - expected).max() < HALF_TOLERANCE
    assert expected[found.argmax()] == pytest.approx(expected.max(), abs=HALF_TOLERANCE)


def test_no_candidates_have_no_scores(fast: Ranker) -> None:
    columns = {name: rows(values, [3] if name == "city" else []) for name, values in FRAME.items()}
    assert FastScorer(fast).score(columns, 0).shape == (0,)


@pytest.mark.parametrize("model", ["deepfm", "dcn_v2", "dot_product"])
def test_other_models_are_scored_by_the_reference(model: str) -> None:
    other = ranker(model=model)
    scorer = FastScorer(other)
    assert not scorer.available
    columns = {name: rows(FRAME[name], [3] if name == "city" else [3, 9, 5]) for name in FRAME}
    expected = other.score(spread_frame(columns, 3))
    assert scorer.score(columns, 3).tolist() == expected.tolist()


def test_without_layers_the_first_is_the_logit() -> None:
    linear = ranker(model="wide_deep", hidden=())
    columns = {name: rows(FRAME[name], [8] if name == "city" else [3, 9, 5]) for name in FRAME}
    expected = linear.score(spread_frame(columns, 3))
    assert FastScorer(linear).available
    np.testing.assert_allclose(FastScorer(linear).score(columns, 3), expected, rtol=0, atol=1e-6)


def test_a_regression_is_scored_without_the_sigmoid() -> None:
    raw = CROSSED.model_dump(mode="json") | {"task": "regression"}
    raw["label"] = {"name": "bought", "values": None}
    regression = ranker(FeatureSpec.model_validate(raw))
    columns = {name: rows(FRAME[name], [8] if name == "city" else [3, 9, 5]) for name in FRAME}
    expected = regression.score(spread_frame(columns, 3))
    np.testing.assert_allclose(
        FastScorer(regression).score(columns, 3), expected, rtol=1e-6, atol=1e-6
    )
