"""The service's HTTP contract: requests, answers, faults, and the OpenAPI document of them all.

The fields of a request follow from the spec inside the ranker, so they are checked against it and
described from it. Knows nothing of how requests arrive; `fathom.service` does.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, create_model
from pydantic.json_schema import models_json_schema

from fathom.spec import Column, FeatureSpec

MAX_BODY_BYTES = 16 << 20
MAX_CANDIDATES = MAX_ROWS = 10_000
#: Values in one list of a row; histories are at most this long (`fathom.spec.Aggregate`).
MAX_VALUES = 1_000
#: The largest that a number may be: float32's (`fathom.ranker.frame_of_rows` checks it).
MAX_NUMBER = 3.4028234663852886e38
#: Combinations that a cross of several lists may make in one request, over all rows.
MAX_COMBINATIONS = 5_000_000
#: Terms, those of 0 included, that an explained request may have, over all candidates: naming as
#: many takes up to two seconds.
MAX_TERMS = 150_000
#: Candidates whose deep logits one request may have attributed: each costs as much as scoring it
#: some hundred times, and 100 took 0.05 to 0.16 s by model (default layers, one core).
MAX_ATTRIBUTED = 100
#: Items that a recommendation may have, and entries that one of its lists may have.
MAX_RECOMMENDED, MAX_LISTED = 1_000, 10_000
#: Faults that an answer spells out; the rest are counted.
MAX_FAULTS = 100
#: Faults, up to which each is put into words: a million would take seconds and a gigabyte.
MAX_WORDED = 50_000
EARLIEST, LATEST = (datetime(year, 1, 1, tzinfo=timezone.utc) for year in (1970, 2200))

_OBJECT, _ID = "object", "id"
R = TypeVar("R", bound=BaseModel)


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


# -- requests ------------------------------------------------------------------------------------


class Candidate(_Message):
    """An item to rank, with the context columns that are its own."""

    item: str
    context: dict[str, Any] = {}


def _form(candidate: Any) -> str:
    return _ID if isinstance(candidate, str) else _OBJECT


AnyCandidate = Annotated[
    Annotated[str, Tag(_ID)] | Annotated[Candidate, Tag(_OBJECT)], Discriminator(_form)
]


class RankRequest(_Message):
    """Candidates to rank for a user; the service looks the features up.

    Args:
        context: values of context columns that all candidates share.
        candidates: item ids, or objects where context differs by candidate. An item may stand
            here more than once, in different places of a page, say.
        timestamp: ISO 8601 moment of the exposure, UTC unless it says otherwise; now if absent.
        explain: whether to split each logit into its exact parts.
        attribute: whether to share each deep logit out among the columns, by integrated gradients;
            for at most `MAX_ATTRIBUTED` candidates, and models with a deep part.
    """

    user: str
    candidates: list[AnyCandidate] = Field(min_length=1, max_length=MAX_CANDIDATES)
    context: dict[str, Any] = {}
    timestamp: str | None = None
    explain: bool = False
    attribute: bool = False


class RecommendRequest(_Message):
    """A user to recommend items to, out of the whole catalogue; the service looks features up.

    Args:
        k: how many items.
        context: values of context columns, which all items share.
        timestamp: ISO 8601 moment of the exposure, UTC unless it says otherwise; now if absent.
        explain: whether to split each logit into its exact parts.
        exclude_interacted: whether to leave out what the user has interacted with (bought, say).
        allow: the only items to choose from; all if absent.
        deny: items to leave out.
        where: attribute of items to the values of which an item must have one; an item must meet
            all of them.
        diversity: 0 to 1, how much likeness to items above counts against an item.
        exploration: 0 to 1, the share of slots that chance fills. Both are the service's own
            settings if absent.
    """

    user: str
    k: int = Field(default=10, ge=1, le=MAX_RECOMMENDED)
    context: dict[str, Any] = {}
    timestamp: str | None = None
    explain: bool = False
    exclude_interacted: bool = False
    allow: list[str] | None = Field(default=None, max_length=MAX_LISTED)
    deny: list[str] = Field(default=[], max_length=MAX_LISTED)
    where: dict[str, Annotated[list[str], Field(max_length=MAX_LISTED)]] = {}
    diversity: float | None = Field(default=None, ge=0, le=1)
    exploration: float | None = Field(default=None, ge=0, le=1)


class PredictRequest(_Message):
    """Rows of every column of the spec but ratios, which are computed; null is a missing value."""

    rows: list[dict[str, Any]] = Field(min_length=1, max_length=MAX_ROWS)


# -- answers -------------------------------------------------------------------------------------


class Term(_Message):
    """One addend of a logit.

    Args:
        feature: a column, or a cross by its name.
        values: the value of each of its columns: of a number the range that it is in, null if it
            is missing.
        weight_of: whose weight it is: the ``values``' own; that of all ``unknown`` values, which
            training saw too rarely; that of a ``missing`` value; or that of a ``bucket`` of hashed
            values, which others may share.
    """

    feature: str
    values: dict[str, str | None]
    weight_of: Literal["values", "unknown", "missing", "bucket"]
    logit: float


class Explanation(_Message):
    """The exact parts of a logit: ``bias + deep + sum(wide)``.

    Args:
        wide: the sum of each wide column's and cross's terms.
        terms: the same by values, largest first, without those that are 0.
    """

    logit: float
    bias: float
    deep: float
    wide: dict[str, float]
    terms: list[Term]


class Attribution(_Message):
    """What each column gives the deep logit: ``baseline + sum(shares)``, nearly ``deep``.

    Args:
        baseline: the deep logit of an example of which nothing is known.
        shares: by column, by integrated gradients: approximate, unlike an explanation's parts.
    """

    deep: float
    baseline: float
    shares: dict[str, float]


class RankedItem(_Message):
    """One candidate's place; its probability is the predicted value if the task is regression."""

    item: str
    probability: float
    explanation: Explanation | None = None
    attribution: Attribution | None = None


