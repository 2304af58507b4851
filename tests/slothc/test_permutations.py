"""Which integers are a permutation by how they are made, and that rows looked up by one get their gradient moved, not summed."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from slothc.kernels import lookup
from torch import Tensor

from slothc import lift_loader, structure
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


def a_copy_written_later(keys: Tensor) -> Tensor:
    q = keys.argsort().clone()
    q += 1
    return q


def a_copy_of_the_inverse_written_later(keys: Tensor) -> Tensor:
    q = inverse(keys.argsort()).clone()
    q[0] = 3
    return q


def few_bits(keys: Tensor) -> Tensor:
    x = torch.empty(6, dtype=torch.int8)
    x[keys.argsort()] = torch.arange(6, dtype=torch.int8)
    return x.long()


def argsort(keys: Tensor) -> Tensor:
    return keys - keys


another_librarys = torch.compiler.allow_in_graph(argsort)

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
    "a copy written later": a_copy_written_later,
    "a copy of the inverse written later": a_copy_of_the_inverse_written_later,
    "an inverse in few bits": few_bits,
    "another library's": another_librarys,
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
    """Without a sum of rows, and with the bits of one: a sum of one row in fp32, rounded, is that row rounded."""
    moved: list[int] = []
    move = lookup.move_rows
    monkeypatch.setattr(lookup, "move_rows", lambda rows, index, count, dtype: (moved.append(count), move(rows, index, count, dtype))[1])
    torch.manual_seed(0)
    values = [torch.randn(6, 20, dtype=dtype), torch.randn(6, dtype=dtype)]

    def gradients() -> list[Tensor | None]:
        own = [v.clone().requires_grad_() for v in values]
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("error", RegionDropped)
            result = torch.compile(function, backend="sloth", fullgraph=True)(*own, KEYS)
        moved.clear()
        result.square().sum().backward()
        return [v.grad for v in own]

    with monkeypatch.context() as patch:
        patch.setattr(lookup, "segment_sum", lambda *a, **k: pytest.fail("rows were summed"))
        found = gradients()
        assert len(moved) == moves
    for module in (lift_loader, structure):
        monkeypatch.setattr(module, "is_permutation", lambda view, node: False)
    summed = gradients()
    assert not moved
    exact = [v.double().requires_grad_() for v in values]
    function(*exact, KEYS).square().sum().backward()
    for got, other, truth in zip(found, summed, exact):
        assert got is not None and other is not None and truth.grad is not None and torch.equal(got, other)
        if dtype is torch.float32:
            assert float((got.double() - truth.grad).norm() / truth.grad.norm()) < 1e-6


@pytest.mark.usefixtures("triton_kernels")
def test_a_padding_row_gets_no_gradient_whatever_looks_it_up() -> None:
    def function(table: Tensor, keys: Tensor) -> Tensor:
        return torch.tanh(torch.nn.functional.embedding(keys.argsort(), table, padding_idx=1)) * 2.0

    tables = [torch.randn(6, 20, generator=torch.Generator().manual_seed(0)).requires_grad_() for _ in range(2)]
    for run, table in zip((torch.compile(function, backend="sloth", options={"verify": "off"}), function), tables):
        run(table, KEYS).sum().backward()
    torch.testing.assert_close(tables[0].grad, tables[1].grad)
    assert tables[0].grad is not None and not tables[0].grad[1].any()


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("sorts", [(True, False), (False, True)])
def test_a_formula_found_for_a_permutation_is_not_taken_for_other_integers(sorts: tuple[bool, bool]) -> None:
    """Graphs are looked at one after another in a process: the same nodes over an index that reads rows twice sum both gradients."""
    for sort in sorts:

        def function(x: Tensor, s: Tensor, keys: Tensor, sort: bool = sort) -> Tensor:
            return torch.tanh(x[keys.argsort() if sort else keys] * 2.0) * s.unsqueeze(-1)

        torch._dynamo.reset()
        grads = []
        for run in (torch.compile(function, backend="sloth"), function):
            values = [torch.linspace(-1, 1, n).view(6, -1).requires_grad_() for n in (120, 6)]
            run(values[0], values[1][:, 0], KEYS).sum().backward()
            grads.append([v.grad for v in values])
        torch.testing.assert_close(*grads)
