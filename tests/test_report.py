"""What people read holds the figures, each in its place."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fathom import hardware, report
from fathom.config import TrainingConfig
from fathom.encoding import fit_encoder
from fathom.models import build
from fathom.ranker import Ranker
from fathom.report import closing_table, metrics_table, model_card
from fathom.spec import FeatureSpec

SPEC = FeatureSpec.model_validate(
    {
        "entities": {"user": "household", "item": "product", "request": "trip"},
        "label": {"name": "bought", "values": [0, 1]},
        "columns": [
            {"name": "display", "kind": "categorical", "owner": "context"},
            {"name": "week", "kind": "numeric", "owner": "context"},
        ],
        "crosses": [{"columns": ["display", "week"]}],
    }
)
PROVENANCE: dict[str, Any] = {
    "seed": 41,
    "data_hash": "d4" * 32,
    "code_version": "0.7.1",
    "hardware": "x86_64, 2 cores",
    "trained_from": "2017-02-01",
    "trained_until": "2017-10-30",
    "rows": {"train": 1234567, "validation": 89},
    "best_epoch": 3,
    "parameters": 765432,
    "wide_zero_share": 0.8125,
}
METRICS = {
    "candidate": {
        **{"rows": 5000, "auc": 0.94321, "logloss": 0.23456, "user_auc": 0.71},
        **{"ndcg_at_10": 0.5, "calibration": 1.0123},
    },
    "popularity": {"rows": 5000, "auc": 0.897, "logloss": 0.326, "user_auc": None},
}
SLICES = {"metrics": {"new users": {"rows": 1200, "auc": 0.81}}, "left_out": {"display=Z": 7}}
VERDICT: dict[str, Any] = {
    "promoted": False,
    "reasons": ["pass: auc is enough", "fail: logloss is worse"],
    "compared": [],
}


def ranker(spec: FeatureSpec = SPEC, **provenance: Any) -> Ranker:
    frame = {"display": np.array(["A", "B"], object), "week": np.float32([1, 2])}
    encoder = fit_encoder(frame, spec)
    config = TrainingConfig(hidden=(2,))
    return Ranker(encoder, build(encoder.layout, config), config, PROVENANCE | provenance)


def rows_of(table: str) -> dict[str, list[str]]:
    """A Markdown table's cells by its first column."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()]
    cells = [[cell.strip() for cell in line] for line in lines if line]
    return {line[0]: line[1:] for line in cells}


# --- tables ------------------------------------------------------------------------------------


def test_doctests():
    assert doctest.testmod(report).failed == 0
    assert doctest.testmod(report).attempted > 0


def test_a_metrics_table_has_a_row_per_model_and_a_column_per_metric():
    table = rows_of(metrics_table(METRICS))
    assert table[""] == ["rows", "auc", "logloss", "user_auc", "ndcg_at_10", "calibration"]
    assert table["candidate"] == ["5,000", "0.9432", "0.2346", "0.7100", "0.5000", "1.0123"]
    assert table["popularity"] == ["5,000", "0.8970", "0.3260", "-", "-", "-"]


def test_a_regression_is_measured_by_its_errors():
    table = rows_of(metrics_table({"a": {"rmse": 2.5, "mae": 1.25, "rows": 3}}))
    assert table[""] == ["rows", "rmse", "mae", "ndcg_at_10", "calibration"]
    assert table["a"] == ["3", "2.5000", "1.2500", "-", "-"]


def test_no_metrics_are_none():
    assert metrics_table({}) == "None."


def test_a_value_with_a_bar_in_it_does_not_break_the_table():
    table = rows_of(metrics_table({"display=A|B": {"rows": 1, "auc": 0.5}}))
    assert table[r"display=A\|B"][:2] == ["1", "0.5000"]


# --- the model card ----------------------------------------------------------------------------


def test_a_model_card_holds_the_figures():
    candidate = ranker()
    card = model_card(candidate, METRICS, SLICES, VERDICT)
    assert card.startswith(f"# Model card: ranker {candidate.version}\n")
    assert "`wide_deep` model that ranks `product` for\n`household`" in card
    assert "probability of `bought` (binary task)" in card

    table = rows_of(card.split("## Training")[1].split("## Test window")[0])
    assert {name: cells for name, cells in table.items() if name not in {"", "---"}} == {
        "exposures": ["1,234,567 from 2017-02-01 to 2017-10-30"],
        "parameters": ["765,432"],
        "wide weights that are zero": ["81.2%"],
        "best epoch": ["3"],
        "seed": ["41"],
        "features": ["2 columns; crosses: `display_x_week`"],
        "data SHA-256": [f"`{'d4' * 32}`"],
        "spec SHA-256": [f"`{SPEC.hash}`"],
        "code": ["fathom 0.7.1"],
        "hardware": ["x86_64, 2 cores"],
    }
    assert metrics_table(METRICS) in card.split("## Test window")[1].split("## Slices")[0]
    slices = card.split("## Slices")[1].split("## Gate")[0]
    assert metrics_table(SLICES["metrics"]) in slices
    assert "Too small to tell: display=Z (7)." in slices
    gate = card.split("## Gate")[1].split("## Limits")[0].split()
    assert " ".join(gate) == "Refused. - pass: auc is enough - fail: logloss is worse"


def test_a_model_card_without_crosses_wide_part_or_small_slices():
    spec = SPEC.model_copy(update={"crosses": ()})
    card = model_card(
        ranker(spec, wide_zero_share=None),
        METRICS,
        {"metrics": {}, "left_out": {}},
        {"promoted": True, "reasons": [], "compared": []},
    )
    assert "| wide weights that are zero | no wide part |" in card
    assert "crosses: none" in card
    assert "None.\n\nToo small to tell: none." in card
    assert "\nPassed.\n" in card


