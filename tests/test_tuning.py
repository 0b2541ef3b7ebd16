"""A declared search: what it finds, what it refuses, and that a killed one goes on."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import forks
from fathom.batch import Batch, Layout
from fathom.config import TrainingConfig
from fathom.training import train
from fathom.tuning import TuningConfig, TuningError, TuningResult, search

LAYOUT = Layout(
    numeric=1, tables={"id": (20, 4)}, fields=("id",), bags=(), wide_slots=(20,), wide_bags=0
)
BASE = TrainingConfig(
    hidden=(8,),
    deep_learning_rate=1e-6,
    embedding_learning_rate=1e-6,
    batch_size=64,
    epochs=2,
    device="cpu",
    threads=1,
)


def planted(rows: int, seed: int) -> Batch:
    """The label is a step of the number, which no id knows: the deep layers have to learn."""
    random = np.random.default_rng(seed)
    number = random.uniform(-1, 1, (rows, 1)).astype(np.float32)
    ids = random.integers(20, size=(rows, 1)).astype(np.int32)
    label = (number[:, 0] > 0).astype(np.float32)
    return Batch(number, ids, (), ids, (), label)


TRAIN, VALIDATION = planted(1000, seed=1), planted(500, seed=2)
RATE = {"deep_learning_rate": {"low": 1e-6, "high": 0.3, "log": True}}


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def searched(storage: Path, base: TrainingConfig = BASE, **tuning: Any) -> TuningResult:
    config = TuningConfig.model_validate({"space": RATE, **tuning})
    return search(LAYOUT, TRAIN, VALIDATION, base, config, "binary", storage)


def without_seconds(result: TuningResult) -> list[dict[str, Any]]:
    return [{k: v for k, v in trial.items() if k != "seconds"} for trial in result.trials]


# --- what it finds -----------------------------------------------------------------------------


def test_the_setting_that_is_better_is_found_and_trains_to_the_loss_that_is_said(tmp_path):
    result = searched(tmp_path / "s.db", trials=8)
    losses = [trial["validation_loss"] for trial in result.trials]
    rates = [trial["settings"]["deep_learning_rate"] for trial in result.trials]

    assert [trial["number"] for trial in result.trials] == list(range(8))
    assert {trial["state"] for trial in result.trials} == {"complete"}
    assert rates[0] == BASE.deep_learning_rate  # the base is tried first ...
    assert losses[0] > 0.68  # ... and is no better than a coin: log 2 is 0.69
    assert result.best_loss == min(losses) < 0.45
    assert result.best == {"deep_learning_rate": rates[losses.index(min(losses))]}
    assert result.best["deep_learning_rate"] > 0.01

    again = train(LAYOUT, TRAIN, VALIDATION, replace(BASE, **result.best), "binary")
    assert min(epoch.validation_loss for epoch in again.history) == result.best_loss


def test_each_kind_of_range_gives_values_that_training_takes(tmp_path):
    space = {
        "dropout": {"low": 0, "high": 0.5},
        "batch_size": {"low": 100, "high": 300, "step": 100},
        "hidden": {"choices": [[8], [4, 4], []]},
        "wide_l1": {"low": 0, "high": 4, "step": 2},
    }
    for trial in searched(tmp_path / "s.db", space=space, trials=6).trials:
        drawn = trial["settings"]
        assert 0 <= drawn["dropout"] <= 0.5
        assert drawn["batch_size"] in (100, 200, 300)
        assert drawn["hidden"] in ([8], [4, 4], [])
        assert drawn["wide_l1"] in (0, 2, 4)
        assert trial["state"] == "complete"


def test_a_base_that_lies_outside_of_the_space_is_not_tried(tmp_path):
    base = replace(BASE, deep_learning_rate=0.9)
    (trial,) = searched(tmp_path / "s.db", base, trials=1).trials
    assert trial["settings"]["deep_learning_rate"] <= 0.3


def test_a_trial_that_fails_is_recorded_and_the_search_goes_on(tmp_path):
    space = {"deep_learning_rate": {"choices": [1e30, 0.05]}}
    base = replace(BASE, deep_learning_rate=1e30)
    result = searched(tmp_path / "s.db", base, space=space, trials=6)
    failed = [trial for trial in result.trials if trial["state"] == "failed"]
    assert result.trials[0] in failed
    assert 1 <= len(failed) < 6
    for trial in failed:
        assert trial["settings"] == {"deep_learning_rate": 1e30}
        assert trial["validation_loss"] is trial["best_epoch"] is None
        assert re.match("the loss (explodes|is not finite)", trial["error"])
    assert result.best == {"deep_learning_rate": 0.05}


def test_a_search_without_any_result_says_why(tmp_path):
    space = {"model": {"choices": ["deeper", "wider"]}}
    with pytest.raises(TuningError, match=r"all 2 trials failed, .* because .*'(deeper|wider)'"):
        searched(tmp_path / "s.db", space=space, trials=2)


def test_there_is_no_way_in_for_the_test_window():
    batches = [
        n for n, p in inspect.signature(search).parameters.items() if "Batch" in p.annotation
    ]
    assert batches == ["training", "validation"]


# --- resuming ----------------------------------------------------------------------------------

#: Each trial takes long enough to be killed in.
SLOW = replace(BASE, epochs=3, patience=3, batch_size=16)

SCRIPT = """
import logging, sys
from pathlib import Path
import test_tuning
logging.basicConfig(level=logging.INFO)
test_tuning.searched(Path(sys.argv[1]), test_tuning.SLOW, trials=99)
"""


def _kill_after(line: str, storage: Path) -> None:
    here = Path(__file__).parent
    forks.kill_after(line, "-c", SCRIPT, str(storage), folder=here, seconds=0.1)


@pytest.mark.slow
def test_a_search_that_is_killed_goes_on_and_ends_as_if_it_had_not_been(tmp_path):
    killed = tmp_path / "killed.db"
    for line in ("epoch 1/3", "trial 2 of 99"):  # in the first trial, and in the third
        _kill_after(line, killed)
    resumed = searched(killed, SLOW, trials=5)
    undisturbed = searched(tmp_path / "undisturbed.db", SLOW, trials=5)
    assert len(resumed.trials) == 5
    assert without_seconds(resumed) == without_seconds(undisturbed)


def test_a_finished_search_trains_nothing_and_can_be_extended(tmp_path, caplog):
    storage = tmp_path / "s.db"
    four = searched(storage, trials=4)
    caplog.clear()
    with caplog.at_level("INFO"):
        assert searched(storage, trials=4) == four
    assert "going on after 4 of 4 trials" in caplog.text
    assert "epoch" not in caplog.text
    six = searched(storage, trials=6)
    assert six.trials[:4] == four.trials
    assert searched(storage, trials=4) == four  # whatever else the file holds by now
    assert without_seconds(six) == without_seconds(searched(tmp_path / "other.db", trials=6))


@pytest.mark.parametrize(
    "change",
    [
        {"base": replace(BASE, epochs=1)},
        {"seed": 1},
        {"space": {"deep_learning_rate": {"low": 1e-5, "high": 0.3, "log": True}}},
    ],
)
def test_another_question_is_another_study_of_the_same_file(tmp_path, caplog, change):
    storage = tmp_path / "s.db"
    first = searched(storage, trials=2)
    with caplog.at_level("INFO"):
        searched(storage, **{"trials": 1, **change})
    assert "going on" not in caplog.text
    assert searched(storage, trials=2) == first


def test_other_data_are_another_study(tmp_path):
    config = TuningConfig.model_validate({"space": RATE, "trials": 1})
    label = VALIDATION.label.copy()
    label[7] = 1 - label[7]
    losses = [
        search(LAYOUT, TRAIN, split, BASE, config, "binary", tmp_path / "s.db").best_loss
        for split in (VALIDATION, replace(VALIDATION, label=label))
    ]
    assert losses[0] != losses[1]


def test_where_training_runs_and_a_searched_setting_of_the_base_are_no_other_question(tmp_path):
    storage = tmp_path / "s.db"
    first = searched(storage, trials=2)
    elsewhere = replace(BASE, threads=2, checkpoint_seconds=1.0, deep_learning_rate=0.2)
    assert searched(storage, elsewhere, trials=2) == first


def test_no_trial_begins_when_the_seconds_are_spent(tmp_path):
    storage = tmp_path / "s.db"
    assert len(searched(storage, trials=5, seconds=1e-6).trials) == 1
    assert len(searched(storage, trials=5, seconds=1e-6).trials) == 1  # also when resumed
    assert len(searched(storage, trials=2, seconds=600.0).trials) == 2


# --- what it refuses ---------------------------------------------------------------------------


def test_all_faults_of_a_space_are_named_together():
    space = {
        "hiden": {"choices": [[1], [2]]},
        "seed": {"low": 0, "high": 9, "step": 1},
        "positive_weight": {"low": 1.0, "high": 9.0},
        "threads": {"choices": [1, 2]},
        "dropout": {"low": 0.0, "high": 1.0},
        "wide_l1": {"low": 0.0, "high": 10.0, "log": True},
        "wide_l2": {"low": 2.0, "high": 1.0},
        "epochs": {"low": 1, "high": 4, "step": 2},
        "batch_size": {"low": 256, "high": 4096, "log": True},
        "schedule": {"choices": ["linear", "linear"]},
        "hidden": {"choices": [[64], [0]]},
        "patience": {"low": 0, "high": 3, "step": 0},
        "clip_norm": {"low": 0.0},
        "warmup_steps": {"low": 1, "high": 9, "step": 1, "log": True},
    }
    with pytest.raises(ValidationError) as caught:
        TuningConfig.model_validate({"trials": 0, "space": space})
    text = str(caught.value)
    assert "trials\n" in text
    for fault in (
        "hiden is no setting of training; there are model, hidden, dropout",
        "seed cannot be tuned: what a seed wins by is luck",
        "positive_weight cannot be tuned: it changes what the loss measures",
        "threads cannot be tuned: it says where training runs",
        "training.dropout is 1.0; it must be in [0, 1)",
        "wide_l1: low is 0.0; with log it must be above 0",
        "wide_l2: low is 2.0 and high 1.0; low must be below high",
        "epochs: steps of 2 from 1 do not meet 4",
        "training.batch_size is 256.0; it must be a whole number",
        'schedule: the choice "linear" is there twice',
        "training.hidden is [0]; it must be a list of layer widths",
        "patience.step: Input should be greater than or equal to 1",
        "clip_norm.high: Field required",
        "warmup_steps.log: Extra inputs are not permitted",
    ):
        assert fault in text, fault


@pytest.mark.parametrize("space", [{}, {"dropout": None}, [1], None])
def test_a_search_of_nothing_is_refused(space):
    with pytest.raises(ValidationError, match="space"):
        TuningConfig.model_validate({"space": space})


def test_null_takes_out_what_another_environment_declares():
    config = TuningConfig.model_validate({"space": {**RATE, "dropout": None}})
    assert list(config.space) == ["deep_learning_rate"]
    assert TuningConfig.model_validate(config.model_dump()) == config
