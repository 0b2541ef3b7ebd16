"""What became of what was served: the prediction log joined with outcomes as they arrive.

A row that was served gets its label when ``horizon_hours`` and ``grace_hours`` have passed since
the request: 1 if an outcome within the horizon is known by then, else 0, which a later one still
mends. Before that it has none. All of it is computed anew from the log and from what has arrived,
so running it again changes nothing but what arrived since.

Out of it come the rows that the monitor reads, with the features as they were served, and the
exposures that the next training reads. An exposure arrives when its label is decided, positive or
not: what is summarised of exposures sees no outcome earlier than it would have been known, and not
the positive ones first.

All functions build Ibis expressions; `read_log` alone reads files. Legend: N rows served.
"""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fathom import feature_log
from fathom.feature_log import HOW, PROPENSITY, REQUEST, SLOT, VERSION
from fathom.spec import ARRIVAL_TIMESTAMP, EVENT_TIMESTAMP, FeatureSpec

if TYPE_CHECKING:
    from ibis.expr.types import Scalar, Table

#: When a row's label was decided; null before.
LABELLED = "_labelled_at"
#: Whether an outcome came after the label had been decided without it.
LATE = "_late"
_UTC = "timestamp('UTC', 6)"
_PLACE = "_place"


class OutcomesError(RuntimeError):
    """There is nothing to join; the message says what is missing."""


