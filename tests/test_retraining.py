"""Retraining: warm from the champion where that holds, fresh where it does not."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pytest

from fathom import checkpoint, drift
from fathom.config import SplitConfig, TrainingConfig
from fathom.drift import Decision, history
from fathom.encoding import Encoder, Vocabulary, draws, fit_encoder
from fathom.evaluation import EvaluationConfig
from fathom.models import build, score
from fathom.pipelines.retraining.nodes import plan_retraining
from fathom.pipelines.training.nodes import split_frame
from fathom.ranker import Ranker
from fathom.registry import Registry
from fathom.retraining import (
    Attempt,
    Base,
    Recipe,
    RetrainingConfig,
    Window,
    attempt,
    base_from,
    base_of,
    catch_up,
    challenged,
    newest_split,
    nothing_newer,
    outgrown,
    provenance,
    retrain,
    take,
    warm_rows,
)
from fathom.spec import FeatureSpec
from fathom.step import Optimizers
from fathom.warm import WarmStart
from small_ranker import SPEC, START, plain_frame

TRAINING = TrainingConfig(
    hidden=(8,), epochs=1, cool_down=0.25, batch_size=32, device="cpu", threads=1
)
RECIPE = Recipe(
    SPEC,
    TRAINING,
    RetrainingConfig(fresh_margin=10.0, fresh_growth=9.0),
    EvaluationConfig(resamples=20),
)
#: Sixty days with twenty exposures each: the champion saw the first thirty.
DAYS, A_DAY, SEEN = 60, 20, 30
SPLIT = SplitConfig("2024-01-01", "2024-01-31", "2024-02-07")


def window(first: int, last: int) -> Window:
    """The exposures of some days. From day 40 on one user in four is one never seen before."""
    rows = DAYS * A_DAY
    frame = plain_frame(rows)
    days = np.repeat(np.arange(DAYS), A_DAY)
    users = frame["user_id"].copy()
    users[(days >= 40) & (np.arange(rows) % 4 == 0)] = "newcomer"
    moments = np.datetime64(START.replace(tzinfo=None), "us") + days * np.timedelta64(1, "D")
    requests = np.array([f"r{row // 5}" for row in range(rows)], object)
    frame |= {"user_id": users, "event_timestamp": moments, "request_id": requests}
    return Window(take(frame, np.flatnonzero((days >= first) & (days < last))))


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """Trained on the first thirty days."""
    encoder = fit_encoder(window(0, SEEN).frame, SPEC)
    batches = (encoder.encode(window(0, SEEN).frame), encoder.encode(window(SEEN, 37).frame))
    found = attempt("fresh", encoder, batches, TRAINING, tmp_path_factory.mktemp("champion"))
    described = provenance(found, TRAINING, SPLIT)
    ranker = Ranker(encoder, found.trained.model, TRAINING, described)
    assert found.trained.state is not None
    return Base(ranker.version, ranker, found.trained.state)


@pytest.fixture
def registry(champion: Base, tmp_path: Path) -> Registry:
    """Where that one is champion, and its state is kept."""
    found = Registry(tmp_path / "registry")
    found.register(champion.ranker.save)
    found.keep_state(champion.version, champion.state)
    found.promote(champion.version, "the first")
    return found


def spoilt(base: Base, folder: Path, factor: float) -> Base:
    """The same, but that the state's last layer is multiplied by a factor."""
    shutil.copytree(base.state, folder)
    layers = sorted(folder.glob("model.deep.layers.*.weight.npy"))
    np.save(layers[-1], np.load(layers[-1]) * np.float32(factor))
    return replace(base, state=folder)


def retrained(base: Base | None, folder: Path, recipe: Recipe = RECIPE) -> Any:
    """On the days up to 50, validated on the seven that follow."""
    return retrain(window(0, 50), window(50, 57), recipe, base, "as asked", folder)


# -- when ----------------------------------------------------------------------------------------


def test_the_newest_exposures_are_the_gates() -> None:
    """Steps begin at six: the newest exposure, of the 20th at noon, is of the step to the 21st."""
    spec = SPEC.model_copy(update={"grain_origin": datetime(2024, 1, 1, 6, tzinfo=timezone.utc)})
    newest = datetime(2024, 3, 20, 12, tzinfo=timezone.utc)
    split = newest_split(newest, spec, RetrainingConfig(), START)
    assert split == SplitConfig(
        "2024-01-01T00:00:00+00:00", "2024-02-29T06:00:00+00:00", "2024-03-07T06:00:00+00:00"
    )
    assert split == newest_split(newest + timedelta(hours=9), spec, RetrainingConfig(), START)
    short = newest_split(newest, spec, RetrainingConfig(train_days=14), START)
    assert short.train_from == "2024-02-15T06:00:00+00:00"


