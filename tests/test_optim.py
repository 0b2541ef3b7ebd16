"""The sparse optimizers against references written from the papers, one weight at a time."""

from __future__ import annotations

from math import copysign, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from fathom.optim import FTRLProximal, SparseAdagrad, sum_duplicates

ROWS, WIDTH = 6, 3

#: Steps: which rows are looked up (twice, some of them), and the gradient at each look-up.
Steps = list[tuple[list[int], list[list[float]]]]


def steps(seed: int, count: int = 6, width: int = WIDTH) -> Steps:
    random = np.random.default_rng(seed)
    return [
        (rows.tolist(), random.normal(size=(len(rows), width)).tolist())
        for rows in (random.integers(0, ROWS - 1, size=5) for _ in range(count))
    ]  # the last row is never looked up


def run(
    optimizer: torch.optim.Optimizer, weight: Tensor, taken: Steps, sparse: bool = True
) -> list[list[float]]:
    """Make each look-up's gradient the given one, and step."""
    for rows, gradients in taken:
        optimizer.zero_grad()
        looked_up = functional.embedding(torch.tensor(rows), weight, sparse=sparse)
        (looked_up * torch.tensor(gradients, dtype=weight.dtype)).sum().backward()
        optimizer.step()
    return weight.tolist()


def parameter(width: int = WIDTH, value: float = 0.0) -> nn.Parameter:
    return nn.Parameter(torch.full((ROWS, width), value, dtype=torch.float64))


def summed(rows: list[int], gradients: list[list[float]]) -> dict[int, list[float]]:
    """The gradient of each touched row: the sum over its look-ups."""
    return {
        row: [
            sum(g[k] for r, g in zip(rows, gradients, strict=True) if r == row)
            for k in range(len(gradients[0]))
        ]
        for row in set(rows)
    }


# --- FTRL-Proximal -----------------------------------------------------------------------------


def ftrl_reference(taken: Steps, alpha, beta, l1, l2, scale=1.0, width=WIDTH):
    """McMahan et al. 2013, algorithm 1: weights follow from z and n alone."""
    z = [[0.0] * width for _ in range(ROWS)]
    n = [[0.0] * width for _ in range(ROWS)]

    def w(i: int, k: int) -> float:
        if abs(z[i][k]) <= l1:
            return 0.0
        rate = 1 / ((beta + sqrt(n[i][k])) / alpha + l2)
        return -rate * (z[i][k] - copysign(l1, z[i][k]))

    for rows, gradients in taken:
        for i, row in summed(rows, gradients).items():
            for k, g in enumerate(scale * g for g in row):
                sigma = (sqrt(n[i][k] + g * g) - sqrt(n[i][k])) / alpha
                z[i][k] += g - sigma * w(i, k)
                n[i][k] += g * g
    return [[w(i, k) for k in range(width)] for i in range(ROWS)]


@pytest.mark.parametrize("width", [1, WIDTH])
@pytest.mark.parametrize(
    ("alpha", "beta", "l1", "l2"),
    [(0.05, 1.0, 0.0, 0.0), (0.1, 1.0, 1.0, 0.0), (0.5, 0.2, 0.5, 2.0), (1.0, 0.0, 0.3, 0.1)],
)
def test_ftrl_is_algorithm_1(alpha, beta, l1, l2, width):
    weight, taken = parameter(width), steps(1, width=width)
    found = run(FTRLProximal([weight], alpha, beta, l1, l2), weight, taken)
    expected = ftrl_reference(taken, alpha, beta, l1, l2, width=width)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=0)
    assert np.count_nonzero(found) > 0


