"""Versions and their one pointer, through crashes at every moment."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fathom import files
from fathom.cli import cli
from fathom.ranker import MANIFEST, ArtifactError, Ranker, verify
from fathom.registry import Registry, RegistryError


def artifact(folder: Path, version: str, content: str = "weights") -> str:
    """The least that is an artifact: a file, and a manifest that vouches for it."""
    weights = folder / "weights.safetensors"
    weights.write_text(f"{content} of {version}")
    manifest = {"version": version, "files": {weights.name: files.sha256(weights)}}
    files.write_json(folder / MANIFEST, manifest)
    return version


def add(registry: Registry, version: str) -> str:
    return registry.register(lambda folder: artifact(folder, version))


def damage(registry: Registry, version: str) -> None:
    with open(registry.path(version) / "weights.safetensors", "a") as file:
        file.write("!")


def history(registry: Registry) -> list[dict[str, str]]:
    lines = (registry.folder / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


@pytest.fixture
def two(registry: Registry) -> Registry:
    """Versions ``one`` and ``two``, of which the second is champion."""
    for version in ("one", "two"):
        add(registry, version)
        registry.promote(version, f"because of {version}")
    return registry


# --- registering -------------------------------------------------------------------------------


def test_an_empty_registry(registry):
    assert registry.versions() == []
    assert registry.champion() is None
    assert not registry.folder.exists()  # reading makes nothing


def test_a_registered_version_is_there_whole(registry):
    assert add(registry, "b") == "b"
    add(registry, "a")
    assert registry.versions() == ["a", "b"]
    assert registry.path("b") == registry.folder / "versions" / "b"
    assert verify(registry.path("b")) == "b"
    assert registry.champion() is None  # registering promotes nothing


def test_registering_the_same_again_changes_nothing(registry):
    add(registry, "one")
    before = content(registry.folder)
    written = []

    def write(folder: Path) -> str:
        written.append(folder)
        return artifact(folder, "one", content="other weights")

    assert registry.register(write) == "one"
    assert len(written) == 1
    assert content(registry.folder) == before


def test_a_damaged_version_is_mended_by_registering_it_again(two):
    damage(two, "two")
    with pytest.raises(ArtifactError, match=r"train again"):
        verify(two.path("two"))
    add(two, "two")  # trained again
    assert verify(two.path("two")) == "two"
    assert two.versions() == ["one", "two"]
    assert two.champion() == "two"


def test_a_version_that_could_not_be_written_leaves_nothing(registry):
    def write(folder: Path) -> str:
        (folder / "weights.safetensors").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        registry.register(write)
    assert registry.versions() == []
    assert list((registry.folder / "versions").iterdir()) == []
    add(registry, "one")  # and the lock is free


def test_an_artifact_may_hold_folders(registry):
    def write(folder: Path) -> str:
        (folder / "plots").mkdir()
        (folder / "plots" / "loss.html").write_text("<p>")
        return artifact(folder, "one")

    for _ in range(2):
        registry.register(write)
    assert (registry.path("one") / "plots" / "loss.html").exists()
    assert [path.name for path in (registry.folder / "versions").iterdir()] == ["one"]


def test_a_real_ranker_goes_in_and_out(registry):
    from fathom.config import TrainingConfig
    from fathom.encoding import fit_encoder
    from fathom.models import build
    from fathom.spec import FeatureSpec

    spec = FeatureSpec.model_validate(
        {
            "entities": {"user": "user_id", "item": "item_id", "request": "request_id"},
            "label": {"name": "bought", "values": [0, 1]},
            "columns": [{"name": "price", "kind": "numeric", "owner": "item"}],
        }
    )
    frame = {"price": np.array([1.0, 2.0, 4.0], np.float32)}
    encoder, config = fit_encoder(frame, spec), TrainingConfig(hidden=(2,))
    ranker = Ranker(encoder, build(encoder.layout, config).eval(), config)

    version = registry.register(ranker.save)
    assert version == ranker.version
    np.testing.assert_array_equal(registry.load(version).score(frame), ranker.score(frame))


# --- promoting and rolling back ----------------------------------------------------------------


def test_promote_and_roll_back(registry):
    for version in ("one", "two", "three"):
        add(registry, version)
        registry.promote(version, f"because of {version}", by="test")
        assert registry.champion() == version

    assert registry.rollback("three is slow") == "two"
    assert registry.champion() == "two"
    assert registry.rollback("two as well") == "one"
    with pytest.raises(RegistryError, match="champion one has no predecessor to roll back to"):
        registry.rollback("no")
    registry.promote("three", "faster now")
    assert registry.rollback("not really") == "one"  # what was in charge before, not what is older
    assert registry.versions() == ["one", "three", "two"]  # rolling back deletes nothing


def test_history_tells_who_changed_what_when_and_why(two):
    two.rollback("ärger")
    entries = history(two)
    assert [(e["action"], e["version"], e["by"], e["reason"]) for e in entries] == [
        ("promote", "one", "pipeline", "because of one"),
        ("promote", "two", "pipeline", "because of two"),
        ("rollback", "one", "operator", "ärger"),
    ]
    assert all(entry["at"].endswith("+00:00") for entry in entries)


def test_the_pointer_tells_since_when_and_why(two):
    pointer = json.loads((two.folder / "champion.json").read_text())
    assert pointer["version"] == "two"
    assert pointer["reason"] == "because of two"
    assert pointer["since"] == history(two)[-1]["at"]
    assert pointer["champions"] == ["one", "two"]


def test_promoting_the_champion_again_changes_nothing(two):
    before = content(two.folder)
    two.promote("two", "again")
    assert content(two.folder) == before
    assert two.rollback("undo") == "one"


def test_rolling_back_before_any_promotion(registry):
    add(registry, "one")
    with pytest.raises(RegistryError, match="champion None has no predecessor"):
        registry.rollback("no")


@pytest.mark.parametrize("action", ["path", "load", "promote"])
@pytest.mark.parametrize("version", ["three", "", ".staging", "../two", "one/.."])
def test_an_unknown_version_is_refused_with_those_there_are(two, action, version):
    (two.folder / "versions" / ".staging").mkdir()
    arguments = [version, "reason"] if action == "promote" else [version]
    with pytest.raises(RegistryError) as caught:
        getattr(two, action)(*arguments)
    assert str(caught.value) == f"no version {version!r}; there are ['one', 'two']"
    assert two.champion() == "two"


def test_a_damaged_version_is_not_promoted(two):
    add(two, "three")
    damage(two, "three")
    before = content(two.folder)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors does not have the SHA-256"):
        two.promote("three", "reason")
    assert content(two.folder) == before


def test_a_damaged_or_missing_predecessor_is_not_rolled_back_to(two):
    damage(two, "one")
    before = content(two.folder)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors does not have the SHA-256"):
        two.rollback("reason")
    assert content(two.folder) == before

    shutil.rmtree(two.path("one"))
    with pytest.raises(RegistryError, match=r"no version 'one'; there are \['two'\]"):
        two.rollback("reason")
    assert two.champion() == "two"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"champions": null}'])
def test_a_damaged_pointer_is_an_error_and_not_an_empty_registry(two, text):
    (two.folder / "champion.json").write_text(text)
    message = r"champion.json cannot be read \(.*\); restore it from a backup, or delete it and pro"
    for act in (two.champion, lambda: two.promote("one", "x"), lambda: two.rollback("x")):
        with pytest.raises(RegistryError, match=message):
            act()
    (two.folder / "champion.json").unlink()
    two.promote("one", "the remedy")
    assert two.champion() == "one"


# --- challengers -------------------------------------------------------------------------------


def test_a_challenger_is_tried_until_it_is_withdrawn(two):
    assert two.challenger() is None
    challenge = two.challenge("one", "canary", 0.05, "a new hope", by="test")
    assert two.challenger() == challenge
    assert (challenge.version, challenge.mode, challenge.share) == ("one", "canary", 0.05)
    assert two.champion() == "two"
    assert two.withdraw("slow", by="service") == "one"
    assert two.challenger() is None
    with pytest.raises(RegistryError, match="nobody challenges champion two"):
        two.withdraw("again")
    noted = [(e["action"], e["version"], e["by"], e["reason"]) for e in two.history()[2:]]
    assert noted == [
        ("challenge", "one", "test", "a new hope"),
        ("withdraw", "one", "service", "slow"),
    ]
    assert two.history()[2]["share"] == 0.05


def test_a_promoted_challenger_challenges_no_more_and_another_goes_on(two):
    add(two, "three")
    two.challenge("three", "shadow", 1, "look at it")
    two.promote("one", "meanwhile")
    assert two.challenger().version == "three"
    two.promote("three", "it is good")
    assert two.challenger() is None


def test_a_challenge_that_outlived_its_promotion_ends_with_the_next(two):
    """A crash between the pointer and the challenge leaves the champion as its own challenger."""
    two.challenge("one", "canary", 0.1, "reason")
    left = two.challenger()
    two.promote("one", "reason")
    files.write_json(two.folder / "challenger.json", vars(left))
    two.promote("one", "again")
    assert two.challenger() is None
    assert two.champions() == ["one", "two", "one"]


def test_all_faults_of_a_challenge_come_together(two):
    before = content(two.folder)
    with pytest.raises(RegistryError) as caught:
        two.challenge("two", "loud", 1.5, "reason")
    assert str(caught.value) == (
        "two is the champion; challenge it with another version; "
        "mode is 'loud'; it must be 'shadow' or 'canary'; "
        "share is 1.5; it must be above 0 and at most 1"
    )
    with pytest.raises(RegistryError, match=r"share is nan; it must be above 0 and at most 1"):
        two.challenge("one", "canary", float("nan"), "reason")
    assert content(two.folder) == before | {".lock": b""}


def test_nobody_is_challenged_before_the_first_promotion_or_by_damaged_files(registry):
    add(registry, "one")
    with pytest.raises(RegistryError, match="there is no champion to challenge; promote a version"):
        registry.challenge("one", "shadow", 1, "reason")
    damage(registry, "one")
    with pytest.raises(ArtifactError, match="does not have the SHA-256"):
        registry.challenge("one", "shadow", 1, "reason")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": "one", "mod": "canary"}'])
def test_a_damaged_challenger_is_an_error_with_its_remedy(two, text):
    (two.folder / "challenger.json").write_text(text)
    with pytest.raises(RegistryError, match=r"challenger.json cannot be read .*; delete it and"):
        two.challenger()


def test_of_several_that_find_one_wanting_at_once_only_one_acts(two):
    """As replicas of a service do, each of which has seen it fail."""
    add(two, "three")
    two.promote("three", "better")
    assert [two.rollback("slow", by="service", of="three") for _ in range(3)] == ["two"] * 3
    old = two.challenge("three", "canary", 0.1, "again")
    assert [two.withdraw("slow", of=old) for _ in range(2)] == ["three", None]
    two.challenge("three", "canary", 0.2, "mended")
    assert two.withdraw("slow", of=old) is None
    assert two.challenger().share == 0.2
    actions = [entry["action"] for entry in two.history()]
    assert actions == [
        *("promote", "promote", "promote", "rollback"),
        *("challenge", "withdraw", "challenge"),
    ]


def test_a_line_that_a_crash_cut_short_does_not_hide_the_others(two):
    with open(two.folder / "history.jsonl", "a") as file:
        file.write('{"at": "20')
    assert [entry["version"] for entry in two.history()] == ["one", "two"]
    assert Registry(two.folder / "nowhere").history() == []


# --- commands ----------------------------------------------------------------------------------


def test_commands_of_a_challenge(two, monkeypatch):
    monkeypatch.setattr("fathom.cli._parameters", lambda _: {"registry": str(two.folder)})

    def said(*arguments: str) -> str:
        result = CliRunner().invoke(cli, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert said("challenge", "one") == "challenger: one, canary of 5.0% of the users\n"
    assert said("champion") == "? one  canary of 5.0%\n* two\n"
    assert said("challenge", "one", "--shadow", "--reason", "first look") == (
        "challenger: one, shadow of 100.0% of the users\n"
    )
    assert said("withdraw") == "withdrawn: one\n"
    assert said("champion") == "  one\n* two\n"
    *_, shadow, withdrawn = said("history").splitlines()
    assert shadow.endswith("+00:00  challenge  one  by operator: first look")
    assert withdrawn.endswith("withdraw   one  by operator: withdrawn by hand")
    assert said("history", "--last", "1") == withdrawn + "\n"


# --- other processes ---------------------------------------------------------------------------

#: Holds the lock by registering, until its standard input closes.
HOLDER = """
import sys
from pathlib import Path
from fathom.registry import Registry
from test_registry import artifact

