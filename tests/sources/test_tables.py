"""A data set that needs configuration only: mapping, times, labels, keys and negatives."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from kedro.config import OmegaConfigLoader
from kedro.validation.model_factory import instantiate_model
from pydantic import ValidationError

from fathom.settings import CONFIG_LOADER_ARGS
from fathom.sources import CanonicalTables, SourceConfig, SourceError, read

LOG = """viewer,film,at,stars,device
u1,i1,1500000000,5,tv
u1,i2,1500000000,2,tv
u2,i1,1500090000,4,phone
"""


@pytest.fixture
def configure(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Settings for one log of exposures, written to a file; keywords replace or add to them."""

    def source(log: str = LOG, label: dict[str, Any] | None = None, **other: Any) -> dict[str, Any]:
        (tmp_path / "log.csv").write_text(log)
        exposures = {
            "path": str(tmp_path / "log.csv"),
            "columns": {"user_id": "viewer", "item_id": "film"},
            "timestamp": {"column": "at", "unit": "s"},
            "label": {"name": "liked", "column": "stars", "at_least": 4}
            if label is None
            else label,
        }
        keys = {"user": "user_id", "item": "item_id", "request": "request_id"}
        exposures |= other.pop("exposures", {})
        return {"type": "tables", **keys, "exposures": exposures, **other}

    return source


Configure = Callable[..., dict[str, Any]]


def tables(source: dict[str, Any]) -> CanonicalTables:
    return read(SourceConfig.model_validate(source))


def rows(table: Any, *columns: str) -> list[tuple[Any, ...]]:
    found = table.to_pyarrow().to_pylist()
    return [tuple(row[column] for column in columns or row) for row in found]


def test_a_csv_log_becomes_exposures_in_the_order_of_the_file(configure: Configure) -> None:
    exposures = tables(configure()).exposures
    assert exposures.columns == (
        "request_id",
        "user_id",
        "item_id",
        "event_timestamp",
        "liked",
        "partition",
        "inclusion_probability",
    )
    first, second = "2017-07-14 02:40:00", "2017-07-15 03:40:00"
    assert rows(exposures) == [
        (f"u1@{first}", "u1", "i1", first, "1", "2017-W28", 1.0),
        (f"u1@{first}", "u1", "i2", first, "0", "2017-W28", 1.0),
        (f"u2@{second}", "u2", "i1", second, "1", "2017-W28", 1.0),
    ]


def test_users_and_items_without_a_table_are_the_keys_of_the_logs(
    configure: Configure, tmp_path: Path
) -> None:
    (tmp_path / "clicks.jsonl").write_text('{"u": 7, "f": "i9", "t": 1, "ms": 5}\n{"u": null}\n')
    clicks = {
        "path": str(tmp_path / "clicks.jsonl"),
        "columns": {"user_id": "u", "item_id": "f", "dwell_ms": "ms"},
        "timestamp": {"column": "t", "unit": "s"},
    }
    found = tables(configure(interactions=clicks))
    assert rows(found.users, "user_id") == [("7",), ("u1",), ("u2",)]
    assert rows(found.items, "item_id") == [("i1",), ("i2",), ("i9",)]
    assert rows(found.interactions) == [
        ("7", "i9", "5", "1970-01-01 00:00:01", "1970-W01"),
        (None, None, None, None, "undated"),
    ]


@pytest.mark.parametrize(
    ("size", "names"),
    [
        ("day", ["2017-01-01", "2018-12-31"]),
        ("week", ["2016-W52", "2019-W01"]),
        ("month", ["2017-01", "2018-12"]),
    ],
)
def test_partitions_are_named_by_utc_calendar(
    configure: Configure, size: str, names: list[str]
) -> None:
    """Weeks are those of ISO 8601: 1 January 2017 is of 2016, 31 December 2018 of 2019."""
    log = "viewer,film,at,stars\nu,i,2017-01-01T23:30:00-00:00,4\nu,i,2019-01-01T01:00+02:00,4\n"
    clock = {"timestamp": {"column": "at"}}
    found = tables(configure(log, partition_by=size, exposures=clock)).exposures
    assert [name for (name,) in rows(found, "partition")] == names


