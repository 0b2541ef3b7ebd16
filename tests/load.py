"""Clients that ask a service without pause, each on a connection of its own that stays open."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

#: Path and body of a request.
Request = tuple[str, dict[str, Any]]


@dataclass
class Load:
    """What clients were answered so far, in the order of the answers."""

    answers: list[tuple[Request, httpx.Response]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def seen(self, of: Callable[[httpx.Response], Any], since: int = 0) -> list[Any]:
        """Something of each answer after the first so many."""
        return [of(response) for _, response in self.answers[since:]]


@contextmanager
def load(url: str, requests: Sequence[Request]) -> Iterator[Load]:
    """A client for each request, which repeats it until the block ends."""
    found, stop = Load(), threading.Event()

    def ask(request: Request) -> None:
        path, body = request
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            while not stop.is_set():
                try:
                    response = client.post(path, json=body)
                except httpx.HTTPError as error:
                    found.failures.append(f"{path}: {error!r}")
                    return
                found.answers.append((request, response))
                if response.status_code != 200:
                    found.failures.append(f"{path}: {response.status_code} {response.text}")

    threads = [threading.Thread(target=ask, args=(request,)) for request in requests]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        stop.set()
        for thread in threads:
            thread.join()
