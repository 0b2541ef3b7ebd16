"""The page at ``/``: it shows the OpenAPI document, and asks no other host for anything."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest

from chromium import rendered
from fathom.docs_page import PAGE
from running_service import Running


class References(HTMLParser):
    """The addresses that a page refers to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in {"src", "href"} and value]


@pytest.fixture(scope="module")
def client(service: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=service.url, trust_env=False) as client:
        yield client


def test_the_page_refers_to_no_other_host() -> None:
    references = References(PAGE).found
    assert "./static_content/swagger-ui-bundle.js" in references
    assert all(reference.startswith(("./", "data:")) for reference in references), references
    assert "//" not in PAGE


@pytest.mark.e2e
def test_the_service_answers_with_this_page_and_all_that_it_needs(client: httpx.Client) -> None:
    response = client.get("/")
    assert (response.status_code, response.text) == (200, PAGE)
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    needed = [r for r in References(PAGE).found if r.startswith("./")]
    assert len(needed) == 3
    for reference in needed:
        asset = client.get(urljoin("/", reference))
        assert asset.status_code == 200, reference
        assert len(asset.content) > 1000, reference


@pytest.mark.e2e
def test_the_policy_lets_the_browser_ask_nobody_else(client: httpx.Client) -> None:
    policy = client.get("/").headers["content-security-policy"]
    allowed = {name: sources for name, *sources in map(str.split, policy.split(";"))}
    assert allowed["default-src"] == ["'none'"]
    named = {source for sources in allowed.values() for source in sources}
    hashes = {source for source in named if source.startswith("'sha256-")}
    assert named - hashes == {"'none'", "'self'", "'unsafe-inline'", "data:"}
    assert "'unsafe-inline'" not in allowed["script-src"]


@pytest.mark.e2e
def test_a_browser_shows_every_operation_under_this_policy(
    service: Running, client: httpx.Client, tmp_path: Path
) -> None:
    page, complaints = rendered(f"{service.url}/", tmp_path)
    shown = set(re.findall(r'data-path="([^"]+)"', page))
    assert shown == set(client.get("/docs.json").json()["paths"]), complaints
    assert service.artifact.version in page
    assert complaints == ""
