"""Without torch: is this backward the derivative of that forward, and are these two programs one formula?

``witness`` compares a derived backward with differences of the forward: a central difference with step h errs by
h^2 f'''/6, and at 70 digits h = 1e-25 leaves about 1e-45. Where the program is analytic a second one, without
cancellation, is the complex step, f'(x) = Im f(x + ih) / h (Squire and Trapp 1998).
``equivalent`` decides what a lifted program is called.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice, permutations, product
from typing import Any

import mpmath
import sympy as sp

from .evaluate import (
    GUARD,
    Grid,
    Machine,
    Point,
    cells_of,
    draw,
    draw_point,
    evaluate,
    machine,
    rounded,
    spread,
    stored_kind,
)
from .functions import sigmoid, softplus
from .program import Input, Kind, Program, Reduce, symbol

__all__ = ["Binding", "WitnessReport", "analytic", "equivalent", "evaluate", "rounded", "witness"]

SMOOTH = (sp.exp, sp.log, sp.sin, sp.cos, sp.tan, sp.tanh, sp.sinh, sp.cosh, sp.erf, sp.atan, sigmoid, softplus)


@dataclass(frozen=True)
class WitnessReport:
    """How far the derived gradient of each input is from differences of the forward, relative to its largest element.

    ``errors`` are against central differences, ``complex_errors`` against the complex step (empty unless analytic).
    """

    errors: dict[str, float]
    complex_errors: dict[str, float] = field(default_factory=dict)

    @property
    def worst(self) -> float:
        return max([*self.errors.values(), *self.complex_errors.values()], default=0.0)

    def __str__(self) -> str:
        return ", ".join(f"{k} {v:.1e}" for k, v in self.errors.items()) + f" (worst {self.worst:.1e})"


def analytic(program: Program) -> bool:
    """Is every stage analytic, so that the complex step applies?"""
    smooth = all(isinstance(f, SMOOTH) for s in program.stages for f in s.expr.atoms(sp.Function))
    return smooth and not any(isinstance(s.value, Reduce) and s.value.op == "max" for s in program.stages)


def witness(
    program: Program,
    backward: Program | None = None,
    *,
    seed: int = 0,
    rows: int = 2,
    lanes: int = 3,
    digits: int = 50,
    points: Point | None = None,
) -> WitnessReport:
    """Check a derived backward against differences of sum(cotangent * output), element by element.

    ``backward`` defaults to ``derive(program)``. Detached stages are held at their values. ``points`` fixes some inputs
    or cotangents (``g_<output>``), for tests near kinks; on a kink itself a central difference is the mean of
    both sides, which need not be torch's choice.
    """
    if backward is None:
        from .reverse import derive

        backward = derive(program)
    with mpmath.workdps(digits + GUARD):
        point = {**draw_point(program, random.Random(seed), rows, lanes), **(points or {})}
        cells = {i.name: cells_of(i, point, rows, lanes) for i in program.inputs}
        fixed = machine(program).run(cells, rows, lanes)
        cells |= {s.name: fixed[s.name] for s in program.stages if s.detached}
        objective = _Objective(program, rows, lanes, random.Random(seed + 1), points or {})
        derived = _derived(backward, cells, objective, rows, lanes)
        step = mpmath.mpf(10) ** (-digits // 2)
        numeric = {n: objective.central(cells, n, step) for n in derived}
        top = max([abs(x) for g in numeric.values() for row in g for x in row], default=mpmath.mpf(0)) or mpmath.mpf(1)
        errors = {n: _error(derived[n], numeric[n], top) for n in derived}
        if not analytic(program):
            return WitnessReport(errors)
        tiny = mpmath.mpf(10) ** (-digits)
        return WitnessReport(errors, {n: _error(derived[n], objective.complex(cells, n, tiny), top) for n in derived})


class _Objective:
    """phi(inputs) = sum(cotangent * output), the scalar whose gradient the backward must be."""

    def __init__(self, program: Program, rows: int, lanes: int, dice: random.Random, points: Point) -> None:
        self.machine, self.rows, self.lanes = machine(program), rows, lanes
        self.cotangents: dict[str, Grid] = {}
        for o in program.outputs:
            g = Input(f"g_{o.name}", stored_kind(program, o))
            value = points.get(g.name) or draw(g, dice, rows, lanes)
            self.cotangents[g.name] = cells_of(g, {g.name: value}, rows, lanes)

    def __call__(self, cells: Mapping[str, Grid]) -> Any:
        out = self.machine.results(self.machine.run(cells, self.rows, self.lanes), self.rows, self.lanes)
        return mpmath.fsum(
            g * y
            for name, grid in out.items()
            for gs, ys in zip(self.cotangents[f"g_{name}"], grid, strict=True)
            for g, y in zip(gs, ys, strict=True)
        )

    def moved(self, cells: Mapping[str, Grid], name: str, r: int, i: int, by: Any) -> Any:
        grid = [list(row) for row in cells[name]]
        grid[r][i] = grid[r][i] + by
        return self({**cells, name: grid})

    def central(self, cells: Mapping[str, Grid], name: str, h: Any) -> Grid:
        """(phi(x + h) - phi(x - h)) / 2h for each element."""
        return [
            [(self.moved(cells, name, r, i, h) - self.moved(cells, name, r, i, -h)) / (2 * h) for i in range(len(row))]
            for r, row in enumerate(cells[name])
        ]

    def complex(self, cells: Mapping[str, Grid], name: str, h: Any) -> Grid:
        """Im phi(x + ih) / h for each element."""
        return [
            [mpmath.im(self.moved(cells, name, r, i, mpmath.mpc(0, h))) / h for i in range(len(row))]
            for r, row in enumerate(cells[name])
        ]


def _derived(
    backward: Program, cells: Mapping[str, Grid], objective: _Objective, rows: int, lanes: int
) -> dict[str, Grid]:
    known = {**cells, **objective.cotangents}
    missing = [i.name for i in backward.inputs if i.name not in known]
    if missing:
        raise ValueError(f"the backward reads {missing}, which are neither inputs of the forward nor g_<output>")
    m = machine(backward)
    grids = m.results(m.run({i.name: known[i.name] for i in backward.inputs}, rows, lanes), rows, lanes)
    for name, grid in grids.items():
        kind = objective.machine.program.input[name.removeprefix("d_")].kind
        grids[name] = spread(grid, (rows if kind.rows else 1, lanes if kind.lanes else 1), name)
    return {name.removeprefix("d_"): grid for name, grid in grids.items()}


def _error(got: Grid, want: Grid, top: Any) -> float:
    """Largest difference over the largest element; a gradient far below the others (1e-6) is judged on their scale."""
    pairs = [(a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True)]
    scale = max([abs(b) for _, b in pairs] + [top * mpmath.mpf(10) ** -6])
    return float(max((abs(a - b) for a, b in pairs), default=mpmath.mpf(0)) / scale)


# Naming


@dataclass(frozen=True)
class Binding:
    """How ``equivalent`` matched two programs: for each input and output of q, the name (or the number) in p."""

    inputs: dict[str, str | sp.Number]
    outputs: dict[str, str]


def equivalent(
    p: Program,
    q: Program,
    *,
    roles: Mapping[str, str] | None = None,
    size: int | None = None,
    seed: int = 0,
    points: int = 12,
    limit: int = 400,
    digits: int = 30,
) -> Binding | None:
    """Are ``p`` and ``q`` one formula? Up to rounding points, names, and the order of inputs and outputs.

    Evaluates both at ``points`` random points with three lanes and two rows. ``roles`` fixes q inputs to p inputs.
    ``size`` is p's lane count where p holds it as a literal (a mean as 1/64). A constant of q may stand for a number
    written in p (an eps). At most ``limit`` bindings are tried. Returns the first that holds, else None.
    """
    p = _without_size(p, size) if size else p
    if len(p.outputs) != len(q.outputs):
        return None
    with mpmath.workdps(digits + GUARD):
        try:
            samples = _Samples(p, q, seed)
            for inputs in islice(_bindings(p, q, roles or {}), limit):
                outputs = samples.agree(inputs, points, mpmath.mpf(10) ** -digits)
                if outputs is not None:
                    return Binding(inputs, outputs)
        except ValueError:  # p is real nowhere that was tried
            return None
    return None


class _Samples:
    """Random points of p with p's results, drawn when first asked for."""

    def __init__(self, p: Program, q: Program, seed: int, rows: int = 2, lanes: int = 3) -> None:
        self.p, self.q, self.rows, self.lanes = p, q, rows, lanes
        self.dice = random.Random(seed)
        self.drawn: list[tuple[dict[str, Grid], dict[str, Grid]]] = []

    def at(self, k: int) -> tuple[dict[str, Grid], dict[str, Grid]]:
        while len(self.drawn) <= k:
            point = draw_point(self.p, self.dice, self.rows, self.lanes)
            cells = {i.name: cells_of(i, point, self.rows, self.lanes) for i in self.p.inputs}
            self.drawn.append((cells, self._run(machine(self.p), cells)))
        return self.drawn[k]

    def _run(self, m: Machine, cells: Mapping[str, Grid]) -> dict[str, Grid]:
        return m.results(m.run(cells, self.rows, self.lanes), self.rows, self.lanes)

    def agree(self, inputs: Mapping[str, str | sp.Number], points: int, tolerance: Any) -> dict[str, str] | None:
        """q output -> p output such that both agree at every point, or None."""
        numbers = {n: [[mpmath.mpmathify(v.evalf(mpmath.mp.dps))]] for n, v in inputs.items() if not isinstance(v, str)}
        possible = {b.name: [a.name for a in self.p.outputs] for b in self.q.outputs}
        for k in range(points):
            cells, want = self.at(k)
            try:
                got = self._run(
                    machine(self.q), {n: numbers[n] if n in numbers else cells[str(v)] for n, v in inputs.items()}
                )
                possible = {
                    b: [a for a in names if _close(got[b], want[a], tolerance)] for b, names in possible.items()
                }
            except (ZeroDivisionError, ValueError, TypeError, OverflowError):
                return None
            if not all(possible.values()):
                return None
        chosen = [c for c in product(*possible.values()) if len(set(c)) == len(c)]
        return dict(zip(possible, chosen[0], strict=True)) if chosen else None


