"""`kedro watch` killed at every step, met by another watch, and given partitions with faults.

A shop of films delivers a file a week. The first eight weeks made a champion.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

import forks
from fathom import decisions
from fathom.artifact import verify
from fathom.files import locked
from fathom.gate import GateConfig
from fathom.registry import Registry
from fathom.watch import NEEDS_PERSON, STEPS
from films import cards, deliver, make_films
from projects import Project

pytestmark = pytest.mark.e2e

FORKED = str(Path(forks.__file__).with_name("forked_watch.py"))
WEEK = "2026-W09"

#: Within the step `retrain`, what its process says when it begins.
WITHIN_RETRAIN = ["retrain_champion", "catch_up", "package"]


@dataclass(frozen=True)
class Watched:
    """A project and what its watch left."""

    project: Project
    params: str

    @property
    def data(self) -> Path:
        return self.project.folder / "data/films"

    @property
    def registry(self) -> Registry:
        return Registry(self.data / "06_models/registry")

    @property
    def journal(self) -> dict:
        path = self.data / "08_reporting/watch.json"
        return json.loads(path.read_text()) if path.exists() else {"partitions": {}}

    @property
    def arguments(self) -> tuple[str, ...]:
        return (FORKED, "watch", "--once", "--env", "films", "--params", self.params)

    def log(self, step: str) -> Path:
        return self.data / f"08_reporting/watch/{step}.log"

    def began(self, step: str) -> float:
        """When a step's process was last started."""
        return self.log(step).stat().st_mtime if self.log(step).exists() else 0.0

    def watch(self, *more: str):
        environment = self.project.environment
        return forks.python(
            *self.arguments, *more, folder=self.project.folder, environment=environment
        )

    def killed(self, condition, seconds: float = 0.2) -> None:
        environment = self.project.environment
        forks.kill_when(
            lambda _: condition(),
            *self.arguments,
            folder=self.project.folder,
            seconds=seconds,
            environment=environment,
        )

    def killed_at(self, step: str, line: str = "Running node") -> None:
        """Kill it with its processes, a while after a step's has logged a line."""
        start = time.time()

        def reached() -> bool:
            return self.began(step) > start and line in self.log(step).read_text()

        self.killed(reached)

    def deliver(self, name: str, lines: list[str]) -> Path:
        return deliver(self.project, name, lines)

    def alerts(self) -> list[str]:
        """Of whom and of what kind they are in the history of decisions."""
        found = decisions.read(self.data / "08_reporting/decisions.jsonl")
        kinds = [(each["partition"], each["alerts"][0]) for each in found if "partition" in each]
        return [f"{name}: {said.split(':')[0]}" for name, said in kinds]


def weeks(lines: list[str], first: str, last: str) -> list[str]:
    return [line for line in lines if first <= line.split(",")[2] < last]


#: In the ninth week people watch half as much, and the monitor sees both that and its end.
LINES = cards(rows=3600, days=74, tired=("2026-02-23", "2026-03-02"))
#: A gate that lets pass what has sane figures: here it is not what is tested.
MARGINS = [f"gate.{name}=9" for name in GateConfig.model_fields if name.endswith("margin")]
MONITORING = ["monitoring.min_labels=10", "monitoring.draws=20"]
RETRAINING = ["retraining.validation_days=2", "retraining.test_days=2"]
PARAMS = ",".join([*MARGINS, "gate.calibration_hi=9", *MONITORING, *RETRAINING])


@pytest.fixture(scope="module")
def watched(root, tmp_path_factory) -> Watched:
    folder = tmp_path_factory.mktemp("watched")
    project = make_films(root, folder, weeks(LINES, "2026-01-01", "2026-02-23"))
    done = project.forked("run", "--env", "films")
    assert done.returncode == 0, done.stderr[-4000:]
    return Watched(project, PARAMS)


