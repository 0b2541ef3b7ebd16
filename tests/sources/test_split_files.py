"""Data that come split, on small files in the format of BARS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fathom.sources import CanonicalTables, SourceConfig, SourceError, fingerprint, read

FILES = {
    "train.csv": "label,user,item,city\n1,7,3,0\n0,7,4,1\n1,8,3,\n",
    "valid.csv": "label,user,item,city\n0.0,8,4,0\n",
    "test.csv": "label,user,item,city\n1.0,9,5,1\n0,7,3,0\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def settings(folder: Path, **more: Any) -> SourceConfig:
    source: dict[str, Any] = {
        "type": "split_files",
        "path": str(folder),
        "user": "user_id",
        "item": "item_id",
        "request": "row_id",
        "columns": {"user_id": "user", "item_id": "item", "city": "city"},
        "label": {"name": "used", "column": "label", "positive": [1], "negative": [0]},
    }
    return SourceConfig.model_validate(source | more)


def splits(folder: Path, **more: Any) -> CanonicalTables:
    return read(settings(folder, **more))


def rows(table: Any, *columns: str) -> list[tuple[Any, ...]]:
    found = table.to_pyarrow().to_pylist()
    return [tuple(str(row[column]) for column in columns) for row in found]


def test_each_split_has_a_day_of_its_own(folder: Path) -> None:
    columns = ("row_id", "user_id", "item_id", "city", "used", "event_timestamp", "partition")
    exposures = splits(folder).exposures
    first, second, third = (f"2000-01-0{day}" for day in (1, 2, 3))
    assert rows(exposures, *columns) == [
        ("train-0", "7", "3", "0", "1", f"{first} 00:00:00", first),
        ("train-1", "7", "4", "1", "0", f"{first} 00:00:00", first),
        ("train-2", "8", "3", "None", "1", f"{first} 00:00:00", first),
        ("validation-0", "8", "4", "0", "0", f"{second} 00:00:00", second),
        ("test-0", "9", "5", "1", "1", f"{third} 00:00:00", third),
        ("test-1", "7", "3", "0", "0", f"{third} 00:00:00", third),
    ]
    assert set(exposures.columns) == {*columns, "inclusion_probability"}


def test_users_and_items_are_those_of_the_files(folder: Path) -> None:
    found = splits(folder)
    assert rows(found.users, "user_id") == [("7",), ("8",), ("9",)]
    assert rows(found.items, "item_id") == [("3",), ("4",), ("5",)]
    assert found.interactions is None
    assert sorted(Path(path).name for path in fingerprint(settings(folder))) == sorted(FILES)


def test_where_nobody_knows_who_saw_what_there_is_one_user_and_one_item(folder: Path) -> None:
    exposures = splits(folder, columns={"city": "city"}).exposures
    assert set(rows(exposures, "user_id", "item_id")) == {("all", "all")}


def test_a_few_of_the_first_rows_will_do_to_try_things_out(folder: Path) -> None:
    exposures = splits(folder, rows=1).exposures
    assert rows(exposures, "row_id") == [("train-0",), ("validation-0",), ("test-0",)]


def test_missing_files_are_named_with_what_is_expected_of_them(folder: Path) -> None:
    for name in ("valid.csv", "test.csv"):
        (folder / name).unlink()
    expected = (
        r"2 faults\n.*valid\.csv: no such file; put your copy there, with a header and the "
        r"columns label, user, item, city, or correct 'path'\n.*test\.csv: no such file"
    )
    with pytest.raises(SourceError, match=expected):
        splits(folder)


def test_a_missing_column_is_named_with_those_that_there_are(folder: Path) -> None:
    (folder / "test.csv").write_text("label,user,item\n1,9,5\n")
    with pytest.raises(SourceError, match=r"test\.csv: no column 'city' \(found: label, user"):
        splits(folder)


def test_lines_with_another_number_of_fields_are_named_by_their_number(folder: Path) -> None:
    (folder / "train.csv").write_text(FILES["train.csv"] + "1,8,4\n1,8,4,2\n0,8,4,1,6\n")
    expected = (
        r"2 faults\n.*train\.csv: line 5 \('1,8,4'\): Expected Number of Columns: 4 Found: 3; .*"
        r"\n.*train\.csv: line 7 \('0,8,4,1,6'\): Expected Number of Columns: 4 Found: 5"
    )
    with pytest.raises(SourceError, match=expected):
        splits(folder)


def test_a_label_needs_a_column(folder: Path) -> None:
    with pytest.raises(ValidationError, match="label needs 'column': the files hold positives"):
        settings(folder, label={"name": "used"})
