"""Projects to run Kedro in: a copy of the configuration, with data of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks


@dataclass(frozen=True)
class Project:
    """A copy of the project's configuration, with data of its own."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {"BENTOML_HOME": str(self.folder / "data/06_models/bentoml")}

    def kedro(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a Kedro command in the project, as a user does."""
        return subprocess.run(
            [sys.executable, "-m", "kedro", *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=600,
            check=check,
        )

    def forked(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a Kedro command in a process of its own that finds the vendors imported."""
        given = ("-m", "kedro", *arguments)
        return forks.python(*given, folder=self.folder, environment=self.environment)

    def killed(self, line: str, *arguments: str, seconds: float = 0.3) -> None:
        """Start such a process and kill it a while after it has logged a line."""
        given = (line, "-m", "kedro", *arguments)
        environment = self.environment
        forks.kill_after(*given, folder=self.folder, seconds=seconds, environment=environment)

    def json(self, path: str) -> Any:
        return json.loads((self.folder / "data/test" / path).read_text(encoding="utf-8"))


def make_project(root: Path, folder: Path) -> Project:
    """Copy what a run reads."""
    folder.mkdir(exist_ok=True)
    for name in ("conf", "src"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(root / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "requirements.lock", "bentofile.yaml", ".bentoignore"):
        shutil.copy(root / name, folder / name)
    return Project(folder)
