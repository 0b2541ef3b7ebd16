"""The deep part: a^(l+1) = ReLU(W^(l) a^(l) + b^(l)) (Cheng et al. 2016, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fathom.batch import Layout
from fathom.models import Bag, Inputs
from fathom.models.tables import Tables, look_up, pool
from fathom.parallel import Shard

#: Standard deviation of initial embeddings: small, so that rare ids start as no opinion.
_INITIAL_SCALE = 0.05
#: Columns that a bfloat16 product is padded to; odd widths take twice the time.
_LANES = 16


class Embeddings(Tables):
    """Embeddings of all deep fields beside the numeric inputs.

    Tables of one width are stored as one, each from a row of its own on, so that all their fields
    are looked up at once. Fields that share a table share its weights. The values of a multi-valued
    field are averaged; an empty one gives zeros. In a state dict each table has a name of its own.

    Args:
        layout: its tables, fields and bags; ``layout.deep_width`` is the output's width D. Fields
            stand by width, in the order of each width's first; then the bags, then the numbers.
    """

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        total: dict[int, int] = {}
        self._places: dict[str, tuple[str, int, int]] = {}  # table → its stored one, start, rows
        for name, (rows, size) in layout.tables.items():
            self._places[name] = (str(size), total.get(size, 0), rows)
            total[size] = total.get(size, 0) + rows
        for size, rows in total.items():
            table = torch.empty(rows, size).normal_(std=_INITIAL_SCALE)
            self.register_parameter(f"_stored_{size}", nn.Parameter(table))
        places = [self._places[name] for name in layout.fields]
        self._widths = list(dict.fromkeys(stored for stored, _, _ in places))
        self.columns = _columns(layout)
        for width in self._widths:
            columns = [i for i, place in enumerate(places) if place[0] == width]
            starts = [places[i][1] for i in columns]
            self.register_buffer(f"_columns_{width}", torch.tensor(columns), persistent=False)
            self.register_buffer(
                f"_starts_{width}", torch.tensor(starts, dtype=torch.int32), persistent=False
            )
        self._bags = [self._places[name] for name in layout.bags]

    @property
    def places(self) -> dict[str, tuple[Tensor, int, int]]:
        """Where each table is: the stored one, its first row there, and its rows."""
        return {n: (self._stored(w), start, rows) for n, (w, start, rows) in self._places.items()}

    def table(self, name: str) -> Tensor:
        """A table's rows (R, width), sharing memory with what is trained."""
        width, start, rows = self._places[name]
        return self._stored(width)[start : start + rows]

    def place(self, bag: int) -> tuple[Tensor, int]:
        """The stored table of a bag, and its first row there."""
        width, start, _ = self._bags[bag]
        return self._stored(width), start

    def _stored(self, width: str) -> Tensor:
        return cast("Tensor", getattr(self, f"_stored_{width}"))

    def forward(self, inputs: Inputs) -> Tensor:
        """(B, F) ids, G bags and (B, M) numbers in, (B, D) out."""
        single = [self._look_up(inputs.deep_ids, width) for width in self._widths]
        bags = [
            pool(self._stored(width), Bag(bag.values + start, bag.offsets), "mean", self.holders)
            for (width, start, _), bag in zip(self._bags, inputs.deep_bags, strict=True)
        ]
        return torch.cat([*single, *bags, inputs.numeric], dim=1)

    def _look_up(self, ids: Tensor, width: str) -> Tensor:
        """(B, F) ids → (B, fields of that width x width)."""
        columns = cast("Tensor", getattr(self, f"_columns_{width}"))
        chosen = ids if len(columns) == ids.shape[1] else ids.index_select(1, columns)
        rows = chosen + cast("Tensor", getattr(self, f"_starts_{width}"))
        return look_up(self._stored(width), rows, self.holders).flatten(1)

    def named(self) -> dict[str, Tensor | Shard]:
        """Its part of the model's state dict."""
        found: dict[str, Tensor | Shard] = {}
        for name, (width, start, rows) in self._places.items():
            stored = self._stored(width).detach()
            found[f"tables.{name}.weight"] = (
                stored[start : start + rows]
                if self.holders is None
                else Shard(stored, start, rows, self.holders)
            )
        return found

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        if self.holders is not None:  # each table is somewhere else: `named_weights`
            return
        for name in self._places:
            table = self.table(name)
            destination[f"{prefix}tables.{name}.weight"] = table if keep_vars else table.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        expected = {f"{prefix}tables.{name}.weight": name for name in self._places}
        unexpected_keys += [
            key
            for key in state_dict
            if key.startswith(prefix)
            and key not in expected
            and key.removeprefix(prefix).split(".")[0] not in self._modules
        ]
        for key, name in expected.items():
            table = self.table(name)
            if key not in state_dict:
                missing_keys.append(key)
            elif state_dict[key].shape != table.shape:
                error_msgs.append(
                    f"{key} has shape {tuple(state_dict[key].shape)}; the model's is "
                    f"{tuple(table.shape)}"
                )
            else:
                with torch.no_grad():
                    table.copy_(state_dict[key])


class Columns(NamedTuple):
    """Where the parts of an `Embeddings` output are: each field's, each bag's, and the numbers.

    ``names`` are of the columns that they are of, in that order (`Layout.names`).
    """

    fields: tuple[slice, ...]
    bags: tuple[slice, ...]
    numeric: slice
    names: tuple[str, ...]

    @property
    def parts(self) -> list[slice]:
        """The columns of each field, each bag and each number."""
        numbers = range(self.numeric.start, self.numeric.stop)
        return [*self.fields, *self.bags, *(slice(i, i + 1) for i in numbers)]

    def of(self, owners: Sequence[str], wanted: Set[str]) -> list[int]:
        """Columns of the owners that are wanted (`Layout.owners`)."""
        owned = zip(owners, self.parts, strict=True)
        return [c for owner, s in owned if owner in wanted for c in range(s.start, s.stop)]


