"""The ranking service: a ranker's artifact behind HTTP.

``/rank``, ``/recommend``, ``/predict``, ``/model`` and the OpenAPI document are a small ASGI
application inside a BentoML service, which adds health checks, metrics, a time-out and a limit of
requests at once.
`fathom.api` says what requests may hold. Bodies are bounded before they are parsed, and whatever
takes longer than reading one runs on a thread of its own, so that health checks always answer.

Environment
    ``FATHOM_FEATURE_STORE``  where ``/rank`` and ``/recommend`` find features: JSON of
                              `FeatureStoreConfig` and its ``root``. It is opened in the
                              background, because Feast alone takes ten seconds to import; until
                              then both answer 503.
    ``FATHOM_SERVING``        JSON of `fathom.serving.ServingConfig`.
    ``FATHOM_FEATURE_LOG``    folder for what the model sees, whatever ``FATHOM_SERVING`` says.
    ``FATHOM_RANKER``         folder of an artifact, for a service that is not in a Bento.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bentoml
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fathom import api
from fathom.batch import Ragged
from fathom.metrics import metrics
from fathom.serving import OnlineStore, ServingConfig
from fathom.spec import Column, FeatureSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fathom.encoding import Values
    from fathom.feature_log import FeatureLog
    from fathom.online import Known
    from fathom.recommending import Pool
    from fathom.retrieval import Slots

#: Alias of the one model that a Bento carries, whose version the Bento pins.
ALIAS = "ranker"
RANKER, FEATURE_STORE = "FATHOM_RANKER", "FATHOM_FEATURE_STORE"
SERVING, FEATURE_LOG = "FATHOM_SERVING", "FATHOM_FEATURE_LOG"
_NO_TOWER = (
    "its spec has no deep column of user or of item, nothing was positive, or retrieval.factors "
    "was 0; /rank takes candidates"
)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")

# A child of BentoML's logger, which is the one that its server formats and prints.
log = logging.getLogger("bentoml.fathom")
Answer = dict[str, Any]


class Ranking:
    """One ranker and what it answers. Its methods run on its one scoring thread."""

    def __init__(
        self, folder: Path, feature_store: str | None, config: ServingConfig | None = None
    ) -> None:
        from fathom.ranker import Ranker, verify
        from fathom.recommending import Recommender

        config = config or ServingConfig()
        self.version = verify(folder)
        self.ranker = Ranker.load(folder)
        self.recommender = Recommender(self.ranker, config.retrieval) if self.ranker.tower else None
        self.store = OnlineStore(feature_store, self.ranker.spec, config)
        self.log = self._feature_log(config)
        self.thread = ThreadPoolExecutor(1, "scoring")
        self._examples = api.recorded_rows(folder) or [api.example_row(self.ranker.spec)]
        log.info("ranker %s loaded from %s", self.version, folder)

    def close(self) -> None:
        """Give up what is waiting, and end the background work."""
        self.store.close()
        self.thread.shutdown(wait=False, cancel_futures=True)
        if self.log is not None:
            self.log.close()

    def _feature_log(self, config: ServingConfig) -> FeatureLog | None:
        if config.feature_log is None:
            return None
        from fathom.feature_log import FeatureLog

        return FeatureLog(
            Path(config.feature_log),
            self.ranker.spec,
            self.version,
            most_bytes=config.feature_log_mb << 20,
            segment_rows=config.segment_rows,
            segment_seconds=config.segment_seconds,
            dropped=lambda rows: metrics().unlogged_rows.inc(rows),
        )

    def predict(self, body: bytes, _: str) -> Answer:
        """Score rows of raw features."""
        rows = api.parse(api.PredictRequest, body).rows
        frame = _frame(rows, self.ranker.spec, "rows[{}]")
        _bound_crosses(frame, self.ranker.spec)
        return {"probabilities": self.ranker.score(frame).tolist()}

    def rank(self, body: bytes, request_id: str) -> Answer:
        """Look up the features of candidates, score and sort them."""
        spec = self.ranker.spec
        request = api.parse(api.RankRequest, body)
        faults: list[dict[str, str]] = []
        moment = api.moment_of(request.timestamp, faults)
        candidates = _candidates(request, spec, faults)
        if faults:
            raise api.refused(faults)
        features = self.store.require()
        frame, known = features.frame(request.user, request.context, candidates, moment)
        _bound_crosses(frame, spec)
        probabilities = self.ranker.score(frame)
        order = np.argsort(-probabilities, kind="stable").tolist()
        scores = probabilities.tolist()
        key = spec.entities.item
        items: list[Answer] = [
            {"item": candidates[i][key], "probability": scores[i]} for i in order
        ]
        if request.explain:
            parts = self.ranker.explain(frame)
            for item, i in zip(items, order, strict=True):
                item["explanation"] = _explanation({n: float(p[i]) for n, p in parts.items()})
        if self.log is not None:
            from fathom.feature_log import Served

            keys = [candidate[key] for candidate in candidates]
            self.log.put(
                Served(request_id, request.user, keys, moment, frame, known, probabilities)
            )
        _count(known)
        return {
            "user_known": known.user,
            "unknown_items": int((~known.items).sum()),
            "degraded": known.degraded,
            "expired": known.expired,
            "items": items,
        }

    def recommend(self, body: bytes, request_id: str) -> Answer:
        """Retrieve from the whole catalogue, rank that, and fill the slots."""
        spec, recommender = self.ranker.spec, self.recommender
        request = api.parse(api.RecommendRequest, body)
        if recommender is None:
            raise api.RefusedError(503, "this ranker has no tower to retrieve with; " + _NO_TOWER)
        faults: list[dict[str, str]] = []
        moment = api.moment_of(request.timestamp, faults)
        _check_shared(request.context, spec, faults)
        features = self.store.require()
        faults += recommender.faults(request, features)
        if faults:
            raise api.refused(faults)
        read = features.read(request.user)
        pool = recommender.retrieve(request, features, read)
        candidates = [{spec.entities.item: item} for item in pool.items]
        frame, known = features.frame(request.user, request.context, candidates, moment, read)
        _bound_crosses(frame, spec)
        probabilities = self.ranker.score(frame)
        slots = recommender.fill(request, request_id, pool, probabilities)
        items = _slots(pool, slots, probabilities)
        if request.explain:
            shown = {name: values.take(slots.places) for name, values in frame.items()}
            parts = self.ranker.explain(shown)
            for i, item in enumerate(items):
                item["explanation"] = _explanation({n: float(p[i]) for n, p in parts.items()})
        if self.log is not None:
            from fathom.feature_log import Served

            keys, user, shares = pool.items, request.user, slots.propensity
            served = Served(request_id, user, keys, moment, frame, known, probabilities)
            self.log.put(replace(served, slots=slots.by_place, propensities=shares))
        _count(known)
        metrics().popular_recommendations.inc(int(pool.popular))
        metrics().explored_items.inc(int(slots.explored.sum()))
        return {
            "user_known": known.user,
            "popular": pool.popular,
            "degraded": known.degraded,
            "expired": known.expired,
            "ranked": len(pool.items),
            "items": items,
        }

    def model(self, _: bytes, __: str) -> Answer:
        """Say what is being served."""
        spec = self.ranker.spec
        return {
            "spec_hash": spec.hash,
            "task": spec.task,
            "entities": spec.entities.model_dump(),
            "columns": [_described(column, spec) for column in spec.columns],
            "crosses": [cross.name for cross in spec.crosses],
            "training": self.ranker.config.as_dict(),
            "provenance": self.ranker.provenance,
            **self.store.described(),
            "retrieval": self.recommender.described if self.recommender else None,
            "limits": {
                "body_bytes": api.MAX_BODY_BYTES,
                "candidates": api.MAX_CANDIDATES,
                "listed": api.MAX_LISTED,
                "recommended": api.MAX_RECOMMENDED,
                "rows": api.MAX_ROWS,
                "values": api.MAX_VALUES,
            },
        }

    def openapi(self, _: bytes, __: str) -> Answer:
        """The OpenAPI document."""
        return api.openapi(self.ranker.spec, self.version, self._examples)


# -- HTTP ----------------------------------------------------------------------------------------


def _endpoint(
    method: Callable[[Ranking, bytes, str], Answer], stamped: bool = True
) -> Callable[[Request], Awaitable[Response]]:
    """Read a bounded body, answer on the scoring thread, in JSON, whatever happens."""

    async def handle(request: Request) -> Response:
        ranking: Ranking = request.app.state.ranking
        given = request.headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        stamp = {"version": ranking.version, "request_id": request_id}
        headers = {"X-Fathom-Version": ranking.version, "X-Request-ID": request_id}

        def answer(body: bytes) -> bytes:
            return _json((stamp if stamped else {}) | method(ranking, body, request_id))

        status = 200
        try:
            body = await _read(request)
            content = await asyncio.get_running_loop().run_in_executor(ranking.thread, answer, body)
        except api.RefusedError as error:
            status, content = error.status, _json(stamp | error.answer)
            headers |= error.headers
        except ClientDisconnect:
            status, content = 400, _json(stamp | {"error": "the client left"})
        except Exception:
            log.exception("request %s failed", request_id)
            reason = "a fault of the service; its log says more under this request_id"
            status, content = 500, _json(stamp | {"error": reason})
        return Response(content, status, headers, "application/json")

    return handle


async def _read(request: Request) -> bytes:
    """The body, but never more than the bound of it: by what it declares, and by what comes."""
    declared = request.headers.get("content-length", "0")
    body = bytearray()
    if declared.isdigit() and int(declared) <= api.MAX_BODY_BYTES:
        async for chunk in request.stream():
            body += chunk
            if len(body) > api.MAX_BODY_BYTES:
                break
        else:
            return bytes(body)
    raise api.RefusedError(
        413,
        f"the body has {declared if not body else 'more than ' + str(api.MAX_BODY_BYTES)} bytes; "
        f"at most {api.MAX_BODY_BYTES} are allowed, so split the request",
        # The rest of the body is not read, so the connection cannot be used again.
        headers={"Connection": "close"},
    )


async def _refuse(_: Request, error: Exception) -> Response:
    """What the router refuses (a wrong method), in JSON too."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


