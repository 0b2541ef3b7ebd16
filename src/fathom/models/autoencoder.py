"""A hybrid autoencoder: what a user did, with side information of both sides, to what they will do.

After Strub, Gaudel and Mary 2016, "Hybrid recommender system based on autoencoders"
(arXiv:1606.07659): a user's known ratings x, some of them hidden in training, are encoded together
with what is known about the user, and an item's rating is decoded by the item's weights. The paper
has side information of one side; here the item's enters where its rating is decoded, so that both
sides may be new::

    h = tanh(V [x̃, z_u] + a)
    y = (w_i + S z_i) . h + b_i + s . z_i

Here x are the embeddings of the user's history, z_u and z_i the deep columns of user (and context)
and of item; the keys are not among them. So a user of whom nothing but a history is known is
encoded like any other, and an item that was never rated, whose w_i and b_i start from 0, is decoded
by what is known about it.

Legend: B examples, H the width of the code (the last of ``hidden``).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional

from fathom.batch import Layout
from fathom.config import ConfigError, TrainingConfig
from fathom.models import Bag, Inputs, Model
from fathom.models.deep import Embeddings


class HybridAutoencoder(nn.Module):
    """See the module's docstring.

    Args:
        config: ``hidden`` (widths of the encoder's layers; the last is the code's) and ``dropout``
            (the share of a history's values that are hidden from the encoder in training). It is
            in float32 whatever ``precision``.
    """

    def __init__(self, layout: Layout, config: TrainingConfig) -> None:
        super().__init__()
        faults = [] if layout.item is not None else ["the item's key as a feature of its own"]
        owners = layout.owners[len(layout.fields) :][: len(layout.bags)]
        self._histories = {i for i, owner in enumerate(owners) if owner != "item"}
        if not self._histories:
            faults.append("a history (a multi or sequence column, not of the item)")
        faults += [] if config.hidden else ["at least one width in training.hidden"]
        if faults:
            raise ConfigError(
                [
                    f"training.model is {config.model!r}, which needs {fault}; add it, or choose "
                    "another model"
                    for fault in faults
                ]
            )
        assert layout.item is not None
        self._item, self._hidden_share = layout.item, config.dropout
        # Vectors of the keys are no input: the user has none, and the item's are the decoder's.
        self._fields = [i for i in range(len(layout.fields)) if i not in (layout.user, layout.item)]
        side = _with_fields(layout, self._fields)
        self.known = Embeddings(side)
        user = self.known.columns.of(side.owners, {"user", "context"})
        item = self.known.columns.of(side.owners, {"item"})
        self.register_buffer("_user", torch.tensor(user, dtype=torch.int64), persistent=False)
        self.register_buffer("_side", torch.tensor(item, dtype=torch.int64), persistent=False)
        layers: list[nn.Module] = []
        width = len(user)
        for next_width in config.hidden:
            layers += [nn.Linear(width, next_width), nn.Tanh()]
            width = next_width
        self.encoder = nn.Sequential(*layers)
        name = layout.fields[layout.item]
        rows = layout.tables[name][0]
        names = layout.names[layout.item : layout.item + 1]
        of_item = Layout(0, {name: (rows, width)}, (name,), (), (), 0, names=names)
        self.decoder = Embeddings(of_item)
        self.bias = Embeddings(replace(of_item, tables={name: (rows, 1)}))
        scale = max(len(item), 1) ** -0.5
        self.side = nn.Parameter(torch.empty(len(item), width + 1).normal_(std=scale))
        with torch.no_grad():
            for table in (*self.decoder.stored, *self.bias.stored):
                table.zero_()

    @property
    def embeddings(self) -> Embeddings:
        """The items' weights, which are published; users have codes, not vectors of their own."""
        return self.decoder

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits, shape (B,)."""
        shown = inputs._replace(
            deep_ids=inputs.deep_ids[:, self._fields], deep_bags=self._corrupted(inputs.deep_bags)
        )
        embedded = self.known(shown)
        code = self.encoder(embedded.index_select(1, self._buffer("_user")))  # (B, H)
        key = inputs.deep_ids[:, [self._item]]
        item = Inputs(inputs.numeric[:, :0], key, (), inputs.wide_ids, ())
        side = embedded.index_select(1, self._buffer("_side")) @ self.side  # (B, H + 1)
        weights = self.decoder(item) + side[:, :-1]
        logit: Tensor = (weights * code).sum(dim=1) + self.bias(item).squeeze(1) + side[:, -1]
        return logit

    def _buffer(self, name: str) -> Tensor:
        return getattr(self, name)  # type: ignore[no-any-return]

    def _corrupted(self, bags: tuple[Bag, ...]) -> tuple[Bag, ...]:
        """Histories of which some values are left out in training."""
        if not self.training or not self._hidden_share:
            return bags
        found = []
        for i, (values, offsets) in enumerate(bags):
            if i not in self._histories:
                found.append(bags[i])
                continue
            kept = torch.rand(len(values), device=values.device) >= self._hidden_share
            before = functional.pad(kept.cumsum(0), (1, 0))
            found.append(Bag(values[kept], before[offsets].to(offsets.dtype)))
        return tuple(found)


def _with_fields(layout: Layout, kept: list[int]) -> Layout:
    """A layout with some of the fields, and with the tables that are still looked up."""
    fields = tuple(layout.fields[i] for i in kept)
    owners, names = (
        tuple(known[i] for i in kept) + known[len(layout.fields) :] if known else ()
        for known in (layout.owners, layout.names)
    )
    tables = {n: size for n, size in layout.tables.items() if n in {*fields, *layout.bags}}
    return replace(
        layout, tables=tables, fields=fields, owners=owners, names=names, user=None, item=None
    )


def hybrid_autoencoder(layout: Layout, config: TrainingConfig) -> Model:
    """A user's history, encoded with side information and decoded for one item."""
    return Model(None, HybridAutoencoder(layout, config))