class OutcomesConfig(BaseModel):
    """``params:outcomes``.

    Args:
        prediction_log: folder that the service logs to (``serving.feature_log``).
        horizon_hours: an act of the user on the item counts until so long after the request.
        grace_hours: how much longer news of one may take. A later one still counts, and is
            reported.
        from_interactions: whether acts in the interactions are outcomes. Explicit outcomes come
            first where there are both.
        as_of: ISO 8601; up to when outcomes are known. null: up to the newest that has arrived.
        shown: only the first so many places of an answer count as shown; null: all.
        min_rows: labelled rows of each side before a challenger, or a champion, is judged.
        loss_margin: how much worse a challenger's loss may be: the lower end of the interval of
            the difference counts, so that it goes when it is shown to be worse than this.
        calibration_lo, calibration_hi: bounds of the sum predicted over the sum observed; who is
            shown to be outside has to go.
        probation_days: how long after its promotion a champion is rolled back for it. After that
            it is the monitor's to judge.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prediction_log: str
    horizon_hours: float = Field(default=24.0, gt=0, le=24 * 366)
    grace_hours: float = Field(default=24.0, ge=0, le=24 * 366)
    from_interactions: bool = True
    as_of: str | None = None
    shown: int | None = Field(default=None, ge=1)
    min_rows: int = Field(default=1000, ge=2)
    loss_margin: float = Field(default=0.002, ge=0)
    calibration_lo: float = Field(default=0.8, gt=0)
    calibration_hi: float = Field(default=1.25, gt=0)
    probation_days: float = Field(default=7.0, ge=0)

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.calibration_lo >= self.calibration_hi:
            raise ValueError(
                f"calibration_lo {self.calibration_lo} must be below "
                f"calibration_hi {self.calibration_hi}"
            )
        if self.as_of is not None:
            datetime.fromisoformat(self.as_of)
        return self

    def since(self, promoted: str) -> datetime | None:
        """From when a champion is judged; None if its probation is over."""
        moment = datetime.fromisoformat(promoted)
        now = datetime.now(timezone.utc) if self.as_of is None else _moment(self.as_of)
        return moment if (now - moment).total_seconds() <= self.probation_days * 86_400 else None


def read_log(folder: Path) -> Table | None:
    """All complete segments of a prediction log as one table; None if there is none."""
    import ibis
    import pyarrow.parquet as pq

    parts = [pq.read_table(path, memory_map=True) for path in feature_log.segments(folder)]
    return ibis.memtable(feature_log.together(parts)) if parts else None


def require(logged: bool, until: datetime | None, config: OutcomesConfig) -> None:
    """Refuse to join nothing.

    Raises:
        OutcomesError: names all that is missing.
    """
    faults = []
    if not logged:
        faults.append(
            f"{config.prediction_log} holds no segment of a prediction log; serve with "
            "--feature-log, or correct outcomes.prediction_log"
        )
    if until is None:
        faults.append(
            "nothing that could be an outcome has arrived; add interactions or raw outcomes"
        )
    if faults:
        raise OutcomesError("; ".join(faults))


def served(log: Table, spec: FeatureSpec, shown: int | None = None) -> Table:
    """The rows that were in an answer, or that a shadow has scored; each once.

    A request that was tried again under its id, or that holds an item twice, counts once: by the
    champion where a canary was late, then the newest, then the higher place.
    """
    import ibis

    keys = [REQUEST, spec.entities.user, spec.entities.item]
    rows = log.mutate(**{HOW: log[HOW].fill_null("champion")})
    rows = rows.filter(rows[SLOT].notnull())
    if shown is not None:
        rows = rows.filter(rows[SLOT] < shown)
    is_shadow = rows[HOW] == "shadow"
    order = [rows[HOW] != "champion", rows[EVENT_TIMESTAMP].desc(), rows[SLOT]]
    # Of a shadow's, one by version: it may have been another one for a while.
    side = is_shadow.ifelse(rows[VERSION], "")
    window = ibis.window(group_by=[*(rows[key] for key in keys), side], order_by=order)
    rows = rows.mutate(**{_PLACE: ibis.row_number().over(window)})
    return rows.filter(rows[_PLACE] == 0).drop(_PLACE)


def watermark(
    config: OutcomesConfig, interactions: Table | None, outcomes: Table | None
) -> datetime | None:
    """Up to when outcomes are known; None if nothing has arrived."""
    if config.as_of is not None:
        return _moment(config.as_of)
    acts = interactions if config.from_interactions else None
    found = [_known(t).max().to_pyarrow().as_py() for t in (acts, outcomes) if t is not None]
    return max((moment for moment in found if moment is not None), default=None)


def with_outcomes(
    rows: Table,
    spec: FeatureSpec,
    config: OutcomesConfig,
    interactions: Table | None,
    outcomes: Table | None,
    until: datetime | None,
) -> Table:
    """Served rows with their label, when it was decided (`LABELLED`), and whether anew (`LATE`).

    Args:
        rows: N rows, from `served`.
        interactions: acts of users on items, with ``event_timestamp``.
        outcomes: explicit ones: request, user, item, label and ``event_timestamp``. Of several of
            one row the newest counts.
        until: outcomes are known up to this moment (`watermark`); null labels without one.
    """
    import ibis

    label = spec.label.name
    negative, positive = spec.label.values or (None, None)
    at = rows[EVENT_TIMESTAMP]
    due = at + ibis.interval(seconds=round((config.horizon_hours + config.grace_hours) * 3600))
    keys = [REQUEST, spec.entities.user, spec.entities.item]
    rows = rows.mutate(_due=due)
    limit = ibis.literal(until, type=_UTC)
    acts = _acts(rows, spec, config, interactions, limit)
    told = _told(rows, spec, outcomes, limit)
    # Served rows are many by (request, user, item) only where shadows have scored them as well.
    for found in (acts, told):
        rows = rows.left_join(found, keys, rname="{name}_right")
        rows = rows.drop(*(name for name in rows.columns if name.endswith("_right")))
    over = (rows._due <= limit).fill_null(False)
    kind = "int64" if spec.label.values else "float64"
    value = ibis.cases(
        (rows._told.notnull(), rows._told),
        (rows._acted.notnull(), ibis.literal(positive, type=kind)),
        (over, ibis.literal(negative, type=kind)),
        else_=ibis.null(kind),
    )
    known = rows._told_at.coalesce(rows._acted)
    decided = ibis.greatest(known.coalesce(rows._due), rows._due)
    # A label that is known before it is due is handed on when it is due, as a negative one is.
    value = over.ifelse(value, ibis.null(kind))
    rows = rows.mutate(
        **{
            label: value,
            LABELLED: value.notnull().ifelse(decided, ibis.null(_UTC)),
            LATE: (known > rows._due).fill_null(False),
        }
    )
    rows = rows.drop("_due", "_acted", "_told", "_told_at")
    # In one order, so that files of the same content are the same.
    return rows.order_by([EVENT_TIMESTAMP, *keys, VERSION])


def exposures(labelled: Table, spec: FeatureSpec) -> Table:
    """Canonical exposures of what was shown and is labelled, with their ``partition`` by day."""
    rows = labelled.filter(labelled[HOW] != "shadow", labelled[spec.label.name].notnull())
    context = {}
    for column in spec.raw_columns("context"):
        found = rows[column.name]
        if column.is_numeric:
            found = found.isnan().ifelse(None, found.cast("float64"))
        context[column.name] = found
    moment = rows[EVENT_TIMESTAMP]
    return rows.select(
        **{
            spec.entities.request: rows[REQUEST],
            spec.entities.user: rows[spec.entities.user],
            spec.entities.item: rows[spec.entities.item],
            EVENT_TIMESTAMP: moment,
            ARRIVAL_TIMESTAMP: rows[LABELLED],
            **context,
            spec.label.name: rows[spec.label.name],
            # Chance has shown it with this probability, as sampling would have drawn it.
            "inclusion_probability": rows[PROPENSITY].coalesce(1.0),
            "partition": "served-" + moment.strftime("%Y-%m-%d"),
        }
    )


def merged(past: Table | None, new: Table, spec: FeatureSpec) -> Table:
    """Exposures of earlier runs and new ones, each once; what the log still holds is the newer."""
    keys = [spec.entities.request, spec.entities.user, spec.entities.item]
    if past is not None:
        past = past.select(**{name: past[name].cast(kind) for name, kind in new.schema().items()})
        new = past.anti_join(new, keys).union(new)
    return new.order_by([EVENT_TIMESTAMP, *keys])


def report(labelled: Table, spec: FeatureSpec, outcomes: Table | None) -> dict[str, Any]:
    """How much was served, and what is known of it.

    Returns:
        ``rows``, of these ``positive``, ``negative``, ``waiting`` for their outcome, and ``late``,
        whose outcome came after it was due; ``unmatched`` explicit outcomes of nothing that was
        served; ``by`` {version → {how → rows}}.
    """
    label = labelled[spec.label.name]
    counts = labelled.aggregate(
        rows=labelled.count(),
        positive=(label > 0).sum(),
        negative=(label <= 0).sum(),
        waiting=label.isnull().sum(),
        late=labelled[LATE].sum(),
    ).to_pyarrow()
    found: dict[str, Any] = {name: counts[name][0].as_py() or 0 for name in counts.column_names}
    found["unmatched"] = 0
    if outcomes is not None:
        keys = spec.keys
        pairs = [(name, REQUEST if name == spec.entities.request else name) for name in keys]
        left = outcomes.anti_join(labelled, pairs)
        found["unmatched"] = left.count().to_pyarrow().as_py()
    by: dict[str, dict[str, int]] = {}
    groups = labelled.group_by([VERSION, HOW]).aggregate(rows=labelled.count())
    for row in groups.order_by([VERSION, HOW]).to_pyarrow().to_pylist():
        by.setdefault(row[VERSION], {})[row[HOW]] = row["rows"]
    return found | {"by": by}


def _acts(
    rows: Table,
    spec: FeatureSpec,
    config: OutcomesConfig,
    interactions: Table | None,
    limit: Scalar,
) -> Table:
    """Served row → when its first act in time became known (``_acted``)."""
    import ibis

    keys = [REQUEST, spec.entities.user, spec.entities.item]
    asked = rows.select(*keys, _at=rows[EVENT_TIMESTAMP]).distinct()
    if interactions is None or not config.from_interactions:
        return asked.select(*keys, _acted=ibis.null(_UTC)).limit(0)
    user, item = spec.entities.user, spec.entities.item
    acts = interactions.select(
        _user=interactions[user].cast("string"),
        _item=interactions[item].cast("string"),
        _acted_at=interactions[EVENT_TIMESTAMP].cast(_UTC),
        _known=_known(interactions),
    )
    acts = acts.filter(acts._known <= limit)
    horizon = ibis.interval(seconds=round(config.horizon_hours * 3600))
    found = asked.inner_join(
        acts,
        [
            asked[user] == acts._user,
            asked[item] == acts._item,
            acts._acted_at >= asked._at,
            acts._acted_at < asked._at + horizon,
        ],
    )
    return found.group_by(keys).aggregate(_acted=found._known.min())


def _told(rows: Table, spec: FeatureSpec, outcomes: Table | None, limit: Scalar) -> Table:
    """Served row → its newest explicit outcome (``_told``) and when that was known."""
    import ibis

    keys = [REQUEST, spec.entities.user, spec.entities.item]
    kind = "int64" if spec.label.values else "float64"
    if outcomes is None:
        empty = rows.select(*keys, _told=ibis.null(kind), _told_at=ibis.null(_UTC))
        return empty.limit(0)
    told = outcomes.select(
        **{
            REQUEST: outcomes[spec.entities.request].cast("string"),
            spec.entities.user: outcomes[spec.entities.user].cast("string"),
            spec.entities.item: outcomes[spec.entities.item].cast("string"),
            "_told": outcomes[spec.label.name].cast(kind),
            "_told_at": _known(outcomes),
        }
    )
    told = told.filter(told._told_at <= limit)
    newest = ibis.window(
        group_by=[told[key] for key in keys], order_by=[told._told_at.desc(), told._told.desc()]
    )
    told = told.mutate(**{_PLACE: ibis.row_number().over(newest)})
    return told.filter(told[_PLACE] == 0).drop(_PLACE)


def _known(table: Table) -> Any:
    """The moment from which each row of a log is known."""
    import ibis

    at = table[EVENT_TIMESTAMP].cast(_UTC)
    if ARRIVAL_TIMESTAMP not in table.columns:
        return at
    return ibis.greatest(at, table[ARRIVAL_TIMESTAMP].cast(_UTC).coalesce(at))


def _moment(text: str) -> datetime:
    found = datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=timezone.utc)
