"""The ranking service: a ranker's artifact behind HTTP.

``/rank``, ``/recommend``, ``/predict``, ``/model`` and the OpenAPI document are a small ASGI
application inside a BentoML service, which adds health checks, a time-out and the server.
`fathom.api` says what requests may hold. Bodies are bounded before they are parsed, and whatever
takes longer than reading one runs on a thread of its own, so that health checks always answer.

Environment
    ``FATHOM_FEATURE_STORE``  where ``/rank`` and ``/recommend`` find features: JSON of
                              `FeatureStoreConfig` and its ``root``. It is opened in the
                              background, since that takes seconds; until then both answer 503.
    ``FATHOM_SERVING``        JSON of `fathom.serving.ServingConfig`.
    ``FATHOM_FEATURE_LOG``    folder for what the model sees, whatever ``FATHOM_SERVING`` says.
    ``FATHOM_RANKER``         folder of an artifact, for a service that is not in a Bento.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import bentoml
import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fathom import api, docs_page, service_log, try_page
from fathom.access import Access
from fathom.admission import BusyError, LateError, Queue
from fathom.artifact import verify
from fathom.batch import Ragged
from fathom.keys import Keys
from fathom.lookup import spread_frame
from fathom.metrics import OWN_STAGES, exposition, metrics
from fathom.service_log import about, log
from fathom.serving import OnlineStore, ServingConfig
from fathom.spec import Column, FeatureSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fathom.encoding import Values
    from fathom.feature_log import FeatureLog
    from fathom.following import Follower
    from fathom.online import Known
    from fathom.ranker import Ranker
    from fathom.recommending import Pool
    from fathom.retrieval import Slots

#: Alias of the one model that a Bento carries, whose version the Bento pins.
ALIAS = "ranker"
RANKER, FEATURE_STORE = "FATHOM_RANKER", "FATHOM_FEATURE_STORE"
SERVING, FEATURE_LOG = "FATHOM_SERVING", "FATHOM_FEATURE_LOG"
#: What a container image starts from, as in ``bentofile.yaml``. For a distribution that it knows,
#: BentoML would install compilers and git; wheels need neither. The lock is there before packages
#: are, which it constrains.
IMAGE = bentoml.images.Image(
    base_image="python:3.11-slim-bookworm", python_version="3.11", distro="none"
).build_include("requirements.lock")
_NO_TOWER = (
    "its spec has no deep column of user or of item, nothing was positive, or retrieval.factors "
    "was 0; /rank takes candidates"
)
#: BentoML's own paths, which are asked all the time.
PROBES = ("/livez", "/healthz", "/readyz", "/metrics")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")

Answer = dict[str, Any]


class RehearsalError(RuntimeError):
    """A ranking does not answer as it should."""


class Ranking:
    """One ranker and what it answers. Its methods run on the one scoring thread.

    Args:
        folder: the artifact.
        feature_store: see `OnlineStore`.
        before: the ranking that this one is to follow; they share a feature store if they can.

    Raises:
        ArtifactError: files of the artifact are missing or changed.
    """

    def __init__(
        self,
        folder: Path,
        feature_store: str | None,
        config: ServingConfig | None = None,
        before: Ranking | None = None,
    ) -> None:
        from fathom.fast import FastScorer
        from fathom.ranker import Ranker
        from fathom.recommending import Recommender

        config = config or ServingConfig()
        self.version = verify(folder)
        self.ranker = Ranker.load(folder)
        self.scorer = FastScorer(self.ranker, precision=config.precision)
        self.recommender = Recommender(self.ranker, config.retrieval) if self.ranker.tower else None
        self.store: OnlineStore = (
            before.store
            if before is not None and before.ranker.spec.hash == self.ranker.spec.hash
            else OnlineStore(feature_store, self.ranker.spec, config, self._load_attribution)
        )
        self.log = self._feature_log(config)
        self._golden = api.golden(folder)
        self._examples = self._golden.rows[:5] or [api.example_row(self.ranker.spec)]
        log.info("ranker %s loaded from %s", self.version, folder)

    def close(self, after: Ranking | None = None) -> None:
        """End the background work, but for what the ranking after it shares."""
        if after is None or after.store is not self.store:
            self.store.close()
        if self.log is not None:
            self.log.close()

    def rehearse(self, seconds: float = 60.0) -> None:
        """Answer the recorded requests, and wait for the feature store.

        Raises:
            RehearsalError: a probability is not the recorded one, or the feature store cannot be
                opened.
        """
        from fathom.ranker import TOLERANCE, frame_of_rows

        rows, recorded = self._golden.rows, np.array(self._golden.probabilities)
        if rows:
            frame = spread_frame(frame_of_rows(rows, self.ranker.spec), len(rows))
            reference, fast = self.ranker.score(frame), self.scorer.score(frame, len(rows))
            for found, bound in ((reference, TOLERANCE), (fast, self.scorer.tolerance)):
                wrong = int((~(np.abs(found - recorded) <= bound)).sum())  # NaN is wrong, too
                if wrong:
                    raise RehearsalError(
                        f"{wrong} of {len(rows)} golden probabilities of {self.version} differ by "
                        f"more than {bound:g}; register the version again"
                    )
        until = time.monotonic() + seconds
        while self.store.state == "opening" and time.monotonic() < until:
            time.sleep(0.05)
        if self.store.state in {"opening", "failed"}:
            raise RehearsalError(
                f"the feature store of {self.version} is {self.store.state}; run the "
                "feature_store pipeline with its spec"
            )

    def _load_attribution(self) -> None:
        """Import what ``/rank`` may be asked for; on the scoring thread it would hold all up."""
        if self.ranker.model.deep is not None:
            from fathom import attribution

            attribution.load()

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
        _bound_crosses(frame, self.ranker.spec, len(rows))
        return {"probabilities": self.ranker.score(frame).tolist()}

    def rank(self, body: bytes, request_id: str) -> Answer:
        """Look up the features of candidates, score and sort them."""
        spec, stage = self.ranker.spec, metrics().stage
        with stage("parse"):
            request = api.parse(api.RankRequest, body)
            faults: list[dict[str, str]] = []
            moment = api.moment_of(request.timestamp, faults)
            candidates = _candidates(request, spec, faults)
            if request.attribute:
                faults += _attribution_faults(len(candidates), self.ranker)
            if faults:
                raise api.refused(faults)
        count = len(candidates)
        with stage("features"):
            features = self.store.require()
            columns, known = features.compact(request.user, request.context, candidates, moment)
            _bound_crosses(columns, spec, count)
            if request.explain:
                _bound_terms(spread_frame(columns, count), self.ranker)
        with stage("score"):
            probabilities = self.scorer.score(columns, count)
        order = np.argsort(-probabilities, kind="stable").tolist()
        scores = probabilities.tolist()
        key = spec.entities.item
        items: list[Answer] = [
            {"item": candidates[i][key], "probability": scores[i]} for i in order
        ]
        if request.explain or request.attribute:
            with stage("explain"):
                found = _accounts(
                    self.ranker, spread_frame(columns, count), request.explain, request.attribute
                )
            for item, i in zip(items, order, strict=True):
                item |= found[i]
        if self.log is not None:
            from fathom.feature_log import Served

            keys = [candidate[key] for candidate in candidates]
            frame = spread_frame(columns, count)
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
        count = len(candidates)
        columns, known = features.compact(request.user, request.context, candidates, moment, read)
        _bound_crosses(columns, spec, count)
        probabilities = self.scorer.score(columns, count)
        slots = recommender.fill(request, request_id, pool, probabilities)
        items = _slots(pool, slots, probabilities)
        if request.explain:
            frame = spread_frame(columns, count)
            shown = {name: values.take(slots.places) for name, values in frame.items()}
            _bound_terms(shown, self.ranker)
            for item, found in zip(items, _accounts(self.ranker, shown, True, False), strict=True):
                item |= found
        if self.log is not None:
            from fathom.feature_log import Served

            keys, user, shares = pool.items, request.user, slots.propensity
            frame = spread_frame(columns, count)
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
                "attributed": api.MAX_ATTRIBUTED,
                "terms": api.MAX_TERMS,
                "listed": api.MAX_LISTED,
                "recommended": api.MAX_RECOMMENDED,
                "rows": api.MAX_ROWS,
                "values": api.MAX_VALUES,
            },
        }

    @property
    def context_columns(self) -> str:
        """The columns that come with a request, as JSON for `fathom.try_page`."""
        spec = self.ranker.spec
        return json.dumps([_described(column, spec) for column in spec.raw_columns("context")])

    def openapi(self, _: bytes, __: str) -> Answer:
        """The OpenAPI document."""
        return api.openapi(self.ranker.spec, self.version, self._examples)


class Serving:
    """What all requests share: who serves, the queue, and who may ask.

    Args:
        folder: the artifact that serves first.
        feature_store: see `OnlineStore`.

    Raises:
        ArtifactError: files of the artifact are missing or changed.
        KeysError: the file of keys cannot be used.
    """

    def __init__(self, folder: Path, feature_store: str | None, config: ServingConfig) -> None:
        self.config, self._feature_store = config, feature_store
        self.keys = Keys(Path(config.api_keys)) if config.api_keys else None
        #: In charge. Requests take it once, so that each answer is of one version.
        self.ranking = Ranking(folder, feature_store, config)
        _show(self.ranking.version)
        self.queue = Queue(config.queue_seconds)
        self._follower = self._follow(config.registry) if config.registry else None

    def _follow(self, registry: str) -> Follower:
        from fathom.following import Follower

        seconds = self.config.follow_seconds
        return Follower(Path(registry), seconds, lambda: self.ranking.version, self.succeed)

    def succeed(self, folder: Path) -> None:
        """Put another artifact in charge, once it has shown that it can be.

        Raises:
            ArtifactError: files of the artifact are missing or changed.
            RehearsalError: it does not answer as it should. The one before goes on.
        """
        before = self.ranking
        after = Ranking(folder, self._feature_store, self.config, before)
        try:
            after.rehearse()
        except BaseException:
            after.close(before)
            raise
        self.ranking = after
        _show(after.version, before.version)
        # Requests that have begun end with the one before.
        late = threading.Timer(self.config.deadline_seconds, before.close, [after])
        late.daemon = True
        late.start()

    def close(self) -> None:
        """Give up what is waiting, and end the background work."""
        if self._follower is not None:
            self._follower.close()
        self.queue.close()
        self.ranking.close()


def _show(version: str, before: str | None = None) -> None:
    """Say in the metrics and the log who serves."""
    service_log.JsonFormatter.version = version
    if before is not None:
        metrics().models.labels(version=before).set(0)
    metrics().models.labels(version=version).set(1)


# -- HTTP ----------------------------------------------------------------------------------------


def _endpoint(
    method: Callable[[Ranking, bytes, str], Answer], stamped: bool = True, guarded: bool = True
) -> Callable[[Request], Awaitable[Response]]:
    """Read a bounded body, answer on the scoring thread, in JSON, whatever happens."""

    async def handle(request: Request) -> Response:
        state: Serving = request.app.state.serving
        ranking = state.ranking  # of the whole answer, whatever comes after it
        given = request.headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        stamp = {"version": ranking.version, "request_id": request_id}
        headers = {"X-Fathom-Version": ranking.version, "X-Request-ID": request_id}

        def answer(body: bytes) -> bytes:
            OWN_STAGES.set(request.state.stages)
            metrics().took("wait", time.perf_counter() - read)
            found = (stamp if stamped else {}) | method(ranking, body, request_id)
            with metrics().stage("write"):
                return _json(found)

        status, request.state.stages = 200, {}
        deadline = time.monotonic() + state.config.deadline_seconds
        try:
            if guarded and state.keys is not None:
                request.state.client = state.keys.client(request.headers)
                if request.state.client is None:
                    metrics().refused_keys.inc()
                    raise api.unauthorized()
            with state.queue.place():
                body = await _in_time(_read(request), deadline)
                read = time.perf_counter()
                content = await state.queue.run(lambda: answer(body), deadline)
        except BusyError as error:
            metrics().turned_away.inc()
            status, content = 429, _json(stamp | {"error": str(error)})
            headers["Retry-After"] = str(error.retry_seconds)
        except LateError as error:
            metrics().late.inc()
            status, content = 504, _json(stamp | {"error": str(error)})
        except api.RefusedError as error:
            status, content = error.status, _json(stamp | error.answer)
            headers |= error.headers
            # It and the future that it came by hold each other, and through the trace the request
            # and all that was made of it, until the garbage collector comes.
            error.__traceback__ = None
        except ClientDisconnect:
            status, content = 400, _json(stamp | {"error": "the client left"})
        except Exception:
            log.exception("request %s failed", request_id, extra=about(request_id))
            reason = "a fault of the service; its log says more under this request_id"
            status, content = 500, _json(stamp | {"error": reason})
        return Response(content, status, headers, "application/json")

    return handle


async def _in_time(reading: Awaitable[bytes], deadline: float) -> bytes:
    """A body that comes before the deadline."""
    try:
        return await asyncio.wait_for(reading, deadline - time.monotonic())
    except TimeoutError:
        raise api.RefusedError(
            408, "the body did not come in time", headers={"Connection": "close"}
        ) from None


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


async def _metrics(_: Request) -> Response:
    content, media_type = exposition()
    return Response(content, media_type=media_type)


app = Starlette(
    routes=[
        Route("/rank", _endpoint(Ranking.rank), methods=["POST"]),
        Route("/recommend", _endpoint(Ranking.recommend), methods=["POST"]),
        Route("/predict", _endpoint(Ranking.predict), methods=["POST"]),
        Route("/model", _endpoint(Ranking.model), methods=["GET"]),
        # In place of BentoML's own, which would not know of these routes.
        Route("/docs.json", _endpoint(Ranking.openapi, False, guarded=False), methods=["GET"]),
        Route("/metrics", _metrics, methods=["GET"]),
        Route("/", docs_page.show, methods=["GET"]),
        Route("/try", try_page.show, methods=["GET"]),
    ],
    exception_handlers={HTTPException: _refuse},
)


@bentoml.service(
    name="fathom",
    image=IMAGE,
    workers=1,
    traffic={"timeout": 30},
    logging={"access": {"enabled": False}},
    metrics={"enabled": False},
)
@bentoml.asgi_app(app)
class RankingService:
    """BentoML's side: where the ranker is, and when the service is ready."""

    def __init__(self) -> None:
        config = serving_config(os.environ)
        service_log.configure(config.log_format, config.log_personal)
        self.serving = Serving(ranker_folder(), os.environ.get(FEATURE_STORE), config)
        app.state.serving = self.serving

    @bentoml.on_deployment  # type: ignore[untyped-decorator]
    @staticmethod
    def verify() -> None:
        """Refuse to start with a damaged artifact, before a worker is started again and again."""
        config = serving_config(os.environ)
        service_log.configure(config.log_format, config.log_personal)
        verify(ranker_folder())

    @bentoml.on_shutdown  # type: ignore[untyped-decorator]
    def close(self) -> None:
        """Stop background work; what the feature log holds is written."""
        self.serving.close()

    def __is_ready__(self) -> bool:
        """Ready when ``/predict`` works and the feature store, if any, has been tried once."""
        return self.serving.ranking.store.state != "opening"


