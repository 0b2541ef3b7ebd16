"""Another data set, with other column names, by configuration only; then a feature more.

A generated log of films: viewers like one of two genres, and films above 100 minutes are watched
on television only. The second run adds a numeric and a categorical feature and their cross, which
is three lines of YAML.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fathom.ranker import Ranker
from projects import make_project

pytestmark = pytest.mark.e2e

SOURCE = """
source:
  type: tables
  user: account_id
  item: film_id
  request: session_id
  partition_by: week
  exposures:
    path: data/00_external/cards.csv
    columns: {account_id: viewer, film_id: film, device: device}
    timestamp: {column: shown_at}
    label: {name: watched, column: watched_seconds, at_least: 60}
  items:
    path: data/00_external/films.jsonl
    columns: {film_id: id, genres: genres, minutes: minutes}
"""

FEATURES = """
features:
  entities: {user: account_id, item: film_id, request: session_id}
  label: {name: watched, values: [0, 1]}
  grain_days: 1
  grain_origin: "1970-01-01T00:00:00Z"
  columns:
    - {name: account_id, kind: categorical, owner: user, embedding: 4}
    - {name: genres, kind: multi, owner: item, embedding: 4}
    - {name: shown, kind: numeric, aggregate: {of: exposures, by: [film_id], measure: count}}
    - {name: seen, kind: numeric, aggregate: {by: [account_id, film_id], measure: count}}
    # more columns
  crosses:
    - {columns: [account_id, genres]}
    # more crosses
"""

# The three lines.
COLUMNS = """
    - {name: minutes, kind: numeric, owner: item, buckets: [100]}
    - {name: device, kind: categorical, owner: context}
"""
CROSSES = """
    - {columns: [minutes, device]}
"""

PARAMETERS = """
split: {train_from: "2026-01-05", validation_from: "2026-02-10", test_from: "2026-02-20"}
training: {hidden: [8], epochs: 3, batch_size: 256, wide_l1: 0.1, wide_learning_rate: 0.1}
validation: {earliest: "2025-01-01", tables: {interactions: {rules: []}}}
baselines: {boosting_iterations: 10}
evaluation: {resamples: 20, min_slice_rows: 100}
monitoring: {min_rows: 100, sample_rows: 1000}
window: {days: 7}
release: {golden_rows: 8, reference_rows: 500, seed: 0}
"""


def _write_data(folder: Path) -> None:
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True)
    films = [
        {"id": f"tt{i}", "genres": ["drama" if i % 2 else "comedy"], "minutes": 80 + 40 * (i // 20)}
        for i in range(40)
    ]
    (folder / "films.jsonl").write_text("\n".join(json.dumps(film) for film in films))
    lines = ["viewer,film,shown_at,device,watched_seconds"]
    start = np.datetime64("2026-01-01T00:00:00")
    for second in np.sort(draw.integers(0, 60 * 86_400, 6000)):
        viewer, film = int(draw.integers(60)), films[int(draw.integers(40))]
        device = ["tv", "phone"][int(draw.integers(2))]
        likes = (viewer % 2 == 1) == (film["genres"] == ["drama"])
        fits = film["minutes"] < 100 or device == "tv"
        chance = 0.9 if likes and fits else 0.05
        seconds = int(draw.integers(60, 900)) if draw.random() < chance else 0
        lines.append(f"{viewer},{film['id']},{start + second},{device},{seconds}")
    (folder / "cards.csv").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def project(root, tmp_path_factory):
    project = make_project(root, tmp_path_factory.mktemp("films"))
    _write_data(project.folder / "data/00_external")
    conf = project.folder / "conf/films"
    conf.mkdir()
    (conf / "globals.yml").write_text("data: data/films\n")
    (conf / "parameters.yml").write_text(PARAMETERS)
    (conf / "parameters_source.yml").write_text(SOURCE)
    (conf / "parameters_features.yml").write_text(FEATURES)
    return project


def _candidate(project) -> Ranker:
    return Ranker.load(project.folder / "data/films/06_models/candidate")


def _auc(project) -> float:
    metrics = json.loads((project.folder / "data/films/08_reporting/metrics.json").read_text())
    return metrics["candidate"]["auc"]


def test_configuration_alone_takes_a_new_data_set_through_the_loop(project):
    done = project.forked("run", "--env", "films")
    assert done.returncode == 0, done.stderr[-4000:]
    summary = json.loads((project.folder / "data/films/08_reporting/run_summary.json").read_text())
    assert summary["rows"]["in"] == 6000 + 40 + len(_viewers(project))
    assert summary["gate"]["promoted"], summary["gate"]["reasons"]
    assert _auc(project) > 0.8  # the viewers' genres


def _viewers(project) -> set[str]:
    lines = (project.folder / "data/00_external/cards.csv").read_text().splitlines()[1:]
    return {line.split(",")[0] for line in lines}


def test_three_lines_of_yaml_add_two_features_and_their_cross(project):
    before, auc_before = _candidate(project), _auc(project)
    features = FEATURES.replace("    # more columns", COLUMNS.strip("\n"))
    features = features.replace("    # more crosses", CROSSES.strip("\n"))
    added = [line for line in features.splitlines() if line not in FEATURES.splitlines()]
    assert len(added) == 3
    (project.folder / "conf/films/parameters_features.yml").write_text(features)
    done = project.forked(
        *("run", "--env", "films"),
        *("--pipelines", "validation,features,feature_store,training,evaluation"),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    after = _candidate(project)
    assert "minutes_x_device" in after.encoder.wide_slots
    assert after.encoder.layout.deep_width == before.encoder.layout.deep_width + 2 + 8
    assert _auc(project) > auc_before + 0.05  # what only the cross can know
