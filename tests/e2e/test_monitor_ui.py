"""Evidently's own page lists every window that was watched, and asks nobody else."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from ports import free_port

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def page(run: Any) -> Iterator[str]:
    """`evidently ui` as a process, as `make monitor-ui` starts it."""
    port = free_port()
    evidently = Path(sys.executable).with_name("evidently")
    workspace = "data/test/08_reporting/workspace"
    process = subprocess.Popen(
        [evidently, "ui", "--workspace", workspace, "--port", str(port)],
        cwd=run[0].folder,
        env=run[0].environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                httpx.get(url, timeout=5)
                break
            except httpx.TransportError:
                assert process.poll() is None, "evidently ui ended"
                time.sleep(0.5)
        else:
            pytest.fail("evidently ui did not answer within 120 s")
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def answer(url: str) -> Any:
    found = httpx.get(url, timeout=60)
    assert found.status_code == 200, found.text
    return found.json()


def test_the_window_that_was_watched_is_listed_with_its_decision(page: str, run: Any) -> None:
    (project,) = answer(f"{page}/api/projects")
    assert project["name"] == "Fathom"
    runs = answer(f"{page}/api/projects/{project['id']}/reports")
    decision = run[0].json("08_reporting/decision.json")
    kinds = {shown["name"].split()[2] for shown in runs}
    assert kinds <= {"drift", "quality"}
    assert "drift" in kinds
    for shown in runs:
        assert shown["metadata"]["version"] == decision["version"]
        assert shown["metadata"]["retrain"] == str(decision["retrain"])
        assert shown["metadata"]["severity"] == decision["severity"]
        assert all(reason in shown["metadata"]["reasons"] for reason in decision["reasons"])


def test_the_page_itself_asks_nobody_else(page: str) -> None:
    text = httpx.get(page, timeout=30).text
    assert re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", text) == []