@given(seed=st.integers(0, 10_000), l1=st.floats(0, 3), alpha=st.floats(1e-3, 2))
def test_ftrl_is_algorithm_1_whatever_the_steps(seed, l1, alpha):
    weight, taken = parameter(), steps(seed)
    found = run(FTRLProximal([weight], alpha, l1=l1), weight, taken)
    expected = ftrl_reference(taken, alpha, 1.0, l1, 0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_ftrl_by_hand():
    # g = 2 with alpha 0.5, beta 1, l1 0.5: z = 2, n = 4, w = -(2 - 0.5) / ((1 + 2) / 0.5).
    weight = parameter(width=1)
    found = run(FTRLProximal([weight], 0.5, 1.0, l1=0.5), weight, [([0], [[2.0]])])
    assert found[0] == [-0.25]


def test_scale_turns_a_mean_into_the_sum_that_the_penalties_are_about():
    # The same look-ups, once as the mean over 5 examples and once as their sum.
    taken = steps(3)
    mean = [(rows, (np.array(g) / 5).tolist()) for rows, g in taken]
    weight = parameter()
    optimizer = FTRLProximal([weight], 0.1, l1=1.0)
    optimizer.scale = 5.0
    np.testing.assert_allclose(
        run(optimizer, weight, mean), ftrl_reference(taken, 0.1, 1.0, 1.0, 0.0), rtol=1e-12
    )


def test_a_batchs_size_does_not_change_what_adagrad_makes_of_a_row_seen_once():
    # G starts from 0.01 and a gradient of 0.3 is one example's, whatever it was averaged over:
    # 0.1 * 0.3 / sqrt(0.01 + 0.09).
    for size in (1.0, 4096.0):
        weight = parameter(width=1)
        optimizer = SparseAdagrad([weight], 0.1, initial=0.01)
        optimizer.scale = size
        found = run(optimizer, weight, [([0], [[0.3 / size]])])
        assert found[0] == pytest.approx([-0.1 * 0.3 / 0.1**0.5], rel=1e-6)


def test_l1_gives_exact_zeros_and_takes_weights_back():
    weight = parameter(width=1)
    optimizer = FTRLProximal([weight], 0.1, l1=1.0)
    pushes = [([0, 1, 2], [[0.9], [1.1], [-5.0]])]
    found = run(optimizer, weight, pushes)
    assert found[0] == [0.0]  # |z| is below l1
    assert found[1][0] < 0 < found[2][0]
    assert run(optimizer, weight, [([1], [[-1.1]])])[1] == [0.0]  # a push back: z is small again


def test_a_huge_l1_keeps_every_weight_at_zero():
    weight = parameter()
    assert not np.any(run(FTRLProximal([weight], 0.1, l1=1e6), weight, steps(4)))


def test_l2_shrinks():
    sizes = []
    for l2 in (0.0, 1.0, 100.0):
        weight = parameter()
        sizes.append(np.abs(run(FTRLProximal([weight], 0.1, l2=l2), weight, steps(5))).sum())
    assert sizes[0] > sizes[1] > sizes[2] > 0


# --- AdaGrad -----------------------------------------------------------------------------------


def adagrad_reference(taken: Steps, lr, eps, initial, rowwise, start):
    """Duchi et al. 2011, figure 1: x -= lr g / (eps + sqrt(sum of g²)), the sum from initial."""
    x = [[start] * WIDTH for _ in range(ROWS)]
    total = [[initial] * WIDTH for _ in range(ROWS)]
    for rows, gradients in taken:
        for i, row in summed(rows, gradients).items():
            shared = sum(g * g for g in row) / WIDTH
            for k, g in enumerate(row):
                total[i][k] += shared if rowwise else g * g
                x[i][k] -= lr * g / (sqrt(total[i][k]) + eps)
    return x


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize(("lr", "eps", "initial"), [(0.05, 1e-10, 0.01), (0.5, 0.1, 0.0)])
def test_adagrad_is_the_papers(lr, eps, initial, rowwise):
    weight, taken = parameter(value=0.5), steps(2)
    found = run(SparseAdagrad([weight], lr, eps, initial, rowwise), weight, taken)
    expected = adagrad_reference(taken, lr, eps, initial, rowwise, start=0.5)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@given(seed=st.integers(0, 10_000), rowwise=st.booleans())
def test_adagrad_is_the_papers_whatever_the_steps(seed, rowwise):
    weight, taken = parameter(), steps(seed)
    found = run(SparseAdagrad([weight], rowwise=rowwise), weight, taken)
    expected = adagrad_reference(taken, 0.05, 1e-10, 0.01, rowwise, start=0.0)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_adagrad_by_hand():
    # From 0, g = 3 then 4: -0.1·3/3, then -0.1·4/sqrt(9 + 16).
    weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.float64))
    optimizer = SparseAdagrad([weight], lr=0.1, eps=0.0, initial=0.0)
    assert run(optimizer, weight, [([0], [[3.0]])])[0][0] == pytest.approx(-0.1)
    assert run(optimizer, weight, [([0], [[4.0]])])[0][0] == pytest.approx(-0.1 - 0.08)


