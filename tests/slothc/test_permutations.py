"""Which integers are a permutation by how they are made, and that rows looked up by one get their gradient moved, not summed."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from slothc.kernels import lookup
from torch import Tensor

from slothc.capture import captured
from slothc.errors import RegionDropped
from slothc.permutations import is_permutation
from slothc.view import GraphView

KEYS = torch.tensor([2, 0, 1, 2, 0, 3])


def inverse(p: Tensor) -> Tensor:
    x = torch.empty_like(p)
    x[p] = torch.arange(p.shape[0])
    return x


def partly(keys: Tensor) -> Tensor:
    x = torch.zeros(12, dtype=torch.int64)
    x[keys.argsort()] = torch.arange(6)
    return x


def shifted(keys: Tensor) -> Tensor:
    x = torch.empty_like(keys)
    x[keys.argsort()] = torch.arange(1, 7)
    return x


def twice(keys: Tensor) -> Tensor:
    x = inverse(keys.argsort())
    x[0] = 3
    return x


def through_a_view(keys: Tensor) -> Tensor:
    x = inverse(keys.argsort())
    x.view(2, 3)[0].fill_(1)
    return x


def by_itself(keys: Tensor) -> Tensor:
    x = torch.empty_like(keys)
    x[keys] = torch.arange(6)
    return x


def written_later(keys: Tensor) -> Tensor:
    p = keys.argsort()
    p += 1
    return p


YES: dict[str, Callable[[Tensor], Tensor]] = {
    "argsort": lambda k: torch.argsort(k, descending=True),
    "method": lambda k: k.argsort(stable=True),
    "sort": lambda k: torch.sort(k)[1],
    "of the method": lambda k: k.sort(dim=0)[1],
    "random": lambda k: torch.randperm(k.shape[0]),
    "inverse": lambda k: inverse(k.argsort()),
    "of the inverse": lambda k: inverse(inverse(torch.sort(k)[1])),
    "another width and shape": lambda k: k.argsort().to(torch.int32).view(2, 3),
}
NO: dict[str, Callable[[Tensor], Tensor]] = {
    "values": lambda k: torch.sort(k)[0],
    "rows": lambda k: k.view(2, 3).argsort(-1),
    "few bits": lambda k: k.argsort().to(torch.int8),
    "tokens": lambda k: k.argsort() // 2,
    "a part": lambda k: k.argsort()[1:4],
    "top": lambda k: torch.topk(k, 6)[1],
    "keys": by_itself,
    "partly": partly,
    "shifted": shifted,
    "twice": twice,
    "through a view": through_a_view,
    "written later": written_later,
}


@pytest.mark.parametrize("made, expected", [(f, True) for f in YES.values()] + [(f, False) for f in NO.values()], ids=[*YES, *NO])
def test_by_how_it_is_made(made: Callable[[Tensor], Tensor], expected: bool) -> None:
    graph = captured(lambda keys: made(keys) * 1, [KEYS])
    view = GraphView(graph)
    last = next(n for n in reversed(view.nodes) if n.op == "output").args[0][0]
    assert is_permutation(view, last.args[0]) is expected


def routed(x: Tensor, s: Tensor, keys: Tensor) -> Tensor:
    """Rows sorted by their keys, changed, put back with their weights."""
    p = torch.sort(keys)[1]
    y = torch.tanh(x[p] * 2.0) @ torch.eye(x.shape[1], dtype=x.dtype)
    return (torch.sigmoid(y) * s[p].unsqueeze(-1))[inverse(p)].view(-1, 2, x.shape[1]).sum(1)


def longer(x: Tensor, s: Tensor, keys: Tensor) -> Tensor:
    """A table with more rows than are looked up."""
    return torch.tanh(x[torch.argsort(keys[:4])] * 2.0) * s[:4].unsqueeze(-1)


def in_pairs(x: Tensor, s: Tensor, keys: Tensor) -> Tensor:
    """An index of two dimensions: a row's two places side by side."""
    return (x[keys.argsort().to(torch.int32).view(3, 2)] * s[0]).exp().sum(1)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function, moves", [(routed, 4), (longer, 1), (in_pairs, 1)], ids=lambda f: getattr(f, "__name__", ""))
def test_gradients_are_moved(function: Callable[..., Tensor], moves: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As eager's in float64, within the dtype's rounding, without a sum of rows."""
    seen: list[int] = []
    move = lookup.move_rows
    monkeypatch.setattr(lookup, "move_rows", lambda rows, index, count, dtype: (seen.append(count), move(rows, index, count, dtype))[1])
    monkeypatch.setattr(lookup, "segment_sum", lambda *a, **k: pytest.fail("rows were summed"))
    torch.manual_seed(0)
    values = [torch.randn(6, 20, dtype=dtype), torch.randn(6, dtype=dtype)]
    own = [v.clone().requires_grad_() for v in values]
    exact = [v.double().requires_grad_() for v in values]
    run = torch.compile(function, backend="sloth", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RegionDropped)
        result = run(*own, KEYS)
    seen.clear()
    result.square().sum().backward()
    function(*exact, KEYS).square().sum().backward()
    assert len(seen) == moves
    for got, truth in zip(own, exact):
        assert got.grad is not None and truth.grad is not None
        error = (got.grad.double() - truth.grad).norm() / truth.grad.norm()
        assert float(error) < (1e-6 if dtype == torch.float32 else 2e-2)
