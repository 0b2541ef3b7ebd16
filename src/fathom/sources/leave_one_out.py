"""The leave-one-out protocol of "Neural collaborative filtering" (He et al. 2017), on its files.

``ml-1m.train.rating`` and ``ml-1m.test.rating`` (user, item, rating and time, separated by tabs)
hold all ratings but the last of each user, and that one; a line of ``ml-1m.test.negative`` has the
pair of the same line of the second, as ``(0,25)``, and 99 items that the user has not rated. Each
user is one request of 100 candidates, among which the one counts that was rated.

"Neural collaborative filtering vs. matrix factorization revisited" (Rendle et al. 2020,
arXiv:2005.09683) draws new negatives in every epoch, uniformly from all items. Here a fixed number
of *passes* over the positives is drawn ahead, each with negatives of its own, and an epoch is over
all of them. Like theirs, settings are chosen on a rating of each user that is held out of training.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fathom.sources import tables
from fathom.sources.canonical import CanonicalTables, Settings, SourceError, connect, store
from fathom.sources.raw_files import RawTable, load
from fathom.sources.sampling import draw
from fathom.sources.split_files import dated, described, missing, together
from fathom.spec import INCLUSION_PROBABILITY

if TYPE_CHECKING:
    import ibis.expr.types as ir
    from ibis.backends.duckdb import Backend

_CANDIDATES = tuple(f"item_{i}" for i in range(1, 100))
_RATING = ("user", "item", "rating", "time")
_FILES = {
    "train": ("ml-1m.train.rating", _RATING),
    "test": ("ml-1m.test.rating", _RATING),
    "candidates": ("ml-1m.test.negative", ("pair", *_CANDIDATES)),
}
_SHOWN = 5  # lines that are quoted in a message


class LeaveOneOut(Settings):
    """Settings of the protocol's source.

    Args:
        path: folder with ``ml-1m.train.rating``, ``ml-1m.test.rating``, ``ml-1m.test.negative``.
        negatives_per_positive: drawn uniformly from all items, with replacement; repetitions and
            what the user has rated in training are dropped.
        passes: times that every positive is in the training split, each with other negatives.
        hold_out: whether each user's last training rating is in the validation split alone.
            Without, it is in both: for a last training with settings that are known to be good.
        seed: of the draws.
    """

    type: Literal["leave_one_out"] = "leave_one_out"
    path: str = Field(min_length=1)
    negatives_per_positive: int = Field(default=8, ge=1, le=100)
    passes: int = Field(default=1, ge=1, le=1000)
    hold_out: bool = True
    seed: int = Field(default=0, ge=0)

    def files(self) -> list[Path]:
        """The files that there are to read; `read` names those that are missing."""
        return [path for path in self._paths().values() if path.is_file()]

    def read(self) -> CanonicalTables:
        """Read the three files and draw the negatives.

        Keys are ``user_id``, ``item_id`` and ``request_id``; the label is ``rated``.

        Raises:
            SourceError: files are missing, a line has another number of fields, or the lines of
                the two test files are not of the same pairs.
        """
        faults = missing(self._paths().values(), "fields separated by tabs and no header")
        if faults:
            raise SourceError(faults)
        connection = connect()
        raw = {}
        for name, path in self._paths().items():
            names = _FILES[name][1]
            table = RawTable(
                path=str(path), format="csv", columns={}, names=names, delimiter="\t", quote=""
            )
            raw[name] = load(connection, table, name, names, faults, strict=True)
        if not faults:
            faults = self._unequal(raw["test"], raw["candidates"])
        if faults:
            raise SourceError(faults)
        columns = {"user_id": "user", "item_id": "item", "request_id": "request"}
        columns[INCLUSION_PROBABILITY] = INCLUSION_PROBABILITY
        label = tables.Label(name="rated", column="label")
        config = described("user_id", "item_id", "request_id", columns, label)
        return together(connection, self._parts(connection, raw), config)

    def _paths(self) -> dict[str, Path]:
        return {name: Path(self.path) / file for name, (file, _) in _FILES.items()}

    def _unequal(self, test: ir.Table, candidates: ir.Table) -> list[str]:
        """Lines of the two test files that are not of the same pair."""
        own = ("(" + test.user + "," + test.item + ")").to_pyarrow().to_pylist()
        theirs = candidates.pair.replace(" ", "").to_pyarrow().to_pylist()
        file, other = self._paths()["candidates"], _FILES["test"][0]
        faults = [
            f"{file}: line {line}: is of {found}, where {other} has {expected}; take both from one "
            "release"
            for line, (expected, found) in enumerate(zip_longest(own, theirs), start=1)
            if expected != found
        ]
        return faults[:_SHOWN]

    def _parts(self, connection: Backend, raw: dict[str, Any]) -> Iterator[ir.Table]:
        """All three splits: user, item, request, label, inclusion probability and moment."""
        import ibis

        rated = raw["train"].mutate(time=raw["train"].time.try_cast("int64"))
        latest = ibis.row_number().over(group_by="user", order_by=[ibis.desc("time"), "item"])
        rated = store(connection, "rated", rated.select("user", "item", last=latest == 0))
        items = rated.item.try_cast("int64").max().execute() + 1
        last = rated.filter("last")
        kept = rated.filter(~rated["last"]) if self.hold_out else rated
        turns = kept.mutate(turn=ibis.range(0, self.passes).unnest())
        splits = {
            "train": self._sampled(turns, turns.turn.cast("string"), kept, int(items)),
            "validation": self._sampled(last, ibis.literal("last"), rated, int(items)),
            "test": _candidates(raw["candidates"]),
        }
        for split, part in splits.items():
            yield dated(store(connection, split, part, temporary=True), split)
            connection.drop_table(split)

    def _sampled(self, positives: ir.Table, turn: Any, known: ir.Table, items: int) -> ir.Table:
        """Positives, each with its negatives as one request; no known pair is a negative."""
        import ibis

        request = positives.user + "/" + positives.item + "/" + turn
        positives = positives.select("user", "item", request=request)
        draws = positives.select("request", n=items, m=self.negatives_per_positive)
        drawn = draw(draws, "request", self.seed)
        drawn = drawn.mutate(item=drawn.position.cast("string"), label=ibis.literal(0, "int64"))
        drawn = drawn.inner_join(positives.select("request", "user"), "request")
        drawn = drawn.anti_join(known, ["user", "item"])
        own = {"label": ibis.literal(1, "int64"), INCLUSION_PROBABILITY: ibis.literal(1.0)}
        positives = positives.mutate(**own)
        everything = positives.union(drawn.select(*positives.columns))
        return everything.order_by("request", ibis.desc("label"), "item")


def _candidates(lines: ir.Table) -> ir.Table:
    """The 100 candidates of each user, the one that was rated first."""
    import ibis

    user, item = (lines.pair.re_extract(r"(\d+)\D+(\d+)", group) for group in (1, 2))
    listed = ibis.array([item, *(lines[name] for name in _CANDIDATES)])
    rows = lines.select(user=user, rated=item, item=listed.unnest())
    return rows.select(
        "user",
        "item",
        request=rows.user,
        label=(rows.item == rows.rated).cast("int64"),
        **{INCLUSION_PROBABILITY: ibis.literal(1.0)},
    )
