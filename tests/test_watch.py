"""What `kedro watch` makes of the partitions that it finds, and in which order."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fathom.arrivals import ArrivalError, Delivery, Entry, Journal, Partition, look, news, plan
from fathom.files import locked
from fathom.registry import Registry
from fathom.watch import NEEDS_PERSON, PIPELINES, Watch, WatchConfig, _launch

MONDAY = datetime(2026, 1, 5, tzinfo=timezone.utc)


def week(number: int, content: str = "", **others) -> Partition:
    """A partition of a hundred rows; of other content with another ``content``."""
    since = MONDAY + timedelta(weeks=number)
    given = {
        "name": f"2026-W{number:02}",
        "fingerprint": f"100:{number}{content}",
        "rows": 100,
        "repeated": 0,
        "since": since,
        "until": since + timedelta(days=6),
    }
    return Partition(**given | others)


def after(found: list[Partition], known: dict[str, Entry], **others) -> dict[str, Entry]:
    """The journal when all that is open in a plan has been done."""
    planned = plan(found, known, others.pop("measured", None), **others)
    return {n: e.but(state="done") if e.state == "open" else e for n, e in planned.items()}


def states(entries: dict[str, Entry]) -> dict[str, str]:
    return {name: entry.state for name, entry in entries.items()}


@pytest.fixture
def known() -> dict[str, Entry]:
    """Weeks 1 and 2, both done."""
    return after([week(1), week(2)], {}, measured=MONDAY)


# -- what is new ------------------------------------------------------------------------------


def test_on_the_first_watch_what_the_champion_was_measured_on_is_seen():
    found = [week(1), week(2), week(3)]
    planned = plan(found, {}, measured=week(2).until)
    assert states(planned) == {"2026-W01": "seen", "2026-W02": "seen", "2026-W03": "open"}


def test_on_the_first_watch_without_a_champion_only_the_newest_is_a_reason_to_train():
    planned = plan([week(1), week(2), week(3)], {}, measured=None)
    assert states(planned) == {"2026-W01": "seen", "2026-W02": "seen", "2026-W03": "open"}


def test_what_was_done_is_not_done_again_and_news_come_oldest_first(known):
    planned = plan([week(1), week(2), week(3), week(4)], known, measured=None)
    assert list(states(planned).items()) == [
        ("2026-W01", "done"),
        ("2026-W02", "done"),
        ("2026-W03", "open"),
        ("2026-W04", "open"),
    ]


def test_what_was_interrupted_goes_on_where_it_was(known):
    known["2026-W02"] = known["2026-W02"].but(state="open", step="retrain", version="v1")
    planned = plan([week(1), week(2)], known, measured=None)
    assert planned["2026-W02"] == known["2026-W02"]


def test_the_newest_partition_may_grow(known):
    planned = plan([week(1), week(2, "and Sunday", rows=120)], known, measured=None)
    assert states(planned) == {"2026-W01": "done", "2026-W02": "open"}
    assert planned["2026-W02"].step is None


def test_a_replay_takes_a_partition_and_all_later_ones_again(known):
    found = [week(1), week(2), week(3)]
    planned = plan(found, known, measured=None, replay="2026-W02")
    assert states(planned) == {"2026-W01": "done", "2026-W02": "open", "2026-W03": "open"}
    fresh = plan(found, {}, measured=week(3).until, replay="2026-W02")
    assert states(fresh) == {"2026-W01": "seen", "2026-W02": "open", "2026-W03": "open"}
    with pytest.raises(ArrivalError, match=r"no partition '2025-W01'; there are 2026-W01, 2026"):
        plan(found, known, measured=None, replay="2025-W01")


# -- what needs a person ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("partition", "alert"),
    [
        (week(3, rows=0, since=None, until=None), "empty: it has no row"),
        (week(3, fault="no magic bytes", rows=0), "malformed: no magic bytes"),
        (week(3, since=None, until=None), "malformed: none of its 100 rows has a readable event"),
        (week(3, fingerprint=week(1).fingerprint), "duplicated: it has the rows of 2026-W01"),
        (week(0), "late: it arrived after the one that begins 2026-01-19 was handled"),
    ],
)
def test_a_faulty_partition_is_an_alert_and_nothing_is_trained_on_it(known, partition, alert):
    planned = plan([week(1), week(2), partition], known, measured=None)
    entry = planned[partition.name]
    assert entry.state == "alert"
    assert entry.trouble[0].startswith(alert)
    assert plan([week(1), week(2), partition], planned, None) == planned  # said once


def test_rows_that_come_late_into_a_partition_that_was_handled_are_an_alert(known):
    planned = plan([week(1, "and more"), week(2)], known, measured=None)
    assert planned["2026-W01"].trouble == (
        "late: its rows changed after the one that begins 2026-01-19 was handled",
    )


def test_the_same_rows_again_are_an_alert_until_they_are_taken_out(known):
    doubled = plan([week(1, rows=200, repeated=100), week(2)], known, measured=None)
    assert doubled["2026-W01"].trouble == ("duplicated: 100 of its rows came again",)
    mended = plan([week(1), week(2)], doubled, measured=None)
    assert mended == known


def test_of_two_alike_the_one_that_was_handled_is_the_original(known):
    """Whatever their names' order."""
    copy = week(3, name="2026-W00 copy", fingerprint=week(2).fingerprint)
    planned = plan([week(1), copy, week(2)], known, measured=None)
    assert states(planned)["2026-W02"] == "done"
    assert planned["2026-W00 copy"].trouble == ("duplicated: it has the rows of 2026-W02",)


