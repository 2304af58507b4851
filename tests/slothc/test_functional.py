"""Writes in place as values: what is fused, what stays in place, and that neither changes a result or a gradient."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from slothc.capture import captured
from slothc.errors import RegionDropped
from slothc.functional import functional
from slothc.options import Options
from slothc.rewrite import rewrite
from slothc.view import GraphView
from slothc.written import write_into, written


def joined(x: Tensor, w: Tensor) -> Tensor:
    k = x.new_empty(*x.shape[:-1], 32)
    k[..., :16].copy_(x)
    k[..., 16:] = torch.tanh(x) * w
    return k * 2.0


def added(x: Tensor, w: Tensor) -> Tensor:
    h = x @ torch.ones(16, 16)
    h += w
    h.mul_(2.0)
    return torch.tanh(h) * x


def added_through_a_view(x: Tensor, w: Tensor) -> Tensor:
    h = (x @ torch.ones(16, 16)).permute(1, 0, 2)
    h += w
    return torch.tanh(h.permute(1, 0, 2)) * x


def rows(x: Tensor, w: Tensor) -> Tensor:
    h = torch.stack((x * w, torch.tanh(x), x))
    h[1:] += x * 3.0
    return h * 2.0


def filled(x: Tensor, w: Tensor) -> Tensor:
    h = x * w
    h[..., 8:].zero_()
    h[..., :4].fill_(0.25)
    h[..., 4:6] = -1.0
    return h * x


def element(x: Tensor, w: Tensor) -> Tensor:
    h = x * 1.5
    h[:, 2] = w * 2.0
    h[:, 0].mul_(3.0)
    return h + x


def renamed(x: Tensor, w: Tensor) -> Tensor:
    """``contiguous`` and ``type_as`` where nothing moves: two more names of one memory."""
    h = x * w
    h += x
    k = h.contiguous().type_as(x)
    first = k[0].clone()
    k[1:] += torch.tanh(first)
    return k * 2.0 + h


def carried(x: Tensor, w: Tensor) -> Tensor:
    """A state is read through a view, for a result that is finished after it was written to (RWKV's)."""
    state = torch.ones(3, 16, 2)
    old, out = state[:, :, 0], torch.zeros_like(x)
    out[:, 0] = old + x[:, 0] * w
    out[:, 1] = torch.tanh(old + x[:, 1])
    state[:, :, 0] = old @ torch.ones(16, 16) + x.sum(1)
    return (torch.sigmoid(x @ torch.ones(16, 16)) * out) @ torch.ones(16, 2) + (state @ torch.ones(2, 2)).sum(1, keepdim=True)


def steps(x: Tensor, w: Tensor) -> Tensor:
    """Every other lane: no affine piece, so the write stays what it was."""
    h = x @ torch.ones(16, 16)
    h[..., ::2] = w[::2]
    return h @ torch.ones(16, 4)


def stale(x: Tensor, w: Tensor) -> Tensor:
    h = x * w
    low = h[..., :8]
    h.add_(1.0)
    return torch.cat((low, low), dim=-1) * x + h


def moved(x: Tensor, w: Tensor) -> Tensor:
    """``contiguous`` where it copies: memory of its own."""
    h = (x * w).transpose(0, 1)
    k = h.contiguous()
    h[..., ::2] = w[::2]
    return (torch.tanh(k) + h).transpose(0, 1) * x


def narrower(x: Tensor, w: Tensor) -> Tensor:
    h = torch.exp(x * w).to(torch.bfloat16)
    h += w
    return h.float() * x


def without_gradient(x: Tensor, w: Tensor) -> Tensor:
    h = x * w
    with torch.no_grad():
        h.mul_(2.0)
    return h + x


def outside(x: Tensor, w: Tensor) -> Tensor:
    """The caller sees what is written to an argument."""
    w.mul_(2.0)
    return torch.tanh(x * w) + x


VALUES = (joined, added, added_through_a_view, rows, filled, element, renamed, carried, steps)
LEFT = (stale, narrower, without_gradient, outside)


def view_of(function: Callable[..., Tensor]) -> GraphView:
    x, w = torch.randn(3, 7, 16).requires_grad_(), torch.randn(16)
    return GraphView(captured(function, [x, w if function is outside else w.requires_grad_()]))


def names(graph: fx.Graph) -> list[str]:
    return [getattr(n.target, "__name__", str(n.target)) for n in graph.nodes]


def check(function: Callable[[Tensor, Tensor], Tensor], backward: bool = True) -> None:
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RegionDropped)
        fast = torch.compile(function, backend="sloth")
        found = []
        torch.manual_seed(0)
        x, w = torch.randn(3, 7, 16), torch.randn(16)
        for run in (fast, function):
            a, b = x.clone().requires_grad_(), w.clone().requires_grad_(function is not outside)
            with torch.set_grad_enabled(backward):
                y = run(a, b)
            if backward:
                y.backward(torch.ones_like(y))
            found.append([y.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in (a, b))])
    for ours, eager in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("function", [*VALUES, *LEFT, moved], ids=lambda f: f.__name__)
