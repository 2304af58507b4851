"""``vmap`` over elementwise operations: taken away where it only adds a dimension in front, left where it does more."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from slothc.batched import ADD, BEGIN, batched
from slothc.capture import captured
from slothc.errors import RegionDropped
from slothc.view import GraphView


def pairs(x: Tensor, w: Tensor) -> Tensor:
    return torch.vmap(lambda a, b: a * b + torch.tanh(b))(x, w) * 2.0


def moved(x: Tensor, w: Tensor) -> Tensor:
    return torch.vmap(lambda a, b: torch.exp(a) - b, in_dims=(1, 0), out_dims=2)(x, w.transpose(0, 1))


def shared(x: Tensor, w: Tensor) -> Tensor:
    """One operand is the same for all."""
    return torch.vmap(lambda a, b: torch.sigmoid(a) * b, in_dims=(0, None))(x, w[0, 0])


def scanned(x: Tensor, w: Tensor) -> Tensor:
    """A linear recurrence as ``associative_scan`` unrolls it: s = a s' + b."""
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return left[0] * right[0], right[0] * left[1] + right[1]

    return associative_scan(combine, (torch.sigmoid(x), w), dim=1, combine_mode="generic")[1]


def rows(x: Tensor, w: Tensor) -> Tensor:
    return torch.vmap(lambda a, b: a.softmax(-1) * b)(x, w)


def narrower(x: Tensor, w: Tensor) -> Tensor:
    """Operands of fewer dimensions than the result: the new one would be in the wrong place."""
    return torch.vmap(lambda a, b: a * b[0])(x, w)


WHOLE = (pairs, moved, shared, scanned)
LEFT = (rows, narrower)


def draw() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(3, 7, 16).requires_grad_(), torch.randn(3, 7, 16).requires_grad_()]


def calls(graph: fx.Graph) -> set[str]:
    return {getattr(n.target, "__name__", str(n.target)) for n in graph.nodes}


@pytest.mark.parametrize("function", WHOLE, ids=lambda f: f.__name__)
def test_elementwise_operations_need_no_vmap(function: Callable[..., Tensor]) -> None:
    view = GraphView(captured(function, draw()))
    assert batched(view)
    assert not calls(view.graph_module.graph) & {BEGIN, ADD}
    view.graph_module.graph.lint()


@pytest.mark.parametrize("function", LEFT, ids=lambda f: f.__name__)
def test_what_does_more_stays(function: Callable[..., Tensor]) -> None:
    view = GraphView(captured(function, draw()))
    assert not batched(view) and BEGIN in calls(view.graph_module.graph)


@pytest.mark.parametrize("function", [*WHOLE, *LEFT], ids=lambda f: f.__name__)
def test_it_computes_what_eager_computes(function: Callable[..., Tensor]) -> None:
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", RegionDropped)
        for backend in ("eager", "sloth"):
            torch._dynamo.reset()
            x, w = draw()
            y = torch.compile(function, backend=backend)(x, w)
            y.backward(torch.ones_like(y))
            found.append([y.detach(), x.grad, w.grad])
    for ours, eager in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager, rtol=2e-5, atol=1e-5)