def test_a_model_card_shows_how_it_differs_from_the_champion():
    lower = {"metric": "logloss", "difference": -0.01, "lo": -0.015, "hi": -0.005, "margin": 0.0}
    found = {"part": None, "rows": 10, "users": 5, "passed": True, **lower}
    card = model_card(ranker(), METRICS, SLICES, VERDICT | {"compared": [found]})
    row = "| pass | logloss | -0.01000 | -0.01500 … -0.00500 | +0.00000 |"
    assert row in card.split("## Gate")[1].split("## Limits")[0]


# --- the closing table -------------------------------------------------------------------------

SUMMARY: dict[str, Any] = {
    "rows": {"in": 1000000, "clean": 999000, "quarantined": 700, "duplicates": 300},
    "sizes": {"train": 800000, "validation": 100000, "test": 99000},
    "metrics": METRICS,
    "gate": {"promoted": True, "reasons": ["pass: auc is enough"]},
    "version": "20171030-0123456789ab",
    "model": "wide_deep",
    "seed": 41,
    "bento_tag": "fathom:abc",
    "drift": {"retrain": False, "reasons": [], "alerts": []},
    "seconds": {"ingestion": 10.4, "training": 61.6, "total": 200.0},
    "unchanged": {"stages": [], "nodes": []},
    "peak_memory_mb": 4321,
}


def test_a_closing_table_holds_the_figures():
    text = closing_table(SUMMARY, {"drift": "data/drift.html"})
    lines = text.splitlines()

    def line(start: str) -> str:
        return next(line for line in lines if line.startswith(start))

    assert line("rows") == (
        "rows        1,000,000 in = 999,000 clean + 700 quarantined + 300 duplicates"
    )
    assert line("exposures").split(maxsplit=1)[1] == (
        "800,000 train, 100,000 validation, 99,000 test"
    )
    assert line("test window").split()[2:] == [
        *("auc", "logloss", "user_auc", "ndcg_at_10", "calibration")
    ]
    assert line("candidate").split()[1:] == ["0.9432", "0.2346", "0.7100", "0.5000", "1.0123"]
    assert line("popularity").split() == ["popularity", "0.8970", "0.3260", "-", "-", "-"]
    assert line("version").split(maxsplit=1)[1] == (
        "20171030-0123456789ab (wide_deep, seed 41), bento fathom:abc"
    )
    assert line("gate").split() == ["gate", "promoted"]
    assert line("drift").split() == ["drift", "no", "retraining"]
    assert line("seconds").split(maxsplit=1)[1] == "200: ingestion 10, training 62"
    assert line("memory").split()[1:3] == ["4,321", "MB"]
    assert text.rstrip().endswith("drift       data/drift.html")


@pytest.mark.parametrize(
    ("stages", "line"),
    [
        (["ingestion"], "200: training 62; unchanged: ingestion"),
        (["ingestion", "training"], "200: unchanged: ingestion, training"),
    ],
)
def test_a_closing_table_says_what_had_not_to_run(stages, line):
    text = closing_table(SUMMARY | {"unchanged": {"stages": stages, "nodes": []}}, {})
    assert f"\nseconds     {line}\n" in text


def test_columns_stand_below_their_names_however_long_a_model_is_called():
    metrics = METRICS | {"a baseline with quite a long name": {"auc": 0.5}}
    lines = closing_table(SUMMARY | {"metrics": metrics}, {}).splitlines()
    header = next(line for line in lines if line.startswith("test window"))
    end = header.index("auc") + len("auc")
    for name, values in metrics.items():
        line = next(line for line in lines if line.startswith(name))
        assert line[:end].endswith(f"{values['auc']:.4f}")


def test_a_closing_table_says_why_a_model_is_not_promoted_and_what_drifted():
    text = closing_table(
        SUMMARY
        | {
            "gate": VERDICT,
            "drift": {"retrain": True, "reasons": ["loss: 2 %", "waiting"], "alerts": []},
        },
        {},
    )
    assert "gate        not promoted: fail: logloss is worse\n" in text
    assert "drift       retrain: loss: 2 %; waiting\n" in text


def test_a_closing_table_puts_faults_of_the_data_first():
    drift = {"retrain": False, "reasons": ["loss: 2 %"], "alerts": ["price: all null"]}
    text = closing_table(SUMMARY | {"drift": drift}, {})
    assert "drift       mend the data: price: all null; loss: 2 %\n" in text


def test_a_closing_table_without_metrics():
    assert "test window" in closing_table(SUMMARY | {"metrics": {}}, {})


# --- hardware ----------------------------------------------------------------------------------


def test_hardware_names_what_a_figure_was_measured_on():
    words = hardware.hardware()
    assert re.search(r"\b[1-9]\d* cores\b", words)
    assert f"torch {torch.__version__}" in words
    assert ("no accelerator" in words) == (not torch.cuda.is_available())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the kernel does not tell")
def test_peak_memory_is_the_kernels_high_water_mark_in_mb():
    status = Path("/proc/self/status").read_text()
    kilobytes = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])
    assert hardware.peak_memory_mb() == pytest.approx(kilobytes / 1024, rel=0.05)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_no_and_all_zero_weights_are_shares_too(share):
    card = model_card(ranker(wide_zero_share=share), METRICS, SLICES, VERDICT)
    assert f"| wide weights that are zero | {share:.1%} |" in card
