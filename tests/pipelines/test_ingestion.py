"""What a source reads is known before it is read, so that a change of it is noticed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fathom import files
from fathom.pipelines.ingestion.nodes import fingerprint_source
from fathom.sources import SourceConfig


def fingerprint(**source: Any) -> dict[str, str]:
    return fingerprint_source(SourceConfig.model_validate(source))


def log(path: Path) -> dict[str, Any]:
    """Settings of a source whose exposures lie in a folder."""
    exposures = {
        "path": str(path),
        "columns": {"user_id": "viewer", "item_id": "film"},
        "timestamp": {"column": "at", "unit": "s"},
        "label": {"name": "liked", "column": "stars", "at_least": 4},
    }
    keys = {"user": "user_id", "item": "item_id", "request": "request_id"}
    return {"type": "tables", **keys, "exposures": exposures}


def test_a_week_that_is_added_edited_or_removed_shows(tmp_path):
    first, second = tmp_path / "2026-W01.csv", tmp_path / "2026-W02.csv"
    first.write_text("viewer,film,at,stars\n")
    before = fingerprint(**log(tmp_path))
    assert before == {str(first): files.sha256(first)}
    second.write_text("viewer,film,at,stars\nu1,i1,1500000000,5\n")
    assert fingerprint(**log(tmp_path)) == before | {str(second): files.sha256(second)}
    second.unlink()
    assert fingerprint(**log(tmp_path)) == before
    first.write_text("viewer,film,at,stars\nu1,i1,1500000000,5\n")
    assert fingerprint(**log(tmp_path))[str(first)] != before[str(first)]


def test_all_tables_count(tmp_path):
    (tmp_path / "log.csv").write_text("viewer,film,at,stars\n")
    (tmp_path / "films.csv").write_text("id\n")
    items = {"path": str(tmp_path / "films.csv"), "columns": {"item_id": "id"}}
    found = fingerprint(**log(tmp_path / "log.csv"), items=items)
    assert [Path(path).name for path in found] == ["log.csv", "films.csv"]


@pytest.mark.parametrize("names", [("u.data", "u.user", "u.item"), ("ratings.dat", "movies.dat")])
def test_movielens_is_whichever_files_are_there(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("1")
    found = fingerprint(type="movielens", path=str(tmp_path))
    assert sorted(Path(path).name for path in found) == sorted(names)


def test_the_default_data_are_the_files_of_an_installed_package():
    found = fingerprint(type="complete_journey")
    names = sorted(Path(path).stem for path in found)
    assert names == ["demographics", "products", "promotions", "transactions"]


def test_what_is_missing_is_left_for_the_reading_to_say(tmp_path):
    assert fingerprint(**log(tmp_path / "nowhere")) == {}
    assert fingerprint(type="movielens", path=str(tmp_path)) == {}
