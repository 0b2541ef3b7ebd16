"""What a cross search leaves: lifts, crosses to paste, and a picture."""

from __future__ import annotations

import inspect
import json
from typing import get_type_hints

import ibis
import numpy as np
import pandas as pd
import pytest
import yaml
from kedro.config import OmegaConfigLoader

from fathom.batch import Ragged
from fathom.config import TrainingConfig
from fathom.cross_search import CrossSearchConfig
from fathom.encoding import fit_encoder
from fathom.evaluation import EvaluationConfig
from fathom.pipeline_registry import APART
from fathom.pipelines.cross_search import create_pipeline
from fathom.pipelines.cross_search.nodes import plot_crosses, search_crosses
from fathom.settings import CONF_SOURCE, CONFIG_LOADER_ARGS
from fathom.spec import FeatureSpec
from test_cross_search import TRAINING, benchmark


def table(frame):
    """A frame as the catalog gives it."""
    lists = {
        name: [part.tolist() for part in np.split(values.values, values.offsets[1:-1])]
        for name, values in frame.items()
        if isinstance(values, Ragged)
    }
    return ibis.memtable(pd.DataFrame({**frame, **lists}))


@pytest.fixture(scope="module")
def left():
    log = benchmark.planted_log(15_000, seed=3, planted=[("club", "genre"), ("recent", "genre")])
    encoder = fit_encoder(log.training, benchmark.SPEC)
    inputs = [(table(frame), encoder.encode(frame)) for frame in (log.training, log.validation)]
    return search_crosses(
        encoder,
        *inputs[0],
        *inputs[1],
        TRAINING,
        CrossSearchConfig(),
        EvaluationConfig(resamples=50),
    )


def test_the_yaml_is_the_specs_own_list(left):
    lifts, text = left
    features = yaml.safe_load(text).pop("features")
    raw = benchmark.SPEC.model_dump(mode="json") | features
    crosses = FeatureSpec.model_validate(raw).crosses
    assert {cross.columns for cross in crosses} == {("club", "genre"), ("recent", "genre")}
    assert [list(c.columns) for c in crosses] == [list(c["columns"]) for c in lifts["chosen"]]
    for chosen in lifts["chosen"]:
        assert f"{chosen['lift']:+.5f} ({chosen['lo']:+.5f} to " in text
        assert f"{chosen['rows']:,} rows" in text
    assert f"logloss {lifts['losses']['columns']:.5f} without crosses" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_the_yaml_can_be_copied_to_where_its_comment_says(left, tmp_path, root):
    assert "copy this file to conf/local/parameters_features.yml" in left[1]
    for folder in ("base", "local"):
        (tmp_path / folder).mkdir()
    default = root / CONF_SOURCE / "base" / "parameters_features.yml"
    (tmp_path / "base" / default.name).write_text(default.read_text())
    (tmp_path / "local" / default.name).write_text(left[1])
    conf = OmegaConfigLoader(str(tmp_path), env="local", **CONFIG_LOADER_ARGS)
    features = conf["parameters"]["features"]
    assert features["crosses"] == yaml.safe_load(left[1])["features"]["crosses"]
    assert features["columns"] == yaml.safe_load(default.read_text())["features"]["columns"]


def test_the_lifts_are_plain_json(left):
    lifts = json.loads(json.dumps(left[0], allow_nan=False))
    assert {"chosen", "candidates", "left_out", "stopped", "total", "losses"} <= set(lifts)
    bounds = [candidate["bound"] for candidate in lifts["candidates"]]
    assert bounds == sorted(bounds, reverse=True)


def test_the_plot_shows_what_is_chosen_and_the_best_of_the_others(left):
    lifts = left[0]
    alone, chosen = plot_crosses(lifts).data
    assert list(chosen.y) == [" x ".join(cross["columns"]) for cross in lifts["chosen"]]
    assert list(chosen.x) == [cross["lift"] for cross in lifts["chosen"]]
    lows = np.array(chosen.x) - np.array(chosen.error_x.arrayminus)
    assert lows == pytest.approx([cross["lo"] for cross in lifts["chosen"]])
    assert set(chosen.y) <= set(alone.y)
    assert len(alone.y) == 30
    assert list(alone.x) == sorted(alone.x, reverse=True)


def test_without_a_cross_there_is_an_empty_list_and_a_plot_all_the_same():
    log = benchmark.planted_log(4_000, seed=4, planted=())
    encoder = fit_encoder(log.training, benchmark.SPEC)
    inputs = [(table(frame), encoder.encode(frame)) for frame in (log.training, log.validation)]
    few = CrossSearchConfig(max_candidates=5)
    found, text = search_crosses(
        encoder, *inputs[0], *inputs[1], TRAINING, few, EvaluationConfig(resamples=20)
    )
    assert yaml.safe_load(text) == {"features": {"crosses": []}}
    assert "0 crosses chosen of 5" in plot_crosses(found).layout.title.text


def test_the_pipeline_reads_the_training_and_validation_splits_and_no_other():
    read = {name for name in create_pipeline().inputs() if not name.startswith("params:")}
    splits = ("train_frame", "train_batch", "validation_frame", "validation_batch")
    assert read == {"encoder", *splits}
    assert "cross_search" in APART


@pytest.mark.parametrize("environment", ["base", "test", "movielens", "redis"])
def test_every_environment_declares_a_sound_search(root, environment):
    conf = OmegaConfigLoader(str(root / CONF_SOURCE), env=environment, **CONFIG_LOADER_ARGS)
    assert CrossSearchConfig.model_validate(conf["parameters"]["cross_search"])
    written = {name for node in create_pipeline().nodes for name in node.outputs}
    assert written <= conf["catalog"].keys()


def test_parameters_arrive_validated():
    (node,) = [node for node in create_pipeline().nodes if node.name == "search_crosses"]
    hints = get_type_hints(node.func)
    arguments = dict(zip(node.inputs, inspect.signature(node.func).parameters, strict=True))
    assert hints[arguments["params:cross_search"]] is CrossSearchConfig
    assert hints[arguments["params:training"]] is TrainingConfig
    assert hints[arguments["params:evaluation"]] is EvaluationConfig
