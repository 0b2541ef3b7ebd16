"""Sources: one short module per data set, raw files in, canonical tables out.

A new data set is one module with a settings class, whose ``type`` names it, whose ``read()`` gives
`CanonicalTables` and whose ``files()`` says what it reads, and one line in `SourceConfig`. Where
plain tables will do, `tables` needs neither.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, RootModel

from fathom import files
from fathom.sources.autoint_movielens import AutoIntMovieLens
from fathom.sources.canonical import PARTITION, UNREADABLE, CanonicalTables, SourceError
from fathom.sources.complete_journey import CompleteJourney
from fathom.sources.leave_one_out import LeaveOneOut
from fathom.sources.movielens import MovieLens
from fathom.sources.split_files import SplitFiles
from fathom.sources.tables import Tables

__all__ = [
    "PARTITION",
    "UNREADABLE",
    "CanonicalTables",
    "SourceConfig",
    "SourceError",
    "fingerprint",
    "read",
]


class SourceConfig(
    RootModel[
        Annotated[
            AutoIntMovieLens | CompleteJourney | LeaveOneOut | MovieLens | SplitFiles | Tables,
            Field(discriminator="type"),
        ]
    ]
):
    """``params:source``: the settings of one source, chosen by ``type``."""

    model_config = ConfigDict(frozen=True)


def read(config: SourceConfig) -> CanonicalTables:
    """Read the configured source.

    Raises:
        SourceError: what is missing or unreadable, all of it together.
    """
    return config.root.read()


def fingerprint(config: SourceConfig) -> dict[str, str]:
    """SHA-256 of every file that `read` reads, by path; without those that are missing."""
    return {str(path): files.sha256(path) for path in config.root.files()}
