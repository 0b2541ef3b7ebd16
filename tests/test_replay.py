"""The year's replay: every policy sees what it would have seen, and pays for what it trains."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from fathom import replay_report
from fathom.config import TrainingConfig
from fathom.drift import MonitoringConfig
from fathom.evaluation import EvaluationConfig
from fathom.feature_store import to_arrow
from fathom.gate import GateConfig
from fathom.replay import WEEK, Log, Replay, ReplayConfig, ReplayError
from fathom.retraining import Recipe, RetrainingConfig, nothing_newer
from small_ranker import SPEC, START, plain_frame

WEEKS, A_DAY = 9, 20
#: That lets anything pass.
GATE = GateConfig(
    calibration_lo=0.01,
    calibration_hi=100,
    loss_margin=10,
    auc_margin=1,
    user_auc_margin=1,
    calibration_margin=10,
)
RECIPE = Recipe(
    SPEC,
    TrainingConfig(hidden=(8,), epochs=1, batch_size=32, device="cpu", threads=1),
    RetrainingConfig(
        validation_days=7,
        test_days=7,
        growth=9.0,
        fresh_growth=9.0,
        fresh_margin=10.0,
        catch_up=False,
    ),
    EvaluationConfig(resamples=20),
)


def table() -> pa.Table:
    """Nine weeks of exposures, twenty a day."""
    rows = WEEKS * 7 * A_DAY
    frame = plain_frame(rows)
    days = np.repeat(np.arange(WEEKS * 7), A_DAY)
    moments = np.datetime64(START.replace(tzinfo=None), "us") + days * np.timedelta64(1, "D")
    columns = {name: to_arrow(values) for name, values in frame.items()}
    columns["event_timestamp"] = pa.array(moments, pa.timestamp("us"))
    columns["request_id"] = pa.array([f"r{row // 5}" for row in range(rows)])
    return pa.table(columns)


def lived(folder: Path, log: pa.Table, kind: type[Replay] = Replay, **settings: Any) -> Any:
    """Four weeks of training, then the rest week by week."""
    config = ReplayConfig(first_weeks=4, fixed_weeks=2, **settings)
    monitoring = MonitoringConfig(min_rows=50, min_labels=20, sample_rows=200, leaning_rows=100)
    given = (RECIPE, monitoring, GATE, config)
    return kind(Log(log, SPEC), *given, START, folder).run()


class Alarmed(Replay):
    """Whose monitor asks for a retraining every week, so that nothing depends on drift."""

    def _decision(self, line: Any, now: Any) -> Any:
        until = self._split(now).moment("validation_from")
        waits = nothing_newer(line.training.base.ranker.provenance, until)
        reasons = ["asked to"] if waits is None else [waits]
        return SimpleNamespace(retrain=waits is None, reasons=reasons, alerts=())


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return lived(tmp_path_factory.mktemp("replay"), table(), Alarmed)


def of(figures: Any, policy: str, name: str) -> list[Any]:
    """A figure of a policy, by week."""
    return [week["policies"][policy][name] for week in figures["weeks"]]


def timeless(figures: Any) -> Any:
    """Without what no two runs share."""
    found = copy.deepcopy(figures)
    for total in found["totals"].values():
        del total["seconds"]
    return found


def test_each_policy_retrains_when_it_says(figures: Any) -> None:
    assert [week["start"][:10] for week in figures["weeks"]] == [
        "2024-01-29",
        "2024-02-05",
        "2024-02-12",
        "2024-02-19",
        "2024-02-26",
    ]
    assert of(figures, "never", "retrained") == [False] * 5
    assert of(figures, "weekly", "retrained") == [False, True, True, True, True]
    assert of(figures, "fixed", "retrained") == [False, False, True, False, True]
    assert of(figures, "weekly_warm", "started")[1:] == [["warm"]] * 4
    assert len(set(of(figures, "never", "version"))) == 1
    assert len(set(of(figures, "weekly", "version"))) == 5
    # All begin alike, and the same data from the same start give the same model.
    assert len({of(figures, name, "version")[0] for name in figures["policies"]}) == 1
    assert of(figures, "fixed", "version")[4] == of(figures, "weekly", "version")[4]


def test_a_shared_training_is_charged_to_each(figures: Any) -> None:
    """Weekly trains on 4, 5, 6 and 7 weeks of 140 rows, fixed on the second and fourth of these."""
    totals = figures["totals"]
    assert totals["never"]["examples"] == 0
    assert totals["weekly"]["examples"] == (4 + 5 + 6 + 7) * 7 * A_DAY
    assert totals["fixed"]["examples"] == (5 + 7) * 7 * A_DAY
    assert totals["weekly_warm"]["examples"] < totals["weekly"]["examples"] / 3
    assert totals["weekly"]["against_weekly"] == {}
    assert set(totals["never"]["against_weekly"]["logloss"]) == {"difference", "lo", "hi"}


def test_the_watched_policy_leaves_the_gates_window_out_of_training(figures: Any) -> None:
    """A week for the gate and one for validation: in the second week there is nothing newer yet."""
    assert of(figures, "fathom", "retrained") == [False, False, True, True, True]
    (waits,) = of(figures, "fathom", "reasons")[1]
    assert waits == (
        "waiting: the champion has learnt what there is until 2024-01-22 00:00, and a retraining "
        "could learn until 2024-01-22 00:00 only, for what comes after that is to validate and "
        "judge it by"
    )
    assert of(figures, "fathom", "promoted") == [False, False, True, True, True]
    assert of(figures, "fathom", "started")[2] == ["warm"]


def test_what_passes_the_gate_catches_up_before_it_is_deployed(tmp_path: Path) -> None:
    """Deployed at the start of the third week, it knows all there is then. So it takes three weeks
    until there is something newer that is not needed to validate and judge by."""

    class Catching(Alarmed):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            settings = self.recipe.retraining.model_copy(update={"catch_up": True})
            self.recipe = replace(self.recipe, retraining=settings)

        def _step(self, line: Any, number: int, now: Any) -> Any:
            done = super()._step(line, number, now)
            if done["promoted"]:
                made = line.training.base.ranker.provenance
                assert made["trained_until"] == now.isoformat()
                assert made["judged"] == line.training.judged.version != line.training.base.version
                assert made["validated_from"] == line.training.split.validation_from
            return done

    found = lived(tmp_path, table(), Catching, policies=("fathom",))
    assert of(found, "fathom", "promoted") == [False, False, True, False, False]
    without = lived(tmp_path / "b", table(), Alarmed, policies=("fathom",), weeks=3)
    more = [each["totals"]["fathom"]["examples"] for each in (found, without)]
    assert more[0] >= more[1] + 2 * 7 * A_DAY  # the two weeks for validation and the gate


def test_a_caught_up_one_is_watched_by_what_the_judged_one_said_of_the_windows(
    tmp_path: Path,
) -> None:
    """It has learnt them itself, so its own scores there would promise too much."""
    references = []

    class Watched(Replay):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            settings = {"catch_up": True, "growth": 1.2}
            retraining = self.recipe.retraining.model_copy(update=settings)
            self.recipe = replace(self.recipe, retraining=retraining)
            self.monitoring = self.monitoring.model_copy(update={"min_rows": 1000})

        def _decision(self, line: Any, now: Any) -> Any:
            found = super()._decision(line, now)
            if line.training.judged is not None:
                references.append((line.training, max(self._references)))
            return found

    lived(tmp_path, table(), Watched, policies=("fathom",))
    assert references
    for training, (version, until) in references:
        assert version == training.base.version
        assert until.isoformat() <= training.base.ranker.provenance["trained_until"]


def test_a_challenger_that_the_gate_refuses_is_paid_for_and_not_deployed(tmp_path: Path) -> None:
    class Strict(Alarmed):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            self.gate = GateConfig(calibration_lo=0.001, calibration_hi=0.002)

    found = lived(tmp_path, table(), Strict, policies=("fathom",), weeks=3)
    assert of(found, "fathom", "retrained") == [False, False, True]
    assert of(found, "fathom", "promoted") == [False] * 3
    assert any("calibration" in reason for reason in of(found, "fathom", "reasons")[2])
    assert found["totals"]["fathom"]["examples"] > 0
    assert len(set(of(found, "fathom", "version"))) == 1


def test_nothing_later_is_seen(figures: Any, tmp_path: Path) -> None:
    """The first weeks come out the same if all labels that come after them are turned round."""
    log = table()
    later = np.arange(log.num_rows) >= 7 * 7 * A_DAY
    bought = np.where(later, 1 - log["bought"].to_numpy(), log["bought"].to_numpy())
    other = log.set_column(log.column_names.index("bought"), "bought", pa.array(bought))
    found = lived(tmp_path, other, Alarmed)
    assert found["weeks"][:3] == figures["weeks"][:3]
    assert found["weeks"][3] != figures["weeks"][3]


def test_a_replay_that_is_run_again_trains_nothing_twice(tmp_path: Path) -> None:
    """What was trained is found in the folder: the same figures, from the same checkpoints."""
    settings = {"policies": ("weekly", "fathom"), "weeks": 3}
    first = lived(tmp_path, table(), Alarmed, **settings)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("best-*")}
    assert timeless(lived(tmp_path, table(), Alarmed, **settings)) == timeless(first)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("best-*")} == made


def test_drift_decides_for_the_watched_policy(tmp_path: Path) -> None:
    """From the seventh week on labels are turned round, which the week after is told."""
    log = table()
    later = np.arange(log.num_rows) >= 6 * 7 * A_DAY
    bought = np.where(later, 1 - log["bought"].to_numpy(), log["bought"].to_numpy())
    log = log.set_column(log.column_names.index("bought"), "bought", pa.array(bought))
    found = lived(tmp_path, log, policies=("fathom",))
    assert of(found, "fathom", "retrained") == [False, False, False, True, True]
    assert of(found, "fathom", "reasons")[0] == []
    assert re.search("more than is usual", of(found, "fathom", "reasons")[3][0])


def test_data_that_have_outgrown_the_deployed_one_ask_for_a_retraining(tmp_path: Path) -> None:
    """It learnt from 3 weeks; 5 are there, two more aside, at the start of the fourth week."""

    class Growing(Replay):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            settings = self.recipe.retraining.model_copy(
                update={"growth": 1.5, "fresh_growth": 1.5}
            )
            self.recipe = replace(self.recipe, retraining=settings)
            # Windows of so few rows get no verdict on drift.
            self.monitoring = self.monitoring.model_copy(update={"min_rows": 1000})

    found = lived(tmp_path, table(), Growing, policies=("drift_only", "fathom"))
    assert of(found, "drift_only", "retrained") == [False] * 5
    assert of(found, "fathom", "retrained") == [False, False, False, True, False]
    assert of(found, "fathom", "started")[3] == ["fresh"]
    assert "growth: there are 1." in of(found, "fathom", "reasons")[3][-1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policies": ("sometimes",)}, r"no policy 'sometimes'; there are never, weekly, fixed"),
        ({"weeks": None, "policies": ("never",)}, r"lower params:replay.first_weeks"),
    ],
)
def test_what_cannot_be_replayed_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    log = table()
    short = log.slice(0, 4 * 7 * A_DAY + A_DAY) if "weeks" in settings else log
    with pytest.raises(ReplayError, match=message):
        lived(tmp_path, short, **settings)


def test_a_log_is_cut_from_a_moment_to_before_another() -> None:
    log = Log(table(), SPEC)
    assert len(log.window(START, START + WEEK).moments) == 7 * A_DAY
    assert len(log.rows(START + WEEK, START + 2 * WEEK)) == 7 * A_DAY
    assert log.window(START + WEEK, START + 2 * WEEK).moments[0] == np.datetime64("2024-01-08")


def test_the_page_asks_nothing_of_a_network_and_the_table_says_the_sums(figures: Any) -> None:
    page = replay_report.page(figures)
    assert "<h1>The year's replay</h1>" in page
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    for name in figures["policies"]:
        assert f"<b>{name}</b>" in page
    lines = replay_report.table(figures).splitlines()
    assert lines[0].split()[:2] == ["policy", "logloss"]
    assert [line.split()[0] for line in lines[1:-1]] == list(figures["policies"])
    assert "100%" in lines[2]
    assert lines[-1] in page


@pytest.mark.parametrize(
    ("difference", "examples", "said"),
    [
        (-0.002, 50, "-1.00% of the logloss from weekly (-2.00% to +0.00%), at 50% of its compute"),
        (0.002, 10, "+1.00% of the logloss from weekly (+0.00% to +2.00%), at 10% of its compute"),
        (-0.002, 51, "-1.00% of the logloss from weekly (-2.00% to +0.00%), at 51% of its compute"),
    ],
)
def test_the_report_says_what_the_policy_costs(difference: float, examples: int, said: str) -> None:
    found = {"difference": difference, "lo": difference - 0.002, "hi": difference + 0.002}
    fathom = {
        "logloss": 0.2 + difference,
        "examples": examples,
        "against_weekly": {"logloss": found},
    }
    weekly = {"logloss": 0.2, "examples": 100, "against_weekly": {}}
    figures = {"loss": "logloss", "totals": {"weekly": weekly, "fathom": fathom}}
    (line,) = replay_report.worth(figures)
    holds = difference <= 0 and examples <= 50
    assert line == (
        f"fathom ends {said}: it is {'' if holds else 'not '}as good as that at half the compute "
        "or less"
    )
    assert replay_report.worth({"loss": "logloss", "totals": {"weekly": weekly}}) == []


def test_a_policy_by_itself_needs_no_yardstick(tmp_path: Path) -> None:
    found = lived(tmp_path, table(), policies=("never",), weeks=2)
    assert found["totals"]["never"]["against_weekly"] == {}
    assert "never" in replay_report.table(found)
    assert replay_report.plot(found).data[0].name == "never"


def test_another_seed_is_another_year(figures: Any, tmp_path: Path) -> None:
    other = replace(RECIPE, training=replace(RECIPE.training, seed=1))
    given = (other, MonitoringConfig(), GateConfig(), ReplayConfig(first_weeks=4, weeks=2))
    found = Alarmed(Log(table(), SPEC), *given, START, tmp_path).run()
    assert of(found, "never", "version")[0] != of(figures, "never", "version")[0]
