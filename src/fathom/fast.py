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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from fathom.batch import Ragged
from fathom.encoding import Keys, Scaler, Values, Vocabulary, column_hashes, cross_keys
from fathom.kept import KeptItems
from fathom.lookup import spread, spread_frame
from fathom.models import Model
from fathom.models.deep import Deep, Embeddings, relu_linear
from fathom.models.ensemble import Ensemble
from fathom.models.wide import Wide
from fathom.ranker import TOLERANCE, Ranker, sigmoid
from fathom.spec import FeatureSpec

#: Most bytes that what is kept of items may take.
_MOST_BYTES = 128 << 20
#: How far a probability may be from the reference's where layers compute in bfloat16.
HALF_TOLERANCE = 0.02

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


class _Scales:
    """`Scaler.scale` of C columns at once."""

    def __init__(self, scalers: Sequence[Scaler]) -> None:
        most = max((len(scaler.quantiles) for scaler in scalers), default=0)
        self._bounds = torch.full((len(scalers), max(most, 2)), torch.inf, dtype=torch.float64)
        lasts = torch.zeros(len(scalers), 1, dtype=torch.int64)
        for row, last, scaler in zip(self._bounds, lasts, scalers, strict=True):
            quantiles = torch.from_numpy(scaler.quantiles)
            last += len(quantiles) - 1
            # One alone says nothing: whatever is between these two is in the middle.
            row[: max(len(quantiles), 2)] = quantiles if last else torch.tensor([0.0, 1.0])
        self._step = torch.where(lasts > 0, 1 / lasts.double(), 0.0)
        self._middle = torch.where(lasts > 0, 0.0, 0.5).double()
        self._below = (lasts - 1).clamp(min=0)

    def __call__(self, numbers: Tensor) -> Tensor:
        """(C, n) numbers in, (2C, n) out: distribution values, then whether each was missing."""
        at = torch.searchsorted(self._bounds, numbers, right=True).sub_(1).clamp_(min=0)
        at = torch.minimum(at, self._below)
        low, high = self._bounds.gather(1, at), self._bounds.gather(1, at + 1)
        scaled = (numbers - low).div_(high - low).clamp_(0, 1).add_(at)
        missing = torch.isnan(numbers)
        scaled.mul_(self._step).add_(self._middle).masked_fill_(missing, 0)
        return torch.cat([scaled, missing]).float()


@dataclass(frozen=True)
class _Part:
    """The first layer's inputs that candidates share, or those that differ, and their weights."""

    fields: Sequence[_Field]
    numbers: Sequence[str]
    scales: _Scales
    weights: Tensor

    def added_to(self, hidden: Tensor, columns: Compact) -> Tensor:
        """(1, H) or (N, H) in, with what these inputs, of 1 row or of N, add to it out."""
        if len(self.weights) == 0:
            return hidden
        parts = [field.embed(columns[field.name]) for field in self.fields]
        if self.numbers:
            numbers = [np.asarray(columns[name]) for name in self.numbers]
            flat = torch.from_numpy(np.concatenate(numbers, dtype=np.float64))
            parts.append(self.scales(flat.view(len(numbers), -1)).T)
        return torch.addmm(hidden, torch.cat(parts, 1), self.weights)


