"""What is kept of items: computed once, under the values that it follows from."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fathom.encoding import Frame
from fathom.kept import Ints, KeptItems


def columns(*items: tuple[str | None, ...]) -> Frame:
    return {
        name: np.array([item[i] for item in items], object)
        for i, name in enumerate(("key", "genre"))
    }


class Computed:
    """Lengths of keys, and a record of the candidates that they were computed of."""

    def __init__(self, frame: Frame) -> None:
        self._keys = frame["key"]
        self.asked: list[int] = []

    def __call__(self, new: Ints) -> np.ndarray:
        self.asked += new.tolist()
        return np.array([float(len(self._keys[i] or "")) for i in new])


def lengths(kept: KeptItems, frame: Frame, key: str = "lengths") -> tuple[list[float], list[int]]:
    """What is found of a frame, and of which candidates it had to be computed."""
    computed = Computed(frame)
    found = kept.numbers(key, np.empty(0), kept.find(frame), computed)
    return found.tolist(), computed.asked


def test_only_what_is_new_is_computed() -> None:
    kept = KeptItems(["key", "genre"], 1 << 20)
    assert lengths(kept, columns(("a", "x"), ("bcd", "x"))) == ([1, 3], [0, 1])
    assert lengths(kept, columns(("bcd", "x"), ("ef", "x"), ("a", "x"))) == ([3, 2, 1], [1])


def test_an_item_that_changes_and_a_value_that_is_missing_are_others() -> None:
    kept = KeptItems(["key", "genre"], 1 << 20)
    lengths(kept, columns(("a", "x")))
    assert lengths(kept, columns(("a", "y"), ("a", None), ("a", "x"))) == ([1, 1, 1], [0, 1])


def test_each_key_has_numbers_of_its_own() -> None:
    kept = KeptItems(["key", "genre"], 1 << 20)
    frame = columns(("a", "x"))
    lengths(kept, frame, "of monday")
    assert lengths(kept, frame, "of tuesday") == ([1], [0])
    assert lengths(kept, frame, "of monday") == ([1], [])


def test_above_its_bound_all_is_begun_anew() -> None:
    kept = KeptItems(["key", "genre"], 0)
    frame = columns(("a", "x"), ("bcd", "x"))
    assert lengths(kept, frame) == lengths(kept, frame) == ([1, 3], [0, 1])


def test_rows_are_kept_as_numbers_are() -> None:
    kept = KeptItems(["key", "genre"], 1 << 20)
    like = np.empty((0, 3), np.float32)
    for _ in range(2):
        frame = columns(("a", "x"), ("b", "x"))
        found = kept.numbers("rows", like, kept.find(frame), lambda new: np.eye(2, 3)[new])
        assert found.dtype == np.float32
        assert found.tolist() == [[1, 0, 0], [0, 1, 0]]


KEYS = st.lists(st.text("ab", max_size=3), min_size=1, max_size=8)


@given(requests=st.lists(KEYS, max_size=6), most=st.sampled_from([0, 2000, 1 << 20]))
def test_whatever_is_asked_the_numbers_are_right(requests: list[list[str]], most: int) -> None:
    kept = KeptItems(["key", "genre"], most)
    for keys in requests:
        found, _ = lengths(kept, columns(*((key, "x") for key in keys)))
        assert found == [len(key) for key in keys]
