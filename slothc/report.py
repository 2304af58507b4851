"""What ``explain`` says: what was found, what was not and why."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slothc.patterns.rule import Miss

from .breaks import Break
from .catalogue import UNNAMED
from .coverage import by_rule, coverage, operation
from .found import Region
from .reasons import why
from .regions_shown import RegionLine, shown
from .rewrite import Rewritten
from .view_location import place

LISTED = 3            # places of each kind that the printed report names; JSON and HTML have all
SMALL = 0.005         # of all bytes: what the printed report leaves out


@dataclass(frozen=True)
class MissLine:
    """Something left to eager: the rule it resembled, where it is in the user's source, why, and the text of that line."""

    rule: str
    location: str
    reason: str
    line: str = ""


@dataclass(frozen=True)
class RestLine:
    """Bytes that are not covered: where, by which operation, their share of all, why, and the line of source."""

    location: str
    operation: str
    share: float
    why: str
    line: str = ""


@dataclass(frozen=True)
class Report:
    """``counts``: name -> how many (one norm call, one rotated tensor, one gated activation, one adapted linear, one loss).

    ``coverage``: share of the bytes moved by nodes other than matrix products and attention that rewritten regions account for, 0..1.
    ``shares``: name -> its part of that, where a node belongs to one. ``regions``: each distinct one, before and after. ``graphs``: how
    many Dynamo made. ``breaks``: each place where it stopped, with its remedy -> how often. ``rest``: what is not covered, the largest
    first.
    """

    counts: dict[str, int]
    coverage: float
    misses: tuple[MissLine, ...]
    regions: tuple[RegionLine, ...]
    graphs: int
    breaks: dict[Break, int] = field(default_factory=dict)
    rest: tuple[RestLine, ...] = ()
    shares: dict[str, float] = field(default_factory=dict)

    def to_json(self, path: str | Path) -> None:
        """Write the report as JSON."""
        Path(path).write_text(json.dumps(self.as_dict(), indent=2) + "\n")

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return {
            "counts": self.counts, "coverage": self.coverage, "shares": self.shares, "graphs": self.graphs,
            "breaks": [{**vars(b), "count": n} for b, n in self.breaks.items()],
            "misses": [vars(m) for m in self.misses],
            "rest": [vars(r) for r in self.rest],
            "regions": [vars(r) for r in self.regions],
        }  # fmt: skip

    def to_html(self, path: str | Path) -> None:
        """Write the report as one self-contained HTML page."""
        from .survey_page import page_of

        Path(path).write_text(page_of(self.as_dict()), encoding="utf-8")

    def __str__(self) -> str:
        graphs, stops = f"{self.graphs} graph{'s' * (self.graphs != 1)}", sum(self.breaks.values())
        lines = [f"{graphs}, {stops} graph break{'s' * (stops != 1)}, {self.coverage:.1%} of the bytes covered"]
        width = max((len(n) for n in self.counts), default=0)
        lines += [f"  {name:<{width}}  {count:>5}" for name, count in self.counts.items()]
        lines += _some([f"  break  {b} ({n}x)" for b, n in self.breaks.items()], "breaks")
        grouped = Counter((m.rule, m.reason) for m in self.misses)
        first = {(m.rule, m.reason): m.location for m in reversed(self.misses)}
        lines += _some(
            [f"  left to eager  {rule}: {reason} ({n}x, first at {first[rule, reason]})" for (rule, reason), n in grouped.most_common()],
            "reasons",
        )
        lines += _some([f"  not covered  {text}" for text in _places(self.rest)], "places")
        return "\n".join(lines)


def _places(rest: tuple[RestLine, ...]) -> list[str]:
    """The larger ones, those of one line and reason together."""
    together: dict[tuple[str, str], list[RestLine]] = {}
    for r in rest:
        together.setdefault((r.location, r.why), []).append(r)
    large = [(share, lines) for lines in together.values() if (share := sum(r.share for r in lines)) >= SMALL]
    return [
        f"{share:5.1%} of the bytes: {', '.join(dict.fromkeys(r.operation for r in lines))} at {lines[0].location} ({lines[0].why})"
        for share, lines in sorted(large, key=lambda x: -x[0])
    ]


def _some(lines: list[str], what: str) -> list[str]:
    left = len(lines) - LISTED
    return lines if left <= 1 else [*lines[:LISTED], f"  and {left} more {what} (all in --json and --html)"]


def report(graphs: list[tuple[Rewritten, int]], breaks: dict[Break, int]) -> Report:
    """The report over every graph of one compilation, each with how often one call of the model runs it."""
    every = [(r, times) for g, times in graphs for r in g.all()]
    total, sizes, covered = Counter[str](), Counter[str](), 0
    rest = Counter[tuple[str, str, str, str]]()
    misses: list[MissLine] = []
    for r, times in every:
        for item in r.used:
            total += _times(item.counts() if isinstance(item, Region) else Counter({item.rule: item.count}), times)
        missed = (*r.found.misses, *r.dropped)
        said = {m.node: m.reason for m in reversed(missed)}
        done, left = coverage(r.found, r.used)
        misses += [_missed(m) for m in missed if m.rule != UNNAMED or m.node in left]
        covered, sizes = covered + times * done, sizes + _times(by_rule(r.found, r.used), times)
        for n, size in left.items():
            at, line = place(n)
            rest[at, operation(n), why(r.found.view, n, said), line] += times * size
    size = covered + rest.total()
    places = tuple(RestLine(at, what, n / size, reason, line) for (at, what, reason, line), n in rest.most_common())
    shares = {n: s / size for n, s in sizes.most_common()}
    share = covered / size if size else 1.0
    return Report(_ordered(total), share, tuple(misses), tuple(shown(every)), len(graphs), breaks, places, shares)


def _times(counted: Counter[str], times: int) -> Counter[str]:
    return Counter({n: c * times for n, c in counted.items()})


def _missed(miss: Miss) -> MissLine:
    at, line = place(miss.node)
    return MissLine(miss.rule, at, miss.reason, line)


def _ordered(total: Counter[str]) -> dict[str, int]:
    return {n: total[n] for n in sorted(+total, key=lambda n: (-total[n], n))}
