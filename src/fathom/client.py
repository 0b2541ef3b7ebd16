"""A client of the service: time-outs, a deadline, and retries of what may be retried.

    with Client("http://127.0.0.1:3000", api_key=key) as client:
        answer = client.rank("900", ["1029743", "6534178"], {"store_id": "367"})
        best = answer.items[0].item

`Client` waits, `AsyncClient` awaits; both have the same methods. All requests only read, so each
may be asked again: after a connection that failed or was too slow, after 429, 502 and 504, and
after 503 unless the service says, by leaving ``Retry-After`` out, that waiting is of no use. Waits
double, each drawn at random from zero to its bound, so that clients that failed together do not
come back together (Brooker, "Exponential backoff and jitter", AWS 2015); ``Retry-After`` comes
first. Nothing is tried whose wait would end after the deadline.

Needs httpx, pydantic and `fathom.api` alone.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fathom.api import (
    ErrorAnswer,
    Fault,
    ModelAnswer,
    PredictAnswer,
    RankAnswer,
    RecommendAnswer,
)

A = TypeVar("A", bound=BaseModel)
P = ParamSpec("P")
#: What may be otherwise the next time. Names that do not resolve are among httpx' network errors.
_RETRIED = {429, 502, 503, 504}
_PASSING = (
    *(httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError, httpx.ProxyError),
    TimeoutError,
)
_SHOWN_FAULTS = 5
_SHOWN_CHARACTERS = 200


class ClientConfig(BaseModel):
    """How long a client waits, and how often it tries.

    Args:
        deadline_seconds: for a call with all its attempts and waits.
        timeout_seconds: for a connection, and for each silence, in one attempt.
        attempts: at most so many.
        first_wait_seconds, longest_wait_seconds: bounds of the random waits between attempts; the
            first doubles up to the second.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    deadline_seconds: float = Field(default=10.0, gt=0, le=3600)
    timeout_seconds: float = Field(default=5.0, gt=0, le=3600)
    attempts: int = Field(default=4, ge=1, le=100)
    first_wait_seconds: float = Field(default=0.05, ge=0, le=60)
    longest_wait_seconds: float = Field(default=2.0, ge=0, le=3600)


_DEFAULTS = ClientConfig()


class ServiceError(RuntimeError):
    """A call that got no answer, or a refusal.

    Attributes:
        status: of the last attempt; None if nothing came back.
        faults: what the service found wrong with the request.
        request_id: under which the service's log has it.
        attempts: how often it was tried.
    """

    def __init__(
        self,
        call: str,
        reason: str,
        status: int | None,
        faults: Sequence[Fault],
        request_id: str,
        attempts: int,
    ) -> None:
        shown = [f"{fault.field} {fault.fault}" for fault in faults[:_SHOWN_FAULTS]]
        more = [f"{len(faults) - len(shown)} more"] if len(faults) > len(shown) else []
        super().__init__(
            f"{call}: {'no answer' if status is None else status}, "
            f"{'; '.join([reason, *shown, *more])} (request {request_id}, "
            f"{attempts} attempt{'s' if attempts > 1 else ''})"
        )
        self.status = status
        self.faults = list(faults)
        self.request_id = request_id
        self.attempts = attempts


# -- what is asked -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call(Generic[A]):
    method: str
    path: str
    answer: type[A]
    body: Mapping[str, Any] | None = None
    request_id: str | None = None

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


def _rank(
    user: str,
    candidates: Sequence[str | Mapping[str, Any]],
    context: Mapping[str, Any] | None = None,
    *,
    timestamp: datetime | str | None = None,
    explain: bool = False,
    attribute: bool = False,
    request_id: str | None = None,
) -> _Call[RankAnswer]:
    """Rank candidates for a user.

    Args:
        candidates: item keys, or ``{"item": …, "context": …}`` where context differs.
        context: values of the context columns that all candidates share.
        timestamp: moment of the exposure, UTC unless it says otherwise; now if absent.
        explain: whether to split each logit into its exact parts.
        attribute: whether to share the deep part of each logit out over the columns.
        request_id: 1 to 64 letters, digits or ``._:-``; a random one if absent.

    Raises:
        ServiceError: refused, or not answered in time.
    """
    body = {
        "user": user,
        "candidates": list(candidates),
        "context": dict(context or {}),
        "timestamp": _moment(timestamp),
        "explain": explain,
        "attribute": attribute,
    }
    return _Call("POST", "/rank", RankAnswer, body, request_id)