class RankAnswer(_Message):
    """Candidates by falling probability, ties in the order of the request.

    Args:
        degraded: the user's features could not be read; the user was ranked as an unknown one.
        expired: rows of features that were too old to be used.
    """

    version: str
    request_id: str
    user_known: bool
    unknown_items: int
    degraded: bool
    expired: int
    items: list[RankedItem]


class RecommendedItem(RankedItem):
    """One slot.

    Args:
        source: ``retrieved`` for this user, ``popular`` with all, or ``explored``: put there by
            chance.
        propensity: the probability with which this item was to be in this answer; 1 without
            exploration.
    """

    source: Literal["retrieved", "popular", "explored"]
    propensity: float


class RecommendAnswer(_Message):
    """Items by slot; fewer than k if no more are allowed.

    Args:
        popular: nothing is known of the user's taste, so the most popular items were ranked.
        degraded: the user's features could not be read; the user was ranked as an unknown one, and
            what the user has interacted with was not left out.
        expired: rows of features that were too old to be used.
        ranked: items that were retrieved, and ranked.
    """

    version: str
    request_id: str
    user_known: bool
    popular: bool
    degraded: bool
    expired: int
    ranked: int
    items: list[RecommendedItem]


class PredictAnswer(_Message):
    """One probability per row, in order; predicted values where the task is regression."""

    version: str
    request_id: str
    probabilities: list[float]


class ModelAnswer(_Message):
    """What is being served, and what it takes.

    Args:
        feature_store: ``absent``, ``opening``, ``failed``, ``ready``, or ``degraded`` while the
            online store does not answer.
        tables_as_of: the moment whose state the features of items and contexts are.
        retrieval: of ``/recommend``: items, ``exact`` or ``approximate`` index, and the share of
            the exact answer that it finds; null if the ranker has no tower.
    """

    version: str
    request_id: str
    spec_hash: str
    task: str
    entities: dict[str, str]
    columns: list[dict[str, Any]]
    crosses: list[str]
    training: dict[str, Any]
    provenance: dict[str, Any]
    feature_store: str
    tables_as_of: str | None
    retrieval: dict[str, Any] | None
    limits: dict[str, int]


class Fault(_Message):
    """What is wrong with one field: its value, what is allowed, and what to do."""

    field: str
    fault: str


class ErrorAnswer(_Message):
    """Why a request was refused; every fault at once."""

    error: str
    version: str | None = None
    request_id: str | None = None
    faults: list[Fault] = []


