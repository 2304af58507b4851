"""Derived backwards against the mpmath witness; the witness against known values; naming as an identity test."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import mpmath
import pytest
import sympy as sp
from slothc.gradients.functions import sigmoid
from slothc.gradients.program import COLUMN, CONST, ROW, Input, Output, Program, Stage, symbol
from slothc.gradients.reverse import derive
from slothc.gradients.verify import equivalent, evaluate, rounded, witness

spec = importlib.util.spec_from_file_location("programs", Path(__file__).with_name("programs.py"))
programs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(programs)
x, w = symbol("x"), symbol("w")


@pytest.mark.parametrize("name", programs.ALL)
def test_the_derived_backward_passes_the_witness(name: str) -> None:
    p = programs.ALL[name]
    report = witness(p, rows=2, lanes=3)
    assert set(report.errors) == {i.name for i in p.inputs if i.differentiable}
    assert report.worst < 1e-25, str(report)


@pytest.mark.parametrize("rows, lanes", [(1, 1), (1, 4), (3, 1)])
def test_the_witness_holds_at_one_row_and_one_lane(rows: int, lanes: int) -> None:
    assert witness(programs.layer_norm(), rows=rows, lanes=lanes).worst < 1e-25


def test_analytic_programs_have_the_complex_step_too() -> None:
    assert set(witness(programs.layer_norm()).complex_errors) == {"x", "w", "b"}
    assert witness(programs.unpublished()).complex_errors == {}


@pytest.mark.parametrize("name", programs.MAIN)
def test_the_witness_sees_a_wrong_backward(name: str) -> None:
    p = programs.MAIN[name]
    good = derive(p)
    for out in good.outputs:
        last = good.stage[out.value]
        wrong = tuple(
            Stage(s.name, s.value * sp.Rational(1000001, 1000000), s.dtype) if s is last else s for s in good.stages
        )
        report = witness(p, Program(good.inputs, wrong, good.outputs))
        assert report.errors[out.name[2:]] > 1e-8


def test_the_witness_refuses_a_backward_of_another_program() -> None:
    with pytest.raises(ValueError, match="neither inputs of the forward"):
        witness(programs.swiglu(), derive(programs.rms_norm()))


def test_evaluate_by_kind() -> None:
    got = evaluate(programs.rms_norm(), {"x": [[3, 4], [0, 2]], "w": [1, 2], "eps": 0})["y"]
    want = [[3 / mpmath.sqrt(12.5), 8 / mpmath.sqrt(12.5)], [0, 4 / mpmath.sqrt(2)]]
    assert all(abs(a - b) < 1e-14 for p, q in zip(got, want) for a, b in zip(p, q))
    with pytest.raises(ValueError, match="'w' is a column"):
        evaluate(programs.rms_norm(), {"x": [[3, 4]], "w": [1], "eps": 0})
    with pytest.raises(ValueError, match="'eps' has no value"):
        evaluate(programs.rms_norm(), {"x": [[3, 4]], "w": [1, 1]})


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_rounding_is_torchs(dtype: str) -> None:
    import torch

    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    torch.manual_seed(0)
    values = torch.cat(
        [torch.randn(200) * 10.0**k for k in (-42, -39, -8, -5, 0, 4, 5, 38)]
        + [torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 65519.0, 65520.0, 3.39e38, 0.0])]
    ).double() * (1 + 2**-30)
    # float64 -> bf16 goes by way of float32 in torch: compare where that double rounding cannot matter
    values = values.float().double() if dtype == "bf16" else values
    for v, want in zip(values.tolist(), values.to(kind).double().tolist()):
        assert float(rounded(mpmath.mpf(v), dtype)) == want, v


def test_rounding_points_are_applied_only_on_request() -> None:
    p = programs.rms_norm("bf16")
    point = {"x": [[1.0, 2.0, 3.5]], "w": [1, 1, 1], "eps": 0.5}
    exact, low = evaluate(p, point)["y"][0], evaluate(p, point, round=True)["y"][0]
    assert exact != low and all(rounded(v, "bf16") == v for v in low)


def test_equivalent_sees_through_spelling_names_and_order() -> None:
    a, g, e, n = symbol("a"), symbol("gain"), symbol("e0"), symbol("n0")
    other = Program(
        (Input("gain", COLUMN), Input("n0", CONST, "i64", False, "size"), Input("e0", CONST), Input("a", ROW)),
        (Stage("q", programs.Reduce("sum", a * a)), Stage("o", a / sp.sqrt(symbol("q") / n + e) * g)),
        (Output("o", "o"),),
    )
    found = equivalent(other, programs.rms_norm())
    assert found and found.inputs == {"x": "a", "w": "gain", "eps": "e0", "N": "n0"} and found.outputs == {"y": "o"}


def test_equivalent_binds_numbers_and_literal_sizes() -> None:
    literal = Program(
        (Input("a", ROW), Input("gain", COLUMN)),
        (
            Stage("q", programs.Reduce("sum", a_ := symbol("a") ** 2 / 64)),
            Stage("o", symbol("a") / sp.sqrt(symbol("q") + sp.Float("1e-5")) * symbol("gain")),
        ),
        (Output("o", "o"),),
    )
    assert a_.has(sp.Rational(1, 64))
    found = equivalent(literal, programs.rms_norm(), size=64)
    assert found and found.inputs["eps"] == sp.Float("1e-5")
    assert equivalent(literal, programs.layer_norm(), size=64) is None


def test_equivalent_permutes_outputs_and_inputs_of_one_kind() -> None:
    p = programs.rope()
    q = Program(p.inputs[::-1], p.stages, p.outputs[::-1])
    assert equivalent(p, q) and equivalent(q, p)
    other_way = programs.program(
        list(p.inputs),
        ("y1", symbol("x1") * symbol("cos") + symbol("x2") * symbol("sin")),
        ("y2", symbol("x2") * symbol("cos") + symbol("x1") * symbol("sin")),
        outs=("y1", "y2"),
    )
    assert equivalent(p, other_way) is None


def test_equivalent_does_not_prove_look_alikes() -> None:
    near = programs.pointwise(x * sigmoid(x) * symbol("up") + sp.Rational(1, 10**12) * x, "x", "up")
    assert equivalent(near, programs.swiglu()) is None
    assert equivalent(programs.swiglu(), programs.rms_norm()) is None
    assert equivalent(programs.layer_norm(), programs.rms_norm()) is None
    assert equivalent(programs.ALL["gelu"], programs.gelu_tanh()) is None


def test_the_witness_holds_detached_stages_fixed() -> None:
    stages = (Stage("m", programs.Reduce("max", x), detached=True), Stage("y", sp.exp(x - symbol("m")) * x))
    p = Program((Input("x", ROW),), stages, (Output("y", "y"),))
    assert witness(p).worst < 1e-25
    assert "ties" not in derive(p).text()
