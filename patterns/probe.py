"""Evaluating a row program at random points, to tell what formula it is whatever it looks like."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import mpmath
from slothc.gradients.program import Input, Program
from slothc.gradients.verify import evaluate

LANES = 3
DIGITS = 30
CLOSE = mpmath.mpf(10) ** -15        # equal, when computed with 30 digits from constants that have 16
Point = dict[str, Any]


def rows_of(program: Program) -> list[Input]:
    """The inputs that vary with row and lane."""
    return [i for i in program.inputs if i.kind.rows and i.kind.lanes and i.role == "data"]


def draw(program: Program, dice: random.Random, low: float = 0.3, high: float = 1.7) -> Point:
    """A random point of one row: positive values, so that signs tell something."""
    point: Point = {}
    for i in program.inputs:
        if i.role == "data":
            values = [mpmath.mpf(dice.uniform(low, high)) for _ in range(LANES)]
            point[i.name] = ([values] if i.kind.rows else values) if i.kind.lanes else ([values[0]] if i.kind.rows else values[0])
    return point


def value(program: Program, point: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Every output's row (a list with one element where it has no lanes)."""
    found = evaluate(program, point, rows=1, lanes=LANES, digits=DIGITS)
    kinds = {o.name: program.out_kind(o) for o in program.outputs}
    return {n: _row(v, kinds[n].rows, kinds[n].lanes) for n, v in found.items()}


def _row(v: Any, rows: bool, lanes: bool) -> list[Any]:
    v = v[0] if rows else v
    return list(v) if lanes else [v]


def close(a: Any, b: Any) -> bool:
    """Equal but for the rounding of the evaluation."""
    return bool(abs(a - b) <= CLOSE * max(1, abs(a), abs(b)))
