"""A service that follows the registry: its champion, and who challenges it.

The pointers are looked at again and again. A new champion, or a challenger, is loaded beside those
that serve: its files are compared with their hashes, it must return its golden probabilities, and
what it needs of the feature store must be there. Only then do requests go to it. Whatever fails on
the way leaves all as it was, is logged and counted, and is tried again.

A version that the service has found wanting itself is not taken up again. Its pointer is put back,
where the registry can be written; where it cannot, somebody else has to.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from fathom.metrics import metrics
from fathom.registry import Challenge, Registry
from fathom.service_log import log

BY = "service"


class Cast(Protocol):
    """Who serves, and who is tried beside them."""

    @property
    def version(self) -> str:
        """The champion's."""

    @property
    def challenge(self) -> Challenge | None:
        """Who is tried."""

    def succeed(self, folder: Path, predecessor: str | None = None) -> None:
        """Put an artifact in charge; on probation, if it follows the predecessor given."""

    def admit(self, challenge: Challenge, folder: Path) -> None:
        """Try an artifact beside the champion, in place of whom is tried now."""

    def dismiss(self) -> None:
        """Try nobody."""


class Follower:
    """Looks at the pointers in the background.

    Args:
        registry: its folder.
        seconds: between two looks.
        cast: who follows. What it cannot take up it refuses by raising, and changes nothing.
    """

    def __init__(self, registry: Path, seconds: float, cast: Cast) -> None:
        self._registry, self._seconds, self._cast = Registry(registry), seconds, cast
        self._said: dict[str, str] = {}
        #: What was found wanting, and why.
        self._fallen: dict[str | Challenge, str] = {}
        self._closed, self._wake = False, threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._closed = True
        self._wake.set()

    def fell(self, what: str | Challenge, reason: str) -> None:
        """Note that a champion, by its version, or a challenge must not be taken up again."""
        self._fallen[what] = reason
        self._wake.set()

    def _run(self) -> None:
        while not self._closed:
            self._wake.clear()
            self.look()
            self._wake.wait(self._seconds)

    def look(self) -> None:
        """Follow the pointers, where they name others than those that serve."""
        self._attempt("champion", self._follow_champion)
        self._attempt("challenger", self._follow_challenger)

    def _attempt(self, role: str, follow: Callable[[], None]) -> None:
        try:
            follow()
            self._said.pop(role, None)
        except Exception as error:
            metrics().swap_failures.inc()
            if self._said.get(role) != str(error):  # each reason once, not every time
                self._said[role] = str(error)
                log.error("%s", error)

    def _follow_champion(self) -> None:
        champions = self._registry.champions()
        for fallen in [fallen for fallen in self._fallen if isinstance(fallen, str)]:
            if not champions or fallen != champions[-1]:
                del self._fallen[fallen]  # the pointer has changed since
        if not champions or champions[-1] == self._cast.version:
            return
        version = champions[-1]
        if reason := self._fallen.get(version):
            self._record(version, lambda: self._registry.rollback(reason, BY, of=version))
            return
        try:
            before = champions[-2] if len(champions) > 1 else None
            self._cast.succeed(self._registry.path(version), before)
        except Exception as error:
            serves = self._cast.version
            raise _Refused(f"champion {version} cannot serve, {serves} goes on: {error}") from error
        metrics().swaps.inc()
        log.info("champion %s serves", version)

    def _follow_challenger(self) -> None:
        challenge = self._registry.challenger()
        for fallen in [fallen for fallen in self._fallen if isinstance(fallen, Challenge)]:
            if fallen != challenge:
                del self._fallen[fallen]
        if challenge is not None and challenge.version == self._cast.version:
            challenge = None  # it has won
        if challenge == self._cast.challenge:
            return
        if challenge is None:
            self._cast.dismiss()
            return
        if reason := self._fallen.get(challenge):
            of = challenge
            self._record(of.version, lambda: self._registry.withdraw(reason, BY, of=of))
            return
        try:
            self._cast.admit(challenge, self._registry.path(challenge.version))
        except Exception as error:
            raise _Refused(f"challenger {challenge.version} cannot be tried: {error}") from error

    def _record(self, version: str, change: Callable[[], object]) -> None:
        try:
            change()
        except Exception as error:
            raise _Refused(
                f"{version} is not used any more, but the registry still names it: {error}; "
                "roll back or withdraw it by hand"
            ) from error
        log.info("the registry says by whom %s was taken back", version)


class _Refused(RuntimeError):
    """A pointer that is not followed."""
