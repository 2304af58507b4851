"""A second witness of a matrix plan: exact rational differences of its formula, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from random import Random

import sympy as sp

from .matrix import ONES, MatrixPlan, chains, read, size_symbols


def witness(plan: MatrixPlan, sizes: Mapping[str, int], seed: int = 0) -> dict[str, sp.Expr]:
    """The largest gap of each derived gradient from an exact difference of Trace(G' Y).

    Y is a polynomial: where it is at most quadratic in each single element the central difference is exact, so zero is
    expected. Y is evaluated from the formula itself, not from the plan's products.
    """
    random = Random(seed)
    numbers = {s: sizes[s.name] for s in size_symbols(plan.expression)}
    symbols = {m.name: m for m in plan.expression.atoms(sp.MatrixSymbol)}
    values = {n: _draw(random, *(int(sp.sympify(d).subs(numbers)) for d in m.shape)) for n, m in symbols.items()}
    scalars = {n: sp.Rational(random.randint(1, 9), 4) for n in plan.scalars}
    values["G"] = _draw(random, *(int(sp.sympify(d).subs(numbers)) for d in plan.expression.shape))
    found = plan.evaluate(values, scalars)
    return {name: _largest_gap(plan, name, values, scalars, found[step]) for name, step in plan.gradients}


def _draw(random: Random, rows: int, cols: int) -> sp.MatrixBase:
    return sp.Matrix(
        rows, cols, lambda i, j: sp.Rational(*Fraction(random.randint(-9, 9), random.randint(1, 5)).as_integer_ratio())
    )


def _largest_gap(
    plan: MatrixPlan,
    name: str,
    values: Mapping[str, sp.MatrixBase],
    scalars: Mapping[str, sp.Expr],
    gradient: sp.MatrixBase,
) -> sp.Expr:
    gap = sp.Integer(0)
    for i in range(gradient.rows):
        for j in range(gradient.cols):
            step = sp.zeros(*gradient.shape)
            step[i, j] = 1
            up, down = (_traced(plan, {**values, name: values[name] + d}, scalars) for d in (step, -step))
            gap = max(gap, abs((up - down) / 2 - gradient[i, j]))
    return gap


def _traced(plan: MatrixPlan, values: Mapping[str, sp.MatrixBase], scalars: Mapping[str, sp.Expr]) -> sp.Expr:
    """Trace(G' Y) with Y from the formula's chains."""
    G = values["G"]
    known = {**values, ONES: sp.ones(G.rows, 1)}
    at = {sp.Symbol(k, real=True): v for k, v in scalars.items()}
    total = sp.zeros(*G.shape)
    for coefficient, chain in chains(plan.expression):
        product = read(chain[0], known)
        for factor in chain[1:]:
            product = product * read(factor, known)
        total = total + coefficient.subs(at) * product
    return sum(g * y for g, y in zip(G, total))
