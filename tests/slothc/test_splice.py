"""Where rewritten nodes stand: values written to in place are read when they were, and results of several kernels never cross."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from processor import DEVICE
from slothc.kernels import rowwise_op
from torch import Tensor

import slothc  # noqa: F401
from slothc.errors import RegionDropped


def written_between(x: Tensor, w: Tensor) -> Tensor:
    buffer = torch.zeros_like(x)
    buffer.copy_(x)
    read = buffer * w
    buffer.add_(1.0)
    return torch.sigmoid(read) * read


def written_before(x: Tensor, w: Tensor) -> Tensor:
    buffer = torch.zeros_like(x)
    buffer[:, 1:] = x[:, :-1]
    read = buffer * w
    return torch.sigmoid(read) * read + buffer


def crossing(x: Tensor, w: Tensor) -> Tensor:
    """Two chains of sums that read each other's values, as recurrent mixers do."""
    a, b, total = x * w, x + w, torch.zeros_like(x)
    for k in range(4):
        low = torch.maximum(a, b + k)
        left, right = torch.exp(a - low), torch.exp(b - low)
        a, b = left * a + right * b, left + right * x
        total = total + a / (b * b + 1.0)
    return total + a * b


@pytest.mark.parametrize("function", [written_between, written_before, crossing])
def test_it_computes_what_eager_computes(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(3, 7, 16), torch.randn(16)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RegionDropped)
        fast = torch.compile(function, backend="sloth")
        results = []
        for run in (fast, function):
            leaf = x.clone().requires_grad_()
            y = run(leaf, w)
            y.backward(torch.ones_like(y))
            results.append((y.detach(), leaf.grad))
    for ours, eager in zip(*results):
        torch.testing.assert_close(ours, eager, rtol=2e-5, atol=2e-6)


def test_numbers_on_the_cpu_beside_tensors_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's own operations take a CPU tensor without dimensions beside any other; a kernel reads it on its own device."""
    def norm(x: Tensor, w: Tensor, g: Tensor) -> Tensor:
        third = torch.tensor(1.0) / 3.0
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w * g + third

    def seen(plan: object) -> Callable[..., Tensor]:
        def run(*operands: Tensor) -> Tensor:
            places.append({t.device.type for t in operands})
            return call(*operands)

        call = ours(plan)  # type: ignore[arg-type]
        return run

    ours, places, elsewhere = rowwise_op.call, list[set[str]](), "cuda" if DEVICE == "cuda" else "meta"
    monkeypatch.setattr(rowwise_op, "call", seen)
    torch.manual_seed(0)
    x, w, g = torch.randn(3, 7, 16), torch.randn(16), torch.tensor(1.5)
    torch._dynamo.reset()
    results = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", RegionDropped)
        for run in (torch.compile(norm, backend="sloth"), norm):
            leaves = [t.clone().requires_grad_() for t in (x.to(elsewhere), w.to(elsewhere))]
            number = g.clone().requires_grad_(elsewhere != "meta")         # there is no way back from meta
            y = run(*leaves, number)
            results.append([y, *torch.autograd.grad(y, leaves + [number] * number.requires_grad, torch.ones_like(y))])
    assert places and all(p == {elsewhere} for p in places)
    for a, b in zip(*results):
        assert (a.shape, a.device) == (b.shape, b.device)
        if elsewhere != "meta":
            torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-6)
