"""MovieLens 1M as in "AutoInt" (Song et al. 2019, arXiv:1810.11921, section 5.1).

Ratings above 3 are positive, those below are negative, and ratings of 3 are left out, which leaves
739,012. Their seven fields (table 1) are the user's gender, age, occupation and zip code, the
movie's genres and its release, and the time of the rating; the ids of user and movie are none.
Films released before 1970 share a release by decade, those before 1930 too.

The split is at random, 8 : 1 : 1, and the same as theirs: their published code shuffles the rows in
the order of the file with Python's generator and a seed of 2019, and cuts.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from fathom.sources.canonical import PARTITION, UNREADABLE, CanonicalTables, Settings, store
from fathom.sources.movielens import MovieLens
from fathom.sources.split_files import MOMENTS
from fathom.spec import EVENT_TIMESTAMP, INCLUSION_PROBABILITY

if TYPE_CHECKING:
    import ibis.expr.types as ir

_NEUTRAL = "3"
_CUTS = (0.8, 0.9)
_DECADES = (1920, 1970)  # the first, and the first year that stands for itself


class AutoIntMovieLens(Settings):
    """Settings of the protocol's source.

    Args:
        path: folder with the files of MovieLens 1M (or 100K, for another experiment).
        seed: of the shuffle.
    """

    type: Literal["autoint_movielens"] = "autoint_movielens"
    path: str = Field(min_length=1)
    seed: int = Field(default=2019, ge=0)

    def files(self) -> list[Path]:
        """The files that there are to read; `read` names those that are missing."""
        return self._movielens.files()

    def read(self) -> CanonicalTables:
        """Read and divide the ratings.

        Keys are ``session_id``, ``user_id`` and ``movie_id``; the label is ``liked``; exposures
        have ``rated_at``, seconds since 1970, and the moment of their split.

        Raises:
            SourceError: files are missing, or a line has another number of fields.
        """
        found = self._movielens.read(strict=True)
        connection = found.exposures.get_backend()
        rated = found.exposures.mutate(row=found.exposures.rowid())
        rated = rated.filter(rated.rating != _NEUTRAL)
        rated = rated.inner_join(self._splits(rated), "row").order_by("row")
        exposures = rated.select(
            "session_id",
            "user_id",
            "movie_id",
            rated_at=_seconds(rated[EVENT_TIMESTAMP]),
            liked=_liked(rated.rating),
            **{
                EVENT_TIMESTAMP: rated.moment.cast("timestamp"),
                PARTITION: rated.moment.left(10),
                INCLUSION_PROBABILITY: rated[INCLUSION_PROBABILITY],
            },
        )
        return CanonicalTables(
            exposures=store(connection, "divided", exposures),
            interactions=None,
            users=found.users,
            items=found.items.mutate(release=_release(found.items.year)),
        )

    @property
    def _movielens(self) -> MovieLens:
        return MovieLens(path=self.path, positive_from=None)

    def _splits(self, rated: ir.Table) -> Any:
        """The moment of each row's split."""
        import ibis
        import pyarrow as pa

        rows = np.sort(rated.row.to_pyarrow().to_numpy())
        order = list(range(len(rows)))
        random.Random(self.seed).shuffle(order)
        sizes = np.diff([0, *(int(len(rows) * cut) for cut in _CUTS), len(rows)])
        moments = np.repeat(list(MOMENTS.values()), sizes)
        return ibis.memtable(pa.table({"row": rows[order], "moment": moments}))


def _seconds(written: Any) -> Any:
    return written.try_cast("timestamp").epoch_seconds().cast("float64")


def _liked(rating: Any) -> Any:
    import ibis

    stars = rating.try_cast("float64")
    return ibis.cases((stars > 3, "1"), (stars < 3, "0"), else_=UNREADABLE + rating)


def _release(year: Any) -> Any:
    import ibis

    first, single = _DECADES
    decade = ibis.greatest((year / 10).floor() * 10, first)
    return ibis.ifelse(year < single, decade, year).cast("int64").cast("string")
