"""Datasets that a crash cannot leave half-written."""

from __future__ import annotations

import ibis
import pyarrow as pa
import pytest
from kedro.io.core import DatasetError

from fathom.batch import Batch, Ragged
from fathom.increments import Carry, State, Update
from fathom.pipelines.datasets import (
    AtomicDataset,
    CarryDataset,
    FolderDataset,
    RawDataset,
    SnapshotsDataset,
    TableDataset,
    TablesDataset,
)


@pytest.fixture(autouse=True)
def _own_engine():
    """A query that fails leaves its connection with an unfinished result."""
    before = ibis.options.default_backend
    ibis.set_backend(ibis.duckdb.connect())
    yield
    ibis.options.default_backend = before


def _rows(table):
    return table.to_pyarrow().to_pylist()


def test_a_table_is_the_same_after_saving_and_loading(tmp_path):
    dataset = TableDataset(str(tmp_path / "t.parquet"))
    assert not dataset.exists()
    dataset.save(ibis.memtable({"a": [1, 2], "b": ["x", None]}))
    assert _rows(dataset.load()) == [{"a": 1, "b": "x"}, {"a": 2, "b": None}]
    dataset.save(pa.table({"a": [3]}))  # Arrow too
    assert _rows(dataset.load()) == [{"a": 3}]
    assert dataset.exists()


def test_a_save_that_fails_leaves_what_was_there(tmp_path):
    dataset = TableDataset(str(tmp_path / "t.parquet"))
    dataset.save(pa.table({"a": [1]}))
    broken = ibis.memtable({"a": ["x"]}).mutate(b=ibis._.a.cast("int64"))
    with pytest.raises(DatasetError, match="Could not convert string 'x' to INT64"):
        dataset.save(broken)
    assert _rows(dataset.load()) == [{"a": 1}]
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


def test_a_folder_of_tables_is_replaced_as_a_whole(tmp_path):
    dataset = TablesDataset(str(tmp_path / "views"))
    dataset.save({"old": pa.table({"a": [1]}), "kept": pa.table({"a": [2]})})
    dataset.save({"kept": pa.table({"a": [3]})})
    assert {name: _rows(table) for name, table in dataset.load().items()} == {"kept": [{"a": 3}]}


def test_a_raw_table_that_is_optional_may_be_absent(tmp_path):
    assert RawDataset(str(tmp_path), "interactions", optional=True).load() is None
    with pytest.raises(DatasetError, match=r"holds no \*\.parquet file"):
        RawDataset(str(tmp_path), "exposures").load()


def test_raw_partitions_know_their_name(tmp_path):
    dataset = RawDataset(str(tmp_path / "raw"), "exposures")
    dataset.save({"2017-W01": pa.table({"a": ["x"]}), "2017-W02": pa.table({"a": ["y"]})})
    rows = dataset.load().order_by("row_number").select("a", "partition").to_pyarrow().to_pylist()
    assert rows == [{"a": "x", "partition": "2017-W01"}, {"a": "y", "partition": "2017-W02"}]


def test_an_object_that_saves_itself_to_a_folder(tmp_path):
    import numpy as np

    batch = Batch(
        numeric=np.ones((2, 1), np.float32),
        deep_ids=np.zeros((2, 0), np.int32),
        deep_bags=(Ragged.of([[1], [2, 3]], np.int32),),
        wide_ids=np.zeros((2, 1), np.int32),
        wide_bags=(),
    )
    dataset = FolderDataset(str(tmp_path / "batch"), "fathom.batch.Batch")
    dataset.save(batch)
    assert dataset.load().deep_bags[0].values.tolist() == [1, 2, 3]


def test_any_single_file_dataset_can_be_wrapped(tmp_path):
    path = tmp_path / "figures.json"
    dataset = AtomicDataset({"type": "json.JSONDataset", "filepath": str(path)})
    dataset.save({"auc": 0.5})
    assert dataset.load() == {"auc": 0.5}
    with pytest.raises(DatasetError, match="not JSON serializable"):
        dataset.save({"auc": {1, 2}})
    assert dataset.load() == {"auc": 0.5}
    assert [file.name for file in tmp_path.iterdir()] == ["figures.json"]


