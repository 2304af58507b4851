"""Sums of matrix products with one rounding: each product is accumulated in fp32 and the sum is rounded to its dtype
once.

Operands are fp32 or fp64, or a low dtype (bf16, fp16), mixed freely. A GEMM that accumulates onto a low-precision
tensor adds that tensor in fp32 and rounds the sum on some devices (oneDNN post-ops) and rounds twice on others
(cuBLAS on Hopper): ``joined`` knows which and keeps to one rounding. An fp32 operand next to bf16 ones is split into
bf16 parts, each the rounding of what the parts before it leave, so that the GEMM stays in bf16, with fp32 sums: three
parts hold all 24 bits, two (off by at most 2^-17) do where the result is rounded to bf16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from .joined import joined, rounds_once, takes_wide
from .split import parts

LOW = (torch.bfloat16, torch.float16)
ALIGN = 64  # columns; a GEMM's inner size in whole tiles
SPAN = 512  # inner elements that a matrix unit sums by itself: its running sum is cut short of fp32's rounding at every step


@dataclass(frozen=True)
class Ones:
    """A column of ones (a row if ``transposed``), one for each token."""

    rows: int
    transposed: bool = False

    def t(self) -> Ones:
        return Ones(self.rows, not self.transposed)


Matrix = Any  # a tensor or Ones: both can be transposed and multiplied here
Term = tuple[float, Matrix, Matrix]


@cache
def native(device: str, dtype: torch.dtype) -> bool:
    """Whether the device multiplies this dtype with fp32 accumulation and rounds once, accumulated tensor included."""
    if dtype not in LOW or device != "cpu":
        return True
    return (
        dtype is torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


@cache
def widens(device: torch.device) -> bool:
    """Whether ``mm`` of low-precision operands can return its fp32 sums on this device."""
    return _accepts(device, lambda a: torch.mm(a, a, out_dtype=torch.float32))


@cache
def widens_onto(device: torch.device) -> bool:
    """Whether ``addmm`` of low-precision operands can add onto an fp32 matrix on this device."""
    return _accepts(device, lambda a: torch.addmm(a.float(), a, a, out_dtype=torch.float32))


def _accepts(device: torch.device, probe: Callable[[torch.Tensor], torch.Tensor]) -> bool:
    if device.type == "meta":
        return False
    try:
        with torch.utils._python_dispatch._disable_current_modes():
            return probe(torch.zeros(16, 16, dtype=torch.bfloat16, device=device)).dtype is torch.float32
    except (RuntimeError, TypeError, NotImplementedError):
        return False


def product(
    a: Matrix, b: Matrix, alpha: float = 1.0, dtype: torch.dtype | None = None, long: bool = False
) -> torch.Tensor:
    """alpha * a @ b for a [m, k], b [k, n], rounded once to ``dtype`` (default: the wider operand's).

    ``long``: the inner size counts tokens, so that even partial sums must stay in fp32.
    """
    if isinstance(b, Ones):
        total = torch.sum(a, 1, keepdim=True, dtype=torch.promote_types(a.dtype, torch.float32))
        return (total if alpha == 1 else total.mul_(alpha)).to(dtype or a.dtype)
    if isinstance(a, Ones):
        return (b if alpha == 1 else b * alpha).to(dtype or b.dtype).expand(a.rows, -1)
    dtype = dtype or torch.promote_types(a.dtype, b.dtype)
    device = a.device
    if a.dtype != b.dtype:
        return _mixed(a, b, alpha).to(dtype)
    if a.dtype in LOW:
        if not native(device.type, a.dtype):
            return _gemm(a.float(), b.float(), alpha, dtype)
        if long and dtype is a.dtype and widens(device):
            return rounded(torch.mm(a, b, out_dtype=torch.float32), alpha, dtype)
        return _gemm(a, b, alpha, dtype)
    if dtype is torch.bfloat16 and native(device.type, dtype):
        left, right = _joined(_pairs(alpha, a, b, dtype))
        return torch.mm(left, right)
    return _gemm(a, b, alpha, dtype)


def add_product(y: torch.Tensor, a: Matrix, b: Matrix, alpha: float = 1.0) -> torch.Tensor:
    """y + alpha * a @ b, summed in fp32 and rounded once to y's dtype; y [m, n] may be overwritten."""
    if isinstance(a, Ones):
        return y.add_(b, alpha=alpha)
    if isinstance(b, torch.Tensor) and a.dtype == b.dtype == y.dtype and native(y.device.type, y.dtype):
        return y.addmm_(a, b, alpha=alpha)
    wide = torch.promote_types(y.dtype, torch.float32)
    return y.to(wide).add_(product(a, b, alpha, wide)).to(y.dtype)


def total(terms: Sequence[Term], dtype: torch.dtype, strict: bool) -> torch.Tensor:
    """The sum of alpha * a @ b over ``terms`` (cheapest first, the last one a matrix product), as ``dtype``.

    ``strict``: one rounding in all, whatever the terms are. Else every term but the last is rounded to ``dtype``
    first, relative to the terms before the last alone, and the last one accumulates onto them.
    """
    rest = [t for t in terms if not isinstance(t[1], Ones)]
    if len(terms) == len(rest) == 2 and _joins_wide(terms, dtype):
        (scale, low, high), (_, a, b) = terms
        return joined(low, high, scale, a, b)
    if strict and dtype in LOW and _rounds(terms, rest, dtype):
        return _strict(terms, dtype)
    ones = [t for t in terms if isinstance(t[1], Ones)]
    alpha, a, b = rest[0]
    if not ones:
        y = product(a, b, alpha, dtype)
    elif a.dtype == b.dtype == dtype and native(a.device.type, dtype):
        y = torch.addmm(product(*ones[0][1:], ones[0][0], dtype), a, b, alpha=alpha)
        rest, ones = rest, ones[1:]
    else:
        y = product(a, b, alpha, dtype)
    for _, one, row in ones:
        y = add_product(y, one, row)
    for alpha, a, b in rest[1:]:
        y = add_product(y, a, b, alpha)
    return y


def _joins_wide(terms: Sequence[Term], dtype: torch.dtype) -> bool:
    """Whether the sum is an fp32 low-rank product and a low-precision one that one kernel adds."""
    (_, low, high), (alpha, a, b) = terms
    return alpha == 1 and low.dtype == high.dtype == torch.float32 and a.dtype == b.dtype == dtype and takes_wide(a, b)


def rounded(p: torch.Tensor, alpha: float, dtype: torch.dtype) -> torch.Tensor:
    """alpha * p, scaled in p's dtype and rounded to ``dtype`` in one pass."""
    return p.to(dtype) if alpha == 1 else torch.mul(p, alpha, out=torch.empty_like(p, dtype=dtype))


def _rounds(terms: Sequence[Term], rest: Sequence[Term], dtype: torch.dtype) -> bool:
    """Whether adding term by term would round more than the adapter's own product and the sum."""
    wide = any(m.dtype not in LOW for _, a, b in rest for m in (a, b))
    return wide or len(terms) > 2 or not native(rest[0][1].device.type, dtype)


def _strict(terms: Sequence[Term], dtype: torch.dtype) -> torch.Tensor:
    """One rounding of the whole sum: one GEMM over joined factors, or an fp32 sum, whichever moves fewer bytes."""
    *small, (alpha, a, b) = terms
    if alpha == 1 and a.is_cuda and a.dtype == b.dtype == dtype and not rounds_once(a.device, dtype):
        low = [p for t in small for p in _pairs(*t, dtype)]
        return joined(_cat([l for l, _ in low], 1), _cat([r for _, r in low], 0), 1.0, a, b)
    m, k, n = a.shape[0], a.shape[1], b.shape[1]
    joins = dtype is torch.bfloat16 and native(a.device.type, dtype) and alpha == 1 and a.dtype == b.dtype == dtype
    # joined: both factors are read and written; fp32 sum: 4 bytes written, read, written and read, then rounded
    if joins and (not widens(a.device) or 4 * k * (m + n) <= 16 * m * n):
        return torch.mm(*_joined([p for t in terms for p in _pairs(*t, dtype)]))
    y: Any = None
    for alpha, a, b in terms:
        if y is None or isinstance(a, Ones):
            part = product(a, b, alpha, torch.float32)
            y = part if y is None else y + part
        elif a.dtype == b.dtype and a.dtype in LOW and widens_onto(a.device):
            y = torch.addmm(y, a, b, alpha=alpha, out_dtype=torch.float32)
        else:
            y = y + product(a, b, alpha, torch.float32)
    return y.to(dtype)


def _gemm(a: torch.Tensor, b: torch.Tensor, alpha: float, dtype: torch.dtype) -> torch.Tensor:
    """alpha * a @ b for operands of one dtype."""
    if dtype is a.dtype:
        if alpha == 1:
            return torch.mm(a, b)
        return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=alpha)
    if a.dtype not in LOW:
        return _gemm(a, b, alpha, a.dtype).to(dtype)
    if dtype is torch.float32 and widens(a.device):
        wide = torch.mm(a, b, out_dtype=dtype)
        return wide if alpha == 1 else wide.mul_(alpha)
    return _gemm(a.float(), b.float(), alpha, dtype)


