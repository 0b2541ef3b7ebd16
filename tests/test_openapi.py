"""What the OpenAPI document promises holds for requests that nobody thought of.

Schemathesis makes requests from the document, such that fit it and such that do not, and compares
what a running service answers with it.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fathom.serving import ServingConfig
from running_service import Running, running

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A service that turns nobody away because the machine is busy."""
    config = ServingConfig(queue_seconds=20, deadline_seconds=20)
    with running(tmp_path_factory.mktemp("patient"), config) as service:
        yield service


#: What a document cannot say: a moment's form and years, and that a column of the context may be
#: left out if each candidate has its own.
CONFIG = """
[generation]
deterministic = true
database = "none"

[phases]
coverage.enabled = false
stateful.enabled = false

[[operations]]
include-path-regex = "^/(rank|recommend)$"
checks.positive_data_acceptance.enabled = false
"""


def test_no_request_brings_an_error_or_an_answer_that_is_not_described(
    patient: Running, tmp_path: Path
) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    tool, document = Path(sys.executable).with_name("schemathesis"), f"{patient.url}/docs.json"
    options = "--max-examples 50 --request-timeout 60"
    found = subprocess.run(
        [tool, "run", document, "--url", patient.url, *options.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "8 selected / 8 total" in found.stdout
