"""Scalar sympy expressions as source text, in the dialect of Triton or of torch."""

from __future__ import annotations

from collections.abc import Mapping

import sympy as sp

TRITON: Mapping[str, str] = {
    "exp": "tl.exp({0})", "log": "tl.log({0})", "sin": "tl.sin({0})", "cos": "tl.cos({0})", "erf": "tl.erf({0})",
    "sqrt": "tl.sqrt({0})", "rsqrt": "tl.rsqrt({0})", "pow": "tl.exp2({1} * tl.log2({0}))",
    "tanh": "_tanh({0})", "softplus": "_softplus({0})", "sigmoid": "tl.sigmoid({0})",
    "relu": "tl.where({0} < 0.0, 0.0, {0})", "absolute": "tl.abs({0})",
    "signum": "tl.where({0} > 0.0, 1.0, tl.where({0} < 0.0, -1.0, 0.0))",
    "gt": "tl.where({0} > {1}, 1.0, 0.0)", "ge": "tl.where({0} >= {1}, 1.0, 0.0)", "eq": "tl.where({0} == {1}, 1.0, 0.0)",
    "floor": "tl.floor({0})", "select": "tl.where({0} != 0.0, {1}, {2})",
    "maximum": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "clip": "tl.where({0} < {1}, {1}, tl.where({0} > {2}, {2}, {0}))",
}  # fmt: skip

TORCH: Mapping[str, str] = {
    "exp": "torch.exp({0})", "log": "torch.log({0})", "sin": "torch.sin({0})", "cos": "torch.cos({0})", "erf": "torch.erf({0})",
    "sqrt": "torch.sqrt({0})", "rsqrt": "torch.rsqrt({0})", "pow": "torch.pow({0}, {1})",
    "tanh": "torch.tanh({0})", "softplus": "torch.logaddexp({0}, torch.zeros_like({0}))", "sigmoid": "torch.sigmoid({0})",
    "relu": "torch.relu({0})", "absolute": "torch.abs({0})", "signum": "torch.sign({0})",
    "gt": "({0} > {1}).float()", "ge": "({0} >= {1}).float()", "eq": "({0} == {1}).float()",
    "floor": "torch.floor({0})", "select": "torch.where({0} != 0.0, {1}, {2})",
    "maximum": "torch.maximum({0}, torch.as_tensor({1}))", "minimum": "torch.minimum({0}, torch.as_tensor({1}))",
    "clip": "torch.clamp({0}, {1}, {2})",
}  # fmt: skip


class Unprintable(ValueError):
    """An expression holds a function that the dialect has no text for."""


def render(expr: sp.Expr, dialect: Mapping[str, str]) -> str:
    """The expression as source text; symbols keep their names. Raises ``Unprintable``."""
    if expr.is_Symbol:
        return expr.name
    if expr.is_number:                                                     # sqrt(2/pi) too: a constant, not an operation on one
        return _number(expr)
    if expr.is_Add:
        return "(" + " + ".join(render(a, dialect) for a in expr.as_ordered_terms()).replace("+ -", "- ") + ")"
    if expr.is_Mul:
        return _product(expr, dialect)
    if expr.is_Pow:
        return _power(expr.base, expr.exp, dialect)
    name = type(expr).__name__
    if name not in dialect:
        raise Unprintable(f"no kernel text is known for {name} in {expr}")
    return dialect[name].format(*(render(a, dialect) for a in expr.args))


def _number(value: sp.Expr) -> str:
    if value.is_Rational and not value.is_Integer:
        return f"({value.p}.0 / {value.q}.0)"
    if value in (sp.oo, -sp.oo):
        return "float('inf')" if value == sp.oo else "(-float('inf'))"
    text = repr(float(value))
    return f"({text})" if text.startswith("-") else text


def _product(expr: sp.Expr, dialect: Mapping[str, str]) -> str:
    above, below = [], []
    for a in expr.as_ordered_factors():
        if a.is_Pow and a.exp.is_Rational and a.exp.is_negative and a.exp.is_Integer:
            below.append(_power(a.base, -a.exp, dialect))
        elif a == -1:
            above.append("-1.0")
        else:
            above.append(render(a, dialect))
    if above and above[0] == "-1.0" and len(above) > 1:
        above = ["-" + above[1], *above[2:]]
    text = " * ".join(above) or "1.0"
    return f"({text} / {below[0] if len(below) == 1 else '(' + ' * '.join(below) + ')'})" if below else f"({text})"


def _power(base: sp.Expr, exponent: sp.Expr, dialect: Mapping[str, str]) -> str:
    if base == sp.E:
        return dialect["exp"].format(render(exponent, dialect))
    text = render(base, dialect)
    if exponent.is_Integer and 1 <= abs(int(exponent)) <= 8:
        power = text if abs(exponent) == 1 else "(" + " * ".join([text] * abs(int(exponent))) + ")"
        return power if exponent > 0 else f"(1.0 / {power})"
    if exponent.is_Rational and exponent.q == 2 and abs(exponent.p) <= 7:
        root = dialect["sqrt" if exponent > 0 else "rsqrt"].format(text)
        return root if abs(exponent.p) == 1 else "(" + " * ".join([root] * abs(exponent.p)) + ")"
    return dialect["pow"].format(text, render(exponent, dialect))
