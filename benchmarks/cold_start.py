"""How long a service takes from its start to its first ranking, and how much memory it then holds.

Starts the champion as ``make serve`` does, in the project's folder, on what a run left there.

    python benchmarks/cold_start.py                    # after make run
    python benchmarks/cold_start.py --env test --json
    python benchmarks/cold_start.py --quick            # one start
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil

from fathom.hardware import hardware

TARGETS = {"ready": 10.0, "rss_mb": 1024}
WAIT_SECONDS = 300.0
#: As in the Makefile.
ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "BENTOML_DO_NOT_TRACK": "True",
    "KEDRO_DISABLE_TELEMETRY": "1",
    "BENTOML_HOME": str(Path("data/06_models/bentoml").absolute()),
}


class StartError(RuntimeError):
    """The service did not come up; the message ends with what it printed."""


@contextmanager
def started(env: str | None) -> Iterator[tuple[subprocess.Popen[bytes], str, Path]]:
    """The service on a free port, its URL, and the file of what it prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "kedro", "serve", "--port", str(port)]
    command += ["--env", env] if env else []
    with tempfile.NamedTemporaryFile() as output:
        process = subprocess.Popen(
            command, env=ENVIRONMENT | os.environ, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            yield process, f"http://127.0.0.1:{port}", Path(output.name)
        finally:
            family = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            for child in psutil.wait_procs(family, timeout=10)[1]:
                child.kill()


def measure(env: str | None) -> dict[str, float]:
    """One start: seconds to each answer, processor seconds, and MiB of the process tree."""
    began, found = time.perf_counter(), {}
    with (
        started(env) as (process, url, output),
        httpx.Client(trust_env=False, timeout=30) as client,
    ):

        def wait(path: str, body: str | None = None) -> float:
            while time.perf_counter() - began < WAIT_SECONDS and process.poll() is None:
                with suppress(httpx.HTTPError):
                    answer = client.request("POST" if body else "GET", url + path, content=body)
                    if answer.status_code == 200:
                        return time.perf_counter() - began
                time.sleep(0.02)
            raise StartError(f"{path} was not answered:\n{output.read_text()[-4000:]}")

        found["live"] = wait("/livez")
        found["ready"] = wait("/readyz")
        example = re.search(r"/rank -d '(.*)'", output.read_text())
        if example is None:
            raise StartError(f"no example of a request:\n{output.read_text()[-4000:]}")
        found["first_rank"] = wait("/rank", example[1])
        return found | held(process.pid)


def held(pid: int) -> dict[str, float]:
    """What a process and its children hold: pages that they share count once in ``pss_mb``."""
    tree = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    memory = [process.memory_full_info() for process in tree]
    times = [process.cpu_times() for process in tree]
    return {
        "cpu": sum(t.user + t.system for t in times),
        "processes": len(tree),
        "rss_mb": sum(m.rss for m in memory) / 2**20,
        "pss_mb": sum(m.pss for m in memory) / 2**20,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--env", help="the deployment, as for kedro serve")
    parser.add_argument("--starts", type=int, default=3, help="how many, after one to warm up")
    parser.add_argument("--quick", action="store_true", help="one start, on what --env test left")
    parser.add_argument("--json", action="store_true", help="end with one JSON object")
    options = parser.parse_args()
    env = options.env or ("test" if options.quick else None)
    try:
        # The first start of a version or of changed code builds its Bento and compiles modules.
        runs = [measure(env) for _ in range(1 if options.quick else options.starts + 1)]
    except StartError as error:
        raise SystemExit(f"cold_start: {error}") from None
    runs = runs[1:] or runs
    figures: dict[str, Any] = {
        name: round(statistics.median(run[name] for run in runs), 2) for name in runs[0]
    }
    print(f"median of {len(runs)} starts, {hardware()}\n")
    words = {
        "live": "s to /livez",
        "ready": "s to /readyz",
        "first_rank": "s to the first /rank",
        "cpu": "s of processors",
        "processes": "processes",
        "rss_mb": "MiB resident, process by process",
        "pss_mb": "MiB resident, shared pages once",
    }
    for name, unit in words.items():
        target = f"   (at most {TARGETS[name]:,.0f})" if name in TARGETS else ""
        print(f"{figures[name]:10,.2f} {unit}{target}")
    if options.json:
        print(json.dumps(figures | {"starts": len(runs), "hardware": hardware()}))


if __name__ == "__main__":
    main()
