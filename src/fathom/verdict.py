"""The verdict on a challenger, written for people: Markdown, and a page that needs only itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

_NAMES = {
    "rmse": "RMSE",
    "auc": "AUC",
    "user_auc": "AUC within users",
}
_STYLE = """
:root { color-scheme: light dark; --line: #8886; }
body { margin: 2rem auto; max-width: 72rem; padding: 0 1rem; font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
div { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { text-align: left; padding: .25rem .8rem .25rem 0; border-top: 1px solid var(--line);
  white-space: nowrap; font-variant-numeric: tabular-nums; }
td:last-child { white-space: normal; } .fail td { color: #c0392b; font-weight: 600; }
""".strip()


@dataclass(frozen=True)
class Section:
    """A part of the verdict: a sentence, and a table whose first column may say ``fail``."""

    title: str
    said: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def text(verdict: Mapping[str, Any]) -> str:
    """The verdict as Markdown.

    Args:
        verdict: of the gate and the dry run: ``challenger``, ``champion``, ``window``,
            ``promoted``, ``reasons``, ``compared``, ``dry_run`` (`fathom.pipelines.release`).
    """
    lines = [f"# {_title(verdict)}", "", _who(verdict), ""]
    for section in [*comparisons(verdict), *_rest(verdict)]:
        lines += [f"## {section.title}", "", section.said, ""]
        if section.rows:
            lines += [table(section), ""]
    return "\n".join([*lines, f"**{closing(verdict)}**", ""])


def page(verdict: Mapping[str, Any]) -> str:
    """The same as HTML; it loads nothing."""
    parts = [f"<h1>{escape(_title(verdict))}</h1><p>{escape(_who(verdict))}</p>"]
    for section in [*comparisons(verdict), *_rest(verdict)]:
        parts.append(f"<h2>{escape(section.title)}</h2><p>{escape(section.said)}</p>")
        if section.rows:
            head = "".join(f"<th>{escape(cell)}</th>" for cell in section.head)
            rows = "".join(_row(cells) for cells in section.rows)
            body = f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>"
            parts.append(f"<div><table>{body}</table></div>")
    parts.append(f"<p><strong>{escape(closing(verdict))}</strong></p>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(_title(verdict))}</title><style>{_STYLE}</style></head>\n"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def comparisons(verdict: Mapping[str, Any]) -> Iterator[Section]:
    """The differences from the champion, on all rows and by slice; nothing without a champion."""
    compared = verdict["compared"]
    overall = [found for found in compared if found["part"] is None]
    if overall:
        yield Section(
            "Against the champion",
            "Differences are the challenger's metric less the champion's, with intervals over "
            "resampled users. Miscalibration is |log(sum predicted / sum observed)|.",
            ("", "metric", "difference", "interval", "margin"),
            [
                (
                    _passed(found["passed"]),
                    _name(found),
                    _signed(found, found["difference"]),
                    f"{_signed(found, found['lo'])} … {_signed(found, found['hi'])}",
                    _signed(found, found["margin"]),
                )
                for found in overall
            ],
        )
    slices: dict[str, dict[str, Mapping[str, Any]]] = {}
    for found in compared:
        if found["part"] is not None:
            slices.setdefault(found["part"], {})[found["metric"]] = found
    if slices:
        metrics = list(dict.fromkeys(f["metric"] for f in compared if f["part"] is not None))
        margins = {m: next(s[m] for s in slices.values() if m in s) for m in metrics}
        bounds = ", ".join(f"{_name(f)} {_signed(f, f['margin'])}" for f in margins.values())
        yield Section(
            "Slices",
            "The loss differs by a share of the champion's. The bounds hold for all slices at "
            f"once; a slice fails where it is proven worse by more than its margin: {bounds}.",
            ("", "slice", "rows", "users", *(_name(found) for found in margins.values())),
            [
                (
                    _passed(all(found["passed"] for found in own.values())),
                    part,
                    *(f"{next(iter(own.values()))[size]:,}" for size in ("rows", "users")),
                    *(_bounds(own.get(metric)) for metric in metrics),
                )
                for part, own in slices.items()
            ],
        )


def closing(verdict: Mapping[str, Any]) -> str:
    """What follows, in a sentence."""
    version, champion = verdict["challenger"], verdict["champion"]
    failed = [reason for reason in verdict["reasons"] if not reason.startswith("pass")]
    if failed:
        checks = f"{len(failed)} of {len(verdict['reasons'])} checks failed"
        stays = f"{champion} stays champion" if champion else "there is still no champion"
        return f"{version} is refused and {stays}: {checks}."
    if champion is None:
        return f"{version} passes every check and becomes the first champion."
    return f"{version} passes every check and takes the place of {champion}."


def table(section: Section) -> str:
    """A section's table as Markdown."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join(
        [line(section.head), "|---" * len(section.head) + "|", *map(line, section.rows)]
    )


def _rest(verdict: Mapping[str, Any]) -> Iterator[Section]:
    found = verdict["dry_run"]
    if "fault" in found:
        said = f"It failed its dry run: {found['fault']}."
    else:
        said = (
            f"As a process it gave the golden probabilities to within "
            f"{found['max_difference']:.1e}. A request of {found['rows']} rows took "
            f"{found['p50_ms']:.1f} ms in the median and {found['p99_ms']:.1f} ms at the 99th "
            f"percentile; {verdict['max_p99_ms']:g} ms are allowed."
        )
    yield Section("The built Bento", said)
    rows = [reason.partition(": ")[::2] for reason in verdict["reasons"]]
    yield Section("Every check", "In the order in which they were made.", ("", "check"), rows)


def _title(verdict: Mapping[str, Any]) -> str:
    word = "promoted" if verdict["promoted"] else "refused"
    return f"Challenger {verdict['challenger']}: {word}"


def _who(verdict: Mapping[str, Any]) -> str:
    window, champion = verdict["window"], verdict["champion"]
    whom = f"challenged the champion {champion}" if champion else "met no champion"
    return (
        f"{verdict['challenger']} {whom} on the exposures from {window['from']} to "
        f"{window['to']}: {window['rows']:,} rows of {window['users']:,} users."
    )


def _row(cells: Sequence[str]) -> str:
    mark = ' class="fail"' if cells[0] == "fail" else ""
    return f"<tr{mark}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _passed(passed: bool) -> str:
    return "pass" if passed else "fail"


def _name(found: Mapping[str, Any]) -> str:
    metric: str = found["metric"]
    return _NAMES.get(metric, metric)


def _signed(found: Mapping[str, Any], value: float) -> str:
    """A slice's loss as a share, everything else as it is."""
    share = found["part"] is not None and found["metric"] in ("logloss", "rmse")
    return f"{value:+.1%}" if share else f"{value:+.5f}"


def _bounds(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    difference, lo, hi = (_signed(found, found[name]) for name in ("difference", "lo", "hi"))
    mark = "" if found["passed"] else " fails"
    return f"{difference} ({lo} … {hi}){mark}"
