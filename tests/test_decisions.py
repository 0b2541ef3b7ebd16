"""A decision is in the history once and whole, or not at all."""

from __future__ import annotations

import pytest

from fathom import decisions

ENTRY = {"partition": "2026-W09", "fingerprint": "7:abc", "version": "v1", "alerts": ["empty"]}


@pytest.fixture
def history(tmp_path):
    return tmp_path / "reporting" / "decisions.jsonl"


def test_decisions_are_kept_in_their_order_a_line_each(history):
    assert decisions.read(history) == []
    later = ENTRY | {"partition": "2026-W10"}
    assert decisions.append(history, ENTRY)
    assert decisions.append(history, later)
    assert decisions.read(history) == [ENTRY, later]
    assert len(history.read_text().splitlines()) == 2


def test_the_same_decision_is_written_once_however_often_it_is_made(history):
    assert decisions.append(history, ENTRY)
    assert not decisions.append(history, ENTRY | {"at": "an hour later"})
    assert decisions.read(history) == [ENTRY]


@pytest.mark.parametrize(
    "other",
    [
        {"partition": "2026-W10"},
        {"fingerprint": "8:def"},
        {"version": "v2"},
        {"window": {"start": "2026-03-02", "end": "2026-03-08"}},
    ],
)
def test_another_partition_content_champion_or_window_is_another_decision(history, other):
    decisions.append(history, ENTRY)
    assert decisions.append(history, ENTRY | other)
    assert len(decisions.read(history)) == 2


def test_a_line_that_a_killed_writer_did_not_finish_is_none(history):
    decisions.append(history, ENTRY)
    with open(history, "a") as file:
        file.write('{"partition": "2026-W1')
    assert decisions.read(history) == [ENTRY]
    later = ENTRY | {"partition": "2026-W10"}
    assert decisions.append(history, later)
    assert decisions.read(history) == [ENTRY, later]


def test_figures_that_are_not_numbers_are_refused_before_anything_is_written(history):
    with pytest.raises(ValueError, match="not JSON compliant"):
        decisions.append(history, ENTRY | {"score": float("nan")})
    assert decisions.read(history) == []
