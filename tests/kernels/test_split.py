"""fp32 as a sum of low-precision parts: by Triton and by PyTorch, bit for bit."""

from __future__ import annotations

import pytest
import torch
from slothc.kernels import split
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MATRICES = {
    "rows": lambda v: v,
    "columns": lambda v: v.t().contiguous().t(),
    "every other column": lambda v: torch.cat((v, v), 1)[:, ::2],
    "one row": lambda v: v[:1],
    "nothing": lambda v: v[:0],
}


def by_hand(v: Tensor, low: torch.dtype, count: int, dim: int) -> Tensor:
    found = []
    for _ in range(count):
        found.append(v.to(low))
        v = v - found[-1].float()
    return torch.cat(found, dim)


@pytest.mark.usefixtures("triton_kernels")
@pytest.mark.parametrize("low", [torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])], ids=str)    # the interpreter truncates
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", MATRICES)
def test_the_kernel_splits_as_torch_does(name: str, dim: int, low: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split, "available", lambda device: True)
    v = MATRICES[name](torch.randn(37, 50, generator=torch.Generator().manual_seed(1))).to(DEVICE)
    for count in (2, 3):
        assert torch.equal(split.parts(v, low, count, dim), by_hand(v, low, count, dim))


@pytest.mark.parametrize("count, left", [(2, 2.0**-16), (3, 2.0**-23)])
def test_parts_of_bf16_hold_fp32(count: int, left: float) -> None:
    v = torch.randn(64, 64, device=DEVICE)
    whole = split.parts(v, torch.bfloat16, count, 0).float().view(count, 64, 64).flip(0).sum(0)
    assert float(((whole - v) / v).abs().max()) <= left