def test_windows_with_faults_of_the_data_are_left_out(tmp_path: Path) -> None:
    """The newest week was broken: the gate looks at the two weeks before it."""
    moments = [START + timedelta(days=day) for day in range(60)]
    frame = ibis.memtable({"event_timestamp": moments, SPEC.label.name: [0] * 60})
    broken = Decision(
        False, (), "none", ("price: all null",), drift.Window(moments[53], moments[59])
    )
    lines = history.with_decision("", broken)
    split, base = plan_retraining(
        frame, lines, SPEC, SPLIT, RetrainingConfig(), str(tmp_path / "registry")
    )
    assert split.without == ((moments[53].isoformat(), moments[59].isoformat()),)
    assert split.moment("test_from") == moments[52] - timedelta(days=14)
    assert base == {"version": None}
    train, validation, test = split_frame(frame, split)
    days = [part.count().to_pyarrow().as_py() for part in (train, validation, test)]
    assert days == [31, 7, 15]  # and none of the last seven


def test_a_run_that_is_repeated_after_the_promotion_challenges_the_same(
    champion: Base, registry: Registry
) -> None:
    later = SplitConfig("2024-01-01", "2024-02-20", "2024-02-27")
    assert challenged(registry, later) == champion.version
    described = champion.ranker.provenance | {
        "trained_until": "2024-03-12T00:00:00+00:00",  # it has caught up
        "validated_from": "2024-02-20T00:00:00+00:00",
        "from": champion.version,
    }
    successor = replace(champion.ranker, provenance=described)
    registry.promote(registry.register(successor.save), "better")
    assert registry.champion() != champion.version
    assert challenged(registry, later) == champion.version  # not the one it has made itself
    assert challenged(registry, SplitConfig("2024-01-01", "2024-02-27", "2024-03-05")) == (
        successor.version
    )


def test_what_a_champion_has_learnt_a_retraining_waits_for(
    champion: Base, registry: Registry
) -> None:
    """It learnt until the 31st of January. Three weeks are for validation and the gate."""
    provenance = champion.ranker.provenance
    assert nothing_newer(provenance, START + timedelta(days=31)) is None
    why = (
        "waiting: the champion has learnt what there is until 2024-01-31 00:00, and a retraining "
        "could learn until 2024-01-29 00:00 only, for what comes after that is to validate and "
        "judge it by"
    )
    assert nothing_newer(provenance, START + timedelta(days=28)) == why
    moments = [START + timedelta(days=day) for day in range(50)]
    frame = ibis.memtable({"event_timestamp": moments, SPEC.label.name: [0] * 50})
    with pytest.raises(ValueError, match=re.escape(why)):
        plan_retraining(frame, None, SPEC, SPLIT, RetrainingConfig(), str(registry.folder))


def test_growth_is_of_all_that_the_champion_has_learnt_from(champion: Base) -> None:
    """The warm one learnt from 550 rows, but has those of the fresh one, too."""
    made = champion.ranker.provenance | {"window_rows": 1000, "rows": {"train": 550}}
    assert outgrown(1049, made, RetrainingConfig()) is None
    assert outgrown(1050, made, RetrainingConfig()) == (
        "growth: there are 1.05 times the rows that the champion has learnt from (≥ 1.05)"
    )


def test_without_a_champion_nobody_is_challenged(tmp_path: Path) -> None:
    assert challenged(Registry(tmp_path), SPLIT) is None


# -- what it starts from -------------------------------------------------------------------------


def test_a_kept_state_is_what_a_warm_start_goes_on_from(champion: Base, registry: Registry) -> None:
    base, reason = base_of(registry, champion.version, RECIPE)
    assert base is not None
    assert base.state == registry.folder / "states" / champion.version
    assert reason == f"the champion is {champion.version}"


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (replace(RECIPE, retraining=RetrainingConfig(start="fresh")), "asks for a fresh start"),
        (replace(RECIPE, training=replace(TRAINING, hidden=(9,))), "settings .* of .*: hidden"),
        (
            replace(
                RECIPE,
                spec=FeatureSpec.model_validate(
                    SPEC.model_dump(exclude_defaults=True) | {"crosses": []}
                ),
            ),
            "the feature spec is no longer that of",
        ),
    ],
)
def test_what_has_changed_starts_fresh(
    champion: Base, registry: Registry, recipe: Recipe, reason: str
) -> None:
    base, why = base_of(registry, champion.version, recipe)
    assert base is None
    assert re.search(reason, why)