@pytest.mark.parametrize(
    ("rule", "labels"),
    [
        ({"at_least": 4}, ["1", "1", "0", "unreadable: x", "unreadable: nan", None]),
        ({"positive": [4, "x"]}, ["1", "1", "0", "1", "0", None]),
        (
            {"positive": [4], "negative": ["x"]},
            ["1", "1", "unreadable: 1", "0", "unreadable: nan", None],
        ),
        ({}, ["4", "4.0", "1", "x", "nan", None]),
    ],
)
def test_what_counts_as_positive(
    configure: Configure, rule: dict[str, Any], labels: list[str | None]
) -> None:
    """A 1 that the rule does not know is no positive: it stays unreadable."""
    stars = ["4", "4.0", "1", "x", "nan", ""]
    log = "viewer,film,at,stars\n" + "".join(f"u,i,{n},{s}\n" for n, s in enumerate(stars))
    found = tables(configure(log, label={"name": "liked", "column": "stars", **rule})).exposures
    assert [label for (label,) in rows(found, "liked")] == labels


def test_yaml_booleans_match_the_text_of_raw_files(configure: Configure) -> None:
    log = "viewer,film,at,stars\nu,i,1,true\nu,j,1,false\nu,k,1,maybe\n"
    rule = {"name": "liked", "column": "stars", "positive": [True], "negative": [False]}
    found = tables(configure(log, label=rule)).exposures
    assert rows(found, "liked") == [("1",), ("0",), ("unreadable: maybe",)]


def test_bad_rows_stay_with_what_was_found(configure: Configure) -> None:
    log = "viewer,film,at,stars\nu,i,tomorrow,5\n,i,1500000000,5\nu,i\nu,i,,\n"
    found = tables(configure(log)).exposures
    columns = ("request_id", "user_id", "event_timestamp", "liked", "partition")
    assert rows(found, *columns) == [
        (None, "u", "unreadable: tomorrow", "1", "undated"),
        (None, None, "2017-07-14 02:40:00", "1", "2017-W28"),
        (None, "u", None, None, "undated"),
        (None, None, "unreadable: u,i", None, "undated"),
    ]


def test_requests_by_day_by_column_or_by_moment(configure: Configure) -> None:
    by_day = tables(configure(request_per="day")).exposures
    assert [r for (r,) in rows(by_day, "request_id")] == [*["u1@2017-07-14"] * 2, "u2@2017-07-15"]
    columns = {"user_id": "viewer", "item_id": "film", "request_id": "device"}
    mapped = tables(configure(exposures={"columns": columns})).exposures
    assert [r for (r,) in rows(mapped, "request_id")] == ["tv", "tv", "phone"]


def test_parquet_keeps_types_and_whole_keys(configure: Configure, tmp_path: Path) -> None:
    """pandas writes whole numbers with a gap as 7.0; the key is 7, as in the other tables."""
    duckdb.sql(
        "COPY (SELECT * FROM (VALUES (7.0::DOUBLE, 'a| b||', TIMESTAMP '2017-06-01 00:00:00', 3), "
        "(7.5, NULL, NULL, NULL)) t(id, tags, since, size)) "
        f"TO '{tmp_path / 'films.parquet'}'"
    )
    films = {
        "path": str(tmp_path / "films.parquet"),
        "columns": {"item_id": "id", "tags": "tags", "size": "size"},
        "separators": {"tags": "|"},
        "timestamp": {"column": "since", "timezone": "Europe/Berlin"},
    }
    items = tables(configure(items=films)).items
    found = [(*row[:3], str(row[3])) for row in rows(items)]
    assert found == [
        ("7", ["a", "b"], 3, "2017-05-31 22:00:00"),
        ("7.5", None, None, "None"),
    ]
    assert str(items.schema()["size"]) == "int32"
    assert items.schema()["event_timestamp"].is_timestamp()


def test_arrival_and_sampling_probability_are_mapped(configure: Configure) -> None:
    log = "viewer,film,at,stars,came,p\nu,i,0,4,86400,0.25\nu,i,0,4,soon,\n"
    exposures = {
        "arrival": {"column": "came", "unit": "s"},
        "columns": {"user_id": "viewer", "item_id": "film", "inclusion_probability": "p"},
    }
    found = tables(configure(log, exposures=exposures)).exposures
    assert rows(found, "arrival_timestamp", "inclusion_probability") == [
        ("1970-01-02 00:00:00", "0.25"),
        ("unreadable: soon", None),
    ]


POSITIVES = {"label": {"name": "bought"}, "negatives": {"per_positive": 3}}


