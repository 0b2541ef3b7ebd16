"""One request's candidates, scored by doing once what they share.

A request's columns are of its candidates or of all of them alike (`OnlineFeatures.compact`). The
first layer of the deep part is a sum over its inputs,

    a^(1) = ReLU(sum_f W_f e_f + b)

with e_f the embedding, the pooled embeddings or the numbers of a column and W_f its columns of the
weights. So the terms of what candidates share are summed once per request. The sum over an item's
attributes is made when the item is first seen, and kept under their values: an item whose
attributes change is another one. What is left, numbers above all, is multiplied by weights; then
come the other layers. The wide part's sum is taken apart in the same way. The result is the
reference's (`Ranker.score`) up to the rounding of sums in another order.

Models whose deep part is another one are scored by the reference.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fathom.batch import Ragged
from fathom.encoding import Keys, Values, Vocabulary, column_hashes, cross_keys
from fathom.lookup import spread, spread_frame
from fathom.models import Model
from fathom.models.deep import Deep, Embeddings
from fathom.models.ensemble import Ensemble
from fathom.models.wide import Wide
from fathom.ranker import Ranker, sigmoid

#: Most bytes that the kept terms of items may take.
_MOST_BYTES = 128 << 20

Compact = Mapping[str, Values]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Field:
    """A column that the deep part looks up, and where its inputs stand in the first layer's."""

    name: str
    vocabulary: Vocabulary
    table: Tensor
    inputs: slice

    def embed(self, values: Values) -> Tensor:
        """(n, d) embeddings, of lists their mean."""
        if isinstance(values, Ragged):
            ids = torch.from_numpy(self.vocabulary.ids(values.values))
            offsets = torch.from_numpy(values.offsets.astype(np.int32))
            return functional.embedding_bag(
                ids, self.table, offsets, mode="mean", include_last_offset=True
            )
        return functional.embedding(torch.from_numpy(self.vocabulary.ids(values)), self.table)