def test_settings_of_the_machine_and_the_seed_are_no_change(
    champion: Base, registry: Registry
) -> None:
    other = replace(TRAINING, threads=2, seed=1, checkpoint_seconds=0)
    assert base_of(registry, champion.version, replace(RECIPE, training=other))[0] is not None


def test_without_a_usable_state_it_starts_fresh(champion: Base, registry: Registry) -> None:
    assert base_of(registry, None, RECIPE) == (None, "there is no champion to start from")
    weights = registry.folder / "states" / champion.version / "model.bias.npy"
    weights.write_bytes(b"")
    base, why = base_of(registry, champion.version, RECIPE)
    assert base is None
    assert "model.bias.npy does not have the SHA-256" in why
    (registry.folder / "states").rename(registry.folder / "elsewhere")
    base, why = base_of(registry, champion.version, RECIPE)
    assert base is None
    assert why == f"the registry keeps no state of {champion.version}"


# -- how -----------------------------------------------------------------------------------------


def late(rows: Window) -> np.ndarray:
    """(N,) what is held back for the cool-down."""
    found = draws(rows.frame, SPEC)
    assert found is not None
    return found < TRAINING.cool_down


def test_a_warm_start_learns_what_is_new_and_what_is_held_back_for_the_cool_down() -> None:
    everything = window(0, 50)
    rows = warm_rows(everything, np.datetime64("2024-01-31", "us"), RECIPE)
    new, old = rows[rows >= SEEN * A_DAY], rows[rows < SEEN * A_DAY]
    assert new.tolist() == list(range(SEEN * A_DAY, 50 * A_DAY))
    assert old.tolist() == np.flatnonzero(late(window(0, SEEN))).tolist()
    without = replace(RECIPE, training=replace(TRAINING, cool_down=0.0))
    assert warm_rows(everything, np.datetime64("2024-01-31", "us"), without).tolist() == (
        new.tolist()
    )


def test_what_a_warm_start_goes_on_from_has_seen_none_of_what_it_learns(
    champion: Base, tmp_path: Path
) -> None:
    """Whatever comes later: an exposure's draw does not change, so no chain learns one twice."""
    (warm,) = retrained(champion, tmp_path).attempts
    held_back = late(window(0, SEEN)).sum()
    assert champion.ranker.provenance["rows"]["train"] == SEEN * A_DAY
    before, cooling = [epoch.examples for epoch in warm.trained.history]
    assert before == (~late(window(SEEN, 50))).sum()
    assert cooling == held_back + late(window(SEEN, 50)).sum() == late(window(0, 50)).sum()


