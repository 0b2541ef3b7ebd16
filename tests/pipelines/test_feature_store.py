"""The training frame grows with the log, and is read anew when what it was read from changed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import ibis
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import small_store
from fathom.feature_store import FeatureStoreConfig
from fathom.pipelines.feature_store.nodes import apply_spec, materialise_online, read_training_frame
from small_store import DAY, START, a_spec

SPEC = a_spec(
    [c for c in small_store.COLUMNS if c["name"] in {"user_id", "item_id", "genre", "user_acts"}],
    [],
)
CONFIG = FeatureStoreConfig(folder="features")
FEATURES = {
    "until": (START + 40 * DAY).isoformat(),
    "lineages": {"user_id_interactions": "first"},
    "attributes": "same",
}


@pytest.fixture
def exposures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pa.Table:
    """Exposures of two weeks, each a partition; Feast holds their features."""
    monkeypatch.chdir(tmp_path)
    made = small_store.written(tmp_path, SPEC, small_store.generated())
    made.repo.apply(SPEC)
    rows = made.tables["exposures"].sort_by("event_timestamp")
    half = len(rows) // 2
    weeks = ["week 1"] * half + ["week 2"] * (len(rows) - half)
    return rows.append_column("partition", pa.array(weeks))


def read(
    exposures: pa.Table, before: tuple[Any, Any] = (None, None), **features: Any
) -> tuple[pa.Table, dict[str, Any]]:
    """The node, as Kedro runs it: the last frame comes from a file, the next one goes to one."""
    state = apply_spec(SPEC, CONFIG, FEATURES | features)
    frame, then = before
    if frame is not None:
        pq.write_table(frame, "last.parquet")
        frame = ibis.read_parquet("last.parquet")
    found, now = read_training_frame(ibis.memtable(exposures), state, frame, then, SPEC, CONFIG)
    return found.to_pyarrow(), now


def joined(caplog: pytest.LogCaptureFixture) -> int:
    """How many exposures the last call joined."""
    line = [r.getMessage() for r in caplog.records if r.getMessage().startswith("joining")][-1]
    return int(line.split()[1].replace(",", ""))


def rows_of(table: pa.Table) -> list[str]:
    return sorted(str(row) for row in table.to_pylist())


def test_a_new_partition_is_joined_alone_and_gives_the_whole_frame(
    exposures: pa.Table, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    first = exposures.filter(pa.compute.equal(exposures["partition"], "week 1"))
    early = read(first)
    assert joined(caplog) == len(first)
    grown, state = read(exposures, early)
    assert joined(caplog) == len(exposures) - len(first)
    whole, same = read(exposures)
    assert rows_of(grown) == rows_of(whole)
    assert state == same
    again, _ = read(exposures, (grown, state))
    assert joined(caplog) == 0
    assert rows_of(again) == rows_of(whole)


@pytest.mark.parametrize(
    "features",
    [
        {"lineages": {"user_id_interactions": "second"}},
        {"attributes": "others"},
        {"until": (START + 39 * DAY).isoformat()},
    ],
    ids=["another computation", "other attributes", "a shorter past"],
)
def test_features_of_another_computation_are_read_anew(
    exposures: pa.Table, caplog: pytest.LogCaptureFixture, features: dict[str, Any]
):
    caplog.set_level(logging.INFO)
    before = read(exposures)
    read(exposures, before, **features)
    assert joined(caplog) == len(exposures)


def test_a_partition_that_was_corrected_or_taken_back_reads_everything_anew(
    exposures: pa.Table, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    before = read(exposures)
    place = exposures.schema.get_field_index("bought")
    flipped = pa.compute.subtract(1, exposures["bought"]).combine_chunks().to_pylist()
    labels = pa.array([flipped[0], *exposures["bought"].to_pylist()[1:]])
    corrected = exposures.set_column(place, "bought", labels)
    read(corrected, before)
    assert joined(caplog) == len(exposures)
    first = exposures.filter(pa.compute.equal(exposures["partition"], "week 1"))
    shorter, _ = read(first, before)
    assert (joined(caplog), len(shorter)) == (len(first), len(first))


def test_a_run_that_died_between_the_frame_and_its_state_adds_nothing_twice(exposures: pa.Table):
    first = exposures.filter(pa.compute.equal(exposures["partition"], "week 1"))
    _, state = read(first)
    frame, _ = read(exposures, read(first))  # this frame was written, its state was not
    found, _ = read(exposures, (frame, state))
    assert len(found) == len(exposures)


def test_swapped_values_of_two_columns_are_another_partition(
    exposures: pa.Table, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    both = exposures.set_column(
        exposures.schema.get_field_index("slot"), "slot", exposures["shop"].combine_chunks()
    )
    before = read(both)
    keys = [exposures.schema.get_field_index(name) for name in ("user_id", "item_id")]
    names = list(exposures.column_names)
    swapped = both.set_column(keys[0], "user_id", both["item_id"]).set_column(
        keys[1], "item_id", both["user_id"]
    )
    assert swapped.column_names == names
    read(swapped, before)
    assert joined(caplog) == len(exposures)


def test_what_is_online_and_where(exposures: pa.Table):
    state = apply_spec(SPEC, CONFIG, FEATURES)
    assert state["views"] == ["items", "user_id_interactions"]
    online = materialise_online(state, SPEC, CONFIG)
    assert online == materialise_online(state, SPEC, CONFIG)
    assert online["needs"] == ["features/online.db", "features/registry.db"]
    assert online["until"] == FEATURES["until"]
