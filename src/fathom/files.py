"""Crash-safe files: a reader sees the last complete state, whenever a writer dies."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_CHUNK_BYTES = 1 << 20

log = logging.getLogger(__name__)


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """Give a temporary sibling to write to; on a clean exit it becomes ``path`` at once.

    Works for a file and for a folder. The content is flushed to disk before the rename, so a
    crash leaves either the old or the new content. On an error the temporary is removed and
    ``path`` is untouched. (A folder cannot be swapped in one step: the old one is moved away
    first, so a crash between the two renames leaves none, never a mixture.)

    Example:
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replacing(folder / "answer.txt") as temporary:
        ...     _ = temporary.write_text("42")
        >>> (folder / "answer.txt").read_text()
        '42'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    workshop = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary = workshop / path.name
    try:
        yield temporary
        _flush(temporary)
        if path.is_dir() and not path.is_symlink():
            path.rename(workshop / f"{path.name}.replaced")
        os.replace(temporary, path)
        _flush(path.parent, recursive=False)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def write_text(path: Path | str, text: str) -> None:
    """Write ``text`` (UTF-8) to ``path``, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path | str, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def sha256(path: Path | str) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def locked(path: Path | str, wait: bool = False) -> Iterator[IO[str]]:
    """Hold the lock that a file stands for. It is free again when its process ends, however.

    Gives the open file: a process that inherits its descriptor holds the lock as well.

    Args:
        wait: until another process lets go of it, which the log says.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is false.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as lock:  # which leaves a file that is there as it is
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            log.info("%s is being changed by another process; waiting for it", path.parent)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def remove(folder: Path | str) -> None:
    """Remove a folder at once: a reader sees all of it or none."""
    folder = Path(folder)
    workshop = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    folder.rename(workshop / folder.name)
    shutil.rmtree(workshop)


def _flush(path: Path, recursive: bool = True) -> None:
    if recursive and path.is_dir():
        for child in path.iterdir():
            _flush(child)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
