"""What ``explain`` says: what was found, what was not and why."""

from __future__ import annotations

import html
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .coverage import coverage
from .found import Region
from .rewrite import Rewritten

LISTED = 8            # places that the printed report names; JSON and HTML have all


@dataclass(frozen=True)
class MissLine:
    """Something left to eager: the rule it resembled, where it is in the user's source, and why."""

    rule: str
    location: str
    reason: str


@dataclass(frozen=True)
class Report:
    """``counts``: name -> how many (one norm call, one rotated tensor, one gated activation, one adapted linear, one loss).

    ``coverage``: share of the bytes moved by nodes other than matrix products and attention that rewritten regions account for, 0..1.
    ``regions``: (name, location, formula) of each distinct one. ``graphs``: how many Dynamo made. ``breaks``: reason -> how often.
    ``rest``: (location, operation, share of all bytes) of what is not covered, the largest first.
    """

    counts: dict[str, int]
    coverage: float
    misses: tuple[MissLine, ...]
    regions: tuple[tuple[str, str, str], ...]
    graphs: int
    breaks: dict[str, int] = field(default_factory=dict)
    rest: tuple[tuple[str, str, float], ...] = ()

    def to_json(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=2) + "\n")

    def as_dict(self) -> dict[str, Any]:
        return {
            "counts": self.counts, "coverage": self.coverage, "graphs": self.graphs, "breaks": self.breaks,
            "misses": [vars(m) for m in self.misses],
            "rest": [dict(zip(("location", "operation", "share"), r)) for r in self.rest],
            "regions": [dict(zip(("name", "location", "formula"), r)) for r in self.regions],
        }  # fmt: skip

    def to_html(self, path: str | Path) -> None:
        """Write the report as one self-contained HTML page."""
        Path(path).write_text(_html(self))

    def __str__(self) -> str:
        graphs, breaks = f"{self.graphs} graph{'s' * (self.graphs != 1)}", f"{sum(self.breaks.values())} graph breaks"
        lines = [f"{graphs}, {breaks}, {self.coverage:.1%} of the bytes covered"]
        width = max((len(n) for n in self.counts), default=0)
        lines += [f"  {name:<{width}}  {count:>5}" for name, count in self.counts.items()]
        lines += [f"  break  {reason} ({count}x)" for reason, count in self.breaks.items()]
        grouped = Counter((m.rule, m.reason) for m in self.misses)
        place = {(m.rule, m.reason): m.location for m in reversed(self.misses)}
        for (rule, reason), count in grouped.most_common():
            lines.append(f"  left to eager  {rule}: {reason} ({count}x, first at {place[rule, reason]})")
        for where, what, share in self.rest[:LISTED]:
            if share >= 0.005:
                lines.append(f"  not covered  {share:5.1%} of the bytes: {what} at {where}")
        return "\n".join(lines)


def report(graphs: list[Rewritten], breaks: dict[str, int]) -> Report:
    """The report over every graph of one compilation."""
    from slothc.gradients.pretty import formula

    every = [r for g in graphs for r in g.all()]
    total, covered, rest = Counter[str](), 0, Counter[tuple[str, str]]()
    misses: list[MissLine] = []
    regions: dict[str, tuple[str, str, str]] = {}
    for r in every:
        view = r.found.view
        for item in r.used:
            total += item.counts() if isinstance(item, Region) else Counter({item.rule: item.count})
            if isinstance(item, Region) and item.plan.key not in regions:
                regions[item.plan.key] = (item.rule, view.location(item.cone.sink), formula(item.plan.forward.program))
        done, left = coverage(r.found, r.used)
        covered, rest = covered + done, rest + left
        for miss in (*r.found.misses, *r.dropped):
            misses.append(MissLine(miss.rule, view.location(miss.node), miss.reason))
    order = sorted(total, key=lambda n: (-total[n], n))
    size = covered + rest.total()
    places = tuple((place, what, count / size) for (place, what), count in rest.most_common())
    share = covered / size if size else 1.0
    return Report({n: total[n] for n in order}, share, tuple(misses), tuple(regions.values()), len(graphs), breaks, places)


def _html(r: Report) -> str:
    rows = "".join(f"<tr><td>{html.escape(n)}</td><td>{c}</td></tr>" for n, c in r.counts.items())
    cells = ((html.escape(m.rule), html.escape(m.location), html.escape(m.reason)) for m in r.misses)
    misses = "".join(f"<tr><td>{rule}</td><td><code>{location}</code></td><td>{reason}</td></tr>" for rule, location, reason in cells)
    regions = "".join(f"<h3>{html.escape(n)} <code>{html.escape(w)}</code></h3><pre>{html.escape(f)}</pre>" for n, w, f in r.regions)
    places = ((f"{share:.1%}", html.escape(what), html.escape(where)) for where, what, share in r.rest)
    rest = "".join(f"<tr><td>{share}</td><td>{what}</td><td><code>{where}</code></td></tr>" for share, what, where in places)
    breaks = "".join(f"<li>{html.escape(b)} ({c}x)</li>" for b, c in r.breaks.items())
    return f"""<!doctype html><meta charset="utf-8"><title>slothc explain</title>
<style>body{{font:15px/1.5 system-ui;max-width:60rem;margin:2rem auto;padding:0 1rem}}td{{padding:.15rem .8rem .15rem 0;vertical-align:top}}
pre{{background:#f4f4f1;padding:.8rem;overflow:auto}}meter{{width:16rem}}</style>
<h1>slothc explain</h1><p><meter value="{r.coverage:.4f}"></meter> {r.coverage:.1%} of the bytes covered, {r.graphs} graphs</p>
<table>{rows}</table><ul>{breaks}</ul><h2>Left to eager</h2><table>{misses}</table>
<h2>Bytes not covered</h2><table>{rest}</table><h2>Regions</h2>{regions}
"""
