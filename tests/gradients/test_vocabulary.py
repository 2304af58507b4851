"""The loss of a token as a row program: its value and derived gradient in high precision, without torch."""

from __future__ import annotations

import mpmath
import pytest
import sympy as sp
from slothc.gradients.program import Program, Reduce
from slothc.gradients.vocabulary import (
    Chain,
    Step,
    gradient_program,
    loss_program,
    normaliser_program,
    row_pass,
    with_gradient,
)

CHAINS = [
    "fp32",
    "fp32; mul 0.0625 fp32",
    "fp32; div 3.0 fp32; tanh fp32; mul 3.0 fp32",
    "fp32; sub 1.5 fp32; neg fp32",
]
LOGITS = ["0.3", "-1.7", "2.25", "0.0", "-0.4"]


def evaluate(program: Program, z: list, **scalars: object) -> dict[str, list]:
    """Every value of one row, by lanes, at the working precision; ``rounding`` is left out."""
    lanes = range(len(z))
    known: dict[str, list] = {"z": z, "v": [mpmath.mpf(i) for i in lanes]}
    known |= {name: [mpmath.mpf(value)] * len(z) for name, value in scalars.items()}

    def at(expr: sp.Expr, lane: int) -> mpmath.mpf:
        values = {s: sp.Float(known[s.name][lane], 40) for s in expr.free_symbols}
        return mpmath.mpf(sp.sympify(expr).subs(values).evalf(40))

    for stage in program.stages:
        each = [at(stage.expr, lane) for lane in lanes]
        if isinstance(stage.value, Reduce):
            total = mpmath.fsum(each) if stage.value.op == "sum" else mpmath.log(mpmath.fsum(map(mpmath.exp, each)))
            each = [total] * len(z)
        known[stage.name] = each
    return known


def numbers() -> list:
    return [mpmath.mpf(x) for x in LOGITS]


@pytest.mark.parametrize("text", CHAINS)
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_gradient_is_the_difference_quotient(text: str, smoothing: float) -> None:
    chain = Chain.parse(text)
    with mpmath.workdps(40):
        program = loss_program(chain.dtype, chain.exprs, vocab=len(LOGITS), smoothing=smoothing)
        derived = evaluate(gradient_program(program), numbers(), label=2)["d_z"]
        step = mpmath.mpf(10) ** -12
        for lane in range(len(LOGITS)):
            up, down = numbers(), numbers()
            up[lane] += step
            down[lane] -= step
            difference = evaluate(program, up, label=2)["loss"][0] - evaluate(program, down, label=2)["loss"][0]
            assert abs(derived[lane] - difference / (2 * step)) < 1e-16


@pytest.mark.parametrize("text", CHAINS)
def test_gathered_label_gives_the_same_loss_and_gradient(text: str) -> None:
    chain = Chain.parse(text)
    with mpmath.workdps(40):
        plain = evaluate(with_gradient(loss_program(chain.dtype, chain.exprs)), numbers(), label=3)
        program = with_gradient(loss_program(chain.dtype, chain.exprs, gathered=True, ignore_index=None))
        own = evaluate(program, numbers(), zy=numbers()[3])
        own["d_z"][3] += own["d_zy"][0]
        assert abs(plain["loss"][0] - own["loss"][0]) < 1e-25
        assert max(abs(a - b) for a, b in zip(plain["d_z"], own["d_z"])) < 1e-25


def test_ignored_label_has_no_loss_and_no_gradient() -> None:
    values = evaluate(with_gradient(loss_program("fp32", ignore_index=-100)), numbers(), label=-100)
    assert values["loss"][0] == 0 and set(values["d_z"]) == {0}


def test_label_smoothing_one_is_the_mean() -> None:
    with mpmath.workdps(40):
        values = evaluate(loss_program("fp32", vocab=5, smoothing=1.0), numbers(), label=1)
        expected = mpmath.log(mpmath.fsum(map(mpmath.exp, numbers()))) - mpmath.fsum(numbers()) / 5
        assert abs(values["loss"][0] - expected) < 1e-15


def test_normaliser_gradient_is_seeded() -> None:
    program = gradient_program(normaliser_program("fp32"), seeded=True)
    with mpmath.workdps(40):
        assert abs(mpmath.fsum(evaluate(program, numbers(), g_lse=3)["d_z"]) - 3) < 1e-25


def test_roundings_of_the_model_stay() -> None:
    chain = Chain.parse("bf16; div 30.0 bf16; tanh bf16; mul 30.0 bf16; cast fp32")
    stages = loss_program(chain.dtype, chain.exprs).stages
    assert [s.dtype for s in stages[:4]] == ["bf16", "bf16", "bf16", None]
    assert not loss_program("bf16", Chain.parse("bf16; cast fp32").exprs).stages[0].name.startswith("c")


def test_chain_text_round_trips() -> None:
    for text in [*CHAINS, "bf16; clamp -1.0 1.0 bf16; cast fp32"]:
        assert Chain.parse(text).text == text
    assert Chain("bf16").then("mul", 2).then("cast", dtype="fp32").text == "bf16; mul 2.0 bf16; cast fp32"
    assert Chain.parse("bf16; cast fp32").result == "fp32"


@pytest.mark.parametrize("text", ["", "fp31", "fp32; gelu fp32", "fp32; mul fp32", "fp32; mul 1.0 fp31", "fp32 bf16"])
def test_bad_chains_are_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"chain|logit"):
        Chain.parse(text)


def test_bad_smoothing_is_named() -> None:
    with pytest.raises(ValueError, match=r"between 0 and 1, got 1\.5"):
        loss_program("fp32", smoothing=1.5)
    with pytest.raises(ValueError, match="size of the vocabulary"):
        loss_program("fp32", smoothing=0.5)
    with pytest.raises(ValueError, match="takes 1 number"):
        Step("mul", (), "fp32")


def test_pass_reads_and_writes_whole_rows() -> None:
    p = row_pass(with_gradient(loss_program("bf16")), 1001)
    assert [len(o.shape) for o in p.reads] == [2, 1] and [len(o.shape) for o in p.writes] == [1, 2]
    assert p.writes[1].dtype == "bf16" and p.lane.size == 1001
