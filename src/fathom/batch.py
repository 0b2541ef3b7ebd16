"""Encoded examples: what the encoder makes and the models take.

Legend: N examples, F single-valued deep fields, G multi-valued deep fields, M numeric inputs,
S single-valued wide slots, T multi-valued wide slots.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]

#: The name of the wide part's one table, beside those of `Layout.tables`.
WIDE = "wide"


class BatchError(ValueError):
    """Encoded examples cannot be read; the message says which and what to do."""


@dataclass(frozen=True)
class Ragged:
    """A list of values per row: row ``i`` holds ``values[offsets[i]:offsets[i + 1]]``.

    ``values`` (any length) and ``offsets`` (N + 1, int64, from 0).
    """

    values: NDArray[Any]
    offsets: NDArray[np.int64]

    def __post_init__(self) -> None:
        if len(self.offsets) == 0 or self.offsets[0] != 0 or self.offsets[-1] != len(self.values):
            raise ValueError(
                f"offsets must run from 0 to {len(self.values)}, the number of values; "
                f"they are {self.offsets[:1]} … {self.offsets[-1:]}"
            )

    @classmethod
    def of(cls, rows: Sequence[Sequence[Any]], dtype: Any = object) -> Ragged:
        """From lists.

        >>> Ragged.of([["a", "b"], []]).offsets.tolist()
        [0, 2, 2]
        """
        lengths = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        values = np.empty(int(lengths.sum()), dtype)
        values[:] = [value for row in rows for value in row]
        return cls(values, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of values in each row, shape (N,)."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> NDArray[np.int64]:
        """The row of each value, shape of ``values``."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def take(self, index: NDArray[np.integer[Any]]) -> Ragged:
        """The rows at ``index``, in that order."""
        lengths = self.lengths[index]
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        # A negative index counts rows, of which there is one less than offsets.
        shift = np.repeat(self.offsets[:-1][index] - offsets[:-1], lengths)
        return Ragged(self.values[np.arange(offsets[-1]) + shift], offsets)


