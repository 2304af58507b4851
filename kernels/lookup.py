"""Rows looked up in a table, and their gradient."""

from __future__ import annotations

import torch
from slothc.gradients.plan import Lookup
from torch import Tensor


def look_up(table: Tensor, lookup: Lookup, index: Tensor) -> Tensor:
    """``table`` with one dimension read at ``index``: [..., *index's shape, ...], or the index's shape where each element has its own.

    Raises ``IndexError`` or ``RuntimeError`` outside the table.
    """
    dim = lookup.dim
    if lookup.along:
        return table.gather(dim, index)
    flat = table.index_select(dim, counted(index, table.shape[dim]).reshape(-1))
    return flat.reshape(*table.shape[:dim], *index.shape, *table.shape[dim + 1 :])


def counted(index: Tensor, size: int) -> Tensor:
    """Numbers from the end as numbers from the start."""
    return torch.where(index < 0, index + size, index)


def spread(gradient: Tensor, lookup: Lookup, index: Tensor, shape: torch.Size) -> Tensor:
    """The table's gradient from that of its looked-up rows: rows that were read several times are summed, as eager sums them."""
    if lookup.along:
        return gradient.new_zeros(shape).scatter_add(lookup.dim, index, gradient)
    if lookup.dim == 0:
        rows, flat = gradient.reshape(index.numel(), -1), counted(index, shape[0]).reshape(-1)
        skipped = -1 if lookup.skipped is None else lookup.skipped
        return torch.ops.aten.embedding_dense_backward(rows, flat, shape[0], skipped, False).reshape(shape)
    if lookup.skipped is not None:
        read = counted(index, shape[lookup.dim]) != lookup.skipped
        gradient = gradient * read.reshape(*index.shape, *[1] * (len(shape) - lookup.dim - 1))
    places = [*[None] * lookup.dim, index]
    return torch.ops.aten.index_put(gradient.new_zeros(shape), places, gradient, True)