def _columns(layout: Layout) -> Columns:
    widths = [layout.tables[name][1] for name in layout.fields]
    starts, start = [0] * len(widths), 0
    for width in dict.fromkeys(widths):
        for i in (i for i, other in enumerate(widths) if other == width):
            starts[i], start = start, start + width
    bags = []
    for name in layout.bags:
        bags.append(slice(start, start + layout.tables[name][1]))
        start = bags[-1].stop
    fields = (slice(s, s + width) for s, width in zip(starts, widths, strict=True))
    numbers = slice(start, start + layout.numeric)
    return Columns(tuple(fields), tuple(bags), numbers, layout.names)


class ReluLinear(nn.Linear):
    """ReLU(x W^T + b); in training the products may be computed in bfloat16.

    Weights, their gradients and the sums inside a product stay float32.
    """

    def __init__(self, inputs: int, outputs: int, bfloat16: bool = False) -> None:
        super().__init__(inputs, outputs)
        self._bfloat16 = bfloat16

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs) in, (B, outputs) out; bfloat16 if that is what it computes in."""
        dtype = torch.bfloat16 if self._bfloat16 and self.training else self.weight.dtype
        if x.device.type == "cpu" and len(x) and _fuses(dtype):
            activated: Tensor = _ReluLinear.apply(  # type: ignore[no-untyped-call]
                x, self.weight, self.bias, dtype
            )
            return activated
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return functional.relu(functional.linear(x.to(dtype), weight, bias))


def relu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """(B, outputs): ReLU(x W^T + b) of one type, by oneDNN where it has it; without a gradient."""
    if x.device.type == "cpu" and len(x) and _fuses(weight.dtype):
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "relu", [], "")
        return found
    return functional.relu_(functional.linear(x, weight, bias))


@cache
def _fuses(dtype: torch.dtype) -> bool:
    """Whether this build and processor have oneDNN's fused product in a type."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    half = dtype == torch.bfloat16
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) if half else dtype == torch.float32


class _ReluLinear(torch.autograd.Function):
    """`ReluLinear` on a CPU by oneDNN's fused product, which is what torch compiles it to.

    Beside what autograd would do it saves a pass over the activations each way, and pads odd
    widths.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.inputs, ctx.x_dtype = x.shape[1], x.dtype
        used, product = _padded(x, dtype), _padded(weight, dtype)
        output: Tensor = torch.ops.mkldnn._linear_pointwise(
            used, product, bias.to(dtype), "relu", [], ""
        )
        ctx.save_for_backward(used, product, output)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        used, product, output = ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(gradients[0].to(output.dtype), output, 0)
        into: Tensor | None = None
        if ctx.needs_input_grad[0]:
            if gradient.dtype == torch.bfloat16:
                into = gradient @ product
            else:
                into = torch.ops.mkldnn._linear_pointwise(
                    gradient, product.t().contiguous(), None, "none", [], ""
                )
            into = into[:, : ctx.inputs].to(ctx.x_dtype)
        weight = (gradient.t() @ used)[:, : ctx.inputs].float()
        # A product adds up in float32 whatever its type, and does not make a float32 copy first.
        bias = (gradient.new_ones(1, len(gradient)) @ gradient).squeeze(0).float()
        return into, weight, bias, None


def _padded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, columns) in a type; in bfloat16, with zeros up to a multiple of `_LANES` columns."""
    rows, columns = values.shape
    over = -columns % _LANES if dtype == torch.bfloat16 else 0
    if not over:
        return values.to(dtype).contiguous()
    padded = values.new_zeros((rows, columns + over), dtype=dtype)
    padded[:, :columns] = values
    return padded


class Layers(nn.Sequential):
    """ReLU layers: (B, inputs) in, (B, ``width``) out, in bfloat16 if that is what they compute in.

    Args:
        inputs: width of what goes in.
        hidden: widths of the layers.
        dropout: share of activations dropped after each.
        bfloat16: whether the products may be computed so in training.
    """

    def __init__(
        self, inputs: int, hidden: tuple[int, ...], dropout: float, bfloat16: bool = False
    ) -> None:
        super().__init__()
        self.width = inputs
        for next_width in hidden:
            self.append(ReluLinear(self.width, next_width, bfloat16))
            self.append(nn.Dropout(dropout))
            self.width = next_width

    def forward(self, x: Tensor) -> Tensor:
        """One after the other."""
        for layer in self:
            # Eight bits would round logits that differ; products that are no layer's are small.
            x = layer(x.to(layer.weight.dtype) if type(layer) is nn.Linear else x)
        return x


class Deep(nn.Module):
    """Embeddings, then ReLU layers, then one logit (its bias is the model's).

    Args:
        hidden: widths of the ReLU layers.
        dropout: share of activations dropped after each.
        bfloat16: whether the ReLU layers' products may be computed so in training.
    """

    def __init__(
        self, layout: Layout, hidden: tuple[int, ...], dropout: float, bfloat16: bool = False
    ) -> None:
        super().__init__()
        self.embeddings = Embeddings(layout)
        self.layers = Layers(layout.deep_width, hidden, dropout, bfloat16)
        self.layers.append(nn.Linear(self.layers.width, 1, bias=False))

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits, shape (B,)."""
        logit: Tensor = self.layers(self.embeddings(inputs)).squeeze(-1)
        return logit
