"""``sloth::rowwise`` as an operation: what tracers see of a plan, and the direct way around the dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from contract import Case, Errors, case, compare, run
from forms import Form, form
from slothc.kernels import rowwise_op
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
NAMES = ("rms_norm", "add_norm", "rope", "rope of learned angles", "scalars", "masked")


def lifted(f: Form) -> tuple[Case, list[Tensor]]:
    arguments = f.draw(torch.float32, DEVICE)
    c = case(f.function, arguments, f.fixed)
    return c, [arguments[k] for k in c.places]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    """Schema, fakes, autograd registration and AOT dispatch, static and dynamic."""
    c, operands = lifted(form(name))
    key = rowwise_op.register(c.plan)
    torch.library.opcheck(torch.ops.sloth.rowwise, (operands, key))


def through_call(c: Case) -> Callable[..., Any]:
    call = rowwise_op.call(c.plan)
    return lambda *arguments: call(*(arguments[k] for k in c.places))


def through_op(c: Case) -> Callable[..., Any]:
    key, count = rowwise_op.register(c.plan), c.plan.results

    def run_op(*arguments: Tensor) -> Any:
        results = torch.ops.sloth.rowwise([arguments[k] for k in c.places], key)[:count]
        return results[0] if count == 1 else tuple(results)

    return run_op


def through_aot(c: Case) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(through_op(c), backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("way", [through_call, through_op, through_aot], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients(name: str, way: Callable[[Case], Callable[..., Any]]) -> None:
    f = form(name)
    c, _ = lifted(f)
    errors, made = Errors(), way(c)

    def ours(arguments: list[Tensor], cotangents: list[Tensor]) -> dict[str, Tensor]:
        values = run(made, arguments, cotangents).values
        return {k: v for k, v in values.items() if k not in {f"gradient {n}" for n in f.fixed}}

    for _ in range(5):
        compare(errors, ours, f.function, f.draw(torch.float32, DEVICE))
    errors.judge()


def test_only_wanted_gradients_are_returned() -> None:
    c, _ = lifted(form("rms_norm"))
    x, w = form("rms_norm").draw(torch.float32, DEVICE)
    for way in (through_call, through_op):
        y = way(c)(x.clone().requires_grad_(), w)
        (g,) = torch.autograd.grad(y.sum(), [y.grad_fn.next_functions[c.places.index(0)][0].variable])
        assert g.shape == x.shape


def test_no_graph_is_kept_without_gradients() -> None:
    c, _ = lifted(form("rms_norm"))
    x, w = form("rms_norm").draw(torch.float32, DEVICE)
    with torch.no_grad():
        assert through_call(c)(x.requires_grad_(), w).grad_fn is None
    assert through_call(c)(x.detach(), w).grad_fn is None


def test_one_of_two_results_may_be_unused() -> None:
    """The other one's gradient is zero; what that one alone is made of gets none, which an optimizer tells from zeros."""
    f = form("add_norm")
    c, _ = lifted(f)
    for which in (0, 1):
        for way in (through_call, through_op):
            arguments = [a.detach().requires_grad_() for a in f.draw(torch.float32, DEVICE)]
            ours = torch.autograd.grad(way(c)(*arguments)[which].square().sum(), arguments, allow_unused=True)
            eager = torch.autograd.grad(f.function(*arguments)[which].square().sum(), arguments, allow_unused=True)
            for mine, theirs in zip(ours, eager):
                assert (mine is None) == (theirs is None)
                if theirs is not None:
                    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_result_without_a_gradient_stays_one() -> None:
    """What only operands without a gradient are a part of, beside a result of others."""

    def scaled(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        h = x * 1.5
        return h * g, h

    x, g = torch.randn(2, 5, 8, device=DEVICE), torch.randn(8, device=DEVICE, requires_grad=True)
    torch._dynamo.reset()
    y, h = torch.compile(scaled, backend="sloth")(x, g)
    assert y.requires_grad and not h.requires_grad
    torch.testing.assert_close(torch.autograd.grad((y * h).sum(), g)[0], ((x * 1.5) ** 2).sum((0, 1)))


def test_a_tensor_that_is_two_operands_gets_the_sum() -> None:
    """x + roll-like reads of one tensor through overlapping maps: each map is an operand of its own."""

    def shifted(x: Tensor) -> Tensor:
        return torch.tanh(x[..., 1:]) * x[..., :-1]

    x = torch.randn(2, 5, 17, device=DEVICE)
    c = case(shifted, [x.clone()])
    errors = Errors()
    compare(errors, lambda a, g: run(through_call(c), a, g).values, shifted, [x])
    errors.judge()
