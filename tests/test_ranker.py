"""The artifact: what it scores, what it says of itself, and what it refuses to read."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file

from canary import NAMES, bait
from fathom import files
from fathom.batch import Ragged
from fathom.config import TrainingConfig
from fathom.encoding import Encoder, FrameError, fit_encoder, with_ratios
from fathom.models import build
from fathom.models.family import MODELS
from fathom.ranker import (
    MANIFEST,
    ArtifactError,
    Ranker,
    RowError,
    frame_of_rows,
    rows_of_frame,
    sigmoid,
    verify,
)
from fathom.spec import FeatureSpec
from fathom.training import score, train

#: Every kind of column; a history that shares the genres' table; crosses of one and of many values.
SPEC = FeatureSpec.model_validate(
    {
        "entities": {"user": "user_id", "item": "item_id", "request": "request_id"},
        "label": {"name": "bought", "values": [0, 1]},
        "columns": [
            {"name": "user_id", "kind": "categorical", "owner": "user", "wide": True},
            {"name": "item_id", "kind": "categorical", "owner": "item", "min_count": 10**6},
            {
                "name": "genre",
                "kind": "categorical",
                "owner": "item",
                "values": ["coffee", "tea"],
                "embedding": {"table": "genre", "width": 3},
            },
            {"name": "tags", "kind": "multi", "owner": "item", "wide": True},
            {"name": "shop", "kind": "categorical", "owner": "context", "deep": False},
            {"name": "price", "kind": "numeric", "owner": "item"},
            {
                "name": "purchases",
                "kind": "numeric",
                "aggregate": {"by": ["user_id"], "measure": "count"},
            },
            {
                "name": "recent",
                "kind": "sequence",
                "aggregate": {"by": ["user_id"], "measure": "last", "column": "genre", "n": 3},
                "embedding": {"table": "genre", "width": 3},
            },
            {
                "name": "price_by_purchases",
                "kind": "numeric",
                "ratio": {"of": "price", "to": "purchases"},
            },
        ],
        "crosses": [{"columns": ["user_id", "genre"]}, {"columns": ["recent", "tags"]}],
    }
)
CONFIG = TrainingConfig(hidden=(5,), epochs=2, batch_size=64, wide_l1=0.0, device="cpu")


def texts(values: list[Any]) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def frame_of(rows: int = 200, seed: int = 0) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    users, items = random.integers(6, size=rows), random.integers(9, size=rows)
    genres = [["coffee", "tea"][i % 2] for i in items]
    frame: dict[str, Any] = {
        "user_id": texts([f"u{u}" for u in users]),
        "item_id": texts([f"i{i}" for i in items]),
        "genre": texts([genre if i else None for i, genre in zip(items, genres, strict=True)]),
        "tags": Ragged.of([["green", "loose"][: i % 3] for i in items]),
        "shop": texts([f"shop{u % 2}" for u in users]),
        "price": np.where(items == 3, np.nan, items / 3).astype(np.float32),
        "purchases": random.integers(0, 5, size=rows).astype(np.float32),
        "recent": Ragged.of([["tea", "coffee"][: u % 3] for u in users]),
        "bought": ((users + items) % 2).astype(np.int64),
    }
    return with_ratios(frame, SPEC)


FRAME = frame_of()


def ranker_of(model: str = "wide_deep", spec: FeatureSpec = SPEC, **settings: Any) -> Ranker:
    """Not trained, but with weights that are all different and none of them 0."""
    encoder = fit_encoder(FRAME, spec)
    config = replace(CONFIG, model=model, **settings)
    network = build(encoder.layout, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) / 2)
    provenance = {"trained_until": "2024-03-01T05:00:00Z", "seed": 0}
    return Ranker(encoder, network, config, provenance)


RANKER = ranker_of()


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    folder = tmp_path / "artifact"
    RANKER.save(folder, {"golden.json": '{"rows": []}', "reference.parquet": b"PAR1 PAR1"})
    return folder


# --- scores ------------------------------------------------------------------------------------


def test_sigmoid_is_the_logistic_function_at_any_size():
    logits = np.array([-1e4, -3.0, 0.0, 3.0, 1e4])
    expected = [0.0, 1 / (1 + np.exp(3)), 0.5, 1 / (1 + np.exp(-3)), 1.0]
    assert sigmoid(logits).tolist() == pytest.approx(expected, rel=1e-12, abs=0)


def test_scores_are_the_sigmoid_of_the_models_logits():
    logits = score(RANKER.model, RANKER.encoder.encode(FRAME)).astype(float)
    np.testing.assert_allclose(RANKER.score(FRAME), 1 / (1 + np.exp(-logits)), rtol=1e-14)
    np.testing.assert_array_equal(
        RANKER.score_batch(RANKER.encoder.encode(FRAME)), RANKER.score(FRAME)
    )
    assert RANKER.score(FRAME).std() > 0.1


def test_a_regression_predicts_the_value_itself():
    spec = SPEC.model_validate(
        json.loads(SPEC.to_json()) | {"task": "regression", "label": {"name": "b", "values": None}}
    )
    numbers, probabilities = ranker_of(spec=spec).score(FRAME), RANKER.score(FRAME)
    np.testing.assert_allclose(sigmoid(numbers), probabilities, rtol=1e-6)
    assert numbers.min() < 0


def test_a_frame_that_does_not_fit_is_refused():
    with pytest.raises(FrameError, match="absent columns \\['genre', 'price'\\]"):
        RANKER.score({n: v for n, v in FRAME.items() if n not in {"genre", "price"}})


# --- explanations ------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_the_parts_of_an_explanation_sum_to_the_logit(model):
    ranker = ranker_of(model, KEYED)
    parts = ranker.explain(FRAME)
    np.testing.assert_allclose(sigmoid(sum(parts.values())), ranker.score(FRAME), atol=1e-6)
    assert all(part.shape == (200,) for part in parts.values())
    slots = {"user_id", "tags", "user_id_x_genre", "recent_x_tags"}
    slots = slots if model in {"wide", "wide_deep", "ensemble"} else set()
    assert set(parts) == {"bias", "deep"} | slots
    assert parts["deep"].any() == (model != "wide")


def test_an_explanation_gives_each_slot_its_own_weights():
    # Weights of the wide table that say where they stand: slots follow each other in it.
    ranker = ranker_of("wide")
    names, rows = ranker.encoder.wide_slots, ranker.encoder.layout.wide_slots
    with torch.no_grad():
        marks = np.repeat(np.arange(1, len(rows) + 1), rows)
        ranker.model.wide.weight[:, 0] = torch.as_tensor(10.0**-marks)
    parts = ranker.explain(FRAME)
    for i, name in enumerate(names, 1):
        counts = parts[name] / 10.0**-i
        np.testing.assert_allclose(counts, counts.round(), atol=1e-4)
    assert (parts["user_id"] > 0).all()
    # Every combination of a recent genre and a tag adds one weight.
    pairs = FRAME["recent"].lengths * FRAME["tags"].lengths
    place = names.index("recent_x_tags") + 1
    np.testing.assert_allclose(parts["recent_x_tags"], pairs * 10.0**-place, rtol=1e-5)


def test_nothing_to_explain_or_score_gives_nothing():
    none = frame_of(rows=0)
    assert RANKER.score(none).shape == (0,)
    assert {part.shape for part in RANKER.explain(none).values()} == {(0,)}


# --- embeddings --------------------------------------------------------------------------------


def test_embeddings_are_the_rows_of_known_values():
    keys, vectors = RANKER.embeddings("user_id")
    assert sorted(keys) == [f"u{u}" for u in range(6)]
    assert vectors.shape == (6, 8)
    assert vectors.dtype == np.float32
    table = RANKER.model.state_dict()["deep.embeddings.tables.user_id.weight"].numpy()
    for key, vector in zip(keys, vectors, strict=True):
        row = RANKER.encoder.tables["user_id"].ids(texts([key]))[0]
        np.testing.assert_array_equal(vector, table[row])


def test_columns_that_share_a_table_share_embeddings():
    assert RANKER.embeddings("genre")[0] == RANKER.embeddings("recent")[0]
    np.testing.assert_array_equal(RANKER.embeddings("genre")[1], RANKER.embeddings("recent")[1])


def test_a_column_without_known_values_has_no_embeddings():
    keys, vectors = RANKER.embeddings("item_id")  # none is seen a million times
    assert keys == []
    assert vectors.shape == (0, 8)


def test_what_retrieval_reads_leaves_out_keys_without_vectors():
    assert list(RANKER.published_embeddings()) == ["user_embeddings"]  # items: see above
    key, keys, vectors = RANKER.published_embeddings()["user_embeddings"]
    assert key == "user_id"
    assert keys == RANKER.embeddings("user_id")[0]
    np.testing.assert_array_equal(vectors, RANKER.embeddings("user_id")[1])


def test_embeddings_are_a_copy():
    before = RANKER.score(FRAME)
    RANKER.embeddings("user_id")[1][:] = 1e6
    np.testing.assert_array_equal(RANKER.score(FRAME), before)


@pytest.mark.parametrize("column", ["price", "shop", "nothing"])
def test_a_column_without_embedding_is_named_with_those_there_are(column):
    message = rf"{column}: this ranker has no embedding of it; it has \['user_id', 'item_id', "
    with pytest.raises(KeyError, match=message):
        RANKER.embeddings(column)


def test_a_wide_model_has_no_embeddings():
    with pytest.raises(KeyError, match=r"user_id: this ranker has no embedding of it; it has \[\]"):
        ranker_of("wide").embeddings("user_id")


#: With items that are known by their key.
KEYED = FeatureSpec.model_validate(
    json.loads(SPEC.to_json())
    | {
        "columns": [
            column | ({"min_count": 2} if column["name"] == "item_id" else {})
            for column in json.loads(SPEC.to_json())["columns"]
        ]
    }
)


def test_a_dot_products_embeddings_are_the_vectors_that_it_multiplies():
    ranker = ranker_of("dot_product", KEYED, factors=5)
    published = ranker.published_embeddings()
    assert list(published) == ["user_embeddings", "item_embeddings"]
    users, items = (
        dict(zip(keys, vectors, strict=True)) for _, keys, vectors in published.values()
    )
    assert {key: len(vectors) for key, _, vectors in published.values()} == {
        "user_id": 6,
        "item_id": 9,
    }
    state = {name: weight.numpy() for name, weight in ranker.model.state_dict().items()}
    row = 17
    user, item = FRAME["user_id"][row], FRAME["item_id"][row]
    assert users[user].shape == items[item].shape == (5,)
    logit = users[user] @ items[item] + state["bias"]
    for column, key in (("user_id", user), ("item_id", item)):
        place = ranker.encoder.tables[column].ids(texts([key]))[0]
        logit += state[f"deep.biases.embeddings.tables.{column}.weight"][place, 0]
    assert ranker.score(FRAME)[row] == pytest.approx(1 / (1 + np.exp(-logit)), rel=1e-5)
    # Of all other features it reads nothing, so that it has no vectors of them.
    message = r"genre: this ranker has no embedding of it; it has \['user_id', 'item_id'\]"
    with pytest.raises(KeyError, match=message):
        ranker.embeddings("genre")


def test_a_hybrid_autoencoder_has_vectors_of_items_and_codes_of_users():
    ranker = ranker_of("hybrid_autoencoder", KEYED)
    published = ranker.published_embeddings()
    assert list(published) == ["item_embeddings"]
    _, keys, vectors = published["item_embeddings"]
    table = ranker.model.state_dict()["deep.decoder.tables.item_id.weight"].numpy()
    np.testing.assert_array_equal(vectors, table[ranker.encoder.tables["item_id"].ids(texts(keys))])
    for column in ("user_id", "genre"):
        message = rf"{column}: this ranker has no embedding of it; it has \['item_id'\]"
        with pytest.raises(KeyError, match=message):
            ranker.embeddings(column)


@pytest.mark.parametrize("model", MODELS)
def test_no_vector_is_published_that_was_never_trained(model):
    encoder = fit_encoder(FRAME, KEYED)
    batch = encoder.encode(FRAME)
    config = replace(CONFIG, model=model)
    learnt = train(encoder.layout, batch, batch, config, "binary").model
    published, initial = (
        Ranker(encoder, network, config).published_embeddings()
        for network in (learnt, build(encoder.layout, config))
    )
    expected = {"wide": set(), "hybrid_autoencoder": {"item_embeddings"}}
    assert set(published) == expected.get(model, {"user_embeddings", "item_embeddings"})
    for view, (_, keys, vectors) in published.items():
        moved = (vectors != initial[view][2]).any(axis=1)
        assert moved.all(), (view, [k for k, m in zip(keys, moved, strict=True) if not m])


# --- version -----------------------------------------------------------------------------------


def trained(seed: int = 0) -> Ranker:
    encoder = fit_encoder(FRAME, SPEC)
    batch = encoder.encode(FRAME)
    config = replace(CONFIG, seed=seed)
    model = train(encoder.layout, batch, batch, config, "binary").model
    return Ranker(encoder, model, config, {"trained_until": "2024-03-01"})


def test_the_same_training_gives_the_same_version_and_another_seed_another():
    versions = [trained(seed).version for seed in (0, 0, 1)]
    assert versions[0] == versions[1] != versions[2]


def test_a_version_is_the_last_day_of_the_data_and_a_hash():
    assert re.fullmatch(r"20240301-[0-9a-f]{12}", RANKER.version)
    undated = replace(RANKER, provenance={})
    assert undated.version == "undated-" + RANKER.version.split("-")[1]


def test_one_changed_weight_is_another_version():
    for name in RANKER.model.state_dict():
        other = ranker_of()
        with torch.no_grad():
            other.model.state_dict()[name].view(-1)[-1] += 1e-3
        assert other.version != RANKER.version, name


def test_another_vocabulary_is_another_version():
    # The same weights behind other words: the hash must see the encoder, not only the weights.
    renamed = FRAME | {"shop": texts(["x" + shop for shop in FRAME["shop"]])}
    spec = SPEC.model_validate(
        json.loads(SPEC.to_json())
        | {"crosses": [{"columns": ["shop", "genre"]}, {"columns": ["recent", "tags"]}]}
    )
    encoders = [fit_encoder(frame, spec) for frame in (FRAME, renamed)]
    assert encoders[0].layout == encoders[1].layout
    model = build(encoders[0].layout, CONFIG)
    assert len({Ranker(encoder, model, CONFIG).version for encoder in encoders}) == 2


def test_what_does_not_change_scores_does_not_change_the_version():
    other = {"trained_until": "2024-03-01", "hardware": "another machine"}
    assert replace(RANKER, provenance=other).version == RANKER.version


# --- saving and loading ------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_a_loaded_ranker_is_the_saved_one(tmp_path, model):
    saved = ranker_of(model, KEYED, dropout=0.3)
    version = saved.save(tmp_path / "new")
    loaded = Ranker.load(tmp_path / "new")

    np.testing.assert_array_equal(loaded.score(FRAME), saved.score(FRAME))  # to the last bit
    assert loaded.version == saved.version == version == verify(tmp_path / "new")
    assert (loaded.spec, loaded.config, loaded.provenance) == (
        saved.spec,
        saved.config,
        saved.provenance,
    )
    assert not loaded.model.training  # or its dropout would drop


def test_zeros_of_the_wide_part_are_not_kept(tmp_path):
    """L1 leaves most weights at 0, of either sign; a file that keeps them would be as large."""
    ranker = ranker_of()
    table = ranker.model.wide.weight
    with torch.no_grad():
        table.zero_()
        table[1::2] = -0.0
        table[3], table[7] = 0.5, -0.25
    dense = Ranker(ranker.encoder, ranker.model, ranker.config)
    version = dense.save(tmp_path / "new")
    kept = load_file(tmp_path / "new" / "weights.safetensors")
    assert "wide.weight" not in kept
    assert (kept["wide.rows"].tolist(), kept["wide.values"].tolist()) == ([3, 7], [0.5, -0.25])
    loaded = Ranker.load(tmp_path / "new")
    assert torch.equal(loaded.model.wide.weight, table)
    assert loaded.version == version
    np.testing.assert_array_equal(loaded.score(FRAME), dense.score(FRAME))


def test_saving_again_gives_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        ranker_of().save(tmp_path / name)
    assert (tmp_path / "one" / MANIFEST).read_text() == (tmp_path / "two" / MANIFEST).read_text()


def test_an_artifact_is_plain_files_all_in_the_manifest(artifact):
    names = {path.name for path in artifact.iterdir()}
    assert names == {
        *("spec.json", "vocabularies.json", "encoder.safetensors", "weights.safetensors"),
        *("ranker.json", "golden.json", "reference.parquet", MANIFEST),
    }
    manifest = json.loads((artifact / MANIFEST).read_text())
    assert manifest["version"] == RANKER.version
    assert manifest["files"] == {n: files.sha256(artifact / n) for n in names - {MANIFEST}}
    assert (artifact / "reference.parquet").read_bytes() == b"PAR1 PAR1"


def test_an_artifact_describes_itself(artifact):
    described = json.loads((artifact / "ranker.json").read_text())
    assert described["version"] == RANKER.version
    assert described["spec_hash"] == SPEC.hash
    assert described["training"]["hidden"] == [5]
    assert described["provenance"]["seed"] == 0


# --- damage ------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "name",
    [
        *("spec.json", "vocabularies.json", "encoder.safetensors", "weights.safetensors"),
        *("ranker.json", "golden.json", "reference.parquet"),
    ],
)
@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (flip, "does not have the SHA-256 of the manifest"),
        (truncate, "does not have the SHA-256 of the manifest"),
        (Path.unlink, "is missing"),
    ],
)
def test_damage_to_any_file_is_noticed(artifact, name, damage, fault):
    damage(artifact / name)
    message = (
        rf"{re.escape(str(artifact))}: {name} {fault}; restore it from a backup or train again"
    )
    with pytest.raises(ArtifactError, match=message):
        verify(artifact)
    with pytest.raises(ArtifactError, match=message):
        Ranker.load(artifact)


def test_all_damage_is_reported_together(artifact):
    flip(artifact / "weights.safetensors")
    truncate(artifact / "spec.json")
    (artifact / "ranker.json").unlink()
    with pytest.raises(ArtifactError) as caught:
        Ranker.load(artifact)
    for fault in (
        "ranker.json is missing",
        "spec.json does not have the SHA-256 of the manifest",
        "weights.safetensors does not have the SHA-256 of the manifest",
    ):
        assert fault in str(caught.value)
    assert "golden.json" not in str(caught.value)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"version": "1"}', "null"])
def test_a_manifest_that_is_absent_or_no_manifest(artifact, content):
    (artifact / MANIFEST).unlink()
    if content is not None:
        (artifact / MANIFEST).write_text(content)
    with pytest.raises(ArtifactError, match=r"manifest.json cannot be read \(.*\); restore it"):
        Ranker.load(artifact)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ArtifactError, match=r"nowhere: manifest\.json cannot be read"):
        Ranker.load(tmp_path / "nowhere")


def test_nothing_is_ever_unpickled(artifact, tmp_path):
    canary = tmp_path / "canary"
    payload = bait(canary)
    # Beside the files, under names that loaders of other formats would look for.
    for name in NAMES:
        (artifact / name).write_bytes(payload)
    np.testing.assert_array_equal(Ranker.load(artifact).score(FRAME), RANKER.score(FRAME))

    # In place of each file, with a manifest that vouches for it.
    manifest = json.loads((artifact / MANIFEST).read_text())
    for name in manifest["files"]:
        original = (artifact / name).read_bytes()
        (artifact / name).write_bytes(payload)
        hashes = manifest["files"] | {name: files.sha256(artifact / name)}
        files.write_json(artifact / MANIFEST, manifest | {"files": hashes})
        if name not in {"golden.json", "reference.parquet"}:  # which loading does not read
            with pytest.raises((SafetensorError, UnicodeDecodeError)):  # of the format's reader
                Ranker.load(artifact)
        (artifact / name).write_bytes(original)
    assert not canary.exists()


# --- rows of requests --------------------------------------------------------------------------

ROW = {
    "user_id": "u1",
    "item_id": "i1",
    "genre": "tea",
    "tags": ["green"],
    "shop": "shop1",
    "price": 1.5,
    "purchases": 2,
    "recent": [],
}
UNKNOWN_ROW = dict.fromkeys(ROW)


def faults_of(*rows: dict[str, Any]) -> list[tuple[int, str, str]]:
    with pytest.raises(RowError) as caught:
        frame_of_rows(rows, SPEC)
    return [(f["row"], f["field"], f["fault"]) for f in caught.value.faults]


def test_a_row_becomes_a_frame_with_ratios():
    frame = frame_of_rows([ROW, UNKNOWN_ROW], SPEC)
    assert set(frame) == {column.name for column in SPEC.columns}
    assert frame["user_id"].tolist() == ["u1", None]
    assert frame["tags"].offsets.tolist() == [0, 1, 1]
    assert frame["purchases"].dtype == np.float32
    np.testing.assert_array_equal(frame["price"], np.float32([1.5, np.nan]))
    # of / (to + 1), a missing part counting as 0.
    np.testing.assert_array_equal(frame["price_by_purchases"], np.float32([1.5 / 3, 0.0]))


def test_rows_without_any_value_are_scored_through_the_trained_ids_of_the_missing():
    scores = RANKER.score(frame_of_rows([UNKNOWN_ROW, ROW], SPEC))
    assert np.isfinite(scores).all()
    assert scores[0] != scores[1]


def test_no_rows_make_an_empty_frame():
    assert RANKER.score(frame_of_rows([], SPEC)).shape == (0,)


@pytest.mark.parametrize(
    ("field", "value", "fault"),
    [
        ("user_id", 7, "is 7; it must be a string"),
        ("user_id", ["u1"], "is ['u1']; it must be a string"),
        ("shop", True, "is True; it must be a string"),
        ("genre", "cola", "is 'cola'; it must be one of ['coffee', 'tea']"),
        ("genre", "", "is ''; it must be one of ['coffee', 'tea']"),
        ("price", "cheap", "is 'cheap'; it must be a number"),
        ("price", True, "is True; it must be a number"),
        ("price", [1.0], "is [1.0]; it must be a number"),
        ("price", float("nan"), "is nan; it must be a finite number below 3.4e38"),
        ("price", float("-inf"), "is -inf; it must be a finite number below 3.4e38"),
        ("price", 1e39, "is 1e+39; it must be a finite number below 3.4e38"),
        ("price", 10**40, f"is 1{'0' * 40}; it must be a finite number below 3.4e38"),
        ("price", -(10**400), f"is -1{'0' * 55}...; it must be a finite number below 3.4e38"),
        ("tags", "green", "is 'green'; it must be a list of strings"),
        ("tags", ["green", 3], "is ['green', 3]; it must be a list of strings"),
        ("tags", [None], "is [None]; it must be a list of strings"),
        ("recent", {"tea": 1}, "is {'tea': 1}; it must be a list of strings"),
        ("shop", {"long": "x" * 99}, f"is {{'long': '{'x' * 47}...; it must be a string"),
    ],
)
def test_each_fault_of_a_value_is_told_with_the_value_and_the_bound(field, value, fault):
    assert faults_of(ROW | {field: value}) == [(0, field, fault)]


def test_a_missing_and_an_unknown_field():
    row = {n: v for n, v in ROW.items() if n != "price"} | {"prize": 1.5}
    assert faults_of(row) == [
        (0, "prize", "is no column of this model's spec"),
        (0, "price", "is missing; give null if it is not known"),
    ]


def test_faults_of_all_rows_are_reported_together():
    rows = [ROW, ROW | {"price": "1"}, ROW | {"genre": "x", "tags": 1}, {}]
    found = faults_of(*rows)
    assert {(row, field) for row, field, _ in found} == {
        *((1, "price"), (2, "genre"), (2, "tags")),
        *((3, field) for field in ROW),
    }
    with pytest.raises(RowError, match="row 1: price: is '1'; it must be a number"):
        frame_of_rows(rows, SPEC)


def test_a_message_of_many_faults_says_how_many_more_there_are():
    rows = [ROW | {"price": "x"}] * 1025
    with pytest.raises(RowError, match=r"; row 19: price: .* a number; and 1,005 more$") as caught:
        frame_of_rows(rows, SPEC)
    assert len(caught.value.faults) == 1025


def test_the_largest_numbers_pass_without_a_warning():
    frame = frame_of_rows([ROW | {"price": p} for p in (3.4028e38, -3.4028e38, 5e-324, 0)], SPEC)
    assert np.isfinite(frame["price"]).all()


def test_recorded_rows_give_the_scores_of_the_frame_they_come_from():
    index = [3, 199, 0, 3]
    rows = json.loads(json.dumps(rows_of_frame(FRAME, SPEC, index), allow_nan=False))
    assert set(rows[0]) == set(ROW)  # ratios are computed, so they are not recorded
    np.testing.assert_allclose(
        RANKER.score(frame_of_rows(rows, SPEC)), RANKER.score(FRAME)[index], rtol=0, atol=1e-7
    )


SOME_TEXT = st.one_of(st.none(), st.text(max_size=5), st.sampled_from(["u1", "shop0", "i2"]))
SOME_LIST = st.lists(st.one_of(st.text(max_size=3), st.sampled_from(["green", "tea"])), max_size=4)
SOME_ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "user_id": SOME_TEXT,
            "item_id": SOME_TEXT,
            "genre": st.sampled_from([None, "coffee", "tea"]),
            "tags": SOME_LIST,
            "shop": SOME_TEXT,
            "price": st.one_of(
                st.none(), st.floats(width=32, allow_nan=False, allow_infinity=False)
            ),
            "purchases": st.one_of(st.none(), st.integers(0, 10**6)),
            "recent": SOME_LIST,
        }
    ),
    max_size=5,
)


@given(rows=SOME_ROWS)
def test_rows_survive_json_with_identical_scores(rows):
    frame = frame_of_rows(rows, SPEC)
    recorded = json.dumps(rows_of_frame(frame, SPEC, range(len(rows))), allow_nan=False)
    again = frame_of_rows(json.loads(recorded), SPEC)
    np.testing.assert_array_equal(RANKER.score(again), RANKER.score(frame))
    assert np.isfinite(RANKER.score(frame)).all()


def test_half_a_surrogate_pair_is_an_unknown_value_like_any_other():
    rows = json.loads(json.dumps([ROW | {"user_id": "\ud83d", "shop": "\ud83d"}]))
    strange = RANKER.score(frame_of_rows(rows, SPEC))
    assert strange == RANKER.score(frame_of_rows([ROW | {"user_id": "new", "shop": "new"}], SPEC))


def test_the_encoder_is_the_artifacts_own(artifact):
    assert Encoder.load(artifact).fingerprint == RANKER.encoder.fingerprint