app = Starlette(
    routes=[
        Route("/rank", _endpoint(Ranking.rank), methods=["POST"]),
        Route("/recommend", _endpoint(Ranking.recommend), methods=["POST"]),
        Route("/predict", _endpoint(Ranking.predict), methods=["POST"]),
        Route("/model", _endpoint(Ranking.model), methods=["GET"]),
        # In place of BentoML's own, which would not know of these routes.
        Route("/docs.json", _endpoint(Ranking.openapi, stamped=False), methods=["GET"]),
    ],
    exception_handlers={HTTPException: _refuse},
)


@bentoml.service(
    name="fathom",
    workers=1,
    traffic={"timeout": 30, "max_concurrency": 64},
    logging={"access": {"enabled": False}},
)
@bentoml.asgi_app(app)
class RankingService:
    """BentoML's side: where the ranker is, and when the service is ready."""

    def __init__(self) -> None:
        config = serving_config(os.environ)
        self.ranking = Ranking(ranker_folder(), os.environ.get(FEATURE_STORE), config)
        app.state.ranking = self.ranking

    @bentoml.on_deployment  # type: ignore[untyped-decorator]
    @staticmethod
    def verify() -> None:
        """Refuse to start with a damaged artifact, before a worker is started again and again."""
        from fathom.ranker import verify

        verify(ranker_folder())

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        """Stop background work; what the feature log holds is written."""
        self.ranking.close()

    def __is_ready__(self) -> bool:
        """Ready when ``/predict`` works and the feature store, if any, has been tried once."""
        return self.ranking.store.state != "opening"