def _update(step, *values, anew=False):
    return Update(ibis.memtable({"a": list(values)}), step, anew, "lineage")


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_snapshots_grow_by_files_that_are_named_by_their_last_step(tmp_path):
    dataset = SnapshotsDataset(str(tmp_path / "views"))
    assert not dataset.exists()
    dataset.save({"acts": _update(3, 1, anew=True), "other": _update(3, 7, anew=True)})
    dataset.save({"acts": _update(12, 2)})
    dataset.save({"acts": _update(12, 2, 3)})  # as a run that was killed does when run again
    assert _names(tmp_path / "views" / "acts") == ["000003.parquet", "000012.parquet"]
    assert _rows(dataset.load()["acts"].order_by("a")) == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert _rows(dataset.load()["other"]) == [{"a": 7}]
    assert dataset.exists()
    dataset.save({"acts": _update(15, 9, anew=True), "other": None, "never there": None})
    assert _names(tmp_path / "views" / "acts") == ["000015.parquet"]
    assert set(dataset.load()) == {"acts"}


@pytest.mark.parametrize("anew", [False, True])
def test_snapshots_whose_save_fails_stay_as_they_were(tmp_path, anew):
    dataset = SnapshotsDataset(str(tmp_path / "views"))
    dataset.save({"acts": _update(3, 1, anew=True)})
    broken = ibis.memtable({"a": ["x"]}).mutate(a=ibis._.a.cast("int64"))
    with pytest.raises(DatasetError, match="Could not convert string 'x' to INT64"):
        dataset.save({"acts": Update(broken, 4, anew, "lineage")})
    assert _rows(dataset.load()["acts"]) == [{"a": 1}]
    assert _names(tmp_path / "views") == ["acts"]
    assert _names(tmp_path / "views" / "acts") == ["000003.parquet"]


def test_what_a_killed_writer_left_is_not_read(tmp_path):
    dataset = SnapshotsDataset(str(tmp_path / "views"))
    dataset.save({"acts": _update(3, 1, anew=True)})
    for workshop in ("views/.acts.x7", "views/acts/.000004.parquet.x7"):
        (tmp_path / workshop).mkdir()
        (tmp_path / workshop / "000004.parquet").write_text("half a file")
    assert {name: _rows(table) for name, table in dataset.load().items()} == {"acts": [{"a": 1}]}


def test_what_is_carried_remembers_the_files_it_belongs_to(tmp_path):
    views, packed = (SnapshotsDataset(str(tmp_path / name)) for name in ("views", "packed"))
    folders = (str(tmp_path / name) for name in ("carry", "views", "packed"))
    carry = CarryDataset(*folders)
    assert carry.load() == {}
    views.save({"acts": _update(3, 1, anew=True)})
    packed.save({"acts_packed": _update(3, 1, anew=True)})
    state = State(until=3, lineage="l", definition="d", rests_on={"log": "1 row"})
    carry.save({"acts": Carry(state, {"__sums": ibis.memtable({"n": [5]})})})
    past = carry.load()["acts"]
    assert past.state == state
    assert _rows(past.parts["__sums"]) == [{"n": 5}]
    assert past.files == past.found
    assert list(past.found) == [
        "carry/__sums.parquet",
        "views/000003.parquet",
        "packed/000003.parquet",
    ]
    views.save({"acts": _update(4, 2)})
    changed = carry.load()["acts"]
    assert set(changed.found) - set(changed.files) == {"views/000004.parquet"}
    carry.save({"acts": None})
    assert carry.load() == {}


@pytest.mark.parametrize("kept", [0, 3, 100])
def test_a_carried_table_that_was_cut_short_is_noticed_before_it_is_read(tmp_path, kept):
    carry = CarryDataset(*(str(tmp_path / name) for name in ("carry", "views", "packed")))
    state = State(until=3, lineage="l", definition="d", rests_on={})
    carry.save({"acts": Carry(state, {"__sums": ibis.memtable({"n": [5]})})})
    path = tmp_path / "carry" / "acts" / "__sums.parquet"
    path.write_bytes(path.read_bytes()[:kept])
    past = carry.load()["acts"]
    assert past.files != past.found
    assert past.parts == {}


def test_the_file_says_which_computation_it_is_of(tmp_path):
    """Else files of equal size and bounds could not be told apart."""
    import pyarrow.parquet as pq

    SnapshotsDataset(str(tmp_path)).save({"acts": _update(3, 1, anew=True)})
    assert pq.read_metadata(tmp_path / "acts/000003.parquet").metadata[b"lineage"] == b"lineage"
