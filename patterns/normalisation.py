"""What norms have in common: y_i = w_i * u_i * (mean(u^2) + eps)^(-1/2) + b_i, for u = x or u = x - mean(x)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import mpmath
from slothc.gradients.program import Program

from .probe import LANES, close, draw, rows_of, value

Row = list[Any]


def is_normalisation(program: Program, centre: Callable[[Row], Row], bias: bool) -> bool:
    """Whether the program is w_i * u_i / sqrt(mean(u^2) + eps) + b_i for some columns w, b and some eps >= 0, with u = centre(x)."""
    rows = rows_of(program)
    if len(rows) != 1 or len(program.outputs) != 1 or not program.reductions:
        return False
    if any(i.kind.rows and not i.kind.lanes for i in program.inputs):
        return False
    dice = random.Random(7)
    base = draw(program, dice)
    for i in program.inputs:                                              # an eps given at run time is small
        if i.role == "data" and not i.kind.rows and not i.kind.lanes:
            base[i.name] = base[i.name] / 100

    def at(x: Row) -> Row:
        return next(iter(value(program, {**base, rows[0].name: [x]}).values()))

    try:
        points = [[mpmath.mpf(dice.uniform(-2, 2)) for _ in range(LANES)] for _ in range(4)]
        offset = at([mpmath.mpf(0)] * LANES) if bias else [mpmath.mpf(0)] * LANES
        results = [[y - b for y, b in zip(at(x), offset)] for x in points]
    except (ZeroDivisionError, ValueError, TypeError):
        return False
    return _same_scale([centre(x) for x in points], results)


def _same_scale(points: list[Row], results: list[Row]) -> bool:
    """With q = y_i / u_i: (q / q')^2 = (m' + eps) / (m + eps) in every lane, m = mean(u^2); eps from one pair holds for all."""
    if any(len(y) != LANES for y in results):
        return False
    squares = [mpmath.fsum(u * u for u in x) / LANES for x in points]
    scales = [[y / u for y, u in zip(ys, us)] for ys, us in zip(results, points)]
    if any(abs(s) < 1e-12 or isinstance(s, mpmath.mpc) for s in scales[0]):
        return False
    eps = None
    for m, q in zip(squares[1:], scales[1:]):
        ratios = [(a / b) ** 2 for a, b in zip(q, scales[0])]
        if not all(close(r, ratios[0]) for r in ratios) or close(ratios[0], 1):
            return False
        found = (squares[0] - ratios[0] * m) / (ratios[0] - 1)
        if eps is not None and abs(found - eps) > 1e-12:
            return False
        eps = found
    return eps is not None and -1e-12 <= eps <= 0.1
