"""The page at ``/try``: it ranks with this service, and asks no other host for anything."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from chromium import rendered
from fathom.service import Serving, app
from fathom.serving import ServingConfig
from fathom.try_page import POLICY, page
from running_service import Running, running
from small_ranker import Artifact, register


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return register(tmp_path_factory.mktemp("artifact"))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("service"), ServingConfig(try_page=True)) as service:
        yield service


def test_it_is_there_only_where_it_is_asked_for(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = TestClient(app)
    for asked, status in ((True, 200), (False, 404)):
        serving = Serving(artifact.folder, None, ServingConfig(try_page=asked))
        with monkeypatch.context() as patch:
            patch.setattr(app.state, "serving", serving, raising=False)
            assert client.get("/try").status_code == status
        serving.close()
    assert ServingConfig().try_page is False


def test_it_refers_to_no_other_host_and_runs_no_other_script() -> None:
    made = page("[]")
    hosts = set(re.findall(r"https?://[^\"'\s]+", made))
    assert hosts == {"http://www.w3.org/2000/svg"}, "the name of a format, not an address"
    allowed = {name: sources for name, *sources in map(str.split, POLICY.split(";"))}
    assert allowed["default-src"] == ["'none'"]
    assert allowed["connect-src"] == ["'self'"]
    assert all(source.startswith("'sha256-") for source in allowed["script-src"])


def test_names_of_columns_cannot_become_markup() -> None:
    assert "</script><b>" not in page('["</script><b>"]')


@pytest.mark.e2e
def test_a_browser_shows_the_ranked_items_with_their_parts(
    service: Running, tmp_path: Path
) -> None:
    shown, complaints = rendered(f"{service.url}/try", tmp_path)
    assert complaints == ""
    fault = re.search(r'<p id="fault" role="alert">(.*?)</p>', shown)
    assert fault is not None
    assert html.unescape(fault[1]) == ""
    rows = re.findall(r"<tr><td>(\d+)</td><td>([^<]+)</td><td>([\d.]+)</td>", shown)
    assert rows, "no item is shown"
    assert [int(place) for place, _, _ in rows] == list(range(1, len(rows) + 1))
    probabilities = [float(probability) for _, _, probability in rows]
    assert probabilities == sorted(probabilities, reverse=True)
    assert len(re.findall(r'<rect class="deep"', shown)) == len(rows)
    assert len(re.findall(r'<rect class="wide"', shown)) == len(rows)
    for name in ("shelf", "shop", "discount"):
        assert f'data-context="{name}"' in shown
    assert service.artifact.version in shown
