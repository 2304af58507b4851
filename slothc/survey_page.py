"""The HTML page of ``slothc coverage``: one file, nothing loaded from elsewhere, readable without scripts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from .survey import Row

GOOD, FAIR = 0.95, 0.85
MEANINGS = {
    "ok": "runs and holds the contract",
    "off": "runs, breaks the contract",
    "crash": "runs in eager, not under sloth",
    "timeout": "not done in time",
    "no truth": "runs, died in float64",
    "no capture": "Dynamo cannot capture it",
    "eager fails": "does not run in eager",
    "not built": "cannot be built tiny",
}
HEADS = ("model", "status", "coverage", "graphs", "error, eager", "error, sloth", "of allowed", "compile", "found")
NUMBERS = {"coverage", "graphs", "error, eager", "error, sloth", "of allowed", "compile"}


def page(whole: dict[str, Any]) -> str:
    """The page for what ``survey.document`` returns."""
    rows: list[Row] = whole["models"]
    heads = "".join(f'<th class="{"n" if h in NUMBERS else ""}"><button>{h}</button></th>' for h in HEADS)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>slothc coverage</title>
<style>{STYLE}</style>
<header><h1>slothc coverage</h1><p>{_settings(whole)}</p></header>
<section class="tiles">{_tiles(whole)}</section>
<figure>{chart(rows)}<figcaption>Coverage: the share of the bytes moved by everything except matrix products and attention that
rewritten regions account for. One bar a model, best first; lines at {GOOD:.0%} and {FAIR:.0%}.</figcaption></figure>
<p class="tools"><input id="search" type="search" placeholder="search: a model, a rule, a reason, a file" aria-label="search">
<span id="states">{_states(rows)}</span> <span id="shown"></span></p>
<table id="models"><thead><tr>{heads}</tr></thead>{"".join(map(_row, rows))}</table>
<footer>{NOTES}</footer>
<script>{SCRIPT}</script></html>
"""


def _settings(whole: dict[str, Any]) -> str:
    versions = ", ".join(f"{escape(n)} {escape(v)}" for n, v in whole["versions"].items())
    lora = ", LoRA on every linear" if whole["settings"]["peft"] else ""
    return f"{escape(whole['settings']['dtype'])}{lora} · {versions}"


def _tiles(whole: dict[str, Any]) -> str:
    rows, middle = whole["models"], whole["median_coverage"]
    good = sum(r["status"] == "ok" for r in rows)
    shares = [r["coverage"] for r in rows if "coverage" in r]
    tiles = [
        (f"{good} / {len(rows)}", "run and hold the contract"),
        ("–" if middle is None else f"{middle:.1%}", "median coverage"),
        (f"{sum(s >= GOOD for s in shares)} / {len(shares)}", f"covered to {GOOD:.0%} or more"),
        (str(sum(sum(r.get("counts", {}).values()) for r in rows)), "norms, ropes, activations, losses … found"),
        (str(sum(len(r.get("misses", ())) for r in rows)), "places left to eager"),
    ]
    return "".join(f"<div><b>{number}</b><span>{text}</span></div>" for number, text in tiles)


def _states(rows: Sequence[Row]) -> str:
    many = {s: sum(r["status"] == s for r in rows) for s in MEANINGS}
    return "".join(
        f'<button class="chip {s.replace(" ", "-")}" data-state="{s}" title="{MEANINGS[s]}">{s} {n}</button>' for s, n in many.items() if n
    )


