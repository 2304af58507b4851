"""Between which numbers a value lies, whatever the inputs are: a soft-capped logit between -c and c, a gate between 0 and 1.

Interval arithmetic over the stages (Moore, Interval Analysis, 1966). Rounding points move an end by no more than their rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import sympy as sp

from .program import Program, Reduce

Span = tuple[float, float]
ALL: Span = (-math.inf, math.inf)

MONOTONE: Mapping[str, tuple[Callable[[float], float], Span]] = {
    "tanh": (math.tanh, (-1.0, 1.0)),
    "erf": (math.erf, (-1.0, 1.0)),
    "sigmoid": (lambda x: 1 / (1 + math.exp(-x)) if x > -700 else 0.0, (0.0, 1.0)),
    "relu": (lambda x: max(x, 0.0), (0.0, math.inf)),
}
"""Increasing functions by the name of their sympy class, and where all their values lie."""


def bounds(program: Program) -> dict[str, Span]:
    """(least, greatest) of every scalar; infinite where nothing is known. A nan lies everywhere."""
    found: dict[str, Span] = {i.name: ALL for i in program.inputs}
    for stage in program.stages:
        found[stage.name] = ALL if isinstance(stage.value, Reduce) else span(stage.expr, found)
    return found


def span(expr: sp.Expr, of: Mapping[str, Span]) -> Span:
    """(least, greatest) of an expression whose symbols lie in ``of``."""
    if expr.is_Symbol:
        return of.get(expr.name, ALL)
    if expr.is_number:
        value = float(expr)
        return (value, value)
    name, parts = type(expr).__name__, [span(a, of) for a in expr.args]
    if expr.is_Add:
        return sum(low for low, _ in parts), sum(high for _, high in parts)
    if expr.is_Mul:
        return _product(parts)
    if name in MONOTONE:
        f, (least, greatest) = MONOTONE[name]
        low, high = parts[0]
        return (least if low == -math.inf else f(low)), (greatest if high == math.inf else f(high))
    if name == "clip":
        (low, high), (least, _), (_, greatest) = parts
        return min(max(low, least), greatest), max(min(high, greatest), least)
    if name == "select":
        return min(parts[1][0], parts[2][0]), max(parts[1][1], parts[2][1])
    return ALL


def _product(parts: list[Span]) -> Span:
    low, high = parts[0]
    for other in parts[1:]:
        ends = [0.0 if 0.0 in (a, b) else a * b for a in (low, high) for b in other]
        low, high = min(ends), max(ends)
    return low, high
