"""The tower: the equations of implicit least squares, and what it retrieves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from pydantic import ValidationError

from fathom.encoding import Encoder, fit_encoder
from fathom.ranker import ArtifactError, Ranker
from fathom.tower import (
    FILE,
    Tower,
    TowerConfig,
    TowerError,
    fit_tower,
    measure,
    vocabularies,
)
from small_ranker import ITEMS, SPEC, USERS, plain_frame, register

CONFIG = TowerConfig(factors=4)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return fit_encoder(plain_frame(), SPEC)


@pytest.fixture(scope="module")
def tower(encoder: Encoder) -> Tower:
    return fit_tower(encoder, encoder.encode(plain_frame()), CONFIG)


def pairs(encoder: Encoder) -> np.ndarray[Any, Any]:
    """(U, I) how often each user bought each item, by the encoder's order."""
    frame, known = plain_frame(), vocabularies(encoder)
    assert known is not None
    counts = np.zeros((USERS, ITEMS))
    users, items = (list(vocabulary.values) for vocabulary in known)
    for user, item, bought in zip(frame["user_id"], frame["item_id"], frame["bought"], strict=True):
        counts[users.index(user), items.index(item)] += bought
    return counts


def test_users_solve_their_least_squares(encoder: Encoder, tower: Tower) -> None:
    """Written out over all pairs, as the paper's loss has them, positive or not."""
    counts, items = pairs(encoder), tower.items.astype(np.float64)
    for user, row in enumerate(counts):
        weight = CONFIG.unobserved_weight + np.where(row > 0, 1 + np.log(np.maximum(row, 1)), 0)
        target = np.where(row > 0, weight - CONFIG.unobserved_weight, 0)
        penalty = CONFIG.l2 * ((row > 0).sum() + CONFIG.unobserved_weight * ITEMS)
        left = (items * weight[:, None]).T @ items + penalty * np.eye(4)
        assert_allclose(tower.users[user], np.linalg.solve(left, items.T @ target), rtol=1e-3)
    assert tower.popularity.tolist() == counts.sum(axis=0).tolist()


def test_each_iteration_lowers_the_loss(encoder: Encoder) -> None:
    counts, batch = pairs(encoder), encoder.encode(plain_frame())
    a, l2 = CONFIG.unobserved_weight, CONFIG.l2
    losses = []
    for iterations in (1, 2, 4, 8):
        tower = fit_tower(encoder, batch, TowerConfig(factors=4, iterations=iterations))
        users, items = tower.users.astype(np.float64), tower.items.astype(np.float64)
        scores = users @ items.T
        weight = np.where(counts > 0, 1 + np.log(np.maximum(counts, 1)), 0)
        loss = (weight * (1 - scores) ** 2).sum() + a * (scores**2).sum()
        for side, vectors in ((counts, users), (counts.T, items)):
            penalties = l2 * ((side > 0).sum(axis=1) + a * side.shape[1])
            loss += (penalties * (vectors**2).sum(axis=1)).sum()
        losses.append(loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_a_history_gives_the_vector_that_training_would_have(
    encoder: Encoder, tower: Tower
) -> None:
    for user, row in enumerate(pairs(encoder)):
        bought = np.flatnonzero(row)
        assert_allclose(tower.fold_in(bought, row[bought]), tower.users[user], atol=1e-5)


def test_sums_are_the_same_in_small_steps(
    encoder: Encoder, tower: Tower, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fathom.tower._AT_ONCE", 40)  # ten pairs, of one user at a time
    again = fit_tower(encoder, encoder.encode(plain_frame()), CONFIG)
    assert_allclose(again.items, tower.items, atol=1e-4)


def test_tea_is_retrieved_for_those_who_drink_it(encoder: Encoder, tower: Tower) -> None:
    """Even users like odd items; popularity cannot tell them apart."""
    frame = plain_frame(800)
    later = {name: values.take(np.arange(400, 800)) for name, values in frame.items()}
    figures = measure(tower, encoder, encoder.encode(later), ks=(20,))
    assert (figures["items"], figures["users"]) == (ITEMS, USERS)
    assert figures["recall_at_20"]["tower"] > figures["recall_at_20"]["popularity"] + 0.2


def test_the_same_training_gives_the_same_tower(encoder: Encoder, tower: Tower) -> None:
    batch = encoder.encode(plain_frame())
    assert fit_tower(encoder, batch, CONFIG).fingerprint == tower.fingerprint
    other = fit_tower(encoder, batch, TowerConfig(factors=4, seed=1))
    assert other.fingerprint != tower.fingerprint


def test_without_positive_examples_or_keys_or_factors_there_is_no_tower(encoder: Encoder) -> None:
    batch = encoder.encode(plain_frame())
    assert batch.label is not None
    nothing = replace(batch, label=np.zeros_like(batch.label))
    assert not fit_tower(encoder, nothing, CONFIG)
    assert not fit_tower(encoder, batch, TowerConfig(factors=0))
    assert measure(Tower.empty(), encoder, batch) == {"items": 0, "users": 0}
    spec = SPEC.model_copy(
        update={"columns": tuple(c for c in SPEC.columns if c.name != "item_id"), "crosses": ()}
    )
    keyless = fit_encoder(plain_frame(), spec)
    assert vocabularies(keyless) is None
    assert not fit_tower(keyless, keyless.encode(plain_frame()), CONFIG)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("factors", -1), ("factors", 1025), ("iterations", 0), ("unobserved_weight", 0.0),
        ("unobserved_weight", 1.5), ("l2", 0.0), ("seed", -1), ("model", "deep"),
    ],
)  # fmt: skip
def test_a_setting_out_of_bounds_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=name):
        TowerConfig(**{name: value})


