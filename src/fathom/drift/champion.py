"""A champion's side of monitoring: its predictions, what it knows, and what it leans on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fathom.drift.config import PROBABILITY, MonitoringConfig
from fathom.drift.measure import leaning
from fathom.drift.reference import Reference
from fathom.spec import EVENT_TIMESTAMP, FeatureSpec

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from ibis.expr.types import Table

    from fathom.ranker import Ranker

#: A sample's share is kept to one in so many.
_PLACES = 1_000_000


def watched_columns(spec: FeatureSpec) -> list[str]:
    """What of a training frame is watched.

    Inclusion probabilities are not: the model predicts on the scale of the sampled log.
    """
    columns = (column.name for column in spec.columns)
    return list(dict.fromkeys([*spec.keys, EVENT_TIMESTAMP, spec.label.name, *columns]))


def sampled(rows: Table, spec: FeatureSpec, most: int) -> Table:
    """Whole requests of a log, about ``most`` rows, the same ones each time.

    Lists stay whole, so that what is measured of rankings is comparable.
    """
    total = rows.count().to_pyarrow().as_py()
    if total <= most:
        return rows
    place = rows[spec.entities.request].hash().abs() % _PLACES
    return rows.filter(place < int(most / total * _PLACES))


def scored(champion: Ranker, rows: pa.Table) -> pd.DataFrame:
    """Rows (N) as `fathom.drift.measure` takes them: with predictions and hits of crosses.

    Predictions that rows have already, as they were served, are kept.
    """
    import pyarrow as pa

    from fathom.feature_store import frame_of

    frame = frame_of(rows)
    made = {}
    if PROBABILITY not in rows.column_names:
        made[PROBABILITY] = champion.score(frame)
    for name, hits in champion.encoder.cross_hits(frame).items():
        made[f"{name}.hits"] = hits
    for name, values in made.items():
        rows = rows.append_column(name, pa.array(values, from_pandas=True))
    return rows.to_pandas()


def reference_of(champion: Ranker, rows: pa.Table, config: MonitoringConfig) -> Reference:
    """The champion's reference, from rows that it did not learn from.

    Its spec is the champion's own copy, so that editing conf cannot move what it is held to.

    Raises:
        MonitoringError: the rows or the settings do not fit the spec.
    """
    from fathom.feature_store import frame_of

    spec, encoder = champion.spec, champion.encoder
    words = {
        column.name: encoder.tables[table].values
        for column in spec.columns
        if (table := encoder.table_of.get(column.name)) in encoder.tables
    }
    leans = leaning(lambda table: champion.score(frame_of(table)), rows, spec, config)
    return Reference.of(scored(champion, rows), spec, config, words, leans)
