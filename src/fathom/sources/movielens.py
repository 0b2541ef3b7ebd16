"""MovieLens: ratings of films, in the two layouts that GroupLens publishes.

100K: ``u.data`` (tab-separated), ``u.item`` (pipe-separated, one flag per genre) and ``u.user``.
1M: ``ratings.dat``, ``movies.dat`` and ``users.dat``, separated by ``::``. Both in Latin-1, without
headers. Its licence forbids to pass the data on, so none of it comes with this project:
docs/how-to/use-your-own-data.md says where to put a copy of your own.

A rating is an exposure, and a user's ratings of one day (UTC) are one request: people rate lists
of films in one sitting.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field

from fathom.sources import tables
from fathom.sources.canonical import CanonicalTables, Settings, SourceError, connect
from fathom.sources.raw_files import load
from fathom.sources.times import Timestamp

if TYPE_CHECKING:
    import ibis.expr.types as ir

_UNKNOWN = "unknown"  # the first of the flags: no genre
_GENRES = (
    *("Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary"),
    *("Drama", "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi"),
    *("Thriller", "War", "Western"),
)


class _File(NamedTuple):
    name: str
    delimiter: str
    columns: tuple[str, ...]


class _Layout(NamedTuple):
    exposures: _File
    users: _File
    items: _File


_RATING = ("user", "item", "rating", "timestamp")
_LAYOUTS = (
    _Layout(
        _File("u.data", "\t", _RATING),
        _File("u.user", "|", ("user", "age", "gender", "occupation", "zip")),
        _File("u.item", "|", ("item", "title", "date", "video", "url", _UNKNOWN, *_GENRES)),
    ),
    _Layout(
        _File("ratings.dat", "::", _RATING),
        _File("users.dat", "::", ("user", "gender", "age", "occupation", "zip")),
        _File("movies.dat", "::", ("item", "title", "genres")),
    ),
)


class MovieLens(Settings):
    """Settings of the MovieLens source.

    Args:
        path: folder that holds the three files of either layout.
        positive_from: ratings from this one on are positives of the label ``liked``; without it,
            the label is the ``rating`` itself, for a regression.
    """

    type: Literal["movielens"] = "movielens"
    path: str = Field(min_length=1)
    positive_from: float | None = Field(default=4, ge=1, le=5)

    def files(self) -> list[Path]:
        """The files that there are to read; `read` names those that are missing."""
        paths = [Path(self.path) / file.name for layout in _LAYOUTS for file in layout]
        return [path for path in paths if path.is_file()]

    def read(self, strict: bool = False) -> CanonicalTables:
        """Read the three files.

        Keys are ``session_id``, ``user_id`` and ``movie_id``; users have gender, age, occupation
        and zip (age and occupation are codes in 1M, as its README lists them); items have title,
        year and genres.

        Args:
            strict: a line with another number of fields is a fault, not a row for quarantine.

        Raises:
            SourceError: the folder holds neither layout, or only a part of one.
        """
        layout = _layout(Path(self.path))
        config = self._tables(layout)
        connection = connect()
        faults: list[str] = []
        raw = {
            name: load(connection, table, name, table.names or (), faults, strict)
            for name, table in config.raw_tables().items()
        }
        if faults:
            raise SourceError(faults)
        raw["items"] = _with_year_and_genres(raw["items"])
        return tables.canonical(connection, raw, config)

    def _tables(self, layout: _Layout) -> tables.Tables:
        def file(name: str) -> dict[str, Any]:
            described = getattr(layout, name)
            return {
                "path": str(Path(self.path) / described.name),
                "format": "csv",
                "delimiter": described.delimiter,
                "quote": "",
                "encoding": "latin-1",
                "names": described.columns,
            }

        if self.positive_from is None:
            label = tables.Label(name="rating", column="rating")
        else:
            label = tables.Label(name="liked", column="rating", at_least=self.positive_from)
        attributes = ("gender", "age", "occupation", "zip")
        return tables.Tables(
            user="user_id",
            item="movie_id",
            request="session_id",
            request_per="day",
            partition_by="month",
            exposures=tables.Exposures(
                **file("exposures"),
                columns={"user_id": "user", "movie_id": "item"},
                timestamp=Timestamp(column="timestamp", unit="s"),
                label=label,
            ),
            users=tables.Attributes(
                **file("users"), columns={"user_id": "user"} | {a: a for a in attributes}
            ),
            items=tables.Attributes(
                **file("items"),
                columns={"movie_id": "item"} | {a: a for a in ("title", "year", "genres")},
            ),
        )


def _layout(folder: Path) -> _Layout:
    for layout in _LAYOUTS:
        names = [file.name for file in (layout.exposures, layout.users, layout.items)]
        missing = [name for name in names if not (folder / name).is_file()]
        if not missing:
            return layout
        if len(missing) < len(names):
            raise SourceError(
                [
                    f"{folder / name}: no such file; copy it from the same archive"
                    for name in missing
                ]
            )
    known = " nor ".join("/".join((x.exposures.name, x.users.name, x.items.name)) for x in _LAYOUTS)
    raise SourceError(
        [f"{folder}: holds neither {known}; unpack MovieLens 100K or 1M there or correct 'path'"]
    )


def _with_year_and_genres(items: ir.Table) -> ir.Table:
    """Add the year in the title's last parentheses, and the genres as a list."""
    import ibis

    year = items.title.re_extract(r"\((\d{4})\)\s*$", 1).try_cast("float64")
    if "genres" in items.columns:
        genres = items.genres.split("|").filter(lambda genre: genre != "")
    else:
        nothing = ibis.null("string")
        flags = [ibis.ifelse(items[genre] == "1", genre, nothing) for genre in _GENRES]
        genres = ibis.array(flags).filter(lambda genre: genre.notnull())
    return items.mutate(year=year, genres=genres)
