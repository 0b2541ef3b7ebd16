"""Settings: every bound's message, all faults together, and moments in order."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import yaml

from fathom.config import ConfigError, SplitConfig, TrainingConfig

ROOT = Path(__file__).resolve().parents[1]
NAN, INFINITY = float("nan"), float("inf")

NOT_WHOLE = [-1, 1.0, "1", None, True, NAN]
NOT_ABOVE_ZERO = [0, 0.0, -0.1, "0.1", None, True, NAN, INFINITY]
NEGATIVE = [-0.1, -1, "0", None, True, False, NAN, INFINITY]

BOUNDS: dict[str, tuple[str, list[Any], list[Any]]] = {
    # setting: its bound in words, values outside it, values inside it
    "batch_size": ("a whole number of 1 or more", [0, *NOT_WHOLE], [1, 2**20]),
    "epochs": ("a whole number of 1 or more", [0, *NOT_WHOLE], [1, 100]),
    "patience": ("a whole number of 0 or more", NOT_WHOLE, [0, 3]),
    "seed": ("a whole number of 0 or more", NOT_WHOLE, [0, 2**32]),
    "threads": ("a whole number of 0 or more", NOT_WHOLE, [0, 2]),
    "wide_learning_rate": ("a finite number above 0", NOT_ABOVE_ZERO, [1e-9, 1]),
    "embedding_learning_rate": ("a finite number above 0", NOT_ABOVE_ZERO, [1e-9, 1]),
    "deep_learning_rate": ("a finite number above 0", NOT_ABOVE_ZERO, [1e-9, 1]),
    "wide_l1": ("a finite number of 0 or more", NEGATIVE, [0, 0.0, 2.5]),
    "wide_l2": ("a finite number of 0 or more", NEGATIVE, [0, 0.0, 2.5]),
    "embedding_l1": ("a finite number of 0 or more", NEGATIVE, [0, 0.0, 2.5]),
    "embedding_l2": ("a finite number of 0 or more", NEGATIVE, [0, 0.0, 2.5]),
    "embedding_group_l1": ("a finite number of 0 or more", NEGATIVE, [0, 0.0, 2.5]),
    "clip_norm": ("a finite number of 0 or more", NEGATIVE, [0, 0.0, 2.5]),
    "checkpoint_seconds": ("a finite number of 0 or more", NEGATIVE, [0, 0.0, 2.5]),
    "positive_weight": ("a finite number above 0", NOT_ABOVE_ZERO, [0.1, 3]),
    "warmup_steps": ("a whole number of 0 or more", NOT_WHOLE, [0, 100]),
    "shuffle_rows": ("a whole number of 1 or more", [0, *NOT_WHOLE], [1, 2**20]),
    "cross_layers": ("a whole number of 1 or more", [0, *NOT_WHOLE], [1, 6]),
    "cross_rank": ("a whole number of 0 or more", NOT_WHOLE, [0, 64]),
    "cross_experts": ("a whole number of 1 or more", [0, *NOT_WHOLE], [1, 8]),
    "factors": ("a whole number of 1 or more", [0, *NOT_WHOLE], [1, 64]),
    "attention_width": ("a whole number of 1 or more", [0, *NOT_WHOLE], [1, 36]),
    "activation": (
        "'dice', 'prelu' or 'relu'",
        ["tanh", "Dice", "", None, 0],
        ["dice", "prelu", "relu"],
    ),
    "embedding_optimizer": (
        "'adagrad', 'rowwise_adagrad' or 'ftrl'",
        ["adam", "", None, 0, ["ftrl"]],
        ["adagrad", "rowwise_adagrad", "ftrl"],
    ),
    "schedule": (
        "'linear', 'cosine' or 'constant'",
        ["step", "", None, 0],
        ["linear", "cosine", "constant"],
    ),
    "precision": (
        "'float32' or 'bfloat16'",
        ["float16", "bf16", "", None, 32],
        ["float32", "bfloat16"],
    ),
    "use_weights": ("True or False", [1, 0, None, "yes"], [True, False]),
    "shard_tables": ("True or False", [1, 0, None, "yes"], [True, False]),
    "final_rate": ("in (0, 1]", [*NOT_ABOVE_ZERO, 1.01], [1e-9, 1, 1.0]),
    "dropout": ("in [0, 1)", [*NEGATIVE, 1, 1.0], [0, 0.0, 0.999]),
    "cool_down": ("in [0, 1)", [*NEGATIVE, 1, 1.0], [0, 0.0, 0.999]),
    "hidden": (
        "a list of layer widths of 1 or more",
        [[0], [64, -1], [64.0], ["64"], [True], 64, "64", None, {64: 1}],
        [[], [1], [256, 128]],
    ),
    "device": ("'auto', 'cpu' or 'cuda'", ["gpu", "", None, 0, ["cpu"]], ["auto", "cpu", "cuda"]),
}


def cases(inside: bool) -> list[tuple[str, Any]]:
    return [
        (name, value)
        for name, (_, out, within) in BOUNDS.items()
        for value in (within if inside else out)
    ]


def test_every_setting_but_the_models_name_has_a_bound() -> None:
    """The name is checked where the models are (`fathom.models`)."""
    assert {field.name for field in fields(TrainingConfig)} == {*BOUNDS, "model"}


@pytest.mark.parametrize(("name", "value"), cases(inside=False))
def test_a_setting_out_of_bounds_is_named_with_its_value_and_its_bound(
    name: str, value: Any
) -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(**{name: value})
    assert str(caught.value) == f"training.{name} is {value!r}; it must be {BOUNDS[name][0]}"


@pytest.mark.parametrize(("name", "value"), cases(inside=True))
def test_a_setting_within_its_bound_is_taken_as_it_is(name: str, value: Any) -> None:
    expected = tuple(value) if name == "hidden" else value
    assert getattr(TrainingConfig(**{name: value}), name) == expected


def test_all_faults_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(epochs=0, dropout=1.5, hidden=(0,), device="tpu")
    assert str(caught.value).split("; training.") == [
        "training.epochs is 0; it must be a whole number of 1 or more",
        "device is 'tpu'; it must be 'auto', 'cpu' or 'cuda'",
        "hidden is [0]; it must be a list of layer widths of 1 or more",
        "dropout is 1.5; it must be in [0, 1)",
    ]


def test_settings_are_frozen_and_survive_as_plain_values() -> None:
    config = TrainingConfig(hidden=[32, 16], seed=7)  # type: ignore[arg-type]
    with pytest.raises(FrozenInstanceError):
        config.seed = 8  # type: ignore[misc]
    plain = config.as_dict()
    assert plain["hidden"] == [32, 16]
    assert TrainingConfig(**yaml.safe_load(yaml.safe_dump(plain))) == config


# -- the split ------------------------------------------------------------------------------------


def split(**replaced: Any) -> SplitConfig:
    moments = {
        "train_from": "2017-02-27T05:00:00Z",
        "validation_from": "2017-10-02",
        "test_from": "2017-10-30T00:00:00-04:00",
    }
    return SplitConfig(**moments | replaced)


def test_spans_are_left_out_as_moments() -> None:
    found = split(without=[["2017-05-01", "2017-05-07T23:59:59Z"]])
    assert found.spans == [
        (
            datetime(2017, 5, 1, tzinfo=timezone.utc),
            datetime(2017, 5, 7, 23, 59, 59, tzinfo=timezone.utc),
        )
    ]
    assert split().spans == []


@pytest.mark.parametrize("span", [["2017-05-07", "2017-05-01"], ["2017-05-07"], ["May", "June"]])
def test_a_span_is_two_moments_that_do_not_fall(span: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"split.without has .* two ISO 8601 moments that do not"):
        split(without=[span])


@pytest.fixture
def tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose clock is not in UTC."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("tokyo")
def test_boundaries_are_moments_in_utc_unless_they_say_otherwise() -> None:
    config = split()
    assert config.moment("train_from") == datetime(2017, 2, 27, 5, tzinfo=timezone.utc)
    assert config.moment("validation_from") == datetime(2017, 10, 2, tzinfo=timezone.utc)
    new_york = timezone(timedelta(hours=-4))
    assert config.moment("test_from") == datetime(2017, 10, 30, tzinfo=new_york)


@pytest.mark.parametrize(
    "value", ["soon", "", "2017-13-01", "30.10.2017", 20171030, None, datetime(2017, 10, 30)]
)
def test_a_boundary_that_is_no_moment_is_named(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        split(test_from=value)
    assert str(caught.value) == (
        f"split.test_from is {value!r}; it must be an ISO 8601 moment, as 2017-10-30T04:00:00Z"
    )


def test_all_boundaries_that_are_no_moments_are_named_together() -> None:
    with pytest.raises(ConfigError) as caught:
        split(train_from="then", test_from="soon")
    assert str(caught.value).count("must be an ISO 8601 moment") == 2
    for name in ("train_from is 'then'", "test_from is 'soon'"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "replaced",
    [
        {"train_from": "2017-10-02"},  # equal: no training rows
        {"train_from": "2018-01-01"},
        {"validation_from": "2017-10-30T04:00:00Z"},  # equal, written in another zone
        {"test_from": "2017-01-01"},
    ],
)
def test_boundaries_must_rise(replaced: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="split must rise: train_from 201") as caught:
        split(**replaced)
    for value in replaced.values():
        assert value in str(caught.value)


def test_boundaries_are_compared_as_moments_and_not_as_text() -> None:
    # As text, "…T23…-05:00" comes before "…T01…+00:00" of the next day; as a moment, after it.
    with pytest.raises(ConfigError, match=re.escape("2017-10-01T23:00:00-05:00")):
        split(train_from="2017-10-01T23:00:00-05:00", validation_from="2017-10-02T01:00:00Z")


def test_the_deployments_settings_hold() -> None:
    conf = ROOT / "conf" / "base"
    training = yaml.safe_load((conf / "parameters_training.yml").read_text())
    assert TrainingConfig(**training["training"])
    parameters = yaml.safe_load((conf / "parameters.yml").read_text())
    assert SplitConfig(**parameters["split"])