def write(folder):
    artifact(folder, "slow")
    print("writing", flush=True)
    sys.stdin.read()
    return "slow"

print(Registry(Path(sys.argv[1])).register(write))
"""

#: Runs one action again and again on copies of a registry, each time in a process that is killed
#: (SIGKILL) at its next operation on a file: the first at the first, the second at the second, …,
#: until one gets through. The audit hook sees operations just before they happen.
KILLER = """
import os, shutil, signal, sys
from pathlib import Path
from fathom.registry import Registry
from test_registry import add

action, source, copies = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir", "os.listdir"}

def act(registry):
    if action == "register":
        add(registry, "three")
    elif action == "challenge":
        registry.challenge("three", "canary", 0.1, "better")
    elif action == "withdraw":
        registry.withdraw("worse")
    else:
        registry.promote("three", "better")

def killed_at(moment, folder):
    seen = 0
    def hook(event, arguments):
        nonlocal seen
        if event in EVENTS:
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)
    registry = Registry(folder)
    sys.addaudithook(hook)
    act(registry)

for moment in range(1, 1000):
    folder = copies / f"{moment:03}"
    shutil.copytree(source, folder)
    child = os.fork()
    if child == 0:
        killed_at(moment, folder)
        os._exit(0)
    if os.waitpid(child, 0)[1] == 0:
        break