# -- in the artifact -----------------------------------------------------------------------------


def test_a_tower_survives_a_folder(tower: Tower, tmp_path: Path) -> None:
    tower.save(tmp_path)
    assert Tower.load(tmp_path).fingerprint == tower.fingerprint
    Tower.empty().save(tmp_path / "none")
    assert not Tower.load(tmp_path / "none")


def test_a_file_of_other_arrays_or_numbers_is_refused(tower: Tower, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    replace(tower, users=np.full_like(tower.users, np.nan)).save(tmp_path)
    with pytest.raises(TowerError, match="users holds numbers that are not finite"):
        Tower.load(tmp_path)
    save_file({"items": tower.items}, tmp_path / FILE)
    with pytest.raises(TowerError, match=r"holds \['items'\]; it must hold \['items', 'pop"):
        Tower.load(tmp_path)


def test_the_tower_is_part_of_the_version_and_of_the_artifact(
    encoder: Encoder, tower: Tower, tmp_path: Path
) -> None:
    alone = register(tmp_path).ranker
    both = replace(alone, encoder=encoder, tower=tower)
    assert both.version != replace(both, tower=Tower.empty()).version
    both.save(tmp_path / "both")
    loaded = Ranker.load(tmp_path / "both")
    assert loaded.version == both.version
    assert loaded.tower.fingerprint == tower.fingerprint
    (tmp_path / "both" / FILE).write_bytes(b"something else")
    with pytest.raises(ArtifactError, match=f"{FILE} does not have the SHA-256 of the manifest"):
        Ranker.load(tmp_path / "both")


def test_an_artifact_without_a_tower_is_loaded_and_a_file_that_it_does_not_name_is_not_read(
    tower: Tower, tmp_path: Path
) -> None:
    artifact = register(tmp_path)
    tower.save(artifact.folder)
    assert not Ranker.load(artifact.folder).tower
    assert Ranker.load(artifact.folder).version == artifact.version


def test_a_tower_of_another_encoder_is_refused(
    encoder: Encoder, tower: Tower, tmp_path: Path
) -> None:
    ranker = register(tmp_path).ranker
    replace(ranker, encoder=encoder, tower=replace(tower, items=tower.items[1:])).save(
        tmp_path / "other"
    )
    with pytest.raises(ArtifactError, match=r"has \(12, 39\) users and items, and the encoder"):
        Ranker.load(tmp_path / "other")
