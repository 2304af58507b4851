"""Frozen weights held in four bits, made whole where they are multiplied and not kept (QLoRA, arXiv:2305.14314).

    W[n, k] = table[q[n, k]] s[(n K + k) // blocksize]

with a table of 16 values (``kind``), and one scale s for each block of a row-major [N, K]. Of a ``nested`` one the scales are themselves
held in eight bits, s[j] = code[s8[j]] s2[j // 256] + offset. The formats are bitsandbytes', and so is W to the bit: where Triton has a
device one kernel makes it out of all parts, elsewhere the library does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import FunctionType

import torch
from torch import Tensor

from .handwritten import Kernels
from .tracing import traced

NESTED = 256          # scales that share one of their own
PROGRAM = 2048        # bytes of q that one makes whole
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KERNELS = Kernels("four_bit_kernel", "makes weights of four bits whole")


@dataclass(frozen=True)
class FourBit:
    """What is static of a weight [N, K] in four bits; ``dtype`` is what it is made in."""

    shape: tuple[int, int]
    blocksize: int
    kind: str
    nested: bool
    dtype: torch.dtype

    @property
    def operands(self) -> tuple[str, ...]:
        """What it is held in: Q uint8 [N K / 2], two values in each, S fp32 scales; nested: S uint8, then S2, C (code) and O (offset)."""
        return ("Q", "S", "S2", "C", "O") if self.nested else ("Q", "S")

    def whole(self, q: Tensor, s: Tensor, *nested: Tensor) -> Tensor:
        """W [N, K] from its ``operands``. Raises ValueError where they are of another size: the library would read past their ends."""
        library, count = torch.ops.bitsandbytes, self.shape[0] * self.shape[1]
        blocks = -(-count // self.blocksize)
        if q.nbytes != -(-count // 2) or s.numel() != blocks or (self.nested and nested[0].numel() != -(-blocks // NESTED)):
            sizes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in zip(self.operands, (q, s, *nested)))
            raise ValueError(f"a weight {self.shape} in four bits, blocks of {self.blocksize}, is not held in {sizes}")
        w = self._launched(q, s, *nested)
        if w is not None:
            return w
        if self.nested:
            s2, code, offset = nested
            s = library.dequantize_blockwise.default(s, s2, code, NESTED, torch.float32).add_(offset)
        return library.dequantize_4bit.default(q.reshape(-1, 1), s, self.blocksize, self.kind, self.shape, self.dtype)

    def _launched(self, q: Tensor, s: Tensor, *nested: Tensor) -> Tensor | None:
        """W by one kernel; None where there is none for the device, or for a form that it does not read."""
        parts, half = (q, s, *nested), self.blocksize // 2
        even = self.shape[0] * self.shape[1] % 2 == 0 and half & (half - 1) == 0 and 0 < half <= PROGRAM and self.dtype in DTYPES
        if not even or traced(*parts) or not KERNELS.here(q.device) or not all(t.is_contiguous() for t in parts):
            return None
        w = torch.empty(self.shape, dtype=self.dtype, device=q.device)
        s2, code, offset = nested or (s, s, s)
        blocks, nbytes = PROGRAM // half, q.nbytes
        options = {"HALF": half, "SHARED": NESTED, "NESTED": self.nested, "BLOCKS": blocks, "num_warps": 1, "enable_fp_fusion": False}
        tensors = (q.view(torch.uint8), s, s2, code, offset, table(self.kind, q.device), w)
        return w if KERNELS.launch("whole", tensors, (-(-nbytes // PROGRAM),), (nbytes,), options) else None


@cache
def table(kind: str, device: torch.device) -> Tensor:
    """The 16 values of a format, fp32, as the library has them: what it makes of each number of four bits beside a scale of one."""
    numbers = torch.arange(0, 16, 2, device=device)
    pairs = (numbers << 4 | numbers + 1).to(torch.uint8).reshape(-1, 1)
    one = torch.ones(1, device=device)
    return torch.ops.bitsandbytes.dequantize_4bit.default(pairs, one, 64, kind, (16,), torch.float32)


@cache
def maker(form: FourBit) -> Callable[..., Tensor]:
    """``form.whole`` as a function that a graph can call; ``form_of`` gives the form back."""

    def whole(*held: Tensor) -> Tensor:
        return form.whole(*held)

    whole.form = form                                                     # type: ignore[attr-defined]
    return whole


def form_of(target: object) -> FourBit | None:
    """The form whose ``maker`` the function is; None for any other."""
    form = getattr(target, "form", None) if isinstance(target, FunctionType) else None
    return form if isinstance(form, FourBit) else None


@dataclass(frozen=True)
class Held:
    """A weight as an argument, in the form that it is kept in."""

    form: FourBit
    operands: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.form.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.form.dtype

    def whole(self) -> Tensor:
        """W [N, K]."""
        return self.form.whole(*self.operands)


def taken(form: FourBit | None, operands: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """(W, the other operands) of ``operands`` that begin with a weight, whole (``form`` None) or in four bits."""
    count = 1 if form is None else len(form.operands)
    return operands[0] if form is None else form.whole(*operands[:count]), operands[count:]
