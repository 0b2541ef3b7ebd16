"""A generated log of films, with names of its own, as an environment of a project.

Viewers like one of two genres, and films above 100 minutes are watched on television only.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from projects import Project, make_project

SOURCE = """
source:
  type: tables
  user: account_id
  item: film_id
  request: session_id
  partition_by: week
  exposures:
    path: data/00_external/cards
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


HEADER = "viewer,film,shown_at,device,watched_seconds"
FIRST_DAY = np.datetime64("2026-01-01T00:00:00")
FILMS = [
    {"id": f"tt{i}", "genres": ["drama" if i % 2 else "comedy"], "minutes": 80 + 40 * (i // 20)}
    for i in range(40)
]


def cards(rows: int, days: int, tired: tuple[str, str] | None = None) -> list[str]:
    """Lines of a log from `FIRST_DAY` on, by time.

    Args:
        tired: from the first day to the second, excluded, people watch half as much.
    """
    first, end = np.array(tired or (FIRST_DAY, FIRST_DAY), "datetime64[s]")
    draw = np.random.default_rng(0)
    lines = []
    for second in np.sort(draw.integers(0, days * 86_400, rows)):
        viewer, film = int(draw.integers(60)), FILMS[int(draw.integers(40))]
        device = ["tv", "phone"][int(draw.integers(2))]
        likes = (viewer % 2 == 1) == (film["genres"] == ["drama"])
        fits = film["minutes"] < 100 or device == "tv"
        chance = 0.9 if likes and fits else 0.05
        moment = FIRST_DAY + second
        chance /= 2 if first <= moment < end else 1
        seconds = int(draw.integers(60, 900)) if draw.random() < chance else 0
        lines.append(f"{viewer},{film['id']},{moment},{device},{seconds}")
    return lines


def make_films(root: Path, folder: Path, lines: list[str]) -> Project:
    """A project with the environment `films` and, as one file, a log."""
    project = make_project(root, folder)
    external = project.folder / "data/00_external"
    external.mkdir(parents=True)
    (external / "films.jsonl").write_text("\n".join(json.dumps(film) for film in FILMS))
    deliver(project, "first.csv", lines)
    conf = project.folder / "conf/films"
    conf.mkdir()
    (conf / "globals.yml").write_text("data: data/films\n")
    (conf / "parameters.yml").write_text(PARAMETERS)
    (conf / "parameters_source.yml").write_text(SOURCE)
    (conf / "parameters_features.yml").write_text(FEATURES)
    return project


def deliver(project: Project, name: str, lines: list[str]) -> Path:
    """A file of the log, with its header."""
    path = project.folder / "data/00_external/cards" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([HEADER, *lines, ""]))
    return path
