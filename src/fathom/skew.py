"""Replay: were the features that a model saw when it served those that training would have seen?

Every logged vector (`fathom.feature_log`) is built again offline, from the history of the feature
store, as of the moments whose state serving had, and scored again. Every value must be the same,
bit for bit, and every probability within `fathom.ranker.TOLERANCE`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from fathom import feature_log
from fathom.aggregates import view_keys
from fathom.batch import Ragged
from fathom.encoding import Values, with_ratios
from fathom.feature_log import DEGRADED, MOMENT, PROBABILITY, REQUEST, ROW, TABLES_AS_OF
from fathom.feature_store import FeatureRepo, FeatureStoreError, frame_of
from fathom.features import packed_name
from fathom.online import user_views
from fathom.spec import EVENT_TIMESTAMP, FeatureSpec

if TYPE_CHECKING:
    from fathom.ranker import Ranker
    from fathom.registry import Registry

_AS_OF = "_as_of"
_NEVER = np.iinfo(np.int64).max
Mask = NDArray[np.bool_]
Moments = NDArray[np.int64]

log = logging.getLogger(__name__)


class SkewError(RuntimeError):
    """What was served is not what the history says, or cannot be compared with it."""


class SkewConfig(BaseModel):
    """What is replayed (``params:skew``).

    Args:
        feature_log: folder that the service logs to.
        batch_rows: about how many rows are rebuilt at a time; bounds the memory.
        examples: differences of each column that the report spells out.
        tolerated_rows: rows that may differ before the run fails.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    feature_log: str
    batch_rows: int = Field(default=100_000, ge=1)
    examples: int = Field(default=5, ge=0, le=1000)
    tolerated_rows: int = Field(default=0, ge=0)


