"""The champion's side: its predictions, hits of its crosses, its words, and what it leans on."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pyarrow as pa
import pytest

import small_ranker
from fathom.drift import (
    MonitoringConfig,
    Window,
    measure,
    reference_of,
    scored,
    watched_columns,
)
from fathom.ranker import Ranker
from small_ranker import START, exposures

CONFIG = MonitoringConfig(min_rows=100, min_labels=20, draws=20)
WEEK = Window(START, START + timedelta(days=7))


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory) -> Ranker:
    return small_ranker.register(tmp_path_factory.mktemp("champion")).ranker


def test_rows_get_predictions_and_the_hits_of_crosses(champion: Ranker) -> None:
    frame = scored(champion, exposures())
    expected = champion.score(small_ranker.plain_frame(800))
    np.testing.assert_allclose(frame["probability"], expected, rtol=0, atol=1e-6)
    assert {"user_id_x_genre.hits", "recent_genres_x_genre.hits"} <= set(frame)
    assert frame["user_id_x_genre.hits"].mean() > 0.9
    # a user of whom nothing is recent has no combination
    first = frame[frame["recent_genres"].map(len) == 0]
    assert first["recent_genres_x_genre.hits"].isna().all()


def test_predictions_that_were_served_are_kept(champion: Ranker) -> None:
    served = exposures().append_column("probability", pa.array(np.full(800, 0.5)))
    found = scored(champion, served)
    assert set(found["probability"]) == {0.5}
    assert list(found) == [*served.column_names, *(n for n in found if n.endswith(".hits"))]


def test_strangers_to_the_champion_are_unknown_and_their_crosses_miss(champion: Ranker) -> None:
    users = np.array([f"stranger{i % 9}" for i in range(800)], object)
    reference = reference_of(champion, exposures(), CONFIG.model_copy(update={"max_categories": 5}))
    found = measure(reference, scored(champion, exposures(user_id=users)), WEEK)
    assert reference.forms["user_id"].kind == "id"
    counts = dict(zip(reference.forms["user_id"].bins, found.counts["user_id"][1], strict=True))
    assert counts["(unknown)"] == 800
    assert found.columns["user_id_x_genre.hits"].verdict == "drifted"
    assert found.columns["recent_genres_x_genre.hits"].verdict == "stable"


def test_it_leans_on_what_it_learnt(champion: Ranker) -> None:
    """Even users like tea and odd ones coffee; the shelf says nothing."""
    leaning = reference_of(champion, exposures(), CONFIG).leaning
    assert set(leaning) == set(champion.spec.by_name)
    assert leaning["genre"] > 0.01
    assert max(leaning, key=lambda name: leaning[name]) in {
        "user_id",
        "genre",
        "user_genre_purchases",
        "genre_share",
    }


def test_its_own_rows_ask_for_nothing(champion: Ranker) -> None:
    found = measure(
        reference_of(champion, exposures(), CONFIG), scored(champion, exposures()), WEEK
    )
    assert {column.verdict for column in found.columns.values()} == {"stable"}
    assert found.faults == ()
    assert found.quality["reference"] == found.quality["current"]


def test_what_is_watched_of_a_training_frame() -> None:
    assert watched_columns(small_ranker.SPEC)[:5] == [
        "user_id",
        "item_id",
        "request_id",
        "event_timestamp",
        "bought",
    ]
    assert "inclusion_probability" not in watched_columns(small_ranker.SPEC)
    assert len(watched_columns(small_ranker.SPEC)) == len(set(watched_columns(small_ranker.SPEC)))


def test_the_reference_does_not_move_with_conf(champion: Ranker) -> None:
    """Its spec is the artifact's own copy."""
    assert reference_of(champion, exposures(), CONFIG).spec is champion.spec