def _recommend(
    user: str,
    k: int = 10,
    context: Mapping[str, Any] | None = None,
    *,
    timestamp: datetime | str | None = None,
    explain: bool = False,
    exclude_interacted: bool = False,
    allow: Sequence[str] | None = None,
    deny: Sequence[str] = (),
    where: Mapping[str, Sequence[str]] | None = None,
    diversity: float | None = None,
    exploration: float | None = None,
    request_id: str | None = None,
) -> _Call[RecommendAnswer]:
    """Recommend items to a user, out of the whole catalogue.

    Args:
        k: how many items.
        context: values of the context columns.
        timestamp, explain, request_id: as of `rank`.
        exclude_interacted: whether to leave out what the user has interacted with.
        allow, deny: the only items to choose from, and those to leave out.
        where: attribute of items to the values of which an item must have one.
        diversity, exploration: 0 to 1; the service's own settings if absent.

    Raises:
        ServiceError: refused, or not answered in time.
    """
    body = {
        "user": user,
        "k": k,
        "context": dict(context or {}),
        "timestamp": _moment(timestamp),
        "explain": explain,
        "exclude_interacted": exclude_interacted,
        "allow": None if allow is None else list(allow),
        "deny": list(deny),
        "where": {name: list(values) for name, values in (where or {}).items()},
        "diversity": diversity,
        "exploration": exploration,
    }
    return _Call("POST", "/recommend", RecommendAnswer, body, request_id)


def _predict(
    rows: Sequence[Mapping[str, Any]], *, request_id: str | None = None
) -> _Call[PredictAnswer]:
    """Probabilities of rows with every column of the spec but ratios.

    Raises:
        ServiceError: refused, or not answered in time.
    """
    return _Call("POST", "/predict", PredictAnswer, {"rows": list(rows)}, request_id)


def _model(*, request_id: str | None = None) -> _Call[ModelAnswer]:
    """What is being served.

    Raises:
        ServiceError: refused, or not answered in time.
    """
    return _Call("GET", "/model", ModelAnswer, None, request_id)


def _moment(timestamp: datetime | str | None) -> str | None:
    return timestamp.isoformat() if isinstance(timestamp, datetime) else timestamp


# -- when to ask again ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Reply:
    """What came back of one attempt."""

    status: int
    headers: httpx.Headers
    content: bytes


class _Attempts(Generic[A]):
    """One call's attempts: what each reply means. Knows nothing of how requests are sent."""

    def __init__(self, call: _Call[A], config: ClientConfig) -> None:
        self.made = 0
        self._call = call
        self._request_id = call.request_id or uuid.uuid4().hex
        self._config = config
        self._end = time.monotonic() + config.deadline_seconds
        self._answer: A | None = None
        content = None if call.body is None else json.dumps(call.body, allow_nan=False).encode()
        self._request: dict[str, Any] = {
            "method": call.method,
            "url": call.path,
            "content": content,
            "headers": {"X-Request-ID": self._request_id, "Content-Type": "application/json"},
        }

    @property
    def left(self) -> float:
        """Seconds until the deadline, below zero after it."""
        return self._end - time.monotonic()

    @property
    def answer(self) -> A:
        """What the service said, once `wait_after` returned None."""
        assert self._answer is not None
        return self._answer

    def next(self) -> dict[str, Any]:
        """The next attempt, as arguments for httpx."""
        self.made += 1
        return self._request | {"timeout": max(min(self._config.timeout_seconds, self.left), 1e-3)}

    def check(self) -> None:
        """Between two pieces of an answer, each of which may be in time while the whole is not."""
        if self.left <= 0:
            raise httpx.ReadTimeout("the answer came too slowly")

    def wait_after(self, reply: _Reply | httpx.RequestError | TimeoutError) -> float | None:
        """Seconds to wait before the next attempt, or None if this one was answered.

        Raises:
            ServiceError: there is no use in a next attempt, or no time for it.
        """
        if isinstance(reply, _Reply):
            if reply.status == 200:
                self._answer = self._parsed(reply)
                return None
            error, asked = self._refused(reply), _retry_after(reply.headers)
            final = reply.status == 503 and asked is None and "X-Fathom-Version" in reply.headers
            retried = reply.status in _RETRIED and not final
        else:
            # Some time-outs say nothing of themselves.
            words = str(reply) or type(reply).__name__
            late = f" within {self._config.deadline_seconds:g} s" if self.left <= 0 else ""
            error, asked = self._error(f"{words}{late}"), None
            retried = isinstance(reply, _PASSING)
        wait = self._drawn() + (asked or 0.0)
        if not retried or self.made >= self._config.attempts or wait >= self.left:
            raise error from (reply if isinstance(reply, Exception) else None)
        return wait

    def _drawn(self) -> float:
        bound = self._config.first_wait_seconds * 2.0 ** (self.made - 1)
        return random.uniform(0, min(bound, self._config.longest_wait_seconds))

    def _parsed(self, reply: _Reply) -> A:
        try:
            # A newer service may say more than this client knows.
            return self._call.answer.model_validate_json(reply.content, extra="ignore")
        except ValidationError:
            raise self._error(f"not an answer of this service: {_shown(reply)}", 200) from None

    def _refused(self, reply: _Reply) -> ServiceError:
        try:
            said = ErrorAnswer.model_validate_json(reply.content, extra="ignore")
        except ValidationError:  # a gateway's own page, say
            return self._error(_shown(reply) or "an empty answer", reply.status)
        return self._error(said.error, reply.status, said.faults, said.request_id)

    def _error(
        self,
        reason: str,
        status: int | None = None,
        faults: Sequence[Fault] = (),
        request_id: str | None = None,
    ) -> ServiceError:
        request_id = request_id or self._request_id
        return ServiceError(str(self._call), reason, status, faults, request_id, self.made)


