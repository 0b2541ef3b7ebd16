"""What is watched of a frame, and the bins that make it comparable, fitted on the reference alone.

numeric      the tenths of the reference, and ``(missing)``. (Evidently's own bins are equally wide
             over both samples together, so that one outlier empties them, and drop missing
             values. So does the Wasserstein distance, which tails rule besides.)
categorical  the values of the reference, ``(unknown)`` and ``(missing)``.
id           a categorical column of more than ``max_categories`` values in the reference:
             ``(head)``, ``(tail)``, ``(unknown)`` to the model's vocabulary and ``(missing)``.

A column ``x`` of several values is watched as ``x.length`` and as ``x.first`` (a sequence) or
``x.member`` (a set: one of its members, drawn by seed). A cross is watched by its ``hits``: which
share of a row's combinations the model knows. ``probability``, the model's output, is always
watched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fathom.drift.config import PROBABILITY, Method, MonitoringConfig
from fathom.spec import FeatureSpec

MISSING, UNKNOWN, HEAD, TAIL = "(missing)", "(unknown)", "(head)", "(tail)"
Kind = Literal["numeric", "categorical", "id"]
Codes = NDArray[np.int64]


@dataclass(frozen=True)
class Watched:
    """What is compared of one column: its value, or one aspect of a column of several values."""

    column: str
    kind: Literal["numeric", "categorical"]
    aspect: Literal["value", "length", "first", "member", "hits"] = "value"

    @property
    def name(self) -> str:
        """``column``, or ``column.aspect``."""
        return self.column if self.aspect == "value" else f"{self.column}.{self.aspect}"


@dataclass(frozen=True, eq=False)
class Form:
    """A watched column in bins.

    Attributes:
        bins: their names, the last one for missing values.
        reference: (N,) the bin of each row of the reference.
        code: puts the column's values (see `values_of`) of other rows in bins.
    """

    watched: Watched
    kind: Kind
    method: Method
    bins: tuple[str, ...]
    reference: Codes
    code: Callable[[pd.Series], Codes]

    @property
    def has_data(self) -> bool:
        """Whether the reference has any value."""
        return bool((self.reference != len(self.bins) - 1).any())


def watched_of(spec: FeatureSpec) -> tuple[Watched, ...]:
    """What is watched of a spec, in its order; then its crosses, then the model's output.

    Whether a categorical column is compared by value or as an id is up to the reference, and so
    not known here.
    """
    watched: list[Watched] = []
    for column in spec.columns:
        if column.kind == "numeric" or column.kind == "categorical":
            watched.append(Watched(column.name, column.kind))
        else:
            one: Literal["first", "member"] = "first" if column.kind == "sequence" else "member"
            watched.append(Watched(column.name, "numeric", "length"))
            watched.append(Watched(column.name, "categorical", one))
    watched += [Watched(cross.name, "numeric", "hits") for cross in spec.crosses]
    return (*watched, Watched(PROBABILITY, "numeric"))


def values_of(frame: pd.DataFrame, watched: Watched, seed: int) -> pd.Series:
    """(rows,) numbers, NaN where missing or infinite, or strings, None where missing."""
    values = frame[watched.name if watched.aspect == "hits" else watched.column]
    if watched.aspect == "length":
        return values.map(len, na_action="ignore").astype(float)
    if watched.kind == "numeric":
        return values.astype(float).replace([-np.inf, np.inf], np.nan)
    if watched.aspect == "value":
        return values.astype(object)
    # Where in its list each row is read: a set has no first member, so any one is as good.
    where = np.random.default_rng(seed).random(len(values)) * (watched.aspect == "member")
    read = [
        lists[int(at * len(lists))] if known and len(lists) else None
        for lists, known, at in zip(values, values.notna(), where, strict=True)
    ]
    return pd.Series(read, index=values.index, dtype=object)


def fit_form(
    watched: Watched,
    reference: pd.DataFrame,
    spec: FeatureSpec,
    config: MonitoringConfig,
    vocabularies: Mapping[str, Collection[str]],
) -> Form:
    """Fit the bins of a watched column on all rows of the reference."""
    known = values_of(reference, watched, config.seed)
    if watched.kind == "numeric":
        bins, code = _tenths(known)
        return Form(watched, "numeric", config.numeric_method, bins, code(known), code)
    method = config.categorical_method
    if known.nunique() <= config.max_categories:
        bins, code = _named_values(known)
        return Form(watched, "categorical", method, bins, code(known), code)
    vocabulary = vocabularies.get(watched.column) if watched.aspect == "value" else None
    requests = reference.get(spec.entities.request)
    bins, own, code = _frequency_bands(known, requests, vocabulary)
    return Form(watched, "id", method, bins, own, code)


_Coding = tuple[tuple[str, ...], Callable[[pd.Series], Codes]]


def _tenths(known: pd.Series) -> _Coding:
    """The reference's tenths; a value that fills a tenth alone has a bin of its own."""
    numbers = known.dropna().to_numpy()
    edges = np.zeros(0)
    if numbers.size:
        edges = np.unique(np.quantile(numbers, np.arange(1, 10) / 10, method="inverted_cdf"))
        if edges[0] == numbers.min():
            # Or a constant that falls would stay in the lowest bin, unseen.
            edges = np.insert(edges, 0, np.nextafter(edges[0], -np.inf))
    bins = [f"{i:02d}: ≤ {edge:.6g}" for i, edge in enumerate(edges)]
    last = f"> {edges[-1]:.6g}" if edges.size else "any"
    names = (*bins, f"{len(edges):02d}: {last}", MISSING)

    def code(values: pd.Series) -> Codes:
        found = np.searchsorted(edges, values.to_numpy(), side="left")
        return np.where(values.isna(), len(names) - 1, found).astype(np.int64)

    return names, code


