"""The year's replay for people: one HTML page that needs nothing but itself, and a text table."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from fathom.replay import OURS, YARDSTICK

Figures = Mapping[str, Any]
Row = tuple[str, ...]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5c6675; --paper: #fbfbf9;
  --line: #dfe3e8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft: #9aa5b3; --paper: #14181d;
  --line: #323b45; } }
body { margin: 0; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 76rem; margin: 0 auto; } h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; }
.soft { color: var(--soft); font-size: .85rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-top: 1px solid var(--line);
  vertical-align: top; font-variant-numeric: tabular-nums; }
thead th { border-top: 0; color: var(--soft); }
""".strip()


def table(figures: Figures) -> str:
    """What each policy won and cost, a line each, then what Fathom's is worth."""
    head, rows = _totals(figures)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    )
    return "\n".join((*lines, *worth(figures)))


def worth(figures: Figures) -> list[str]:
    """What Fathom's policy costs and saves, in a sentence; none without `YARDSTICK`."""
    loss, totals = figures["loss"], figures["totals"]
    ours, theirs = totals.get(OURS), totals.get(YARDSTICK)
    found = ours and ours[f"against_{YARDSTICK}"].get(loss)
    if not found or not theirs["examples"]:
        return []
    compute = ours["examples"] / theirs["examples"]
    share = found["difference"] / theirs[loss]
    sides = f"{found['lo'] / theirs[loss]:+.2%} to {found['hi'] / theirs[loss]:+.2%}"
    holds = found["difference"] <= 0 and compute <= 0.5
    return [
        f"{OURS} ends {share:+.2%} of the {loss} from {YARDSTICK} ({sides}), at {compute:.0%} of "
        f"its compute: it is {'' if holds else 'not '}as good as that at half the compute or less"
    ]


def page(figures: Figures) -> str:
    """All of it as one HTML page, the plot's script included: it asks nothing of a network."""
    settings = {"displayModeBar": False, "responsive": True}
    said = "".join(
        f"<li><b>{escape(name)}</b>: {escape(text)}</li>"
        for name, text in figures["policies"].items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Replay</title><style>{_STYLE}</style></head><body><main>"
        f"<h1>The year's replay</h1><ul>{said}</ul>{_table(*_totals(figures))}"
        f"<p>{escape(' '.join(worth(figures)))}</p>"
        f"{plot(figures).to_html(settings, False, True, full_html=False)}"
        f"<h2>Week by week</h2>{_table(*_weeks(figures))}"
        f'<p class="soft">{escape(_stands_on(figures))}</p></main></body></html>\n'
    )


def plot(figures: Figures) -> Any:
    """Each policy's loss by week, and what it is above that of `YARDSTICK`; dots are promotions."""
    from plotly.subplots import make_subplots

    loss, weeks = figures["loss"], figures["weeks"]
    titles = (f"{loss} of the week", f"less that of {YARDSTICK}")
    figure = make_subplots(2, 1, shared_xaxes=True, subplot_titles=titles, vertical_spacing=0.1)
    starts = [week["start"][:10] for week in weeks]
    for number, name in enumerate(figures["policies"]):
        mine = [week["policies"][name] for week in weeks]
        against = [week["policies"].get(YARDSTICK, {}).get(loss) for week in weeks]
        sizes = [9 if week["promoted"] else 0 for week in mine]
        lines = (
            [week[loss] for week in mine],
            [
                None if base is None else w[loss] - base
                for w, base in zip(mine, against, strict=True)
            ],
        )
        for row, values in enumerate(lines, 1):
            figure.add_scatter(
                x=starts,
                y=values,
                name=name,
                legendgroup=name,
                showlegend=row == 1,
                mode="lines+markers",
                marker={"size": sizes},
                line={"color": _COLOURS[number % len(_COLOURS)]},
                row=row,
                col=1,
            )
    return figure.update_layout(height=700, margin={"t": 40}, template="plotly_white")


_COLOURS = ("#7f7f7f", "#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b")


def _totals(figures: Figures) -> tuple[Row, list[Row]]:
    loss: str = figures["loss"]
    totals = figures["totals"]
    base = totals.get(YARDSTICK, {}).get("examples", 0)
    head = (
        "policy",
        loss,
        f"against {YARDSTICK}",
        "auc",
        "retrained",
        "promoted",
        "examples trained",
        "compute",
        "seconds",
    )
    rows: list[Row] = []
    for name, total in totals.items():
        found = total[f"against_{YARDSTICK}"].get(loss)
        interval = (
            "" if found is None else "{difference:+.5f} ({lo:+.5f} … {hi:+.5f})".format(**found)
        )
        auc = total["auc"]
        rows.append(
            (
                name,
                f"{total[loss]:.5f}",
                interval,
                "" if auc is None else f"{auc:.5f}",
                str(total["retrained"]),
                str(total["promoted"]),
                f"{total['examples']:,}",
                f"{total['examples'] / base:.0%}" if base else "",
                f"{total['seconds']:,.0f}",
            )
        )
    return head, rows


def _weeks(figures: Figures) -> tuple[Row, list[Row]]:
    loss: str = figures["loss"]
    head = ("week", "policy", "decision", loss, "auc", "version", "why")
    rows: list[Row] = []
    for week in figures["weeks"]:
        for name, found in week["policies"].items():
            auc = found["auc"]
            rows.append(
                (
                    week["start"][:10],
                    name,
                    _decision(found),
                    f"{found[loss]:.5f}",
                    "" if auc is None else f"{auc:.5f}",
                    found["version"],
                    "; ".join(found["reasons"]),
                )
            )
    return head, rows


def _decision(week: Mapping[str, Any]) -> str:
    if not week["retrained"]:
        return "kept"
    start = " then ".join(week["started"])
    return f"{start}, {'promoted' if week['promoted'] else 'refused'}"


def _table(head: Row, rows: list[Row]) -> str:
    titles = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>'
        "</div>"
    )


def _stands_on(figures: Figures) -> str:
    training = figures["settings"]["training"]
    return (
        f"{len(figures['weeks'])} weeks, {sum(week['rows'] for week in figures['weeks']):,} "
        f"exposures; model {training['model']}, seed {training['seed']}, spec "
        f"{figures['spec_hash'][:12]}, code {figures['code_version']}, {figures['hardware']}. "
        "Intervals resample users. Trainings that policies share are charged to each."
    )
