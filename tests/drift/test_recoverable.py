"""What a retraining would win back: known answers, and nothing from noise."""

from __future__ import annotations

import numpy as np
import pytest

from fathom.drift import Recoverable, recoverable

ROWS = 20_000
EVERYWHERE = "(all rows)"


class Rows:
    """Users' rows with two columns of five bins, and a logit that is right."""

    def __init__(self, seed: int, rows: int = ROWS) -> None:
        self.draw = np.random.default_rng(seed)
        self.codes = {
            EVERYWHERE: np.zeros(rows, np.int64),
            "shelf": self.draw.integers(0, 5, rows),
            "store": self.draw.integers(0, 5, rows),
        }
        self.fold = self.draw.integers(0, 4, rows)
        self.logit = self.draw.normal(-1, 1, rows)

    def labels(self, logit: np.ndarray) -> np.ndarray:
        return (self.draw.random(len(logit)) < 1 / (1 + np.exp(-logit))).astype(float)

    def won(self, logit: np.ndarray, label: np.ndarray, **more: np.ndarray) -> Recoverable:
        return recoverable(self.codes, logit, label, more.get("fold", self.fold), "binary")


def losses(logit: np.ndarray, label: np.ndarray) -> np.ndarray:
    p = 1 / (1 + np.exp(-logit))
    return -(label * np.log(p) + (1 - label) * np.log(1 - p))


def test_a_right_model_has_nothing_to_win() -> None:
    shares = []
    for seed in range(30):
        rows = Rows(seed, 4000)
        shares.append(rows.won(rows.logit, rows.labels(rows.logit)).share)
    assert -0.001 < np.mean(shares) < 0.0001
    assert max(shares) < 0.001


@pytest.mark.parametrize("shift", [-0.5, 0.3, 1.0])
def test_a_shift_of_all_logits_is_won_back_by_all_rows(shift: float) -> None:
    rows = Rows(1)
    label = rows.labels(rows.logit)
    wrong = rows.logit + shift
    by_hand = 1 - losses(rows.logit, label).sum() / losses(wrong, label).sum()
    found = rows.won(wrong, label)
    assert next(iter(found.columns)) == EVERYWHERE
    # A small shift is learnt less than whole, since the prior draws it to 0.
    assert found.columns[EVERYWHERE] == pytest.approx(by_hand, rel=0.1)
    assert found.share == pytest.approx(sum(found.columns.values()))


def test_a_bias_in_one_category_is_attributed_to_its_column() -> None:
    rows = Rows(2)
    label = rows.labels(rows.logit)
    wrong = rows.logit - 1.0 * (rows.codes["shelf"] == 3)
    by_hand = 1 - losses(rows.logit, label).sum() / losses(wrong, label).sum()
    found = rows.won(wrong, label)
    assert found.columns["shelf"] == pytest.approx(by_hand, rel=0.1)
    assert found.columns.get("store", 0.0) == pytest.approx(0, abs=by_hand / 20)


def test_two_faults_are_won_back_one_after_the_other() -> None:
    rows = Rows(3)
    label = rows.labels(rows.logit)
    shelf, store = (rows.codes["shelf"] == 3) * 1.0, (rows.codes["store"] == 1) * 0.7
    found = rows.won(rows.logit - shelf + store, label)
    by_hand = 1 - losses(rows.logit, label).sum() / losses(rows.logit - shelf + store, label).sum()
    assert min(found.columns["shelf"], found.columns["store"]) > by_hand / 4
    assert found.columns["shelf"] + found.columns["store"] == pytest.approx(by_hand, rel=0.1)


def test_corrections_are_judged_on_users_that_they_were_not_learnt_on() -> None:
    """Of errors that turn round from one half to the other, nothing holds: each side's correction
    makes the other worse. Were it judged where it was learnt, the same would seem a gain."""
    rows = Rows(4)
    turned = np.where(rows.fold % 2 == 0, 0.5, -0.5)
    label = rows.labels(rows.logit + turned * (rows.codes["shelf"] == 3))
    assert rows.won(rows.logit, label).share < -0.005
    mixed = rows.draw.permutation(rows.fold)
    assert abs(rows.won(rows.logit, label, fold=mixed).share) < 0.001


def test_with_users_on_one_side_only_nothing_can_be_judged() -> None:
    rows = Rows(5, 1000)
    label = rows.labels(rows.logit + 1)
    assert rows.won(rows.logit, label, fold=np.zeros(1000, np.int64)) == Recoverable(0, {})


def test_errors_of_a_regression_are_squared_and_their_unit_does_not_matter() -> None:
    rows = Rows(6)
    right = rows.draw.normal(3, 1, ROWS)
    label = right + rows.draw.normal(0, 0.5, ROWS)
    wrong = right + 0.2
    by_hand = 1 - ((label - right) ** 2).sum() / ((label - wrong) ** 2).sum()
    found = recoverable(rows.codes, wrong, label, rows.fold, "regression")
    assert found.columns[EVERYWHERE] == pytest.approx(by_hand, rel=0.05)
    cents = recoverable(rows.codes, 100 * wrong, 100 * label, rows.fold, "regression")
    assert cents.share == pytest.approx(found.share)