def chart(rows: Sequence[Row], width: int = 1100, height: int = 170) -> str:
    """Coverage of every model that has one, best first, as an inline SVG whose bars lead to the rows."""
    ranked = sorted((r for r in rows if "coverage" in r), key=lambda r: (-r["coverage"], r["name"]))
    left, top, bottom = 44, 8, 10
    tall, step = height - top - bottom, (width - left) / max(len(ranked), 1)
    thick = max(min(step * 0.86, 40), 0.8)

    def y(share: float) -> str:
        return f"{top + tall * (1 - share):.2f}"

    bars = [
        f'<a href="#m-{escape(r["name"])}"><rect class="{grade(r["coverage"])}" x="{left + k * step:.2f}" y="{y(r["coverage"])}" '
        f'width="{thick:.2f}" height="{tall * r["coverage"]:.2f}"><title>{escape(r["name"])} {r["coverage"]:.1%}</title></rect></a>'
        for k, r in enumerate(ranked)
    ]
    lines = [f'<line x1="{left}" x2="{width}" y1="{y(at)}" y2="{y(at)}"/>' for at in (0, 0.5, 1)]
    marks = [f'<line class="mark" x1="{left}" x2="{width}" y1="{y(at)}" y2="{y(at)}"/>' for at in (FAIR, GOOD)]
    words = [f'<text x="{left - 6}" y="{y(at - 4 / tall)}">{at:.0%}</text>' for at in (0, 0.5, FAIR, 1)]
    drawn = "".join((*lines, *bars, *marks, *words))
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="coverage of every model">{drawn}</svg>'


def grade(coverage: float) -> str:
    return "good" if coverage >= GOOD else "fair" if coverage >= FAIR else "low"


def _row(row: Row) -> str:
    cells = "".join(_cell(head, key, text) for head, (key, text) in zip(HEADS, _cells(row)))
    return (
        f'<tbody id="m-{escape(row["name"])}" data-state="{escape(row["status"])}"><tr class="line" tabindex="0">{cells}</tr>'
        f'<tr class="more"><td colspan="{len(HEADS)}">{_details(row)}</td></tr></tbody>\n'
    )


def _cell(head: str, key: Any, text: str) -> str:
    kind = "n" if head in NUMBERS else "found" if head == "found" else ""
    return f'<td class="{kind}" data-key="{escape(str(key))}">{text}</td>'


def _cells(row: Row) -> list[tuple[Any, str]]:
    """(what to sort by, HTML) for each column."""
    status, errors, share = row["status"], row.get("errors", {}).get("gradients", {}), row.get("coverage")
    covered = ("", "") if share is None else (share, f'<i class="bar {grade(share)}" style="--w:{share:.3f}"></i>{share:.1%}')
    star = "" if row.get("truth") == "float64" else "*"
    found = ", ".join(f"{escape(n)} {c}" for n, c in row.get("counts", {}).items())
    return [
        (row["name"], f"<b>{escape(row['name'])}</b>"),
        (list(MEANINGS).index(status), f'<span class="chip {status.replace(" ", "-")}" title="{MEANINGS[status]}">{status}</span>'),
        covered,
        (row.get("graphs", ""), str(row.get("graphs", ""))),
        _number(errors.get("eager"), ".1e"),
        _number(errors.get("sloth"), ".1e", star),
        _number(row.get("share"), ".2f"),
        _number(row.get("compile_s"), ".1f", " s"),
        (found, found or escape(str(row["reason"]))),
    ]


def _number(value: float | None, form: str, after: str = "") -> tuple[Any, str]:
    if value is None:
        return "", ""
    return (value if math.isfinite(value) else 1e300), format(value, form) + after


def _details(row: Row) -> str:
    parts = [f'<p class="reason">{escape(row["reason"])}</p>' if row["reason"] else "", _facts(row)]
    parts += [_list("Graph breaks", (f"{escape(reason)} ({n}×)" for reason, n in row.get("breaks", {}).items()))]
    parts += [_list("Dropped by their check", map(escape, row.get("dropped", ()))), _misses(row), _regions(row)]
    return "".join(parts)


def _facts(row: Row) -> str:
    facts = []
    if "errors" in row:
        loss = row["errors"]["loss"]
        facts.append(f"loss: eager {loss['eager']:.1e}, sloth {loss['sloth']:.1e} from {escape(row['truth'])}")
    if row.get("worst"):
        worst = row["worst"]
        facts.append(f"worst gradient: <code>{escape(worst['name'])}</code>, eager {worst['eager']:.1e}, sloth {worst['sloth']:.1e}")
    if row.get("no_truth"):
        facts.append(f"no float64 truth: {escape(row['no_truth'])}")
    if "compile_s" in row:
        nothing = row["compile_nothing_s"]
        facts.append(f"first forward: {row['compile_s']:.2f} s under sloth, {nothing:.2f} s under a backend that does nothing")
        facts.append(f"graphs: {row.get('graphs', '–')}, {row['graphs_nothing']} under a backend that does nothing")
    return _list("Measured", facts)


