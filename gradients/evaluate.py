"""A row program's values in exact reals (mpmath): no torch, no numpy, and rounding only where it is asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import mpmath
import sympy as sp
from sympy.printing.pycode import MpmathPrinter

from .functions import VOCABULARY
from .program import Input, Kind, Output, Program, Reduce

Grid = list[list[Any]]  # [rows or 1][lanes or 1] of mpf
Point = Mapping[str, Any]  # input name -> number, list or list of lists, by kind

FORMATS = {"fp64": (53, -1074, 1023), "fp32": (24, -149, 127), "fp16": (11, -24, 15), "bf16": (8, -133, 127)}
GUARD = 20  # digits carried beyond those asked for


def rounded(x: Any, dtype: str | None) -> Any:
    """x rounded to the nearest ``dtype`` value, ties to even, with subnormals and overflow; other dtypes keep it."""
    if dtype not in FORMATS or x == 0 or not mpmath.isfinite(x):
        return x
    bits, least, most = FORMATS[dtype]
    unit = max(mpmath.frexp(x)[1] - bits, least)
    y = mpmath.ldexp(mpmath.nint(mpmath.ldexp(x, -unit)), unit)
    return y if abs(y) < mpmath.ldexp(1, most + 1) else mpmath.sign(y) * mpmath.inf


class _Printer(MpmathPrinter):
    """Python source over mpmath; symbols take the names in ``names``."""

    def __init__(self, names: Mapping[str, str]) -> None:
        super().__init__(
            {
                "fully_qualified_modules": False,
                "allow_unknown_functions": True,
                "user_functions": {f.__name__: f"rule_{f.__name__}" for f in VOCABULARY},
            }
        )
        self.names = names

    def _print_Symbol(self, expr: sp.Symbol) -> str:
        return self.names[expr.name]


def _namespace() -> dict[str, Any]:
    rules = {f"rule_{f.__name__}": f.rule for f in VOCABULARY}
    return {**vars(mpmath), "mpmath": mpmath, "max": max, "min": min, "abs": abs, **rules}


def compile_scalar(expr: sp.Expr, names: Sequence[str]) -> Callable[..., Any]:
    """A function of mpmath numbers, one for each of ``names`` in order, that returns the value of ``expr``."""
    printer = _Printer({n: f"v{i}" for i, n in enumerate(names)})
    source = f"lambda {', '.join(printer.names.values())}: {printer.doprint(expr)}"
    return eval(source, _namespace())


_REDUCE: dict[str, Callable[[list[Any]], Any]] = {
    "sum": mpmath.fsum,
    "max": max,
    "logsumexp": lambda xs: mpmath.log(mpmath.fsum(mpmath.exp(x) for x in xs)),
}


@dataclass(frozen=True)
class Machine:
    """A program compiled for mpmath: ``steps`` are (name, operands, function, reduction or None, dtype)."""

    program: Program
    steps: tuple[tuple[str, tuple[str, ...], Callable[..., Any], str | None, str | None], ...]

    def run(self, cells: Mapping[str, Grid], rows: int, lanes: int, round: bool = False) -> dict[str, Grid]:
        """The grid of every input and stage, from those of the inputs and of stages to be held fixed."""
        cells, kinds = dict(cells), self.program.kinds
        for name, operands, function, reduction, dtype in self.steps:
            if name in cells:
                continue
            over = self._span(operands, reduction, rows, lanes)
            reads = [(cells[o], kinds[o].rows, kinds[o].lanes) for o in operands]
            grid = [
                [
                    mpmath.mpmathify(
                        function(*[g[r if by_row else 0][i if by_lane else 0] for g, by_row, by_lane in reads])
                    )
                    for i in range(over[1])
                ]
                for r in range(over[0])
            ]
            if reduction:
                grid = [[_REDUCE[reduction](row)] for row in grid]
            cells[name] = [[rounded(x, dtype) for x in row] for row in grid] if round else grid
        return cells

    def _span(self, operands: Sequence[str], reduction: str | None, rows: int, lanes: int) -> tuple[int, int]:
        kinds = [self.program.kinds[o] for o in operands]
        by_lane = reduction is not None or any(k.lanes for k in kinds)
        return rows if any(k.rows for k in kinds) else 1, lanes if by_lane else 1

    def results(self, cells: Mapping[str, Grid], rows: int, lanes: int, round: bool = False) -> dict[str, Grid]:
        """The grid of every output; ``over_rows`` outputs are summed, every row counted once."""
        out = {}
        for o in self.program.outputs:
            grid = cells[o.value]
            if o.over_rows:
                grid = grid if self.program.kinds[o.value].rows else grid * rows
                grid = [[mpmath.fsum(column) for column in zip(*grid, strict=True)]] if grid else [[mpmath.mpf(0)]]
            kind = stored_kind(self.program, o)
            grid = spread(grid, (rows if kind.rows else 1, lanes if kind.lanes else 1), o.name)
            out[o.name] = [[rounded(x, o.dtype) for x in row] for row in grid] if round else grid
        return out


@lru_cache(maxsize=64)
def machine(program: Program) -> Machine:
    """``program`` compiled once."""
    steps = []
    for s in program.stages:
        operands = tuple(sorted(x.name for x in s.expr.free_symbols))
        steps.append(
            (
                s.name,
                operands,
                compile_scalar(s.expr, operands),
                s.value.op if isinstance(s.value, Reduce) else None,
                s.dtype,
            )
        )
    return Machine(program, tuple(steps))


def evaluate(
    program: Program,
    inputs: Point,
    *,
    rows: int | None = None,
    lanes: int | None = None,
    round: bool = False,
    digits: int = 50,
) -> dict[str, Any]:
    """The outputs of ``program`` at ``inputs``, in exact reals of ``digits`` digits.

    Inputs are nested lists by kind: row [rows][lanes], column [lanes], scalar [rows], const a number; "index" inputs
    may be left out, and so may "size" inputs (the number of lanes). ``round`` applies rounding points and dtypes.
    Raises ValueError where an input is missing or has another shape than its kind asks for.
    """
    with mpmath.workdps(digits + GUARD):
        rows, lanes = _shape(program, inputs, rows, lanes)
        cells = {i.name: cells_of(i, inputs, rows, lanes) for i in program.inputs}
        if round:
            cells = {i.name: [[rounded(x, i.dtype) for x in row] for row in cells[i.name]] for i in program.inputs}
        m = machine(program)
        grids = m.results(m.run(cells, rows, lanes, round), rows, lanes, round)
        kinds = {o.name: stored_kind(program, o) for o in program.outputs}
        return {name: _nested(grid, kinds[name]) for name, grid in grids.items()}


def stored_kind(program: Program, out: Output) -> Kind:
    """What the stored output varies with."""
    kind = program.out_kind(out)
    return Kind(False, kind.lanes) if out.over_rows else kind


def _shape(program: Program, inputs: Point, rows: int | None, lanes: int | None) -> tuple[int, int]:
    for i in program.inputs:
        if i.name not in inputs:
            continue
        if i.kind.rows and rows is None:
            rows = len(inputs[i.name])
        if i.kind.lanes and lanes is None:
            value = inputs[i.name]
            lanes = len(value[0] if i.kind.rows and value else value)
    return 1 if rows is None else rows, 1 if lanes is None else lanes


def cells_of(i: Input, inputs: Point, rows: int, lanes: int) -> Grid:
    """The grid of input ``i``: its value in ``inputs``, or the lane numbers or size that its role stands for."""
    if i.name in inputs:
        value = inputs[i.name]
    elif i.role == "index":
        value = list(range(lanes)) if not i.kind.rows else [list(range(lanes))] * rows
    elif i.role == "size":
        value = lanes
    else:
        raise ValueError(f"input {i.name!r} has no value")
    grid = (
        value
        if i.kind.rows and i.kind.lanes
        else [[v] for v in value]
        if i.kind.rows
        else [value if i.kind.lanes else [value]]
    )
    shape = (rows if i.kind.rows else 1, lanes if i.kind.lanes else 1)
    if len(grid) != shape[0] or any(len(row) != shape[1] for row in grid):
        raise ValueError(f"input {i.name!r} is a {i.kind}: its value needs {shape[0]} rows and {shape[1]} lanes")
    return [[mpmath.mpmathify(x) for x in row] for row in grid]


def _nested(grid: Grid, kind: Kind) -> Any:
    if kind.rows:
        return [list(row) for row in grid] if kind.lanes else [row[0] for row in grid]
    return list(grid[0]) if kind.lanes else grid[0][0]


def spread(grid: Grid, shape: tuple[int, int], name: str) -> Grid:
    """A value that is the same in every row or lane, written out."""
    if (len(grid), len(grid[0]) if grid else shape[1]) == shape:
        return grid
    if len(grid) not in (1, shape[0]) or len(grid[0]) not in (1, shape[1]):
        raise ValueError(
            f"{name} has {len(grid)} rows and {len(grid[0])} lanes, not {shape[0]} and {shape[1]}"
        )
    return [[grid[r % len(grid)][i % len(grid[0])] for i in range(shape[1])] for r in range(shape[0])]


# Points


def draw(i: Input, dice: random.Random, rows: int, lanes: int, low: float = -2.0, high: float = 2.0) -> Any:
    """A random value of input ``i``, nested by kind: reals in (low, high), bools, integers below ``lanes``."""
    if i.role != "data":
        return lanes if i.role == "size" else _nested(cells_of(i, {}, rows, lanes), i.kind)

    def one() -> mpmath.mpf:
        if i.dtype == "bool":
            return mpmath.mpf(dice.randrange(2))
        if i.dtype[0] in "iu":
            return mpmath.mpf(dice.randrange(max(lanes, 1)))
        return mpmath.mpf(low) + (mpmath.mpf(high) - low) * dice.getrandbits(160) / mpmath.mpf(2) ** 160

    return _nested(
        [[one() for _ in range(lanes if i.kind.lanes else 1)] for _ in range(rows if i.kind.rows else 1)], i.kind
    )


def draw_point(program: Program, dice: random.Random, rows: int, lanes: int) -> dict[str, Any]:
    """A point where every stage is a finite real: constants are positive, tensors of either sign if they can be."""
    m = machine(program)
    for attempt in range(24):
        low = -2.0 if attempt < 12 else 0.25  # log, sqrt and 1/x ask for positive arguments
        point = {i.name: draw(i, dice, rows, lanes, 0.25 if str(i.kind) == "const" else low) for i in program.inputs}
        try:
            cells = m.run({i.name: cells_of(i, point, rows, lanes) for i in program.inputs}, rows, lanes)
        except (ZeroDivisionError, ValueError, OverflowError, TypeError):
            continue
        if all(isinstance(x, mpmath.mpf) and mpmath.isfinite(x) for g in cells.values() for row in g for x in row):
            return point
    raise ValueError("no random point found where every stage is a finite real number: give points")