def test_killed_at_every_step_it_goes_on_and_nothing_is_doubled(watched: Watched):
    first = watched.registry.champion()
    deliver(watched.project, "second.csv", weeks(LINES, "2026-02-23", "2026-03-02"))
    finished: dict[str, float] = {}  # when each step began that was not at work when it was killed
    for number, step in enumerate(STEPS):
        watched.killed_at(step)
        entry = watched.journal["partitions"].get(WEEK)
        assert entry is None if step == "ingest" else entry["step"] == step
        verify(watched.registry.path(watched.registry.champion()))
        assert {each: watched.began(each) for each in finished} == finished  # not done again
        finished = {each: watched.began(each) for each in STEPS[1:number]}
    for node in WITHIN_RETRAIN:
        watched.killed_at("retrain", f"Running node: {node}:")
        assert watched.registry.champions() == [first]
        verify(watched.registry.path(first))
    watched.killed(lambda: watched.registry.champion() != first, seconds=0)

    ended = watched.watch()
    assert ended.returncode == 0, ended.stdout + ended.stderr[-3000:]
    assert "goes on with retrain" in ended.stdout
    assert "has come meanwhile" in ended.stdout
    entry = watched.journal["partitions"][WEEK]
    champion = watched.registry.champion()
    assert entry["state"] == "done"
    assert entry["released"] == champion != first
    assert watched.registry.champions() == [first, champion]
    assert watched.registry.versions() == sorted([first, champion])
    verify(watched.registry.path(champion))
    made = watched.registry.described(champion)["provenance"]
    assert made["trained_until"][:10] == "2026-03-02"  # with what it was validated and judged on
    assert made["validated_from"][:10] == "2026-02-26"
    assert watched.data.joinpath("06_models/candidate_version.txt").read_text() == made["judged"]
    done = watched.registry.history()[-1]
    assert done["reason"].startswith(f"caught up from {made['judged']}, which was judged; pass: ")


def test_a_second_watch_leaves_at_once_and_a_third_finds_nothing_to_do(watched: Watched):
    with locked(watched.data / "08_reporting/watch.lock"):
        before = watched.began("ingest")
        second = watched.watch()
        assert second.returncode == 0
        assert second.stdout.strip() == "another watch is at work; this one leaves"
        assert watched.began("ingest") == before
    before = {step: watched.began(step) for step in STEPS[1:]}
    third = watched.watch()
    assert third.returncode == 0
    assert third.stdout.strip().endswith("nothing needs you")
    assert {step: watched.began(step) for step in STEPS[1:]} == before


def test_faulty_deliveries_are_alerts_once_and_nothing_is_trained_on_them(watched: Watched):
    champion, before = watched.registry.champion(), watched.began("validate")

    empty = watched.deliver("empty.csv", [])
    assert "source: empty: " in needs_person(watched.watch())
    empty.unlink()

    copy = watched.deliver("copy.csv", weeks(LINES, "2026-02-23", "2026-03-02"))
    late = [line.replace("2026-01-0", "2025-12-0") for line in LINES[:200]]
    watched.deliver("late.csv", late)
    for _ in range(2):
        said = needs_person(watched.watch())
        assert "cards/copy.csv has the content of data/00_external/cards/second.csv" in said
        assert f"{WEEK}: duplicated: " in said
        assert "2025-W49: late: " in said
    # The second time, nothing is written again.
    assert watched.alerts() == [
        "source: empty",
        "2025-W49: late",
        f"{WEEK}: duplicated",
        "source: duplicated",
    ]
    copy.unlink()

    broken = watched.deliver("third.csv", [])
    broken.write_text("user,film\n1,tt1\n")
    assert "source: " in needs_person(watched.watch())

    assert watched.registry.champion() == champion
    assert watched.began("validate") == before  # no step but the first


def test_a_partition_with_too_many_bad_rows_is_not_gone_on_with_until_it_is_mended(
    watched: Watched,
):
    """All of the log together would have borne them."""
    third = weeks(LINES, "2026-03-02", "2026-03-09")
    bad = [f"{line.rsplit(',', 1)[0]},many" for line in third[:20]]
    before = watched.began("features")
    watched.deliver("third.csv", [*bad, *third[20:]])
    said = needs_person(watched.watch("--dismiss", "2025-W49"))
    assert "2026-W10: malformed: 5." in said
    assert "late" not in said
    assert watched.began("features") == before
    assert watched.journal["partitions"]["2026-W10"]["step"] == "validate"


def test_a_retraining_that_fails_leaves_the_champion_and_is_not_repeated(watched: Watched):
    watched.deliver("third.csv", weeks(LINES, "2026-03-02", "2026-03-09"))
    champion = watched.registry.champion()
    # The data have grown enough to ask for it, but for the cool-down.
    asked = f"{PARAMS},monitoring.cool_down=0,training.deep_learning_rate=1e30"
    exploding = Watched(watched.project, asked)
    assert "not finite" in needs_person(exploding.watch())
    assert watched.registry.champion() == champion
    assert watched.journal["partitions"]["2026-W10"]["state"] == "failed"
    before = watched.began("retrain")
    needs_person(watched.watch())
    assert watched.began("retrain") == before
    assert watched.watch("--dismiss", "2026-W10").returncode == 0


def needs_person(done) -> str:
    """What a watch said at its end, which asks for one."""
    assert done.returncode == NEEDS_PERSON, done.stdout + done.stderr[-3000:]
    _, said = done.stdout.split("This needs you:")
    return said
