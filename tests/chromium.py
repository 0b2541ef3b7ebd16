"""A headless Chromium for the tests of pages; nothing is downloaded for it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def rendered(url: str, folder: Path, wait_ms: int = 10_000) -> tuple[str, str]:
    """What a page is after its scripts have run, and what the browser complained of.

    Args:
        folder: for the browser's profile.
        wait_ms: how long the scripts may take, in the browser's own time.
    """
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip(f"no browser on the path (any of {', '.join(NAMES)})")
    arguments = [
        *("--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
        *("--disable-component-update", "--disable-sync", "--no-proxy-server"),
        *("--enable-logging=stderr", f"--user-data-dir={folder}"),
        # In containers Chromium cannot make its own sandbox as root.
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
        *(f"--virtual-time-budget={wait_ms}", "--dump-dom"),
    ]
    done = subprocess.run(
        [browser, *arguments, url], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, "\n".join(complaints)
