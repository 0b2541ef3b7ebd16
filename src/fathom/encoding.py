"""Raw feature values to model inputs: vocabularies, quantile scaling and crosses.

One `Encoder` is fitted on the training split and travels with the weights; the same `encode` turns
a training frame and a served request into a `Batch`.

A *frame* maps column names to arrays of equal length: objects (``str`` or ``None``) for
categorical columns, floats (NaN when missing) for numeric ones, `Ragged` for multi-valued ones and
sequences.

Ids: 0 is *missing*, 1 is *unknown* (rarer than the column's ``min_count`` in training, so that its
weights are trained), known values follow. Numeric inputs are their cumulative distribution value in
[0, 1] (Cheng et al. 2016, section 4.1) and 0 when missing, beside a 0/1 input that says so.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathom.batch import WIDE, Batch, IntArray, Layout, Ragged
from fathom.features import stamp_name, stored_fields, stored_name
from fathom.spec import EVENT_TIMESTAMP, INCLUSION_PROBABILITY, Column, Cross, FeatureSpec

Values = NDArray[Any] | Ragged
Frame = Mapping[str, Values]
Keys = NDArray[np.uint64]

MISSING, UNKNOWN = 0, 1
FIRST_KNOWN = 2
QUANTILES = 128
_MICROSECONDS_PER_DAY = 86_400e6
#: An odd multiplier (the golden ratio) keeps a cross of (a, b) apart from one of (b, a).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_NOTHING = np.uint64(0)


class FrameError(ValueError):
    """A frame does not fit the spec; the message lists every fault at once."""

    def __init__(self, faults: Sequence[str]) -> None:
        super().__init__("frame: " + "; ".join(faults))


# -- hashing and crosses -------------------------------------------------------------------------


@lru_cache(maxsize=1 << 18)
def hash_value(value: str) -> int:
    """A 64-bit hash that is the same in every process and on every machine; never 0."""
    # JSON can carry half of a surrogate pair; it is an unknown value like any other.
    digest = hashlib.blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def hash_values(values: NDArray[Any]) -> Keys:
    """`hash_value` of each of N values, (N,); 0 for ``None``."""
    listed = values.tolist()
    hashes = {value: 0 if value is None else hash_value(value) for value in set(listed)}
    return np.fromiter(map(hashes.__getitem__, listed), np.uint64, len(listed))


def bucket(values: NDArray[Any], boundaries: Sequence[float] | None) -> NDArray[Any]:
    """Make numbers categorical, without looking at data: the text of the bucket they fall in.

    Numbers are rounded to float32 first, as frames hold them, so that 0.7 reaches a boundary of 0.7
    wherever it comes from.

    Args:
        values: (N,) numbers, NaN when missing.
        boundaries: rising right-open boundaries; powers of two, with sign, when None.

    Returns:
        (N,) objects: bucket numbers as text, None for NaN.

    >>> bucket(np.array([0.0, 3.0, 4.0, np.nan]), [1.0, 4.0]).tolist()
    ['0', '1', '2', None]
    >>> bucket(np.array([0.0, 1.0, 5.0, 7.9, -5.0]), None).tolist()
    ['0', '1', '3', '3', '-3']
    """
    with np.errstate(over="ignore"):
        numbers = np.asarray(values, np.float32)
    missing = np.isnan(numbers)
    if boundaries is None:
        finite = np.nan_to_num(numbers)
        numbered = np.sign(finite) * np.maximum(np.frexp(finite)[1], 0)
    else:
        numbered = np.searchsorted(np.asarray(boundaries, np.float32), numbers, side="right")
    texts = np.empty(len(numbers), object)
    texts[:] = [str(int(n)) if ok else None for n, ok in zip(numbered, ~missing, strict=True)]
    return texts


def cross_keys(parts: Sequence[Keys | Ragged]) -> Keys | Ragged:
    """Keys of the conjunction of values, by mixing their hashes in order.

    Hashes are mixed, not texts joined, so ("a-b", "c") and ("a", "b-c") differ.

    Args:
        parts: hashes of each column, (N,) or ragged with N rows; 0 stands for missing.

    Returns:
        (N,) keys, 0 where any part is missing. If parts are ragged, the keys of every combination
        of a row's values, ragged; combinations with a missing part are left out.
    """
    count = len(parts[0])
    keys, rows = np.full(count, _GOLDEN), np.arange(count)
    single = True
    for part in parts:
        if isinstance(part, Ragged):
            single = False
            lengths, places = value_places(part, rows)
            chosen = part.values[places]
            keys, rows = np.repeat(keys, lengths), np.repeat(rows, lengths)
        else:
            chosen = part[rows]
        mixed = _mix((keys ^ chosen) * _GOLDEN)
        keys = np.where((keys == _NOTHING) | (chosen == _NOTHING), _NOTHING, mixed)
    if single:
        return keys
    kept = keys != _NOTHING
    lengths = np.bincount(rows[kept], minlength=count)
    return Ragged(keys[kept], np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))


def draws(frame: Frame, spec: FeatureSpec) -> NDArray[np.float32] | None:
    """`Batch.draw` of a frame's rows; None if it lacks any of the spec's keys."""
    if not set(spec.keys) <= set(frame):
        return None
    texts = [_flat(frame[name]) for name in spec.keys]
    texts = [values if values.dtype == object else values.astype(str) for values in texts]
    keys = cross_keys([hash_values(values) for values in texts])
    assert not isinstance(keys, Ragged)
    # The upper 24 bits: as many as a float32 tells apart below 1.
    return (keys >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def value_places(
    part: Ragged, rows: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many values each of some rows has, (K,), and where in ``part.values`` they all are."""
    lengths = part.lengths[rows]
    ends = np.cumsum(lengths)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
    return lengths, np.repeat(part.offsets[rows], lengths) + within


