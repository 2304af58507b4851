"""Row programs that the tests of the engine share: the formulas everyone uses, and one that is in no file."""

from __future__ import annotations

import sympy as sp
from slothc.gradients.functions import absolute, clip, eq, maximum, minimum, relu, select, sigmoid, softplus
from slothc.gradients.program import COLUMN, CONST, ROW, SCALAR, Input, Output, Program, Reduce, Stage, symbol

x, u, w, b, c, s, eps, N = (symbol(n) for n in ("x", "u", "w", "b", "c", "s", "eps", "N"))
SIZE = Input("N", CONST, "i64", differentiable=False, role="size")
EPS = Input("eps", CONST, differentiable=False)


def program(inputs: list[Input], *stages: Stage | tuple, outs: tuple[str, ...] = ("y",)) -> Program:
    made = tuple(t if isinstance(t, Stage) else Stage(*t) for t in stages)
    return Program(tuple(inputs), made, tuple(Output(o, o) for o in outs))


def mean(e: sp.Expr) -> Reduce:
    return Reduce("sum", e / N)


def rms_norm(dtype: str | None = None) -> Program:
    return program(
        [Input("x", ROW), Input("w", COLUMN), EPS, SIZE],
        ("ms", mean(x**2)),
        ("r", (symbol("ms") + eps) ** sp.Rational(-1, 2)),
        ("h", x * symbol("r"), dtype),
        ("y", w * symbol("h")),
    )


def layer_norm() -> Program:
    mu, xc, var, r = (symbol(n) for n in ("mu", "xc", "var", "r"))
    return program(
        [Input("x", ROW), Input("w", COLUMN), Input("b", COLUMN), EPS, SIZE],
        ("mu", mean(x)),
        ("xc", x - mu),
        ("var", mean(xc**2)),
        ("r", (var + eps) ** sp.Rational(-1, 2)),
        ("y", w * xc * r + b),
    )


def pointwise(value: sp.Expr, *names: str) -> Program:
    return program([Input(n, ROW) for n in names], ("y", value))


def swiglu() -> Program:
    return pointwise(x * sigmoid(x) * symbol("up"), "x", "up")


def gelu_tanh() -> Program:
    return pointwise(x * (1 + sp.tanh(sp.sqrt(2 / sp.pi) * (x + sp.Rational(44715, 1000000) * x**3))) / 2, "x")


def rope() -> Program:
    x1, x2 = symbol("x1"), symbol("x2")
    cos, sin = symbol("cos"), symbol("sin")
    fixed = [Input("cos", ROW, differentiable=False), Input("sin", ROW, differentiable=False)]
    return program(
        [Input("x1", ROW), Input("x2", ROW), *fixed],
        ("y1", x1 * cos - x2 * sin),
        ("y2", x2 * cos + x1 * sin),
        outs=("y1", "y2"),
    )


def softmax() -> Program:
    m, e, z = symbol("m"), symbol("e"), symbol("z")
    return program(
        [Input("x", ROW)], ("m", Reduce("max", x)), ("e", sp.exp(x - m)), ("z", Reduce("sum", e)), ("y", e / z)
    )


def cross_entropy() -> Program:
    i, label = symbol("i"), symbol("label")
    return program(
        [
            Input("x", ROW),
            Input("label", SCALAR, "i64", differentiable=False),
            Input("i", COLUMN, "i64", False, "index"),
        ],
        ("lse", Reduce("logsumexp", x)),
        ("hit", Reduce("sum", eq(i, label) * x)),
        ("y", symbol("lse") - symbol("hit")),
    )


def unpublished() -> Program:
    m = symbol("m")
    return program(
        [Input("x", ROW), Input("w", COLUMN), EPS, SIZE], ("m", mean(absolute(x))), ("y", x * softplus(w) / (m + eps))
    )


def scaled() -> Program:
    """A per-row scale, a constant and a residual, all trained."""
    r = symbol("r")
    return program(
        [Input("x", ROW), Input("y0", ROW), Input("w", COLUMN), Input("s", SCALAR), Input("c", CONST), SIZE],
        ("h", x + c * symbol("y0")),
        ("r", mean(symbol("h") ** 2)),
        ("y", symbol("h") * (1 + w) * s / (1 + r)),
        outs=("h", "y"),
    )


MAIN = {
    "rms_norm": rms_norm(),
    "layer_norm": layer_norm(),
    "swiglu": swiglu(),
    "rope": rope(),
    "cross_entropy": cross_entropy(),
}
ALL = {
    **MAIN,
    "softmax": softmax(),
    "unpublished": unpublished(),
    "scaled": scaled(),
    "gelu_tanh": gelu_tanh(),
    "rms_norm_rounded": rms_norm("bf16"),
    "gelu": pointwise(x * (1 + sp.erf(x / sp.sqrt(2))) / 2, "x"),
    "quick_gelu": pointwise(x * sigmoid(sp.Rational(1702, 1000) * x), "x"),
    "relu2": pointwise(relu(x) ** 2, "x"),
    "soft_cap": program([Input("x", ROW), Input("c", CONST)], ("y", c * sp.tanh(x / c))),
    "clamp": pointwise(clip(x, -1, 1) * minimum(u, sp.Rational(3, 4)) + maximum(x, u), "x", "u"),
    "select": pointwise(select(relu(x), x * u, sp.exp(u)), "x", "u"),
}
