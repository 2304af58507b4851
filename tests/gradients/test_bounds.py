"""Every value that a program takes lies within the bounds that were found without knowing its inputs."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import sympy as sp
from hypothesis import given
from slothc.gradients.bounds import ALL, bounds, span
from slothc.gradients.functions import clip, relu, select, sigmoid
from slothc.gradients.program import symbol
from slothc.gradients.vocabulary import Chain, loss_program
from sympy import tanh

X, Y = symbol("x"), symbol("y")
EXPRESSIONS = (
    30 * tanh(X / 30), -3 * sigmoid(X) + 2, relu(X - 1) * sigmoid(Y), clip(X, -2, 5) * clip(Y, -1, 0.5), tanh(X) * tanh(Y) * Y,
    select(X, tanh(Y), 2 * sigmoid(X)), sp.exp(X) + tanh(Y), X - X * Y, tanh(sigmoid(X)) + 0 * Y, relu(clip(X, -7, -3)),
)  # fmt: skip
NUMBERS = {"tanh": math.tanh, "sigmoid": lambda x: 1 / (1 + math.exp(-x)), "relu": lambda x: max(x, 0.0),
           "clip": lambda x, low, high: min(max(x, low), high), "select": lambda c, a, b: a if c != 0 else b}  # fmt: skip


@given(st.sampled_from(EXPRESSIONS), st.floats(-40, 40), st.floats(-40, 40))
def test_a_value_lies_within(expr: sp.Expr, x: float, y: float) -> None:
    low, high = span(expr, {"x": ALL, "y": ALL})
    value = float(sp.lambdify((X, Y), expr, modules=[NUMBERS, "math"])(x, y))
    assert low - 1e-12 <= value <= high + 1e-12


@pytest.mark.parametrize(("expr", "expected"), [
    (30 * tanh(X / 30), (-30.0, 30.0)), (sigmoid(X) - 1, (-1.0, 0.0)), (relu(X), (0.0, math.inf)), (X * tanh(Y), ALL),
    (clip(X, -1, 1) * clip(Y, 2, 3), (-3.0, 3.0)), (tanh(clip(X, 0, 1)), (0.0, math.tanh(1))), (sp.Integer(4) + 0 * X, (4.0, 4.0)),
])  # fmt: skip
def test_they_are_tight(expr: sp.Expr, expected: tuple[float, float]) -> None:
    assert span(expr, {}) == pytest.approx(expected)


def test_of_a_soft_capped_logit() -> None:
    chain = Chain.parse("bf16; div 30 bf16; tanh bf16; mul 30 bf16")
    found = bounds(loss_program(chain.dtype, chain.exprs, vocab=64, ignore_index=-100))
    assert found["c2"] == (-30.0, 30.0) and found["c0"] == found["z"] == found["lse"] == ALL
