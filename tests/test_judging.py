"""Outcomes judge: who is shown to be worse has to go, and nobody else."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import ibis
import numpy as np
import pyarrow as pa
import pytest

from fathom import files
from fathom.evaluation import EvaluationConfig
from fathom.judging import Judgement, judge_challenger, judge_champion
from fathom.outcomes import OutcomesConfig
from fathom.pipelines.outcomes.nodes import judge_served
from fathom.registry import Challenge, Registry
from small_ranker import SPEC
from test_registry import add

SINCE = datetime(2024, 2, 1, tzinfo=timezone.utc)
CONFIG = OutcomesConfig(prediction_log="log", min_rows=500)
EVALUATION = EvaluationConfig(resamples=100)
USERS, EACH, SEED = 150, 10, 8


def rows(
    version: str,
    how: str,
    bias: float = 1.0,
    noise: float = 0.0,
    users: range = range(USERS),
    at: datetime = SINCE + timedelta(hours=1),
    seed: int = 0,
) -> pa.Table:
    """Ten labelled rows of each user; the probability is the true one, times a bias, with noise."""
    count = len(users) * EACH
    draw = np.random.default_rng(SEED + users.start)  # of requests, which are whoever's answers'
    truth = draw.uniform(0.1, 0.5, count)
    bought = (draw.random(count) < truth).astype(np.int64)
    shift = np.random.default_rng(seed).uniform(-noise, noise, count)
    user = [f"u{u}" for u in users for _ in range(EACH)]
    return pa.table(
        {
            "_request": [f"r{i}" for i in user],
            "user_id": user,
            "item_id": [f"i{k % EACH}" for k in range(count)],
            "event_timestamp": pa.array([at] * count, pa.timestamp("us", "UTC")),
            "_version": [version] * count,
            "_how": [how] * count,
            "probability": np.clip(truth * bias + shift, 0.001, 0.999),
            "bought": bought,
        }
    )


def challenge(mode: Any, since: datetime = SINCE) -> Challenge:
    return Challenge("new", mode, 0.5, since.isoformat(), "a test")


def judged(mode: Any, *tables: pa.Table, **changes: Any) -> Judgement:
    config = CONFIG.model_copy(update=changes)
    found = pa.concat_tables(tables)
    return judge_challenger(found, "old", challenge(mode), SPEC, config, EVALUATION)


def against(mode: Any, **changes: Any) -> Judgement:
    """A challenger beside a champion that knows the true probabilities."""
    others = range(USERS) if mode == "shadow" else range(USERS, 2 * USERS)
    return judged(mode, rows("old", "champion"), rows("new", mode, users=others, **changes))


@pytest.mark.parametrize("mode", ["shadow", "canary"])
def test_a_challenger_as_good_as_the_champion_is_kept(mode: str) -> None:
    found = against(mode)
    assert found.act == "keep"
    assert found.reasons == (
        f"challenger new, a {mode}, is not shown to be worse on 1500 labelled rows",
    )
    assert found.rows == {"champion": 1500, "challenger": 1500}
    loss, calibration = found.intervals["logloss"], found.intervals["calibration"]
    assert loss is not None
    assert loss.lo <= 0 <= loss.hi
    assert calibration is not None
    assert calibration.lo < 1 < calibration.hi
    assert (loss.difference == 0) == (mode == "shadow"), "the same rows, pair by pair"
    json.dumps(found.as_dict(), allow_nan=False)


@pytest.mark.parametrize("mode", ["shadow", "canary"])
def test_a_challenger_out_of_calibration_is_withdrawn(mode: str) -> None:
    found = against(mode, bias=1.8)
    assert found.act == "withdraw"
    (said,) = [reason for reason in found.reasons if "predicts" in reason]
    assert "of what comes, surely 1." in said
    assert said.endswith("[0.8, 1.25] is allowed")


def test_a_challenger_whose_loss_is_shown_to_be_worse_is_withdrawn() -> None:
    found = against("shadow", noise=0.3)
    assert found.act == "withdraw"
    (said,) = found.reasons
    assert said.startswith("challenger new, a shadow, has a logloss +0.")
    assert said.endswith("+0.00200 is allowed")
    # What it costs is not enough where more is allowed.
    lenient = judged(
        "shadow", rows("old", "champion"), rows("new", "shadow", noise=0.3), loss_margin=0.5
    )
    assert lenient.act == "keep"


def test_nobody_is_judged_on_too_little_or_on_what_was_served_before() -> None:
    few = judged("canary", rows("old", "champion"), rows("new", "canary", 1.8, users=range(49)))
    assert few.act == "keep"
    assert few.reasons == (
        "challenger new, a canary, is kept: 1500 of the champion, 490 of the challenger are "
        "labelled; at least 500 are needed to tell",
    )
    early = SINCE - timedelta(seconds=1)
    old = judged("canary", rows("old", "champion"), rows("new", "canary", 1.8, at=early))
    assert old.rows["challenger"] == 0
    # Of another challenge of the same version, as a shadow.
    other = judged("canary", rows("old", "champion"), rows("new", "shadow", 1.8))
    assert other.rows["challenger"] == 0
    waiting = rows("new", "canary", 1.8).set_column(7, "bought", pa.nulls(1500, pa.int64()))
    assert judged("canary", rows("old", "champion"), waiting).rows["challenger"] == 0


def test_a_shadow_is_compared_on_the_rows_that_both_have_scored() -> None:
    part = rows("new", "shadow").slice(100, 700)
    shuffled = part.take(np.random.default_rng(0).permutation(700))
    found = judged("shadow", rows("old", "champion"), shuffled)
    assert found.rows == {"champion": 700, "challenger": 700}
    loss = found.intervals["logloss"]
    assert loss is not None
    assert loss.difference == 0


def test_a_champion_on_probation_is_rolled_back_if_it_is_shown_to_be_out_of_calibration() -> None:
    def champion(bias: float) -> Judgement:
        return judge_champion(rows("new", "champion", bias), "new", SINCE, SPEC, CONFIG, EVALUATION)

    assert champion(1.0).act == "keep"
    found = champion(0.5)
    assert found.act == "rollback"
    assert found.reasons[0].startswith("champion new predicts 0.")
    few = rows("new", "champion", 0.5, users=range(10))
    assert judge_champion(few, "new", SINCE, SPEC, CONFIG, EVALUATION).act == "keep"


def test_of_challengers_that_are_the_champion_hardly_any_has_to_go() -> None:
    """With other users: by the interval, one of forty for its loss."""
    acts = [
        judged(
            "canary",
            rows("old", "champion", users=range(9000 + 200 * k, 9060 + 200 * k)),
            rows("new", "canary", users=range(100 * k, 100 * k + 60)),
        ).act
        for k in range(1, 21)
    ]
    assert acts.count("withdraw") <= 1


# -- what is done about it -----------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    found = Registry(tmp_path / "registry")
    for version in ("old", "new", "third"):
        add(found, version)
    found.promote("old", "the first")
    return found


def served(registry: Registry, *tables: pa.Table, **changes: Any) -> list[dict[str, Any]]:
    config = CONFIG.model_copy(update=changes)
    table = ibis.memtable(pa.concat_tables(tables))
    return judge_served(table, SPEC, config, EVALUATION, str(registry.folder))


def test_the_registry_says_that_outcomes_have_withdrawn_a_challenger(registry: Registry) -> None:
    now = datetime.now(timezone.utc) + timedelta(hours=1)
    registry.challenge("new", "shadow", 1.0, "a test")
    good = served(registry, rows("old", "champion", at=now), rows("new", "shadow", at=now))
    assert [found["act"] for found in good] == ["keep"]
    assert registry.challenger() is not None
    bad = served(registry, rows("old", "champion", at=now), rows("new", "shadow", 1.8, at=now))
    assert [(found["act"], found["version"]) for found in bad] == [("withdraw", "new")]
    assert registry.challenger() is None
    last = registry.history()[-1]
    assert (last["action"], last["by"]) == ("withdraw", "outcomes")
    assert last["reason"] == "; ".join(bad[0]["reasons"])


def test_a_champion_is_rolled_back_only_on_probation_and_to_a_predecessor(
    registry: Registry,
) -> None:
    now = datetime.now(timezone.utc) + timedelta(hours=1)
    off = rows("old", "champion", 0.5, at=now)
    assert served(registry, off) == [], "it has no predecessor"
    registry.promote("new", "better")
    off = rows("new", "champion", 0.5, at=now)
    later = (now + timedelta(days=8)).isoformat()
    assert served(registry, off, as_of=later) == [], "its probation is over"
    assert [found["act"] for found in served(registry, off)] == ["rollback"]
    assert registry.champion() == "old"
    assert registry.history()[-1]["by"] == "outcomes"


def test_a_pointer_of_the_past_is_read_too(registry: Registry) -> None:
    registry.promote("new", "better")
    pointer = registry.folder / "champion.json"
    found = json.loads(pointer.read_text())
    files.write_json(pointer, found | {"since": "2024-01-01T00:00:00+00:00"})
    assert registry.promoted() == "2024-01-01T00:00:00+00:00"
    assert served(registry, rows("new", "champion", 0.5)) == []
    assert Registry(registry.folder / "nowhere").promoted() is None
