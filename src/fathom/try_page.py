"""The page at ``/try``: rank items for a user, see each one's parts, change the context.

One file without a framework, that asks nothing but this service: ``docs.json`` for an example and
``/rank`` with ``explain``. Values are written as text, never as markup.
"""

from __future__ import annotations

import base64
import hashlib

from starlette.requests import Request
from starlette.responses import HTMLResponse

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5c6675; --paper: #fbfbf9;
  --line: #d5dae1; --wide: #c2571a; --deep: #2b6cb0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e7eaee; --soft: #9aa5b3; --paper: #14181d;
  --line: #323b45; --wide: #f0924f; --deep: #6aa9e9; } }
body { margin: 0; padding: 1.2rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; display: grid; gap: 1.5rem;
  grid-template-columns: minmax(14rem, 18rem) 1fr; }
@media (max-width: 44rem) { main { grid-template-columns: 1fr; } }
h1 { font-size: 1.3rem; margin: 0 0 .8rem; grid-column: 1 / -1; }
label { display: block; margin-bottom: .7rem; color: var(--soft); font-size: .85rem; }
input, select, textarea { display: block; width: 100%; box-sizing: border-box; padding: .35rem;
  font: inherit; color: var(--ink); background: transparent; border: 1px solid var(--line); }
option { color: #1c2430; background: #fff; }
textarea { min-height: 9rem; }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .6rem .3rem 0; border-top: 1px solid var(--line);
  vertical-align: top; }
th { border-top: 0; color: var(--soft); font-weight: 500; font-size: .85rem; }
svg { display: block; width: 100%; height: 1.4rem; }
.wide { fill: var(--wide); } .deep { fill: var(--deep); } .axis { stroke: var(--soft); }
.soft { color: var(--soft); font-size: .85rem; } #fault { color: #c53030; }
.key { display: inline-block; width: .8rem; height: .8rem; }
.key.w { background: var(--wide); } .key.d { background: var(--deep); }
"""

_SCRIPT = """
"use strict";
const at = id => document.getElementById(id);
const svg = (name, attributes) => {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};
const cell = (row, content) => {
  const made = row.insertCell();
  made.append(content);
  return made;
};
let asked = 0, timer = null, moment = null;

function field(name, column, value) {
  const label = document.createElement("label");
  label.append(name);
  let input;
  if (column.values) {
    input = document.createElement("select");
    for (const choice of column.values) input.add(new Option(choice, choice));
  } else input = document.createElement("input");
  input.dataset.context = name;
  input.dataset.kind = column.kind;
  input.value = Array.isArray(value) ? value.join(", ") : value ?? "";
  label.append(input);
  at("context").append(label);
}

function valueOf(input) {
  const text = input.value.trim();
  if (input.dataset.kind === "numeric") return text === "" ? null : Number(text);
  if (input.dataset.kind !== "categorical")
    return text === "" ? [] : text.split(",").map(part => part.trim());
  return text === "" ? null : text;
}

function bar(part, reach) {
  // Zero is in the middle; the deep part begins there, the wide one where it ends.
  const drawn = svg("svg", {viewBox: "-100 0 200 14", preserveAspectRatio: "none"});
  let from = 0;
  for (const [kind, size] of [["deep", part.deep], ["wide", part.wide]]) {
    const to = from + 100 * size / reach;
    drawn.append(svg("rect", {class: kind, x: Math.min(from, to), y: kind === "deep" ? 1 : 7,
      width: Math.abs(to - from), height: 6}));
    from = to;
  }
  drawn.append(svg("line", {class: "axis", x1: 0, x2: 0, y1: 0, y2: 14, "stroke-width": .5}));
  return drawn;
}

