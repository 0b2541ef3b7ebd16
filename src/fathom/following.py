"""A service that follows the champion.

The registry's pointer is looked at again and again. A new champion is loaded beside the one that
serves: its files are compared with their hashes, it must return its golden probabilities, and what
it needs of the feature store must be there. Only then do new requests go to it. Whatever fails on
the way leaves the old one in charge, is logged and counted, and is tried again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from fathom.metrics import metrics
from fathom.registry import Registry
from fathom.service_log import log


class Follower:
    """Looks at the pointer in the background.

    Args:
        registry: its folder.
        seconds: between two looks.
        serving: the version that serves now.
        succeed: puts the artifact in a folder in charge, or raises and changes nothing.
    """

    def __init__(
        self,
        registry: Path,
        seconds: float,
        serving: Callable[[], str],
        succeed: Callable[[Path], None],
    ) -> None:
        self._registry, self._seconds = Registry(registry), seconds
        self._serving, self._succeed = serving, succeed
        self._refused: str | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="follower", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop looking."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.is_set():
            self.look()
            self._closed.wait(self._seconds)

    def look(self) -> None:
        """Follow the pointer, if it names another version than the one that serves."""
        version: str | None = None
        try:
            version = self._registry.champion()
            if version is None or version == self._serving():
                return
            self._succeed(self._registry.path(version))
            self._refused = None
            metrics().swaps.inc()
            log.info("champion %s serves", version)
        except Exception as error:
            metrics().swap_failures.inc()
            if self._refused != f"{version}: {error}":  # each reason once, not every time
                self._refused = f"{version}: {error}"
                log.error(
                    "champion %s cannot serve, %s goes on: %s", version, self._serving(), error
                )
