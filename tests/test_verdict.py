"""The verdict as people read it: every figure in its place, on a page that needs only itself."""

from __future__ import annotations

import re
from typing import Any

import pytest

from fathom import verdict


def found(part: str | None, metric: str, difference: float, **more: Any) -> dict[str, Any]:
    ends = {"lo": difference - 0.01, "hi": difference + 0.01}
    size = {"rows": 4000, "users": 120}
    return {"part": part, "metric": metric, "difference": difference, "passed": True} | (
        size | ends | {"margin": 0.05} | more
    )


PASSED: dict[str, Any] = {
    "challenger": "v2",
    "champion": "v1",
    "window": {"from": "2017-10-30", "to": "2018-01-01", "rows": 265892, "users": 2098},
    "promoted": True,
    "reasons": ["pass: logloss is lower", "pass: the built Bento answers as in training"],
    "compared": [
        found(None, "logloss", -0.02, margin=0.0),
        found(None, "auc", 0.003, margin=-0.002),
        found("shop = A|B", "logloss", -0.1),
        found("shop = A|B", "auc", 0.02, margin=-0.02),
        found("shop = <C>", "logloss", 0.2, passed=False),
    ],
    "dry_run": {"max_difference": 2e-8, "rows": 64, "p50_ms": 4.25, "p99_ms": 7.5, "seconds": 9.0},
    "max_p99_ms": 500.0,
}
REFUSED = PASSED | {
    "promoted": False,
    "reasons": ["fail: slice shop = <C>: it is worse", "pass: the built Bento answers"],
}


def test_it_says_who_challenged_whom_on_what():
    text = verdict.text(PASSED)
    assert text.startswith("# Challenger v2: promoted\n")
    assert (
        "v2 challenged the champion v1 on the exposures from 2017-10-30 to 2018-01-01: "
        "265,892 rows of 2,098 users." in text
    )
    assert "v2 met no champion on the exposures" in verdict.text(PASSED | {"champion": None})


def test_every_difference_stands_with_its_interval_and_margin():
    lines = verdict.text(REFUSED).splitlines()
    assert "| pass | logloss | -0.02000 | -0.03000 … -0.01000 | +0.00000 |" in lines
    assert "| pass | AUC | +0.00300 | -0.00700 … +0.01300 | -0.00200 |" in lines
    # A slice is a row; its loss is a share.
    loss, auc = "-10.0% (-11.0% … -9.0%)", "+0.02000 (+0.01000 … +0.03000)"
    assert rf"| pass | shop = A\|B | 4,000 | 120 | {loss} | {auc} |" in lines
    worse = "+20.0% (+19.0% … +21.0%) fails"
    assert f"| fail | shop = <C> | 4,000 | 120 | {worse} | - |" in lines
    assert "its margin: logloss +5.0%, AUC -0.02000." in verdict.text(REFUSED)


def test_it_says_how_the_bento_did():
    said = " ".join(verdict.text(PASSED).split())
    assert "gave the golden probabilities to within 2.0e-08" in said
    assert "64 rows took 4.2 ms in the median and 7.5 ms at the 99th percentile; 500 ms" in said
    broken = PASSED | {"dry_run": {"fault": "fathom:v2-1 ended with exit code 1"}}
    assert "It failed its dry run: fathom:v2-1 ended with exit code 1." in verdict.text(broken)


def test_every_check_is_listed():
    lines = verdict.text(REFUSED).splitlines()
    assert "| fail | slice shop = <C>: it is worse |" in lines
    assert "| pass | the built Bento answers |" in lines


@pytest.mark.parametrize(
    ("found", "sentence"),
    [
        (PASSED, "v2 passes every check and takes the place of v1."),
        (PASSED | {"champion": None}, "v2 passes every check and becomes the first champion."),
        (REFUSED, "v2 is refused and v1 stays champion: 1 of 2 checks failed."),
        (
            REFUSED | {"champion": None},
            "v2 is refused and there is still no champion: 1 of 2 checks failed.",
        ),
    ],
)
def test_one_sentence_closes_it(found, sentence):
    assert verdict.text(found).rstrip().endswith(f"**{sentence}**")
    assert f"<strong>{sentence}</strong></p></body></html>" in verdict.page(found)


def test_the_page_says_the_same_and_needs_nothing_else():
    page = verdict.page(REFUSED)
    assert not re.search(r"(src|href)=|@import|url\(|<script", page)
    assert "shop = &lt;C&gt;" in page
    assert "<C>" not in page
    for cell in ("-0.03000 … -0.01000", "+20.0% (+19.0% … +21.0%) fails", "265,892 rows"):
        assert cell in page
    assert page.count('<tr class="fail">') == 2  # the slice, and the check of it


def test_without_a_champion_there_is_nothing_to_compare():
    text = verdict.text(PASSED | {"champion": None, "compared": []})
    assert "## Against the champion" not in text
    assert "## Slices" not in text
