"""fp32 matrices in three bytes an element: sums that are rounded to a low precision later, after a factor that nobody knows yet.

Of the 24 bits of the significand 16 are kept, so that a value is off by 2^-16 of itself at most. bf16 rounds by up to 2^-9 and fp16 by up
to 2^-12, so that the result is off by 1.01 and 1.07 of one rounding at most, where rounding twice would double it.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .direct import Direct
from .triton_launch import available

LOW = (torch.bfloat16, torch.float16)
BLOCK = 1024
KEPT = 256
_records: dict[tuple[Any, ...], Direct] = {}


class Packed(NamedTuple):
    """``high`` [m, n] int16 and ``low`` [m, n] uint8: bits 31 to 16 and 15 to 8 of fp32 values."""

    high: Tensor
    low: Tensor

    @staticmethod
    def empty(shape: torch.Size, device: torch.device) -> Packed:
        return Packed(torch.empty(shape, dtype=torch.int16, device=device), torch.empty(shape, dtype=torch.uint8, device=device))

    def put(self, start: int, v: Tensor) -> None:
        """Rows ``start`` and on are those of v [k, n], fp32."""
        high, low = (t[start : start + v.shape[0]] for t in self)
        if v.numel():
            _launch("pack", (v, high, low), v.numel())

    def scaled(self, by: Tensor, dtype: torch.dtype) -> Tensor:
        """Times ``by`` [] or [m], rounded to ``dtype``."""
        out = torch.empty(self.high.shape, dtype=dtype, device=self.high.device)
        if out.numel():
            _launch("scaled", (*self, by, out), out.numel(), out.shape[1], EACH=by.dim() > 0)
        return out


def packs(t: Tensor) -> bool:
    """Whether sums that will be of this tensor's dtype, on its device, can be kept so."""
    return t.dtype in LOW and available(t.device) and t.device.type != "cpu"


def _launch(name: str, tensors: tuple[Tensor, ...], total: int, *numbers: int, **constants: bool) -> None:
    key = (name, tensors[0].device, total, *numbers, *constants.values(), *(t.dtype for t in tensors))
    run = _records.get(key)
    if run is None:
        if len(_records) > KEPT:
            _records.clear()
        grid = (-(-total // BLOCK),)
        run = _records[key] = Direct(_kernel(name), grid, [total, *numbers], dict(**constants, BLOCK=BLOCK), tensors[0].device)
    run(tensors)


@cache
def _kernel(name: str) -> Any:
    from . import packed_kernel

    return getattr(packed_kernel, name)
