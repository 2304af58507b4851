"""Derived gradients of programs that nobody wrote, against the mpmath witness and torch's float64 autograd."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import sympy as sp
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from slothc.gradients.functions import (
    absolute,
    clip,
    eq,
    floor,
    ge,
    gt,
    maximum,
    minimum,
    relu,
    select,
    sigmoid,
    signum,
    softplus,
)
from slothc.gradients.program import COLUMN, CONST, ROW, SCALAR, Input, Kind, Output, Program, Reduce, Stage, symbol
from slothc.gradients.reverse import NotDifferentiable, derive
from slothc.gradients.verify import evaluate, witness

spec = importlib.util.spec_from_file_location("programs", Path(__file__).with_name("programs.py"))
programs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(programs)

# Random programs

UNARY = (
    sigmoid,
    softplus,
    relu,
    absolute,
    sp.tanh,
    sp.sin,
    sp.cos,
    sp.erf,
    lambda e: sp.exp(sp.tanh(e)),
    lambda e: e**2,
    lambda e: 1 / (1 + e**2),
    lambda e: (e**2 + sp.Rational(1, 3)) ** sp.Rational(-1, 2),
    lambda e: sp.log(1 + e**2),
    lambda e: clip(e, -1, 1),
    lambda e: -e,
    lambda e: 1 - e,
)
BINARY = (
    lambda a, b: a + b,
    lambda a, b: a - b,
    lambda a, b: a * b,
    maximum,
    minimum,
    lambda a, b: select(gt(a, b), a * b, b),
    lambda a, b: a / (1 + b**2),
)
INPUTS = (
    Input("x", ROW),
    Input("z", ROW),
    Input("w", COLUMN),
    Input("s", SCALAR),
    Input("c", CONST),
    Input("fixed", ROW, differentiable=False),
    Input("i", COLUMN, "i64", False, "index"),
    programs.SIZE,
)


@st.composite
def row_programs(draw: st.DrawFn) -> Program:
    """Up to seven random stages over inputs of all kinds; every output varies with the row."""
    kinds: dict[str, Kind] = {i.name: i.kind for i in INPUTS}
    stages: list[Stage] = []

    def pick() -> sp.Symbol:
        names = [n for n in kinds if n not in ("N", "i", "fixed")] * 3 + ["i", "fixed"]
        return symbol(draw(st.sampled_from(names[::-1])))

    def scalar() -> sp.Expr:
        value = draw(st.sampled_from(UNARY))(pick()) if draw(st.booleans()) else pick()
        return draw(st.sampled_from(BINARY))(value, pick()) if draw(st.booleans()) else value

    for k in range(draw(st.integers(1, 7))):
        body = scalar()
        if draw(st.integers(0, 2)) == 0:
            op = draw(st.sampled_from(("sum", "mean", "max", "logsumexp")))
            value: sp.Expr | Reduce = Reduce("sum", body / programs.N) if op == "mean" else Reduce(op, body)
        else:
            value = body
        kind = Kind(False, False)
        for name in body.free_symbols:
            kind = kind | kinds[name.name]
        kinds[f"t{k}"] = Kind(kind.rows, False) if isinstance(value, Reduce) else kind
        stages.append(Stage(f"t{k}", value))
    stages.append(Stage("out0", symbol(stages[-1].name) * symbol("x") + pick()))
    outputs = [Output("out0", "out0")]
    extra = [s.name for s in stages[:-1] if kinds[s.name].rows]
    if extra and draw(st.booleans()):
        outputs.append(Output("out1", draw(st.sampled_from(extra))))
    used = {s.name for stage in stages for s in stage.expr.free_symbols} | {o.value for o in outputs}
    return Program(tuple(i for i in INPUTS if i.name in used), tuple(stages), tuple(outputs))


# A second evaluator: the program in torch, for autograd

TORCH: dict[str, Any] = {
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
    "relu": torch.relu,
    "absolute": torch.abs,
    "signum": torch.sign,
    "gt": lambda a, b: (a > b).double(),
    "ge": lambda a, b: (a >= b).double(),
    "eq": lambda a, b: (a == b).double(),
    "floor": torch.floor,
    "select": lambda c, a, b: torch.where(c != 0, a, b),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "clip": lambda x, lo, hi: torch.clamp(x, float(lo), float(hi)),
    "tanh": torch.tanh,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "exp": torch.exp,
    "log": torch.log,
}
assert {f.__name__ for f in (eq, floor, ge, signum)} <= set(TORCH)


def in_torch(e: sp.Expr, known: dict[str, torch.Tensor]) -> torch.Tensor:
    if e.is_Symbol:
        return known[e.name]
    if e.is_number:
        return torch.full((1, 1), float(e), dtype=torch.float64)
    args = [in_torch(a, known) for a in e.args]
    if e.is_Add or e.is_Mul:
        total = args[0]
        for a in args[1:]:
            total = total + a if e.is_Add else total * a
        return total
    if e.is_Pow:
        return args[0] ** float(e.exp)
    return TORCH[type(e).__name__](*args)


def run_torch(p: Program, leaves: dict[str, torch.Tensor], lanes: int) -> list[torch.Tensor]:
    """Outputs of ``p``; a row value is [R, N], a column [1, N], a scalar [R, 1], a constant [1, 1]."""
    known = dict(leaves)
    for stage in p.stages:
        value = in_torch(stage.expr, known)
        if isinstance(stage.value, Reduce):
            value = value.expand(value.shape[0], lanes)
            value = {
                "sum": lambda v: v.sum(-1, keepdim=True),
                "max": lambda v: v.amax(-1, keepdim=True),
                "logsumexp": lambda v: v.logsumexp(-1, keepdim=True),
            }[stage.value.op](value)
        known[stage.name] = value
    return [known[o.value] for o in p.outputs]


def shaped(value: Any, kind: Kind) -> torch.Tensor:
    t = torch.tensor(
        [[float(v) for v in row] for row in value]
        if kind.rows and kind.lanes
        else [float(v) for v in value]
        if kind.rows or kind.lanes
        else float(value),
        dtype=torch.float64,
    )
    return t.reshape(t.shape if kind.rows and kind.lanes else (-1, 1) if kind.rows else (1, -1))


def against_autograd(p: Program, point: dict[str, Any], rows: int, lanes: int, tolerance: float = 1e-9) -> None:
    """Assert that outputs and ``derive`` agree with autograd of the same program in float64."""
    full = {**point}
    for i in p.inputs:
        if i.role != "data":
            full[i.name] = lanes if i.role == "size" else list(range(lanes))
    leaves = {i.name: shaped(full[i.name], i.kind).requires_grad_(i.differentiable) for i in p.inputs}
    outs = run_torch(p, leaves, lanes)
    ours = evaluate(p, point, rows=rows, lanes=lanes)
    dice = torch.Generator().manual_seed(0)
    grads = [torch.randn(o.shape, generator=dice, dtype=torch.float64) for o in outs]
    for o, value in zip(p.outputs, outs):
        torch.testing.assert_close(
            shaped(ours[o.name], p.kinds[o.value]), value.detach(), rtol=tolerance, atol=tolerance
        )
    wanted = [i for i in p.inputs if i.differentiable]
    live = [(o, g) for o, g in zip(outs, grads) if o.requires_grad]
    leaf = [leaves[i.name] for i in wanted]
    want = _grads(live, leaf)
    cotangents = {f"g_{o.name}": _nest(g, p.kinds[o.value]) for o, g in zip(p.outputs, grads)}
    got = evaluate(derive(p), {**point, **cotangents}, rows=rows, lanes=lanes)
    for i, w in zip(wanted, want):
        mine = got[f"d_{i.name}"]
        flat = mine if isinstance(mine, list) else [mine]
        rows_ = [r if isinstance(r, list) else [r] for r in flat]
        ours_ = torch.tensor([[float(v) for v in r] for r in rows_], dtype=torch.float64).reshape(-1)
        torch.testing.assert_close(
            ours_.expand(w.numel()) if ours_.numel() == 1 else ours_, w.reshape(-1), rtol=tolerance, atol=tolerance
        )


def _grads(live: list[tuple[torch.Tensor, torch.Tensor]], leaf: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    if not live:
        return tuple(torch.zeros_like(v) for v in leaf)
    outs, grads = zip(*live)
    return torch.autograd.grad(outs, leaf, grads, allow_unused=True, materialize_grads=True)


def _nest(t: torch.Tensor, kind: Kind) -> Any:
    return t.tolist() if kind.rows and kind.lanes else t.reshape(-1).tolist() if kind.rows or kind.lanes else t.item()


def random_point(p: Program, seed: int, rows: int, lanes: int) -> dict[str, Any]:
    dice = torch.Generator().manual_seed(seed)
    return {
        i.name: _nest(
            torch.randn(
                (rows if i.kind.rows else 1, lanes if i.kind.lanes else 1), generator=dice, dtype=torch.float64
            ),
            i.kind,
        )
        for i in p.inputs
        if i.role == "data" and i.dtype == "fp32"
    }


SETTINGS = settings(
    deadline=None, max_examples=60, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@SETTINGS
@given(row_programs())
def test_derive_is_right_on_random_programs(p: Program) -> None:
    report = witness(p, rows=2, lanes=2)
    assert set(report.errors) == {i.name for i in p.inputs if i.differentiable}
    assert report.worst < 1e-20, f"{report}\n{p.text()}\n{derive(p).text()}"


@SETTINGS
@given(row_programs(), st.integers(0, 99), st.integers(1, 3), st.integers(1, 4))
def test_derive_is_autograd_on_random_programs(p: Program, seed: int, rows: int, lanes: int) -> None:
    against_autograd(p, random_point(p, seed, rows, lanes), rows, lanes)


@pytest.mark.parametrize("name", programs.ALL)
def test_derive_is_autograd_on_known_programs(name: str) -> None:
    p = programs.ALL[name]
    if name == "cross_entropy":
        point = {**random_point(p, 0, 3, 5), "label": [4, 0, 2]}
    else:
        point = {**random_point(p, 0, 3, 5), **({"eps": 0.1} if "eps" in p.input else {})}
    against_autograd(p, point, 3, 5, 1e-8)


# Kinks: random points never land there

x, u = symbol("x"), symbol("u")
TIES = [[1.0, 1.0, -1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [-1.0, 2.0, 2.0, 2.0]]
KINKS = {
    "relu": relu(x),
    "relu2": relu(x) ** 2,
    "absolute": absolute(x) * 3,
    "clip": clip(x, -1, 1),
    "maximum": maximum(x, u),
    "minimum": minimum(x, u) * x,
    "signum": signum(x) * x,
    "floor": floor(x) * x,
    "gt": gt(x, u) * x,
    "ge": ge(x, u) * x,
    "eq": eq(x, u) * x,
    "select": select(gt(x, 0), x**2, 3 * x),
    "nested": clip(relu(x) - maximum(x, u), -1, 0),
}


@pytest.mark.parametrize("name", KINKS)
def test_a_kink_takes_torchs_choice(name: str) -> None:
    value = KINKS[name]
    p = programs.pointwise(value, *sorted(s.name for s in value.free_symbols))
    other = [row[::-1] for row in TIES]
    for second in (TIES, other):
        against_autograd(p, {n: v for n, v in (("x", TIES), ("u", second)) if n in p.input}, 3, 4)


@pytest.mark.parametrize("body", [x, x**2, absolute(x), relu(x)])
def test_ties_of_a_row_maximum_share_evenly(body: sp.Expr) -> None:
    p = programs.program([Input("x", ROW)], ("m", Reduce("max", body)), ("y", symbol("m") * x + symbol("m")))
    against_autograd(p, {"x": TIES}, 3, 4)


def test_softmax_is_right_where_its_maximum_ties() -> None:
    against_autograd(programs.softmax(), {"x": TIES}, 3, 4)


def test_a_column_result_beside_rows_is_refused() -> None:
    """A result without rows beside one with rows: its cotangent would be counted once for every row."""
    w = symbol("w")
    p = Program(
        (Input("x", ROW), Input("w", COLUMN)),
        (Stage("v", sp.exp(w)), Stage("y", x * symbol("v"))),
        (Output("v", "v"), Output("y", "y")),
    )
    with pytest.raises(NotDifferentiable, match="without rows"):
        derive(p)


@pytest.mark.parametrize("op", ["sum", "max", "logsumexp"])
def test_a_reduction_of_a_value_without_lanes(op: str) -> None:
    """sum of a per-row scalar over N lanes is N times it."""
    p = programs.program(
        [Input("x", ROW), Input("s", SCALAR)], ("t", Reduce(op, symbol("s") ** 2)), ("y", symbol("t") * x)
    )
    assert witness(p, lanes=3).worst < 1e-25


def test_what_a_laned_equation_gives_a_value_without_lanes_is_summed_even_where_it_is_the_same_in_every_lane() -> None:
    """t = sum(x + s): dt/ds = N, directly and by way of a row-valued stage."""
    s, t, h = symbol("s"), symbol("t"), symbol("h")
    inputs = [Input("x", ROW), Input("s", SCALAR)]
    assert witness(programs.program(inputs, ("t", Reduce("sum", x + s)), ("y", t * x))).worst < 1e-25
    assert (
        witness(
            programs.program(
                inputs, ("h", x + s), ("h2", h * 2 + s), ("t", Reduce("sum", h + symbol("h2"))), ("y", t * x)
            )
        ).worst
        < 1e-25
    )