def _close(a: Grid, b: Grid, tolerance: Any) -> bool:
    if len(a) != len(b) or any(len(x) != len(y) for x, y in zip(a, b, strict=True)):
        return False
    top = max((abs(y) for row in b for y in row), default=0)
    return all(
        abs(x - y) <= tolerance * (1 + top) for r, s in zip(a, b, strict=True) for x, y in zip(r, s, strict=True)
    )


def _bindings(p: Program, q: Program, roles: Mapping[str, str]) -> Iterator[dict[str, str | sp.Number]]:
    """Every way to give each input of q its own input of p with the same kind and role, or a number for a constant."""
    groups: list[list[tuple[tuple[str, str | sp.Number], ...]]] = []
    for key in dict.fromkeys(_key(i) for i in q.inputs):
        wanted = [i.name for i in q.inputs if _key(i) == key and i.name not in roles]
        fixed = set(roles.values())
        offered: list[str | sp.Number] = [i.name for i in p.inputs if _key(i) == key and i.name not in fixed]
        needed = len(offered)
        if key == (Kind(False, False), "data"):
            offered += _numbers(p)
        if needed > len(wanted):
            return  # p reads something that q does not know
        ways = [c for c in islice(permutations(offered, len(wanted)), 4000) if set(offered[:needed]) <= set(c)]
        groups.append([tuple(zip(wanted, c, strict=True)) for c in ways])
    if {_key(i) for i in p.inputs if i.role == "data"} - {_key(i) for i in q.inputs}:
        return
    for way in product(*groups):
        yield {**roles, **dict(pair for group in way for pair in group)}


