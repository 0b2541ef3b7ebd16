"""API keys: who may ask the service.

A file names the clients, one in a line, and has the SHA-256 of each one's key, never a key::

    5e884898da28047151d0e56f8dc6292773603d0d6aabbd62a11ef721d1542d8  shop-frontend

Several lines may be of one client, so a new key can be handed out before the old one is removed.
The file is read again when it has changed. Keys are random (`main` makes them), so their plain
SHA-256 cannot be searched, as a password's could.

    python -m fathom.keys shop-frontend
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import re
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

from fathom.service_log import log

_LINE = re.compile(r"([0-9a-f]{64})\s+([A-Za-z0-9._-]{1,64})")
#: Of a key that is asked with; ours have 43 characters.
_LONGEST = 256


class KeysError(ValueError):
    """The file of keys cannot be used; the message names every line that is at fault."""


class Keys:
    """The keys of a file, which may change while they are used.

    Raises:
        KeysError: the file cannot be read, has a line that is none, or no key at all. A file that
            turns bad later is logged, and the keys of before stay.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = _stamp(path)
        self._names = _read(path)

    def client(self, headers: Mapping[str, str]) -> str | None:
        """Whose key the ``Authorization`` header has; None if it is nobody's."""
        self._refresh()
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key or len(key) > _LONGEST:
            return None
        digest = hashlib.sha256(key.strip().encode()).hexdigest()
        found = None
        for known, name in self._names.items():  # all of them, so that time tells nothing
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def _refresh(self) -> None:
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._names = _read(self._path)
            log.info("%s: %d keys", self._path, len(self._names))
        except KeysError as error:
            log.error("%s; the keys of before stay", error)


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _read(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise KeysError(f"{path}: the API keys cannot be read ({error})") from error
    names: dict[str, str] = {}
    faults = []
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        if found := _LINE.fullmatch(text):
            names[found[1]] = found[2]
        else:
            faults.append(str(number))
    if faults:
        raise KeysError(
            f"{path}: line {', '.join(faults)}: not a SHA-256 in hexadecimal and a name; "
            "`python -m fathom.keys NAME` prints such a line"
        )
    if not names:
        raise KeysError(f"{path}: no API key; `python -m fathom.keys NAME` makes one")
    return names


def made(name: str) -> tuple[str, str]:
    """A new key, and its line for the file.

    Raises:
        KeysError: the name cannot stand in the file.
    """
    key = secrets.token_urlsafe(32)
    line = f"{hashlib.sha256(key.encode()).hexdigest()}  {name}"
    if not _LINE.fullmatch(line):
        raise KeysError(f"{name!r}: a client's name has 1 to 64 of A-Z a-z 0-9 . _ -")
    return key, line


def main() -> None:
    """Make a key: the line goes to standard output, the key itself to standard error."""
    parser = argparse.ArgumentParser(prog="python -m fathom.keys", description="Make an API key.")
    parser.add_argument("name", help="of the client")
    try:
        key, line = made(parser.parse_args().name)
    except KeysError as error:
        raise SystemExit(f"keys: {error}") from None
    sys.stderr.write(f"the key, for the client alone: {key}\n")
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main()