def _mix(keys: Keys) -> Keys:
    """The finaliser of splitmix64 (Steele et al. 2014): every input bit reaches every output."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    keys = keys ^ (keys >> np.uint64(31))
    return np.where(keys == _NOTHING, np.uint64(1), keys)


def column_hashes(column: Column, values: Values) -> Keys | Ragged:
    """Hashes of a column's values as crosses see them; numbers are bucketed first."""
    if isinstance(values, Ragged):
        return Ragged(hash_values(values.values), values.offsets)
    if column.is_numeric:
        values = bucket(values, column.buckets)
    return hash_values(values)


def evaluate_cross(cross: Cross, spec: FeatureSpec, frame: Frame) -> Keys | Ragged:
    """Keys of a declared cross for each row of a frame; needs no fitted encoder.

    The wide part and Feast's on-demand feature views both call it.
    """
    return cross_keys([column_hashes(spec.by_name[n], frame[n]) for n in cross.columns])


# -- frames --------------------------------------------------------------------------------------


def expire(frame: Frame, spec: FeatureSpec, views: Iterable[str]) -> tuple[dict[str, Values], int]:
    """Take away what is older than its view allows (`FeatureSpec.max_age_days`).

    Both ways of reading call this. (Feast's ``ttl`` bounds offline joins only.)

    Args:
        frame: fields of the views, their moments (`fathom.features.stamp_name`) among them, and
            ``event_timestamp`` as (N,) datetime64 (UTC).

    Returns:
        The frame with missing values where a row was too old, and how many rows were, over all
        views.
    """
    kept, expired = dict(frame), 0
    for view in views:
        age = spec.max_age(view)
        if age is None:
            continue
        stamps = np.asarray(frame[stamp_name(view)], np.float64)
        now = np.asarray(frame[EVENT_TIMESTAMP]).astype("datetime64[us]").astype(np.float64)
        old = now - stamps > age / timedelta(microseconds=1)
        count = int(old.sum())
        if count:
            expired += count
            for name in stored_fields(spec, view):
                kept[name] = _without(frame[name], old)
    return kept, expired


def _without(values: Values, old: NDArray[np.bool_]) -> Values:
    """The values, missing where ``old``."""
    if isinstance(values, Ragged):
        lengths = np.where(old, 0, values.lengths)
        taken = values.values[np.repeat(~old, values.lengths)]
        return Ragged(taken, np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]))
    kept = values.astype(object if values.dtype == object else np.float64)
    kept[old] = None if values.dtype == object else np.nan
    return kept