def test_a_mended_partition_is_taken_up_although_later_ones_were_handled(known):
    broken = week(3, rows=0, since=None, until=None)
    known = after([week(1), week(2), broken], known)
    known = after([week(1), week(2), broken, week(4)], known)
    assert states(known)["2026-W03"] == "alert"
    planned = plan([week(1), week(2), week(3, "mended"), week(4)], known, measured=None)
    assert planned["2026-W03"].state == "open"
    assert planned["2026-W03"].trouble == ()


def test_a_faulty_partition_makes_none_before_it_late(known):
    """It was not handled, so nothing of it speaks against those."""
    known["2026-W04"] = known["2026-W02"].but(state="alert", since=week(4).since, alerts=("bad",))
    planned = plan([week(1), week(2), week(3)], known, measured=None)
    assert planned["2026-W03"].state == "open"


def test_an_alert_ends_with_its_partition_and_what_was_done_stays_known(known):
    known = after([week(1), week(2), week(3, rows=0, since=None, until=None)], known)
    planned = plan([week(2)], known, measured=None)
    assert states(planned) == {"2026-W01": "done", "2026-W02": "done"}


def test_a_file_that_says_nothing_new_is_named():
    before = news({"a": "1"}, "raw", Delivery())
    assert before.alerts == ()
    assert news({"a": "1", "b": "2"}, "raw and b", before).alerts == ()
    assert news({"b": "1"}, "raw", before).alerts == ()  # only its name is new
    assert news({"a": "1", "b": "1"}, "raw of both", before).alerts == (
        "duplicated: b has the content of a",
    )
    empty = news({"a": "1", "b": "2"}, "raw", before)
    assert empty.alerts == ("empty: b came and added no row to any table",)
    assert news({"a": "1", "b": "2"}, "raw", empty) == empty  # until it is mended
    assert news({"a": "1", "b": "3"}, "raw and b", empty).alerts == ()


# -- partitions as files ------------------------------------------------------------------------


def write(folder: Path, name: str, days: list[object], users: list[str] | None = None) -> None:
    users = users or [f"u{day}" for day in days]
    pq.write_table(
        pa.table({"user": users, "event_timestamp": pa.array(days)}), folder / f"{name}.parquet"
    )


def day(number: int) -> datetime:
    return MONDAY + timedelta(days=number)


def test_a_partition_is_its_distinct_rows_in_any_order(tmp_path):
    write(tmp_path, "1", [day(0), day(1), day(2)], ["a", "b", "c"])
    write(tmp_path, "2", [day(2), day(0), day(1), day(0)], ["c", "a", "b", "a"])
    write(tmp_path, "3", [day(0), day(1), day(2)], ["a", "b", "d"])
    one, two, three = sorted(look(tmp_path), key=lambda p: p.name)
    assert one.fingerprint == two.fingerprint != three.fingerprint
    assert (one.rows, one.repeated) == (3, 0)
    assert (two.rows, two.repeated) == (4, 1)
    assert (one.since, one.until) == (day(0), day(2))


