"""The hybrid autoencoder: by hand, what it hides, and users and items that nobody rated."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fathom.batch import Batch, Layout, Ragged
from fathom.config import ConfigError, TrainingConfig
from fathom.models import Bag, Inputs, Model, build, score
from fathom.models.autoencoder import HybridAutoencoder
from small_family import (
    CONFIG,
    LAYOUT,
    auc,
    examples,
    fitted,
    randomise,
    set_weights,
    worst_gradient_error,
)

#: As `small_family.LAYOUT`, with every embedding 1 wide.
SMALL = replace(LAYOUT, tables={"user": (2, 1), "item": (2, 1), "genre": (3, 1), "tag": (2, 1)})
EXAMPLES = Batch(
    numeric=np.array([[0.5, 2.0], [1.0, -1.0]], np.float32),  # the user's, the item's
    deep_ids=np.array([[1, 0, 2], [0, 1, 1]], np.int32),
    deep_bags=(Ragged.of([[1, 2], []], np.int32), Ragged.of([[0, 1], [1]], np.int32)),
    wide_ids=np.zeros((2, 1), np.int32),
    wide_bags=(Ragged.of([[], []], np.int32),),
)


def built(layout: Layout = LAYOUT, **settings: object) -> Model:
    return build(layout, replace(CONFIG, model="hybrid_autoencoder", **settings))


# --- known answers -----------------------------------------------------------------------------


def test_a_score_by_hand():
    model = built(SMALL, hidden=(2,))
    set_weights(
        model,
        {
            "bias": 0.25,
            "deep.known.tables.genre.weight": [[9.0], [2.0], [4.0]],
            "deep.known.tables.tag.weight": [[1.0], [3.0]],
            "deep.encoder.0.weight": [[1.0, 0.0], [0.0, 2.0]],
            "deep.encoder.0.bias": [0.0, -0.5],
            "deep.decoder.tables.item.weight": [[1.0, 2.0], [3.0, -1.0]],
            "deep.bias.tables.item.weight": [[10.0], [20.0]],
            # Of the item's genre, tags and price; the last column is their share of its bias.
            "deep.side": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 100.0]],
        },
    )
    # The user is the mean of the history's genres, (2 + 4) / 2, and the number 0.5.
    code = [math.tanh(1 * 3.0), math.tanh(2 * 0.5 - 0.5)]
    # Item 0 of genre 4, tags (1 + 3) / 2 and price 2: (1, 2) + (4, 2) and 10 + 100 · 2.
    one = (1 + 4) * code[0] + (2 + 2) * code[1] + 10 + 200 + 0.25
    # No history and 1.0; item 1 of genre 2, tag 3 and price -1: (3, -1) + (2, 3) and 20 - 100.
    code = [math.tanh(0.0), math.tanh(2 * 1.0 - 0.5)]
    two = (3 + 2) * code[0] + (-1 + 3) * code[1] + 20 - 100 + 0.25
    assert model(Inputs.of(EXAMPLES)).tolist() == pytest.approx([one, two])


def test_more_layers_end_in_the_code():
    state = built(hidden=(5, 2)).state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    # The user is known by the history's 2 columns and a number, the item by 2 + 3 and a number.
    assert shapes["deep.encoder.0.weight"] == (5, 3)
    assert shapes["deep.encoder.2.weight"] == (2, 5)
    assert shapes["deep.decoder.tables.item.weight"] == (6, 2)
    assert shapes["deep.side"] == (6, 2 + 1)


def test_the_keys_are_no_input():
    """Whoever has the same history is the same user, and the item's key is decoded alone."""
    assert not [name for name in built().state_dict() if "tables.user." in name]
    assert not [name for name in built().state_dict() if "known.tables.item." in name]
    model, batch = built(), examples(30)
    randomise(model, scale=0.5)
    before = score(model, batch)
    for place, key in enumerate(("user", "item")):
        ids = batch.deep_ids.copy()
        ids[:, place] = (ids[:, place] + 1) % LAYOUT.tables[key][0]
        after = score(model, replace(batch, deep_ids=ids))
        assert (after == before).all() if key == "user" else (after != before).all()


