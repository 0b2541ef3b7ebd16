"""Warm start: a new model takes over what an old one learnt, by key and not by position.

Vocabularies grow, shrink and change their order between two trainings. Rows whose key both know are
carried with their optimizer's state, bit for bit; new keys start fresh; lost ones are dropped
(Cheng et al. 2016, section 4.1, copies embeddings and linear weights). Layers are carried where
their shapes agree.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fathom import checkpoint
from fathom.batch import WIDE, Layout
from fathom.config import TrainingConfig
from fathom.models import Model, build
from fathom.models.deep import Embeddings
from fathom.models.wide import Wide
from fathom.step import Optimizers

#: A table of a model: the part that it is in, and its name there.
Place = tuple[str, str]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WarmStart:
    """What a training starts from instead of random weights.

    Args:
        folder: the weights and optimizer states that a training kept as its best.
        layout, config: of that training.
        rows: for each table, and for `WIDE`, the old row of each new one, (R,), or -1 for none.
            Tables without an entry start fresh.
    """

    folder: Path
    layout: Layout
    config: TrainingConfig
    rows: Mapping[str, NDArray[np.int64]]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that a model takes over, in hexadecimal."""
        known = [asdict(self.layout), self.config.as_dict(), checkpoint.digest(self.folder)]
        digest = hashlib.sha256(json.dumps(known).encode())
        for name, places in sorted(self.rows.items()):
            digest.update(name.encode() + places.tobytes())
        return digest.hexdigest()

    def apply(self, model: Model, optimizers: Optimizers) -> list[str]:
        """Carry over what can be carried.

        Returns:
            Names of what starts fresh: tables and layers of other widths, and what is new.

        Raises:
            CheckpointError: the folder cannot be read.
            ValueError: rows do not fit a table; names it, and what would fit.
        """
        old = build(self.layout, self.config)
        states = Optimizers(old, self.config)
        named = {f"model.{n}": t for n, t in old.state_dict().items()}
        named |= {f"optimizer.{n}": t for n, t in states.tensors().items()}
        checkpoint.load(self.folder, named)
        fresh = self._carry_tables(_tables(old, states), _tables(model, optimizers))
        fresh += _carry_layers(old, states, model, optimizers)
        if fresh:
            log.info("starting fresh: %s", ", ".join(fresh))
        return fresh

    def _carry_tables(
        self, old: Mapping[Place, dict[str, Tensor]], new: Mapping[Place, dict[str, Tensor]]
    ) -> list[str]:
        fresh = []
        for place, parts in new.items():
            name = place[1]
            places, before = self.rows.get(name), old.get(place)
            if places is None or before is None or _shapes(before) != _shapes(parts):
                fresh.append(name)
                continue
            if len(places) != len(parts["weight"]) or places.max() >= len(before["weight"]):
                raise ValueError(
                    f"the rows of table {name} must be {len(parts['weight'])} places below "
                    f"{len(before['weight'])}; they are {len(places)} up to {places.max()}"
                )
            to = torch.from_numpy(np.flatnonzero(places >= 0))
            source = torch.from_numpy(places[places >= 0])
            for part, values in parts.items():
                values[to] = before[part].index_select(0, source).to(values.device)
        return fresh


def _tables(model: Model, optimizers: Optimizers) -> dict[Place, dict[str, Tensor]]:
    """Each table's weight and optimizer state, (R, ·), sharing memory with what is used."""
    states = {id(w): s for part in optimizers.sparse for w, s in part.state.items()}
    found = {}
    for part, module in model.named_modules():
        if isinstance(module, Wide):
            found[part, WIDE] = {"weight": module.weight.detach(), **states[id(module.weight)]}
        if isinstance(module, Embeddings):
            for name, (stored, start, rows) in module.places.items():
                whole = {"weight": stored.detach(), **states[id(stored)]}
                found[part, name] = {n: value[start : start + rows] for n, value in whole.items()}
    return found


def _carry_layers(old: Model, before: Optimizers, new: Model, after: Optimizers) -> list[str]:
    """Copy dense weights of the same name and shape, with their state."""
    weights = dict(old.named_parameters())
    dense = {id(w) for group in after.dense.param_groups for w in group["params"]}
    fresh = []
    with torch.no_grad():
        for name, weight in new.named_parameters():
            if id(weight) not in dense:
                continue
            if name not in weights or weights[name].shape != weight.shape:
                fresh.append(name)
                continue
            weight.copy_(weights[name])
            for part, value in after.dense.state[weight].items():
                value.copy_(before.dense.state[weights[name]][part])
        moments = dict(old.named_buffers())
        for name, buffer in new.named_buffers():
            known = moments.get(name)
            if known is not None and known.is_floating_point() and known.shape == buffer.shape:
                buffer.copy_(known)
    return fresh


def _shapes(parts: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """What a row consists of."""
    return {name: tuple(value.shape[1:]) for name, value in parts.items()}
