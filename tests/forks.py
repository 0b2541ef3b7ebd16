"""Python processes that start with the vendors imported, which takes longer than most tests."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

#: One process imports these and forks for each command. Kedro and Fathom are not among them: what
#: they read when they are imported is the project's. Optimizers import torch._dynamo.
VENDORS = ["evidently", "feast", "great_expectations", "ibis", "skops.io", "torch._dynamo"]
SECONDS = 600

_FORKS = get_context("forkserver")


def python(
    *arguments: str, folder: Path, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run what ``python *arguments`` would run, and wait for its end.

    Args:
        arguments: ``-m module``, ``-c code`` or a path, and what the program is given.
        folder: where.
        environment: its variables (those of this process).
    """
    with tempfile.TemporaryDirectory() as name:
        said = Path(name)
        process = start(*arguments, folder=folder, said=said, environment=environment)
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, SECONDS)
        out, err = ((said / name).read_text(encoding="utf-8") for name in ("out", "err"))
    return subprocess.CompletedProcess(arguments, process.exitcode, out, err)


def start(
    *arguments: str, folder: Path, said: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Start it in a session of its own; what it prints is in the files ``out`` and ``err``."""
    _FORKS.set_forkserver_preload(VENDORS)
    for name in ("out", "err"):
        (said / name).touch()
    given = (arguments, folder, said, dict(os.environ if environment is None else environment))
    process = _FORKS.Process(target=_run, args=given)
    process.start()
    return process


def kill_after(
    line: str,
    *arguments: str,
    folder: Path,
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Start it and kill it, with all that it has started, a while after it has logged a line."""
    given = {"folder": folder, "seconds": seconds, "environment": environment}
    kill_when(lambda said: line in said, *arguments, **given)


def kill_when(
    condition: Callable[[str], bool],
    *arguments: str,
    folder: Path,
    seconds: float,
    environment: Mapping[str, str] | None = None,
) -> None:
    """The same, a while after a condition on what it has logged, or on anything else, holds."""
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "err"
        process = start(*arguments, folder=folder, said=Path(name), environment=environment)
        while not condition(said := log.read_text(encoding="utf-8")):
            assert process.is_alive(), said[-3000:]
            time.sleep(0.01)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
        process.join(30)
        assert process.exitcode == -signal.SIGKILL, log.read_text(encoding="utf-8")[-3000:]


def _run(arguments: tuple[str, ...], folder: Path, said: Path, environment: dict[str, str]) -> None:
    os.setsid()
    for descriptor, name in ((1, "out"), (2, "err")):
        with open(said / name, "wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    kind, *rest = arguments
    if kind in ("-m", "-c"):
        sys.path.insert(0, "")
        program, *given = rest
        sys.argv = [kind, *given]
        if kind == "-m":
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [kind, *rest]
        sys.path.insert(0, str(Path(kind).resolve().parent))
        runpy.run_path(kind, run_name="__main__")
