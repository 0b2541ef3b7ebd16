"""Datasets that a crash cannot leave half-written."""

from __future__ import annotations

import ibis
import pyarrow as pa
import pytest
from kedro.io.core import DatasetError

from fathom.batch import Batch, Ragged
from fathom.pipelines.datasets import (
    AtomicDataset,
    FolderDataset,
    RawDataset,
    TableDataset,
    TablesDataset,
)


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
