"""AutoInt's protocol on MovieLens: which ratings, which fields, and their very split."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from fathom.sources import CanonicalTables, SourceConfig, SourceError, read

FILMS = {1: 1919, 2: 1930, 3: 1969, 4: 1970, 5: 2000}
START = 956_703_932  # 25 April 2000, 23:05:32


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twelve ratings of 1 to 5 stars, in turn; the third and the eighth are of 3."""
    stars = [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2]
    ratings = [f"{1 + i % 3}::{1 + i % 5}::{s}::{START + i}" for i, s in enumerate(stars)]
    (tmp_path / "ratings.dat").write_text("\n".join(ratings) + "\n")
    films = [f"{film}::Film, A ({year})::Drama|War" for film, year in FILMS.items()]
    (tmp_path / "movies.dat").write_text("\n".join(films) + "\n")
    (tmp_path / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072\n3::F::25::1::0\n")
    return tmp_path


def protocol(folder: Path, **settings: Any) -> CanonicalTables:
    source = {"type": "autoint_movielens", "path": str(folder), **settings}
    return read(SourceConfig.model_validate(source))


def rows(table: Any, *columns: str) -> list[tuple[Any, ...]]:
    found = table.to_pyarrow().to_pylist()
    return [tuple(row[column] for column in columns) for row in found]


def test_ratings_of_three_are_left_out_and_the_others_are_two_classes(folder: Path) -> None:
    exposures = protocol(folder).exposures
    labels = [label for (label,) in rows(exposures, "liked")]
    assert labels == ["0", "0", "1", "1", "0", "0", "1", "1", "0", "0"]  # 1 2 4 5 1 2 4 5 1 2
    times = [time for (time,) in rows(exposures, "rated_at")]
    assert times == [START + i for i in (0, 1, 3, 4, 5, 6, 8, 9, 10, 11)]
    assert "rating" not in exposures.columns


@pytest.mark.parametrize("seed", [2019, 7])
def test_the_split_is_that_of_the_published_shuffle(folder: Path, seed: int) -> None:
    """They shuffle the numbers of the rows that are left: here ten, so eight, one and one."""
    order = list(range(10))
    random.Random(seed).shuffle(order)
    days = [day for (day,) in rows(protocol(folder, seed=seed).exposures, "partition")]
    assert {row for row, day in enumerate(days) if day == "2000-01-01"} == set(order[:8])
    assert days[order[8]] == "2000-01-02"
    assert days[order[9]] == "2000-01-03"


def test_pythons_shuffle_is_the_one_that_they_had() -> None:
    """A change of Python's generator would be a change of the split."""
    order = list(range(10))
    random.Random(2019).shuffle(order)
    assert order == [0, 4, 8, 9, 5, 6, 1, 7, 3, 2]


def test_rows_have_the_moment_of_their_split(folder: Path) -> None:
    found = rows(protocol(folder).exposures, "event_timestamp", "partition")
    assert {(f"{moment:%Y-%m-%d %H:%M:%S}", day) for moment, day in found} == {
        (f"2000-01-0{day} 00:00:00", f"2000-01-0{day}") for day in (1, 2, 3)
    }


def test_early_films_share_their_decade(folder: Path) -> None:
    items = protocol(folder).items
    assert rows(items, "movie_id", "release", "genres") == [
        ("1", "1920", ["Drama", "War"]),
        ("2", "1930", ["Drama", "War"]),
        ("3", "1960", ["Drama", "War"]),
        ("4", "1970", ["Drama", "War"]),
        ("5", "2000", ["Drama", "War"]),
    ]


def test_a_line_with_a_missing_field_is_named_by_its_number(folder: Path) -> None:
    with (folder / "ratings.dat").open("a") as file:
        file.write("2::1::5\n")
    with pytest.raises(SourceError, match=r"ratings\.dat: line 13 \('2::1::5'\): Expected Number"):
        protocol(folder)


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "movies.dat").unlink()
    with pytest.raises(SourceError, match=r"movies\.dat: no such file; copy it from the same"):
        protocol(folder)