def complete(frame: Frame, spec: FeatureSpec) -> dict[str, Values]:
    """Turn what a feature store returns into all columns of the spec.

    A key without a snapshot has counts and sums of 0 and rates of the prior; recency is the age of
    the stored moment at ``event_timestamp``, NaN when there is none; ratios come last.

    Args:
        frame: stored fields by name (`fathom.features.stored_name`), raw columns, and
            ``event_timestamp`` as (N,) datetime64 (UTC).

    Returns:
        Every column of the spec.

    Raises:
        FrameError: names all absent columns.
    """
    sources = {
        column.name: stored_name(column) if column.aggregate else column.name
        for column in spec.columns
        if column.ratio is None
    }
    absent = sorted({*sources.values(), EVENT_TIMESTAMP} - set(frame))
    if absent:
        raise FrameError([f"absent columns {absent}; the spec needs them"])
    moments = frame[EVENT_TIMESTAMP]
    return with_ratios(
        {
            name: _default(spec.by_name[name], frame[source], moments)
            for name, source in sources.items()
        },
        spec,
    )


def with_ratios(frame: Frame, spec: FeatureSpec) -> dict[str, Values]:
    """Add the spec's ratio columns, computed from the others.

    A missing part counts as 0; the ratio is missing where its divisor is 0.
    """
    completed = dict(frame)
    for column in spec.columns:
        if column.ratio is not None:
            of, to = (_or_zero(frame[name]) for name in (column.ratio.of, column.ratio.to))
            divisor = to + column.ratio.plus
            missing = np.full(np.broadcast_shapes(of.shape, to.shape), np.nan)
            ratio = np.divide(of, divisor, out=missing, where=divisor != 0)
            completed[column.name] = ratio.astype(np.float32)
    return completed


def _or_zero(values: Values) -> NDArray[np.float64]:
    numbers = np.array(values, np.float64)
    numbers[np.isnan(numbers)] = 0
    return numbers


def _default(column: Column, values: Values, moments: Values) -> Values:
    if isinstance(values, Ragged) or not column.is_numeric:
        return values
    if column.aggregate is None:
        return values.astype(np.float32)
    measure = column.aggregate.measure
    if measure == "recency_days":
        assert not isinstance(moments, Ragged)
        now = moments.astype("datetime64[us]").astype(np.float64)
        return ((now - values.astype(np.float64)) / _MICROSECONDS_PER_DAY).astype(np.float32)
    numbers = values.astype(np.float32)
    absent = {"count": 0.0, "sum": 0.0, "rate": column.aggregate.prior}.get(measure)
    if absent is not None:
        numbers[np.isnan(numbers)] = absent
    return numbers