service: Any = RankingService  # which the decorator has made of the class
service.add_asgi_middleware(
    Access,
    routes=[*(route.path for route in app.routes if isinstance(route, Route)), *PROBES],
    quiet=PROBES,
)


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
    api.bound_unknown(places.values(), columns)
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

    api.bound_unknown(rows, spec.by_name)
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


def _bound_crosses(columns: Mapping[str, Values], spec: FeatureSpec, count: int) -> None:
    """Refuse what would make too many combinations in a cross of several lists."""
    for cross in spec.crosses:
        lists = {name: part for name in cross.columns if isinstance(part := columns[name], Ragged)}
        if len(lists) > 1:
            by_row = reduce(np.multiply, (part.lengths for part in lists.values()))
            made = int(by_row.sum()) * (count if len(by_row) == 1 else 1)
            if made > api.MAX_COMBINATIONS:
                fault = (
                    f"make {made:,} combinations; at most {api.MAX_COMBINATIONS:,} are allowed, "
                    "so shorten the lists or split the request"
                )
                raise api.refused([{"field": " and ".join(lists), "fault": fault}])


def _bound_terms(frame: Mapping[str, Values], ranker: Ranker) -> None:
    """Refuse to name more terms than one answer may have."""
    from fathom.terms import most_terms

    made = most_terms(ranker.encoder, frame) if ranker.model.wide is not None else 0
    if made > api.MAX_TERMS:
        fault = (
            f"is true, which makes up to {made:,} terms; at most {api.MAX_TERMS:,} are allowed, so "
            "rank without it, then ask again for the first candidates alone"
        )
        raise api.refused([{"field": "explain", "fault": fault}])