def _named_values(known: pd.Series) -> _Coding:
    """The reference's values by name, all others as unknown."""
    values = sorted(known.dropna().unique())
    names = (*values, UNKNOWN, MISSING)
    places = {value: place for place, value in enumerate(values)}

    def code(found: pd.Series) -> Codes:
        coded = found.map(places).fillna(len(values)).to_numpy(np.int64)
        return np.where(found.isna(), len(names) - 1, coded)

    return names, code


def _frequency_bands(
    known: pd.Series, requests: pd.Series | None, vocabulary: Collection[str] | None
) -> tuple[tuple[str, ...], Codes, Callable[[pd.Series], Codes]]:
    """Ids by how often the reference saw them: often (head), seldom (tail); and unknown ones.

    Unknown are those that the model's vocabulary lacks or, without one, those that the reference
    never saw. The reference knows all of its own ids, so a second sample of the very same
    population would seem to bring new ones. Its rows are therefore judged by the *other* requests
    alone (other rows, without a request key): an id of one request is unknown there. Their share
    is Good's estimate of the mass not yet seen (Good 1953, "The population frequencies of species
    and the estimation of population parameters"), which a window without drift repeats.

    The head starts at half the count of the median row, so that counts that are all alike do not
    straddle the border.
    """
    names = (HEAD, TAIL, UNKNOWN, MISSING)
    counted = known
    if requests is not None:
        counted = known[~pd.DataFrame({"id": known, "request": requests}).duplicated()]
    counts = counted.value_counts()
    was = known.map(counts).fillna(0).astype(int)
    head = math.ceil(was[was > 0].median() / 2)
    words = None if vocabulary is None else set(vocabulary)

    def bands(values: pd.Series, seen: pd.Series) -> Codes:
        unknown = seen <= 0 if words is None else ~values.isin(words)
        return np.select([values.isna(), unknown, seen >= head], [3, 2, 0], 1).astype(np.int64)

    def code(values: pd.Series) -> Codes:
        return bands(values, values.map(counts).fillna(0).astype(int))

    return names, bands(known, was - 1), code