def test_negatives_come_from_items_seen_strictly_before(configure: Configure) -> None:
    """At 20, only i1 (seen at 10) was there: 3 draws from 1. At 30, also i2 and i3, which share
    their moment. i4 and the request's own items are never drawn, nor is anything at 10."""
    log = "viewer,film,at,device\nu1,i1,10,a\nu2,i2,20,b\nu2,i3,20,c\nu1,i4,30,d\n"
    columns = {"user_id": "viewer", "item_id": "film", "device": "device"}
    source = configure(log, **POSITIVES, exposures={"columns": columns})
    exposures = tables(source).exposures
    found = rows(exposures, "user_id", "item_id", "bought", "inclusion_probability", "device")
    assert found[:4] == [
        ("u1", "i1", 1, 1.0, "a"),
        ("u2", "i1", 0, 1.0, "b"),
        ("u2", "i2", 1, 1.0, "b"),
        ("u2", "i3", 1, 1.0, "c"),
    ]
    assert found[-1] == ("u1", "i4", 1, 1.0, "d")
    drawn = found[4:-1]
    assert drawn
    assert {item for _, item, *_ in drawn} <= {"i1", "i2", "i3"}
    probability = 1 - (2 / 3) ** 3  # 3 draws from a pool of 3
    assert all(row[2:] == (0, pytest.approx(probability), "d") for row in drawn)


def test_negatives_leave_bad_rows_alone_and_are_drawn_alike_again(configure: Configure) -> None:
    log = "viewer,film,at\n" + "".join(f"u{n % 7},i{n % 11},{n}\n" for n in range(60))
    source = configure(log + "u1,i1,never\n,i1,70\nu1\n", **POSITIVES)
    first, again = (tables(source).exposures.to_pyarrow() for _ in range(2))
    assert first.equals(again)
    odd = [row for row in first.to_pylist() if row["request_id"] is None]
    assert [row["event_timestamp"] for row in odd] == [
        "1970-01-01 00:01:10",
        "unreadable: never",
        "unreadable: u1",
    ]
    source["negatives"] = {"per_positive": 3, "seed": 1}
    assert not first.equals(tables(source).exposures.to_pyarrow())


@settings(max_examples=15)
@given(
    st.lists(
        st.tuples(st.sampled_from("uvw"), st.sampled_from("abcdef"), st.integers(0, 20)),
        min_size=1,
        max_size=30,
    )
)
def test_no_negative_is_from_the_future_or_from_its_own_request(
    tmp_path_factory: pytest.TempPathFactory, log: list[tuple[str, str, int]]
) -> None:
    file = tmp_path_factory.mktemp("log") / "log.jsonl"
    file.write_text("\n".join(f'{{"u": "{u}", "i": "{i}", "t": {t}}}' for u, i, t in log))
    source = {
        **{"type": "tables", "user": "user", "item": "item", "request": "request"},
        "exposures": {
            "path": str(file),
            "columns": {"user": "u", "item": "i"},
            "timestamp": {"column": "t", "unit": "s"},
            "label": {"name": "y"},
        },
        "negatives": {"per_positive": 2},
    }
    found = tables(source).exposures.to_pyarrow().to_pylist()
    assert sum(row["y"] for row in found) == len(log), "every positive is kept"
    for row in found:
        at = int(row["event_timestamp"][-2:])
        own = {i for u, i, t in log if (u, t) == (row["user"], at)}
        before = {i for _, i, t in log if t < at}
        if row["y"] == 0:
            assert row["item"] in before - own
            draws = 2 * len(own)
            expected = 1 - (1 - 1 / len(before)) ** draws
            assert row["inclusion_probability"] == pytest.approx(expected)