class RefusedError(Exception):
    """A request that is not served; becomes an `ErrorAnswer`."""

    def __init__(
        self,
        status: int,
        error: str,
        faults: Sequence[dict[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(error)
        self.status = status
        self.faults = list(faults)
        self.headers = dict(headers or {})

    @property
    def answer(self) -> dict[str, Any]:
        """The body of the answer, but for what every answer carries."""
        return {"error": str(self), "faults": self.faults[:MAX_FAULTS]}


def unauthorized() -> RefusedError:
    """The answer to a request without a valid key."""
    return RefusedError(
        401,
        "no valid API key; send one as 'Authorization: Bearer KEY'",
        headers={"WWW-Authenticate": "Bearer"},
    )


def refused(faults: Sequence[dict[str, str]]) -> RefusedError:
    """The answer to bad input: status 400, and what to change."""
    count = len(faults)
    shown = f", of which {MAX_FAULTS} are listed" if count > MAX_FAULTS else ""
    return RefusedError(
        400, f"{count} fault{'s' if count > 1 else ''} in the request{shown}", faults
    )


def bound_faults(count: int) -> None:
    """Refuse more faults than are put into words, before they are.

    Raises:
        RefusedError: status 400.
    """
    if count > MAX_WORDED:
        raise RefusedError(400, f"{count} faults in the request, which are too many to list")


def bound_unknown(objects: Iterable[Mapping[str, Any]], known: Container[str]) -> None:
    """`bound_faults` of the fields of some objects that are not among the known ones."""
    bound_faults(sum(name not in known for fields in objects for name in fields))


# -- checking ------------------------------------------------------------------------------------


def parse(kind: type[R], body: bytes) -> R:
    """Read a request of a kind.

    Raises:
        RefusedError: the body is not JSON or not of that kind; lists every fault.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        bound_faults(error.error_count())
        found = error.errors(include_url=False)
        raise refused([_fault(dict(line)) for line in found]) from None


def list_faults(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], place: str
) -> list[dict[str, str]]:
    """Lists of values that are too long.

    Args:
        place: where a row stands in the request, with ``{}`` for its number.
    """
    bound = f"at most {MAX_VALUES:,} are allowed, so shorten it"
    return [
        {"field": f"{place.format(i)}.{c.name}", "fault": f"has {len(value):,} values; {bound}"}
        for c in columns
        if c.kind in {"multi", "sequence"}
        for i, row in enumerate(rows)
        if isinstance(value := row.get(c.name), list) and len(value) > MAX_VALUES
    ]


def moment_of(text: str | None, faults: list[dict[str, str]]) -> datetime:
    """The moment of an exposure, with a time zone; now if none is given or it is at fault.

    Args:
        faults: where a fault is added.
    """
    now = datetime.now(timezone.utc)
    if text is None:
        return now
    try:
        moment = datetime.fromisoformat(text)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
        if EARLIEST <= moment < LATEST:
            return moment
        bound = f"it must be from {EARLIEST:%Y-%m-%d} to before {LATEST:%Y-%m-%d}"
    except (ValueError, OverflowError):
        bound = "it must be an ISO 8601 moment, such as 2017-11-20T18:30:00Z"
    faults.append({"field": "timestamp", "fault": f"is {shown(text)}; {bound}"})
    return now


def shown(value: Any) -> str:
    """A value as a message shows it: short, whatever it is."""
    if isinstance(value, list):
        return f"a list of {len(value):,}"
    if isinstance(value, dict):
        return f"an object of {len(value):,} fields"
    text = "null" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_BOUNDS = {
    "string_type": "a string",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
}


def _fault(found: Mapping[str, Any]) -> dict[str, str]:
    """A fault in this project's words from one in pydantic's."""
    field = ""
    for part in found["loc"]:
        if isinstance(part, int):
            field += f"[{part}]"
        elif part not in {_OBJECT, _ID}:
            field += f".{part}" if field else part
    kind, value, details = found["type"], shown(found["input"]), found.get("ctx", {})
    if kind == "json_invalid":
        return {"field": "body", "fault": f"is not JSON: {details['error']}; correct it"}
    if kind == "missing":
        fault = "is missing; give it"
    elif kind == "extra_forbidden":
        fault = f"is {value}, but this request has no such field; remove it"
    elif kind == "too_short":
        fault = f"is empty; give at least {details['min_length']}"
    elif kind == "too_long":
        fault = (
            f"has {details['actual_length']:,} entries; at most {details['max_length']:,} are "
            "allowed, so split the request"
        )
    elif kind in {"greater_than_equal", "less_than_equal"}:
        least, most = details.get("ge"), details.get("le")
        bound = f"at most {most}" if least is None else f"at least {least}"
        fault = f"is {value}; it must be {bound}"
    else:
        allowed = f"it must be {_BOUNDS[kind]}" if kind in _BOUNDS else found["msg"]
        fault = f"is {value}; {allowed}"
    return {"field": field or "body", "fault": fault}


# -- OpenAPI -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Golden:
    """Recorded requests of an artifact: rows, the probabilities they must have, their newest moment
    (ISO 8601); empty if it has none."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    probabilities: list[float] = field(default_factory=list)
    timestamp: str | None = None


def golden(folder: Path) -> Golden:
    """What an artifact recorded in ``golden.json``."""
    path = folder / "golden.json"
    if not path.exists():
        return Golden()
    found = json.loads(path.read_text(encoding="utf-8"))
    return Golden(found["rows"], found["probabilities"], found.get("timestamp"))


def example_row(spec: FeatureSpec) -> dict[str, Any]:
    """A row of the spec's columns that is valid, if dull."""
    return {c.name: _example(c) for c in spec.columns if c.ratio is None}


def example_rank(
    spec: FeatureSpec, rows: Sequence[Mapping[str, Any]], timestamp: str | None = None
) -> dict[str, Any]:
    """A request to ``/rank`` for the user, the items and the context of given rows."""
    user, item = spec.entities.user, spec.entities.item
    context = [c.name for c in spec.raw_columns("context")]
    moment = {"timestamp": timestamp} if timestamp else {}
    return moment | {
        "user": rows[0].get(user) or "1",
        "context": {name: rows[0].get(name) for name in context},
        "candidates": list(dict.fromkeys(row.get(item) or "1" for row in rows)),
    }


def example_recommend(
    spec: FeatureSpec, rows: Sequence[Mapping[str, Any]], timestamp: str | None = None
) -> dict[str, Any]:
    """A request to ``/recommend`` for the user and the context of given rows."""
    ranked = example_rank(spec, rows, timestamp)
    attribute = next(
        (c for c in filters(spec) if c.kind == "categorical" and rows[0][c.name]), None
    )
    where = {"where": {attribute.name: [rows[0][attribute.name]]}} if attribute else {}
    return {n: v for n, v in ranked.items() if n != "candidates"} | {"k": 5} | where


def filters(spec: FeatureSpec) -> tuple[Column, ...]:
    """The attributes of items that ``where`` may name."""
    return tuple(c for c in spec.held("items") if c.kind in {"categorical", "multi"})


def openapi(spec: FeatureSpec, version: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a service with this spec.

    Args:
        rows: examples of what ``/predict`` takes, at least one.
    """
    requests = _described_requests(spec)
    models: list[type[BaseModel]] = [
        *requests.values(),
        *(RankAnswer, RecommendAnswer, PredictAnswer, ModelAnswer, ErrorAnswer),
    ]
    _, schemas = models_json_schema(
        # As for validation: what has a default may be absent, in answers too.
        [(model, "validation") for model in models],
        ref_template="#/components/schemas/{model}",
    )
    predict = _operation(
        "Probabilities of rows of raw features", PredictAnswer, requests["predict"],
        {"rows": list(rows[:1])},
    )  # fmt: skip
    rank = _operation(
        "Rank candidates for a user; features are looked up", RankAnswer, requests["rank"],
        example_rank(spec, rows),
    )  # fmt: skip
    recommend = _operation(
        "Recommend items of the whole catalogue; features are looked up", RecommendAnswer,
        requests["recommend"], example_recommend(spec, rows),
    )  # fmt: skip
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Fathom",
            "version": version,
            "description": "A Wide & Deep ranker; fields follow from the spec inside its artifact.",
        },
        "paths": {
            "/rank": {"post": rank},
            "/recommend": {"post": recommend},
            "/predict": {"post": predict},
            "/model": {"get": _operation("What is being served", ModelAnswer)},
            **{
                path: {"get": {"summary": summary, "responses": {"200": {"description": "Yes"}}}}
                for path, summary in {
                    "/livez": "Whether the process lives",
                    "/readyz": "Whether it can serve",
                    "/healthz": "As /livez",
                    "/metrics": "Prometheus metrics",
                }.items()
            },
        },
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],  # a key only where the service asks for one
    }


def _described_requests(spec: FeatureSpec) -> dict[str, type[BaseModel]]:
    """The requests with their rows and context spelt out; only to describe, not to check."""
    closed = ConfigDict(extra="forbid")
    fields: dict[str, Any] = {c.name: (_type(c), ...) for c in spec.columns if c.ratio is None}
    row = create_model("Row", __config__=closed, **fields)
    names = [(c, _type(c)) for c in spec.raw_columns("context")]
    context: dict[str, Any] = {c.name: (kind | None, None) for c, kind in names}
    shared = create_model("Context", __config__=closed, **context)
    # Of a recommendation no item has a context of its own, so the shared one is whole.
    whole: dict[str, Any] = {c.name: (kind, ...) for c, kind in names}
    complete = create_model("WholeContext", __config__=closed, **whole)
    candidate = create_model("Candidate", __base__=Candidate, context=(shared, shared()))
    rows: Any = list[row]  # type: ignore[valid-type]
    candidates: Any = list[str | candidate]  # type: ignore[valid-type]
    listed = Annotated[list[str], Field(max_length=MAX_LISTED)]
    attributes: dict[str, Any] = {
        c.name: (listed, Field(default_factory=list)) for c in filters(spec)
    }
    where = create_model("Where", __config__=closed, **attributes)
    return {
        "recommend": create_model(
            "RecommendRequest",
            __base__=RecommendRequest,
            context=(complete, ... if names else complete()),
            where=(where, Field(default_factory=where)),
        ),
        "predict": create_model(
            "PredictRequest",
            __base__=PredictRequest,
            rows=(rows, Field(min_length=1, max_length=MAX_ROWS)),
        ),
        "rank": create_model(
            "RankRequest",
            __base__=RankRequest,
            context=(shared, shared()),
            candidates=(candidates, Field(min_length=1, max_length=MAX_CANDIDATES)),
        ),
    }


def _operation(
    summary: str,
    answer: type[BaseModel],
    request: type[BaseModel] | None = None,
    example: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    def content(model: type[BaseModel], **more: Any) -> dict[str, Any]:
        schema = {"$ref": f"#/components/schemas/{model.__name__}"}
        return {"content": {"application/json": {"schema": schema, **more}}}

    described = {"description": "Answered", **content(answer)}
    reasons = {
        "401": "No valid API key, where one is asked for",
        "429": "Too many requests at once; see Retry-After",
        "500": "A fault of the service; its log has the request id",
        "504": "Not answered in time",
    }
    operation: dict[str, Any] = {"summary": summary}
    if request is not None:
        operation["requestBody"] = {"required": True, **content(request, example=example)}
        reasons |= {
            "400": "Bad input; all faults are listed",
            "408": "The body did not come in time",
            "413": f"The body is above {MAX_BODY_BYTES:,} bytes",
            "503": "Not available yet; see Retry-After",
        }
    errors = {code: {"description": why, **content(ErrorAnswer)} for code, why in reasons.items()}
    return operation | {"responses": {"200": described, **errors}}


def _type(column: Column) -> Any:
    if column.kind in {"multi", "sequence"}:
        return Annotated[list[str], Field(max_length=MAX_VALUES)] | None
    if column.is_numeric:
        return Annotated[float, Field(ge=-MAX_NUMBER, le=MAX_NUMBER)] | None
    return (Literal[column.values] if column.values else str) | None


def _example(column: Column) -> Any:
    if column.kind in {"multi", "sequence"}:
        return []
    return 1.0 if column.is_numeric else (column.values or ("1",))[0]
