"""A warm start: what both know is carried bit for bit, wherever it stands."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fathom.batch import WIDE, Batch, Layout
from fathom.config import TrainingConfig
from fathom.models import build
from fathom.step import Optimizers
from fathom.training import train
from fathom.warm import WarmStart

CONFIG = TrainingConfig(hidden=(6,), epochs=1, batch_size=32, wide_l1=0.05, device="cpu", threads=1)


def layout(users: int, items: int) -> Layout:
    """Two tables of one width, stored as one; the wide part has both as slots."""
    tables = {"user": (users, 3), "item": (items, 3)}
    return Layout(1, tables, ("user", "item"), (), (users, items), 0)


def examples(users: int, items: int, rows: int = 200, seed: int = 0) -> Batch:
    draw = np.random.default_rng(seed)
    ids = np.stack([draw.integers(0, n, rows) for n in (users, items)], axis=1).astype(np.int32)
    return Batch(
        numeric=draw.random((rows, 1)).astype(np.float32),
        deep_ids=ids,
        deep_bags=(),
        wide_ids=ids + np.array([0, users], np.int32),
        wide_bags=(),
        label=(draw.random(rows) < 0.5).astype(np.float32),
    )


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training of 9 users and 7 items kept."""
    folder = tmp_path_factory.mktemp("old")
    train(layout(9, 7), examples(9, 7), examples(9, 7, seed=1), CONFIG, "binary", folder)
    (best,) = folder.glob("best-*")
    return best


def begun(start: WarmStart, users: int, items: int) -> tuple[dict, dict]:
    """Tables with their optimizer state, before any step: fresh ones, and after the warm start."""
    found = []
    for warm in (False, True):
        model = build(layout(users, items), replace(CONFIG, seed=5))
        optimizers = Optimizers(model, CONFIG)
        if warm:
            start.apply(model, optimizers)
        tensors = model.state_dict() | optimizers.tensors()
        found.append({name: value.clone().numpy() for name, value in tensors.items()})
    return found[0], found[1]


@settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_rows_are_carried_by_key_through_growth_shrinkage_and_permutation(old: Path, data):
    """Any set of old keys in any order, with new ones between."""

    def places(rows: int) -> np.ndarray:
        kept = data.draw(st.lists(st.integers(0, rows - 1), unique=True, max_size=rows))
        mixed = data.draw(st.permutations([*kept, *[-1] * data.draw(st.integers(1, 5))]))
        return np.array(mixed, np.int64)

    user, item = places(9), places(7)
    wide = np.concatenate([user, np.where(item >= 0, item + 9, -1)])
    start = WarmStart(old, layout(9, 7), CONFIG, {"user": user, "item": item, WIDE: wide})
    fresh, warm = begun(start, len(user), len(item))

    def old_array(name: str) -> np.ndarray:
        return np.load(old / f"{name}.npy")

    def check(name: str, rows: slice, places: np.ndarray, before: np.ndarray) -> None:
        for row, place in enumerate(places):
            expected = before[place] if place >= 0 else fresh[name][rows][row]
            assert warm[name][rows][row].tobytes() == expected.tobytes(), (name, row, place)

    whole = slice(None)
    sums = old_array("optimizer.embeddings.0.sum")
    for table, rows, places_, state in (
        ("user", slice(0, len(user)), user, sums[:9]),
        ("item", slice(len(user), None), item, sums[9:]),
    ):
        weight = f"deep.embeddings.tables.{table}.weight"
        check(weight, whole, places_, old_array(f"model.{weight}"))
        check("embeddings.0.sum", rows, places_, state)
    check("wide.weight", whole, wide, old_array("model.wide.weight"))
    for part in ("z", "n"):
        check(f"wide.0.{part}", whole, wide, old_array(f"optimizer.wide.0.{part}"))
    for layer in ("bias", "deep.layers.0.weight", "deep.layers.0.bias", "deep.layers.2.weight"):
        assert warm[layer].tobytes() == old_array(f"model.{layer}").tobytes()
    assert any("dense.0.sum" in name for name in warm)
    assert warm["dense.0.sum"].tobytes() == old_array("optimizer.dense.0.sum").tobytes()


def test_an_unchanged_vocabulary_starts_from_the_very_same_model(old: Path):
    rows = {"user": np.arange(9), "item": np.arange(7), WIDE: np.arange(16)}
    _, warm = begun(WarmStart(old, layout(9, 7), CONFIG, rows), 9, 7)
    for path in old.glob("*.npy"):
        kind, name = path.stem.split(".", 1)
        assert kind in {"model", "optimizer"}
        assert warm[name].tobytes() == np.load(path).tobytes(), name


def test_what_does_not_fit_starts_fresh_and_is_named(old: Path):
    wider = replace(layout(9, 7), numeric=2, tables={"user": (9, 4), "item": (7, 3)})
    model = build(wider, CONFIG)
    optimizers = Optimizers(model, CONFIG)
    rows = {"user": np.arange(9), WIDE: np.arange(16)}
    fresh = WarmStart(old, layout(9, 7), CONFIG, rows).apply(model, optimizers)
    # Users have another width, items no rows, and the first layer another number of inputs.
    assert fresh == ["user", "item", "deep.layers.0.weight"]


@pytest.mark.parametrize("places", [np.arange(8), np.arange(9) + 1])
def test_rows_that_do_not_fit_a_table_are_refused(old: Path, places: np.ndarray):
    start = WarmStart(old, layout(9, 7), CONFIG, {"user": places})
    model = build(layout(9, 7), CONFIG)
    with pytest.raises(ValueError, match=r"the rows of table user must be 9 places below 9; they"):
        start.apply(model, Optimizers(model, CONFIG))


def test_training_goes_on_from_a_warm_start(old: Path):
    """Its first epoch ends lower than that of a fresh start on the same examples."""
    rows = {"user": np.arange(9), "item": np.arange(7), WIDE: np.arange(16)}
    start = WarmStart(old, layout(9, 7), CONFIG, rows)
    splits = (examples(9, 7), examples(9, 7))  # the same both times: what is learnt is remembered
    warm, fresh = (
        train(layout(9, 7), *splits, CONFIG, "binary", start=begin) for begin in (start, None)
    )
    assert warm.history[0].validation_loss < fresh.history[0].validation_loss
    assert torch.isfinite(warm.model.bias)


def test_a_training_with_another_start_is_another_training(old: Path, tmp_path: Path):
    """Its checkpoints are not gone on from, although settings and splits are the same."""
    rows = {"user": np.arange(9), "item": np.arange(7), WIDE: np.arange(16)}
    splits = (examples(9, 7), examples(9, 7))
    warm = WarmStart(old, layout(9, 7), CONFIG, rows)
    other = WarmStart(old, layout(9, 7), CONFIG, rows | {"user": np.arange(9)[::-1].copy()})
    found = [
        train(layout(9, 7), *splits, CONFIG, "binary", tmp_path, start=start).history[0]
        for start in (None, warm, other, other)
    ]
    losses = [epoch.validation_loss for epoch in found]
    assert len(set(losses)) == 3
    assert losses[2] == losses[3]  # and this one is gone on from
