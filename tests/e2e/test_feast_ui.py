"""Feast's own page shows what the spec says of each feature, and needs nothing but this machine."""

from __future__ import annotations

import os
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
    """`feast ui` as a process, as `make feast` starts it."""
    port = free_port()
    feast = Path(sys.executable).with_name("feast")
    process = subprocess.Popen(
        [feast, "-c", "data/test/04_feature", "ui", "--host", "127.0.0.1", "--port", str(port)],
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
                assert process.poll() is None, "feast ui ended"
                time.sleep(0.5)
        else:
            pytest.fail("feast ui did not answer within 120 s")
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)


def listed(page: str, kind: str, key: str) -> dict[str, Any]:
    """Registered objects of a kind, by name."""
    answer = httpx.get(f"{page}/api/v1/{kind}", params={"project": "fathom"}, timeout=60)
    assert answer.status_code == 200, answer.text
    return {found["spec"]["name"]: found["spec"] for found in answer.json()[key]}


def test_views_crosses_and_services_are_shown_with_descriptions_owners_and_tags(page: str):
    views = listed(page, "feature_views", "featureViews")
    fields = {field["name"]: field for field in views["users"]["features"]}
    assert fields["income"]["description"] == "Yearly income group, thousands of dollars"
    assert fields["income"]["tags"]["owner"] == "user"
    assert views["product_id_interactions"]["tags"]["owner"] == "item"
    cross = views["cross_product_id_x_display"]
    assert cross["description"].startswith("Cross of product_id and display")
    services = listed(page, "feature_services", "featureServices")
    assert {"wide", "deep", "ranker", "embeddings"} <= set(services)
    assert services["ranker"]["description"].endswith("so no pickled code")
    shown = services["embeddings"]["features"]
    assert any("item_embeddings" in view["featureViewName"] for view in shown)


def test_the_page_itself_asks_nobody_else(page: str):
    text = httpx.get(page, timeout=30).text
    assert "<title>Feast Feature Store</title>" in text
    assert "http://" not in text
    assert "https://" not in text