def test_a_warm_start_keeps_the_scalers_and_learns_new_ids(champion: Base, tmp_path: Path) -> None:
    done = retrained(champion, tmp_path)
    (warm,) = done.attempts
    assert done.chosen is warm
    assert warm.start == "warm"
    assert done.base == champion.version
    known, found = champion.ranker.encoder, warm.encoder
    for name, scaler in known.scalers.items():
        assert found.scalers[name].quantiles.tobytes() == scaler.quantiles.tobytes()
    assert "newcomer" in found.wide["user_id"].values
    assert "newcomer" not in known.wide["user_id"].values
    # Twenty days of twenty are new; of the thirty before, what was held back is learnt again.
    held_back, new = late(window(0, SEEN)).sum(), late(window(SEEN, 50)).sum()
    assert warm.examples == 400 + held_back
    assert warm.steps == -(-(400 - new) // 32) + -(-(held_back + new) // 32)
    assert warm.against is not None
    assert warm.against.hi < 10


def test_a_fresh_start_fits_all_anew(champion: Base, tmp_path: Path) -> None:
    done = retrained(None, tmp_path)
    assert [tried.start for tried in done.attempts] == ["fresh"]
    assert done.reason == "as asked"
    assert done.base is None
    name = "user_purchases"
    everything = fit_encoder(window(0, 50).frame, SPEC)
    for encoder, same in ((everything, True), (champion.ranker.encoder, False)):
        found = done.chosen.encoder.scalers[name].quantiles
        assert np.array_equal(found, encoder.scalers[name].quantiles) is same
    assert done.chosen.examples == 1000


def test_a_warm_start_that_is_not_good_enough_is_backed_by_a_fresh_one(
    champion: Base, tmp_path: Path
) -> None:
    """What it goes on from is spoilt, which the validation window shows."""
    config = RetrainingConfig(fresh_growth=9.0)
    base = spoilt(champion, tmp_path / "state", -3.0)
    done = retrained(base, tmp_path, replace(RECIPE, retraining=config))
    warm, fresh = done.attempts
    assert warm.against is not None
    assert warm.against.hi >= config.fresh_margin
    assert fresh.loss < warm.loss
    assert done.chosen is fresh
    assert "the fresh one is better" in done.reason
    plain = done.as_dict()
    assert plain["start"] == "fresh"
    assert plain["from"] == champion.version
    assert [tried["start"] for tried in plain["attempts"]] == ["warm", "fresh"]


def test_a_warm_start_that_cannot_be_trained_is_followed_by_a_fresh_one(
    champion: Base, tmp_path: Path
) -> None:
    config = RetrainingConfig(fresh_growth=9.0)
    base = spoilt(champion, tmp_path / "state", -1e7)
    done = retrained(base, tmp_path, replace(RECIPE, retraining=config))
    assert [tried.start for tried in done.attempts] == ["fresh"]
    assert "it ends with: the loss explodes" in done.reason


def test_the_better_of_the_two_goes_on_even_if_it_is_the_warm_one(
    champion: Base, tmp_path: Path
) -> None:
    """A margin that none can keep asks for a fresh start, which learns nothing at these rates."""
    slow = replace(TRAINING, embedding_learning_rate=1e-9, deep_learning_rate=1e-9, wide_l1=1e9)
    recipe = replace(RECIPE, training=slow, retraining=RetrainingConfig(fresh_growth=9.0))
    done = retrained(champion, tmp_path, recipe)
    assert len(done.attempts) == 2
    assert done.chosen.start == "warm"
    assert "the warm one is better" in done.reason


def test_when_the_data_have_grown_enough_it_starts_fresh(champion: Base, tmp_path: Path) -> None:
    """The champion learnt from 600 rows; now there are 1,000."""
    for growth, start in ((1.6, "fresh"), (1.7, "warm")):
        config = RetrainingConfig(fresh_growth=growth, fresh_margin=10.0)
        done = retrained(champion, tmp_path / start, replace(RECIPE, retraining=config))
        assert [tried.start for tried in done.attempts] == [start]
        assert done.chosen.fresh_rows == {"fresh": 1000, "warm": 600}[start]
        assert ("1.67 times the rows of the last fresh start" in done.reason) is (start == "fresh")


def test_with_nothing_newer_it_starts_fresh(champion: Base, tmp_path: Path) -> None:
    done = retrain(window(0, SEEN), window(SEEN, 37), RECIPE, champion, "as asked", tmp_path)
    assert done.chosen.start == "fresh"
    assert done.reason == f"there is nothing newer than what {champion.version} was trained on"


def test_the_same_retraining_ends_the_same_and_takes_up_where_it_was(
    champion: Base, tmp_path: Path
) -> None:
    first, second = retrained(champion, tmp_path / "a"), retrained(champion, tmp_path / "b")
    again = retrained(champion, tmp_path / "a")  # from its own last checkpoint
    weights = [done.chosen.trained.model.state_dict() for done in (first, second, again)]
    for name, value in weights[0].items():
        assert all(value.numpy().tobytes() == w[name].numpy().tobytes() for w in weights), name


def judged_and(folder: Path, base: Base) -> tuple[Base, Any]:
    """A challenger of ``base``'s, and what it is when it has caught up until day 60."""
    done = retrained(base, folder)
    judged = base_from(done.chosen, TRAINING, LATER, done.base)
    found = catch_up(window(0, DAYS), window(57, DAYS), RECIPE, judged, folder / "caught-up")
    return judged, found


#: What `retrained` is trained and judged on.
LATER = SplitConfig("2024-01-01", "2024-02-20", "2024-02-27")


def test_what_passes_the_gate_learns_the_windows_it_was_judged_on(
    champion: Base, tmp_path: Path
) -> None:
    judged, found = judged_and(tmp_path, champion)
    assert found.start == "warm"
    old = late(window(0, 50)).sum()
    assert found.examples == 10 * A_DAY + old  # and nothing that it had learnt
    assert found.against.difference < 0
    assert (found.window_rows, found.fresh_rows) == (1200, 600)
    until = START + timedelta(days=DAYS)
    made = provenance(found, TRAINING, LATER, champion.version, (judged.version, until))
    assert made["trained_until"] == until.isoformat()
    assert (made["judged"], made["from"]) == (judged.version, champion.version)
    assert made["validated_from"] == judged.ranker.provenance["validated_from"]
    again = base_from(found, TRAINING, LATER, champion.version, (judged.version, until))
    assert again.version.startswith("20240301-")


def test_what_fails_to_catch_up_is_released_as_it_was_judged(
    champion: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spoilt_one = spoilt(champion, tmp_path / "state", -3.0)
    assert catch_up(window(0, 50), window(43, 50), RECIPE, spoilt_one, tmp_path / "a") is None
    assert "its loss on the windows it has learnt would not be lower" in caplog.text
    broken = spoilt(champion, tmp_path / "broken", -1e7)
    assert catch_up(window(0, 50), window(43, 50), RECIPE, broken, tmp_path / "b") is None
    assert "catching up ends with: the loss explodes" in caplog.text


def test_provenance_says_how_it_started(champion: Base, tmp_path: Path) -> None:
    done = retrained(champion, tmp_path)
    found = provenance(done.chosen, TRAINING, SPLIT, done.base)
    assert (found["start"], found["from"]) == ("warm", champion.version)
    assert (found["steps"], found["examples"]) == (done.chosen.steps, done.chosen.examples)
    assert found["state"] == checkpoint.digest(done.chosen.trained.state)
    assert found["state"] != checkpoint.digest(champion.state)
    plain = champion.ranker.provenance
    assert (plain["start"], plain["from"], plain["examples"]) == ("fresh", None, SEEN * A_DAY)


# -- through another vocabulary ------------------------------------------------------------------


def started(base: Base, encoder: Encoder) -> tuple[Any, Optimizers]:
    """A model of an encoder's that has taken over what the champion learnt, before any step."""
    known = base.ranker.encoder
    model = build(encoder.layout, replace(TRAINING, seed=9))
    optimizers = Optimizers(model, TRAINING)
    start = WarmStart(base.state, known.layout, base.ranker.config, encoder.rows_of(known))
    start.apply(model, optimizers)
    return model.eval(), optimizers


def test_a_permuted_vocabulary_predicts_the_same_bit_for_bit(champion: Base) -> None:
    known = champion.ranker.encoder
    draw = np.random.default_rng(3)

    def permuted(vocabularies: dict[str, Vocabulary]) -> dict[str, Vocabulary]:
        return {n: Vocabulary(tuple(draw.permutation(v.values))) for n, v in vocabularies.items()}

    other = replace(known, tables=permuted(known.tables), wide=permuted(known.wide))
    assert other.tables["item_id"].values != known.tables["item_id"].values
    (before, _), (after, _) = started(champion, known), started(champion, other)
    frame = window(0, DAYS).frame
    scores = score(before, known.encode(frame))
    assert score(after, other.encode(frame)).tobytes() == scores.tobytes()


def test_known_ids_are_carried_new_ones_fresh_and_lost_ones_dropped(champion: Base) -> None:
    """Item ``i0`` disappears, and ``brand-new`` comes first."""
    known = champion.ranker.encoder
    old = known.tables["item_id"]
    items = ("brand-new", *(value for value in reversed(old.values) if value != "i0"))
    other = replace(known, tables=known.tables | {"item_id": Vocabulary(items)})
    model, optimizers = started(champion, other)
    untouched = build(other.layout, replace(TRAINING, seed=9)).state_dict()
    weight = "deep.embeddings.tables.item_id.weight"
    learnt = np.load(champion.state / f"model.{weight}.npy")
    found = model.state_dict()[weight].numpy()
    assert len(found) == len(learnt)
    (row,) = other.tables["item_id"].ids(np.array(["brand-new"], object))
    assert found[row].tobytes() == untouched[weight].numpy()[row].tobytes()
    kept = np.array(items[1:], object)
    assert found[other.tables["item_id"].ids(kept)].tobytes() == learnt[old.ids(kept)].tobytes()
    # Dense layers do not know of ids: their optimizer's state is carried as it is.
    dense = optimizers.tensors()["dense.0.sum"].numpy()
    assert dense.tobytes() == np.load(champion.state / "optimizer.dense.0.sum.npy").tobytes()


def test_attempts_tell_their_best_loss(champion: Base, tmp_path: Path) -> None:
    done = retrained(champion, tmp_path)
    best: Attempt = done.chosen
    assert best.loss == best.trained.history[-1].validation_loss  # after the cool-down
