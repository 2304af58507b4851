"""Formulas as people read them, kept as golden files (SLOTH_ACCEPT=1 rewrites them)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import sympy as sp
from slothc.gradients.geometry import Access, Axis, Form
from slothc.gradients.plan import Operand, Pass, Plan
from slothc.gradients.pretty import WIDTH, describe, formula, latex
from slothc.gradients.program import ROW, Input, Output, Program, Reduce, Stage, symbol
from slothc.gradients.reverse import derive

spec = importlib.util.spec_from_file_location("programs", Path(__file__).with_name("programs.py"))
programs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(programs)
GOLDEN = Path(__file__).with_name("golden")


@pytest.mark.parametrize("name", programs.MAIN)
def test_golden_formulas(name: str) -> None:
    p = programs.MAIN[name]
    text = (
        "\n\n".join((formula(p), formula(derive(p), name_scalars=True), latex(p), latex(derive(p), name_scalars=True)))
        + "\n"
    )
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("SLOTH_ACCEPT") == "1":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), "run with SLOTH_ACCEPT=1 to accept the new text"


def test_a_norm_reads_like_the_textbook() -> None:
    assert formula(programs.rms_norm()) == "y = w * x * rsqrt(mean(x^2) + eps)"
    assert formula(programs.rms_norm("bf16")) == "y = w * bf16(x * rsqrt(mean(x^2) + eps))"
    assert formula(programs.unpublished()) == "y = x * softplus(w) / (mean(|x|) + eps)"
    assert formula(programs.gelu_tanh()) == "y = x * (tanh(sqrt(2) * rsqrt(pi) * (0.044715 * x^3 + x)) + 1) / 2"


@pytest.mark.parametrize("name", programs.ALL)
def test_lines_are_short(name: str) -> None:
    for text in (formula(programs.ALL[name]), formula(derive(programs.ALL[name]), name_scalars=True)):
        assert max(map(len, text.splitlines())) <= WIDTH


@pytest.mark.parametrize("name", programs.ALL)
def test_latex_has_balanced_braces(name: str) -> None:
    for p in (programs.ALL[name], derive(programs.ALL[name])):
        text = latex(p)
        assert text.count("{") == text.count("}") and text.count(r"\left") == text.count(r"\right")


def _rms_plan(lanes: int) -> Plan:
    """A norm over rows of ``lanes`` with the mean written as a literal, its 1/rms saved."""
    x, r, s, g = symbol("x"), symbol("r"), symbol("s"), symbol("g_y")
    t, i = Form.axis("t"), Form.axis("i")
    forward = Program(
        (Input("x", ROW, "bf16"),),
        (Stage("s", Reduce("sum", x**2 / lanes)), Stage("r", s ** sp.Rational(-1, 2)), Stage("y", x * r)),
        (Output("y", "y", "bf16"), Output("r", "r")),
    )
    whole = Program(
        (Input("x", ROW, "bf16"), Input("r", programs.SCALAR), Input("g_y", ROW, "bf16")),
        (Stage("d", Reduce("sum", g * x)), Stage("d_x", g * r - symbol("d") * x * r**3 / lanes)),
        (Output("d_x", "d_x", "bf16"),),
    )
    big, small = Operand((7, lanes), "bf16"), Operand((7,), "fp32")
    fwd = Pass(
        forward,
        (Axis("t", 7),),
        Axis("i", lanes),
        (Access(0, (t, i)),),
        (Access(0, (t, i)), Access(1, (t,))),
        (big,),
        (big, small),
    )
    bwd = Pass(
        whole,
        (Axis("t", 7),),
        Axis("i", lanes),
        (Access(0, (t, i)), Access(1, (t,)), Access(2, (t, i))),
        (Access(0, (t, i)),),
        (big, small, big),
        (big,),
    )
    return Plan(fwd, bwd, 1, (0,), (0,), held=(1,))


def test_describe_a_plan() -> None:
    assert describe(_rms_plan(64)).splitlines() == [
        "forward",
        "  r = rsqrt(mean(x^2))",
        "  y = r * x",
        "saved",
        "  operands: x (bf16)",
        "  values:   r",
        "backward",
        "  d = sum(g_y * x)",
        "  d_x = g_y * r - d * x * r^3 / 64",
    ]
