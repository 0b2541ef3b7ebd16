"""Products of embeddings: factorization machines, matrix factorisation, and the neural one.

Legend: B examples, k the number of factors (``training.factors``), v_f the vector of field f,
x_m number m, p_u and q_i the vectors of user and item, b_u and b_i their biases.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor, nn

from fathom.batch import Layout
from fathom.config import ConfigError, TrainingConfig
from fathom.models import Inputs, Model
from fathom.models.deep import Embeddings, Layers


class FactorizationMachine(nn.Module):
    """Products of all pairs of fields: sum over f < g of v_f . v_g (Rendle 2010, equation 1).

    Computed in linear time, as the sum over factors of ((sum v)² - sum v²) / 2 (his lemma 3.1). A
    bag is a field by its mean; number m is one by x_m times a vector of its own. A field whose
    embedding is not k wide is projected to k first.
    """

    def __init__(self, embeddings: Embeddings, factors: int) -> None:
        super().__init__()
        columns = embeddings.columns
        self._numeric = columns.numeric
        runs = [
            list(run)
            for _, run in itertools.groupby(
                sorted((*columns.fields, *columns.bags), key=lambda c: c.start),
                key=lambda c: c.stop - c.start,
            )
        ]
        #: Neighbours of one width: where they start and end, and how wide each is.
        self._runs = [(run[0].start, run[-1].stop, run[0].stop - run[0].start) for run in runs]
        self.projections = nn.ParameterDict(
            {
                str(i): nn.Parameter(
                    torch.empty((stop - start) // width, width, factors).normal_(std=width**-0.5)
                )
                for i, (start, stop, width) in enumerate(self._runs)
                if width != factors
            }
        )
        numbers = columns.numeric.stop - columns.numeric.start
        self.numeric = nn.Parameter(torch.empty(numbers, factors).normal_(std=0.05))

    def forward(self, embedded: Tensor) -> Tensor:
        """(B, D) embeddings and numbers in, (B,) out."""
        numbers = embedded[:, self._numeric]
        total, squares = numbers @ self.numeric, numbers.square() @ self.numeric.square()
        for i, (start, stop, width) in enumerate(self._runs):
            fields = (stop - start) // width
            vectors = embedded[:, start:stop].reshape(len(embedded), fields, width)
            if str(i) in self.projections:
                vectors = torch.einsum("bfw,fwk->bfk", vectors, self.projections[str(i)])
            total = total + vectors.sum(dim=1)
            squares = squares + vectors.square().sum(dim=1)
        return (total.square() - squares).sum(dim=1) / 2


class FirstOrder(nn.Module):
    """The linear term: one weight for each id of each field, and for each number."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        narrow = replace(layout, tables={n: (rows, 1) for n, (rows, _) in layout.tables.items()})
        self.weights = Embeddings(narrow)
        self.numeric = nn.Parameter(torch.zeros(layout.numeric))
        with torch.no_grad():
            for table in self.weights.stored:
                table.zero_()

    def forward(self, inputs: Inputs) -> Tensor:
        """(B,)."""
        found: Tensor = self.weights(inputs)
        ids = found.shape[1] - len(self.numeric)
        return found[:, :ids].sum(dim=1) + found[:, ids:] @ self.numeric


