"""Online stores that fail in ways a test needs; Feast loads them by class path."""

from __future__ import annotations

import os
import signal
from typing import Any, ClassVar, Literal

from fathom.sqlite_store import WalSqliteOnlineStore, WalSqliteOnlineStoreConfig


class ForgetfulSqliteOnlineStoreConfig(WalSqliteOnlineStoreConfig):
    type: Literal["odd_stores.ForgetfulSqliteOnlineStore"] = (  # type: ignore[assignment]
        "odd_stores.ForgetfulSqliteOnlineStore"
    )


class ForgetfulSqliteOnlineStore(WalSqliteOnlineStore):
    """Takes every write and keeps none."""

    def online_write_batch(self, *arguments: Any, **options: Any) -> None:
        pass


class DyingSqliteOnlineStoreConfig(WalSqliteOnlineStoreConfig):
    type: Literal["odd_stores.DyingSqliteOnlineStore"] = (  # type: ignore[assignment]
        "odd_stores.DyingSqliteOnlineStore"
    )


class DyingSqliteOnlineStore(WalSqliteOnlineStore):
    """Its process is killed when the second view is written."""

    views: ClassVar[set[str]] = set()

    def online_write_batch(self, config: Any, table: Any, *arguments: Any, **options: Any) -> None:
        self.views.add(table.name)
        if len(self.views) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        super().online_write_batch(config, table, *arguments, **options)
