"""A comparison for people: one HTML page that needs nothing but itself, and the same as Markdown.

Both are made of the same sections. Every one says what its figures stand on. Whether a model is
ahead or behind, and whether a claim holds, is computed (`fathom.comparison.evidence`); nothing here
is written by hand but the words around it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

from fathom.comparison.plots import (
    Figures,
    plot_differences,
    plot_sizes,
    plot_slices,
    ranked,
)

Row = tuple[str, ...]

_NAMES = {
    "auc": "AUC",
    "user_auc": "user AUC",
    "ndcg_at_10": "NDCG@10",
    "rmse": "RMSE",
    "mae": "MAE",
}

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5c6675; --paper: #fbfbf9;
  --line: #dfe3e8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft: #9aa5b3; --paper: #14181d;
  --line: #323b45; } }
body { margin: 0; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 72rem; margin: 0 auto; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem; }
.soft { color: var(--soft); font-size: .85rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-top: 1px solid var(--line);
  vertical-align: top; font-variant-numeric: tabular-nums; }
thead th { border-top: 0; color: var(--soft); } .number { white-space: nowrap; }
code { font: .85em ui-monospace, SFMono-Regular, Menlo, monospace; overflow-wrap: anywhere; }
""".strip()


@dataclass(frozen=True)
class Section:
    """A part of the report: what is said, a table, and a plot that Markdown leaves out.

    Args:
        said: paragraphs. listed: what stands below them as a list.
    """

    title: str
    said: tuple[str, ...]
    head: Row
    rows: tuple[Row, ...]
    plot: Callable[[], Any] | None = None
    listed: tuple[str, ...] = ()


def text(figures: Figures) -> str:
    """The report as Markdown."""
    lines = []
    for section in _sections(figures):
        lines += [f"### {section.title}", ""]
        lines += [line for said in section.said for line in (said, "")]
        lines += [*(f"- {item}" for item in section.listed), *[""] * bool(section.listed)]
        if section.rows:
            lines += [_line(section.head), "|---" * len(section.head) + "|"]
            lines += [*map(_line, section.rows), ""]
        lines += [f"<sub>{_stands_on(figures)}</sub>", ""]
    return "\n".join(lines)


def page(figures: Figures) -> str:
    """The report as one HTML page, scripts of its plots included: it asks nothing of a network."""
    parts, scripts = [], True
    for section in _sections(figures):
        parts.append(f"<h2>{escape(section.title)}</h2>")
        parts += [f"<p>{escape(said)}</p>" for said in section.said]
        if section.listed:
            parts.append("<ul>")
            parts += [f"<li>{escape(item)}</li>" for item in section.listed]
            parts.append("</ul>")
        if section.plot is not None:
            settings = {"displayModeBar": False, "responsive": True}
            parts.append(section.plot().to_html(settings, False, scripts, full_html=False))
            scripts = False
        if section.rows:
            parts.append(_table(section))
        parts.append(f'<p class="soft">{escape(_stands_on(figures))}</p>')
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Comparison</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>Every model of the family</h1>{''.join(parts)}</main></body></html>\n"
    )


def _line(row: Row) -> str:
    cells = (cell.replace("|", "\\|").replace("\n", " ") for cell in row)
    return f"| {' | '.join(cells)} |"


def _table(section: Section) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in section.head)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in section.rows)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody>'
        "</table></div>"
    )


def _cell(text: str) -> str:
    number = ' class="number"' if text[:1].isdigit() or text[:1] in ("+", "-") else ""
    return f"<td{number}>{escape(text)}</td>"


# -- sections ------------------------------------------------------------------------------------


def _sections(figures: Figures) -> list[Section]:
    found = [_claims(figures), _metrics(figures), _costs(figures), _slices(figures)]
    if figures["ladder"]:
        found.append(_ladder(figures))
    return [*found, _method(figures)]


def _claims(figures: Figures) -> Section:
    rows = [(c["claim"], c["source"], c["verdict"], c["evidence"]) for c in figures["claims"]]
    return Section(
        "What the data say of the claims",
        (
            "A claim is supported or contradicted if the interval of the difference that it is "
            "about lies on one side of 0; if it includes 0, these data cannot tell.",
        ),
        ("claim", "by", "verdict", "evidence"),
        tuple(rows),
    )


def _metrics(figures: Figures) -> Section:
    loss, reference = figures["loss"], figures["reference"]
    models = ranked(figures)
    rows = []
    for name, model in models.items():
        if model["mean"] is None:
            rows.append((name, *["-"] * (len(figures["metrics"]) + 1), "failed"))
            continue
        cells = [
            _with_spread(model["mean"][metric], model["spread"][metric])
            for metric in figures["metrics"]
        ]
        against = model["against"]
        between = "" if against is None else _interval(against[loss])
        rows.append((name, *cells, between, _standing(model)))
    failed = [
        f"{name} could not be trained: {model['error']}"
        for name, model in figures["models"].items()
        if model["error"]
    ]
    chosen = figures["chosen"]
    said = (
        "The test window, mean and standard deviation over seeds, best loss first. Intervals are "
        f"of the difference to {reference}: below 0 is better.",
        *([f"By the validation window alone one would choose {chosen}."] if chosen else []),
        *failed,
    )
    head = ("", *(_NAMES.get(m, m) for m in figures["metrics"]), f"{loss} against {reference}", "")
    return Section("All models", said, head, tuple(rows), lambda: plot_differences(figures))


