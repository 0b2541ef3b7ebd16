"""Another data set, with other column names, by configuration only; then a feature more.

The log is that of `films`. The second run adds a numeric and a categorical feature and their
cross, which is three lines of YAML.
"""

from __future__ import annotations

import json

import pytest

from fathom.ranker import Ranker
from films import FEATURES, cards, make_films

pytestmark = pytest.mark.e2e

# The three lines.
COLUMNS = """
    - {name: minutes, kind: numeric, owner: item, buckets: [100]}
    - {name: device, kind: categorical, owner: context}
"""
CROSSES = """
    - {columns: [minutes, device]}
"""


@pytest.fixture(scope="module")
def project(root, tmp_path_factory):
    return make_films(root, tmp_path_factory.mktemp("films"), cards(rows=6000, days=60))


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
    return {line.split(",")[0] for line in cards(rows=6000, days=60)}


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