def serving_config(environment: Mapping[str, str]) -> ServingConfig:
    """The settings that the environment gives.

    Raises:
        ValidationError: pydantic's; names every setting that is out of bounds.
    """
    config = ServingConfig.model_validate_json(environment.get(SERVING, "{}"))
    folder = environment.get(FEATURE_LOG)
    return config.model_copy(update={"feature_log": folder}) if folder else config


def ranker_folder() -> Path:
    """The artifact to serve: the one that the Bento pins, or else ``FATHOM_RANKER``.

    Raises:
        RuntimeError: there is neither.
    """
    service: Any = RankingService  # which the decorator has made of the class
    if service.bento is not None:
        return Path(bentoml.models.get(ALIAS).path)
    if RANKER not in os.environ:
        raise RuntimeError(
            f"no ranker to serve: serve a Bento (make serve), or set {RANKER} to an artifact's "
            "folder"
        )
    return Path(os.environ[RANKER])


# -- parts of requests and answers ---------------------------------------------------------------


def _candidates(
    request: api.RankRequest, spec: FeatureSpec, faults: list[dict[str, str]]
) -> list[dict[str, Any]]:
    """Each candidate's item key and own context, after checking all context against the spec."""
    columns = {column.name: column for column in spec.raw_columns("context")}
    shared = request.context
    both = [(c, {}) if isinstance(c, str) else (c.item, c.context) for c in request.candidates]
    places = {"context": shared}
    places |= {f"candidates[{i}].context": own for i, (_, own) in enumerate(both) if own}
    for place, own in places.items():
        fault = f"is no context column; remove it (there are {list(columns)})"
        faults += [{"field": f"{place}.{n}", "fault": fault} for n in own if n not in columns]
    # A column may be left out of the shared context if each candidate has its own value of it.
    own_names = {name for _, own in both for name in own}
    given = [c for c in columns.values() if c.name in shared or not own_names]
    _check(given, [shared], spec, "context", faults)
    if own_names and not faults:
        left = [c for c in columns.values() if c.name in own_names or c.name not in shared]
        _check(left, [shared | own for _, own in both], spec, "candidates[{}].context", faults)
    return [{spec.entities.item: item, **own} for item, own in both]


