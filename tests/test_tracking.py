"""What a training reports is what TensorBoard shows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from fathom.config import TrainingConfig
from fathom.tracking import TrackingConfig, TrackingError, reporting

TRAINING = TrainingConfig(model="deep")


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (run,) = folder.iterdir()
    assert run.name.startswith("deep-")
    events = EventAccumulator(str(run))
    events.Reload()
    tags = events.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}


def test_losses_are_kept_by_step_and_a_resumed_run_goes_on_in_its_lines(tmp_path: Path):
    config = TrackingConfig(to="tensorboard", folder=str(tmp_path))
    for steps in ([(10, 0.5)], [(20, 0.25)]):
        with reporting(config, TRAINING) as report:
            assert report is not None
            for step, loss in steps:
                report("train_loss", loss, step)
    assert scalars(tmp_path) == {"train_loss": [(10, 0.5), (20, 0.25)]}


def test_nothing_is_tracked_unless_asked_for(tmp_path: Path):
    with reporting(TrackingConfig(folder=str(tmp_path)), TRAINING) as report:
        assert report is None
    assert not list(tmp_path.iterdir())


def test_without_tensorboard_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = TrackingConfig(to="tensorboard", folder=str(tmp_path))
    with (
        pytest.raises(
            TrackingError,
            match=r"tracking\.to is 'tensorboard', which cannot be imported .*; run pip install -e "
            r"'\.\[tracking\]', or set it to 'nothing'",
        ),
        reporting(config, TRAINING),
    ):
        pass


def test_only_what_is_known_can_be_asked_for():
    with pytest.raises(ValidationError, match="'nothing' or 'tensorboard'"):
        TrackingConfig.model_validate({"to": "wandb"})