def test_all_missing_files_and_columns_are_named_at_once(configure: Configure) -> None:
    table = {"path": "nowhere/*.parquet", "columns": {"item_id": "id"}}
    columns = {"user_id": "watcher", "item_id": "film"}
    source = configure(items=table, exposures={"columns": columns})
    with pytest.raises(SourceError) as error:
        tables(source)
    assert str(error.value).startswith("source: 2 faults\n  - exposures: ")
    assert "no column 'watcher' (found: viewer, film, at, stars, device)" in error.value.faults[0]
    assert "items: nowhere/*.parquet: no such file or folder" in error.value.faults[1]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"request": "user_id"}, "must differ: user_id, item_id, user_id"),
        ({"users": {"path": "u.csv", "columns": {"x": "y"}}}, "users.columns lacks the key 'user"),
        ({"label": {"name": "liked"}}, "every row is a positive: set 'negatives'"),
        ({"negatives": {}}, "exposures.label reads negatives from the log; remove"),
        ({"exposures": {"separators": {"tags": "|"}}}, "separators names 'tags', which exposures"),
        ({"label": {"name": "y", "at_least": 1}}, "a rule needs 'column'"),
        ({"label": {"name": "y", "column": "s", "negative": ["b"]}}, "'negative' needs 'positive'"),
        (
            {"label": {"name": "y", "column": "s", "at_least": 1, "positive": ["a"]}},
            "'at_least' and 'positive' are two rules; keep one",
        ),
        (
            {"label": {"name": "y", "column": "s", "positive": ["a"], "negative": ["a"]}},
            r"both positive and negative: \['a'\]",
        ),
        ({"label": {"name": "item_id", "column": "film"}}, "label 'item_id' too, which leaks"),
        ({"partition_by": "hour"}, "Input should be 'day', 'week' or 'month'"),
    ],
)
def test_a_contradiction_in_the_settings_is_named(
    configure: Configure, change: dict[str, Any], fault: str
) -> None:
    with pytest.raises(ValidationError, match=fault):
        tables(configure(**change))


def test_reserved_names_and_several_faults_are_reported_together(configure: Configure) -> None:
    columns = {"user_id": "viewer", "event_timestamp": "at", "partition": "p"}
    with pytest.raises(ValidationError) as error:
        tables(configure(exposures={"columns": columns}))
    for part in ("lacks the key 'item_id'", "'event_timestamp', which", "'partition', which"):
        assert part in str(error.value)
    columns = {"user_id": "viewer", "item_id": "film", "inclusion_probability": "p"}
    source = configure(**POSITIVES, exposures={"columns": columns})
    with pytest.raises(ValidationError, match="'negatives' fills 'inclusion_probability'"):
        tables(source)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ("base", "complete_journey"),
        ("test", "complete_journey"),
        ("movielens", "movielens"),
        ("autoint_movielens", "autoint_movielens"),
        ("criteo_x1", "split_files"),
        ("frappe_x1", "split_files"),
        ("leave_one_out", "leave_one_out"),
    ],
)
def test_kedro_builds_the_settings_of_every_environment(
    root: Path, environment: str, expected: str
) -> None:
    """Environments are merged key by key, so that none may inherit another source's settings."""
    loader = OmegaConfigLoader(
        conf_source=str(root / "conf"), env=environment, **CONFIG_LOADER_ARGS
    )
    source = instantiate_model("source", loader["parameters"]["source"], SourceConfig)
    assert isinstance(source, SourceConfig)
    assert source.root.type == expected


def test_an_unknown_source_is_refused_with_the_known_ones() -> None:
    known = "'complete_journey', 'leave_one_out', 'movielens', 'split_files', 'tables'"
    with pytest.raises(ValidationError, match=known):
        SourceConfig.model_validate({"type": "netflix"})


def test_the_example_of_the_guide_works(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (root / "docs" / "how-to" / "use-your-own-data.md").read_text()
    source = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", guide, re.S)[0])["source"]
    monkeypatch.chdir(tmp_path)
    folder = Path("data/00_external")
    (folder / "cards").mkdir(parents=True)
    (folder / "cards" / "2026-03-01.csv").write_text(
        "viewer,film,shown_at,device,watched_seconds\n17,tt0111161,2026-03-01 20:15:04,tv,312\n"
    )
    (folder / "films.jsonl").write_text('{"id": "tt0111161", "genres": ["drama"], "minutes": 142}')
    duckdb.sql(
        "COPY (SELECT 17 AS id, 'DE' AS country, TIMESTAMP '2025-01-01' AS opened) "
        f"TO '{folder / 'accounts.parquet'}'"
    )
    found = tables(source)
    shown = "2026-03-01 19:15:04"  # Berlin is an hour ahead in winter
    assert rows(found.exposures) == [
        (f"17@{shown}", "17", "tt0111161", "tv", shown, "1", "2026-W09", 1.0)
    ]
    assert rows(found.items, "film_id", "genres", "minutes") == [("tt0111161", ["drama"], "142")]
    assert rows(found.users, "account_id", "country") == [("17", "DE")]
