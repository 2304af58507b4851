"""fp32 matrices as sums of low-precision ones, so that the matrix units multiply them without losing bits."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .devices import available
from .direct import Direct
from .tracing import traced

BLOCK = 1024
KEPT = 256
_records: dict[tuple[Any, ...], Direct] = {}


def parts(v: Tensor, low: torch.dtype, count: int, dim: int) -> Tensor:
    """[v1 v2 ..] side by side along ``dim`` of v [m, n], v = v1 + v2 + .. each the rounding of what those before it leave.

    Three parts of bf16 hold all 24 bits of an fp32, two all but 2^-17. One launch where the device has Triton.
    """
    if v.dtype is torch.float32 and not traced(v) and available(v.device) and v.numel():
        return _launched(v, low, count, dim)
    found = []
    for _ in range(count):
        found.append(v.to(low))
        v = v - found[-1]
    return torch.cat(found, dim)


def _launched(v: Tensor, low: torch.dtype, count: int, dim: int) -> Tensor:
    (m, n), (s0, s1) = v.shape, v.stride()
    inner = 0 if s0 == 1 and s1 != 1 else 1                               # the parts lie as v does
    out = torch.empty((m * count, n) if dim == 0 else (m, n * count), dtype=low, device=v.device)
    if not inner:
        out = out.new_empty(out.shape[::-1]).t()
    key = (v.device, low, count, dim, m, n, s0, s1)
    run = _records.get(key)
    if run is None:
        step = out.stride(dim) * v.shape[dim]
        rows, columns = (m, n) if inner else (n, m)
        strides = (s0, s1, *out.stride()) if inner else (s1, s0, *out.stride()[::-1])
        if len(_records) > KEPT:
            _records.clear()
        grid = (-(-rows * columns // BLOCK),)
        run = _records[key] = Direct(_kernel(), grid, [rows * columns, columns, *strides, step], dict(COUNT=count, BLOCK=BLOCK), v.device)
    run((v, out))
    return out


@functools.cache
def _kernel() -> Any:
    from . import split_kernel

    return split_kernel.split