def _mixed(a: torch.Tensor, b: torch.Tensor, alpha: float) -> torch.Tensor:
    """alpha * a @ b in fp32 where exactly one operand is of a low dtype."""
    low = a.dtype if a.dtype in LOW else b.dtype
    if low is not torch.bfloat16 or not widens(a.device) or torch.float64 in (a.dtype, b.dtype):
        wide = torch.promote_types(a.dtype, b.dtype)
        return _gemm(a.to(wide), b.to(wide), alpha, wide)
    if a.dtype is low:
        sums = _by_spans(a, parts(b, low, 3, 1)).unflatten(-1, (3, b.shape[1]))
        y = sums.sum((0, 2) if sums.dim() == 4 else 1)
    else:
        sums = _by_spans(parts(a, low, 3, 0), b).unflatten(-2, (3, a.shape[0]))
        y = sums.sum((0, 1) if sums.dim() == 4 else 0)
    return y if alpha == 1 else y.mul_(alpha)


def _by_spans(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in fp32 for low-precision a [m, k], b [k, n] as products over spans of k, [spans, m, n], to be added in fp32; [m, n] for one.

    On an H100 a sum over 4,096 elements inside one GEMM is 1.4e-6 from the truth, where fp32's own rounding allows 3e-7.
    """
    spans = a.shape[1] // SPAN
    if spans < 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    whole = spans * SPAN
    left = a[:, :whole].unflatten(1, (spans, SPAN)).transpose(0, 1)
    total = torch.bmm(left, b[:whole].unflatten(0, (spans, SPAN)), out_dtype=torch.float32)
    if whole < a.shape[1]:
        total[0].add_(torch.mm(a[:, whole:], b[whole:], out_dtype=torch.float32))
    return total


def _parts(v: torch.Tensor, low: torch.dtype, count: int = 2) -> list[torch.Tensor]:
    """v as a sum of ``count`` values of ``low``, largest first: three of bf16 hold all 24 bits of an fp32."""
    parts = []
    for _ in range(count):
        parts.append(v.to(low))
        v = v - parts[-1]
    return parts


def _pairs(alpha: float, a: Matrix, b: torch.Tensor, low: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Low-precision factors whose products sum to alpha * a @ b; the product of two low parts is below fp32's last
    bits of use.
    """
    if isinstance(a, Ones):
        a = torch.ones(a.rows, 1, dtype=low, device=b.device)
    lefts = [a] if a.dtype is low else _parts(a, low)
    if alpha != 1:
        exact = b.dtype is low and abs(math.frexp(alpha)[0]) == 0.5  # a power of two only moves the exponent
        b = b * alpha if exact else b.float() * alpha
    rights = [b] if b.dtype is low else _parts(b, low)
    return [(l, r) for i, l in enumerate(lefts) for j, r in enumerate(rights) if i + j < 2]


def _joined(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """[a1 a2 ...] and [b1; b2; ...]: one product that is the sum of all, its inner size padded with zeros."""
    lefts, rights = [l for l, _ in pairs], [r for _, r in pairs]
    short = -sum(l.shape[1] for l in lefts) % (ALIGN if lefts[0].is_cuda else 1)
    if short:
        lefts = lefts + [lefts[0].new_zeros(lefts[0].shape[0], short)]
        rights = rights + [rights[0].new_zeros(short, rights[0].shape[1])]
    return _cat(lefts, 1), _cat(rights, 0, like=pairs[-1][1])


def _cat(tensors: Sequence[torch.Tensor], dim: int, like: torch.Tensor | None = None) -> torch.Tensor:
    """cat along ``dim`` in the memory order of ``like`` (default: the first), so that a transposed weight is copied
    row by row.
    """
    like = tensors[0] if like is None else like
    if like.stride(0) == 1 and like.stride(1) != 1:
        return torch.cat([t.t() for t in tensors], 1 - dim).t()
    return torch.cat(list(tensors), dim)
