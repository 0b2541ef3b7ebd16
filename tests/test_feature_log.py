"""The feature log: exactly what the model saw, and nothing that scoring has to wait for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fathom import feature_log
from fathom.batch import Ragged
from fathom.encoding import with_ratios
from fathom.feature_log import FeatureLog, Served, rows_of, segments, together
from fathom.feature_store import frame_of
from fathom.online import Known
from small_ranker import SPEC, plain_frame

MOMENT = datetime(2024, 2, 1, 10, 0, 0, 123_456, tzinfo=timezone.utc)
AS_OF = datetime(2024, 2, 1, tzinfo=timezone.utc)
LATER = AS_OF + timedelta(hours=1)


def served(request: str = "r1", rows: int = 3, **changes: Any) -> Served:
    """A request of one user with several candidates."""
    frame = plain_frame(rows)
    known = {
        "user": True,
        "items": np.arange(rows) % 2 == 0,
        "expired": 2,
        "degraded": False,
        "user_as_of": LATER,
        "tables_as_of": AS_OF,
        "rows": {"users": LATER},
    }
    return Served(
        request,
        "u3",
        [f"i{i}" for i in range(rows)],
        MOMENT,
        {name: frame[name] for name in SPEC.by_name},
        Known(**known | changes),
        np.linspace(0.1, 0.9, rows),
    )


def read(folder: Path) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in segments(folder)])


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_row_is_what_the_model_saw_bit_for_bit(tmp_path: Path):
    odd = served()
    frame = dict(odd.frame)
    frame["discount"] = np.float32([np.nan, -0.0, 1e-45])
    frame["genre"] = np.array([None, "", "té"], object)
    frame["tags"] = Ragged.of([["a", "b"], [], [""]])
    odd = Served(**vars(odd) | {"frame": with_ratios(frame, SPEC)})
    log = FeatureLog(tmp_path, SPEC, "v1")
    assert log.put(odd)
    log.close()
    found = frame_of(read(tmp_path))
    for column in SPEC.columns:
        ours, theirs = found[column.name], odd.frame[column.name]
        if isinstance(theirs, Ragged):
            assert isinstance(ours, Ragged)
            assert ours.values.tolist() == theirs.values.tolist()
            assert ours.offsets.tolist() == theirs.offsets.tolist()
        elif column.is_numeric:
            assert ours.dtype == np.float32
            assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()
        elif column.name not in {"user_id", "item_id"}:
            assert np.asarray(ours).tolist() == np.asarray(theirs).tolist()
    assert np.asarray(found["probability"]).tolist() == odd.probabilities.tolist()


def test_a_row_says_who_was_shown_what_when_and_as_of_when():
    answered = replace(served(), how="canary", seconds=0.0125, slots=np.array([2, 0, 1]))
    table = rows_of(answered, SPEC, "v1")
    assert table.column_names[:3] == ["user_id", "item_id", "event_timestamp"]
    first = table.to_pylist()[0]
    expected = {
        "user_id": "u3",
        "item_id": "i0",
        "event_timestamp": MOMENT,
        "_request": "r1",
        "_candidate": 0,
        "_version": "v1",
        "_user_known": True,
        "_item_known": True,
        "_degraded": False,
        "_expired": 2,
        "_how": "canary",
        "_milliseconds": 12.5,
        "_slot": 2,
        "_user_as_of": LATER,
        "_tables_as_of": AS_OF,
        "_row_users": LATER,
        "_row_user_id_interactions": None,
        "_row_user_id_genre_interactions_packed": None,
    }
    assert {name: first[name] for name in expected} == expected
    assert table["item_id"].to_pylist() == ["i0", "i1", "i2"]
    assert table["_item_known"].to_pylist() == [True, False, True]


def test_a_log_of_many_requests_is_in_order_and_has_one_schema(tmp_path: Path):
    log = FeatureLog(tmp_path, SPEC, "v1", segment_rows=500)
    for i in range(700):
        # A column that is empty in one request has a type all the same.
        rows = 1 + i % 2
        assert log.put(served(f"r{i}", rows))
    log.close(60)
    table = read(tmp_path)
    assert len(segments(tmp_path)) == 3
    assert len(table) == 1050
    names = [f"r{i}" for i in range(700) for _ in range(1 + i % 2)]
    assert table["_request"].to_pylist() == names
    for path in segments(tmp_path):
        assert path.parent.name == "v1"
        requests = pq.read_table(path)["_request"].to_pylist()
        assert len(requests) in {500, 501, 50, 49, 48}


def test_a_segment_is_closed_after_a_while_though_it_is_small(tmp_path: Path):
    log = FeatureLog(tmp_path, SPEC, "v1", segment_seconds=0.05)
    assert log.put(served())
    wait_until(lambda: len(segments(tmp_path)) == 1)
    assert log.put(served("r2"))
    wait_until(lambda: len(segments(tmp_path)) == 2)
    log.close()
    assert read(tmp_path)["_request"].to_pylist() == ["r1"] * 3 + ["r2"] * 3


def test_what_does_not_fit_the_queue_is_dropped_at_once_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The disk hangs, say; scoring does not."""
    goes_on = threading.Event()
    genuine = feature_log.rows_of

    def slow(*arguments: Any) -> pa.Table:
        goes_on.wait(30)
        return genuine(*arguments)

    monkeypatch.setattr(feature_log, "rows_of", slow)
    dropped: list[int] = []
    log = FeatureLog(tmp_path, SPEC, "v1", queued_rows=10, dropped=dropped.append)
    requests = [served(f"r{i}") for i in range(8)]
    started = time.perf_counter()
    kept = [log.put(request) for request in requests]
    assert time.perf_counter() - started < 1
    # Three of three rows each fit, and the one that is being written has left the queue.
    assert sum(kept) in {3, 4}
    assert sum(dropped) == 3 * (8 - sum(kept))
    goes_on.set()
    log.close()
    assert len(read(tmp_path)) == 3 * sum(kept)


