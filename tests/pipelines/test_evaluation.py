"""Whom a candidate is compared with."""

from __future__ import annotations

import pytest

from fathom import files
from fathom.pipelines.evaluation.nodes import look_up_champion


@pytest.mark.parametrize(
    ("champions", "candidate", "challenged"),
    [
        ([], "v1", None),
        (["v1"], "v2", "v1"),
        (["v1", "v2"], "v3", "v2"),
        # The candidate is in charge already: the run that promoted it is repeated.
        (["v1"], "v1", None),
        (["v1", "v2"], "v2", "v1"),
        (["v1", "v2", "v1"], "v1", "v2"),
    ],
)
def test_a_candidate_challenges_the_champion_or_whom_it_has_replaced(
    tmp_path, champions, candidate, challenged
):
    if champions:
        files.write_json(tmp_path / "champion.json", {"champions": champions})
    assert look_up_champion(candidate, str(tmp_path)) == {"version": challenged}