def _list(title: str, items: Iterable[str]) -> str:
    made = "".join(f"<li>{item}</li>" for item in items)
    return f"<h4>{title}</h4><ul>{made}</ul>" if made else ""


def _misses(row: Row) -> str:
    """What was left to eager, one line for each rule and reason, with every place."""
    places: dict[tuple[str, str], dict[str, int]] = {}
    for miss in row.get("misses", ()):
        where = places.setdefault((miss["rule"], miss["reason"]), {})
        where[miss["location"]] = where.get(miss["location"], 0) + 1
    lines = (
        f"<tr><td>{escape(rule)}</td><td>{escape(reason)}</td><td>"
        + "<br>".join(f"<code>{escape(at)}</code>" + f" {n}×" * (n > 1) for at, n in where.items()) + "</td></tr>"
        for (rule, reason), where in places.items()
    )  # fmt: skip
    made = "".join(lines)
    return f'<h4>Left to eager</h4><table class="inner">{made}</table>' if made else ""


def _regions(row: Row) -> str:
    made = "".join(
        f"<details><summary>{escape(r['name'])} <code>{escape(r['location'])}</code></summary><pre>{escape(r['formula'])}</pre></details>"
        for r in row.get("regions", ())
    )
    return f"<h4>Regions and their formulas</h4>{made}" if made else ""


NOTES = """
Two small layers with random weights, five batches together. Error: relative L2 distance of all gradients from float64. Of allowed: the
larger of the loss's and the gradients' error, as a share of 1.10 × eager's + tiny (1e-6 in fp32, 1e-4 in bf16). Compile: what the first
forward takes longer than the second, in a process that may have compiled other models. * no float64 truth: against eager in fp32.
"""
STYLE = """
:root{--ink:#22251f;--soft:#6b7066;--edge:#e2e4dc;--paper:#fcfcf9;--good:#4f9d69;--fair:#d9a441;--low:#cf5c4a}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:1180px;margin:2rem auto;padding:0 1.2rem}
h1{margin:0;font-size:1.7rem}header p,figcaption,footer{color:var(--soft);margin:.1rem 0 1rem;font-size:.9rem}h4{margin:.9rem 0 .2rem}
.tiles{display:flex;flex-wrap:wrap;gap:.8rem;margin-bottom:1.2rem}
.tiles div{flex:1 1 9rem;background:#fff;border:1px solid var(--edge);border-radius:8px;padding:.6rem .9rem}
.tiles b{display:block;font-size:1.5rem;line-height:1.3}.tiles span{color:var(--soft);font-size:.85rem}
figure{margin:0}svg{width:100%;background:#fff;border:1px solid var(--edge);border-radius:8px}
svg text{font-size:11px;fill:var(--soft);text-anchor:end}svg line{stroke:#ddd}svg line.mark{stroke:#555;stroke-dasharray:3 4}
rect.good{fill:var(--good)}rect.fair{fill:var(--fair)}rect.low{fill:var(--low)}rect:hover{fill:#333}
.tools{display:flex;flex-wrap:wrap;gap:.6rem;align-items:center;
position:sticky;top:0;background:var(--paper);padding:.5rem 0;margin:.6rem 0;z-index:1}
input{font:inherit;flex:1 1 18rem;padding:.4rem .7rem;border:1px solid #c9ccc2;border-radius:8px;background:#fff}#shown{color:var(--soft)}
table{border-collapse:collapse;width:100%}#models>thead th{text-align:left;border-bottom:2px solid var(--edge);padding:0 .5rem}
th button{font:600 .85rem system-ui;color:var(--soft);background:none;border:0;padding:.3rem 0;cursor:pointer;white-space:nowrap}
th.n,td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}th[aria-sort] button{color:var(--ink)}
th[aria-sort=ascending] button::after{content:" ↑"}th[aria-sort=descending] button::after{content:" ↓"}
.line{cursor:pointer}.line:hover,.line:focus{background:#f1f3ea;outline:0}.line td{padding:.25rem .5rem;border-bottom:1px solid var(--edge)}
td.found{color:var(--soft);font-size:.85rem;max-width:20rem;overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.open td.found{white-space:normal}.more{display:none}.open .more{display:table-row}
.more>td{background:#fff;border:1px solid var(--edge);border-top:0;padding:.2rem 1.2rem 1rem}
.inner td{padding:.2rem .8rem .2rem 0;vertical-align:top;border-bottom:1px solid #f0f1ea}
.reason{color:#9c3b2c}ul{margin:.2rem 0;padding-left:1.2rem}
code{font-size:.85em;overflow-wrap:anywhere}pre{background:#f5f6f0;padding:.7rem;border-radius:6px;overflow:auto;font-size:.8rem}summary{cursor:pointer}
.chip{font-size:.8rem;padding:.05rem .55rem;border-radius:1rem;
background:#f5e9cf;color:#6d5212;border:1px solid transparent;white-space:nowrap}
.chip.ok{background:#dfeee3;color:#285c3a}.chip.off,.chip.crash,.chip.timeout{background:#f7ddd8;color:#8c2c1c}
button.chip{cursor:pointer;font-family:inherit;margin-right:.3rem}button.chip.on{border-color:currentColor}
.bar{display:inline-block;width:60px;height:8px;border-radius:4px;margin-right:.5rem;
background:linear-gradient(var(--c),var(--c)) 0/calc(var(--w)*100%) 100% no-repeat #e9ebe3}
.bar.good{--c:var(--good)}.bar.fair{--c:var(--fair)}.bar.low{--c:var(--low)}
@media print{.tools{display:none}}
"""

