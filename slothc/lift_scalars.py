"""The scalar formula of every pointwise function."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import sympy as sp

from slothc.gradients import functions as f

_ROOT2, _ROOT2PI = sp.sqrt(2), sp.sqrt(2 / sp.pi)


def number(value: float | int | bool) -> sp.Expr:
    """A Python number as sympy's: exact where it is a small fraction, so that powers and halves stay recognisable."""
    if isinstance(value, bool | int):
        return sp.Integer(int(value))
    if value != value or value in (float("inf"), float("-inf")):
        return {float("inf"): sp.oo, float("-inf"): -sp.oo}.get(value, sp.nan)
    exact = Fraction(value)
    return sp.Rational(exact.numerator, exact.denominator) if exact.denominator <= 64 else sp.Float(value)


def _gelu_tanh(x: sp.Expr) -> sp.Expr:
    return x / 2 * (1 + sp.tanh(sp.Float(float(_ROOT2PI)) * (x + sp.Float(0.044715) * x**3)))


def _clamp(x: sp.Expr, lo: sp.Expr | None = None, hi: sp.Expr | None = None) -> sp.Expr:
    if lo is None and hi is None:
        return x
    return f.clip(x, -sp.oo if lo is None else lo, sp.oo if hi is None else hi)


def _boolean(name: str) -> Callable[..., sp.Expr]:
    table: dict[str, Callable[..., sp.Expr]] = {
        "and": lambda a, b: a * b, "or": lambda a, b: f.maximum(a, b), "not": lambda a: 1 - a,
    }  # fmt: skip
    return table[name]


SCALAR: dict[str, Callable[..., sp.Expr]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "div": lambda a, b: a / b,
    "neg": lambda a: -a, "pow": lambda a, b: a**b, "reciprocal": lambda a: 1 / a,
    "exp": sp.exp, "log": sp.log, "log1p": lambda a: sp.log(1 + a), "expm1": lambda a: sp.exp(a) - 1,
    "sqrt": lambda a: a ** sp.Rational(1, 2), "rsqrt": lambda a: a ** sp.Rational(-1, 2),
    "abs": f.absolute, "sign": f.signum, "tanh": sp.tanh, "sigmoid": f.sigmoid, "erf": sp.erf, "sin": sp.sin, "cos": sp.cos,
    "relu": f.relu, "floor": f.floor, "maximum": f.maximum, "minimum": f.minimum, "clamp": _clamp,
    "silu": lambda a: a * f.sigmoid(a), "softplus": f.softplus, "logsigmoid": lambda a: -f.softplus(-a),
    "mish": lambda a: a * sp.tanh(f.softplus(a)), "hardswish": lambda a: a * f.clip(a + 3, 0, 6) / 6,
    "gelu": lambda a: a / 2 * (1 + sp.erf(a * sp.Float(float(1 / _ROOT2)))), "gelu_tanh": _gelu_tanh,
    "addcmul": lambda x, a, b, c: x + c * a * b, "addcdiv": lambda x, a, b, c: x + c * a / b, "lerp": lambda a, b, t: a + t * (b - a),
    "add_scaled": lambda a, b, c: a + c * b, "sub_scaled": lambda a, b, c: a - c * b,
    "leaky_relu": lambda a, s: f.select(f.gt(a, 0), a, s * a),
    "where": lambda c, a, b: f.select(c, a, b),
    "gt": f.gt, "ge": f.ge, "lt": lambda a, b: f.gt(b, a), "le": lambda a, b: f.ge(b, a), "eq": f.eq, "ne": lambda a, b: 1 - f.eq(a, b),
    "and": _boolean("and"), "or": _boolean("or"), "not": _boolean("not"),
}  # fmt: skip
