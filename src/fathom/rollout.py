"""Who answers a request: the champion, a challenger that is tried beside it, or its predecessor.

Each ranking has a thread of its own, so that one that is slow or stuck holds up nobody else. Who is
on trial, a *canary* or a champion on *probation*, is asked first; what it refuses, fails or leaves
too long is answered by the one before it, and counted. A *shadow* scores what has been answered. A
ranking on trial that is out of bounds (`fathom.guard`) is not asked again from that moment on, and
the registry is told.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic_core import from_json

from fathom import service_log
from fathom.admission import BusyError, Queue
from fathom.following import Follower
from fathom.keys import Keys
from fathom.lane import Answered, Ask, Lane
from fathom.metrics import metrics
from fathom.ranking import How, Ranking
from fathom.registry import Challenge
from fathom.service_log import about, log
from fathom.serving import ServingConfig

#: Requests that may wait for a shadow; what comes while there are more is not scored by it.
_SHADOWED = 8
#: Larger bodies are not read on the event loop.
_SMALL_BYTES = 1 << 16


@dataclass(frozen=True)
class Cast:
    """Who serves at a moment.

    Args:
        before: the champion's predecessor, while the champion is on probation.
        challenge, challenger: who is tried beside it, both or neither.
    """

    champion: Lane
    before: Lane | None = None
    challenge: Challenge | None = None
    challenger: Lane | None = None

    @property
    def lanes(self) -> list[Lane]:
        """All of them."""
        found = (self.champion, self.before, self.challenger)
        return [lane for lane in found if lane is not None]

    def of(self, mode: str) -> Lane | None:
        """The challenger, if this is its mode."""
        return self.challenger if self.challenge and self.challenge.mode == mode else None


class Serving:
    """What all requests share: who serves, and who may ask.

    Args:
        folder: the artifact that serves first.
        feature_store: see `fathom.serving.OnlineStore`.

    Raises:
        ArtifactError: files of the artifact are missing or changed.
        KeysError: the file of keys cannot be used.
    """

    def __init__(self, folder: Path, feature_store: str | None, config: ServingConfig) -> None:
        self.config, self._feature_store = config, feature_store
        self.keys = Keys(Path(config.api_keys)) if config.api_keys else None
        #: Requests take it once, so that each answer is of one version.
        self.cast = Cast(Lane(Ranking(folder, feature_store, config), config))
        self._changing = threading.Lock()
        _show(self.version)
        self._follower = (
            Follower(Path(config.registry), config.follow_seconds, self)
            if config.registry
            else None
        )

    @property
    def ranking(self) -> Ranking:
        """The champion."""
        return self.cast.champion.ranking

    @property
    def queue(self) -> Queue:
        """The champion's."""
        return self.cast.champion.queue

    @property
    def version(self) -> str:
        """The champion's."""
        return self.ranking.version

    @property
    def challenge(self) -> Challenge | None:
        """Who is tried beside the champion."""
        return self.cast.challenge

    def close(self) -> None:
        """Give up what is waiting, and end the background work."""
        if self._follower is not None:
            self._follower.close()
        for lane in self.cast.lanes:
            lane.close()

    # -- who serves ------------------------------------------------------------------------------

    def succeed(self, folder: Path, predecessor: str | None = None) -> None:
        """Put another artifact in charge, once it has shown that it can be.

        Args:
            predecessor: whom a roll-back would reach. If that is who serves now, it stays ready
                for ``probation_seconds``.

        Raises:
            ArtifactError: files of the artifact are missing or changed.
            RehearsalError: it does not answer as it should. The one before goes on.
        """
        after = self._rehearsed(folder, "champion")
        seconds = self.config.rollout.probation_seconds
        with self._changing:
            cast = self.cast
            tried = seconds > 0 and predecessor == cast.champion.ranking.version
            before = cast.champion if tried else None
            self.cast = replace(cast, champion=after, before=before)
        _show(self.version, cast.champion.ranking.version)
        self._retire(*(lane for lane in (cast.before, cast.champion) if lane is not before))
        if tried:
            _later(seconds, lambda: self._confirm(after))

    def admit(self, challenge: Challenge, folder: Path) -> None:
        """Try an artifact beside the champion; raises as `succeed` does."""
        how: How = challenge.mode
        challenger = self._rehearsed(folder, how)
        self._exchange(challenge, challenger)
        log.info("%s is tried as %s of %g of the users", challenge.version, how, challenge.share)

    def dismiss(self) -> None:
        """Try nobody beside the champion."""
        self._exchange(None, None)

    def _exchange(self, challenge: Challenge | None, challenger: Lane | None) -> None:
        with self._changing:
            before = self.cast.challenger
            self.cast = replace(self.cast, challenge=challenge, challenger=challenger)
        for mode in ("canary", "shadow"):
            share = challenge.share if challenge and challenge.mode == mode else 0.0
            metrics().challenger_share.labels(mode=mode).set(share)
        self._retire(before)

    def _rehearsed(self, folder: Path, how: How) -> Lane:
        others = [lane.ranking for lane in self.cast.lanes]
        ranking = Ranking(folder, self._feature_store, self.config, others, how)
        try:
            ranking.rehearse()
        except BaseException:
            ranking.close(*others)
            raise
        return Lane(ranking, self.config)

    def _retire(self, *lanes: Lane | None) -> None:
        """Close lanes when the requests that have begun on them have ended."""
        gone = [lane for lane in lanes if lane is not None]

        def close() -> None:
            for lane in gone:
                lane.close(*self.cast.lanes)

        if gone:
            _later(self.config.deadline_seconds, close)

    def _confirm(self, champion: Lane) -> None:
        """End a probation well."""
        with self._changing:
            cast = self.cast
            if cast.champion is not champion or cast.before is None:
                return
            self.cast = replace(cast, before=None)
        log.info("champion %s has passed its probation", champion.ranking.version)
        self._retire(cast.before)

    # -- who answers -----------------------------------------------------------------------------

    async def answer(self, ask: Ask, deadline: float) -> Answered:
        """Ask those on trial, then the one before them.

        Raises:
            BusyError, LateError: see `Queue.run`.
            RefusedError: the request is at fault.
        """
        cast = self.cast
        failed: list[tuple[Lane, Exception]] = []
        try:
            for lane in await self._tried(cast, ask):
                patience = time.monotonic() + self.config.rollout.patience_seconds
                try:
                    found = await lane.answer(ask, min(deadline, patience))
                    _count(cast, lane, "answered")
                    break
                except BusyError:
                    _count(cast, lane, "busy")
                except Exception as error:
                    failed.append((lane, error))
            else:
                found = await (cast.before or cast.champion).answer(ask, deadline)
            # What nobody can answer is nobody's fault.
            for lane, why in failed:
                self._blame(cast, lane, ask, why)
        finally:
            failed.clear()  # errors hold this frame, which holds them
        self._review(cast)
        self._offer(cast, ask)
        return found

    async def _tried(self, cast: Cast, ask: Ask) -> list[Lane]:
        """Who is on trial with a request."""
        tried = []
        canary = cast.of("canary")
        if canary is not None and cast.challenge is not None and ask.by_user:
            small = len(ask.body) <= _SMALL_BYTES
            user = user_of(ask.body) if small else await asyncio.to_thread(user_of, ask.body)
            if is_chosen(user, cast.challenge):
                tried.append(canary)
        return [*tried, cast.champion] if cast.before is not None else tried

    def _offer(self, cast: Cast, ask: Ask) -> None:
        """Let a shadow score what was answered, if it is not behind."""
        shadow, challenge = cast.of("shadow"), cast.challenge
        if shadow is None or challenge is None or not ask.by_user:
            return

        def work() -> None:
            if not is_chosen(user_of(ask.body), challenge):
                return
            try:
                shadow.shadow(ask)
                _count(cast, shadow, "answered")
            except Exception as error:
                self._blame(cast, shadow, ask, error)
            self._review(cast)

        if not shadow.queue.offer(work, _SHADOWED):
            _count(cast, shadow, "busy")

    @staticmethod
    def _blame(cast: Cast, lane: Lane, ask: Ask, error: Exception) -> None:
        """Hold against a ranking what it failed to do and another did."""
        lane.newest.failed()
        _count(cast, lane, "failed")
        version, extra = lane.ranking.version, about(ask.request_id)
        log.warning("%s failed a request of its trial", version, exc_info=error, extra=extra)

    # -- what ends a trial -----------------------------------------------------------------------

    def _review(self, cast: Cast) -> None:
        """End the trials of those that are out of bounds."""
        bounds, champion = self.config.rollout, cast.champion
        if cast.challenger is not None and cast.challenger.newest.is_due:
            fault = bounds.fault(cast.challenger.newest, champion.newest)
            if fault is not None:
                self._withdraw(cast.challenger, fault)
        if cast.before is not None and champion.newest.is_due:
            fault = bounds.fault(champion.newest, cast.before.newest)
            if fault is not None:
                self._roll_back(champion, fault)

    def _withdraw(self, challenger: Lane, fault: str) -> None:
        with self._changing:
            challenge = self.cast.challenge
            if self.cast.challenger is not challenger or challenge is None:
                return  # it has been, on another thread
            self.cast = replace(self.cast, challenge=None, challenger=None)
        metrics().challenger_share.labels(mode=challenge.mode).set(0)
        self._fell("challenger", challenge, challenge.version, fault)
        self._retire(challenger)

    def _roll_back(self, champion: Lane, fault: str) -> None:
        with self._changing:
            before = self.cast.before
            if self.cast.champion is not champion or before is None:
                return
            self.cast = replace(self.cast, champion=before, before=None)
        version = champion.ranking.version
        _show(before.ranking.version, version)
        self._fell("champion", version, version, fault)
        self._retire(champion)

    def _fell(self, role: str, what: str | Challenge, version: str, fault: str) -> None:
        metrics().rollbacks.labels(role=role).inc()
        log.error("%s %s is not used any more, %s serves: %s", role, version, self.version, fault)
        if self._follower is not None:
            self._follower.fell(what, fault)


def is_chosen(user: str | None, challenge: Challenge) -> bool:
    """Whether a user's requests are a challenger's: always the same, and by no other's choice."""
    if user is None:
        return False
    text = f"{challenge.version}\0{user}".encode("utf-8", "surrogatepass")
    place = int.from_bytes(hashlib.sha256(text).digest()[:8]) / 2**64
    return place < challenge.share


def user_of(body: bytes) -> str | None:
    """The user that a request names; None if it is not one."""
    try:
        found = from_json(body)
    except ValueError:
        return None
    user = found.get("user") if isinstance(found, dict) else None
    return user if isinstance(user, str) else None


def _count(cast: Cast, lane: Lane, outcome: str) -> None:
    role = "probation" if lane is cast.champion else lane.ranking.how
    metrics().trials.labels(role=role, outcome=outcome).inc()


def _show(version: str, before: str | None = None) -> None:
    """Say in the metrics and the log who serves."""
    service_log.JsonFormatter.version = version
    if before is not None:
        metrics().models.labels(version=before).set(0)
    metrics().models.labels(version=version).set(1)


def _later(seconds: float, work: Callable[[], None]) -> None:
    timer = threading.Timer(seconds, work)
    timer.daemon = True
    timer.start()
