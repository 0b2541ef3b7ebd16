"""The validation report as one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from fathom.validation.report import TableReport

#: Raw values can be of any length; a page shows their beginning.
_SHOWN_CHARACTERS = 60
#: More partitions than this are folded away.
_SHOWN_PARTITIONS = 12
_COUNTED = ("in", "clean", "quarantined", "duplicates", "")

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5c6675; --paper: #fbfbf9;
  --card: #fff; --line: #dfe3e8; --good: #1f7a4d; --bad: #b3261e; --copy: #a06a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft: #9aa5b3; --paper: #14181d;
  --card: #1c2229; --line: #323b45; --good: #5cc492; --bad: #ff8a80; --copy: #e0b04d; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 62rem; margin: 0 auto; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.25rem; margin: 0; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p { margin: .35rem 0; } .soft { color: var(--soft); } .small { font-size: .85rem; }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: 1.1rem; margin-top: 1.25rem; }
.head { display: flex; flex-wrap: wrap; gap: .4rem .8rem; align-items: baseline; }
.verdict { border: 1px solid currentColor; border-radius: 1rem; padding: 0 .6rem;
  font-size: .85rem; font-weight: 600; }
.good { color: var(--good); } .bad { color: var(--bad); } .copy { color: var(--copy); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-top: 1px solid var(--line);
  vertical-align: top; }
thead th { border-top: 0; color: var(--soft); font-weight: 600; white-space: nowrap; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font: .85em ui-monospace, SFMono-Regular, Menlo, monospace; overflow-wrap: anywhere; }
details { border-top: 1px solid var(--line); padding: .45rem 0; }
summary { cursor: pointer; } details table { white-space: nowrap; margin-top: .4rem; }
.bar { display: flex; height: .55rem; border-radius: .3rem; overflow: hidden; min-width: 6rem;
  background: var(--line); margin-top: .45rem; }
.bar i { display: block; } .bar .good { background: var(--good); }
.bar .bad { background: var(--bad); } .bar .copy { background: var(--copy); }
@media (max-width: 40rem) { body { padding: 1rem .6rem 3rem; } section { padding: .8rem; }
  table { font-size: .8rem; } th, td { padding-right: .45rem; } .bar { min-width: 3rem; } }
""".strip()


def render_html(reports: Sequence[TableReport]) -> str:
    """Render reports as one self-contained page.

    Styles are inline, there are no scripts and no requests, colours follow the reader's light or
    dark setting, and wide tables scroll by themselves on a narrow screen. Every raw value is
    escaped.
    """
    moment = escape(reports[0].moment[:19].replace("T", " ")) if reports else ""
    stopped = [report.table for report in reports if not report.is_healthy]
    verdict = (
        f'<p class="bad"><b>The batch stops</b>: {escape(", ".join(stopped))}.</p>'
        if stopped
        else '<p class="good"><b>The batch may go on.</b></p>'
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Validation</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>Validation of raw data</h1><p class="soft">{moment} UTC</p>{verdict}'
        f"{_totals(reports)}{''.join(_section(report) for report in reports)}"
        "</main></body></html>\n"
    )


def _totals(reports: Sequence[TableReport]) -> str:
    rows = [
        [
            f'<a href="#{report.table}" style="color:inherit">{escape(report.table)}</a>',
            *_counts(
                report.rows["in"],
                report.rows["clean"],
                report.rows["quarantined"],
                report.rows["duplicates"],
            ),
        ]
        for report in reports
    ]
    return f"<section><h2>Rows</h2>{_table(('table', *_COUNTED), rows)}</section>"


def _counts(read: int, clean: int, bad: int, copies: int) -> list[str]:
    """Four counts and the bar that shows them as shares."""
    shares = [
        (name, 100 * part / max(read, 1))
        for name, part in (("good", clean), ("bad", bad), ("copy", copies))
    ]
    parts = "".join(
        # A single bad row in a million is to be seen.
        f'<i class="{name}" style="width:{share:.2f}%;min-width:{2 if share else 0}px"></i>'
        for name, share in shares
    )
    return [
        *(f"{count:,}" for count in (read, clean, bad, copies)),
        f'<div class="bar">{parts}</div>',
    ]