class FastScorer:
    """A ranker's fast path. Safe to share between threads.

    Args:
        ranker: whose scores it gives; its weights must not change any more.
        most_bytes: for what is kept of items; if it takes more, it is begun anew.
        precision: of the layers between the first and the last. In bfloat16 the sums inside a
            product stay float32, but scores are no longer the reference's to within its rounding.
    """

    def __init__(
        self,
        ranker: Ranker,
        most_bytes: int = _MOST_BYTES,
        precision: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        self._ranker, self._encoder = ranker, ranker.encoder
        self._type = torch.bfloat16 if precision == "bfloat16" else torch.float32
        #: How far a probability may be from the reference's.
        self.tolerance = TOLERANCE if precision == "float32" else HALF_TOLERANCE
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
        spec = self._encoder.spec
        of_items = [
            c.name for c in spec.columns if c.kind == "categorical" and spec.owner(c.name) == "item"
        ]
        self._items = KeptItems(of_items, most_bytes)
        self._of_items = frozenset(of_items)
        self._slots = [] if self._wide is None else list(self._wide_slots(self._wide.numpy()))
        #: Of what is kept; requests that come at once take turns.
        self._lock = threading.Lock()
        if isinstance(model.deep, Deep):
            self._split(model.deep)

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
        logits = np.full(count, self._bias)
        with self._lock, torch.inference_mode():
            apart = all(len(columns[name]) == count for name in self._of_items)
            places = self._items.find(columns) if apart and self._of_items else None
            if self._is_deep:
                logits += self._deep_share * self._deep(columns, places)
            if self._wide is not None:
                logits += self._wide_share * self._cross(columns, places)
        return sigmoid(logits) if self._ranker.spec.task == "binary" else logits

    # -- the deep part ---------------------------------------------------------------------------

    def _split(self, deep: Deep) -> None:
        """Take the first layer apart by the columns that it reads."""
        spec, embeddings = self._encoder.spec, deep.embeddings
        layers = [part for part in deep.layers if isinstance(part, nn.Linear)]
        first, *others = layers
        self._layers = [
            (layer.weight.detach().to(self._type), layer.bias.detach().to(self._type))
            for layer in others[:-1]
        ]
        self._last = others[-1] if others else None
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
        self._item_fields = [field for field in fields if field.name in self._of_items]
        self._others = [field for field in fields if field.name not in self._of_items]
        self._item_weights = self._weights_of(field.inputs for field in self._item_fields)
        self._names = [*(field.name for field in fields), *self._numbers]
        #: By which of the columns candidates share, if the items' are apart.
        self._chosen: dict[tuple[bool, ...], tuple[_Part, _Part]] = {}

    def _field(self, embeddings: Embeddings, name: str, inputs: slice) -> _Field:
        table = self._encoder.table_of[name]
        return _Field(name, self._encoder.tables[table], embeddings.table(table).detach(), inputs)

    def _weights_of(self, inputs: Iterable[slice]) -> Tensor:
        """Rows of the first layer's weights, one part after the other."""
        parts = [self._weights[part] for part in inputs]
        return torch.cat(parts) if parts else self._weights[:0]

    def _deep(self, columns: Compact, places: Ints | None) -> NDArray[np.float64]:
        """(N,) or (1,) logits of the deep part."""
        shared, differ = self._parts(columns, places is not None)
        hidden = shared.added_to(self._first_bias[None], columns)
        if places is not None and self._item_fields:
            hidden = self._item_terms(columns, places) + hidden
        hidden = differ.added_to(hidden, columns)
        if self._last is not None:
            hidden = functional.relu_(hidden).to(self._type)
            for weight, bias in self._layers:
                hidden = relu_linear(hidden, weight, bias)
            hidden = self._last(hidden.float())
        return hidden[:, 0].double().numpy()

    def _parts(self, columns: Compact, apart: bool) -> tuple[_Part, _Part]:
        """The inputs that candidates share, and those that differ between them."""
        fields = self._others if apart else [*self._item_fields, *self._others]
        key = (apart, *(len(columns[name]) == 1 for name in self._names))
        if key not in self._chosen:
            found = []
            for alike in (True, False):
                some = [field for field in fields if (len(columns[field.name]) == 1) == alike]
                names = [name for name in self._numbers if (len(columns[name]) == 1) == alike]
                firsts = [self._first_number + 2 * self._numbers.index(name) for name in names]
                places = [field.inputs for field in some]
                places += [slice(first + i, first + i + 1) for i in (0, 1) for first in firsts]
                scales = _Scales([self._encoder.scalers[name] for name in names])
                found.append(_Part(some, names, scales, self._weights_of(places)))
            self._chosen[key] = (found[0], found[1])
        return self._chosen[key]

    def _item_terms(self, columns: Compact, places: Ints) -> Tensor:
        """(N, H): the sums over each item's attributes, which are kept."""

        def sums(new: Ints) -> NDArray[np.float32]:
            parts = [f.embed(np.asarray(columns[f.name])[new]) for f in self._item_fields]
            found: NDArray[np.float32] = (torch.cat(parts, 1) @ self._item_weights).numpy()
            return found

        like = np.empty((0, len(self._first_bias)), np.float32)
        return torch.from_numpy(self._items.numbers("first layer", like, places, sums))

    # -- the wide part ---------------------------------------------------------------------------

    def _wide_slots(self, weights: NDArray[np.float32]) -> Iterator[_Slot]:
        """The wide part's slots and their weights."""
        spec, encoder = self._encoder.spec, self._encoder
        crosses = {cross.name: cross for cross in spec.crosses}
        start = 0
        for name, rows, _ in encoder.slots:
            of_name = weights[start : start + rows]
            start += rows
            names = crosses[name].columns if name in crosses else (name,)
            context = tuple(n for n in names if n not in self._of_items)
            kept = len(context) < len(names) and all(
                spec.owner(n) == "context" and spec.by_name[n].kind in {"categorical", "numeric"}
                for n in context
            )
            ids = encoder.crosses[name].ids if name in crosses else encoder.wide[name].ids
            yield _Slot(name, names, name in crosses, context, kept, of_name, ids)

    def _cross(self, columns: Compact, places: Ints | None) -> NDArray[np.float64]:
        """(N,) or (1,) sums of the weights of all wide columns and crosses."""
        total: NDArray[np.float64] = np.zeros(1)
        hashes = _Hashes(self._encoder.spec, columns)
        for slot in self._slots:
            alike = all(len(columns[name]) == 1 for name in slot.context)
            if places is None or not slot.kept or not alike:
                total = total + slot.sums(columns, hashes)
                continue

            def sums(new: Ints, slot: _Slot = slot) -> NDArray[np.float64]:
                some = dict(columns)
                for name in slot.columns:
                    if name not in slot.context:
                        some[name] = np.asarray(columns[name])[new]
                return slot.sums(some, _Hashes(self._encoder.spec, some))

            key = (slot.name, *(int(hashes.of(name)[0]) for name in slot.context))
            total = total + self._items.numbers(key, np.empty(0), places, sums)
        return total


class _Hashes:
    """The hashes of a request's columns, each computed when it is first asked for."""

    def __init__(self, spec: FeatureSpec, columns: Compact) -> None:
        self._spec, self._columns = spec, columns
        self._found: dict[str, Keys | Ragged] = {}

    def of(self, name: str) -> Any:
        """(n,) or lists, as the column is."""
        if name not in self._found:
            self._found[name] = column_hashes(self._spec.by_name[name], self._columns[name])
        return self._found[name]


@dataclass(frozen=True)
class _Slot:
    """A wide column or a cross.

    Args:
        columns: what it is of.
        context: those of them that are no attributes of the item.
        kept: whether its sums may be kept for each item and context.
        weights: of its ids.
    """

    name: str
    columns: Sequence[str]
    is_cross: bool
    context: Sequence[str]
    kept: bool
    weights: NDArray[np.float32]
    ids: Callable[[Any], NDArray[Any]]

    def sums(self, columns: Compact, hashes: _Hashes) -> NDArray[np.float64]:
        """(N,) or (1,) sums of the weights of its values."""
        if not self.is_cross:
            return _summed(self.weights, self.ids, columns[self.name])
        keys, places = _combined([hashes.of(name) for name in self.columns])
        sums = _summed(self.weights, self.ids, keys)
        return sums if places is None else sums.take(places)


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
