"""One request's candidates, scored by doing once what they share.

A request's columns are of its candidates or of all of them alike (`OnlineFeatures.compact`). The
first layer of the deep part is a sum over its inputs,

    a^(1) = ReLU(sum_f W_f e_f + b)

with e_f the embedding, the pooled embeddings or the numbers of a column and W_f its columns of the
weights. So the terms of what candidates share are summed once per request; for a column of items or
contexts the products W_f e_f of all its values are made once, when the ranker is loaded, and looked
up; and only numbers that differ between candidates are multiplied by weights, before the other
layers. The same holds for the wide part's sum. The result is the reference's (`Ranker.score`) up to
the rounding of sums in another order.

Models whose deep part is another one are scored by the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fathom.batch import Ragged
from fathom.encoding import Keys, Values, column_hashes, cross_keys
from fathom.lookup import spread, spread_frame
from fathom.models import Model
from fathom.models.deep import Deep, Embeddings
from fathom.models.ensemble import Ensemble
from fathom.models.wide import Wide
from fathom.ranker import Ranker, sigmoid
from fathom.spec import Column

#: Most bytes that the products of one table's rows with the first layer may take.
_MOST_BYTES = 256 << 20

Compact = Mapping[str, Values]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Field:
    """A column that the deep part looks up: its embeddings, and its part of the first layer.

    Args:
        table: (R, d) embeddings.
        weight: (d, H) columns of the first layer.
        products: (R, H), their product, where it is kept.
    """

    column: Column
    table: Tensor
    weight: Tensor
    products: Tensor | None


class FastScorer:
    """A ranker's fast path. Safe to share between threads.

    Args:
        ranker: whose scores it gives; its weights must not change any more.
        most_bytes: for the products of one table's rows.
    """

    def __init__(self, ranker: Ranker, most_bytes: int = _MOST_BYTES) -> None:
        self._ranker, self._encoder = ranker, ranker.encoder
        model = ranker.model
        #: Whether there is a faster way than the reference.
        self.available = _is_sum(model)
        if not self.available:
            return
        shares = (1.0, 1.0, float(model.bias.detach()))
        if isinstance(model, Ensemble):
            bias = float(model.bias.detach() + model.shares.detach() @ model.biases.detach())
            wide, deep = model.shares.detach().tolist()
            shares = (wide, deep, bias)
        self._wide_share, self._deep_share, self._bias = shares
        self._wide = model.wide.weight.detach()[:, 0] if isinstance(model.wide, Wide) else None
        self._is_deep = isinstance(model.deep, Deep)
        if isinstance(model.deep, Deep):
            self._split(model.deep, most_bytes)

    def score(self, columns: Compact, count: int) -> NDArray[np.float64]:
        """Probabilities (for regression: predicted values) of N candidates.

        Args:
            columns: every column of the spec, of N rows or of one for all.
            count: N.
        """
        if not self.available:
            return self._ranker.score(spread_frame(columns, count))
        with torch.inference_mode():
            logits = np.full(count, self._bias)
            if self._is_deep:
                logits += self._deep_share * self._deep(columns, count)
        if self._wide is not None:
            logits += self._wide_share * self._cross(columns, count)
        return sigmoid(logits) if self._ranker.spec.task == "binary" else logits

    # -- the deep part ---------------------------------------------------------------------------

    def _split(self, deep: Deep, most_bytes: int) -> None:
        """Take the first layer apart by the columns that it reads."""
        encoder, embeddings = self._encoder, deep.embeddings
        linear = [part for part in deep.layers if isinstance(part, torch.nn.Linear)]
        weights = [(part.weight.detach(), part.bias) for part in linear]
        first, bias = weights[0]
        #: Weights and biases of the layers behind the first.
        self._layers = [(w, None if b is None else b.detach()) for w, b in weights[1:]]
        self._first_bias = torch.zeros(len(first)) if bias is None else bias.detach()
        self._numbers = [c for c in encoder.spec.columns if c.is_numeric and c.deep]
        self._number_weights = first[:, embeddings.columns.numeric].T.contiguous()
        #: Of each choice of numbers that candidates do not share, the weights of both kinds.
        self._chosen: dict[tuple[bool, ...], tuple[Tensor, Tensor]] = {}
        columns = encoder.spec.by_name
        names, parts = embeddings.columns.names, embeddings.columns.parts
        self._fields = [
            self._field(embeddings, columns[name], first[:, part], most_bytes)
            for name, part in dict(zip(names, parts, strict=True)).items()
            if not columns[name].is_numeric
        ]

    def _field(
        self, embeddings: Embeddings, column: Column, weight: Tensor, most_bytes: int
    ) -> _Field:
        table = embeddings.table(self._encoder.table_of[column.name]).detach()
        shared = self._encoder.spec.owner(column.name) == "user"
        small = len(table) * len(weight) * 4 <= most_bytes
        products = table @ weight.T if small and not shared else None
        return _Field(column, table, weight.T.contiguous(), products)

    def _deep(self, columns: Compact, count: int) -> NDArray[np.float64]:
        """(N,) or (1,) logits of the deep part."""
        common, own = self._first_bias.clone(), None
        for field in self._fields:
            term = self._term(field, columns[field.column.name])
            if len(term) == 1:
                common += term[0]
            else:
                own = term if own is None else own.add_(term)
        shared, numbers = self._scaled(columns, count)
        differ = tuple(len(columns[c.name]) != 1 for c in self._numbers)
        if differ not in self._chosen:
            chosen = torch.tensor(differ).repeat_interleave(2)
            self._chosen[differ] = (self._number_weights[~chosen], self._number_weights[chosen])
        of_shared, of_numbers = self._chosen[differ]
        common = torch.addmv(common, of_shared.T, shared)
        hidden = common[None] if own is None else own.add_(common)
        if numbers is not None:
            hidden = torch.addmm(hidden, numbers, of_numbers)
        for weight, bias in self._layers:
            hidden = functional.linear(functional.relu_(hidden), weight, bias)
        return hidden[:, 0].double().numpy()

    def _term(self, field: _Field, values: Values) -> Tensor:
        """(N, H) or (1, H): a column's term of the first layer."""
        table = field.table if field.products is None else field.products
        vocabulary = self._encoder.tables[self._encoder.table_of[field.column.name]]
        if isinstance(values, Ragged):
            ids = torch.from_numpy(vocabulary.ids(values.values))
            offsets = torch.from_numpy(values.offsets.astype(np.int32))
            found = functional.embedding_bag(
                ids, table, offsets, mode="mean", include_last_offset=True
            )
        else:
            found = functional.embedding(torch.from_numpy(vocabulary.ids(values)), table)
        return found @ field.weight if field.products is None else found

    def _scaled(self, columns: Compact, count: int) -> tuple[Tensor, Tensor | None]:
        """Numeric inputs, (2S,) of the numbers that are shared and (N, 2C) of the others."""
        alike: list[float] = []
        differ: list[NDArray[Any]] = []
        for column in self._numbers:
            values = columns[column.name]
            assert not isinstance(values, Ragged)
            scaled = self._encoder.scalers[column.name].scale(values)
            if len(values) == 1:
                alike += (float(scaled[0]), float(np.isnan(values[0])))
            else:
                differ += (scaled, np.isnan(values))
        shared = torch.tensor(alike)
        return shared, torch.from_numpy(np.stack(differ, 1, dtype=np.float32)) if differ else None

    # -- the wide part ---------------------------------------------------------------------------

    def _cross(self, columns: Compact, count: int) -> NDArray[np.float64]:
        """(N,) or (1,) sums of the weights of all wide columns and crosses."""
        assert self._wide is not None
        weights = self._wide.numpy()
        total: NDArray[np.float64] = np.zeros(1)
        hashed: dict[str, Keys | Ragged] = {}
        crosses = {cross.name: cross for cross in self._encoder.spec.crosses}
        start = 0
        for name, rows, _ in self._encoder.slots:
            own = weights[start : start + rows]
            start += rows
            if name not in crosses:
                total = total + _summed(own, self._encoder.wide[name].ids, columns[name])
                continue
            names = crosses[name].columns
            for part in names:
                if part not in hashed:
                    hashed[part] = column_hashes(self._encoder.spec.by_name[part], columns[part])
            keys, places = _combined([hashed[part] for part in names])
            sums = _summed(own, self._encoder.crosses[name].ids, keys)
            total = total + (sums if places is None else sums.take(places))
        return total


