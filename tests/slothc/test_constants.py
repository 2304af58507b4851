"""Values that only sizes decide: which are made once, and that they stay right when sizes change or the caller writes to a result."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slothc.bind.constant import Constant
from slothc.capture import found_in
from slothc.catalogue import CONSTANT
from slothc.found import find
from slothc.options import Options
from slothc.rewrite import rewrite
from slothc.view import GraphView


def buckets(x: Tensor) -> Tensor:
    """Logarithmic buckets of relative positions."""
    places = torch.arange(x.shape[1], device=x.device)
    apart = (places[None, :] - places[:, None]).abs()
    far = (torch.log(apart.float() / 4.0 + 1.0) * 2.0).long().clamp(max=7)
    return x @ torch.where(apart < 4, apart, far).float()


def waves(x: Tensor) -> Tensor:
    angles = torch.arange(x.shape[1]).float()[:, None] * (1.0 / 10000 ** (torch.arange(0, 8).float() / 8))
    return x @ torch.cat((angles.sin(), angles.cos()), dim=-1)


def numbers(x: Tensor) -> Tensor:
    """No more work to make than to read."""
    return x + torch.arange(x.shape[2])


def drawn(x: Tensor) -> Tensor:
    return x @ (torch.rand(x.shape[2], 4).exp() * 2.0).sin()


def returned(x: Tensor) -> tuple[Tensor, Tensor]:
    table = (torch.arange(x.shape[2]).float() * 0.5).sin().cos()
    return x * 2.0, table


def written_to(x: Tensor) -> Tensor:
    table = (torch.arange(x.shape[2]).float() * 0.5).sin().cos()
    table[0] = 3.0
    return x @ table


def x() -> Tensor:
    return torch.randn(2, 24, 24)


def made_once(function: Callable[..., object]) -> int:
    return sum(m.rule == CONSTANT for m in found_in(function, [x()]).matches)


@pytest.mark.parametrize("function", [buckets, waves], ids=lambda f: f.__name__)
def test_a_table_is_made_once(function: Callable[..., Tensor]) -> None:
    assert made_once(function) == 1


@pytest.mark.parametrize("function", [numbers, drawn], ids=lambda f: f.__name__)
def test_what_is_cheap_or_differs_is_not(function: Callable[..., object]) -> None:
    assert made_once(function) == 0


def test_what_others_read_too_is_still_made() -> None:
    def function(x: Tensor) -> Tensor:
        places = torch.arange(x.shape[2])
        return (x + places) @ (places.float() * 0.5).sin().cos()

    (match,) = (m for m in found_in(function, [x()]).matches if m.rule == CONSTANT)
    assert not any(getattr(n.target, "__name__", "") == "arange" for n in match.nodes)


def test_what_the_caller_gets_is_made_anew() -> None:
    torch._dynamo.reset()
    compiled, value = torch.compile(returned, backend="sloth"), x()
    compiled(value)[1].zero_()
    torch.testing.assert_close(compiled(value), returned(value))


def test_disabled() -> None:
    found = found_in(buckets, [x()])
    assert not any(m.rule == CONSTANT for m in find(found.view, Options.of({"disable": CONSTANT})).matches)


@pytest.mark.parametrize("function", [buckets, waves, written_to], ids=lambda f: f.__name__)
@pytest.mark.parametrize("dynamic", [False, True])
def test_it_is_right_at_every_size(function: Callable[..., Tensor], dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, backend="sloth", dynamic=dynamic)
    for size in (24, 17, 24, 40):
        value = torch.randn(2, size, size)
        for _ in range(2):
            torch.testing.assert_close(compiled(value), function(value))


def test_it_runs_no_more_than_once() -> None:
    made = []

    def function(n: int) -> Tensor:
        made.append(n)
        return torch.arange(n)

    constant = Constant(function)
    assert constant(3) is constant(3) and constant(4).tolist() == [0, 1, 2, 3] and made == [3, 4]


def test_after_inference_it_may_be_kept_for_a_backward() -> None:
    torch._dynamo.reset()
    compiled, value = torch.compile(waves, backend="sloth"), x()
    with torch.inference_mode():
        compiled(value)
    compiled(value.requires_grad_()).sum().backward()
    assert value.grad is not None


def test_its_nodes_leave_the_graph() -> None:
    view = found_in(buckets, [x()]).view
    assert isinstance(view, GraphView)
    rewrite(view.graph_module, Options())
    calls = [n for n in view.graph_module.graph.nodes if n.op.startswith("call")]
    assert sum(getattr(n.target, "__name__", "") == "sloth_constant" for n in calls) == 1 and len(calls) == 2
