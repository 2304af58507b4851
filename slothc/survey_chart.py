"""The two charts of the coverage page that set sloth against something: where their points, lines and ticks are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .survey import Row

LEFT, RIGHT, TOP, BOTTOM = 58.0, 410.0, 10.0, 258.0
TINY = {"fp32": 1e-6, "bf16": 1e-4}
SLACK, EXTRA = 1.10, 1.30
STEPS = 40            # of a curve


@dataclass
class Plot:
    """Logarithmic axes; positions are those of a picture 420 wide and 300 high."""

    points: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    ticks_x: list[dict[str, Any]] = field(default_factory=list)
    ticks_y: list[dict[str, Any]] = field(default_factory=list)
    left: float = LEFT
    right: float = RIGHT
    top: float = TOP
    bottom: float = BOTTOM


def gradient_errors(rows: Sequence[Row], dtype: str = "fp32") -> Plot:
    """Eager's error across, sloth's up; the line is what the contract allows."""
    found = [(r, r["errors"]["gradients"]) for r in rows if r.get("errors")]
    values = [(r, e["eager"], e["sloth"]) for r, e in found if math.isfinite(e["eager"]) and math.isfinite(e["sloth"])]
    return _plot(values, lambda x, y: f"sloth {y:.1e}, eager {x:.1e}", [lambda x: SLACK * x + TINY[dtype]], "{:.0e}", 1e-9)


def compile_times(rows: Sequence[Row]) -> Plot:
    """Seconds of a backend that does nothing across, sloth's up."""
    values = [(r, r["compile_nothing_s"], r["compile_s"]) for r in rows if r.get("compile_s") and r.get("compile_nothing_s")]
    return _plot(values, lambda x, y: f"sloth {y:.2f} s, doing nothing {x:.2f} s", [lambda x: x, lambda x: EXTRA * x], "{:g} s", 1e-3)


def _plot(
    values: Sequence[tuple[Row, float, float]], words: Callable[[float, float], str], lines: Sequence[Callable[[float], float]],
    form: str, least: float,
) -> Plot:  # fmt: skip
    plot = Plot()
    if not values:
        return plot
    low_x, high_x = _span([max(x, least) for _, x, _ in values])
    low_y, high_y = _span([max(y, least) for _, _, y in values])

    def across(x: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * _part(max(x, least), low_x, high_x), 1)

    def up(y: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * _part(max(y, least), low_y, high_y), 1)

    for row, x, y in values:
        tone = "good" if row["status"] == "ok" else "low"
        plot.points.append({"name": row["name"], "x": across(x), "y": up(y), "text": words(x, y), "tone": tone})
    for line in lines:
        steps = [low_x * (high_x / low_x) ** (k / STEPS) for k in range(STEPS + 1)]
        inside = [f"{across(x)} {up(line(x))}" for x in steps if low_y <= line(x) <= high_y]
        plot.lines += [f"M{' L'.join(inside)}"] if len(inside) > 1 else []
    plot.ticks_x = [{"at": across(t), "text": form.format(t)} for t in _ticks(low_x, high_x)]
    plot.ticks_y = [{"at": up(t), "text": form.format(t)} for t in _ticks(low_y, high_y)]
    return plot


def _part(value: float, low: float, high: float) -> float:
    return math.log(value / low) / math.log(high / low)


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis, a little beyond the values."""
    return min(values) / 1.4, max(values) * 1.4


def _ticks(low: float, high: float) -> Iterator[float]:
    """Powers of ten, with twos and fives where there are few of them, and every so many where there are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits = (1,) if last - first > 3 else (1, 2, 5)
    stride = max((last - first) // 6, 1)
    yield from (t for k in range(first, last + 1, stride) for d in digits if low <= (t := d * 10.0**k) <= high)
