"""The leave-one-out protocol: what is trained on, what is held out, and the 100 candidates."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fathom.sources import CanonicalTables, SourceConfig, SourceError, read

#: Two users, 120 items; times are not in the order of the lines.
TRAIN = "0\t5\t4\t300\n0\t7\t1\t100\n0\t119\t3\t200\n1\t7\t5\t50\n1\t8\t2\t50\n"
TEST = "0\t9\t5\t400\n1\t5\t4\t60\n"
OTHERS = {0: list(range(10, 109)), 1: list(range(20, 119))}
PAIRS = ["(0,9)", "(1,5)"]
NEGATIVE = "".join(
    "\t".join([pair, *map(str, OTHERS[user])]) + "\n" for user, pair in enumerate(PAIRS)
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in (
        ("train.rating", TRAIN),
        ("test.rating", TEST),
        ("test.negative", NEGATIVE),
    ):
        (tmp_path / f"ml-1m.{name}").write_text(text)
    return tmp_path


def protocol(folder: Path, **settings: Any) -> CanonicalTables:
    source = {"type": "leave_one_out", "path": str(folder), **settings}
    return read(SourceConfig.model_validate(source))


def of(tables: CanonicalTables, day: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = tables.exposures.to_pyarrow().to_pylist()
    return [row for row in found if row["partition"] == f"2000-01-0{day}"]


def pairs(rows: list[dict[str, Any]], label: int) -> list[tuple[str, str]]:
    return [(row["user_id"], row["item_id"]) for row in rows if row["rated"] == label]


def test_the_last_rating_of_each_user_is_held_out_of_training(folder: Path) -> None:
    """User 0's last is item 5. User 1 has two at the same time: the smaller item, by its text."""
    found = protocol(folder)
    assert sorted(pairs(of(found, 1), 1)) == [("0", "119"), ("0", "7"), ("1", "8")]
    assert sorted(pairs(of(found, 2), 1)) == [("0", "5"), ("1", "7")]


def test_without_holding_out_the_last_ratings_are_trained_on_too(folder: Path) -> None:
    found = protocol(folder, hold_out=False)
    assert len(pairs(of(found, 1), 1)) == 5
    assert sorted(pairs(of(found, 2), 1)) == [("0", "5"), ("1", "7")]


def test_each_user_has_100_candidates_of_which_one_was_rated(folder: Path) -> None:
    rows = of(protocol(folder), 3)
    assert pairs(rows, 1) == [("0", "9"), ("1", "5")]
    for user, others in OTHERS.items():
        mine = [item for who, item in pairs(rows, 0) if who == str(user)]
        assert mine == [str(item) for item in others]
        assert {row["request_id"] for row in rows if row["user_id"] == str(user)} == {str(user)}


def test_a_positive_and_its_negatives_are_a_request(folder: Path) -> None:
    """Of 40 draws from 120 items, about 34 are distinct; what was trained on is no negative."""
    train = of(protocol(folder, negatives_per_positive=40), 1)
    positives = set(pairs(train, 1))
    assert not positives & set(pairs(train, 0))
    for request, count in Counter(row["request_id"] for row in train).items():
        mine = [row for row in train if row["request_id"] == request]
        assert [row["rated"] for row in mine] == [1] + [0] * (count - 1)
        assert len({row["item_id"] for row in mine}) == count
        assert 20 < count <= 41
    (chance,) = {row["inclusion_probability"] for row in train if row["rated"] == 0}
    assert chance == pytest.approx(1 - (1 - 1 / 120) ** 40)


def test_validation_has_the_negatives_of_training_and_nothing_that_was_rated(folder: Path) -> None:
    held = of(protocol(folder, negatives_per_positive=100), 2)
    rated = {tuple(line.split("\t")[:2]) for line in TRAIN.splitlines()}
    assert not rated & set(pairs(held, 0))
    assert len(held) > 100


def test_every_pass_has_negatives_of_its_own(folder: Path) -> None:
    once, twice = (of(protocol(folder, passes=passes), 1) for passes in (1, 2))
    assert len(pairs(twice, 1)) == 2 * len(pairs(once, 1))
    turns: dict[str, set[tuple[str, str]]] = {"0": set(), "1": set()}
    for row in twice:
        if row["rated"] == 0:
            turns[row["request_id"].split("/")[-1]].add((row["user_id"], row["item_id"]))
    assert turns["0"] == set(pairs(once, 0))
    assert turns["0"] != turns["1"]


def test_draws_follow_from_the_seed(folder: Path) -> None:
    first, again, other = (of(protocol(folder, seed=seed), 1) for seed in (0, 0, 1))
    assert first == again
    assert pairs(first, 0) != pairs(other, 0)


def test_missing_files_are_named_together(folder: Path) -> None:
    for name in ("train.rating", "test.negative"):
        (folder / f"ml-1m.{name}").unlink()
    expected = (
        r"2 faults\n.*ml-1m\.train\.rating: no such file; put your copy there, with fields "
        r"separated by tabs and no header, or correct 'path'\n.*ml-1m\.test\.negative: no such"
    )
    with pytest.raises(SourceError, match=expected):
        protocol(folder)


def test_a_line_with_too_few_candidates_is_named_by_its_number(folder: Path) -> None:
    lines = NEGATIVE.splitlines()
    lines[1] = lines[1].rsplit("\t", 1)[0]
    (folder / "ml-1m.test.negative").write_text("\n".join(lines) + "\n")
    expected = r"test\.negative: line 2 \('\(1,5\)\t20.*Expected Number of Columns: 100 Found: 99"
    with pytest.raises(SourceError, match=expected):
        protocol(folder)


def test_test_files_of_different_releases_are_refused(folder: Path) -> None:
    (folder / "ml-1m.test.rating").write_text("0\t9\t5\t400\n1\t6\t4\t60\n2\t6\t4\t60\n")
    expected = (
        r"2 faults\n.*line 2: is of \(1,5\), where ml-1m\.test\.rating has \(1,6\); take both from "
        r"one release\n.*line 3: is of None, where ml-1m\.test\.rating has \(2,6\)"
    )
    with pytest.raises(SourceError, match=expected):
        protocol(folder)