def _section(report: TableReport) -> str:
    above = report.quarantined_share > report.max_quarantined_share
    verdict = (
        f"{report.quarantined_share:.2%} quarantined, {'above' if above else 'within'} "
        f"the bound of {report.max_quarantined_share:.2%}"
    )
    kept = sum(expectation.success for expectation in report.expectations)
    return (
        f'<section id="{escape(report.table)}"><div class="head"><h2>{escape(report.table)}</h2>'
        f'<span class="verdict {"good" if report.is_healthy else "bad"}">{verdict}</span></div>'
        f"{_reasons(report)}"
        f"<h3>Expectations: {kept} of {len(report.expectations)} hold everywhere</h3>"
        f"{_table(('', 'expectation', 'broken by'), _expectations(report))}"
        f"{_partitions(report)}</section>"
    )


def _partitions(report: TableReport) -> str:
    count = len(report.partitions)
    rows = [
        [_value(p.partition), *_counts(p.rows_in, p.clean, p.quarantined, p.duplicates)]
        for p in report.partitions
    ]
    opened = " open" if count <= _SHOWN_PARTITIONS else ""
    return (
        f"<h3>Partitions: {count}</h3><details{opened}><summary>Rows of each</summary>"
        f"{_table(('partition', *_COUNTED), rows)}</details>"
    )


def _reasons(report: TableReport) -> str:
    reasons = report.rows["reasons"]
    if not reasons:
        return '<h3>Reasons</h3><p class="soft">No row is quarantined.</p>'
    blocks = "".join(
        f"<details{'' if number else ' open'}><summary>{escape(reason)} "
        f'<span class="soft">· {count:,} row{"s" if count > 1 else ""}</span></summary>'
        f"{_examples(report.examples.get(reason, ()))}</details>"
        for number, (reason, count) in enumerate(reasons.items())
    )
    return f"<h3>Reasons, with their first rows</h3>{blocks}"


def _examples(rows: Sequence[dict[str, str | None]]) -> str:
    if not rows:
        return ""
    names = list(rows[0])
    return _table(
        tuple(escape(name) for name in names),
        [[_value(row[name]) for name in names] for row in rows],
        numbers=False,
    )


def _value(raw: str | None) -> str:
    if raw is None:
        return '<span class="soft">null</span>'
    shown = raw if len(raw) <= _SHOWN_CHARACTERS else raw[:_SHOWN_CHARACTERS] + "…"
    return f"<code>{escape(shown)}</code>"


def _expectations(report: TableReport) -> list[list[str]]:
    return [
        [
            f'<b class="{"good" if e.success else "bad"}">{"✓" if e.success else "✗"}</b>',
            f"{escape(e.claim)}<br><code class='soft'>{escape(e.type)}"
            f"({escape(', '.join(e.columns))})</code>",
            f"{e.unexpected:,}" if e.unexpected is not None else f"saw {escape(e.observed)}",
        ]
        for e in report.expectations
    ]


def _table(names: Sequence[str], rows: Iterable[Sequence[str]], numbers: bool = True) -> str:
    """A table that scrolls by itself; cells are HTML. Digits align to the right."""

    def cell(text: str) -> str:
        aligned = numbers and text.replace(",", "").isdigit()
        return f'<td class="number">{text}</td>' if aligned else f"<td>{text}</td>"

    right = {"in", "clean", "quarantined", "duplicates", "broken by"}
    head = "".join(
        f'<th class="number">{name}</th>' if numbers and name in right else f"<th>{name}</th>"
        for name in names
    )
    body = "".join(f"<tr>{''.join(cell(text) for text in row)}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
