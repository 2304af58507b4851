"""Matrix products of the vocabulary family: low-precision operands, fp32 results."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

TILE = 4096
"""Rows or columns widened at once where the device has no product of low-precision operands with an fp32 result."""


@lru_cache(maxsize=64)
def has_wide_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``torch.addmm(..., out_dtype=torch.float32)`` works in place for ``dtype`` operands on ``device``."""
    if device.type == "cpu":
        return False
    a, out = torch.ones(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
        torch.mm(a, a, out_dtype=torch.float32, out=out)
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True


def linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """out = x W^T + b, rounded once to its dtype, as ``torch.nn.functional.linear`` does."""
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def adapted_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, low: Tensor, up: Tensor, scale: float) -> None:
    """out = x W^T + b + s low up^T, summed in fp32 and rounded once. The adapter comes first: its own roundings are relative to itself."""
    wide = x.new_empty(x.shape[0] * min(TILE, out.shape[1]), dtype=torch.float32)
    for start in range(0, out.shape[1], TILE):
        at = slice(start, min(start + TILE, out.shape[1]))
        part = wide[: x.shape[0] * (at.stop - start)].view(x.shape[0], -1)
        product_into(part, low, up[at].t(), add=False)
        part.mul_(scale)
        product_into(part, x, weight[at].t(), add=True)
        out[:, at] = part if bias is None else part.add_(bias[at])


def product_into(out: Tensor, a: Tensor, b: Tensor, *, add: bool) -> None:
    """out (+)= a b, with ``out`` fp32, a [m, k] and b [k, n] of one dtype."""
    if a.dtype == out.dtype:
        torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    elif has_wide_product(a.device, a.dtype):
        if add:
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        _product_in_tiles(out, a, b, add)


def _product_in_tiles(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """The same with operands widened tile by tile, along whichever of m and k is longer."""
    rows, inner = a.shape
    if rows >= inner:
        wide = b.to(out.dtype)
        for start in range(0, rows, TILE):
            part = out[start : start + TILE]
            torch.addmm(part, a[start : start + TILE].to(out.dtype), wide, beta=int(add), out=part)
        return
    for start in range(0, inner, TILE):
        left, right = a[:, start : start + TILE].to(out.dtype), b[start : start + TILE].to(out.dtype)
        torch.addmm(out, left, right, beta=int(add or start > 0), out=out)
