"""What people read: the model card and the closing table of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fathom import verdict

if TYPE_CHECKING:
    from fathom.ranker import Ranker

_BINARY = ("auc", "logloss", "user_auc", "ndcg_at_10", "calibration")
_REGRESSION = ("rmse", "mae", "ndcg_at_10", "calibration")


def model_card(
    candidate: Ranker,
    metrics: Mapping[str, Any],
    slices: Mapping[str, Any],
    judgement: Mapping[str, Any],
) -> str:
    """A ranker described for people, in Markdown.

    Args:
        metrics: by model, on the test window. slices: the candidate's, by slice.
        judgement: of the gate; how the Bento fares is known only after the card is packed.
    """
    spec, made = candidate.spec, candidate.provenance
    judged = made.get("judged")
    caught_up = (
        f"Figures are those of `{judged}`, which passed the gate. This version has then learnt the "
        "windows that they are of, too.\n\n"
        if judged
        else ""
    )
    crosses = ", ".join(f"`{cross.name}`" for cross in spec.crosses) or "none"
    reasons = "\n".join(f"- {reason}" for reason in judgement["reasons"])
    compared = "\n\n".join(
        f"{s.said}\n\n{verdict.table(s)}" for s in verdict.comparisons(judgement)
    )
    left_out = ", ".join(f"{name} ({rows})" for name, rows in slices["left_out"].items()) or "none"
    return f"""# Model card: ranker {candidate.version}

**What it is.** A `{candidate.config.model}` model that ranks `{spec.entities.item}` for
`{spec.entities.user}` by the probability of `{spec.label.name}` ({spec.task} task). Wide & Deep
(Cheng et al. 2016): a linear part over crosses and a deep part over embeddings, trained jointly.

**Not for** decisions about people, nor for items or contexts unlike those it was trained on.

## Training

| | |
|---|---|
| exposures | {made["rows"]["train"]:,} from {made["trained_from"]} to {made["trained_until"]} |
| parameters | {made["parameters"]:,} |
| wide weights that are zero | {_share(made.get("wide_zero_share"))} |
| best epoch | {made["best_epoch"]} |
| seed | {made["seed"]} |
| features | {len(spec.columns)} columns; crosses: {crosses} |
| data SHA-256 | `{made["data_hash"]}` |
| spec SHA-256 | `{spec.hash}` |
| code | fathom {made["code_version"]} |
| hardware | {made["hardware"]} |

## Test window

{caught_up}Exposures after the validation window, never looked at by training or tuning.

{metrics_table(metrics)}

## Slices

{metrics_table(slices["metrics"])}

Too small to tell: {left_out}.

## Gate

{"Passed." if judgement["promoted"] else "Refused."}

{reasons}

{compared}

## Limits

Labels are observed for shown items only, so the model inherits what earlier rankings chose to show.
Where negatives were sampled, probabilities are those of the sampled log; weigh by the recorded
inclusion probability to calibrate back.
"""


def metrics_table(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    """Metrics by row as a Markdown table.

    >>> print(metrics_table({"a": {"rmse": 0.5, "mae": 0.25, "rows": 7}}))
    | | rows | rmse | mae | ndcg_at_10 | calibration |
    |---|---|---|---|---|---|
    | a | 7 | 0.5000 | 0.2500 | - | - |
    """
    if not metrics:
        return "None."
    names = _names(metrics)
    lines = [f"| | rows | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for row, values in metrics.items():
        cells = " | ".join(_cell(values.get(name)) for name in names)
        name = row.replace("|", "\\|")  # a slice's value may be anything
        lines.append(f"| {name} | {values.get('rows', 0):,} | {cells} |")
    return "\n".join(lines)


def closing_table(summary: Mapping[str, Any], pages: Mapping[str, str]) -> str:
    """The end of a run in a terminal: rows, metrics, verdicts, times and where to look.

    Args:
        summary: ``run_summary.json``.
        pages: what can be opened, by name.
    """
    rows, sizes, metrics = summary["rows"], summary["sizes"], summary["metrics"]
    names = _names(metrics)
    width = max([24, *map(len, metrics)]) + 2
    lines = [
        "",
        f"rows        {rows['in']:,} in = {rows['clean']:,} clean + {rows['quarantined']:,} "
        f"quarantined + {rows['duplicates']:,} duplicates",
        f"exposures   {sizes['train']:,} train, {sizes['validation']:,} validation, "
        f"{sizes['test']:,} test",
        "",
        "test window".ljust(width) + "".join(name.rjust(13) for name in names),
    ]
    for name, values in metrics.items():
        cells = "".join(_cell(values.get(metric)).rjust(13) for metric in names)
        lines.append(name.ljust(width) + cells)
    gate, drift = summary["gate"], summary["drift"]
    failed = [reason for reason in gate["reasons"] if not reason.startswith("pass")]
    lines += [
        "",
        f"version     {summary['version']} ({summary['model']}, seed {summary['seed']}), "
        f"bento {summary['bento_tag']}",
        f"gate        {'promoted' if gate['promoted'] else 'not promoted: ' + '; '.join(failed)}",
        f"drift       {_decided(drift)}",
        f"seconds     {_times(summary['seconds'], summary['unchanged']['stages'])}",
        f"memory      {summary['peak_memory_mb']:,} MB at the peak",
        "",
        *(f"{name.ljust(11)} {path}" for name, path in pages.items()),
        "",
    ]
    return "\n".join(lines)


def _times(seconds: Mapping[str, float], unchanged: Sequence[str]) -> str:
    """The total, each stage that had to run, and those that had not."""
    ran = [s for s in seconds if s != "total" and s not in unchanged]
    parts = [", ".join(f"{stage} {seconds[stage]:.0f}" for stage in ran)] if ran else []
    if unchanged:
        parts.append(f"unchanged: {', '.join(s for s in seconds if s in unchanged)}")
    return f"{seconds['total']:.0f}: {'; '.join(parts)}"


def _names(metrics: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    return _REGRESSION if any("rmse" in values for values in metrics.values()) else _BINARY


def _decided(drift: Mapping[str, Any]) -> str:
    """What monitoring decided; a fault of the data comes first, for it needs a person."""
    verdict = "retrain" if drift["retrain"] else "no retraining"
    verdict = "mend the data" if drift["alerts"] else verdict
    return ": ".join(filter(None, (verdict, "; ".join([*drift["alerts"], *drift["reasons"]]))))


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "no wide part" if value is None else f"{value:.1%}"