def test_full_adagrad_is_torchs():
    ours, theirs, taken = parameter(), parameter(), steps(6)
    run(SparseAdagrad([ours], 0.05, 1e-10, 0.01), ours, taken)
    run(
        torch.optim.Adagrad([theirs], 0.05, initial_accumulator_value=0.01),
        theirs,
        taken,
        sparse=False,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_rowwise_state_is_one_number_per_row():
    weight = parameter()
    optimizer = SparseAdagrad([weight], rowwise=True)
    run(optimizer, weight, steps(7))
    assert optimizer.state[weight]["sum"].shape == (ROWS, 1)


# --- both --------------------------------------------------------------------------------------


@pytest.fixture(params=["ftrl", "adagrad", "rowwise"])
def make(request):
    return {
        "ftrl": lambda weights: FTRLProximal(weights, 0.1),
        "adagrad": lambda weights: SparseAdagrad(weights),
        "rowwise": lambda weights: SparseAdagrad(weights, rowwise=True),
    }[request.param]


def test_rows_that_were_not_looked_up_do_not_change(make):
    weight = parameter()
    optimizer = make([weight])
    run(optimizer, weight, steps(8))
    before, states = (
        weight.detach().clone(),
        {name: state.clone() for name, state in optimizer.state[weight].items()},
    )
    run(optimizer, weight, [([1, 1, 4], [[1.0] * WIDTH] * 3)])

    changed = (weight != before).any(dim=1)
    assert changed.tolist() == [row in {1, 4} for row in range(ROWS)]
    for name, state in optimizer.state[weight].items():
        assert (state != states[name]).any(dim=1).tolist() == changed.tolist(), name


def test_several_tables_step_on_their_own(make):
    used, unused = parameter(value=1.0), parameter(value=1.0)
    run(make([used, unused]), used, steps(9))
    assert (used != 1).any()
    assert (unused == 1).all()


def test_looking_up_no_row_changes_nothing(make):
    weight = parameter(value=1.0)
    optimizer = make([weight])
    nothing = torch.zeros(0, dtype=torch.int64)  # as in a batch whose bags are all empty
    functional.embedding(nothing, weight, sparse=True).sum().backward()
    optimizer.step()
    assert (weight == 1).all()


def test_a_dense_gradient_is_refused_with_the_remedy(make):
    weight = parameter()
    optimizer = make([weight])
    weight.sum().backward()
    message = (
        rf"{type(optimizer).__name__} got a dense gradient of shape \(6, 3\); "
        "look rows up with sparse=True, or use a dense optimizer"
    )
    with pytest.raises(TypeError, match=message):
        optimizer.step()


def test_a_closure_is_evaluated_with_gradients(make):
    weight = parameter(value=1.0)
    optimizer = make([weight])

    def closure() -> float:
        loss = functional.embedding(torch.tensor([2]), weight, sparse=True).square().sum()
        loss.backward()
        return float(loss.detach())

    assert optimizer.step(closure) == WIDTH
    assert (weight[2] != 1).all()
    assert (weight[[0, 1, 3, 4, 5]] == 1).all()


def test_state_survives_saving(make):
    taken = steps(10)
    undisturbed = parameter()
    run(make([undisturbed]), undisturbed, taken)

    weight = parameter()
    first = make([weight])
    run(first, weight, taken[:3])
    second = make([weight])
    second.load_state_dict(first.state_dict())
    run(second, weight, taken[3:])
    assert torch.equal(weight, undisturbed)


# --- whole rows at zero, and initial weights ----------------------------------------------------


def test_a_row_by_hand_with_the_group_penalty():
    """One row of width 4, one step from zero: z = g, n = g², and ||s|| = ||g|| = 5 · 2 = 10."""
    weight = parameter(width=4)
    optimizer = FTRLProximal([weight], lr=0.5, beta=1.0, group_l1=2.0)
    g = [6.0, 8.0, 0.0, 0.0]
    run(optimizer, weight, [([1], [g])])
    # The factor is 1 - sqrt(4) · 2 / 10 = 0.6; the step sizes are 0.5 / (1 + |g|).
    expected = [-0.6 * 6 / ((1 + 6) / 0.5), -0.6 * 8 / ((1 + 8) / 0.5), 0.0, 0.0]
    assert weight[1].tolist() == pytest.approx(expected)


def test_a_row_is_dropped_whole_when_its_norm_is_within_the_bound():
    weight = parameter(width=4)
    optimizer = FTRLProximal([weight], lr=0.5, group_l1=2.0)  # the bound is sqrt(4) · 2 = 4
    run(optimizer, weight, [([0, 1], [[2.0, 2.0, 2.0, 1.9], [4.1, 0.0, 0.0, 0.0]])])
    assert (weight[0] == 0).all()  # its norm is 3.95
    assert weight[1, 0] != 0
    # L1 alone drops single weights.
    weight = parameter(width=4)
    run(FTRLProximal([weight], lr=0.5, l1=1.95), weight, [([0], [[2.0, 2.0, 2.0, 1.9]])])
    assert (weight[0] == 0).tolist() == [False, False, False, True]


@pytest.mark.parametrize("l2", [0.0, 0.2])
def test_initial_weights_are_where_ftrl_starts_from(l2):
    """A step of gradient zero leaves them; without a z that gives them it would forget them."""
    initial = torch.tensor([[0.5, -1.5, 2.0], [0.0, 0.0, 0.0]] * 3, dtype=torch.float64)
    weight = nn.Parameter(initial.clone())
    nothing = [([0, 1, 2, 3, 4], [[0.0] * 3] * 5)]
    run(FTRLProximal([weight], lr=0.1, l2=l2), weight, nothing)
    torch.testing.assert_close(weight.detach(), initial)


def test_l1_pulls_at_initial_weights_from_the_first_step():
    """z starts at -w beta / lr, 10 times the weight: 5, -15 and 20 of which L1 takes 6."""
    weight = nn.Parameter(torch.tensor([[0.5, -1.5, 2.0]] * ROWS, dtype=torch.float64))
    run(FTRLProximal([weight], lr=0.1, l1=6.0), weight, [([0], [[0.0] * 3])])
    assert weight[0].tolist() == pytest.approx([0.0, -0.9, 1.4])


@given(st.integers(0, 2**32 - 1), st.integers(0, 40))
def test_duplicates_are_summed_once_in_rising_order(seed, count):
    random = np.random.default_rng(seed)
    rows = random.integers(0, 9, count)
    values = random.integers(-5, 6, (count, 2)).astype(np.float64)  # whole numbers: exact sums
    found, sums = sum_duplicates(torch.from_numpy(rows), torch.from_numpy(values))
    assert found.tolist() == sorted(set(rows.tolist()))
    expected = [values[rows == row].sum(axis=0).tolist() for row in found.tolist()]
    assert sums.tolist() == expected


@pytest.mark.gpu
def test_on_a_gpu_each_look_up_gets_the_whole_sum_of_its_row():
    rows = torch.tensor([3, 1, 3], device="cuda")
    values = torch.tensor([[1.0], [2.0], [4.0]], device="cuda")
    found, sums = sum_duplicates(rows, values)
    assert found.tolist() == [1, 3, 3]
    assert sums.tolist() == [[2.0], [5.0], [5.0]]


@pytest.mark.parametrize("make", [FTRLProximal, SparseAdagrad])
def test_a_row_that_comes_twice_with_its_whole_sum_is_updated_once(make):
    """As sums come on a GPU, where the same row is written twice with the same values."""
    weights = [parameter(value=0.5), parameter(value=0.5)]
    gradient = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    for weight, times in zip(weights, (1, 3), strict=True):
        optimizer = make([weight], lr=0.1)
        optimizer.update(weight, torch.tensor([2] * times), gradient.repeat(times, 1))
    assert torch.equal(weights[0], weights[1])
