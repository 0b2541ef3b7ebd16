"""Versions of rankers, the pointer that names the champion, and the one that names its challenger.

::

    registry/
      versions/<version>/…   immutable artifacts (`fathom.ranker`)
      versions/.*            half-written ones; whoever holds the lock removes them
      states/<version>/…     what its training learnt, optimizers' state too, for warm starts;
                             of the champions and the newest alone, and never served
      champion.json          the champion and those it replaced, the newest last
      challenger.json        who is tried beside it, if anybody: `Challenge`
      history.jsonl          every change of either, who asked and why
      .lock                  held while any of this changes
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fathom import files
from fathom.artifact import ArtifactError, seal, verify

if TYPE_CHECKING:
    from fathom.ranker import Ranker


class RegistryError(RuntimeError):
    """The registry cannot do what was asked; nothing was changed."""


@dataclass(frozen=True)
class Challenge:
    """A version that services try beside the champion.

    Args:
        mode: ``shadow`` scores requests that the champion answers; ``canary`` answers.
        share: of the users, in (0, 1], whose requests it gets.
        since: when it began, ISO 8601.
        reason: why.
    """

    version: str
    mode: Literal["shadow", "canary"]
    share: float
    since: str
    reason: str


@dataclass(frozen=True)
class Registry:
    """A folder of ranker versions. Reading needs no lock."""

    folder: Path

    def versions(self) -> list[str]:
        """All complete versions, by name."""
        folder = self.folder / "versions"
        if not folder.is_dir():
            return []
        return sorted(p.name for p in folder.glob("[!.]*") if p.is_dir())

    def champion(self) -> str | None:
        """The version in charge, or None before the first promotion."""
        stack = self._stack()
        return stack[-1] if stack else None

    def champions(self) -> list[str]:
        """The champion and those it replaced that a roll-back may reach, the newest last."""
        return self._stack()

    def promoted(self) -> str | None:
        """Since when the champion is in charge, ISO 8601."""
        if self.champion() is None:
            return None
        pointer = json.loads((self.folder / "champion.json").read_text(encoding="utf-8"))
        return str(pointer["since"])

    def path(self, version: str) -> Path:
        """Folder of a version.

        Raises:
            RegistryError: there is no such version; the message lists those there are.
        """
        if version not in self.versions():
            raise RegistryError(f"no version {version!r}; there are {self.versions()}")
        return self.folder / "versions" / version

    def load(self, version: str) -> Ranker:
        """Read and verify a version."""
        from fathom.ranker import Ranker

        return Ranker.load(self.path(version))

    def described(self, version: str) -> dict[str, Any]:
        """What a version says of itself, its settings and provenance, without loading it.

        Raises:
            RegistryError: there is no such version, or it cannot be read.
        """
        path = self.path(version) / "ranker.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise RegistryError(f"{path} cannot be read ({error}); train again") from error

    def register(self, write: Callable[[Path], str]) -> str:
        """Add a version: ``write`` fills a folder and returns the version's name.

        The folder appears complete or not at all. Registering the same content again is no error
        and changes nothing, unless the version was damaged, which it mends.
        """
        versions = self.folder / "versions"
        with self._locked():
            versions.mkdir(exist_ok=True)
            _sweep(versions)
            staging = versions / ".staging"
            staging.mkdir()
            try:
                version = write(staging)
                if not _is_intact(versions / version):
                    with files.replacing(versions / version) as temporary:
                        staging.rename(temporary)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
            return version

    def keep_state(self, version: str, learnt: Path) -> None:
        """Keep what a version's training learnt, so that the next one can start from it.

        States of versions that are no champions, nor were before this one, are removed.

        Args:
            learnt: a folder of flat files (`fathom.checkpoint`); it is copied.

        Raises:
            RegistryError: there is no such version.
        """
        self.path(version)
        states = self.folder / "states"
        with self._locked():
            states.mkdir(exist_ok=True)
            _sweep(states)
            if not _is_intact(states / version):
                with files.replacing(states / version) as temporary:
                    shutil.copytree(learnt, temporary)
                    seal(temporary, version)
            for other in states.iterdir():
                if other.name not in {*self._stack(), version}:
                    files.remove(other)

    def state(self, version: str) -> Path | None:
        """What a version's training learnt; None if it is not kept.

        Raises:
            ArtifactError: its files are missing or changed.
        """
        folder = self.folder / "states" / version
        if not folder.is_dir():
            return None
        verify(folder)
        return folder

    def promote(self, version: str, reason: str, by: str = "pipeline") -> None:
        """Make a version the champion, after checking its files; its challenge ends.

        Raises:
            RegistryError: there is no such version.
            ArtifactError: its files are missing or changed.
        """
        verify(self.path(version))
        with self._locked():
            stack = self._stack()
            if not stack or stack[-1] != version:
                self._point([*stack, version], "promote", reason, by)
            # After the pointer: a crash between the two leaves a challenger that is the champion,
            # which nobody tries, and promoting it again ends that.
            challenge = self.challenger()
            if challenge is not None and challenge.version == version:
                self._challenger.unlink()

    def rollback(self, reason: str, by: str = "operator", of: str | None = None) -> str:
        """Put the champion's predecessor back in charge; returns the version that is.

        Args:
            of: does nothing unless this version is the champion. So of several who find it wanting
                at once, one rolls back.

        Raises:
            RegistryError: there is none.
        """
        with self._locked():
            stack = self._stack()
            if of is not None and stack and stack[-1] != of:
                return stack[-1]
            if len(stack) < 2:
                raise RegistryError(
                    f"champion {stack[-1] if stack else None} has no predecessor to roll back to"
                )
            verify(self.path(stack[-2]))
            self._point(stack[:-1], "rollback", reason, by)
            return stack[-2]

    def challenger(self) -> Challenge | None:
        """Who is tried beside the champion.

        Raises:
            RegistryError: the pointer cannot be read.
        """
        try:
            return Challenge(**json.loads(self._challenger.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise RegistryError(
                f"{self._challenger} cannot be read ({error!r}); delete it and challenge again"
            ) from error

    def challenge(
        self,
        version: str,
        mode: Literal["shadow", "canary"],
        share: float,
        reason: str,
        by: str = "operator",
    ) -> Challenge:
        """Have services try a version beside the champion, in place of whom they try now.

        Args:
            mode, share: see `Challenge`.

        Raises:
            RegistryError: names everything that is not as it must be; there is no such version.
            ArtifactError: its files are missing or changed.
        """
        verify(self.path(version))
        with self._locked():
            champion = self.champion()
            faults = []
            if champion is None:
                faults.append("there is no champion to challenge; promote a version first")
            if version == champion:
                faults.append(f"{version} is the champion; challenge it with another version")
            if mode not in ("shadow", "canary"):
                faults.append(f"mode is {mode!r}; it must be 'shadow' or 'canary'")
            if not 0 < share <= 1:
                faults.append(f"share is {share}; it must be above 0 and at most 1")
            if faults:
                raise RegistryError("; ".join(faults))
            details = {"mode": mode, "share": share}
            since = self._note("challenge", version, reason, by, **details)
            challenge = Challenge(version, mode, share, since, reason)
            files.write_json(self._challenger, asdict(challenge))
            return challenge

    def withdraw(
        self, reason: str, by: str = "operator", of: Challenge | None = None
    ) -> str | None:
        """End the challenge; returns who challenged.

        Args:
            of: does nothing, and returns None, unless this challenge still is the one.

        Raises:
            RegistryError: there is none.
        """
        with self._locked():
            challenge = self.challenger()
            if of is not None and challenge != of:
                return None
            if challenge is None:
                raise RegistryError(f"nobody challenges champion {self.champion()}")
            self._note("withdraw", challenge.version, reason, by)
            self._challenger.unlink()
            return challenge.version

    def history(self) -> list[dict[str, Any]]:
        """Every change, the newest last: ``at``, ``action``, ``version``, ``by``, ``reason``.

        A line that a crash cut short is left out.
        """
        try:
            lines = (self.folder / "history.jsonl").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        entries = []
        for line in lines:
            with suppress(ValueError):
                entries.append(json.loads(line))
        return entries

    @property
    def _challenger(self) -> Path:
        return self.folder / "challenger.json"

    def _stack(self) -> list[str]:
        pointer = self.folder / "champion.json"
        try:
            found = json.loads(pointer.read_text(encoding="utf-8"))["champions"]
            return [str(version) for version in found]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as error:
            raise RegistryError(
                f"{pointer} cannot be read ({error!r}); restore it from a backup, or delete it and "
                "promote a version again"
            ) from error

    def _point(self, stack: list[str], action: str, reason: str, by: str) -> None:
        moment = self._note(action, stack[-1], reason, by)
        files.write_json(
            self.folder / "champion.json",
            {"version": stack[-1], "since": moment, "reason": reason, "champions": stack},
        )

    def _note(self, action: str, version: str, reason: str, by: str, **more: Any) -> str:
        """Write to the history; returns the moment.

        Before the change itself: a crash between the two leaves a note, never a silent change.
        """
        moment = datetime.now(timezone.utc).isoformat(timespec="seconds")
        entry = {"at": moment, "action": action, "version": version, "by": by, "reason": reason}
        with open(self.folder / "history.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry | more, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return moment

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with files.locked(self.folder / ".lock"):
                yield
        except BlockingIOError as error:
            raise RegistryError(
                f"{self.folder} is being changed by another process; try again later"
            ) from error


def _sweep(folder: Path) -> None:
    """Remove what a process left that died here: only one works here at a time."""
    for left in folder.glob(".*"):
        shutil.rmtree(left, ignore_errors=True)


def _is_intact(folder: Path) -> bool:
    """Whether a version, or its state, is there, whole."""
    try:
        verify(folder)
    except ArtifactError:
        return False
    return True
