"""What each feature contributes to the deep part's logit: integrated gradients.

Sundararajan, Taly and Yan 2017, "Axiomatic attribution for deep networks" (arXiv:1703.01365): the
gradient of the logit with respect to what a feature gives the layers, its embedding or its number,
integrated on the straight way from a baseline, times the way. The baseline is an example of which
nothing is known, whose ids are the trained *missing* ones. So the features' shares add up to the
logit less the baseline's (their theorem 1, *completeness*), up to the error of a sum of ``steps``
terms.

The wide part needs none of this: its terms are exact (`fathom.models.Contributions`).

The only module that knows Captum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fathom.batch import Batch
from fathom.models import Inputs, Model
from fathom.models.deep import Embeddings

#: The name of the baseline's logit among the shares.
BASELINE = "baseline"
#: Examples, times steps, that the deep part sees at a time, which bounds memory.
_ROWS = 16_384


def load() -> None:
    """Import Captum, which takes seconds, before `attribute` is first called."""
    import captum.attr  # noqa: F401


def attribute(
    model: Model, batch: Batch, nothing: Batch, steps: int = 64
) -> dict[str, NDArray[np.float64]]:
    """Each column's share of the deep part's logit.

    Args:
        model: with a deep part, in evaluation mode, whose layers read nothing but embeddings.
        batch: N encoded examples.
        nothing: one example of which nothing is known (`fathom.encoding.Encoder.nothing`).
        steps: gradients that are summed.

    Returns:
        Column → (N,), and ``baseline``, (N,). They sum to the deep logit, up to the error of the
        sum over steps.

    Raises:
        ValueError: the model has no deep part.
    """
    from captum.attr import IntegratedGradients

    deep = model.deep
    if deep is None:
        raise ValueError("this model has no deep part; the terms of its wide part are exact")
    layers = [part for part in deep.modules() if isinstance(part, Embeddings)]
    inputs, none = Inputs.of(batch), Inputs.of(nothing)

    def logits(*embedded: Tensor) -> Tensor:
        with _in_place_of(layers, embedded):
            return model.contributions(inputs).deep

    ends = _embedded(deep, layers, inputs)
    begins = [b.expand_as(e) for b, e in zip(_embedded(deep, layers, none), ends, strict=True)]
    shares = IntegratedGradients(logits).attribute(
        tuple(ends),
        baselines=tuple(begins),
        n_steps=steps,
        method="gausslegendre",
        internal_batch_size=max(_ROWS, len(batch)),
    )
    with torch.no_grad():
        found = {BASELINE: np.full(len(batch), float(model.contributions(none).deep))}
    for layer, share in zip(layers, shares, strict=True):
        for name, columns in zip(layer.columns.names, layer.columns.parts, strict=True):
            part = share[:, columns].sum(dim=1).double().numpy()
            found[name] = found.get(name, 0.0) + part
    return found


@torch.no_grad()
def _embedded(deep: nn.Module, layers: Sequence[Embeddings], inputs: Inputs) -> list[Tensor]:
    """What each of the layers gives the rest."""
    found: dict[Embeddings, Tensor] = {}

    def keep(layer: nn.Module, _: tuple[Inputs, ...], output: Tensor) -> None:
        assert isinstance(layer, Embeddings)
        found[layer] = output

    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        deep(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return [found[layer] for layer in layers]


@contextmanager
def _in_place_of(layers: Sequence[Embeddings], outputs: Sequence[Tensor]) -> Iterator[None]:
    """Let the layers give these outputs, whatever their inputs."""
    given = dict(zip(layers, outputs, strict=True))
    handles = [layer.register_forward_hook(lambda layer, *_: given[layer]) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
