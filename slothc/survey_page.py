"""The HTML pages of ``slothc coverage`` and ``explain``: one file each, nothing loaded from elsewhere. See templates/."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup, escape

from .peers import Peer, peers
from .survey import Row
from .survey_chart import compile_times, gradient_errors

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
TONES = {"ok": "good", "off": "low", "crash": "low", "timeout": "low"}
# (heading, kind of column, what it is)
HEADS = (
    ("model", "name", "the model type of transformers"),
    ("status", "", "whether it runs and holds the numerical contract"),
    ("coverage", "n", "share of the bytes that rewritten regions account for"),
    ("graphs", "n third", "graphs that Dynamo made, and breaks"),
    ("of allowed", "n third", "error as a share of what the contract allows"),
    ("error, sloth", "n third", "of all gradients together, from float64"),
    ("error, eager", "n second", "of all gradients together, from float64"),
    ("compile", "n third", "seconds under sloth, and as a multiple of a backend that does nothing"),
    ("found", "found", "what was found"),
)
COLOURS = 8           # that the parts of a stack have
NAMED = 6             # models that a summary names
Cell = tuple[Any, str | Markup]


def page(whole: Mapping[str, Any]) -> str:
    """The page for what ``survey.document`` returns."""
    rows: Sequence[Row] = whole["models"]
    ranked = sorted((r for r in rows if r.get("coverage") is not None), key=lambda r: (-r["coverage"], r["name"]))
    known = peers()
    errors, times = gradient_errors(rows, whole["settings"]["dtype"]), compile_times(rows)
    return _environment().get_template("page.html").render(
        settings=whole["settings"], versions=whole["versions"], unfinished=whole.get("unfinished"), tiles=_tiles(rows), bars=ranked,
        peers=known, good=GOOD, fair=FAIR, errors=errors, times=times, causes=_causes(rows), breaks=_breaks(rows),
        broken=sum(bool(r.get("breaks")) for r in rows), states=_states(rows), heads=_heads(known),
        rows=[_shown(r, known) for r in rows],
    )  # fmt: skip


def page_of(report: Mapping[str, Any]) -> str:
    """The page for one report, ``Report.as_dict()``."""
    stops = sum(b["count"] for b in report["breaks"])
    tiles = [
        (f"{report['coverage']:.1%}", "of the bytes covered", grade(report["coverage"])),
        (report["graphs"], f"graph{'s' * (report['graphs'] != 1)}, {stops} break{'s' * (stops != 1)}", "fair" if stops else "good"),
        (sum(report["counts"].values()), "norms, ropes, activations, losses … found", ""),
    ]
    return _environment().get_template("explain.html").render(row=_details(dict(report)), tiles=tiles)


def _environment() -> Environment:
    loader = FileSystemLoader(Path(__file__).with_name("templates"))
    made = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"percent": percent, "grade": grade}
    return made


def percent(share: float, digits: int = 1) -> str:
    return f"{share:.{digits}%}"


def grade(coverage: float) -> str:
    return "good" if coverage >= GOOD else "fair" if coverage >= FAIR else "low"


def _tiles(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    good = sum(r["status"] == "ok" for r in rows)
    shares = [r["coverage"] for r in rows if r.get("coverage") is not None]
    slower = [r["compile_s"] / r["compile_nothing_s"] for r in rows if r.get("compile_nothing_s")]
    tiles = [
        (f"{good} / {len(rows)}", "run and hold the contract", "good" if good == len(rows) else "fair"),
        (f"{median(shares):.1%}" if shares else "–", "median coverage", grade(median(shares)) if shares else ""),
        (f"{sum(s >= GOOD for s in shares)} / {len(shares)}", f"covered to {GOOD:.0%} or more", ""),
        (f"{sum(s < FAIR for s in shares)}", f"covered to less than {FAIR:.0%}", "good" if all(s >= FAIR for s in shares) else "fair"),
        (f"{median(slower):.2f} ×" if slower else "–", "median compile time, of a backend that does nothing", ""),
    ]
    tiles += [(str(sum(sum(r.get("counts", {}).values()) for r in rows)), "norms, ropes, activations, losses … found", "")]
    patched = [str(sum(r["name"] in p.models for r in rows)) for p in peers()]
    return [*tiles, (" · ".join(patched), f"of them patched by {', by '.join(p.package for p in peers())}", "")]


def _states(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The buttons that choose rows."""
    made = [(s.replace(" ", "-"), s, MEANINGS[s], TONES.get(s, "fair")) for s in MEANINGS]
    made += [
        ("under-95", "under 95%", "covered to less than 95%", ""), ("under-85", "under 85%", "covered to less than 85%", ""),
        ("breaks", "graph breaks", "captured as more than one graph", ""), ("missed", "left to eager", "something recognised was left", ""),
    ]  # fmt: skip
    counts = {key: sum(key in _state(r) for r in rows) for key, *_ in made}
    return [{"key": k, "text": t, "title": title, "tone": tone, "count": counts[k]} for k, t, title, tone in made if counts[k]]


def _state(row: Row) -> list[str]:
    share = row.get("coverage")
    also = {
        "under-95": share is not None and share < GOOD, "under-85": share is not None and share < FAIR,
        "breaks": bool(row.get("breaks")), "missed": bool(row.get("misses")),
    }  # fmt: skip
    return [row["status"].replace(" ", "-"), *(k for k, v in also.items() if v)]


def _heads(known: Sequence[Peer]) -> list[dict[str, str]]:
    theirs = [(p.name, "n third", f"the most that the patches of {p.package} {p.version} cover") for p in known]
    return [{"text": t, "kind": k, "title": title} for t, k, title in (*HEADS[:-1], *theirs, HEADS[-1])]