def test_an_item_that_was_never_rated_is_what_is_known_about_it():
    """Its own weights start from 0, so two such items of the same genre and tags score alike."""
    model = built()
    assert not model.state_dict()["deep.decoder.tables.item.weight"].any()
    assert not model.state_dict()["deep.bias.tables.item.weight"].any()
    batch = examples(30)
    other = batch.deep_ids.copy()
    other[:, 1] = (other[:, 1] + 1) % 6
    np.testing.assert_array_equal(score(model, replace(batch, deep_ids=other)), score(model, batch))
    assert len(set(score(model, batch).tolist())) == 30


def test_an_item_of_which_nothing_but_the_key_is_known():
    layout = replace(
        LAYOUT,
        fields=("user", "item"),
        bags=("genre",),
        numeric=1,
        owners=("user", "item", "user", "user"),
    )
    model = built(layout, hidden=(3,))
    assert model.state_dict()["deep.side"].shape == (0, 3 + 1)
    batch = examples(40)
    less = replace(
        batch,
        numeric=batch.numeric[:, :1],
        deep_ids=batch.deep_ids[:, :2],
        deep_bags=batch.deep_bags[:1],
    )
    trained = fitted(layout, less, model="hybrid_autoencoder", hidden=(3,), passes=2)
    assert np.isfinite(score(trained, less)).all()


# --- what is hidden ----------------------------------------------------------------------------