def test_it_computes_what_eager_computes(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    check(function)


@pytest.mark.parametrize("function", VALUES, ids=lambda f: f.__name__)
def test_writes_become_values(function: Callable[..., Tensor]) -> None:
    view = view_of(function)
    assert functional(view)
    again = view.again()
    assert not any(again.op(n).params.get("mutates") for n in again.nodes)


@pytest.mark.parametrize("function", LEFT, ids=lambda f: f.__name__)
def test_what_others_could_tell_stays(function: Callable[..., Tensor]) -> None:
    view = view_of(function)
    before = names(view.graph_module.graph)
    assert not functional(view)
    assert names(view.graph_module.graph) == before


def test_a_join_is_part_of_a_region() -> None:
    found = rewrite(view_of(joined).graph_module, Options(), run=False).found
    (region,) = found.regions
    assert {"written", "tanh", "mul"} <= {getattr(n.target, "__name__", str(n.target)) for n in region.cone.nodes}


def test_what_no_region_takes_is_written_in_place_again() -> None:
    module = view_of(steps).graph_module
    rewrite(module, Options())
    assert "write_into" in names(module.graph) and "written" not in names(module.graph)


def test_what_a_region_reads_through_a_view_is_not_overwritten_before_it() -> None:
    module, x, w = view_of(carried).graph_module, torch.randn(3, 7, 16), torch.randn(16)
    used = rewrite(module, Options(disable=frozenset({"rowwise"}))).used           # the gated product alone: the state's write stays
    assert used and "written" in names(module.graph)
    torch.testing.assert_close(module(x, w)[0], carried(x, w))


def test_the_functions_themselves() -> None:
    x = torch.zeros(2, 4)
    y = written(x, (Ellipsis, slice(1, 3)), 2.0)
    assert y.tolist() == [[0, 2, 2, 0]] * 2 and not x.any()
    assert write_into(x, (slice(None), 0), torch.ones(2)) is x and x[:, 0].tolist() == [1, 1]
    assert write_into(x, (Ellipsis,), torch.ones(1)).sum() == 8


STEPS = ("h += {v}", "h.mul_({v})", "h[..., {a}:{b}] = {v}", "h[..., {a}:{b}].copy_({v}[..., {a}:{b}])", "h[{r}] -= {v}[{r}]",
         "h[:, {r}:] *= 0.5", "t = t + h", "h = torch.tanh(h)", "h[..., {a}:{b}].fill_(0.5)", "h.neg_()",
         "o = h[{r}]; t = t + torch.tanh(o); h[{r}] = o @ e + {v}[{r}]", "t = torch.sigmoid(t @ e) * t", "h = h @ e")  # fmt: skip


STEP = st.tuples(st.sampled_from(STEPS), st.integers(0, 15), st.integers(1, 16), st.integers(0, 2), st.sampled_from("xzw"))


@settings(max_examples=25, deadline=None)
@given(st.lists(STEP, max_size=6))
def test_any_order_of_writes_and_reads(steps: list[tuple[str, int, int, int, str]]) -> None:
    lines = []
    for step, a, b, r, v in steps:
        value = {"x": "x", "z": "(x * 2.0)", "w": "w.expand(3, 7, 16)"}[v]
        lines.append(step.format(a=min(a, b - 1), b=b, r=r, v=value))
    text = "\n    ".join(["h, t, e = torch.sin(x) * w, x, torch.eye(16)", *lines, "return h * 2.0 + t"])
    scope: dict[str, Callable[..., Tensor]] = {}
    exec(f"import torch\ndef function(x, w):\n    {text}\n", scope)
    x, w = torch.randn(3, 7, 16).requires_grad_(), torch.randn(16)
    try:
        y = scope["function"](x, w)
    except RuntimeError:                                                   # shapes that do not fit
        return
    try:
        y.sum().backward()
    except RuntimeError:                                                   # a value that autograd keeps is written to
        check(scope["function"], backward=False)
        return
    check(scope["function"])