def test_a_segment_that_cannot_be_written_is_counted_and_the_log_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    folder = tmp_path / "log"
    folder.write_text("in the way")
    dropped: list[int] = []
    log = FeatureLog(folder, SPEC, "v1", segment_seconds=0.05, dropped=dropped.append)
    log.put(served())
    wait_until(lambda: dropped == [3])
    assert "cannot write a segment of the feature log" in caplog.text
    folder.unlink()
    log.put(served("r2"))
    wait_until(lambda: len(segments(folder)) == 1)
    log.close()
    assert set(read(folder)["_request"].to_pylist()) == {"r2"}


def test_a_request_that_cannot_be_converted_is_counted_and_the_others_stay(tmp_path: Path):
    dropped: list[int] = []
    log = FeatureLog(tmp_path, SPEC, "v1", dropped=dropped.append)
    broken = Served(**vars(served("broken")) | {"frame": {}})
    for request in (served("a"), broken, served("b")):
        log.put(request)
    log.close()
    assert dropped == [3]
    assert read(tmp_path)["_request"].to_pylist() == ["a"] * 3 + ["b"] * 3


def test_the_oldest_segments_make_room_whichever_version_they_are_of(tmp_path: Path):
    FeatureLog(tmp_path, SPEC, "older").close()
    for version in ("older", "newer"):
        log = FeatureLog(tmp_path, SPEC, version, segment_rows=3)
        for i in range(4):
            log.put(served(f"{version}{i}"))
        log.close()
    sizes = [path.stat().st_size for path in segments(tmp_path)]
    assert len(sizes) == 8
    log = FeatureLog(tmp_path, SPEC, "newer", most_bytes=max(sizes) * 3, segment_rows=3)
    log.put(served("last"))
    log.close()
    names = set(read(tmp_path)["_request"].to_pylist())
    assert names == {"newer2", "newer3", "last"}


def test_what_a_killed_writer_left_is_no_segment_and_goes_some_day(tmp_path: Path):
    old, new = (tmp_path / "v1" / f".{name}.parquet.x" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "half.parquet").write_bytes(b"PAR")
    two_hours_ago = time.time() - 7200
    os.utime(old, (two_hours_ago, two_hours_ago))
    assert segments(tmp_path) == []
    FeatureLog(tmp_path, SPEC, "v1").close()
    assert (old.exists(), new.exists()) == (False, True)


#: Logs requests r0, r1, … in segments of ten rows, until it is killed.
WRITER = """
import sys, time
from pathlib import Path
from fathom.feature_log import FeatureLog
from test_feature_log import SPEC, served

log = FeatureLog(Path(sys.argv[1]), SPEC, "v1", segment_rows=10)
i = 0
while True:
    log.put(served(f"r{i}", 1))
    i += 1
    if i == 200:
        print("many", flush=True)
    time.sleep(0.0005)
"""


def test_what_a_process_logged_before_it_was_killed_is_there_but_for_its_open_segment(
    tmp_path: Path,
):
    program = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}\n{WRITER}"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "many\n"
    wait_until(lambda: len(segments(tmp_path)) >= 20)
    process.kill()
    process.communicate()
    found = read(tmp_path)["_request"].to_pylist()
    assert found == [f"r{i}" for i in range(len(found))], "no row twice, none left out"
    assert len(found) >= 200
    assert len(found) % 10 == 0, "whole segments alone"
    # The next process goes on beside what is left.
    log = FeatureLog(tmp_path, SPEC, "v1")
    log.put(served("next", 1))
    log.close()
    assert read(tmp_path)["_request"].to_pylist() == [*found, "next"]


def test_segments_of_an_earlier_release_are_read_with_what_they_lack_missing():
    new = rows_of(served(), SPEC, "v1")
    old = new.drop_columns(["_how", "_milliseconds"])
    assert together([old, new])["_how"].to_pylist() == [None] * 3 + ["champion"] * 3


def test_a_folder_that_is_not_there_has_no_segments(tmp_path: Path):
    assert segments(tmp_path / "nowhere") == []