def _shown(row: Row, known: Sequence[Peer]) -> dict[str, Any]:
    cells = [{"key": key, "html": text} for key, text in _cells(row, known)]
    return {**_details(row, known), "states": _state(row), "cells": list(zip(_heads(known), cells))}


def _cells(row: Row, known: Sequence[Peer]) -> list[Cell]:
    """(what to sort by, HTML) for each column."""
    status, errors, share = row["status"], row.get("errors", {}).get("gradients", {}), row.get("coverage")
    covered: Cell = ("", "")
    if share is not None:
        bar = Markup('<i class="bar {}" style="--w:{:.3f}"></i><span class="share">{}</span>').format(grade(share), share, f"{share:.1%}")
        covered = (share, bar)
    chip = Markup('<span class="chip {}" title="{}">{}</span>').format(TONES.get(status, "fair"), MEANINGS[status], status)
    found = ", ".join(f"{n} {c}" for n, c in row.get("counts", {}).items()) or row["reason"]
    theirs = [(p.most(row) or ("",))[0] for p in known]
    return [
        (row["name"], escape(row["name"])),
        (list(MEANINGS).index(status), chip),
        covered,
        (row.get("graphs", ""), str(row.get("graphs", ""))),
        _number(row.get("share"), ".2f"),
        _number(errors.get("sloth"), ".1e", "*" * (row.get("truth") != "float64")),
        _number(errors.get("eager"), ".1e"),
        _compile(row),
        *((s, "" if s == "" else f"{s:.0%}") for s in theirs),
        (found, escape(found)),
    ]


def _compile(row: Row) -> Cell:
    if "compile_s" not in row:
        return "", ""
    times = f" {row['compile_s'] / row['compile_nothing_s']:.1f}×" if row.get("compile_nothing_s") else ""
    return row["compile_s"], Markup("{:.1f} s<small>{}</small>").format(row["compile_s"], times)


def _number(value: float | None, form: str, after: str = "") -> Cell:
    if value is None:
        return "", ""
    return (value if math.isfinite(value) else 1e300), format(value, form) + after


def _details(row: Row, known: Sequence[Peer] = ()) -> dict[str, Any]:
    """What a row shows when it is open."""
    return {**row, "parts": _parts(row), "facts": _facts(row, known), "missed": _missed(row)}


def _parts(row: Row) -> list[dict[str, Any]]:
    """The bytes: by rule, what is covered besides, and what is not."""
    if row.get("coverage") is None:
        return []
    shares, counts = row.get("shares", {}), row.get("counts", {})
    parts = [{"name": n, "share": s, "count": counts.get(n), "tone": f"k{k % COLOURS}"} for k, (n, s) in enumerate(shares.items())]
    between = row["coverage"] - sum(shares.values())
    parts += [{"name": "no longer needed", "share": between, "tone": f"k{len(parts) % COLOURS}"}] if between > 1e-6 else []
    return [*parts, {"name": "not covered", "share": max(1 - row["coverage"], 0.0), "tone": "rest"}]


def _facts(row: Row, known: Sequence[Peer]) -> list[tuple[str, str]]:
    facts = []
    for kind, e in row.get("errors", {}).items():
        facts.append((f"error of the {kind}, from {row['truth']}", f"sloth {e['sloth']:.1e}, eager {e['eager']:.1e}"))
    if row.get("worst"):
        worst = row["worst"]
        facts.append(("worst gradient", f"{worst['name']}: sloth {worst['sloth']:.1e}, eager {worst['eager']:.1e}"))
    if row.get("no_truth"):
        facts.append(("no float64 truth", row["no_truth"]))
    if "compile_s" in row:
        facts.append(("first forward beyond the second", f"sloth {row['compile_s']:.2f} s, nothing {row['compile_nothing_s']:.2f} s"))
        facts.append(("graphs", f"sloth {row.get('graphs', '–')}, nothing {row['graphs_nothing']}"))
    for p in known:
        kinds = p.models.get(row["name"])
        if kinds is not None:
            share, count = p.most(row) or (0.0, 0)
            facts.append((f"{p.package} {p.version} patches", f"{', '.join(kinds)}: at most {share:.1%} of the bytes, {count} operations"))
    return facts


def _missed(row: Row) -> list[dict[str, Any]]:
    """What was left to eager, one line for each rule and reason, with every place."""
    found: dict[tuple[str, str], dict[tuple[str, str], int]] = defaultdict(lambda: defaultdict(int))
    for m in row.get("misses", ()):
        found[m["rule"], m["reason"]][m["location"], m.get("line", "")] += 1
    return [
        {"rule": rule, "reason": reason, "places": [{"location": at, "line": line, "count": n} for (at, line), n in where.items()]}
        for (rule, reason), where in found.items()
    ]


def _causes(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Why bytes are not covered, over all models, the most costly first."""
    sizes: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for row in rows:
        for rest in row.get("rest", ()):
            sizes[rest["why"]][row["name"]] += rest["share"]
    order = sorted(sizes.items(), key=lambda item: -sum(item[1].values()))
    return [
        {"why": why, "models": len(of), "most": max(of.values()), "names": sorted(of, key=of.__getitem__, reverse=True)[:NAMED]}
        for why, of in order
    ]


def _breaks(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Every cause of graph breaks with the models that have it, the most frequent first."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        for cause in dict.fromkeys((b["cause"], b["remedy"]) for b in row.get("breaks", ())):
            found[cause].append(row["name"])
    return [{"cause": c, "remedy": r, "names": names} for (c, r), names in sorted(found.items(), key=lambda item: -len(item[1]))]