def _costs(figures: Figures) -> Section:
    rows = []
    for name, model in ranked(figures).items():
        cost = model.get("cost")
        if cost:
            rows.append(
                (
                    name,
                    f"{cost['validation_loss']:.5f}",
                    f"{cost['parameters']:,.0f}",
                    f"{cost['layer_parameters']:,.0f}",
                    f"{cost['nonzero']:,.0f}",
                    f"{cost['bytes'] / 1e6:.2f}",
                    f"{cost['seconds']:.1f}",
                    f"{cost['scoring_us']:.1f}",
                    json.dumps(model["settings"]),
                )
            )
    return Section(
        "What they cost",
        (
            "Means over seeds. Parameters of layers are those of no table; megabytes are those of "
            "the weights in the artifact; a row is scored from encoded features.",
        ),
        (
            "",
            f"validation {figures['loss']}",
            "parameters",
            "of layers",
            "not zero",
            "MB on disk",
            "s of training",
            "µs to score a row",
            "tuned settings",
        ),
        tuple(rows),
        lambda: plot_sizes(figures),
    )


def _slices(figures: Figures) -> Section:
    loss, cut = figures["loss"], figures["slices"]
    names = [name for name in cut["rows"] if name not in cut["left_out"]]
    rows = []
    for name, model in ranked(figures).items():
        if model["mean"] is not None:
            rows.append((name, *(_in_slice(model["slices"][part], loss) for part in names)))
    left_out = ", ".join(f"{name} ({rows:,} rows)" for name, rows in cut["left_out"].items())
    said = [
        f"{loss} by slice, mean over seeds. ▼ marks a loss below that of {figures['reference']}, "
        "▲ one above it, where the interval of the difference excludes 0.",
    ]
    if exceptions := cut.get("exceptions"):
        counts = ", ".join(f"{count:,} of {name}" for name, count in exceptions.items())
        said.append(f"Values of crosses that are exceptions: {counts}.")
    if left_out:
        said.append(f"Left out, for too few rows to tell: {left_out}.")
    head = ("", *(f"{name} ({cut['rows'][name]:,} rows)" for name in names))
    return Section(
        "Slices that test the claims",
        tuple(said),
        head,
        tuple(rows),
        (lambda: plot_slices(figures)) if names else None,
        tuple(f"{name}: {cut['definitions'][name]}" for name in cut["rows"]),
    )


def _ladder(figures: Figures) -> Section:
    loss = figures["loss"]
    rows = []
    for step in figures["ladder"]:
        joint, apart = step["joint"], step["apart"]
        rows.append(
            (
                str(joint["hidden"]),
                f"{joint['layer_parameters']:,}",
                f"{joint['parameters']:,}",
                f"{joint['validation_loss']:.5f}",
                f"{apart['validation_loss']:.5f}",
                _with_spread(joint["loss"], joint["spread"]),
                _with_spread(apart["loss"], apart["spread"]),
                _interval(step["difference"]),
            )
        )
    return Section(
        "Joint training against an ensemble, by size",
        (
            "wide_deep and the ensemble (wide and deep trained apart, logits combined) with the "
            "same layers, each with the settings that its own tuning chose. Sizes are wide_deep's; "
            "the ensemble has four weights more.",
        ),
        (
            "layers",
            "parameters of layers",
            "parameters",
            f"validation {loss}, joint",
            "ensemble",
            f"test {loss}, joint",
            "ensemble",
            "joint minus ensemble",
        ),
        tuple(rows),
    )


def _method(figures: Figures) -> Section:
    made = figures["provenance"]
    rows = ", ".join(f"{count:,} {split}" for split, count in made["rows"].items())
    return Section(
        "How it was measured",
        (
            f"Every model saw the same exposures ({rows}) and was tuned by {made['trials']} trials "
            "on the validation window, the first of them the configured settings; the best were "
            f"trained once for each of {len(made['seeds'])} seeds, with at most {made['epochs']} "
            "epochs, and each training scored the test window once. Baselines are those of the "
            "evaluation, with one seed.",
            f"Intervals hold {made['confidence']:.0%} of {made['resamples']} resamples of the "
            f"{made['users']:,} users, the same for both models, and of each model's seeds.",
            f"{made['seconds'] / 60:.0f} minutes of training in all, tuning included.",
        ),
        (),
        (),
    )


def _stands_on(figures: Figures) -> str:
    made = figures["provenance"]
    seeds = ", ".join(map(str, made["seeds"]))
    return (
        f"Seeds {seeds}; data {made['data_hash'][:12]}, spec {made['spec_hash'][:12]}, Fathom "
        f"{made['code_version']}; {made['hardware']}; {made['seconds'] / 60:.0f} min of training."
    )


# -- cells ---------------------------------------------------------------------------------------


def _standing(model: Mapping[str, Any]) -> str:
    """Whether a model is ahead of the reference, in words."""
    if model["against"] is None:
        return "reference"
    side = _side(next(iter(model["against"].values())))
    return {"▼": "ahead", "▲": "behind", "": "cannot tell"}[side]


def _side(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return ""
    return "▼" if interval["hi"] < 0 else "▲" if interval["lo"] > 0 else ""


def _in_slice(part: Mapping[str, Any], loss: str) -> str:
    against = part["against"]
    mark = "" if against is None else _side(against[loss])
    value = part["mean"][loss]
    return "-" if value is None else f"{value:.4f} {mark}".rstrip()


def _with_spread(mean: float | None, spread: float | None, digits: int = 5) -> str:
    if mean is None:
        return "-"
    return f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def _interval(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "-"
    return f"{found['difference']:+.5f} [{found['lo']:+.5f}, {found['hi']:+.5f}]"
