"""The last word: the gate's verdict and the Bento's dry run, joined and written down."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import pytest

from fathom import files, packaging
from fathom.pipelines.release.nodes import ReleaseConfig, conclude, dry_run
from fathom.registry import Registry
from fathom.runner import ABSENT, ReceiptDataset

JUDGED: dict[str, Any] = {
    "promoted": True,
    "reasons": ["pass: logloss is lower"],
    "compared": [],
    "challenger": "v2",
    "champion": "v1",
    "window": {"from": "2024-01-01", "to": "2024-01-31", "rows": 10, "users": 3},
}
FAST = {"max_difference": 1e-8, "rows": 16, "p50_ms": 4.0, "p99_ms": 9.5, "seconds": 8.0}
CONFIG = ReleaseConfig(max_p99_ms=10.0)


def test_a_fast_bento_that_answers_as_in_training_passes():
    found, text, page = conclude(JUDGED, FAST, CONFIG)
    assert found["promoted"]
    assert found["reasons"] == [
        "pass: logloss is lower",
        "pass: the built Bento answers as in training",
        "pass: it answers 99 in 100 golden requests within 10 ms",
    ]
    assert "takes the place of v1" in text
    assert "takes the place of v1" in page


def test_a_slow_bento_is_refused_with_its_time_and_the_bound():
    found, text, _ = conclude(JUDGED, FAST | {"p99_ms": 10.25}, CONFIG)
    assert not found["promoted"]
    assert found["reasons"][-1] == (
        "fail: it answers 99 in 100 golden requests within 10.2 ms only; "
        "release.max_p99_ms allows 10 ms"
    )
    assert "v2 is refused and v1 stays champion: 1 of 3 checks failed." in text


def test_whom_the_gate_refused_no_bento_saves():
    refused = JUDGED | {"promoted": False, "reasons": ["fail: logloss is not lower"]}
    assert not conclude(refused, FAST, CONFIG)[0]["promoted"]


@pytest.fixture
def registry(tmp_path) -> Registry:
    folder = tmp_path / "versions" / "v2"
    files.write_json(folder / "golden.json", {"rows": [{}], "probabilities": [0.5]})
    return Registry(tmp_path)


def test_a_bento_that_fails_its_dry_run_is_refused_and_tried_again_next_time(
    registry, monkeypatch, tmp_path
):
    """It does not end the run: the champion stays, and the verdict says why."""

    def fails(tag: str, golden: Any) -> None:
        raise packaging.DryRunError(f"{tag} ended with exit code 1 before it was ready:\nTraceback")

    monkeypatch.setattr(packaging, "dry_run", fails)
    receipt = dry_run({"version": "v2"}, {"tag": "fathom:v2-1"}, str(registry.folder))
    fault = "fathom:v2-1 ended with exit code 1 before it was ready"
    assert receipt["fault"] == fault
    assert datetime.fromisoformat(receipt["expires"]) <= datetime.now(timezone.utc)
    kept = ReceiptDataset(str(tmp_path / "dry_run.json"))
    kept.save(receipt)
    assert kept.fingerprint(lambda path: "") == ABSENT
    found, text, _ = conclude(JUDGED, receipt, CONFIG)
    assert found["reasons"][-1] == f"fail: the built Bento failed its dry run: {fault}"
    assert not found["promoted"]
    assert f"It failed its dry run: {fault}." in text


def test_what_a_dry_run_found_is_kept(registry, monkeypatch):
    result = packaging.DryRun(1e-8, seconds=8.0, rows=1, p50_ms=4.0, p99_ms=9.5)
    asked = []
    monkeypatch.setattr(packaging, "dry_run", lambda *given: asked.append(given) or result)
    receipt = dry_run({"version": "v2"}, {"tag": "fathom:v2-1"}, str(registry.folder))
    assert receipt == FAST | {"rows": 1}
    assert asked == [("fathom:v2-1", {"rows": [{}], "probabilities": [0.5]})]