SCRIPT = """
const table=document.getElementById('models'),bodies=[...table.tBodies],search=document.getElementById('search'),states=new Set();
const text=new Map(bodies.map(b=>[b,b.textContent.toLowerCase()]));
function filter(){const words=search.value.toLowerCase().split(/\\s+/).filter(Boolean);let n=0;
 for(const b of bodies){b.hidden=!(words.every(w=>text.get(b).includes(w))&&(!states.size||states.has(b.dataset.state)));n+=!b.hidden}
 document.getElementById('shown').textContent=n+' of '+bodies.length}
search.addEventListener('input',filter);
for(const chip of document.querySelectorAll('button.chip'))chip.addEventListener('click',()=>{const s=chip.dataset.state;
 states.has(s)?states.delete(s):states.add(s);chip.classList.toggle('on');filter()});
const heads=[...table.tHead.rows[0].cells];
heads.forEach((head,k)=>head.firstChild.addEventListener('click',()=>{
 const down=head.getAttribute('aria-sort')==='ascending';heads.forEach(h=>h.removeAttribute('aria-sort'));
 head.setAttribute('aria-sort',down?'descending':'ascending');
 const key=b=>b.rows[0].cells[k].dataset.key,sign=down?-1:1;
 const by=(a,b)=>{const x=key(a),y=key(b);if(x===''||y==='')return (x==='')-(y==='');
  return sign*(isNaN(x)||isNaN(y)?x.localeCompare(y):x-y)};
 table.append(...bodies.sort(by))}));
for(const b of bodies){const line=b.rows[0],flip=()=>b.classList.toggle('open');
 line.addEventListener('click',()=>{if(!String(getSelection()))flip()});line.addEventListener('keydown',e=>{if(e.key==='Enter')flip()})}
function go(){const b=document.getElementById(decodeURIComponent(location.hash.slice(1)));
 if(b){b.hidden=false;b.classList.add('open');b.scrollIntoView({block:'center'})}}
addEventListener('hashchange',go);filter();go();
"""
