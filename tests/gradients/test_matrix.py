"""Matrix plans: derived gradients against exact differences, association, sharing, text."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import sympy as sp
from slothc.gradients.matrix import Factor, lora_plan, matrix_plan
from slothc.gradients.matrix_witness import witness

FORMS = list(itertools.product(("nk", "kn"), (True, False), (True, False)))


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_lora_gradients_are_exact(form):
    plan = lora_plan(*form)
    gaps = witness(plan, {"M": 2, "K": 3, "N": 4, "r": 2}, seed=sum(map(len, map(str, form))))
    wanted = {"X", "A", "B", "W"} | ({"b"} if form[1] else set()) | (set() if form[2] else {"Xa"})
    assert set(gaps) == wanted and all(gap == 0 for gap in gaps.values())


def test_witness_notices_a_wrong_gradient():
    plan = lora_plan("nk", False, True)
    X, W = (next(m for m in plan.expression.atoms(sp.MatrixSymbol) if m.name == n) for n in "XW")
    other = matrix_plan(2 * X * W.T, [X, W])
    mixed = type(plan)(**{**other.__dict__, "backward": matrix_plan(X * W.T, [X, W]).backward})
    assert any(gap != 0 for gap in witness(mixed, {"M": 2, "K": 3, "N": 2}).values())


def test_shared_products_and_order():
    plan = lora_plan("nk", True, True)
    steps = {s.name: str(s) for s in plan.forward + plan.backward}
    assert steps["T"] == "T = X A'" and steps["U"] == "U = G B"
    assert steps["dX"] == "dX = s U A + G W"  # the cheap term first, the base GEMM onto it
    assert steps["dA"] == "dA = s U' X" and steps["dB"] == "dB = s G' T"
    assert steps["Y"] == "Y = 1 b' + s T B' + X W'"
    assert plan.saved == ("T",)
    assert [s.name for s in plan.backward_for(["B"])] == ["dB"]
    assert [s.name for s in plan.backward_for(["A", "B"])] == ["U", "dA", "dB"]


def test_the_cheapest_order_depends_on_the_sizes():
    m, k, n, p = sp.symbols("m k n p", integer=True, positive=True)
    A, B, C = sp.MatrixSymbol("A", m, k), sp.MatrixSymbol("B", k, n), sp.MatrixSymbol("C", n, p)
    left = matrix_plan(A * B * C, [A], {"m": 2, "k": 50, "n": 60, "p": 70}).forward
    right = matrix_plan(A * B * C, [A], {"m": 70, "k": 60, "n": 50, "p": 2}).forward
    assert str(left[0]) == "T = A B" and str(right[0]) == "T = B C"


def test_chain_orders_match_brute_force():
    sizes = sp.symbols("a b c d e f", integer=True, positive=True)
    numbers = dict(zip("abcdef", (7, 31, 5, 23, 3, 11)))
    mats = [sp.MatrixSymbol(f"M{i}", sizes[i], sizes[i + 1]) for i in range(5)]
    plan = matrix_plan(sp.MatMul(*mats), [mats[0]], numbers)
    found = 0
    for step in plan.forward:
        term = step.terms[0]
        rows, inner, cols = step.rows, plan.inner(term), step.cols
        found += int((rows * inner * cols).subs({s: numbers[s.name] for s in sizes}))
    dims = [numbers[c] for c in "abcdef"]

    def best(i, j):
        return 0 if j - i == 1 else min(best(i, k) + best(k, j) + dims[i] * dims[k] * dims[j] for k in range(i + 1, j))

    assert found == best(0, 5)


def test_a_whole_term_that_occurs_twice_is_made_once():
    m, k, n = sp.symbols("m k n", integer=True, positive=True)
    X, V, W = sp.MatrixSymbol("X", m, k), sp.MatrixSymbol("V", m, n), sp.MatrixSymbol("W", n, k)
    plan = matrix_plan(X * W.T + V, [X, W, V], {"m": 3, "k": 4, "n": 5})
    assert {s.name: str(s) for s in plan.backward} == {"dX": "dX = G W", "dW": "dW = G' X", "dV": "dV = G"}
    s, t = sp.symbols("s t", real=True)
    A, B = sp.MatrixSymbol("A", k, n), sp.MatrixSymbol("B", n, m)
    twice = matrix_plan(s * V * W * A + t * (V * W * X.T * B.T), [A, V], {"m": 2, "k": 4, "n": 9})
    made = [str(x) for x in twice.forward]
    assert sum("= V W" in x for x in made) == 1
    assert all(gap == 0 for gap in witness(twice, {"m": 2, "k": 2, "n": 2}).values())


def test_repeated_operand_is_differentiated_in_every_place():
    n = sp.Symbol("n", integer=True, positive=True)
    X, W = sp.MatrixSymbol("X", n, n), sp.MatrixSymbol("W", n, n)
    plan = matrix_plan(X * W * X.T + 3 * X, [X, W], {"n": 3})
    assert all(gap == 0 for gap in witness(plan, {"n": 3}).values())


def test_text_and_latex():
    text, latex = lora_plan().text(), lora_plan().latex()
    assert "dA = s B' G' X" in text and "U = G B" in text and "saved\n  T" in text
    assert r"\frac{\partial L}{\partial A} &= s B^{T} G^{T} X" in latex


def test_errors():
    m = sp.Symbol("m", integer=True, positive=True)
    X, G = sp.MatrixSymbol("X", m, m), sp.MatrixSymbol("G", m, m)
    with pytest.raises(ValueError, match="reserved"):
        matrix_plan(X * G, [X], {"m": 2})
    with pytest.raises(ValueError, match="no number"):
        matrix_plan(X * X, [X], {"n": 2})
    with pytest.raises(ValueError, match="not a symbol"):
        matrix_plan(sp.Inverse(X) + X, [X], {"m": 2})
    with pytest.raises(ValueError, match="nk, kn"):
        lora_plan("nn")


def test_transposes_cancel():
    assert Factor("X").t.t == Factor("X")


def test_needs_no_torch():
    root = __file__.rsplit("/tests/", 1)[0]
    code = (
        "import sys, types; bare = types.ModuleType('slothc'); bare.__path__ = [sys.argv[1]]; "
        "sys.modules['slothc'] = bare; "
        "import slothc.gradients.matrix_witness, slothc.gradients.matrix as m; m.lora_plan(); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, root], check=True)