def test_partitions_come_by_time_and_those_without_one_last(tmp_path):
    write(tmp_path, "b", [day(0)])
    write(tmp_path, "a", [day(7)])
    write(tmp_path, "c", ["soon", "later"])
    write(tmp_path, "d", ["2026-01-20", "soon"])
    pq.write_table(pq.read_table(tmp_path / "a.parquet").slice(1), tmp_path / "e.parquet")
    (tmp_path / "f.parquet").write_bytes(b"no parquet")
    found = look(tmp_path)
    assert [p.name for p in found] == ["b", "a", "d", "c", "e", "f"]
    assert found[4].rows == 0
    assert "f.parquet" in str(found[5].fault)


# -- the journal and the watch itself -------------------------------------------------------------


def test_the_journal_is_what_was_saved(tmp_path, known):
    path = tmp_path / "watch.json"
    assert Journal.load(path) == Journal()
    entry = known["2026-W02"].but(alerts=("empty",), seconds={"monitor": 1.5})
    journal = Journal(source=Delivery(files={"a": "1"})).put("2026-W02", entry)
    journal.save(path)
    assert Journal.load(path) == journal
    path.write_text("{}}")
    with pytest.raises(ArrivalError, match=r"(?s)watch\.json cannot be read .* restore it"):
        Journal.load(path)


@pytest.fixture
def watching(tmp_path):
    """A watch of an empty registry, and what it says."""
    said: list[str] = []
    names = ("journal", "logs", "history", "raw", "validation", "decision", "release")
    config = WatchConfig(**{name: tmp_path / f"{name}.json" for name in names})
    return Watch(config, Registry(tmp_path / "registry"), [], None, said.append), config, said


def test_a_second_watch_leaves_cleanly(watching):
    watch, config, said = watching
    with locked(config.journal.with_suffix(".lock")):
        assert watch.run(None, None, ()) == 0
    assert said == ["another watch is at work; this one leaves"]
    assert not config.journal.exists()


def test_a_source_that_cannot_be_read_needs_a_person(watching, tmp_path, monkeypatch):
    """There is no Kedro project here, so the step fails."""
    monkeypatch.chdir(tmp_path)
    watch, config, said = watching
    assert watch.run(None, None, ()) == NEEDS_PERSON
    assert said[-1].startswith("This needs you:\n  source: ")
    assert "ingest.log)" in said[-1]
    assert Journal.load(config.journal).source.error is not None


def test_it_looks_again_after_the_interval_until_it_is_stopped(watching, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    watch, _, said = watching

    def say(line: str) -> None:
        said.append(line)
        if len(said) == 2:
            raise KeyboardInterrupt

    watch._say = say
    with pytest.raises(KeyboardInterrupt):
        watch.run(0.01, None, ())
    assert said[0] == said[1]


def test_the_lock_is_held_until_the_steps_process_has_ended(tmp_path):
    """Even if the watch was killed: the process has inherited it."""
    path = tmp_path / "watch.lock"
    with open(tmp_path / "log", "wb") as log, locked(path) as lock:
        assert _launch(["sh", "-c", "sleep 1 &"], log, lock) == 0
    with pytest.raises(BlockingIOError), locked(path):
        pass
    with locked(path, wait=True):
        pass


def test_only_what_is_in_the_journal_can_be_dismissed(watching, known):
    watch, config, _ = watching
    Journal(partitions=known).save(config.journal)
    with pytest.raises(ArrivalError, match=r"no partition 'x' to dismiss; there are source, 2026-"):
        watch.look(dismiss=["x"])


def test_trouble_that_somebody_has_looked_at_is_none(known):
    entry = known["2026-W01"].but(state="alert", alerts=("empty",), error="no disk")
    assert entry.trouble == ("empty", "no disk")
    assert entry.but(dismissed=True).trouble == ()


def test_every_step_runs_pipelines_that_there_are(root):
    from kedro.framework.project import pipelines
    from kedro.framework.startup import bootstrap_project

    bootstrap_project(root)
    named = ",".join(PIPELINES.values()).split(",")
    assert set(named) <= set(pipelines)
    assert len(set(named)) == len(named)
