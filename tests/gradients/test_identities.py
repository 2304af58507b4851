"""Every identity proves what it says, and nothing that only looks like it."""

from __future__ import annotations

import importlib.util
import random
import time
from pathlib import Path

import mpmath
import pytest
import sympy as sp
from slothc.gradients.evaluate import compile_scalar
from slothc.gradients.functions import (
    absolute,
    clip,
    eq,
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
from slothc.gradients.identities import IDENTITIES, Identity, a, b, factored, tidied, tidy, u, v
from slothc.gradients.program import Program, Stage, symbol
from slothc.gradients.reverse import derive
from slothc.gradients.verify import witness

spec = importlib.util.spec_from_file_location("programs", Path(__file__).with_name("programs.py"))
programs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(programs)

x, y, z = symbol("x"), symbol("y"), symbol("z")
SPECIAL = (-2, -1, 0, 1, 2)


def same(p: sp.Expr, q: sp.Expr, seed: int = 0) -> bool:
    """Do p and q agree at random points and at every point of a small grid, kinks and ties included?"""
    names = sorted({s.name for s in p.free_symbols | q.free_symbols})
    f, g = compile_scalar(p, names), compile_scalar(q, names)
    dice = random.Random(seed)
    with mpmath.workdps(40):
        for k in range(60):
            point = [mpmath.mpf(dice.choice(SPECIAL)) if k % 2 else mpmath.mpf(dice.uniform(-3, 3)) for _ in names]
            if abs(f(*point) - g(*point)) > mpmath.mpf(10) ** -30:
                return False
    return True


def instances(identity: Identity) -> list[dict[sp.Expr, sp.Expr]]:
    """Values of the placeholders for which the side condition holds."""
    choices = [x, x * y - 1, sp.exp(x), gt(x, y), ge(x, y), x**2 + 1, sp.sin(x)]
    return [env for c in choices if identity.condition(env := {u: c, v: x - y, a: sp.Integer(-1), b: sp.Integer(1)})]


@pytest.mark.parametrize("identity", IDENTITIES, ids=lambda i: i.name)
def test_an_identity_is_true_and_applied(identity: Identity) -> None:
    found = instances(identity)
    assert found
    for env in found:
        before, after = identity.before.xreplace(env), identity.after.xreplace(env)
        assert same(before, after), (before, after)
        assert same(tidy(before), before)
    before = identity.before.xreplace(found[0])
    assert identity.apply(before) == identity.after.xreplace(found[0])


@pytest.mark.parametrize("head", [sp.Add, sp.Mul])
@pytest.mark.parametrize("identity", IDENTITIES, ids=lambda i: i.name)
def test_an_identity_holds_inside_longer_expressions(identity: Identity, head: type) -> None:
    for env in instances(identity):
        whole = head(identity.before.xreplace(env), z, sp.cos(y))
        assert same(tidy(whole), whole), whole


LOOK_ALIKES = [
    absolute(x) * signum(y),
    absolute(x) ** 3,
    absolute(x),
    signum(x) ** 2,
    relu(x) * gt(y, 0),
    relu(x),
    x**2,
    (1 + gt(x, y)) ** 2,
    gt(x, y) * ge(y, x),
    select(x, 1, 0),
    select(gt(x, y), 0, 1),
    select(x, y, z),
    maximum(x, y),
    minimum(x, -x),
    clip(clip(x, -1, 1), -2, 1),
    sigmoid(x) + sigmoid(y),
    sigmoid(x) - sigmoid(-x),
    softplus(x) + softplus(-x),
    softplus(x) - softplus(-y),
    sp.sin(x) ** 2 + sp.cos(y) ** 2,
    sp.sin(x) ** 2 - sp.cos(x) ** 2,
    sigmoid(x) * (1 - sigmoid(x)),
    1 - sp.tanh(x) ** 2,
    eq(x, y) * x,
]


@pytest.mark.parametrize("expr", LOOK_ALIKES, ids=str)
def test_a_look_alike_is_left_alone(expr: sp.Expr) -> None:
    assert tidy(expr) == expr


FALSE = [(absolute(x), x), (signum(x) ** 2, sp.Integer(1)), (relu(x), x), (x**2, x), (select(x, 1, 0), x)]


@pytest.mark.parametrize("before, after", FALSE, ids=str)
def test_without_its_side_condition_an_identity_would_be_false(before: sp.Expr, after: sp.Expr) -> None:
    assert not same(before, after)
    held = [i for i in IDENTITIES if i.condition({u: x, v: y, a: x, b: y})]
    assert all(i.apply(before) != after for i in held)


def test_common_factors() -> None:
    s = sigmoid(x)
    assert tidy(y * s + y * s * x * (1 - s)) == y * s * (1 + x * (1 - s))
    assert factored(x * y + x**2 * y) == y * (x + x**2)
    assert tidy(x + y) == x + y and tidy(x * y + z) == x * y + z


@pytest.mark.parametrize("name", programs.ALL)
def test_a_tidied_backward_still_passes_the_witness(name: str) -> None:
    p = programs.ALL[name]
    backward = derive(p)
    start = time.perf_counter()
    clean = tidied(backward)
    spent = time.perf_counter() - start
    assert witness(p, clean).worst < 1e-25
    count = sum(sp.count_ops(s.expr) for s in clean.stages)
    assert count <= sum(sp.count_ops(s.expr) for s in backward.stages)
    assert spent < 0.5, f"{spent:.3f} s"  # about 5 ms; the margin is for a busy machine


def test_a_known_root_is_reused() -> None:
    text = tidied(derive(programs.rms_norm())).text()
    assert "r**3" in text and "**(-3/2)" not in text


def test_a_rounded_stage_stands_for_nothing_but_itself() -> None:
    p = programs.program(
        [programs.Input("x", programs.ROW)], Stage("e", sp.exp(x), "bf16"), ("o", sp.exp(x) + symbol("e")), outs=("o",)
    )
    assert tidied(p).stage["o"].value == sp.exp(x) + symbol("e")
    free = Program(p.inputs, (Stage("e", sp.exp(x)), p.stages[1]), p.outputs)
    assert tidied(free).stage["o"].value == 2 * symbol("e")