class DeepFM(nn.Module):
    """y = w . x + sum over f < g of v_f . v_g + MLP(v), on the same embeddings.

    Guo et al. 2017, "DeepFM" (arXiv:1703.04247), equations 1 to 4.
    """

    def __init__(self, layout: Layout, config: TrainingConfig) -> None:
        super().__init__()
        half = config.precision == "bfloat16"
        self.embeddings = Embeddings(layout)
        self.first_order = FirstOrder(layout)
        self.pairs = FactorizationMachine(self.embeddings, config.factors)
        self.layers = Layers(layout.deep_width, config.hidden, config.dropout, half)
        self.layers.append(nn.Linear(self.layers.width, 1, bias=False))

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits, shape (B,)."""
        embedded = self.embeddings(inputs)
        logit: Tensor = self.layers(embedded).squeeze(-1)
        logit = logit + self.pairs(embedded) + self.first_order(inputs)
        return logit


def _keys(layout: Layout, config: TrainingConfig) -> tuple[str, str]:
    """The tables of the user's and the item's keys."""
    missing = [
        f"training.model is {config.model!r}, which needs the {whose}'s key as a feature of its "
        "own; the spec has no deep column of it: add one, or choose another model"
        for whose, place in (("user", layout.user), ("item", layout.item))
        if place is None
    ]
    if layout.user is None or layout.item is None:
        raise ConfigError(missing)
    return layout.fields[layout.user], layout.fields[layout.item]


class _Pair(nn.Module):
    """Vectors of user and item, of one width."""

    def __init__(self, layout: Layout, config: TrainingConfig, width: int) -> None:
        super().__init__()
        user, item = _keys(layout, config)
        assert layout.user is not None
        assert layout.item is not None
        self._places = [layout.user, layout.item]
        tables = {name: (layout.tables[name][0], width) for name in (user, item)}
        names = tuple(layout.names[i] for i in self._places) if layout.names else ()
        self.embeddings = Embeddings(Layout(0, tables, (user, item), (), (), 0, names=names))

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """(B, width) of each."""
        none = inputs.numeric[:, :0]
        keys = inputs.deep_ids[:, self._places]
        found = self.embeddings(Inputs(none, keys, (), inputs.wide_ids, ()))
        return found.tensor_split(2, dim=1)  # type: ignore[no-any-return]


class DotProduct(_Pair):
    """y = b_u + b_i + p_u . q_i, and the model's bias.

    Koren, Bell and Volinsky 2009, "Matrix factorization techniques", equation 4. Well tuned, it is
    ahead of a learnt similarity (Rendle et al. 2020, "Neural collaborative filtering vs. matrix
    factorization revisited", arXiv:2005.09683); its penalty is ``embedding_l2``, by ``ftrl``.
    """

    def __init__(self, layout: Layout, config: TrainingConfig) -> None:
        super().__init__(layout, config, config.factors)
        self.biases = _Pair(layout, config, 1)
        with torch.no_grad():
            for table in self.biases.embeddings.stored:
                table.zero_()

    def forward(self, inputs: Inputs) -> Tensor:  # type: ignore[override]
        """Logits, shape (B,)."""
        user, item = super().forward(inputs)
        user_bias, item_bias = self.biases(inputs)
        logit: Tensor = (user * item).sum(dim=1) + (user_bias + item_bias).squeeze(1)
        return logit


class NeuMF(nn.Module):
    """y = h . [p_u ⊙ q_i, MLP([p'_u, q'_i])], with vectors of their own for each half.

    He et al. 2017, "Neural collaborative filtering" (arXiv:1708.05031), equation 12.
    """

    def __init__(self, layout: Layout, config: TrainingConfig) -> None:
        super().__init__()
        half = config.precision == "bfloat16"
        self.products = _Pair(layout, config, config.factors)
        self.pairs = _Pair(layout, config, config.factors)
        self.layers = Layers(2 * config.factors, config.hidden, config.dropout, half)
        self.out = nn.Linear(config.factors + self.layers.width, 1, bias=False)

    @property
    def embeddings(self) -> Embeddings:
        """Those whose products are read; what is published of users and items."""
        return self.products.embeddings

    def forward(self, inputs: Inputs) -> Tensor:
        """Logits, shape (B,)."""
        user, item = self.products(inputs)
        read = [user * item, self.layers(torch.cat(self.pairs(inputs), dim=1))]
        logit: Tensor = self.out(torch.cat(read, dim=1)).squeeze(-1)
        return logit


def deepfm(layout: Layout, config: TrainingConfig) -> Model:
    """A factorization machine and layers on the same embeddings."""
    return Model(None, DeepFM(layout, config))


def dot_product(layout: Layout, config: TrainingConfig) -> Model:
    """Matrix factorisation with biases: of all features it reads the keys alone."""
    return Model(None, DotProduct(layout, config))


def neumf(layout: Layout, config: TrainingConfig) -> Model:
    """Neural matrix factorisation: of all features it reads the keys alone."""
    return Model(None, NeuMF(layout, config))
