"""Crash safety with real crashes: killed processes, full disks and readers that come too early."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from fathom.files import locked, remove, replacing, sha256, write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
MEGABYTE = 1_000_000


def start(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of its own that runs ``code``, with the arguments in ``sys.argv``."""
    prelude = "import sys, time\nfrom pathlib import Path\nfrom fathom.files import *\n"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + textwrap.dedent(code), *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- a clean exit and an error --------------------------------------------------------------------


def test_a_new_file_appears_when_the_block_ends_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "answer.txt"
    with replacing(path) as temporary:
        temporary.write_text("42")
        assert not path.exists()
        assert temporary.name == "answer.txt"  # a writer may go by the suffix
    assert path.read_text() == "42"
    assert names(path.parent) == ["answer.txt"]


def test_a_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "answer.txt"
    write_text(path, "a much longer answer")
    write_text(str(path), "short: ß")
    assert path.read_bytes() == "short: ß".encode()
    assert names(tmp_path) == ["answer.txt"]


@pytest.mark.parametrize("name", ["model", "replaced", "model.replaced"])
def test_a_folder_is_replaced_whole(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for generation in ("old", "new"):
        with replacing(path) as temporary:
            (temporary / "part").mkdir(parents=True)
            (temporary / "part" / f"{generation}.txt").write_text(generation)
    assert names(tmp_path) == [name]
    assert names(path / "part") == ["new.txt"]


def test_a_file_may_take_a_folders_place_but_not_the_reverse(tmp_path: Path) -> None:
    path = tmp_path / "thing"
    path.mkdir()
    write_text(path, "now a file")
    assert path.read_text() == "now a file"
    with pytest.raises(OSError, match="Not a directory"), replacing(path) as temporary:
        temporary.mkdir()
    assert path.read_text() == "now a file"
    assert names(tmp_path) == ["thing"]


def fail_half_way(path: Path, within: str) -> None:
    with replacing(path) as temporary:
        (temporary / within).parent.mkdir(exist_ok=True)
        (temporary / within).write_text("half of the ne")
        raise RuntimeError("half way")


@pytest.mark.parametrize("within", ["", "part"], ids=["file", "folder"])
@pytest.mark.parametrize("old", [True, False], ids=["replaced", "new"])
def test_an_error_leaves_what_was_and_no_temporary(tmp_path: Path, within: str, old: bool) -> None:
    path = tmp_path / "weights"
    if old:
        with replacing(path) as temporary:
            (temporary / within).parent.mkdir(exist_ok=True)
            (temporary / within).write_text("old")
    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way(path, within)
    assert names(tmp_path) == (["weights"] if old else [])
    if old:
        assert (path / within).read_text() == "old"


def test_a_block_that_writes_nothing_is_an_error_and_the_old_stays(tmp_path: Path) -> None:
    path = tmp_path / "answer.txt"
    write_text(path, "old")
    with pytest.raises(FileNotFoundError, match=r"answer\.txt"), replacing(path):
        pass
    assert path.read_text() == "old"
    assert names(tmp_path) == ["answer.txt"]


def test_a_link_is_replaced_and_what_it_points_to_is_left(tmp_path: Path) -> None:
    folder, link = tmp_path / "versions", tmp_path / "champion"
    folder.mkdir()
    link.symlink_to(folder)
    write_text(link, "v2")
    assert link.read_text() == "v2"
    assert folder.is_dir()


# -- JSON and hashes ------------------------------------------------------------------------------


def test_json_is_indented_and_ends_with_a_line_break(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"name": "Möbel", "auc": 0.5, "rows": [1]})
    assert path.read_text(encoding="utf-8") == (
        '{\n  "name": "Möbel",\n  "auc": 0.5,\n  "rows": [\n    1\n  ]\n}\n'
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_json_refuses_what_other_readers_would_and_keeps_the_old(
    tmp_path: Path, value: float
) -> None:
    path = tmp_path / "summary.json"
    write_json(path, {"auc": 0.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"auc": [value]})
    assert json.loads(path.read_text()) == {"auc": 0.5}
    assert names(tmp_path) == ["summary.json"]


def test_sha256_is_the_published_one(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")  # FIPS 180-4, appendix B.1
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    path.write_bytes(b"a" * MEGABYTE)  # appendix B.3: one million times "a"
    assert sha256(path) == "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"
    path.write_bytes(b"a" * (3 << 20))  # more than one chunk: the order of chunks matters
    assert sha256(path) != sha256(_written(tmp_path / "other", b"a" * ((3 << 20) - 1) + b"b"))


def _written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# -- crashes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_process_killed_while_it_writes_leaves_the_old_complete(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "weights"
    content = path if kind == "file" else path / "part"
    with replacing(path) as temporary:
        if kind == "folder":
            temporary.mkdir()
        (temporary if kind == "file" else temporary / "part").write_text("old" * 1000)
    writer = start(
        """
        with replacing(sys.argv[1]) as temporary:
            if sys.argv[2] == "folder":
                temporary.mkdir()
                temporary = temporary / "part"
            with temporary.open("w") as file:
                file.write("new" * 500)
                file.flush()
                print("half", flush=True)
                time.sleep(60)
        """,
        path,
        kind,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "half\n"
    writer.send_signal(signal.SIGKILL)
    assert writer.wait(timeout=10) == -signal.SIGKILL
    writer.communicate()
    assert content.read_text() == "old" * 1000
    # And the next writer is not in the dead one's way.
    write_text(tmp_path / "other", "new")
    with replacing(path) as temporary:
        temporary.write_text("new" * 1000)
    assert path.read_text() == "new" * 1000


@pytest.mark.parametrize("delay", [0.0, 0.002, 0.005, 0.01, 0.02])
def test_a_process_killed_at_any_moment_leaves_a_complete_file(
    tmp_path: Path, delay: float
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"0" * MEGABYTE)
    writer = start(
        """
        print("ready", flush=True)
        while True:
            for letter in b"ab":
                with replacing(sys.argv[1]) as temporary:
                    temporary.write_bytes(bytes([letter]) * 1_000_000)
        """,
        path,
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        writer.wait(timeout=delay)
    writer.kill()
    writer.communicate()
    content = path.read_bytes()
    assert len(content) == MEGABYTE
    assert len(set(content)) == 1


def test_a_full_disk_is_a_clear_error_and_the_old_content_stays(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: writing fails in the same place."""
    path = tmp_path / "weights"
    write_text(path, "old")
    writer = start(
        """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        write_text(sys.argv[1], "new" * 100_000)
        """,
        path,
    )
    _, error = writer.communicate(timeout=30)
    assert writer.returncode == 1
    assert error.splitlines()[-1] == f"OSError: [Errno {errno.EFBIG}] File too large"
    assert path.read_text() == "old"
    assert names(tmp_path) == ["weights"]


def test_readers_see_the_old_or_the_new_file_and_never_half(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"a" * MEGABYTE)
    writer = start(
        """
        print("ready", flush=True)
        for i in range(100):
            with replacing(sys.argv[1]) as temporary:
                temporary.write_bytes(b"ba"[i % 2:i % 2 + 1] * 1_000_000)
        """,
        path,
    )
    assert writer.stdout is not None
    writer.stdout.readline()
    seen = set()
    while writer.poll() is None:
        content = path.read_bytes()
        assert len(content) == MEGABYTE
        (letter,) = set(content)
        seen.add(letter)
    assert writer.communicate()[1] == ""
    assert seen == set(b"ab")


def test_writers_at_the_same_time_leave_one_of_their_files_whole(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    code = """
    for _ in range(20):
        with replacing(sys.argv[1]) as temporary:
            temporary.write_bytes(sys.argv[2].encode() * 1_000_000)
    """
    writers = [start(code, path, letter) for letter in "abc"]
    assert [writer.communicate(timeout=60)[1] for writer in writers] == ["", "", ""]
    content = path.read_bytes()
    assert len(content) == MEGABYTE
    assert len(set(content)) == 1
    assert names(tmp_path) == ["weights"]


# -- locks and removal ----------------------------------------------------------------------------

HOLD = """
    with locked(sys.argv[1]):
        print("held", flush=True)
        time.sleep(60)
    """


def test_a_lock_is_held_by_one_process_and_free_when_it_dies(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / ".lock"
    holder = start(HOLD, path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError), locked(path):
        pass
    holder.kill()
    holder.wait()
    with locked(path):
        pass


def test_who_waits_for_a_lock_says_so_and_gets_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / ".lock"
    holder = start(HOLD, path)
    assert holder.stdout is not None
    holder.stdout.readline()
    with caplog.at_level("INFO"):
        killer = threading.Timer(0.3, holder.kill)
        killer.start()
        with locked(path, wait=True):
            assert not killer.is_alive()
    assert f"{tmp_path} is being changed by another process; waiting for it" in caplog.text
    holder.wait()


def test_an_error_under_a_lock_frees_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside"), locked(tmp_path / ".lock"):
        raise ValueError("inside")
    with locked(tmp_path / ".lock"):
        pass


def test_a_folder_is_removed_whole(tmp_path: Path) -> None:
    (tmp_path / "old" / "deep").mkdir(parents=True)
    (tmp_path / "old" / "deep" / "file").write_text("x")
    remove(tmp_path / "old")
    assert names(tmp_path) == []
