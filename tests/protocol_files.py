"""Files as the known protocols have them, small, with something in them that can be learnt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

FRAPPE = [
    *("user", "item", "daytime", "weekday", "isweekend"),
    *("homework", "cost", "weather", "country", "city"),
]
CRITEO = [*(f"I{i}" for i in range(1, 14)), *(f"C{i}" for i in range(1, 27))]
SPLITS = {"train": 3000, "valid": 600, "test": 1000}
#: Users, items and groups of the leave-one-out files. A user rates the items of one group.
USERS, ITEMS, GROUPS = 200, 200, 10

Draw = np.random.Generator


def write_frappe(folder: Path) -> None:
    """Apps are used at home if their id is even, and elsewhere if it is odd: 95 % to 5 %."""
    draw = np.random.default_rng(0)

    def rows(count: int) -> npt.NDArray[np.int64]:
        values = draw.integers(0, 7, (count, len(FRAPPE)))
        values[:, 0], values[:, 1] = draw.integers(0, 50, count), draw.integers(0, 40, count)
        values[:, FRAPPE.index("homework")] = draw.integers(0, 2, count)
        fits = values[:, 1] % 2 == values[:, FRAPPE.index("homework")]
        label = draw.random(count) < np.where(fits, 0.95, 0.05)
        return np.column_stack([label, values])

    _write_splits(folder, ["label", *FRAPPE], {split: rows(n) for split, n in SPLITS.items()})


def write_criteo(folder: Path) -> None:
    """Clicks have a chance of 10, 50 or 90 %: I1 above a half and C1 odd each add 40."""
    draw = np.random.default_rng(1)

    def rows(count: int) -> npt.NDArray[np.float64]:
        numbers = draw.random((count, 13)).round(6)
        values = draw.integers(0, 30, (count, 26))
        clicks = draw.random(count) < 0.1 + 0.4 * (numbers[:, 0] > 0.5) + 0.4 * (values[:, 0] % 2)
        return np.column_stack([clicks, numbers, values])

    _write_splits(folder, ["label", *CRITEO], {split: rows(n) for split, n in SPLITS.items()})


def write_movielens(folder: Path, ratings: int = 4000) -> None:
    """1M's layout: women rate comedies above 3 and other films below, men the other way round."""
    draw = np.random.default_rng(2)
    folder.mkdir(parents=True)
    genders = ["F", "M"] * 40
    genres = ["Comedy|Romance", "Action", "Drama|War", "Comedy"] * 15
    users = [
        f"{user}::{gender}::{draw.choice([1, 18, 25])}::{draw.integers(21)}::{10000 + user // 2}"
        for user, gender in enumerate(genders, start=1)
    ]
    films = [
        f"{film}::Film {film} ({draw.integers(1919, 2001)})::{kinds}"
        for film, kinds in enumerate(genres, start=1)
    ]
    pairs = draw.permutation(len(users) * len(films))[:ratings]
    lines = []
    for user, film in zip(pairs // len(films), pairs % len(films), strict=True):
        likes = (genders[user] == "F") == ("Comedy" in genres[film])
        stars = 3 if draw.random() < 0.2 else draw.choice([4, 5] if likes else [1, 2])
        lines.append(f"{user + 1}::{film + 1}::{stars}::{956_703_932 + draw.integers(10**7)}")
    for name, content in (("users", users), ("movies", films), ("ratings", lines)):
        (folder / f"{name}.dat").write_text("\n".join(content) + "\n", encoding="latin-1")


def write_leave_one_out(folder: Path) -> None:
    """Each user has rated 13 of the 20 items of one group; the last one is the test's."""
    draw = np.random.default_rng(3)
    folder.mkdir(parents=True)
    train, test, negative = [], [], []
    for user in range(USERS):
        rated = draw.permutation(np.arange(user % GROUPS, ITEMS, GROUPS))[:13]
        times = 978_300_000 + np.arange(13) * 60
        rows = [
            f"{user}\t{item}\t{draw.integers(1, 6)}\t{time}"
            for item, time in zip(rated, times, strict=True)
        ]
        train += draw.permutation(rows[:-1]).tolist()
        test.append(rows[-1])
        others = draw.permutation(np.setdiff1d(np.arange(ITEMS), rated))[:99]
        negative.append("\t".join([f"({user},{rated[-1]})", *map(str, others)]))
    files = {"train.rating": train, "test.rating": test, "test.negative": negative}
    for name, lines in files.items():
        (folder / f"ml-1m.{name}").write_text("\n".join(lines) + "\n")


def _write_splits(
    folder: Path, header: list[str], splits: dict[str, npt.NDArray[np.generic]]
) -> None:
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        lines = [",".join(f"{value:g}" for value in row) for row in rows.tolist()]
        (folder / f"{split}.csv").write_text("\n".join([",".join(header), *lines]) + "\n")
