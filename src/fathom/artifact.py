"""An artifact's files against its manifest: what can be told of a ranker without loading it.

Light, so that what only checks or copies artifacts need not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fathom import files

MANIFEST = "manifest.json"


class ArtifactError(RuntimeError):
    """An artifact is incomplete, changed or unreadable; the message lists every fault."""

    def __init__(self, folder: Path, faults: Sequence[str]) -> None:
        super().__init__(f"{folder}: {'; '.join(faults)}; restore it from a backup or train again")


def seal(folder: Path, version: str) -> None:
    """Write the manifest of a folder's files, which `verify` holds them to."""
    hashes = {p.name: files.sha256(p) for p in sorted(folder.iterdir()) if p.name != MANIFEST}
    files.write_json(folder / MANIFEST, {"version": version, "files": hashes})


def verify(folder: Path) -> str:
    """Check an artifact's files against its manifest; returns its version.

    Raises:
        ArtifactError: the manifest or files are missing or changed; names all of them.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        hashes, version = dict(manifest["files"]), str(manifest["version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(folder, [f"{MANIFEST} cannot be read ({error})"]) from error
    faults = []
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            faults.append(f"{name} is missing")
        elif files.sha256(folder / name) != expected:
            faults.append(f"{name} does not have the SHA-256 of the manifest")
    if faults:
        raise ArtifactError(folder, faults)
    return version
