"""What a service runs on: its settings, and a feature store that is opened, kept fresh, watched."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from fathom import api
from fathom.guard import RolloutConfig
from fathom.metrics import metrics
from fathom.retrieval import RetrievalConfig
from fathom.service_log import log
from fathom.spec import FeatureSpec

if TYPE_CHECKING:
    from fathom.online import OnlineFeatures

#: Between two attempts to open a feature store, or to refresh one after a failure.
RETRY_SECONDS = 10.0


class ServingConfig(BaseModel):
    """How the service runs (``params:serving``).

    Args:
        refresh_seconds: how often it looks for newer features of items and contexts.
        read_seconds: how long it waits for the online store before it ranks without the user's
            features.
        feature_log: folder for the feature vectors of all ranked candidates; null logs none.
        feature_log_mb: most disk that the folder may take, in MiB; the oldest segments go first.
        segment_rows, segment_seconds: a segment of the log is closed at so many rows, or when it is
            so old. A crash loses the open one.
        registry: folder of the registry whose champion is followed; null serves one version.
        follow_seconds: how often the pointer is looked at.
        queue_seconds: a request that would wait longer for its turn is turned away (429).
        deadline_seconds: how long a request may take, reading its body included (408, 504).
        api_keys: file of the keys (`fathom.keys`) of those who may ask; null lets everybody.
        log_format: ``text``, or ``json`` for one object a line, with one for each request.
        log_personal: whether the texts of errors in requests are logged, which may quote values.
        try_page: whether there is a page at ``/try`` to rank items by hand.
        precision: of the layers that score; ``bfloat16`` is faster for large ones, and moves
            probabilities (`fathom.fast.HALF_TOLERANCE`).
        retrieval: how ``/recommend`` retrieves (`fathom.retrieval.RetrievalConfig`).
        rollout: how challengers and new champions are tried (`fathom.guard.RolloutConfig`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    refresh_seconds: float = Field(default=60.0, gt=0, le=86_400)
    read_seconds: float = Field(default=0.5, gt=0, le=30)
    feature_log: str | None = None
    feature_log_mb: int = Field(default=1024, ge=1)
    segment_rows: int = Field(default=50_000, ge=1, le=1_000_000)
    segment_seconds: float = Field(default=60.0, gt=0, le=86_400)
    registry: str | None = None
    follow_seconds: float = Field(default=5.0, gt=0, le=86_400)
    queue_seconds: float = Field(default=0.05, gt=0, le=30)
    deadline_seconds: float = Field(default=5.0, gt=0, le=30)
    api_keys: str | None = None
    log_format: Literal["text", "json"] = "text"
    log_personal: bool = False
    try_page: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    retrieval: RetrievalConfig = RetrievalConfig()
    rollout: RolloutConfig = RolloutConfig()

    @property
    def absolute(self) -> ServingConfig:
        """The same, whichever folder the service runs in."""
        paths = ("feature_log", "registry", "api_keys")
        given = {name: path for name in paths if (path := getattr(self, name)) is not None}
        return self.model_copy(
            update={name: str(Path(path).absolute()) for name, path in given.items()}
        )


class OnlineStore:
    """The feature store of a service, opened and refreshed in the background.

    What fails is tried again: until it is open, ``/rank`` is refused; after that it goes on with
    the features it has.

    Args:
        settings: JSON of `fathom.feature_store.FeatureStoreConfig` and its ``root``; None for a
            service without a feature store.
        after: called in the background once it is open; what it raises is only logged.
    """

    def __init__(
        self,
        settings: str | None,
        spec: FeatureSpec,
        config: ServingConfig | None = None,
        after: Callable[[], None] | None = None,
    ) -> None:
        self.features: OnlineFeatures | None = None
        #: ``absent``, ``opening``, ``ready`` or ``failed``.
        self.state = "opening" if settings else "absent"
        self._config = config or ServingConfig()
        self._after = after
        self._closed = threading.Event()
        if settings:
            from fathom.feature_store import FeatureRepo, FeatureStoreConfig

            found = json.loads(settings)
            root = Path(found.pop("root"))
            repo = FeatureRepo(FeatureStoreConfig(**found), root)
            thread = threading.Thread(target=self._run, args=(repo, spec), daemon=True)
            thread.start()

    def close(self) -> None:
        """Stop trying."""
        self._closed.set()
        if self.features is not None:
            self.features.close()

    def require(self) -> OnlineFeatures:
        """The features, or the reason to refuse a request that needs them.

        Raises:
            RefusedError: status 503.
        """
        if self.features is not None:
            return self.features
        reason = {
            "absent": "this service has no feature store; set FATHOM_FEATURE_STORE and start it "
            "again",
            "opening": "the feature store is being opened; try again",
            "failed": "the feature store cannot be opened, see the service's log; try again",
        }[self.state]
        headers = {} if self.state == "absent" else {"Retry-After": f"{RETRY_SECONDS:.0f}"}
        raise api.RefusedError(503, f"{reason} (/predict takes rows of features)", headers=headers)

    def described(self) -> dict[str, Any]:
        """Its state, ``degraded`` while the online store is down, and the tables' moment."""
        features = self.features
        if features is None:
            return {"feature_store": self.state, "tables_as_of": None}
        state = "degraded" if features.degraded else "ready"
        return {"feature_store": state, "tables_as_of": features.tables_as_of.isoformat()}

    def _run(self, repo: Any, spec: FeatureSpec) -> None:
        started = time.monotonic()
        while not self._closed.is_set() and self.features is None:
            try:
                from fathom.online import OnlineFeatures

                self.features = OnlineFeatures.open(repo, spec, self._config.read_seconds)
                metrics().tables_as_of.set(self.features.tables_as_of.timestamp())
                self.state = "ready"
                log.info("feature store opened after %.1f s", time.monotonic() - started)
            except Exception:
                log.exception("%s: the feature store cannot be opened", repo.folder)
                self.state = "failed"
                self._closed.wait(RETRY_SECONDS)
        try:
            if self._after is not None:
                self._after()
        except Exception:
            log.exception("what is loaded after the feature store cannot be")
        wait = self._config.refresh_seconds
        while not self._closed.wait(wait):
            wait = self._config.refresh_seconds if self._refresh(repo) else RETRY_SECONDS

    def _refresh(self, repo: Any) -> bool:
        """Load what is newer, if anything; whether that went well."""
        assert self.features is not None
        started = time.monotonic()
        try:
            if self.features.refresh():
                metrics().refreshes.inc()
                metrics().tables_as_of.set(self.features.tables_as_of.timestamp())
                taken, moment = time.monotonic() - started, self.features.tables_as_of
                log.info("features as of %s loaded in %.1f s", moment.isoformat(), taken)
            return True
        except Exception:
            metrics().refresh_failures.inc()
            log.exception("%s: newer features cannot be loaded; the old ones stay", repo.folder)
            return False