@dataclass(frozen=True)
class Batch:
    """N encoded examples; a model's whole input.

    Args:
        numeric: (N, M) float32.
        deep_ids: (N, F) int32, rows of the field's embedding table.
        deep_bags: G ragged int32 fields.
        wide_ids: (N, S) int32, rows of the one wide table.
        wide_bags: T ragged int32 slots, rows of the wide table.
        label: (N,) float32, or None when it is not known.
        weight: (N,) float32, or None for equal weights.
        draw: (N,) float32 in [0, 1), which follow from the exposures' keys alone, whatever the log
            around them; None where these are not known. What of a log is learnt last is told by it.
    """

    numeric: NDArray[np.float32]
    deep_ids: IntArray
    deep_bags: tuple[Ragged, ...]
    wide_ids: IntArray
    wide_bags: tuple[Ragged, ...]
    label: NDArray[np.float32] | None = None
    weight: NDArray[np.float32] | None = None
    draw: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        counts = {name: len(part) for name, part in self._parts().items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"parts of a batch differ in their number of examples: {counts}")

    def __len__(self) -> int:
        return len(self.numeric)

    def take(self, index: NDArray[np.integer[Any]]) -> Batch:
        """The examples at ``index``, in that order."""
        return Batch(
            numeric=self.numeric[index],
            deep_ids=self.deep_ids[index],
            deep_bags=tuple(bag.take(index) for bag in self.deep_bags),
            wide_ids=self.wide_ids[index],
            wide_bags=tuple(bag.take(index) for bag in self.wide_bags),
            label=None if self.label is None else self.label[index],
            weight=None if self.weight is None else self.weight[index],
            draw=None if self.draw is None else self.draw[index],
        )

    def fingerprint(self, every: int = 1) -> str:
        """SHA-256 of all that every so manieth example holds, in hexadecimal."""
        some = self if every == 1 else self.take(np.arange(0, len(self), every))
        digest = hashlib.sha256(str(len(self)).encode())
        for name, part in some._parts().items():
            ragged = isinstance(part, Ragged)
            for array in (part.values, part.offsets) if isinstance(part, Ragged) else (part,):
                digest.update(f"{name} {ragged} {array.shape} {array.dtype}".encode())
                digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def faults(self, layout: Layout, task: str) -> list[str]:
        """Why nothing can be learnt from these examples, in words; none if it can."""
        if len(self) == 0:
            return ["is empty; move the split's dates in conf"]
        if self.label is None:
            return ["has no labels"]
        known = np.isfinite(self.label)
        counts = {
            "numeric inputs that are not finite": int((~np.isfinite(self.numeric)).sum()),
            "labels that are not finite": int((~known).sum()),
            "ids outside of their tables": self._outside(layout),
        }
        if self.weight is not None:
            odd = ~np.isfinite(self.weight) | (self.weight < 0)
            counts["weights that are negative or not finite"] = int(odd.sum())
        if task == "binary":
            odd = known & ~np.isin(self.label, (0.0, 1.0))
            counts["labels other than 0 and 1"] = int(odd.sum())
        found = [f"{count} {what}" for what, count in counts.items() if count]
        return [f"has {' and '.join(found)}; encode it again"] if found else []

    def _outside(self, layout: Layout) -> int:
        """How many ids have no row."""
        fields = [(self.deep_ids[:, i], table) for i, table in enumerate(layout.fields)]
        fields += [(b.values, t) for b, t in zip(self.deep_bags, layout.bags, strict=True)]
        columns: list[tuple[NDArray[Any], int]] = [
            *((ids, layout.tables[table][0]) for ids, table in fields),
            *(
                (ids, layout.wide_rows)
                for ids in (self.wide_ids, *(b.values for b in self.wide_bags))
            ),
        ]
        return sum(int(((ids < 0) | (ids >= rows)).sum()) for ids, rows in columns if ids.size)

    def save(self, folder: Path) -> None:
        """Write each part as a flat ``.npy`` file, which `load` maps into memory."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, part in self._parts().items():
            if isinstance(part, Ragged):
                np.save(folder / f"{name}.values.npy", part.values)
                np.save(folder / f"{name}.offsets.npy", part.offsets)
            else:
                np.save(folder / f"{name}.npy", part)

    @classmethod
    def load(cls, folder: Path) -> Batch:
        """Map what `save` wrote; nothing is read until it is used, and nothing written back.

        Raises:
            BatchError: a file is missing or cut short.
        """

        def array(name: str) -> NDArray[Any]:
            try:
                # Copy-on-write: torch shares the memory of arrays that may be written to alone.
                loaded: NDArray[Any] = np.load(folder / f"{name}.npy", mmap_mode="c")
            except (OSError, ValueError, EOFError) as error:
                raise BatchError(
                    f"{folder / name}.npy cannot be read ({error}); encode the split again"
                ) from error
            return loaded

        def bags(kind: str) -> tuple[Ragged, ...]:
            count = len(list(folder.glob(f"{kind}_bag*.offsets.npy")))
            names = [f"{kind}_bag{i}" for i in range(count)]
            return tuple(Ragged(array(f"{n}.values"), array(f"{n}.offsets")) for n in names)

        return cls(
            numeric=array("numeric"),
            deep_ids=array("deep_ids"),
            deep_bags=bags("deep"),
            wide_ids=array("wide_ids"),
            wide_bags=bags("wide"),
            label=array("label") if (folder / "label.npy").exists() else None,
            weight=array("weight") if (folder / "weight.npy").exists() else None,
            draw=array("draw") if (folder / "draw.npy").exists() else None,
        )

    def _parts(self) -> Mapping[str, NDArray[Any] | Ragged]:
        parts: dict[str, NDArray[Any] | Ragged | None] = {
            "numeric": self.numeric,
            "deep_ids": self.deep_ids,
            "wide_ids": self.wide_ids,
            "label": self.label,
            "weight": self.weight,
            "draw": self.draw,
            **{f"deep_bag{i}": bag for i, bag in enumerate(self.deep_bags)},
            **{f"wide_bag{i}": bag for i, bag in enumerate(self.wide_bags)},
        }
        return {name: part for name, part in parts.items() if part is not None}


def held_back(draw: NDArray[np.float32], share: float) -> NDArray[np.bool_]:
    """(N,) which examples, by `Batch.draw`, are learnt in a cool-down of that share."""
    return draw < np.float32(share)


@dataclass(frozen=True)
class Layout:
    """The sizes a model needs to know of the encoder that feeds it.

    Args:
        numeric: number of numeric inputs, M.
        tables: embedding tables of the deep part: name → (rows, width).
        fields: the table of each of the F single-valued deep fields.
        bags: the table of each of the G multi-valued deep fields.
        wide_slots: rows of each of the S + T wide slots, in the order of the wide table;
            single-valued slots first.
        wide_bags: T, how many of them are multi-valued.
        inactive: rows of the wide table whose weight stays 0: what a cross has where no known
            combination of values is there.
        user, item: places among ``fields`` of the keys of user and item; None if not there.
        owners: whose property each field, each bag and each numeric input is (``user``, ``item`` or
            ``context``), F + G + M of them; empty if it is not known.
        names: the column that each field, each bag and each numeric input is of; as ``owners``.
    """

    numeric: int
    tables: dict[str, tuple[int, int]]
    fields: tuple[str, ...]
    bags: tuple[str, ...]
    wide_slots: tuple[int, ...]
    wide_bags: int
    inactive: tuple[int, ...] = ()
    user: int | None = None
    item: int | None = None
    owners: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Layout:
        """From plain values, such as ``dataclasses.asdict`` makes and JSON gives back.

        Raises:
            BatchError: something is missing or of another type.
        """
        try:
            tables = {n: (int(rows), int(width)) for n, (rows, width) in plain["tables"].items()}
            return cls(
                numeric=int(plain["numeric"]),
                tables=tables,
                fields=tuple(plain["fields"]),
                bags=tuple(plain["bags"]),
                wide_slots=tuple(int(rows) for rows in plain["wide_slots"]),
                wide_bags=int(plain["wide_bags"]),
                inactive=tuple(int(row) for row in plain.get("inactive", ())),
                user=_place(plain.get("user")),
                item=_place(plain.get("item")),
                owners=tuple(str(owner) for owner in plain.get("owners", ())),
                names=tuple(str(name) for name in plain.get("names", ())),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BatchError(f"no layout ({error!r}); encode the splits again") from error

    @property
    def targets(self) -> tuple[int | None, ...]:
        """For each bag, the first of the item's fields that shares its table: what it is about.

        A user's recent product types, say, are about the product type of the candidate. Without
        owners, any field may be the item's; a bag of the item itself is about none.
        """
        fields, bags = self.owners[: len(self.fields)], self.owners[len(self.fields) :]
        return tuple(
            None
            if bags and bags[i] == "item"
            else next(
                (
                    place
                    for place, table in enumerate(self.fields)
                    if table == bag and (not fields or fields[place] == "item")
                ),
                None,
            )
            for i, bag in enumerate(self.bags)
        )

    @property
    def deep_width(self) -> int:
        """Width of the deep part's input: embeddings side by side, then the numeric inputs."""
        return sum(self.tables[name][1] for name in (*self.fields, *self.bags)) + self.numeric

    @property
    def wide_rows(self) -> int:
        """Rows of the wide table."""
        return sum(self.wide_slots)


def _place(value: Any) -> int | None:
    return None if value is None else int(value)