def _retry_after(headers: httpx.Headers) -> float | None:
    """Seconds that a reply asks to wait: as a number, or until a date (RFC 9110, 10.2.3)."""
    said = headers.get("Retry-After", "").strip()
    if said.isascii() and said.isdigit():
        return float(said)
    try:
        moment = parsedate_to_datetime(said)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    return max(0.0, (moment - datetime.now(timezone.utc)).total_seconds())


def _shown(reply: _Reply) -> str:
    return reply.content[:_SHOWN_CHARACTERS].decode("utf-8", "replace")


# -- clients -------------------------------------------------------------------------------------


def _waiting(make: Callable[P, _Call[A]]) -> Callable[Concatenate[Client, P], A]:
    """A method of `Client` from what it asks."""

    def method(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> A:
        return client._ask(make(*args, **kwargs))

    method.__doc__, method.__name__ = make.__doc__, make.__name__.strip("_")
    return method


def _awaiting(
    make: Callable[P, _Call[A]],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, A]]:
    """A method of `AsyncClient` from what it asks."""

    async def method(client: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> A:
        return await client._ask(make(*args, **kwargs))

    method.__doc__, method.__name__ = make.__doc__, make.__name__.strip("_")
    return method


def _settings(url: str, api_key: str | None) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return {"base_url": url, "headers": headers | {"Accept": "application/json"}}


class Client:
    """Asks a service, and waits for its answers. May be shared by threads.

    Args:
        url: where the service is, as ``http://127.0.0.1:3000``.
        api_key: sent as ``Authorization: Bearer``.
    """

    def __init__(
        self, url: str, api_key: str | None = None, config: ClientConfig = _DEFAULTS
    ) -> None:
        self._http, self._config = httpx.Client(**_settings(url, api_key)), config

    rank = _waiting(_rank)
    recommend = _waiting(_recommend)
    predict = _waiting(_predict)
    model = _waiting(_model)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, call: _Call[A]) -> A:
        attempts = _Attempts(call, self._config)
        while (wait := attempts.wait_after(self._send(attempts))) is not None:
            time.sleep(wait)
        return attempts.answer

    def _send(self, attempts: _Attempts[Any]) -> _Reply | httpx.RequestError:
        content = bytearray()
        try:
            with self._http.stream(**attempts.next()) as response:
                for chunk in response.iter_bytes():
                    content += chunk
                    attempts.check()
        except httpx.RequestError as error:
            return error
        return _Reply(response.status_code, response.headers, bytes(content))


class AsyncClient:
    """As `Client`, for asyncio: each method is awaited."""

    def __init__(
        self, url: str, api_key: str | None = None, config: ClientConfig = _DEFAULTS
    ) -> None:
        self._http, self._config = httpx.AsyncClient(**_settings(url, api_key)), config

    rank = _awaiting(_rank)
    recommend = _awaiting(_recommend)
    predict = _awaiting(_predict)
    model = _awaiting(_model)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _ask(self, call: _Call[A]) -> A:
        attempts = _Attempts(call, self._config)
        while (wait := attempts.wait_after(await self._send(attempts))) is not None:
            await asyncio.sleep(wait)
        return attempts.answer

    async def _send(self, attempts: _Attempts[Any]) -> _Reply | httpx.RequestError | TimeoutError:
        try:
            async with asyncio.timeout(attempts.left):
                response = await self._http.request(**attempts.next())
        except (httpx.RequestError, TimeoutError) as error:
            return error
        return _Reply(response.status_code, response.headers, response.content)
