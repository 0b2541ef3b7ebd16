"""The small shop's service as a process of its own, for tests of what surrounds it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from fathom import packaging
from fathom.feature_store import FeatureRepo
from fathom.service import FEATURE_STORE, RANKER, SERVING
from fathom.serving import ServingConfig
from ports import free_port
from small_ranker import Artifact, feature_store, register


@dataclass(frozen=True)
class Running:
    """A service, the artifact that it serves first, its supervisor and what that has printed."""

    url: str
    artifact: Artifact
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def resident_bytes(self) -> int:
        """Memory of the process that answers."""
        (worker,) = psutil.Process(self.process.pid).children()
        return int(worker.memory_info().rss)

    def stop(self) -> None:
        """End it as an orchestrator would; what it has logged is written by then."""
        if self.process.poll() is None:
            family = psutil.Process(self.process.pid).children(recursive=True)
            self.process.terminate()
            self.process.wait(30)
            for child in psutil.wait_procs(family, timeout=10)[1]:
                child.kill()

    def counted(self, name: str) -> float:
        """One of Fathom's counters, by ``/metrics``."""
        text = httpx.get(f"{self.url}/metrics", trust_env=False).text
        found = re.search(rf"^fathom_{name}_total (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0


@contextmanager
def running(
    folder: Path,
    config: ServingConfig | None = None,
    artifact: Artifact | None = None,
    repo: FeatureRepo | None = None,
) -> Iterator[Running]:
    """A service with its feature store, ready; everything is written below a folder."""
    artifact = artifact or register(folder / "ranker", factors=4)
    repo = repo or feature_store(folder)
    port = free_port()
    url, log = f"http://127.0.0.1:{port}", folder / "log"
    # fmt: off
    command = [
        sys.executable, "-m", "bentoml", "serve", "fathom.service:RankingService",
        "--host", "127.0.0.1", "--port", str(port),
    ]
    # fmt: on
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(packaging.__file__).parents[1]),
        "BENTOML_HOME": str(folder / "bentoml"),
        RANKER: str(artifact.folder),
        SERVING: (config or ServingConfig()).model_dump_json(),
        FEATURE_STORE: json.dumps({"root": str(repo.root), **repo.config.model_dump()}),
    }
    with open(log, "w") as output:
        process = subprocess.Popen(
            command, env=environment, cwd=folder, stdout=output, stderr=subprocess.STDOUT
        )
    service = Running(url, artifact, process, log)
    try:
        _wait_until_ready(process, url, log)
        yield service
    finally:
        service.stop()


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{url}/readyz", trust_env=False, timeout=1).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise AssertionError(log.read_text())