function show(answer) {
  const parts = answer.items.map(item => {
    const {deep, wide} = item.explanation;
    return {deep, wide: Object.values(wide).reduce((sum, value) => sum + value, 0)};
  });
  const reach = Math.max(1e-9, ...parts.map(part =>
    Math.max(Math.abs(part.deep), Math.abs(part.deep + part.wide))));
  const body = at("ranked");
  body.replaceChildren();
  answer.items.forEach((item, place) => {
    const row = body.insertRow();
    cell(row, String(place + 1));
    cell(row, item.item);
    cell(row, item.probability.toFixed(4));
    cell(row, bar(parts[place], reach)).title =
      `deep ${parts[place].deep.toFixed(3)}, wide ${parts[place].wide.toFixed(3)}`;
    const terms = (item.explanation.terms ?? []).slice(0, 2).map(term =>
      `${Object.entries(term.values).map(([n, v]) => `${n}=${v}`).join(" x ")} ` +
      `${term.logit > 0 ? "+" : ""}${term.logit.toFixed(3)}`);
    cell(row, terms.join("; ")).className = "soft";
  });
  at("said").textContent = `version ${answer.version}; the user is ` +
    `${answer.user_known ? "known" : "not known"}; ${answer.unknown_items} items are not known` +
    (answer.degraded ? "; degraded: the online store does not answer" : "");
}

async function rank() {
  const turn = ++asked;
  const context = {};
  for (const input of document.querySelectorAll("[data-context]"))
    context[input.dataset.context] = valueOf(input);
  const headers = {"Content-Type": "application/json"};
  if (at("key").value) headers.Authorization = `Bearer ${at("key").value}`;
  const candidates = at("items").value.split(/[\\s,]+/).filter(Boolean);
  const request = {user: at("user").value, context, candidates, explain: true};
  if (moment) request.timestamp = moment;
  let answer;
  try {
    const body = JSON.stringify(request);
    const response = await fetch("./rank", {method: "POST", headers, body});
    answer = await response.json();
    if (!response.ok)
      answer.error += (answer.faults ?? []).map(f => `; ${f.field} ${f.fault}`).join("");
  } catch (error) { answer = {error: String(error)}; }
  if (turn !== asked) return;  // a later question has been asked
  at("fault").textContent = answer.error ?? "";
  if (!answer.error) show(answer);
}

async function begin() {
  const paths = (await (await fetch("./docs.json")).json());
  const body = paths.paths["/rank"].post.requestBody.content["application/json"];
  const example = body.example ?? Object.values(body.examples)[0].value;
  moment = example.timestamp ?? null;
  at("user").value = example.user;
  at("items").value = example.candidates.map(c => c.item ?? c).join("\\n");
  for (const column of JSON.parse(at("columns").textContent))
    field(column.name, column, example.context[column.name]);
  document.querySelector("form").addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(rank, 150);
  });
  await rank();
}
begin().catch(error => { at("fault").textContent = String(error); });
"""


def _hash(text: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"


POLICY = (
    f"default-src 'none'; connect-src 'self'; img-src data:; style-src {_hash(_STYLE)}; "
    f"script-src {_hash(_SCRIPT)}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Fathom: try it</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main>
<h1>Who is shown what?</h1>
<form autocomplete="off">
<label>user <input id="user"></label>
<div id="context"></div>
<label>items <textarea id="items" spellcheck="false"></textarea></label>
<label>API key, if one is asked for <input id="key" type="password" autocomplete="off"></label>
</form>
<section>
<p id="fault" role="alert"></p>
<table>
<thead><tr><th>#</th><th>item</th><th>probability</th>
<th><span class="key d"></span> deep <span class="key w"></span> wide</th>
<th>largest terms of the wide part</th></tr></thead>
<tbody id="ranked"></tbody>
</table>
<p id="said" class="soft"></p>
<p class="soft">Bars are parts of the logit, from zero in the middle; what all items share, the
bias, is left out.</p>
</section>
</main>
<script type="application/json" id="columns">{columns}</script>
<script>{script}</script>
</body>
</html>
"""


def page(columns: str) -> str:
    """The page.

    Args:
        columns: JSON of the context columns, each with ``name``, ``kind`` and ``values``.
    """
    safe = columns.replace("<", "\\u003c")
    return _PAGE.format(style=_STYLE, columns=safe, script=_SCRIPT)


async def show(request: Request) -> HTMLResponse:
    """The page, where the service's settings have it; else 404."""
    serving = request.app.state.serving
    if not serving.config.try_page:
        return HTMLResponse("not found: set serving.try_page", 404)
    headers = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"}
    return HTMLResponse(page(serving.ranking.context_columns), headers=headers)