def test_a_share_of_the_histories_is_hidden_in_training_and_nothing_else():
    deep = built(dropout=0.25).deep
    assert isinstance(deep, HybridAutoencoder)
    values, offsets = torch.arange(3000), torch.arange(0, 3001, 3)
    history, tags = Bag(values, offsets), Bag(values, offsets)
    torch.manual_seed(0)
    shown, item = deep._corrupted((history, tags))
    assert item is tags, "of the item nothing is hidden"
    assert len(shown.values) / 3000 == pytest.approx(0.75, abs=0.03)
    assert shown.offsets.dtype == offsets.dtype
    assert len(shown.offsets) == len(offsets)
    for row in range(1000):  # what is left is in its row, in its order
        left = shown.values[shown.offsets[row] : shown.offsets[row + 1]]
        assert (left // 3 == row).all()
        assert (left.diff() > 0).all()
    assert deep.eval()._corrupted((history, tags)) == (history, tags)


def test_without_dropout_nothing_is_hidden():
    deep = built(dropout=0.0).deep
    assert isinstance(deep, HybridAutoencoder)
    bags = (Bag(torch.arange(4), torch.tensor([0, 4])),) * 2
    assert deep.train()._corrupted(bags) is bags


def test_gradients_are_those_of_finite_differences():
    model = built(dropout=0.0).double()
    randomise(model, seed=1, scale=0.7)
    inputs = Inputs.of(examples(6))
    inputs = inputs._replace(numeric=inputs.numeric.double())

    def value() -> Tensor:
        return (model(inputs) * torch.arange(1, 7)).sum()

    assert worst_gradient_error(value, model.parameters()) < 1e-7


# --- users and items that nobody rated ---------------------------------------------------------

KINDS, TYPES, PER_TYPE = 4, 12, 5
#: Ids 0 and 1 are for what is missing and unknown, as the encoder has it; 1 is never trained on.
USERS, ITEMS = 2 + 60, 2 + TYPES * PER_TYPE
SHOP = Layout(
    numeric=0,
    tables={"user": (USERS, 4), "item": (ITEMS, 4), "type": (TYPES, 4)},
    fields=("user", "item", "type"),
    bags=("type",),
    wide_slots=(),
    wide_bags=0,
    user=0,
    item=1,
    owners=("user", "item", "item", "user"),
)


def visits(rows: int, seed: int, new_users: bool = False, new_items: bool = False) -> Batch:
    """A user likes the types of one kind, of which the history has a few; another slips in."""
    draw = np.random.default_rng(seed)
    taste, user = draw.integers(KINDS, size=rows), draw.integers(0, 60 // KINDS, rows)
    kind = np.where(draw.random(rows) < 0.5, taste, draw.integers(KINDS, size=rows))
    product_type = kind + KINDS * draw.integers(TYPES // KINDS, size=rows)
    item = product_type * PER_TYPE + draw.integers(PER_TYPE, size=rows)
    liked = taste[:, None] + KINDS * draw.integers(TYPES // KINDS, size=(rows, 4))
    history = np.c_[liked, draw.integers(TYPES, size=rows)]
    ids = np.stack(
        [
            np.full(rows, 1) if new_users else 2 + user * KINDS + taste,
            np.full(rows, 1) if new_items else 2 + item,
            product_type,
        ],
        axis=1,
    )
    return Batch(
        numeric=np.zeros((rows, 0), np.float32),
        deep_ids=ids.astype(np.int32),
        deep_bags=(Ragged.of(history.tolist(), np.int32),),
        wide_ids=np.zeros((rows, 0), np.int32),
        wide_bags=(),
        label=(kind == taste).astype(np.float32),
    )


@pytest.fixture(scope="module")
def rivals() -> dict[str, Model]:
    training = visits(4000, seed=0)
    return {
        name: fitted(SHOP, training, passes=10, model=name, hidden=(8,), factors=8, dropout=0.2)
        for name in ("hybrid_autoencoder", "dot_product")
    }


def ranked(model: Model, batch: Batch) -> float:
    assert batch.label is not None
    return auc(batch.label, score(model, batch))


def test_whom_and_what_both_know_both_rank(rivals):
    for name, model in rivals.items():
        assert ranked(model, visits(1000, seed=2)) > 0.95, name


def test_a_user_without_training_rows_is_known_by_a_history(rivals):
    strangers = visits(1000, seed=3, new_users=True)
    assert ranked(rivals["hybrid_autoencoder"], strangers) > 0.95
    assert ranked(rivals["dot_product"], strangers) == pytest.approx(0.5, abs=0.06)


def test_an_item_without_training_rows_is_known_by_its_type(rivals):
    new = visits(1000, seed=4, new_items=True)
    assert ranked(rivals["hybrid_autoencoder"], new) > 0.95
    assert ranked(rivals["dot_product"], new) == pytest.approx(0.5, abs=0.06)


def test_new_users_and_new_items_at_once(rivals):
    both = visits(1000, seed=5, new_users=True, new_items=True)
    assert ranked(rivals["hybrid_autoencoder"], both) > 0.95
    assert ranked(rivals["dot_product"], both) == 0.5  # one score for all


# --- refusals ----------------------------------------------------------------------------------

NEEDS = {
    "key": "the item's key as a feature of its own",
    "history": "a history (a multi or sequence column, not of the item)",
    "width": "at least one width in training.hidden",
}
NO_HISTORY = replace(LAYOUT, owners=("user", "item", "item", "item", "item", "user", "item"))
NO_BAGS = replace(LAYOUT, bags=(), owners=("user", "item", "item", "user", "item"))


@pytest.mark.parametrize(
    ("layout", "hidden", "needs"),
    [
        (replace(LAYOUT, item=None), (4,), ["key"]),
        (NO_BAGS, (4,), ["history"]),
        (NO_HISTORY, (4,), ["history"]),
        (LAYOUT, (), ["width"]),
        (replace(NO_HISTORY, item=None), (), ["key", "history", "width"]),
    ],
    ids=["no key", "no bags", "tags alone", "no layer", "nothing"],
)
def test_all_that_is_missing_is_told_together(layout, hidden, needs):
    with pytest.raises(ConfigError) as caught:
        build(layout, TrainingConfig(model="hybrid_autoencoder", hidden=hidden))
    assert str(caught.value) == "; ".join(
        f"training.model is 'hybrid_autoencoder', which needs {NEEDS[need]}; add it, or choose "
        "another model"
        for need in needs
    )


def test_the_users_key_is_not_needed():
    layout = replace(LAYOUT, fields=("item", "genre"), user=None, item=0, owners=LAYOUT.owners[1:])
    batch = examples(8)
    less = replace(batch, deep_ids=batch.deep_ids[:, 1:])
    one, other = built(layout), built()
    for model in (one, other):
        randomise(model)
    np.testing.assert_array_equal(score(one, less), score(other, batch))