class FastScorer:
    """A ranker's fast path. Safe to share between threads.

    Args:
        ranker: whose scores it gives; its weights must not change any more.
        most_bytes: for the kept terms of items; if there are more items, all are begun anew.
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
        if count == 0:
            return np.zeros(0)
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
        spec, embeddings = self._encoder.spec, deep.embeddings
        layers = [part for part in deep.layers if isinstance(part, nn.Linear)]
        first, *self._layers = layers
        outputs = first.out_features
        bias = first.bias
        self._first_bias = torch.zeros(outputs) if bias is None else bias.detach()
        self._weights = first.weight.detach().T.contiguous()  # (D, H)
        # Numbers stand last, two inputs each: the value, and whether it is missing.
        self._numbers = [c.name for c in spec.columns if c.is_numeric and c.deep]
        self._first_number = embeddings.columns.numeric.start
        fields = [
            self._field(embeddings, name, inputs)
            for name, inputs in zip(embeddings.columns.names, embeddings.columns.parts, strict=True)
            if not spec.by_name[name].is_numeric
        ]
        kept = [f for f in fields if spec.owner(f.name) == "item" and not self._is_list(f.name)]
        self._of_items = kept
        self._others = [field for field in fields if field not in kept]
        self._item_weights = self._weights_of(field.inputs for field in kept)
        self._kept = torch.empty(max(most_bytes // (4 * outputs), 0), outputs)
        self._places: dict[tuple[str | None, ...], int] = {}
        self._lock = threading.Lock()
        #: Of what candidates share and what they do not, the weights of both.
        self._chosen: dict[tuple[bool, ...], tuple[Tensor, Tensor]] = {}

    def _field(self, embeddings: Embeddings, name: str, inputs: slice) -> _Field:
        table = self._encoder.table_of[name]
        return _Field(name, self._encoder.tables[table], embeddings.table(table).detach(), inputs)

    def _is_list(self, name: str) -> bool:
        return self._encoder.spec.by_name[name].kind != "categorical"

    def _weights_of(self, inputs: Iterable[slice]) -> Tensor:
        """Rows of the first layer's weights, one part after the other."""
        parts = [self._weights[part] for part in inputs]
        return torch.cat(parts) if parts else self._weights[:0]

    def _deep(self, columns: Compact, count: int) -> NDArray[np.float64]:
        """(N,) or (1,) logits of the deep part."""
        items = self._of_items
        apart = all(len(columns[field.name]) == count for field in items)
        fields = self._others if apart else [*items, *self._others]
        shared: list[Tensor] = []
        differ: list[Tensor] = []
        for field in fields:
            values = columns[field.name]
            (shared if len(values) == 1 else differ).append(field.embed(values))
        numbers = self._scaled(columns)
        shared.append(numbers[0])
        if numbers[1] is not None:
            differ.append(numbers[1])
        of_shared, of_differ = self._choice(fields, columns, apart)
        hidden = torch.addmm(self._first_bias, torch.cat(shared, 1), of_shared)
        if apart and items:
            hidden = self._item_terms([columns[f.name] for f in items]) + hidden
        if differ:
            hidden = torch.addmm(hidden, torch.cat(differ, 1), of_differ)
        if self._layers:
            hidden = functional.relu_(hidden)
        for layer in self._layers:
            hidden = layer(hidden)
        return hidden[:, 0].double().numpy()

    def _choice(
        self, fields: Sequence[_Field], columns: Compact, apart: bool
    ) -> tuple[Tensor, Tensor]:
        """The first layer's weights of the inputs that are shared, and of those that are not."""
        alike = [len(columns[field.name]) == 1 for field in fields]
        alike += [len(columns[name]) == 1 for name in self._numbers]
        key = (apart, *alike)
        if key not in self._chosen:
            start = self._first_number
            inputs = [field.inputs for field in fields]
            inputs += [slice(start + 2 * i, start + 2 * i + 2) for i in range(len(self._numbers))]
            places = list(zip(inputs, alike, strict=True))
            self._chosen[key] = (
                self._weights_of(part for part, is_shared in places if is_shared),
                self._weights_of(part for part, is_shared in places if not is_shared),
            )
        return self._chosen[key]

    def _scaled(self, columns: Compact) -> tuple[Tensor, Tensor | None]:
        """Numeric inputs, (1, 2S) of the numbers that are shared and (N, 2C) of the others."""
        alike: list[float] = []
        differ: list[NDArray[Any]] = []
        for name in self._numbers:
            values = columns[name]
            assert not isinstance(values, Ragged)
            scaled = self._encoder.scalers[name].scale(values)
            if len(values) == 1:
                alike += (float(scaled[0]), float(np.isnan(values[0])))
            else:
                differ += (scaled, np.isnan(values))
        others = torch.from_numpy(np.stack(differ, 1, dtype=np.float32)) if differ else None
        return torch.tensor(alike)[None], others

    # -- what is kept of items -------------------------------------------------------------------

    def _item_terms(self, columns: Sequence[Values]) -> Tensor:
        """(N, H): the sums over each item's attributes, kept for the next request."""
        items = list(zip(*(np.asarray(values).tolist() for values in columns), strict=True))
        with self._lock:
            new = [item for item in dict.fromkeys(items) if item not in self._places]
            if len(self._places) + len(new) > len(self._kept):
                self._places.clear()
                new = list(dict.fromkeys(items))
            if len(new) > len(self._kept):
                return self._sums(items)
            if new:
                start = len(self._places)
                self._kept[start : start + len(new)] = self._sums(new)
                self._places.update(zip(new, range(start, start + len(new)), strict=True))
            places = torch.tensor([self._places[item] for item in items])
            return self._kept.index_select(0, places)

    def _sums(self, items: Sequence[tuple[str | None, ...]]) -> Tensor:
        """(n, H): the sums over items' attributes."""
        columns = [np.array(values, object) for values in zip(*items, strict=True)]
        parts = [f.embed(values) for f, values in zip(self._of_items, columns, strict=True)]
        return torch.cat(parts, 1) @ self._item_weights

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
