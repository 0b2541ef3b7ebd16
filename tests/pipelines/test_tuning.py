"""What a search leaves: trials, settings to paste, and a picture."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import SimpleNamespace
from typing import get_type_hints

import pytest
import yaml
from kedro.config import OmegaConfigLoader

from fathom.config import TrainingConfig
from fathom.pipelines.tuning import create_pipeline
from fathom.pipelines.tuning.nodes import plot_tuning, tune
from fathom.settings import CONF_SOURCE, CONFIG_LOADER_ARGS
from fathom.tuning import TuningConfig
from test_tuning import BASE, LAYOUT, TRAIN, VALIDATION

TUNING = TuningConfig.model_validate(
    {
        "trials": 3,
        "space": {
            "deep_learning_rate": {"low": 0.001, "high": 0.3, "log": True},
            "dropout": {"low": 0.0, "high": 0.4},
            "hidden": {"choices": [[8], [16, 8]]},
        },
    }
)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    encoder = SimpleNamespace(layout=LAYOUT, spec=SimpleNamespace(task="binary"))
    storage = tmp_path_factory.mktemp("tuning") / "tuning.db"
    return tune(encoder, TRAIN, VALIDATION, BASE, TUNING, str(storage))


def test_the_yaml_is_the_base_with_the_best_settings_in_it(tuned):
    trials, text = tuned
    best = min(trials, key=lambda trial: trial["validation_loss"])
    settings = yaml.safe_load(text)
    assert TrainingConfig(**settings.pop("training")) == replace(BASE, **best["settings"])
    assert settings == {}
    assert f"validation loss {best['validation_loss']:.5f}, the best of 3 trials" in text


def test_the_yaml_can_be_copied_to_where_its_comment_says(tuned, tmp_path, root):
    (tmp_path / "base").mkdir()
    (tmp_path / "local").mkdir()
    default = root / CONF_SOURCE / "base" / "parameters_training.yml"
    (tmp_path / "base" / default.name).write_text(default.read_text())
    assert "copy this file to conf/local/parameters_training.yml" in tuned[1]
    (tmp_path / "local" / "parameters_training.yml").write_text(tuned[1])
    conf = OmegaConfigLoader(str(tmp_path), env="local", **CONFIG_LOADER_ARGS)
    found = TrainingConfig(**conf["parameters"]["training"])
    assert found == TrainingConfig(**yaml.safe_load(tuned[1])["training"])


def test_the_plot_has_a_panel_for_each_setting_on_the_axis_that_it_was_drawn_on(tuned):
    figure = plot_tuning(tuned[0], TUNING)
    titles = [annotation.text for annotation in figure.layout.annotations]
    assert titles == ["validation loss by trial", "deep_learning_rate", "dropout", "hidden"]
    axes = [figure.layout[name].type for name in ("xaxis2", "xaxis3", "xaxis4")]
    assert axes == ["log", "linear", "category"]
    panels = {trace.name: list(trace.x) for trace in figure.data}
    assert panels["dropout"] == [trial["settings"]["dropout"] for trial in tuned[0]]
    assert set(panels["hidden"]) <= {"[8]", "[16, 8]"}


def test_the_line_of_the_plot_is_the_best_so_far_without_trials_that_failed():
    losses = [0.5, 0.6, None, 0.4]
    trials = [
        {
            "number": number,
            "settings": {"deep_learning_rate": 0.1, "dropout": 0.0, "hidden": [8]},
            "validation_loss": loss,
            "state": "failed" if loss is None else "complete",
        }
        for number, loss in enumerate(losses)
    ]
    figure = plot_tuning(trials, TUNING)
    (best,) = [trace for trace in figure.data if trace.name == "best"]
    assert (list(best.x), list(best.y)) == ([1, 2, 4], [0.5, 0.5, 0.4])
    assert figure.layout.title.text == "Tuning: 3 trials, 1 failed"


def test_the_pipeline_reads_the_training_and_validation_splits_and_no_other():
    read = {name for name in create_pipeline().inputs() if not name.startswith("params:")}
    assert read == {"encoder", "train_batch", "validation_batch"}


@pytest.mark.parametrize("environment", ["base", "test", "movielens", "redis"])
def test_every_environment_declares_a_sound_search(root, environment):
    conf = OmegaConfigLoader(str(root / CONF_SOURCE), env=environment, **CONFIG_LOADER_ARGS)
    assert TuningConfig.model_validate(conf["parameters"]["tuning"])
    written = set(create_pipeline().outputs()) | {"tuning_trials"}
    assert written <= conf["catalog"].keys()


@pytest.mark.parametrize("node", create_pipeline().nodes, ids=lambda node: node.name)
def test_parameters_arrive_validated(node):
    hints = get_type_hints(node.func)
    for dataset, argument in zip(node.inputs, inspect.signature(node.func).parameters, strict=True):
        if dataset == "params:tuning":
            assert hints[argument] is TuningConfig
        if dataset == "params:training":
            assert hints[argument] is TrainingConfig