@dataclass
class Report:
    """What a replay found; `as_dict` says what each figure is."""

    examples: int
    figures: dict[str, int] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)
    columns: dict[str, dict[str, Any]] = field(default_factory=dict)
    max_difference: float = 0.0

    def count(self, name: str, rows: int) -> None:
        """Add to a figure."""
        self.figures[name] = self.figures.get(name, 0) + rows

    def differ(self, column: str, rows: int, examples: Sequence[dict[str, Any]]) -> None:
        """Add rows in which a column differs."""
        if rows:
            found = self.columns.setdefault(column, {"rows": 0, "examples": []})
            found["rows"] += rows
            found["examples"] += examples[: self.examples - len(found["examples"])]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON holds it.

        Returns:
            ``rows`` and ``requests`` logged; rows ``compared``, and of those that were not, why:
            ``degraded`` (the online store was down) or ``straddling`` (served in the middle of a
            materialisation that changed an attribute by which another row of the user is keyed);
            of the compared, rows that were ``stale`` (newer features were due at their moment than
            serving had) or ``from_the_future`` (their moment lies before the state that serving
            had); ``differing`` rows; ``columns`` that differ, with rows and examples;
            ``max_difference`` of a probability; ``versions`` with their rows.
        """
        names = ("rows", "requests", "compared", "degraded", "straddling", "stale")
        counted = {name: self.figures.get(name, 0) for name in (*names, "from_the_future")}
        return {
            **counted,
            "differing": self.figures.get("differing", 0),
            "columns": self.columns,
            "max_difference": self.max_difference,
            "versions": self.versions,
        }


def replay(repo: FeatureRepo, rankers: Registry, config: SkewConfig) -> Report:
    """Build and score every logged vector again, and compare.

    Raises:
        SkewError: a version is not in the registry any more, or the feature store is of another
            spec by now.
    """
    from fathom.artifact import ArtifactError
    from fathom.registry import RegistryError

    report = Report(config.examples)
    folder = Path(config.feature_log)
    paths: dict[str, list[Path]] = {}
    for path in feature_log.segments(folder):
        paths.setdefault(path.parent.name, []).append(path)
    for version, segments in paths.items():
        try:
            ranker = rankers.load(version)
            for logged in _batches(segments, config.batch_rows):
                report.versions[version] = report.versions.get(version, 0) + len(logged)
                _compare(logged, repo, ranker, report)
        except (RegistryError, ArtifactError, FeatureStoreError) as error:
            raise SkewError(f"what ranker {version} served cannot be replayed: {error}") from error
    return report


def judge(report: Mapping[str, Any], config: SkewConfig) -> None:
    """Refuse a report of differences, and one of nothing.

    Raises:
        SkewError: says which columns differ, in how many rows.
    """
    if not report["compared"]:
        raise SkewError(
            f"nothing was compared: {config.feature_log} has {report['rows']} rows, "
            f"{report['degraded']} of them served without the online store; serve with "
            "--feature-log and replay again"
        )
    if report["differing"] > config.tolerated_rows:
        columns = ", ".join(f"{name} ({c['rows']:,})" for name, c in report["columns"].items())
        raise SkewError(
            f"{report['differing']:,} of {report['compared']:,} served rows differ from the "
            f"feature store's history (at most {config.tolerated_rows:,} may), in {columns}; the "
            "report has examples. Either serving is skewed, or the history was changed afterwards"
        )


def table(report: Mapping[str, Any]) -> str:
    """The report as a short table for people."""
    plain = [(name.replace("_", " "), report[name]) for name in report if name != "columns"]
    lines = [f"{name:<18}{value:>12,}" for name, value in plain if isinstance(value, int)]
    lines.append(f"{'max difference':<18}{report['max_difference']:>12.1e}  of a probability")
    lines += [f"  {name:<40}{c['rows']:>12,} rows differ" for name, c in report["columns"].items()]
    return "\n".join(lines)


def _batches(segments: Sequence[Path], rows: int) -> Iterator[pa.Table]:
    """Segments together, so that a feature view is not read again for each small one."""
    held: list[pa.Table] = []
    for path in segments:
        held.append(pq.read_table(path))
        if sum(map(len, held)) >= rows:
            yield feature_log.together(held)
            held = []
    if held:
        yield feature_log.together(held)


# -- one batch -----------------------------------------------------------------------------------


def _compare(logged: pa.Table, repo: FeatureRepo, ranker: Ranker, report: Report) -> None:
    from fathom.ranker import TOLERANCE

    spec = ranker.spec
    report.count("rows", len(logged))
    report.count("requests", pc.count_distinct(logged[REQUEST]).as_py())
    degraded = logged[DEGRADED].to_numpy()
    report.count("degraded", int(degraded.sum()))
    logged = logged.filter(pa.array(~degraded))
    if len(logged) == 0:
        return
    rebuilt, straddling = _rebuilt(logged, repo, spec)
    report.count("straddling", int(straddling.sum()))
    logged, kept = logged.filter(pa.array(~straddling)), np.flatnonzero(~straddling)
    if len(logged) == 0:
        return
    report.count("compared", len(logged))
    _count_moments(logged, spec, report)
    served = frame_of(logged)
    rebuilt = {name: values.take(kept) for name, values in rebuilt.items()}
    differing = np.zeros(len(logged), np.bool_)
    for column in spec.columns:
        name = column.name
        unlike = _unlike(served[name], rebuilt[name])
        _note(report, name, unlike, logged, served[name], rebuilt[name])
        differing |= unlike
    probabilities = ranker.score(rebuilt)
    apart = np.abs(np.asarray(served[PROBABILITY]) - probabilities)
    report.max_difference = max(report.max_difference, float(apart.max()))
    # Written so that NaN, which is not within anything, counts as different.
    unlike = ~(apart <= TOLERANCE)
    _note(report, PROBABILITY, unlike, logged, served[PROBABILITY], probabilities)
    report.count("differing", int((differing | unlike).sum()))


def _count_moments(logged: pa.Table, spec: FeatureSpec, report: Report) -> None:
    moment, tables = _us(logged[EVENT_TIMESTAMP]), _us(logged[TABLES_AS_OF])
    grain = round(spec.grain.total_seconds() * 1e6)
    origin = round(spec.grain_origin.timestamp() * 1e6)
    due = (moment - origin) // grain * grain + origin
    report.count("stale", int((due > tables).sum()))
    newest = np.max(_levels(logged, spec), axis=0)
    report.count("from_the_future", int((moment < newest).sum()))


def _us(column: pa.ChunkedArray) -> Moments:
    """Microseconds since 1970, UTC; a moment long ago for null."""
    numbers = column.cast(MOMENT).cast(pa.int64())
    found: Moments = pc.fill_null(numbers, -_NEVER).to_numpy()
    return found


def _levels(logged: pa.Table, spec: FeatureSpec) -> Moments:
    """The moment that each of the user's views is as of, (views + 1, N); the last: the tables'.

    A row up to the moment of the tables is the state at that moment, since that is how far all
    views had been materialised; a newer one was the state at its own.
    """
    tables = _us(logged[TABLES_AS_OF])
    rows = [_us(logged[f"{ROW}{view}"]) for view in user_views(spec)]
    return np.stack([*(np.maximum(row, tables) for row in rows), tables])


def _rebuilt(
    logged: pa.Table, repo: FeatureRepo, spec: FeatureSpec
) -> tuple[dict[str, Values], Mask]:
    """The features of each row from the feature store's history.

    While a materialisation runs, some of a user's views are as of a later moment than others. Each
    distinct moment of a row is one look-up, and each view's columns are taken from its own.

    Returns:
        The frame, and the rows that no look-ups explain: an attribute changed between the moment
        that it is as of and that of a view it is a key of.
    """
    levels = _levels(logged, spec)
    names = [name for name in _spine(spec) if name in logged.column_names]
    spine = logged.select([*names, TABLES_AS_OF])
    if spec.entities.request not in names:
        spine = spine.append_column(spec.entities.request, logged[REQUEST])
    parts: list[pa.Table] = []
    source = np.full(levels.shape, -1)
    while (source < 0).any():
        # The earliest moment of each row that was not looked up yet.
        moment = np.where(source < 0, levels, _NEVER).min(axis=0)
        rows = np.flatnonzero(moment < _NEVER)
        asked = spine.take(pa.array(rows))
        asked = asked.append_column(_AS_OF, pa.array(moment[rows]).cast(MOMENT))
        place = np.full(len(logged), -1)
        place[rows] = np.arange(len(rows)) + sum(map(len, parts))
        parts.append(repo.training_frame(asked, spec, user_as_of=_AS_OF, tables_as_of=TABLES_AS_OF))
        source = np.where((source < 0) & (levels == moment), place, source)
    found = pa.concat_tables(parts).select([column.name for column in spec.columns])
    frames: dict[bytes, dict[str, Values]] = {}
    at: dict[str | None, dict[str, Values]] = {}
    for view, place in zip([*user_views(spec), None], source, strict=True):
        # Nearly always, all views are as of one moment.
        if place.tobytes() not in frames:
            frames[place.tobytes()] = frame_of(found.take(pa.array(place)))
        at[view] = frames[place.tobytes()]
    view_of = _views_of(spec)
    frame = {column.name: at[view_of.get(column.name)][column.name] for column in spec.columns}
    straddling = np.zeros(len(logged), np.bool_)
    for view in spec.views:
        for key in _attributes(spec, view) if packed_name(view) in at else ():
            straddling |= _unlike(frame[key], at[packed_name(view)][key])
    return with_ratios(frame, spec), straddling


def _attributes(spec: FeatureSpec, view: str) -> list[str]:
    """The user's attributes among the keys of a view."""
    others = [key for key in view_keys(spec, view) if key != spec.entities.user]
    return [key for key in others if spec.owner(key) == "user"]