def _key(i: Input) -> tuple[Kind, str]:
    return i.kind, i.role


def _numbers(p: Program) -> list[str | sp.Number]:
    """The numbers written in p, 0 and 1 included, the unusual ones first."""
    found = {n for s in p.stages for n in s.expr.atoms(sp.Number)} | {sp.Integer(0), sp.Integer(1)}
    return sorted(found | {-n for n in found}, key=lambda n: (bool(n.is_Integer), bool(n < 0), float(abs(n))))[:24]


def _without_size(p: Program, size: int) -> Program:
    """p with every factor 1/size (of a reduction or of its body) made 1/(number of lanes)."""
    name = next(n for n in ("N", "lanes", "N_lanes") if n not in p.kinds)
    lanes, small = symbol(name), sp.Rational(1, size)

    def freed(expr: sp.Expr) -> sp.Expr:
        return expr.replace(
            lambda e: e.is_Mul and e.args[0].is_Number and sp.nsimplify(e.args[0], rational=True).q % size == 0,
            lambda e: (
                e / small / lanes
                if e.args[0].is_Rational
                else sp.nsimplify(e.args[0], rational=True) * size * sp.Mul(*e.args[1:]) / lanes
            ),
        )

    stages = tuple(
        replace(s, value=Reduce(s.value.op, freed(s.value.body)) if isinstance(s.value, Reduce) else freed(s.value))
        for s in p.stages
    )
    if all(a.value == b.value for a, b in zip(stages, p.stages, strict=True)):
        return p
    return Program((*p.inputs, Input(name, Kind(False, False), differentiable=False, role="size")), stages, p.outputs)