"""


def command(program: str, *arguments: object) -> list[str]:
    path = [str(Path(__file__).parent), *sys.path]
    header = f"import sys; sys.path[:0] = {path!r}\n"
    return [sys.executable, "-c", header + program, *map(str, arguments)]


def killed_everywhere(action: str, registry: Registry, copies: Path) -> list[Registry]:
    """What is left of the registry, by the operation at which the process was killed."""
    subprocess.run(command(KILLER, action, registry.folder, copies), check=True, timeout=120)
    left = [Registry(folder) for folder in sorted(copies.iterdir())]
    assert len(left) > 4  # it did die on the way
    return left


@pytest.fixture
def holder(registry: Registry) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command(HOLDER, registry.folder), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.communicate()


def test_while_another_process_writes_readers_read_and_writers_are_told(two, holder):
    busy = f"{two.folder} is being changed by another process; try again later"
    for act in (
        lambda: add(two, "three"),
        lambda: two.promote("one", "reason"),
        lambda: two.rollback("reason"),
    ):
        with pytest.raises(RegistryError) as caught:
            act()
        assert str(caught.value) == busy
    assert two.versions() == ["one", "two"]  # not the one being written
    assert two.champion() == "two"

    answer, _ = holder.communicate("")  # it may finish
    assert answer == "slow\n"
    assert two.versions() == ["one", "slow", "two"]
    add(two, "three")


def test_a_killed_writer_leaves_no_version_and_no_lock(two, holder):
    holder.kill()
    holder.wait()
    assert two.versions() == ["one", "two"]
    assert any((two.folder / "versions").glob(".*"))  # its half-written version is still there
    add(two, "three")
    assert two.versions() == ["one", "three", "two"]
    assert not any((two.folder / "versions").glob(".*"))  # and now is not


def test_a_registration_killed_at_any_moment_leaves_the_whole_version_or_none(two, tmp_path):
    left = killed_everywhere("register", two, tmp_path / "copies")
    outcomes = [registry.versions() for registry in left]
    without, complete = ["one", "two"], ["one", "three", "two"]
    turning = outcomes.index(complete)
    assert outcomes == [without] * turning + [complete] * (len(left) - turning)
    assert turning > 5

    for registry in left:
        assert registry.champion() == "two"
        for version in registry.versions():
            assert verify(registry.path(version)) == version
        add(registry, "three")  # again: nothing is in its way
        assert registry.versions() == complete
        assert sorted(p.name for p in (registry.folder / "versions").iterdir()) == complete
        assert content(registry.path("three")) == content(left[-1].path("three"))


def test_a_promotion_killed_at_any_moment_leaves_the_old_champion_or_the_new(two, tmp_path):
    add(two, "three")
    left = killed_everywhere("promote", two, tmp_path / "copies")
    champions = [registry.champion() for registry in left]
    turning = champions.index("three")
    assert champions == ["two"] * turning + ["three"] * (len(left) - turning)
    assert turning > 5

    for registry in left:
        noted = [entry["version"] for entry in history(registry)]
        # Never a change without a note; a note without its change at worst.
        assert noted[:2] == ["one", "two"]
        assert registry.champion() in noted
        registry.promote("three", "again")
        assert registry.champion() == "three"
        assert registry.rollback("undo") == "two"


@pytest.mark.parametrize("action", ["challenge", "withdraw"])
def test_a_challenge_killed_at_any_moment_is_whole_or_none(two, tmp_path, action):
    add(two, "three")
    if action == "withdraw":
        two.challenge("three", "canary", 0.1, "better")
    left = killed_everywhere(action, two, tmp_path / "copies")
    challenges = [registry.challenger() is not None for registry in left]
    turning = challenges.index(action == "challenge")
    assert challenges == [action == "withdraw"] * turning + [action == "challenge"] * (
        len(left) - turning
    )
    for registry, challenged in zip(left, challenges, strict=True):
        # Never a change without a note; a note without its change at worst.
        assert registry.history()[-1]["action"] == action or challenged == (action == "withdraw")
        registry.challenge("three", "shadow", 1, "again")
        assert registry.challenger().mode == "shadow"


def test_readers_see_whole_versions_and_a_champion_that_is_one(registry):
    names = [f"v{i:02}" for i in range(25)]
    add(registry, "v00")
    registry.promote("v00", "first")
    faults: list[str] = []
    seen: set[str | None] = set()
    finished = threading.Event()

    def read() -> None:
        while not finished.is_set():
            try:
                champion = registry.champion()
                versions = registry.versions()
                seen.add(champion)
                if champion not in versions:
                    faults.append(f"champion {champion} not in {versions}")
                for version in versions:
                    verify(registry.path(version))
            except Exception as error:
                faults.append(repr(error))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for name in names[1:]:
        add(registry, name)
        registry.promote(name, "newer")
    finished.set()
    for reader in readers:
        reader.join()
    assert faults == []
    assert len(seen) > 1  # they did read while it changed
    assert registry.versions() == names


# -- states, for warm starts ---------------------------------------------------------------------


def keep(registry: Registry, version: str, tmp_path: Path, content: str = "learnt") -> None:
    learnt = tmp_path / "best-0001"
    learnt.mkdir(exist_ok=True)
    (learnt / "model.bias.npy").write_text(content)
    registry.keep_state(version, learnt)


def states(registry: Registry) -> list[str]:
    return sorted(path.name for path in (registry.folder / "states").iterdir())


def test_the_state_of_a_version_is_kept_apart_from_what_is_served(
    two: Registry, tmp_path: Path
) -> None:
    before = content(two.path("two"))
    keep(two, "two", tmp_path)
    state = two.state("two")
    assert state == two.folder / "states" / "two"
    assert (state / "model.bias.npy").read_text() == "learnt"
    assert content(two.path("two")) == before
    assert two.state("one") is None


def test_states_are_kept_of_champions_and_of_the_newest_alone(
    two: Registry, tmp_path: Path
) -> None:
    for version in ("two", "three", "four"):
        add(two, version)
        keep(two, version, tmp_path)
    assert states(two) == ["four", "two"]  # the third was never champion
    two.promote("four", "better")
    add(two, "five")
    keep(two, "five", tmp_path)
    assert states(two) == ["five", "four", "two"]


def test_a_damaged_state_is_refused_and_mended_by_keeping_it_again(
    two: Registry, tmp_path: Path
) -> None:
    keep(two, "two", tmp_path)
    (two.folder / "states" / "two" / "model.bias.npy").write_text("something else")
    with pytest.raises(ArtifactError, match=r"model.bias.npy does not have the SHA-256"):
        two.state("two")
    keep(two, "two", tmp_path)
    assert two.state("two") is not None


def test_what_a_killed_process_left_among_the_states_is_swept(
    two: Registry, tmp_path: Path
) -> None:
    (two.folder / "states" / ".two.abc").mkdir(parents=True)
    keep(two, "two", tmp_path)
    assert states(two) == ["two"]


def test_no_state_is_kept_of_a_version_that_is_not_there(two: Registry, tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"no version 'nine'"):
        keep(two, "nine", tmp_path)


def test_a_version_describes_itself_without_being_loaded(two: Registry) -> None:
    with pytest.raises(RegistryError, match=r"ranker.json cannot be read .*; train again"):
        two.described("two")
    (two.path("two") / "ranker.json").write_text('{"provenance": {"seed": 3}}')
    assert two.described("two")["provenance"] == {"seed": 3}
