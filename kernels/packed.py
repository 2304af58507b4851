"""fp32 matrices in three bytes an element: sums that are rounded to a low precision later, after a factor that nobody knows yet.

Of the 24 bits of the significand 16 are kept, so that a value is off by 2^-16 of itself at most. bf16 rounds by up to 2^-9 and fp16 by up
to 2^-12, so that the result is off by 1.01 and 1.07 of one rounding at most, where rounding twice would double it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .devices import available
from .handwritten import Kernels
from .joined import LOW

BLOCK = 1024
KERNELS = Kernels("packed_kernel", "keeps gradients in three bytes")


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
        if not _launched("pack", (v, high, low), v.numel()):
            bits = v.view(torch.int32)
            bits = torch.where(v.isnan(), bits, bits + 128)               # a nan is not rounded: it might become a number
            high.copy_(bits >> 16)
            low.copy_((bits >> 8) & 255)

    def scaled(self, by: Tensor, dtype: torch.dtype) -> Tensor:
        """Times ``by`` [] or [m], contiguous, rounded to ``dtype``."""
        out = torch.empty(self.high.shape, dtype=dtype, device=self.high.device)
        if not _launched("scaled", (*self, by, out), out.numel(), out.shape[1], EACH=by.dim() > 0):
            wide = ((self.high.int() << 16) | (self.low.int() << 8)).view(torch.float32)
            out.copy_(wide * (by.unsqueeze(-1) if by.dim() else by))
        return out


def packs(t: Tensor) -> bool:
    """Whether sums that will be of this tensor's dtype are kept so: on an accelerator, where one pass packs them."""
    return t.dtype in LOW and t.device.type != "cpu" and available(t.device)


def _launched(name: str, tensors: tuple[Tensor, ...], total: int, *numbers: int, **constants: bool) -> bool:
    """Whether the kernel has run; False where there is none for the device."""
    options = {**constants, "BLOCK": BLOCK}
    return total > 0 and KERNELS.launch(name, tensors, (-(-total // BLOCK),), (total, *numbers), options)
