"""Every request counted, timed and logged, under the route that it asked for.

Whatever can be asked without end (paths, methods) is counted and logged under the names that the
service has for it, or as ``other``: a scan makes no time series, and a path may hold a user's key.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, MutableMapping
from time import perf_counter
from typing import Any

from fathom.metrics import metrics
from fathom.service_log import about, access

OTHER = "other"
_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Access:
    """ASGI middleware. What answers may say more in the request's state.

    ``client`` is whose API key it was, and ``stages`` is seconds by stage.

    Args:
        app: what answers.
        routes: the paths that it knows.
        quiet: those of them whose requests are counted but not logged.
    """

    def __init__(self, app: App, routes: Collection[str], quiet: Collection[str] = ()) -> None:
        self._app, self._routes, self._quiet = app, frozenset(routes), frozenset(quiet)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, and account for it at its end."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._routes else OTHER
        began, answer = perf_counter(), {"status": 500, "headers": ()}

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer.update(message)
            await send(message)

        counted = metrics()
        try:
            with counted.requests_in_progress.labels(path=path).track_inprogress():
                await self._app(scope, receive, watched)
        finally:
            seconds = perf_counter() - began
            counted.requests.labels(path=path, status=answer["status"]).inc()
            counted.request_seconds.labels(path=path).observe(seconds)
            if path not in self._quiet and access.isEnabledFor(logging.INFO):
                _log(scope, path, answer, seconds)


def _log(scope: Message, path: str, answer: Mapping[str, Any], seconds: float) -> None:
    headers, told = dict(answer["headers"]), scope.get("state", {})
    method = scope["method"] if scope["method"] in _METHODS else OTHER
    fields = {
        "method": method,
        "path": path,
        "status": answer["status"],
        "milliseconds": round(seconds * 1e3, 3),
        # A copy: one that came too late may still be going on.
        "stages": {k: round(s * 1e3, 3) for k, s in told.get("stages", {}).copy().items()},
        "client": told.get("client"),
    }
    if version := headers.get(b"x-fathom-version"):
        fields["version"] = version.decode()
    request_id = headers.get(b"x-request-id", b"").decode() or None
    access.info("%s %s %d", method, path, answer["status"], extra=about(request_id, **fields))
