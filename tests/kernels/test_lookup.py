"""Rows looked up inside a region: embeddings, routed tokens, elements picked along a row; values and gradients against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import Case, case, hold
from hypothesis import given, settings
from hypothesis import strategies as st
from slothc.kernels import handwritten, rowwise
from torch import Tensor

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TRUNCATED = 2**-6                     # see test_rowwise
LOWERINGS = ("torch", "triton")

pytestmark = pytest.mark.usefixtures("triton_kernels")


def embedded(ids: Tensor, table: Tensor, w: Tensor) -> Tensor:
    h = F.embedding(ids, table)
    return w * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-3)


def padding(ids: Tensor, table: Tensor) -> Tensor:
    return torch.tanh(F.embedding(ids, table, padding_idx=1)) * 2.0


def padding_in_columns(ids: Tensor, table: Tensor) -> Tensor:
    """As an adapter on an embedding has its table: [rank, vocabulary]."""
    return torch.tanh(F.embedding(ids, table.T, padding_idx=1)) * 2.0


def routed(x: Tensor, s: Tensor, index: Tensor) -> Tensor:
    """Weighted rows of experts, put back in the tokens' order and summed over each token's experts."""
    return (x * s.unsqueeze(-1))[index].view(6, 2, 24).sum(1)


def columns(x: Tensor, index: Tensor) -> Tensor:
    return torch.tanh(x[:, index] * 1.5) + 1.0


def selected(x: Tensor, index: Tensor) -> Tensor:
    return torch.index_select(x, 1, index).exp() * 0.5


def from_the_end(x: Tensor, index: Tensor) -> Tensor:
    return torch.sigmoid(x[index]) * 2.0


def picked(x: Tensor, index: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(x).gather(-1, index) * w


def picked_rows(x: Tensor, index: Tensor) -> Tensor:
    return torch.gather(x, 0, index) * 2.0 + 1.0


def drawn(function: Callable[..., Any], dtype: torch.dtype) -> list[Tensor]:
    def real(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=DEVICE)

    def index(most: int, *shape: int) -> Tensor:
        return torch.randint(0, most, shape, device=DEVICE)

    return {
        embedded: lambda: [index(7, 2, 5), real(7, 24), real(24)],
        padding: lambda: [index(3, 2, 5), real(3, 24)],
        padding_in_columns: lambda: [index(3, 2, 5), real(24, 3)],
        routed: lambda: [real(12, 24), real(12), torch.randperm(12, device=DEVICE)],
        columns: lambda: [real(4, 9, 24), index(9, 5)],
        selected: lambda: [real(4, 9, 24), index(9, 5)],
        from_the_end: lambda: [real(12, 24), index(12, 2, 3) - torch.tensor([[0], [12]], device=DEVICE)],
        picked: lambda: [real(4, 9, 24), index(24, 4, 9, 6), real(6)],
        picked_rows: lambda: [real(7, 24), index(7, 5, 24)],
    }[function]()


FUNCTIONS = (embedded, padding, padding_in_columns, routed, columns, selected, from_the_end, picked, picked_rows)


def lifted(function: Callable[..., Any], dtype: torch.dtype) -> Case:
    return case(function, drawn(function, dtype))


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_results_and_gradients(
    function: Callable[..., Any], dtype: torch.dtype, lowering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handwritten, "available", lambda device: lowering == "triton")
    c = lifted(function, dtype)
    assert any(o.lookup for o in c.plan.forward.reads)
    cut = TRUNCATED if lowering == "triton" and dtype == torch.bfloat16 and not CUDA else 0.0
    hold(c, lowering, lambda: drawn(function, dtype), more=cut)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_other_sizes_and_strides(lowering: str) -> None:
    """One plan for every number of rows, tables of any size and layout, indices of either width."""
    c = lifted(embedded, torch.float32)
    for rows, size in ((1, 3), (37, 500)):

        def draw(rows: int = rows, size: int = size) -> list[Tensor]:
            ids = torch.randint(0, size, (rows, 4), device=DEVICE).T
            return [ids, torch.randn(24, size, device=DEVICE).T, torch.randn(24, device=DEVICE)]

        hold(c, lowering, draw, draws=1)


def operands(c: Case, arguments: Sequence[Tensor]) -> list[Tensor]:
    return [arguments[k].detach() for k in c.places]


def test_an_index_outside_the_table_is_never_a_value() -> None:
    """PyTorch raises; a kernel cannot, and gives NaN."""
    c, arguments = lifted(embedded, torch.float32), drawn(embedded, torch.float32)
    arguments[0][1, 2] = 7
    launcher = rowwise.launcher(c.plan.forward)
    if not CUDA:
        with pytest.raises(IndexError):
            launcher.torch(operands(c, arguments))
    result = launcher.triton(operands(c, arguments))[0]
    assert result[1, 2].isnan().all() and int(result.isnan().any(-1).sum()) == 1


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_rows_in_any_order(data: st.DataObject) -> None:
    """Tokens looked up by a random index, once, many times or never, forward and backward."""
    size, count = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 12))
    rows = torch.tensor(data.draw(st.lists(st.integers(-size, size - 1), min_size=count, max_size=count)), device=DEVICE)

    def function(x: Tensor, index: Tensor) -> Tensor:
        return torch.tanh(x)[index] * 1.5

    def draw() -> list[Tensor]:
        return [torch.randn(size, 8, device=DEVICE), rows]

    hold(case(function, draw()), data.draw(st.sampled_from(LOWERINGS)), draw, draws=1, more=1e-6)