# -- fitted parts --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """Known values of an embedding table or of a wide column, in the order of their ids."""

    values: tuple[str, ...]
    _ids: dict[Any, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        ids: dict[Any, int] = {v: i for i, v in enumerate(self.values, FIRST_KNOWN)}
        object.__setattr__(self, "_ids", ids | {None: MISSING})

    @classmethod
    def fit(cls, columns: Iterable[NDArray[Any]], min_count: int) -> Vocabulary:
        """Values seen at least ``min_count`` times, commonest first, ties by value."""
        counts: Counter[Any] = Counter()
        for values in columns:
            counts.update(values.tolist())
        counts.pop(None, None)
        kept = [value for value, count in counts.items() if count >= min_count]
        return cls(tuple(sorted(kept, key=lambda value: (-counts[value], value))))

    @property
    def rows(self) -> int:
        """Number of ids, the two reserved ones included."""
        return len(self.values) + FIRST_KNOWN

    def ids(self, values: NDArray[Any]) -> IntArray:
        """Ids of values, shape kept."""
        get = self._ids.get
        return np.array([get(value, UNKNOWN) for value in values.tolist()], np.int32)


@dataclass(frozen=True)
class Scaler:
    """The empirical distribution function of a numeric column, by its quantiles.

    Repeated quantiles are merged and the rest spaced evenly, so that a value many rows share (a
    count of 0, say) does not use up the range.
    """

    quantiles: NDArray[np.float64]

    @classmethod
    def fit(cls, values: NDArray[Any]) -> Scaler:
        """Quantiles of the finite values."""
        known = np.asarray(values, np.float64)
        known = known[np.isfinite(known)]
        if len(known) == 0:
            return cls(np.zeros(1))
        return cls(np.unique(np.quantile(known, np.linspace(0, 1, QUANTILES))))

    def scale(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """Distribution values in [0, 1], shape kept; 0 for NaN."""
        numbers = np.asarray(values, np.float64)
        scaled = np.interp(numbers, self.quantiles, self._positions).astype(np.float32)
        # One quantile alone makes interp give its position for NaN too.
        scaled[np.isnan(numbers)] = 0
        return scaled

    @cached_property
    def _positions(self) -> NDArray[np.float64]:
        count = len(self.quantiles)
        return np.linspace(0, 1, count) if count > 1 else np.array([0.5])


@dataclass(frozen=True)
class CrossVocabulary:
    """Ids of cross keys: by their rank among the known keys, or by hashing."""

    keys: Keys
    buckets: int | None

    @classmethod
    def fit(cls, keys: Keys | Ragged, cross: Cross) -> CrossVocabulary:
        """Keys seen at least ``cross.min_count`` times, rising; none when it hashes."""
        if cross.buckets is not None:
            return cls(np.zeros(0, np.uint64), cross.buckets)
        flat = keys.values if isinstance(keys, Ragged) else keys
        known, counts = np.unique(flat[flat != _NOTHING], return_counts=True)
        return cls(known[counts >= cross.min_count], None)

    @property
    def rows(self) -> int:
        """Number of ids, the two reserved ones included."""
        return (self.buckets or len(self.keys)) + FIRST_KNOWN

    def ids(self, keys: Keys) -> IntArray:
        """Ids of keys, shape kept."""
        if self.buckets is not None:
            ids = (keys % np.uint64(self.buckets)).astype(np.int64) + FIRST_KNOWN
        elif len(self.keys) == 0:
            ids = np.full(len(keys), UNKNOWN)
        else:
            place = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
            ids = np.where(self.keys[place] == keys, place + FIRST_KNOWN, UNKNOWN)
        return np.where(keys == _NOTHING, MISSING, ids).astype(np.int32)

    def rows_of(self, old: CrossVocabulary) -> NDArray[np.int64]:
        """Which row of an older one each row was, (R,), -1 for none."""
        if self.buckets is not None or old.buckets is not None:
            same = self.buckets == old.buckets
            return np.arange(self.rows) if same else np.full(self.rows, -1)
        return _carried(self.keys.tolist(), old.keys.tolist())


def _carried(new: Sequence[Any], old: Sequence[Any]) -> NDArray[np.int64]:
    """Old rows of new keys, -1 for those that are new, after those of the reserved ids."""
    rows = {key: row for row, key in enumerate(old, FIRST_KNOWN)}
    reserved = range(FIRST_KNOWN)
    return np.array([*reserved, *(rows.get(key, -1) for key in new)], np.int64)


@dataclass(frozen=True)
class Encoder:
    """Everything learnt from the training split that turns raw values into model inputs."""

    spec: FeatureSpec
    tables: dict[str, Vocabulary]
    wide: dict[str, Vocabulary]
    scalers: dict[str, Scaler]
    crosses: dict[str, CrossVocabulary]

    @property
    def layout(self) -> Layout:
        """Sizes for the model."""
        spec = self.spec
        tables = {name: (self.tables[name].rows, width) for name, (width, _) in spec.tables.items()}
        table_of = self.table_of
        slots = self.slots
        single, bags = self._deep(bags=False), self._deep(bags=True)
        names = [c.name for c in single]
        columns = (*names, *(c.name for c in bags), *self._numeric_inputs)

        def place(key: str) -> int | None:
            return names.index(key) if key in names else None

        return Layout(
            numeric=2 * len(self._numeric()),
            tables=tables,
            fields=tuple(table_of[name] for name in names),
            bags=tuple(table_of[c.name] for c in bags),
            wide_slots=tuple(rows for _, rows, _ in slots),
            wide_bags=sum(bag for _, _, bag in slots),
            inactive=self._inactive,
            user=place(spec.entities.user),
            item=place(spec.entities.item),
            owners=tuple(spec.owner(name) for name in columns),
            names=columns,
        )

    @property
    def _inactive(self) -> tuple[int, ...]:
        starts = np.cumsum([0, *(rows for _, rows, _ in self.slots)])[:-1].tolist()
        slots = zip(starts, self.slots, strict=True)
        crosses = [start for start, (name, _, _) in slots if name in self.crosses]
        return tuple(start + reserved for start in crosses for reserved in (MISSING, UNKNOWN))

    def rows_of(self, old: Encoder) -> dict[str, NDArray[np.int64]]:
        """Which row of an older encoder's tables each row of this one's was, by key.

        For a warm start (`fathom.warm`). The reserved ids are their own keys. A hashed cross has no
        keys: its rows are carried if it has as many buckets.

        Returns:
            For each table by name, and for the wide part as `WIDE`, (R,) old rows, -1 for none.
        """
        found = {
            name: _carried(new.values, old.tables[name].values)
            for name, new in self.tables.items()
            if name in old.tables
        }
        starts, start = {}, 0
        for name, rows, _ in old.slots:
            starts[name] = start
            start += rows
        slots = []
        for name, rows, _ in self.slots:
            mine, other = (side.wide.get(name) for side in (self, old))
            if mine is not None and other is not None:
                places = _carried(mine.values, other.values)
            elif name in self.crosses and name in old.crosses:
                places = self.crosses[name].rows_of(old.crosses[name])
            else:
                places = np.full(rows, -1)
            slots.append(np.where(places >= 0, places + starts.get(name, 0), -1))
        found[WIDE] = np.concatenate(slots) if slots else np.zeros(0, np.int64)
        return found

    @property
    def wide_slots(self) -> tuple[str, ...]:
        """Names of the wide part's slots, in the order of `Layout.wide_slots`."""
        return tuple(name for name, _, _ in self.slots)

    def encode(self, frame: Frame) -> Batch:
        """Model inputs for N rows; label, weight and draw are set if the frame has what gives them.

        An example's weight is the inverse of its inclusion probability in a sampled log.

        Raises:
            FrameError: names all absent columns and all that are of the wrong shape or type.
        """
        _check(frame, self.spec)
        numeric = np.zeros((_rows(frame, self.spec), 2 * len(self._numeric())), np.float32)
        for i, column in enumerate(self._numeric()):
            values = _flat(frame[column.name])
            numeric[:, 2 * i] = self.scalers[column.name].scale(values)
            numeric[:, 2 * i + 1] = np.isnan(values)
        table_of = self.table_of

        def deep(column: Column) -> IntArray:
            return self.tables[table_of[column.name]].ids(_flat(frame[column.name]))

        single = [deep(column) for column in self._deep(bags=False)]
        bags = [Ragged(deep(c), _ragged(frame[c.name]).offsets) for c in self._deep(bags=True)]
        wide_single, wide_bags = self._encode_wide(frame)
        label = frame.get(self.spec.label.name)
        return Batch(
            numeric=numeric,
            deep_ids=_stack(single, len(numeric)),
            deep_bags=tuple(bags),
            wide_ids=_stack(wide_single, len(numeric)),
            wide_bags=tuple(wide_bags),
            label=None if label is None else outcome(label, self.spec),
            weight=_inverse(frame.get(INCLUSION_PROBABILITY)),
            draw=None if label is None else draws(frame, self.spec),
        )

    def cross_hits(self, frame: Frame) -> dict[str, NDArray[np.float64]]:
        """By cross, (N,) the share of a row's combinations that training knew; NaN without any."""
        encoded = self._encode_wide(frame)
        single, bags = iter(encoded[0]), iter(encoded[1])
        found, start = {}, 0
        for name, rows, bag in self.slots:
            ids = next(bags) if bag else next(single)
            if name in self.crosses:
                values = (ids.values if isinstance(ids, Ragged) else ids) - start
                known = (values >= FIRST_KNOWN).astype(np.float64)
                if isinstance(ids, Ragged):
                    total = np.bincount(ids.rows, known, len(ids))
                    known = np.where(ids.lengths > 0, total / np.maximum(ids.lengths, 1), np.nan)
                else:
                    known[values == MISSING] = np.nan
                found[name] = known
            start += rows
        return found

    def _encode_wide(self, frame: Frame) -> tuple[list[IntArray], list[Ragged]]:
        hashed: dict[str, Keys | Ragged] = {}
        single: list[IntArray] = []
        bags: list[Ragged] = []
        start = 0
        by_name = {cross.name: cross for cross in self.spec.crosses}
        for name, rows, bag in self.slots:
            if name in by_name:
                for part in by_name[name].columns:
                    if part not in hashed:
                        hashed[part] = column_hashes(self.spec.by_name[part], frame[part])
                keys = cross_keys([hashed[part] for part in by_name[name].columns])
                ids = self.crosses[name].ids(keys.values if isinstance(keys, Ragged) else keys)
                offsets = keys.offsets if isinstance(keys, Ragged) else None
            else:
                ids = self.wide[name].ids(_flat(frame[name]))
                offsets = _ragged(frame[name]).offsets if bag else None
            ids = ids + np.int32(start)
            if offsets is None:
                single.append(ids)
            else:
                bags.append(Ragged(ids, offsets))
            start += rows
        return single, bags

    @property
    def _numeric_inputs(self) -> list[str]:
        """The column of each numeric input: two for each, its value and whether it is missing."""
        return [column.name for column in self._numeric() for _ in range(2)]

    @property
    def nothing(self) -> Batch:
        """One example of which nothing is known: every value is missing, every list empty."""
        none = np.zeros(2, np.int64)
        bags = len(self._deep(bags=True))
        slots = self.slots
        starts = np.cumsum([0, *(rows for _, rows, _ in slots)])[:-1].astype(np.int32)
        single = sum(not bag for _, _, bag in slots)
        empty = Ragged(np.zeros(0, np.int32), none)
        return Batch(
            numeric=np.tile(np.array([[0, 1]], np.float32), len(self._numeric())),
            deep_ids=np.full((1, len(self._deep(bags=False))), MISSING, np.int32),
            deep_bags=(empty,) * bags,
            wide_ids=starts[None, :single] + np.int32(MISSING),
            wide_bags=(empty,) * (len(slots) - single),
        )

    def _numeric(self) -> list[Column]:
        return [c for c in self.spec.columns if c.is_numeric and c.deep]

    def _deep(self, bags: bool) -> list[Column]:
        columns = [c for c in self.spec.columns if not c.is_numeric and c.deep]
        return [c for c in columns if (c.kind != "categorical") == bags]

    @cached_property
    def table_of(self) -> dict[str, str]:
        """The embedding table of each column that has one."""
        return {c.name: name for name, (_, cs) in self.spec.tables.items() for c in cs}

    @cached_property
    def slots(self) -> list[tuple[str, int, bool]]:
        """(name, rows, is a bag) of each wide slot, single-valued ones first."""
        kinds = {column.name: column.kind for column in self.spec.columns}

        def bag(*names: str) -> bool:
            return any(kinds[name] in {"multi", "sequence"} for name in names)

        slots = [(name, self.wide[name].rows, bag(name)) for name in self.wide]
        slots += [(c.name, self.crosses[c.name].rows, bag(*c.columns)) for c in self.spec.crosses]
        return sorted(slots, key=lambda slot: slot[2])

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that decides what `encode` gives, in hexadecimal."""
        digest = hashlib.sha256(self.spec.to_json().encode())
        digest.update(self._vocabularies().encode())
        for name, values in sorted(self._arrays().items()):
            digest.update(f"{name} {values.nbytes} ".encode() + values.tobytes())
        return digest.hexdigest()

    def _vocabularies(self) -> str:
        vocabularies = {
            "tables": {name: v.values for name, v in self.tables.items()},
            "wide": {name: v.values for name, v in self.wide.items()},
        }
        return json.dumps(vocabularies, ensure_ascii=False)

    def _arrays(self) -> dict[str, NDArray[Any]]:
        quantiles = {f"quantiles/{name}": s.quantiles for name, s in self.scalers.items()}
        crosses = {f"cross/{name}": c.keys.view(np.int64) for name, c in self.crosses.items()}
        return {**quantiles, **crosses}

    def save(self, folder: Path) -> None:
        """Write ``spec.json``, ``vocabularies.json`` and ``encoder.safetensors`` to a folder."""
        from safetensors.numpy import save_file

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "spec.json").write_text(self.spec.to_json(), encoding="utf-8")
        (folder / "vocabularies.json").write_text(self._vocabularies(), encoding="utf-8")
        save_file(self._arrays(), folder / "encoder.safetensors")

    @classmethod
    def load(cls, folder: Path) -> Encoder:
        """Read what `save` wrote."""
        from safetensors.numpy import load_file

        spec = FeatureSpec.from_json((folder / "spec.json").read_text(encoding="utf-8"))
        vocabularies = json.loads((folder / "vocabularies.json").read_text(encoding="utf-8"))
        arrays = load_file(folder / "encoder.safetensors")
        buckets = {cross.name: cross.buckets for cross in spec.crosses}
        return cls(
            spec=spec,
            tables={n: Vocabulary(tuple(v)) for n, v in vocabularies["tables"].items()},
            wide={n: Vocabulary(tuple(v)) for n, v in vocabularies["wide"].items()},
            scalers={c.name: Scaler(arrays[f"quantiles/{c.name}"]) for c in _scaled(spec)},
            crosses={
                name: CrossVocabulary(arrays[f"cross/{name}"].view(np.uint64), count)
                for name, count in buckets.items()
            },
        )


def fit_encoder(frame: Frame, spec: FeatureSpec, scalers_of: Encoder | None = None) -> Encoder:
    """Learn vocabularies, quantiles and cross keys; give it the training split only.

    Args:
        frame: one row per exposure with every column of the spec (see `complete`).
        scalers_of: an encoder of the same spec whose quantiles are kept. A model that starts warm
            has learnt what their positions mean; ones that moved would be another unit.

    Raises:
        FrameError: names all absent columns and all that are of the wrong shape or type.
    """
    _check(frame, spec)
    return Encoder(
        spec=spec,
        tables={
            name: Vocabulary.fit(
                (_flat(frame[c.name]) for c in columns), min(c.min_count for c in columns)
            )
            for name, (_, columns) in spec.tables.items()
        },
        wide={
            c.name: Vocabulary.fit([_flat(frame[c.name])], c.min_count)
            for c in spec.columns
            if c.wide
        },
        scalers=(
            {c.name: Scaler.fit(_flat(frame[c.name])) for c in _scaled(spec)}
            if scalers_of is None
            else scalers_of.scalers
        ),
        crosses={
            c.name: CrossVocabulary.fit(evaluate_cross(c, spec, frame), c) for c in spec.crosses
        },
    )


def outcome(label: Values, spec: FeatureSpec) -> NDArray[np.float32]:
    """(N,) what is learnt of a frame's label: 1 for the last of its values, or the number it is."""
    values = _flat(label)
    if spec.label.values is None:
        return values.astype(np.float32)
    return np.asarray(values == spec.label.values[-1], np.float32)


def _scaled(spec: FeatureSpec) -> list[Column]:
    return [column for column in spec.columns if column.is_numeric and column.deep]


def _inverse(probability: Values | None) -> NDArray[np.float32] | None:
    """(N,) inverse probabilities; None if there are none, or every row was sure to be included."""
    if probability is None:
        return None
    chance = np.asarray(_flat(probability), np.float64)
    if odd := int((~((chance > 0) & (chance <= 1))).sum()):
        raise FrameError(
            [
                f"{INCLUSION_PROBABILITY}: {odd} values are not in (0, 1]; a row that cannot be "
                "included cannot be there"
            ]
        )
    return None if (chance == 1).all() else (1 / chance).astype(np.float32)


def _flat(values: Values) -> NDArray[Any]:
    return values.values if isinstance(values, Ragged) else values


def _ragged(values: Values) -> Ragged:
    assert isinstance(values, Ragged)
    return values


def _stack(columns: list[IntArray], rows: int) -> IntArray:
    return np.stack(columns, axis=1) if columns else np.zeros((rows, 0), np.int32)


def _rows(frame: Frame, spec: FeatureSpec) -> int:
    return len(frame[spec.columns[0].name])


def _check(frame: Frame, spec: FeatureSpec) -> None:
    absent = [column.name for column in spec.columns if column.name not in frame]
    faults = [f"absent columns {absent}; the spec needs them"] if absent else []
    names = [name for name in (*spec.by_name, spec.label.name) if name in frame]
    rows = {len(frame[name]) for name in names}
    if len(rows) > 1:
        faults.append(f"columns differ in length: {sorted(rows)}")
    for column in spec.columns:
        if column.name in frame:
            many = column.kind in {"multi", "sequence"}
            if isinstance(frame[column.name], Ragged) != many:
                faults.append(
                    f"{column.name} is {column.kind}, so it holds "
                    f"{'a list' if many else 'one value'} per row"
                )
            elif odd := _odd_types(column, _flat(frame[column.name])):
                faults.append(
                    f"{column.name} is {column.kind}, so it holds "
                    f"{'numbers or NaN' if column.is_numeric else 'text or None'}, not {odd}"
                )
    if faults:
        raise FrameError(faults)


def _odd_types(column: Column, values: NDArray[Any]) -> str:
    """Types of the values that are not what a column's frame holds, in words."""
    if column.is_numeric:
        return "" if values.dtype.kind in "fiub" else str(values.dtype)
    odd = {kind for kind in set(map(type, values.tolist())) if not issubclass(kind, str | None)}
    return " or ".join(sorted(kind.__name__ for kind in odd))
