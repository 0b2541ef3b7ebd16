"""Integrated gradients: exact where the answer is known, and complete for every architecture."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fathom.attribution import BASELINE, attribute
from fathom.batch import Batch, Ragged
from fathom.config import TrainingConfig
from fathom.encoding import fit_encoder
from fathom.models import Inputs, Model, build
from fathom.models.family import MODELS
from fathom.ranker import Ranker
from small_family import CONFIG, LAYOUT, examples, fitted, randomise
from small_ranker import SPEC, plain_frame

NAMES = ("user", "item", "genre", "recent", "tags", "spent", "price")
NAMED = dataclasses.replace(LAYOUT, names=NAMES)
ROWS = examples(16)
EMPTY = Ragged(np.zeros(0, np.int32), np.zeros(2, np.int64))
NOTHING = Batch(
    numeric=np.zeros((1, 2), np.float32),
    deep_ids=np.zeros((1, 3), np.int32),
    deep_bags=(EMPTY, EMPTY),
    wide_ids=np.zeros((1, 1), np.int32),
    wide_bags=(EMPTY,),
)


def deep_logit(model: Model, batch: Batch) -> np.ndarray:
    with torch.no_grad():
        return model.contributions(Inputs.of(batch)).deep.double().numpy()


def test_of_a_linear_model_a_share_is_the_weights_times_the_way():
    """Without hidden layers the logit is w . e, so a column's share is w . (e - e of nothing)."""
    model = build(NAMED, dataclasses.replace(CONFIG, model="deep", hidden=())).eval()
    randomise(model)
    shares = attribute(model, ROWS, NOTHING)
    weight = model.deep.layers[0].weight[0]
    with torch.no_grad():
        way = model.deep.embeddings(Inputs.of(ROWS)) - model.deep.embeddings(Inputs.of(NOTHING))
    columns = model.deep.embeddings.columns
    assert set(shares) == {*NAMES, BASELINE}
    for name, part in zip(NAMES, columns.parts, strict=True):
        expected = (way[:, part] * weight[part]).sum(dim=1).detach()
        np.testing.assert_allclose(shares[name], expected, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"wide"}))
def test_shares_sum_to_the_deep_logit(name: str):
    """Of a trained model; what is left is the error of a sum over 64 steps."""
    training = examples(256, seed=1)
    model = fitted(NAMED, training, model=name, hidden=(8, 6), passes=5, factors=3)
    shares = attribute(model, ROWS, NOTHING)
    logit = deep_logit(model, ROWS)
    np.testing.assert_allclose(sum(shares.values()), logit, atol=0.02 * np.abs(logit).max())
    assert all(share.shape == (16,) for share in shares.values())
    assert np.ptp(sum(shares[n] for n in shares if n != BASELINE)) > 0, "examples differ"


def test_a_column_that_the_model_does_not_read_has_no_share():
    model = fitted(NAMED, examples(256), model="dot_product", factors=3, passes=2)
    assert set(attribute(model, ROWS, NOTHING)) == {"user", "item", BASELINE}


def test_the_wide_part_alone_has_nothing_to_attribute():
    model = build(NAMED, dataclasses.replace(CONFIG, model="wide")).eval()
    with pytest.raises(ValueError, match="has no deep part; the terms of its wide part are exact"):
        attribute(model, ROWS, NOTHING)


def test_a_ranker_names_shares_by_the_columns_of_its_spec():
    frame = plain_frame()
    encoder = fit_encoder(frame, SPEC)
    config = TrainingConfig(hidden=(8,), device="cpu")
    model = build(encoder.layout, config).eval()
    randomise(model, scale=0.3)
    ranker = Ranker(encoder, model, config)
    few = {name: values[:5] if not isinstance(values, Ragged) else values.take(np.arange(5))
           for name, values in frame.items()}  # fmt: skip
    shares = ranker.attribute(few)
    assert set(shares) == {c.name for c in SPEC.columns if c.deep} | {BASELINE}
    deep = ranker.explain(few)["deep"]
    np.testing.assert_allclose(sum(shares.values()), deep, atol=0.02 * np.abs(deep).max() + 1e-4)


def test_nothing_is_what_a_row_without_any_value_is_encoded_to():
    frame = plain_frame()
    encoder = fit_encoder(frame, SPEC)
    empty = {}
    for column in SPEC.columns:
        if column.kind in {"multi", "sequence"}:
            empty[column.name] = Ragged.of([[]])
        elif column.is_numeric:
            empty[column.name] = np.array([np.nan])
        else:
            empty[column.name] = np.array([None], object)
    assert encoder.nothing.fingerprint() == encoder.encode(empty).fingerprint()
