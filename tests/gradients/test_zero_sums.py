"""Terms of a sum over a row that are exactly zero go; everything else stays as it was."""

from __future__ import annotations

import importlib.util
import random
from dataclasses import replace
from pathlib import Path

import mpmath
import pytest
import sympy as sp
from slothc.gradients.evaluate import draw_point, evaluate
from slothc.gradients.program import ROW, SCALAR, Input, Program, Reduce, symbol
from slothc.gradients.reverse import derive
from slothc.gradients.zero_sums import without_zero_sums

spec = importlib.util.spec_from_file_location("programs", Path(__file__).with_name("programs.py"))
programs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(programs)

x, mu, N = symbol("x"), symbol("mu"), symbol("N")
SIZES = {"N": sp.Symbol("n")}


def reduced(program: Program, sizes: dict[str, sp.Expr] = SIZES, lanes: sp.Expr = SIZES["N"]) -> tuple[Program, Program]:
    backward = derive(program)
    return backward, without_zero_sums(backward, program, sizes, lanes)


def apart(p: Program, q: Program) -> float:
    """How far the outputs of two programs with the same inputs are apart."""
    point = draw_point(p, random.Random(4), 3, 7)
    values = evaluate(p, point), evaluate(q, {i.name: point[i.name] for i in q.inputs}, rows=3, lanes=7)

    def flat(v: object) -> list[mpmath.mpf]:
        return [f for e in v for f in flat(e)] if isinstance(v, list) else [v]

    return max(float(abs(a - b)) for o in p.outputs for a, b in zip(*(flat(v[o.name]) for v in values)))


def test_a_mean_receives_nothing_through_what_it_centres() -> None:
    """sum((x - mean) a) for an ``a`` that no lane changes: layer_norm's second sum no longer waits for its first."""
    before, after = reduced(programs.layer_norm())
    assert "s_r" in before.needed({"s_mu"}) and "s_r" not in after.needed({"s_mu"})
    assert apart(before, after) < 1e-40


@pytest.mark.parametrize("program", [programs.rms_norm(), programs.layer_norm()], ids=["rms_norm", "layer_norm"])
def test_what_is_zero_for_no_reason_seen_stays(program: Program) -> None:
    """Without a mean; with one that is rounded, that is saved rounded, or over another number of lanes."""
    if program == programs.rms_norm():
        assert reduced(program)[0] is not reduced(program)[1]
        assert reduced(program)[0] == reduced(program)[1]
        return
    rounded = replace(program, stages=tuple(replace(s, dtype="bf16") if s.name == "mu" else s for s in program.stages))
    centred = replace(program, stages=tuple(replace(s, dtype="bf16") if s.name == "xc" else s for s in program.stages))
    for p in (rounded, centred):
        assert reduced(p)[0] == reduced(p)[1]
    for lanes in (SIZES["N"] / 2, sp.Integer(64)):
        assert reduced(program, lanes=lanes)[0] == reduced(program, lanes=lanes)[1]
    assert reduced(program, {"N": sp.Integer(64)}, sp.Integer(64))[0] != reduced(program, {"N": sp.Integer(64)}, sp.Integer(64))[1]


def test_a_mean_that_was_saved() -> None:
    """The backward reads it; the forward says what it is."""
    forward = programs.program([Input("x", ROW), programs.SIZE], ("mu", programs.mean(x)), ("y", (x - mu) ** 3))
    inputs = [Input("x", ROW), programs.SIZE, Input("mu", SCALAR), Input("a", SCALAR), Input("g", ROW)]
    a, g, d = symbol("a"), symbol("g"), symbol("d")
    backward = programs.program(inputs, ("d", a * (x - mu) + g), ("s", Reduce("sum", -3 * d)), ("y", symbol("s") + g))
    after = without_zero_sums(backward, forward, SIZES, SIZES["N"])
    assert after.stage["s"].expr == -3 * g
    nothing = programs.program(inputs, ("s", Reduce("sum", a * (x - mu))), ("y", symbol("s") + g))
    after = without_zero_sums(nothing, forward, SIZES, SIZES["N"])
    assert not after.reductions and after.stage["y"].value == g


def test_a_chain_that_doubles_at_every_step_is_left_closed() -> None:
    """As Sinkhorn's iterations are: opened, sixty steps would be 2^60 operations."""
    stages: list[tuple[str, object]] = [("mu", programs.mean(x)), ("c0", x - mu)]
    stages += [(f"c{k + 1}", symbol(f"c{k}") / (1 + symbol(f"c{k}") ** 2)) for k in range(60)]
    forward = programs.program([Input("x", ROW), programs.SIZE], *stages, ("y", symbol("c60") + mu))
    backward, after = reduced(forward)
    assert apart(backward, after) < 1e-40