def _check_shared(context: dict[str, Any], spec: FeatureSpec, faults: list[dict[str, str]]) -> None:
    """Check the context that all of a recommendation's items share."""
    request = api.RankRequest.model_construct(candidates=[], context=context)
    _candidates(request, spec, faults)


def _check(
    columns: Sequence[Column],
    rows: Sequence[Mapping[str, Any]],
    spec: FeatureSpec,
    place: str,
    faults: list[dict[str, str]],
) -> None:
    """Check some columns' values as those of whole rows are checked."""
    part = spec.model_copy(update={"columns": tuple(columns)})
    chosen = [{c.name: row[c.name] for c in columns if c.name in row} for row in rows]
    try:
        _frame(chosen, part, place)
    except api.RefusedError as error:
        faults += error.faults


def _frame(rows: Sequence[Mapping[str, Any]], spec: FeatureSpec, place: str) -> dict[str, Values]:
    """Rows to a frame. ``place`` is where a row stands in the request, ``{}`` for its number."""
    from fathom.ranker import RowError, frame_of_rows

    faults = api.list_faults(rows, spec.columns, place)
    try:
        if not faults:
            return frame_of_rows(rows, spec)
    except RowError as error:
        faults = [
            {"field": f"{place.format(f['row'])}.{f['field']}", "fault": f["fault"]}
            for f in error.faults
        ]
    raise api.refused(faults)


def _bound_crosses(frame: Mapping[str, Values], spec: FeatureSpec) -> None:
    """Refuse what would make too many combinations in a cross of several lists."""
    for cross in spec.crosses:
        lists = {name: part for name in cross.columns if isinstance(part := frame[name], Ragged)}
        if len(lists) > 1:
            made = int(np.prod([part.lengths for part in lists.values()], axis=0).sum())
            if made > api.MAX_COMBINATIONS:
                fault = (
                    f"make {made:,} combinations; at most {api.MAX_COMBINATIONS:,} are allowed, "
                    "so shorten the lists or split the request"
                )
                raise api.refused([{"field": " and ".join(lists), "fault": fault}])


def _slots(pool: Pool, slots: Slots, probabilities: NDArray[np.float64]) -> list[Answer]:
    """The items of a recommendation, by slot."""
    source = "popular" if pool.popular else "retrieved"
    return [
        {
            "item": pool.items[place],
            "probability": float(probabilities[place]),
            "source": "explored" if explored else source,
            "propensity": float(slots.propensity[place]),
        }
        for place, explored in zip(slots.places, slots.explored, strict=True)
    ]


def _explanation(parts: dict[str, float]) -> Answer:
    logit, bias, deep = sum(parts.values()), parts.pop("bias"), parts.pop("deep")
    return {"logit": logit, "bias": bias, "deep": deep, "wide": parts}


def _described(column: Column, spec: FeatureSpec) -> Answer:
    return {
        "name": column.name,
        "kind": column.kind,
        "owner": spec.owner(column.name),
        "source": "aggregate" if column.aggregate else "ratio" if column.ratio else "raw",
        "values": list(column.values) if column.values else None,
        "description": column.description,
    }


def _json(answer: Answer) -> bytes:
    return json.dumps(answer, allow_nan=False, separators=(",", ":")).encode()


def _count(known: Known) -> None:
    counters = metrics()
    counters.ranked_items.inc(len(known.items))
    counters.unknown_items.inc(int((~known.items).sum()))
    counters.unknown_users.inc(int(not known.user))
    counters.degraded_requests.inc(int(known.degraded))
    counters.expired_rows.inc(known.expired)
