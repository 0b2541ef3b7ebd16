"""The ensemble: two models that do not know each other, and what combines them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from fathom.models import Inputs, Model, build, score
from fathom.models.ensemble import Ensemble
from fathom.training import Trained, train
from small_family import CONFIG, LAYOUT, examples, randomise, worst_gradient_error

ENSEMBLE = replace(CONFIG, model="ensemble")
TRAIN, VALIDATION = examples(600, seed=0), examples(200, seed=1)


def built(seed: int = 0) -> Ensemble:
    model = build(LAYOUT, ENSEMBLE)
    assert isinstance(model, Ensemble)
    randomise(model, seed)
    return model


def test_its_heads_by_hand():
    model = built()
    inputs = Inputs.of(examples(9))
    with torch.no_grad():
        model.biases.copy_(torch.tensor([1.0, -2.0]))
        model.shares.copy_(torch.tensor([0.25, 3.0]))
        model.bias.fill_(0.5)
        wide, deep = model.wide(inputs).sum(dim=1) + 1.0, model.deep(inputs) - 2.0
        heads = model.heads(inputs)
    assert heads.shape == (9, 3)
    torch.testing.assert_close(heads[:, 0], wide)
    torch.testing.assert_close(heads[:, 1], deep)
    torch.testing.assert_close(heads[:, 2], 0.25 * wide + 3.0 * deep + 0.5)
    torch.testing.assert_close(model(inputs), heads[:, 2])


def test_it_starts_as_the_mean_of_both():
    model = build(LAYOUT, ENSEMBLE)
    heads = model.heads(Inputs.of(examples(5)))
    torch.testing.assert_close(heads[:, 2], heads[:, :2].mean(dim=1))


def test_contributions_are_of_the_combined_logit():
    model = built()
    inputs = Inputs.of(examples(9))
    parts = model.contributions(inputs)
    torch.testing.assert_close(parts.logit, model.heads(inputs)[:, -1])
    torch.testing.assert_close(parts.wide, model.wide(inputs) * model.shares[0])
    torch.testing.assert_close(parts.bias, model.bias + model.shares @ model.biases)


def moved_by(head: int) -> set[str]:
    """The weights that the gradient of a head reaches."""
    model = built()
    model.heads(Inputs.of(examples(9)))[:, head].sum().backward()
    return {
        name.split(".")[0]
        for name, weight in model.named_parameters()
        if weight.grad is not None and weight.grad.to_dense().any()
    }


def test_no_part_knows_of_the_other_or_of_what_combines_them():
    assert moved_by(0) == {"wide", "biases"}
    assert moved_by(1) == {"deep", "biases"}
    assert moved_by(2) == {"shares", "bias"}
    model = built()
    heads = model.heads(Inputs.of(examples(9)))
    for head, other in ((0, 1), (1, 0)):  # of the two biases, each has its own
        (gradient,) = torch.autograd.grad(heads[:, head].sum(), model.biases, retain_graph=True)
        assert gradient[head] == 9
        assert gradient[other] == 0


def test_gradients_of_all_heads_are_those_of_finite_differences():
    model = built(seed=3).double()
    inputs = Inputs.of(examples(6))
    inputs = inputs._replace(numeric=inputs.numeric.double())
    apart = model.heads(inputs).detach()[:, :2]  # what combines them takes them as they are

    def value() -> torch.Tensor:
        heads = model.heads(inputs)[:, :2]
        return (heads * torch.arange(12).view(6, 2)).sum()

    def combined() -> torch.Tensor:
        return (apart @ model.shares + model.bias).square().sum()

    parts = [w for n, w in model.named_parameters() if n not in {"shares", "bias"}]
    assert worst_gradient_error(value, parts) < 1e-6
    model.zero_grad()
    model.heads(inputs)[:, 2].square().sum().backward()
    found = [model.shares.grad.clone(), model.bias.grad.clone()]
    assert worst_gradient_error(combined, [model.shares, model.bias]) < 1e-5
    torch.testing.assert_close([model.shares.grad, model.bias.grad], found)


@pytest.fixture(scope="module", params=[0.0, 0.3], ids=["no dropout", "dropout"])
def apart(request: pytest.FixtureRequest) -> dict[str, Trained]:
    rates = {f"{part}_learning_rate": 0.01 for part in ("wide", "embedding", "deep")}
    config = replace(CONFIG, dropout=request.param, epochs=2, **rates)
    found = {
        name: train(LAYOUT, TRAIN, VALIDATION, replace(config, model=name), "binary")
        for name in ("ensemble", "wide", "deep")
    }
    # Each keeps the weights of its best epoch; here that is the last for all.
    assert {trained.best_epoch for trained in found.values()} == {2}
    return found


def test_its_parts_are_what_each_alone_is_trained_to(apart):
    """The wide part starts from 0, so the deep one draws the same weights beside it and alone.

    Only the order of sums differs, of the biases' gradients.
    """
    together = apart["ensemble"].model.state_dict()
    for i, name in enumerate(("wide", "deep")):
        alone = apart[name].model.state_dict()
        torch.testing.assert_close(together["biases"][i], alone.pop("bias"), rtol=0, atol=1e-6)
        for key, value in alone.items():
            torch.testing.assert_close(together[key], value, rtol=0, atol=1e-6)


def test_its_logits_combine_those_of_each_alone(apart):
    model: Model = apart["ensemble"].model
    assert isinstance(model, Ensemble)
    wide, deep = (score(apart[name].model, VALIDATION) for name in ("wide", "deep"))
    with torch.no_grad():
        shares, bias = model.shares.numpy(), float(model.bias)
    combined = shares[0] * wide + shares[1] * deep + bias
    np.testing.assert_allclose(score(model, VALIDATION), combined, atol=1e-6)
    assert (shares != 0.5).all(), "the weights of both were fitted"
