"""Between validating and accepting lie files; a verdict about the future does not last."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fathom.pipelines.datasets import AtomicDataset, TablesDataset
from fathom.pipelines.validation.nodes import accept, validate_raw
from fathom.spec import EVENT_TIMESTAMP, FeatureSpec
from fathom.validation import QuarantineError, ValidationConfig, read_partitions

SPEC = FeatureSpec.model_validate(
    {
        "entities": {"user": "u", "item": "i", "request": "r"},
        "label": {"name": "y", "values": [0, 1]},
        "columns": [{"name": "u", "kind": "categorical", "owner": "user"}],
    }
)
NOW = datetime.now(timezone.utc).replace(microsecond=0)
LONG_AGO = datetime(2020, 1, 1, tzinfo=timezone.utc)


def validated(folder, moments: list[datetime], **config: Any):
    """`validate_raw` on one exposure per moment."""
    n = len(moments)
    exposures = ibis.memtable(
        {
            "u": ["u1"] * n,
            "i": [f"i{k}" for k in range(n)],
            "r": ["r1"] * n,
            "y": [1] * n,
            "event_timestamp": [moment.isoformat() for moment in moments],
        }
    )
    entity = {"event_timestamp": [LONG_AGO.isoformat()]}
    users, items = (ibis.memtable({key: [f"{key}1"], **entity}) for key in "ui")
    rules = {"exposures": {"max_quarantined_share": 0.5}, "users": {}, "items": {}}
    settings = ValidationConfig.model_validate({"tables": rules, **config})
    found = validate_raw(exposures, None, users, items, SPEC, settings, str(folder / "docs"))
    return settings, *found


def test_a_row_from_the_future_is_looked_at_again_when_it_no_longer_is(tmp_path):
    soon, later = NOW + timedelta(days=1), NOW + timedelta(days=300)
    *_, receipt = validated(tmp_path, [LONG_AGO, later, soon, LONG_AGO])
    assert datetime.fromisoformat(receipt["expires"]) == soon - timedelta(seconds=300)


def test_what_is_not_from_the_future_is_settled(tmp_path):
    *_, receipt = validated(tmp_path, [LONG_AGO, NOW])
    assert receipt == {"covers": [str(tmp_path / "docs")], "expires": None}
    assert (tmp_path / "docs/index.html").is_file()


def test_so_is_everything_at_a_moment_that_conf_has_fixed(tmp_path):
    fixed = {"now": "2026-01-01T00:00:00Z"}
    *_, report, _, receipt = validated(tmp_path, [LONG_AGO, NOW + timedelta(days=1)], **fixed)
    assert report[0]["rows"]["quarantined"] == 1
    assert receipt["expires"] is None


def test_clean_rows_are_accepted_from_files(tmp_path):
    config, clean, _, report, *_ = validated(tmp_path, [LONG_AGO, NOW])
    tables = TablesDataset(str(tmp_path / "validated"))
    tables.save(clean)
    reports = AtomicDataset({"type": "json.JSONDataset", "filepath": str(tmp_path / "r.json")})
    reports.save(report)
    exposures, interactions, *_, data_hash = accept(tables.load(), reports.load(), SPEC, config)
    assert exposures.to_pyarrow()["event_timestamp"].to_pylist() == [LONG_AGO, NOW]
    assert interactions.count().execute() == 2  # there is no log of interactions but this
    assert data_hash == accept(tables.load(), reports.load(), SPEC, config)[-1]


def test_too_few_clean_rows_are_not_accepted(tmp_path):
    future = [NOW + timedelta(days=day) for day in (1, 2)]
    config, clean, _, report, *_ = validated(tmp_path, [LONG_AGO, *future])
    with pytest.raises(QuarantineError, match=r"66\.67% of 3 rows are quarantined"):
        accept(clean, report, SPEC, config)


def test_what_was_served_is_validated_beside_what_the_source_has(tmp_path):
    """By columns and types of its own; every row keeps a number of its own."""

    def partition(folder: str, name: str, rows: dict[str, list[Any]]):
        (tmp_path / folder).mkdir()
        pq.write_table(pa.table(rows), tmp_path / folder / f"{name}.parquet")
        return read_partitions(tmp_path / folder, "exposures")

    at = [LONG_AGO.isoformat()] * 2
    own = {"u": [1, 2], "i": ["a", "b"], "r": ["r1"] * 2, "y": [0, 1]}
    raw = partition("raw", "week", own | {EVENT_TIMESTAMP: at})
    # The second names no user, the third is the source's own.
    keys = {"u": ["1", None, "2"], "i": ["c", "a", "b"], "r": ["r2", "r2", "r1"], "y": [1, 0, 1]}
    moments = {EVENT_TIMESTAMP: [LONG_AGO] * 3, "arrival_timestamp": [NOW] * 3}
    served = partition("served", "served-2024-01-01", keys | moments)
    entity = {EVENT_TIMESTAMP: at[:1]}
    users, items = (ibis.memtable({key: [f"{key}1"], **entity}) for key in "ui")
    rules = {"exposures": {"max_quarantined_share": 0.5}, "users": {}, "items": {}}
    settings = ValidationConfig.model_validate({"tables": rules})
    arguments = (raw, None, users, items, SPEC, settings, str(tmp_path / "docs"), served)
    clean, quarantine, reports, _, _ = validate_raw(*arguments)
    found = clean["exposures"].to_pyarrow().to_pylist()
    assert {(row["r"], row["i"], row["u"], row["partition"]) for row in found} == {
        ("r1", "a", "1", "week"),
        ("r1", "b", "2", "week"),
        ("r2", "c", "1", "served-2024-01-01"),
    }
    arrived = {row["partition"]: row["arrival_timestamp"] for row in found}
    assert arrived["week"] is None
    assert arrived["served-2024-01-01"] is not None
    assert quarantine["exposures"].to_pyarrow()["row_number"].to_pylist() == [3]
    (report,) = (report for report in reports if report["table"] == "exposures")
    assert (report["rows"]["in"], report["rows"]["duplicates"]) == (5, 1)
