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
import os
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import bentoml
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fathom import api, docs_page, service_log, try_page
from fathom.access import Access
from fathom.admission import BusyError, LateError
from fathom.artifact import verify
from fathom.lane import Ask, Method, as_json
from fathom.metrics import exposition, metrics
from fathom.ranking import Ranking
from fathom.rollout import Serving
from fathom.service_log import about, log
from fathom.serving import ServingConfig

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
#: BentoML's own paths, which are asked all the time.
PROBES = ("/livez", "/healthz", "/readyz", "/metrics")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")


# -- HTTP ----------------------------------------------------------------------------------------


def _endpoint(
    method: Method, stamped: bool = True, guarded: bool = True, by_user: bool = False
) -> Callable[[Request], Awaitable[Response]]:
    """Read a bounded body, have it answered on another thread, in JSON, whatever happens."""

    async def handle(request: Request) -> Response:
        state: Serving = request.app.state.serving
        given = request.headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        stamp = {"version": state.version, "request_id": request_id}
        version, status, request.state.stages = state.version, 200, {}
        headers = {"X-Request-ID": request_id}
        deadline = time.monotonic() + state.config.deadline_seconds
        try:
            if guarded and state.keys is not None:
                request.state.client = state.keys.client(request.headers)
                if request.state.client is None:
                    metrics().refused_keys.inc()
                    raise api.unauthorized()
            with state.queue.place():
                body = await _in_time(_read(request), deadline)
                read, stages = time.perf_counter(), request.state.stages
                ask = Ask(method, body, request_id, read, stages, stamped, by_user)
                found = await state.answer(ask, deadline)
                version, content = found.version, found.content
        except BusyError as error:
            metrics().turned_away.inc()
            status, content = 429, as_json(stamp | {"error": str(error)})
            headers["Retry-After"] = str(error.retry_seconds)
        except LateError as error:
            metrics().late.inc()
            status, content = 504, as_json(stamp | {"error": str(error)})
        except api.RefusedError as error:
            status, content = error.status, as_json(stamp | error.answer)
            headers |= error.headers
            # It and the future that it came by hold each other, and through the trace the request
            # and all that was made of it, until the garbage collector comes.
            error.__traceback__ = None
        except ClientDisconnect:
            status, content = 400, as_json(stamp | {"error": "the client left"})
        except Exception:
            log.exception("request %s failed", request_id, extra=about(request_id))
            reason = "a fault of the service; its log says more under this request_id"
            status, content = 500, as_json(stamp | {"error": reason})
        headers["X-Fathom-Version"] = version
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
        Route("/rank", _endpoint(Ranking.rank, by_user=True), methods=["POST"]),
        Route("/recommend", _endpoint(Ranking.recommend, by_user=True), methods=["POST"]),
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