def _combined(parts: Sequence[Keys | Ragged]) -> tuple[Keys | Ragged, Ints | None]:
    """Keys of a cross; if a single part differs between candidates, once for each of its values.

    Returns:
        Keys of U rows, and the row of each candidate; None if they are the same.
    """
    count = max(map(len, parts))
    differ = [i for i, part in enumerate(parts) if len(part) != 1]
    if len(differ) == 1 and not isinstance(part := parts[differ[0]], Ragged):
        values, places = np.unique(part, return_inverse=True)
        given = [values if i == differ[0] else part for i, part in enumerate(parts)]
        return cross_keys([_spread(part, len(values)) for part in given]), places
    return cross_keys([_spread(part, count) for part in parts]), None


def _spread(part: Keys | Ragged, count: int) -> Keys | Ragged:
    found: Keys | Ragged = spread(part, count)
    return found


def _summed(
    weights: NDArray[np.float32], ids_of: Callable[[Any], NDArray[Any]], values: Values
) -> NDArray[np.float64]:
    """The sum of the weights of each row's values."""
    if not isinstance(values, Ragged):
        return weights.take(ids_of(values)).astype(np.float64)
    found = np.append(weights.take(ids_of(values.values)), np.float32(0))
    sums: NDArray[np.float64] = np.add.reduceat(found.astype(np.float64), values.offsets[:-1])
    sums[values.lengths == 0] = 0.0
    return sums


def _is_sum(model: Model) -> bool:
    """Whether a model's logit is what `FastScorer` adds up."""
    return (
        type(model) in (Model, Ensemble)
        and type(model.deep) in (Deep, type(None))
        and type(model.wide) in (Wide, type(None))
    )
