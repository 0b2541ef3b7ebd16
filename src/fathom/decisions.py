"""The history of decisions: one JSON object a line, complete whenever its writer dies."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fathom import files

#: What tells two decisions apart; a second one about the same is not written.
IDENTITY = ("partition", "fingerprint", "version", "window")


def append(path: Path | str, entry: Mapping[str, Any]) -> bool:
    """Add a decision to a history and flush it to disk.

    Args:
        path: of the history, made if it is not there.
        entry: the decision, as JSON types; `IDENTITY` names the keys that make it itself, any of
            which may be missing.

    Returns:
        Whether it was added; not if the history has it already.
    """
    path = Path(path)
    line = json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n"
    same = _identity(json.loads(line))
    with files.locked(path.with_name(f".{path.name}.lock"), wait=True):
        if any(_identity(known) == same for known in read(path)):
            return False
        with open(path, "ab") as history:
            history.truncate(_complete(path))  # a line that a killed writer did not finish
            history.write(line.encode())
            history.flush()
            os.fsync(history.fileno())
    return True


def read(path: Path | str) -> list[dict[str, Any]]:
    """All decisions of a history, the oldest first; none if there is no history."""
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        return []
    whole = content[: content.rfind(b"\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def _complete(path: Path) -> int:
    """Bytes up to the end of the last complete line."""
    return path.read_bytes().rfind(b"\n") + 1


def _identity(entry: Mapping[str, Any]) -> list[Any]:
    return [entry.get(name) for name in IDENTITY]
