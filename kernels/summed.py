"""A sum of large matrix products and a low-rank one in one fp32 accumulator: y = round(a b + x_1 w_1 + x_2 w_2 + ..).

It is the gradient of an x that several linears read: instead of one product for each and passes to add them, one kernel runs over all
inner dimensions before a tile is rounded and stored. ``joined`` is the case of one product.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .joined import BLOCK_K, BLOCK_M, BLOCK_N, CHUNK, GROUP, LOW, STAGES, _fits, _processors, joined

MOST = 3              # products in one launch; more are added by further launches


def summed(pairs: Sequence[tuple[Tensor, Tensor]], a: Tensor, b: Tensor) -> Tensor:
    """a b + sum of x w over ``pairs``, for a [m, r], b [r, n], x [m, k], w [k, n] of one dtype.

    Rounded once where the device has the kernel; elsewhere after each product, as a model does that adds the gradients of its linears.
    """
    (x, w), *rest = pairs
    if rest and x.dtype in LOW and all(v.stride(1) == 1 and _fits(u, v) for u, v in pairs):
        y = torch.empty(x.shape[0], w.shape[1], dtype=x.dtype, device=x.device)
        if y.numel() == 0 or _launch(pairs[:MOST], a, b, y):
            return _added(y, pairs[MOST:])
    return _added(joined(a, b, 1.0, x, w), rest)


def _added(y: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    for x, w in pairs:
        y.addmm_(x, w)
    return y


@functools.cache
def _kernel() -> Any:
    from . import summed_kernel

    return summed_kernel.sum_of_products


_broken: set[torch.device] = set()


def _launch(pairs: Sequence[tuple[Tensor, Tensor]], a: Tensor, b: Tensor, y: Tensor) -> bool:
    """Run the kernel; False where it cannot be built for this device, which is remembered."""
    if y.device in _broken:
        return False
    from triton.tools.tensor_descriptor import TensorDescriptor

    (m, n), r = y.shape, a.shape[1]
    three = [*pairs, *[pairs[0]] * (MOST - len(pairs))]
    operands = [TensorDescriptor(t, t.shape, t.stride(), [rows, columns])
                for x, w in three for t, rows, columns in ((x, BLOCK_M, BLOCK_K), (w, BLOCK_K, BLOCK_N))]  # fmt: skip
    processors = _processors(y.device)
    try:
        _kernel()[(min(-(-m // BLOCK_M) * -(-n // BLOCK_N), processors),)](
            *operands, TensorDescriptor(y, y.shape, y.stride(), [BLOCK_M, BLOCK_N // 2]),
            a, b, m, n, r, *(x.shape[1] for x, _ in three), a.stride(0), a.stride(1), b.stride(0), b.stride(1),
            COUNT=len(pairs), RANK=min(CHUNK, max(16, 1 << (r - 1).bit_length())), BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K,
            GROUP=GROUP, PROGRAMS=processors, num_stages=STAGES, num_warps=8,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        _broken.add(y.device)
        text = f"sloth adds the gradients of linears one by one on {y.device}: {type(error).__name__}: {error}"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return False
    return True
