"""A sum of large matrix products and a low-rank one in one fp32 accumulator: y = round(a b + x_1 w_1 + x_2 w_2 + ..).

It is the gradient of an x that several linears read: instead of one product for each and passes to add them, one kernel runs over all
inner dimensions before a tile is rounded and stored. ``joined`` is the case of one product.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .joined import KEPT, LOW, Pair, Tiles, fits, joined

MOST = 3              # products in one launch; more are added by further launches
_records: dict[tuple[Any, ...], Tiles | None] = {}


def summed(pairs: Sequence[Pair], a: Tensor, b: Tensor) -> Tensor:
    """a b + sum of x w over ``pairs``, for a [m, r], b [r, n], x [m, k], w [k, n] of one dtype.

    Rounded once where the device has the kernel; elsewhere after each product, as a model does that adds the gradients of its linears.
    """
    if len(pairs) > 1 and pairs[0][0].is_cuda:
        first = tuple(pairs[:MOST])
        tiles = _tiles(first, a, b)
        y = None if tiles is None else tiles((*first, *(first[0],) * (MOST - len(first))), a, b)
        if y is not None:
            return _added(y, pairs[MOST:])
    x, w = pairs[0]
    return _added(joined(a, b, 1.0, x, w), pairs[1:])


def _added(y: Tensor, pairs: Sequence[Pair]) -> Tensor:
    for x, w in pairs:
        y.addmm_(x, w)
    return y


def _tiles(pairs: Sequence[Pair], a: Tensor, b: Tensor) -> Tiles | None:
    """The kernel for operands like these; None where it does not take them."""
    key = (a.device, *((t.shape, t.stride(), t.dtype) for t in (a, b, *(t for p in pairs for t in p))))
    if key not in _records:
        _records[key] = _record(pairs, a, b)
        if len(_records) > KEPT:
            _records.pop(next(iter(_records)))
    return _records[key]


def _record(pairs: Sequence[Pair], a: Tensor, b: Tensor) -> Tiles | None:
    x, w = pairs[0]
    if x.dtype not in LOW or not all(v.stride(1) == 1 and fits(u, v) for u, v in pairs):
        return None
    three = [*pairs, *[pairs[0]] * (MOST - len(pairs))]
    inner = [*(u.shape[1] for u, _ in pairs), *[0] * (MOST - len(pairs))]   # a number, not a constant: one kernel to compile
    return Tiles("summed", three, a, b, [x.shape[0], w.shape[1], a.shape[1], *inner])