def _views_of(spec: FeatureSpec) -> dict[str, str]:
    """Column → the user's view on whose moment it depends; the tables' columns are left out."""
    read = user_views(spec)
    views = {column.name: "users" for column in spec.held("users")}
    for view, columns in spec.views.items():
        own = next((name for name in (view, packed_name(view)) if name in read), None)
        own = own or ("users" if _attributes(spec, view) else None)
        if own:
            views |= {column.name: own for column in columns}
    return views


def _spine(spec: FeatureSpec) -> list[str]:
    context = [column.name for column in spec.raw_columns("context")]
    return list(dict.fromkeys([*spec.keys, EVENT_TIMESTAMP, *context]))


# -- values --------------------------------------------------------------------------------------


def _unlike(served: Values, rebuilt: Values) -> Mask:
    """Rows in which two columns differ: in any bit of a number, but for the bits of NaN."""
    if isinstance(served, Ragged) or isinstance(rebuilt, Ragged):
        assert isinstance(served, Ragged)
        assert isinstance(rebuilt, Ragged)
        unlike: Mask = served.lengths != rebuilt.lengths
        same = np.flatnonzero(~unlike)
        ours, theirs = served.take(same), rebuilt.take(same)
        wrong = ours.values != theirs.values
        unlike[same[ours.rows[wrong]]] = True
        return unlike
    if served.dtype == object:
        return np.asarray(served != rebuilt, np.bool_)
    bits = served.astype(np.float32).view(np.int32) != rebuilt.astype(np.float32).view(np.int32)
    return np.asarray(bits & ~(np.isnan(served) & np.isnan(rebuilt)))


def _note(
    report: Report, name: str, unlike: Mask, logged: pa.Table, served: Values, rebuilt: Values
) -> None:
    rows = np.flatnonzero(unlike)
    keys = [REQUEST, EVENT_TIMESTAMP, *logged.column_names[:2]]
    examples = []
    for i in rows[: report.examples].tolist():
        where = {key: str(logged[key][i].as_py()) for key in keys}
        examples.append(where | {"served": _plain(served, i), "rebuilt": _plain(rebuilt, i)})
    report.differ(name, len(rows), examples)


def _plain(values: Values, i: int) -> Any:
    """A value as JSON holds it."""
    if isinstance(values, Ragged):
        return values.values[values.offsets[i] : values.offsets[i + 1]].tolist()
    value = values[i]
    if isinstance(value, np.floating | np.integer | float):
        return None if np.isnan(value) else float(value)
    return value