def _attribution_faults(candidates: int, ranker: Ranker) -> list[dict[str, str]]:
    """Why deep logits cannot be attributed, if they cannot."""
    fault = None
    if ranker.model.deep is None:
        fault = (
            f"but the model, {ranker.config.model}, has no deep part; leave it out: all of its "
            "terms are exact, and 'explain' names them"
        )
    elif candidates > api.MAX_ATTRIBUTED:
        fault = (
            f"for {candidates:,} candidates; at most {api.MAX_ATTRIBUTED:,} can be attributed at "
            "once, so rank without it, then ask again for the first candidates alone"
        )
    return [{"field": "attribute", "fault": f"is true, {fault}"}] if fault else []


def _accounts(
    ranker: Ranker, frame: Mapping[str, Values], explain: bool, attribute: bool
) -> list[Answer]:
    """What a request asks to know of how each candidate came by its logit."""
    from fathom.attribution import BASELINE

    parts = {name: part.tolist() for name, part in ranker.explain(frame).items()}
    bias, deep = parts.pop("bias"), parts.pop("deep")
    found: list[Answer] = [{} for _ in deep]
    if explain:
        for i, terms in enumerate(ranker.terms(frame)):
            wide = {name: part[i] for name, part in parts.items()}
            found[i]["explanation"] = {
                "logit": bias[i] + deep[i] + sum(wide.values()),
                "bias": bias[i],
                "deep": deep[i],
                "wide": wide,
                "terms": [vars(term) for term in terms],
            }
    if attribute:
        shares = {name: share.tolist() for name, share in ranker.attribute(frame).items()}
        baseline = shares.pop(BASELINE)
        for i, account in enumerate(found):
            given = {name: share[i] for name, share in shares.items()}
            account["attribution"] = {"deep": deep[i], "baseline": baseline[i], "shares": given}
    return found


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
