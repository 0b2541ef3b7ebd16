"""Files are read as they are: no value guessed, no line lost, every fault named at once."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import duckdb
import pytest
from pydantic import ValidationError

from fathom.sources.canonical import connect
from fathom.sources.raw_files import UNREADABLE_LINE, RawTable, load


def rows(path: Path, *needed: str, **settings: Any) -> list[tuple[Any, ...]]:
    """The needed columns of a table that is expected to be readable."""
    faults: list[str] = []
    raw = RawTable(path=str(path), columns={}, **settings)
    table = load(connect(), raw, "log", needed, faults)
    assert faults == []
    assert table is not None
    return [tuple(row.values()) for row in table.to_pyarrow().to_pylist()]


def faults(path: Path, *needed: str, **settings: Any) -> list[str]:
    """What is wrong with a table that is expected to be unreadable."""
    found: list[str] = []
    raw = RawTable(path=str(path), columns={}, **settings)
    assert load(connect(), raw, "log", needed, found) is None
    return found


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_csv_values_stay_the_text_that_they_were(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", 'id,note,n\n007,"a, ""b""\nc",1e3\n8,,\n')
    assert rows(file, "id", "n", "note") == [
        ("007", "1e3", 'a, "b"\nc', None),
        ("8", None, None, None),
    ]


def test_a_line_that_is_no_row_is_kept_as_a_whole(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "id,n\n1,2\n3\n4,5,6\n\n7,8\n")
    assert rows(file, "id", "n") == [
        ("1", "2", None),
        ("7", "8", None),
        (None, None, "3"),
        (None, None, "4,5,6"),
    ]


def test_a_quote_that_never_ends_loses_nothing(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", 'id,n\n1,2\n"3,4\n5,6\n')
    assert rows(file, "id") == [("1", None), (None, '"3,4\n5,6\n')]


@pytest.mark.parametrize(
    ("name", "text", "settings"),
    [
        ("a.tsv", "id\tn\n1\t2\n", {}),
        ("a.csv", "\ufeffid,n\r\n1,2\r\n", {}),
        ("a.csv", "id;n\n1;2\n", {"delimiter": ";"}),
        (
            "a.dat",
            "1::2\n",
            {"format": "csv", "delimiter": "::", "quote": "", "names": ["id", "n"]},
        ),
        ("a.dat", "id::n\n1::2\n", {"format": "csv", "delimiter": "::"}),
    ],
)
def test_dialects_of_csv(tmp_path: Path, name: str, text: str, settings: dict[str, Any]) -> None:
    assert rows(write(tmp_path / name, text), "id", "n", **settings) == [("1", "2", None)]


def test_latin_1_is_read_when_it_is_said(tmp_path: Path) -> None:
    file = write(tmp_path / "a.csv", "id,title\n1,Été\n2,ok\n".encode("latin-1"))
    assert rows(file, "title", encoding="latin-1") == [("Été", None), ("ok", None)]
    read_as_utf8 = rows(file, "id", "title")
    assert read_as_utf8[0] == ("2", "ok", None)
    assert read_as_utf8[1][:2] == (None, None), "the other line is kept for quarantine"


def test_files_with_other_orders_of_columns_are_one_table(tmp_path: Path) -> None:
    write(tmp_path / "log/2.csv", "n,id\n4,3\n")
    write(tmp_path / "log/deep/3.csv.gz", gzip.compress(b"id,n\n5,6\n"))
    write(tmp_path / "log/1.csv", "id,n\n1,2\n")
    write(tmp_path / "log/_SUCCESS", "")
    expected = {("1", "2", None), ("3", "4", None), ("5", "6", None)}
    assert set(rows(tmp_path / "log", "id", "n")) == expected
    assert set(rows(tmp_path / "log" / "**" / "*.csv*", "id", "n")) == expected
    assert rows(tmp_path / "log" / "[0-1].csv", "id") == [("1", None)]


def test_json_lines_give_text_and_lists_of_text(tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl",
        '{"id": 12345678901234567890, "tags": ["a", 2], "ok": true}\n'
        '{"tags": "b", "id": "x", "extra": {"deep": [1]}}\n'
        "\n"
        '{"id": null, "tags": null}\n'
        "[1, 2]\n"
        '{"id": 1, "ta',
    )
    assert rows(file, "id", "tags", "ok") == [
        ("12345678901234567890", ["a", "2"], "true", None),
        ("x", ["b"], None, None),
        (None, None, None, None),
        (None, None, None, "[1, 2]"),
        (None, None, None, '{"id": 1, "ta'),
    ]


def test_a_json_column_may_appear_on_a_late_line(tmp_path: Path) -> None:
    lines = ['{"id": 1}'] * 30_000 + ['{"id": 2, "late": ["yes"]}']
    file = write(tmp_path / "a.json", "\n".join(lines))
    assert rows(file, "late")[-1] == (["yes"], None)


def test_parquet_keeps_its_types(tmp_path: Path) -> None:
    duckdb.sql(f"COPY (SELECT 1 AS id, ['a'] AS tags, 2 AS n) TO '{tmp_path / '1.parquet'}'")
    duckdb.sql(f"COPY (SELECT 'x' AS id, 3 AS n, ['b'] AS tags) TO '{tmp_path / '2.parquet'}'")
    assert rows(tmp_path, "id", "tags") == [("1", ["a"]), ("x", ["b"])]


def test_a_name_with_quotes_is_no_sql(tmp_path: Path) -> None:
    file = write(tmp_path / 'it\'s "mine".csv', '"a\'b","c""d"\n1,2\n')
    assert rows(file, "a'b", 'c"d') == [("1", "2", None)]
    lines = write(tmp_path / "it's.jsonl", '{"a\'b": 1, "c\\"d": 2}\n')
    assert rows(lines, "a'b", 'c"d') == [("1", "2", None)]


def test_faults_of_all_files_are_named_together(tmp_path: Path) -> None:
    write(tmp_path / "1.csv", "user,item\n1,2\n")
    write(tmp_path / "2.csv", "")
    write(tmp_path / "3.csv", "id,id,n\n1,2,3\n")
    assert faults(tmp_path, "user", "n") == [
        f"log: {tmp_path / '1.csv'}: no column 'n' (found: user, item); "
        "correct its name in the configuration or the file",
        f"log: {tmp_path / '2.csv'}: is empty, without a header; remove it",
        f"log: {tmp_path / '3.csv'}: no column 'user' (found: id, id, n); "
        "correct its name in the configuration or the file",
        f"log: {tmp_path / '3.csv'}: a column is named twice: id, id, n; rename one",
    ]


def test_a_truncated_parquet_is_named_beside_a_missing_column(tmp_path: Path) -> None:
    whole = tmp_path / "1.parquet"
    duckdb.sql(f"COPY (SELECT range AS user FROM range(1000)) TO '{whole}'")
    write(tmp_path / "2.parquet", whole.read_bytes()[:-10])
    first, second = faults(tmp_path, "user", "item")
    assert "1.parquet: no column 'item' (found: user)" in first
    assert "2.parquet: Invalid Input Error: No magic bytes found at end of file" in second
    assert second.endswith("write the file anew or remove it")


@pytest.mark.parametrize(
    ("name", "content", "settings", "fault"),
    [
        ("gone/log.csv", None, {}, "no such file or folder; put the data there or correct 'path'"),
        ("a.xlsx", "", {}, "cannot tell the format of '.xlsx'; set 'format' to parquet, csv or"),
        ("a.jsonl", '{"user": 1}\n', {}, "no column 'item' (found: user)"),
        ("a.json", '[{"item": 1}, {"item": 2}]\n', {}, "expects one JSON object per line"),
        ("a.csv.gz", gzip.compress(b"item\n" * 9999, mtime=0)[:30], {}, "GZIP"),
        ("a.csv", "item\n1\r\n2\n", {}, "repair the file; its lines may end in different ways"),
        ("a.parquet", "", {}, "too small to be a Parquet file"),
        ("a.parquet", "item\n1\n", {"format": "csv"}, None),
    ],
)
def test_each_fault_has_its_remedy(
    tmp_path: Path, name: str, content: str | None, settings: dict[str, Any], fault: str | None
) -> None:
    file = tmp_path / name
    if content is not None:
        write(file, content)
    if fault is None:
        assert rows(file, "item", **settings) == [("1", None)]
    else:
        assert fault in " ".join(faults(file, "item", **settings))


def test_a_folder_without_data_and_a_mixed_folder_are_faults(tmp_path: Path) -> None:
    assert "no data file in this folder" in faults(tmp_path, "a")[0]
    write(tmp_path / "a.csv", "a\n1\n")
    write(tmp_path / "b.jsonl", '{"a": 1}\n')
    assert "keep to one format per table" in faults(tmp_path, "a")[0]
    assert rows(tmp_path, "a", format="jsonl") == [("1", None)]


def test_only_text_formats_have_a_column_for_unreadable_lines(tmp_path: Path) -> None:
    duckdb.sql(f"COPY (SELECT 1 AS a) TO '{tmp_path / 'a.parquet'}'")
    connection = connect()
    parquet = load(connection, RawTable(path=str(tmp_path), columns={}), "p", ["a"], [])
    file = write(tmp_path / "a.csv", "a\n1\n")
    text = load(connection, RawTable(path=str(file), columns={}), "t", ["a"], [])
    assert parquet is not None
    assert text is not None
    assert (list(parquet.columns), list(text.columns)) == (["a"], ["a", UNREADABLE_LINE])


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        RawTable(path="a.csv", columns={}, seperators={"a": "|"})  # type: ignore[call-arg]
