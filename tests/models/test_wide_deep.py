"""Known answers: what each part can and cannot learn, through the real encoder and training."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from fathom.batch import Batch
from fathom.config import TrainingConfig
from fathom.encoding import Encoder, fit_encoder
from fathom.models import Inputs, Model
from fathom.spec import FeatureSpec
from fathom.training import score, train


def spec_of(crosses: list[dict[str, Any]], **columns: dict[str, Any]) -> FeatureSpec:
    return FeatureSpec.model_validate(
        {
            "entities": {"user": "user_id", "item": "item_id", "request": "request_id"},
            "label": {"name": "clicked", "values": [0, 1]},
            "columns": [
                {"name": name, "kind": "categorical", "owner": "context", "embedding": 4, **more}
                for name, more in columns.items()
            ],
            "crosses": crosses,
        }
    )


def frame_of(label: list[int] | None = None, **columns: list[Any]) -> dict[str, Any]:
    frame: dict[str, Any] = {}
    for name, values in columns.items():
        frame[name] = np.empty(len(values), object)
        frame[name][:] = values
    return frame if label is None else frame | {"clicked": np.array(label)}


def fitted(frame: dict[str, Any], spec: FeatureSpec, **settings: Any) -> tuple[Encoder, Model]:
    """Trained on the frame and, since nothing is tuned here, validated on it as well."""
    encoder = fit_encoder(frame, spec)
    batch: Batch = encoder.encode(frame)
    config = TrainingConfig(
        **{
            **{"hidden": (8,), "batch_size": 100, "epochs": 20, "device": "cpu"},
            **{"wide_learning_rate": 0.05, "wide_l1": 0.0},
            **{"embedding_learning_rate": 0.05, "deep_learning_rate": 0.05, "final_rate": 0.1},
            **settings,
        }
    )
    return encoder, train(encoder.layout, batch, batch, config, "binary").model


def auc(label: list[int], logit: np.ndarray) -> float:
    """Share of (positive, negative) pairs in the right order; a tie is half a pair."""
    labels = np.array(label)
    difference = logit[labels == 1][:, None] - logit[labels == 0][None, :]
    return float((difference > 0).mean() + (difference == 0).mean() / 2)


# --- XOR: no sum of one weight per value can order it ------------------------------------------

CELLS = list(itertools.product("01", "01"))
XOR = frame_of(
    label=[int(a != b) for a, b in CELLS] * 250,
    a=[a for a, _ in CELLS] * 250,
    b=[b for _, b in CELLS] * 250,
)


def xor_auc(crosses: list[dict[str, Any]], model: str) -> float:
    spec = spec_of(crosses, a={"wide": True}, b={"wide": True})
    # XOR starts on a plateau: with few units most seeds stay there, and early stopping would too.
    settings = {"hidden": (64,), "embedding_learning_rate": 0.3, "epochs": 40, "patience": 40}
    encoder, trained = fitted(XOR, spec, model=model, **settings)
    return auc(XOR["clicked"].tolist(), score(trained, encoder.encode(XOR)))


def test_wide_without_the_cross_cannot_learn_xor():
    # s(a) + s(b) puts one positive cell above one negative and below the other, or ties both.
    assert xor_auc([], "wide") == pytest.approx(0.5, abs=0.02)


def test_wide_with_the_cross_learns_xor():
    assert xor_auc([{"columns": ["a", "b"]}], "wide") == 1.0


@pytest.mark.parametrize("model", ["deep", "wide_deep"])
def test_the_deep_part_learns_xor_without_a_cross(model):
    assert xor_auc([], model) == 1.0


# --- pairs never seen: the wide part has nothing to say, the deep part generalises --------------

SIZE = 12
PAIRS = list(itertools.product(range(SIZE), range(SIZE)))
#: Each user and each item is in the training pairs, but these pairs of them are not.
UNSEEN = [(user, item) for user, item in PAIRS if (user + 5 * item) % 4 == 0]
SEEN = [pair for pair in PAIRS if pair not in UNSEEN]


def likes(user: int, item: int) -> int:
    """Easy users like most items, popular items please most users: true of unseen pairs too."""
    return int(user + item < SIZE)


def pairs_frame(pairs: list[tuple[int, int]], times: int = 1) -> dict[str, Any]:
    pairs = pairs * times
    return frame_of(
        label=[likes(*pair) for pair in pairs],
        user=[f"u{user}" for user, _ in pairs],
        item=[f"i{item}" for _, item in pairs],
    )


CROSSED = spec_of([{"columns": ["user", "item"], "min_count": 4}], user={}, item={})


@pytest.fixture(scope="module")
def trained_on_seen_pairs() -> tuple[Encoder, Model]:
    return fitted(pairs_frame(SEEN, times=20), CROSSED)


def test_an_unseen_pair_adds_nothing_to_wide_while_deep_varies(trained_on_seen_pairs):
    encoder, model = trained_on_seen_pairs
    unseen = model.contributions(Inputs.of(encoder.encode(pairs_frame(UNSEEN))))
    seen = model.contributions(Inputs.of(encoder.encode(pairs_frame(SEEN))))

    assert not unseen.wide.any()  # not nearly: a pair without an id has no weight
    assert seen.wide.all()
    label = [likes(*pair) for pair in UNSEEN]
    assert len(set(unseen.deep.tolist())) > len(UNSEEN) / 2
    assert auc(label, unseen.deep.detach().numpy()) > 0.95


def test_wide_alone_cannot_tell_unseen_pairs_apart():
    encoder, model = fitted(pairs_frame(SEEN, times=20), CROSSED, model="wide")
    seen = score(model, encoder.encode(pairs_frame(SEEN)))
    unseen = score(model, encoder.encode(pairs_frame(UNSEEN)))
    assert auc([likes(*pair) for pair in SEEN], seen) == 1.0
    assert set(unseen.tolist()) == {model.bias.item()}


def test_pairs_too_rare_for_an_id_add_nothing_and_teach_unseen_ones_nothing():
    # Three copies of some seen pairs, all disliked, are below the min_count of 4.
    rare = [(user, item) for user, item in SEEN if not likes(user, item)][:10]
    common = [pair for pair in SEEN if pair not in rare]
    pairs = common * 20 + rare * 3
    encoder, model = fitted(pairs_frame(pairs), CROSSED, model="wide")

    assert encoder.crosses["user_x_item"].rows == 2 + len(common)
    for pairs in (rare, UNSEEN):
        assert not model.contributions(Inputs.of(encoder.encode(pairs_frame(pairs)))).wide.any()


def test_what_is_unknown_of_a_single_column_does_have_a_weight():
    # Half of the rows are of users that come once each, and they like nothing.
    users = ["fan"] * 200 + [f"once{i}" for i in range(200)]
    frame = frame_of(label=[1] * 200 + [0] * 200, user=users)
    encoder, model = fitted(frame, spec_of([], user={"wide": True, "min_count": 2}), model="wide")
    batch = encoder.encode(frame_of(user=["fan", "stranger"]))
    fan, stranger = model.contributions(Inputs.of(batch)).wide[:, 0].tolist()
    assert fan > 0.1
    assert stranger < -0.1


def test_values_never_seen_get_the_trained_unknown_id_and_a_finite_score(trained_on_seen_pairs):
    encoder, model = trained_on_seen_pairs
    strangers = encoder.encode(frame_of(user=["new", None, "u1"], item=["i1", "new", None]))
    # A user never seen makes an unknown pair (id 1); a missing part makes no pair (id 0).
    assert strangers.wide_ids[:, 0].tolist() == [1, 0, 0]
    assert np.isfinite(score(model, strangers)).all()
