"""A log shaped as Criteo's: 13 numbers, 26 fields of very uneven sizes, about a million ids.

What a label depends on: each number, some not linearly; each id of each field; products of ids'
latent factors, which a deep part can generalise; and two crosses of mid-size fields, whose every
pair has an effect that nothing but the pair tells, which a wide part has to memorise.

Needs numpy alone. Files in the folder: ``{train,test}.{numeric,ids,crosses,label}.npy`` and
``log.json``, which is written last.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NUMERIC = 13
#: Ids of each field, as uneven as in Criteo's own log; about a million together.
FIELDS = (
    1460, 583, 240_000, 150_000, 305, 24, 12_517, 633, 3, 40_000, 5_683, 210_000, 3_194,
    27, 14_992, 120_000, 10, 5_652, 2_173, 4, 130_000, 18, 20, 45_000, 105, 17_602,
)  # fmt: skip
#: The fields that are crossed; a pair of ids has a number of its own, below 200,000.
CROSSES = ((4, 7), (0, 24))
#: Fields whose latent factors are multiplied.
PRODUCTS = ((1, 6), (5, 10), (12, 14), (17, 18), (13, 25), (1, 12))
FACTORS = 4
#: How much of the logit's spread each part has.
SPREAD = {"numbers": 0.8, "ids": 1.1, "products": 0.7, "crosses": 1.2}
POSITIVE = 0.25


@dataclass(frozen=True)
class Shape:
    """Rows of both splits, and the seed. ``scale`` multiplies the sizes of all larger fields."""

    train: int = 1_000_000
    test: int = 200_000
    scale: float = 1.0
    seed: int = 11

    @property
    def fields(self) -> tuple[int, ...]:
        """Ids of each field."""
        return tuple(max(round(size * self.scale), min(size, 30)) for size in FIELDS)

    @property
    def crosses(self) -> tuple[int, ...]:
        """Pairs of each cross."""
        return tuple(self.fields[a] * self.fields[b] for a, b in CROSSES)

    def as_dict(self) -> dict[str, Any]:
        """What the log's file says of it."""
        sizes = {"fields": list(self.fields), "crosses": list(self.crosses), "numeric": NUMERIC}
        return asdict(self) | sizes | {"spread": SPREAD}


def write(shape: Shape, folder: Path) -> dict[str, Any]:
    """Write the log, unless the same is there.

    Returns:
        What ``log.json`` says: the shape, and the AUC of the probabilities that labels were drawn
        with, which no model can surpass.
    """
    described = shape.as_dict()
    try:
        found: dict[str, Any] = json.loads((folder / "log.json").read_text(encoding="utf-8"))
        if found | described == found:
            return found
    except (OSError, ValueError):
        pass
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.json").unlink(missing_ok=True)
    random = np.random.default_rng(shape.seed)
    rows = shape.train + shape.test
    numeric, ids = _numbers(random, rows), _ids(random, rows, shape.fields)
    crosses = np.stack([ids[:, a] * shape.fields[b] + ids[:, b] for a, b in CROSSES], axis=1)
    logit = _logit(random, numeric, ids, crosses, shape)
    probability = 1 / (1 + np.exp(-logit))
    label = (random.random(rows) < probability).astype(np.float32)
    parts = {"numeric": numeric, "ids": ids, "crosses": crosses, "label": label}
    for name, values in parts.items():
        np.save(folder / f"train.{name}.npy", values[: shape.train])
        np.save(folder / f"test.{name}.npy", values[shape.train :])
    best = auc(label[shape.train :], probability[shape.train :])
    described |= {"best_auc": round(best, 4), "positive": round(float(label.mean()), 4)}
    (folder / "log.json").write_text(json.dumps(described), encoding="utf-8")
    return described


def auc(label: NDArray[Any], score: NDArray[Any]) -> float:
    """Area under the ROC curve, by mean ranks."""
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(count) - (count - 1) / 2)[place]
    positive = int((label == 1).sum())
    above = float(ranks[label == 1].sum()) - positive * (positive + 1) / 2
    return above / (positive * (len(label) - positive))


def _numbers(random: np.random.Generator, rows: int) -> NDArray[np.float32]:
    """(rows, 13) logarithms of skewed counts, standardised."""
    counts = np.exp(random.normal(size=(rows, NUMERIC)) * 1.5)
    logs = np.log1p(counts)
    standard: NDArray[np.float32] = ((logs - logs.mean(0)) / logs.std(0)).astype(np.float32)
    return standard


def _ids(random: np.random.Generator, rows: int, sizes: tuple[int, ...]) -> NDArray[np.int32]:
    """(rows, 26) ids, the k-th most frequent of each field about as often as 1 / k."""
    columns = []
    for size in sizes:
        # Small fields are flatter, as in Criteo's log: all their ids are frequent.
        exponent = 1.05 if size > 2000 else 0.8
        power = 1 - exponent
        places = ((((size + 1) ** power - 1) * random.random(rows) + 1) ** (1 / power)) - 1
        # An id's number says nothing of how frequent it is.
        named = random.permutation(size)
        columns.append(named[np.minimum(places.astype(np.int64), size - 1)])
    return np.stack(columns, axis=1).astype(np.int32)


def _logit(
    random: np.random.Generator,
    numeric: NDArray[np.float32],
    ids: NDArray[np.int32],
    crosses: NDArray[np.int32],
    shape: Shape,
) -> Floats:
    """(rows,) the sum of all parts."""
    rows = len(numeric)
    parts = {name: np.zeros(rows) for name in SPREAD}
    for column in range(NUMERIC):
        values = numeric[:, column].astype(np.float64)
        form = (values, np.sin(2 * values), (values > 0.5) * 1.0)[column % 3]
        parts["numbers"] += random.normal() * form
    # An id's effect and its factors come from the same few dimensions.
    factors = [random.normal(size=(size, FACTORS)) for size in shape.fields]
    for column, table in enumerate(factors):
        parts["ids"] += (table @ random.normal(size=FACTORS))[ids[:, column]]
    for a, b in PRODUCTS:
        parts["products"] += np.einsum("nk,nk->n", factors[a][ids[:, a]], factors[b][ids[:, b]])
    for column, size in enumerate(shape.crosses):
        parts["crosses"] += random.normal(size=size)[crosses[:, column]]
    total = sum(SPREAD[name] * (part - part.mean()) / part.std() for name, part in parts.items())
    return np.asarray(total) + np.log(POSITIVE / (1 - POSITIVE))


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    print(json.dumps(write(Shape(**given["shape"]), Path(given["folder"]))))
