"""MovieLens in both published layouts, on small files in exactly those formats."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fathom.sources import CanonicalTables, SourceConfig, SourceError, read

TOY_STORY, SEVEN_YEARS, CITY, UNKNOWN = "1", "2", "3", "4"
FLAGS_100K = {  # unknown, Action, Adventure, Animation, Children's, Comedy, …, Western
    TOY_STORY: "0|0|0|1|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0",
    SEVEN_YEARS: "0|0|0|0|0|0|0|0|1|0|0|0|0|0|0|0|0|1|0",
    CITY: "0|0|1|0|0|1|0|0|0|0|0|0|0|0|0|1|0|0|0",
    UNKNOWN: "1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0",
}


def write(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_bytes(text.encode("latin-1"))
    return folder


@pytest.fixture
def layout_100k(tmp_path: Path) -> Path:
    films = {
        TOY_STORY: "Toy Story (1995)|01-Jan-1995||http://us.imdb.com/M/title-exact?Toy%20Story",
        SEVEN_YEARS: 'Seven "Years", in Tibet (1997)|01-Jan-1997||http://us.imdb.com/',
        CITY: "Cité des enfants perdus, La (1995)|01-Jan-1995||http://us.imdb.com/",
        UNKNOWN: "unknown|||",
    }
    return write(
        tmp_path / "ml-100k",
        {
            "u.data": "196\t1\t3\t881250949\n186\t2\t4\t881250950\n186\t3\t5\t881251000\n"
            "22\t4\t1\t878887116\n22\t1\tbad\t878887116\n",
            "u.item": "".join(f"{i}|{film}|{FLAGS_100K[i]}\n" for i, film in films.items()),
            "u.user": "22|25|M|writer|40206\n186|39|F|executive|\n196|49|M|none|T8H1N\n",
        },
    )


@pytest.fixture
def layout_1m(tmp_path: Path) -> Path:
    return write(
        tmp_path / "ml-1m",
        {
            "ratings.dat": "1::1::5::978300760\n1::2::3::978302109\n2::3::4::978298413\n",
            "movies.dat": "1::Toy Story (1995)::Animation|Children's|Comedy\n"
            "2::Seven Years in Tibet, 'The' (1997)::Drama|War\n"
            "3::Cité des enfants perdus, La (1995)::Adventure|Sci-Fi\n",
            "users.dat": "1::F::1::10::48067\n2::M::56::16::\n",
        },
    )


def movielens(folder: Path, **settings: Any) -> CanonicalTables:
    return read(SourceConfig.model_validate({"type": "movielens", "path": str(folder), **settings}))


def rows(table: Any, *columns: str) -> list[tuple[Any, ...]]:
    found = table.to_pyarrow().to_pylist()
    return [tuple(row[column] for column in columns) for row in found]


def test_ratings_of_100k_are_exposures(layout_100k: Path) -> None:
    tables = movielens(layout_100k)
    columns = ("session_id", "user_id", "movie_id", "event_timestamp", "liked")
    assert rows(tables.exposures, *columns) == [
        ("196@1997-12-04", "196", TOY_STORY, "1997-12-04 15:55:49", "0"),
        ("186@1997-12-04", "186", SEVEN_YEARS, "1997-12-04 15:55:50", "1"),
        ("186@1997-12-04", "186", CITY, "1997-12-04 15:56:40", "1"),
        ("22@1997-11-07", "22", UNKNOWN, "1997-11-07 07:18:36", "0"),
        ("22@1997-11-07", "22", TOY_STORY, "1997-11-07 07:18:36", "unreadable: bad"),
    ]
    extra = rows(tables.exposures, "inclusion_probability", "partition")
    assert set(extra) == {(1.0, "1997-12"), (1.0, "1997-11")}
    assert set(tables.exposures.columns) == {*columns, "inclusion_probability", "partition"}
    assert tables.interactions is None


def test_films_of_100k_have_year_and_genres(layout_100k: Path) -> None:
    assert rows(movielens(layout_100k).items, "movie_id", "title", "year", "genres") == [
        (TOY_STORY, "Toy Story (1995)", 1995.0, ["Animation", "Children's", "Comedy"]),
        (SEVEN_YEARS, 'Seven "Years", in Tibet (1997)', 1997.0, ["Drama", "War"]),
        (
            CITY,
            "Cité des enfants perdus, La (1995)",
            1995.0,
            ["Adventure", "Comedy", "Sci-Fi"],
        ),
        (UNKNOWN, "unknown", None, []),
    ]


def test_users_of_100k_keep_what_is_known(layout_100k: Path) -> None:
    columns = ("user_id", "gender", "age", "occupation", "zip", "event_timestamp")
    always = "1970-01-01 00:00:00"
    assert rows(movielens(layout_100k).users, *columns) == [
        ("22", "M", "25", "writer", "40206", always),
        ("186", "F", "39", "executive", None, always),
        ("196", "M", "49", "none", "T8H1N", always),
    ]


def test_the_1m_layout_gives_the_same_tables(layout_1m: Path, layout_100k: Path) -> None:
    tables, other = movielens(layout_1m), movielens(layout_100k)
    for name in ("exposures", "users", "items"):
        assert getattr(tables, name).schema() == getattr(other, name).schema()
    assert rows(tables.exposures, "session_id", "movie_id", "liked", "event_timestamp") == [
        ("1@2000-12-31", "1", "1", "2000-12-31 22:12:40"),
        ("1@2000-12-31", "2", "0", "2000-12-31 22:35:09"),
        ("2@2000-12-31", "3", "1", "2000-12-31 21:33:33"),
    ]
    assert rows(tables.items, "title", "year", "genres") == [
        ("Toy Story (1995)", 1995.0, ["Animation", "Children's", "Comedy"]),
        ("Seven Years in Tibet, 'The' (1997)", 1997.0, ["Drama", "War"]),
        ("Cité des enfants perdus, La (1995)", 1995.0, ["Adventure", "Sci-Fi"]),
    ]
    assert rows(tables.users, "user_id", "gender", "age", "occupation", "zip") == [
        ("1", "F", "1", "10", "48067"),
        ("2", "M", "56", "16", None),
    ]


def test_the_threshold_is_a_setting_and_without_one_the_label_is_the_rating(
    layout_1m: Path,
) -> None:
    strict = movielens(layout_1m, positive_from=5).exposures
    assert rows(strict, "liked") == [("1",), ("0",), ("0",)]
    numeric = movielens(layout_1m, positive_from=None).exposures
    assert rows(numeric, "rating") == [("5",), ("3",), ("4",)]
    assert "liked" not in numeric.columns


def test_a_line_with_a_missing_field_goes_on_to_quarantine(layout_1m: Path) -> None:
    with (layout_1m / "ratings.dat").open("a") as file:
        file.write("2::1\n")
    found = rows(movielens(layout_1m).exposures, "user_id", "event_timestamp", "partition")
    assert found[-1] == (None, "unreadable: 2::1", "undated")
    assert len(found) == 4


def test_what_is_missing_of_a_layout_is_named(layout_100k: Path, tmp_path: Path) -> None:
    (layout_100k / "u.user").unlink()
    (layout_100k / "u.item").unlink()
    with pytest.raises(SourceError, match=r"2 faults\n.*u\.user: no such file.*\n.*u\.item: no"):
        movielens(layout_100k)
    with pytest.raises(SourceError, match=r"neither u\.data/.* nor ratings\.dat/.*correct 'path'"):
        movielens(tmp_path)


def test_a_threshold_that_no_rating_reaches_is_refused() -> None:
    with pytest.raises(ValidationError, match="less than or equal to 5"):
        SourceConfig.model_validate({"type": "movielens", "path": "x", "positive_from": 6})


def test_times_are_those_of_unix_seconds(layout_1m: Path) -> None:
    moment = rows(movielens(layout_1m).exposures, "event_timestamp")[0][0]
    assert (datetime.fromisoformat(moment) - datetime(1970, 1, 1)).total_seconds() == 978300760
