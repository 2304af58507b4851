"""Rows looked up in a table, and their gradient."""

from __future__ import annotations

import torch
from slothc.gradients.plan import Lookup
from torch import Tensor

from .moved import move_rows
from .segments import segment_sum
from .tracing import traced


def look_up(table: Tensor, lookup: Lookup, index: Tensor) -> Tensor:
    """``table`` with one dimension read at ``index``: [..., *index's shape, ...], or the index's shape where each element has its own.

    Raises ``IndexError`` or ``RuntimeError`` outside the table.
    """
    dim = lookup.dim
    if lookup.along:
        return table.gather(dim, index)
    flat = table.index_select(dim, counted(lookup, index, table.shape[dim]).reshape(-1))
    return flat.reshape(*table.shape[:dim], *index.shape, *table.shape[dim + 1 :])


def counted(lookup: Lookup, index: Tensor, size: int) -> Tensor:
    """Numbers from the end as numbers from the start, where the lookup takes them."""
    return torch.where(index < 0, index + size, index) if lookup.signed else index


def spread(gradient: Tensor, lookup: Lookup, index: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """The table's gradient, in ``dtype``, from that of its looked-up rows: rows that were read several times are summed in fp32, and those
    of a permutation go where they came from.
    """
    if lookup.along:
        return gradient.new_zeros(shape).scatter_add(lookup.dim, index, gradient).to(dtype)
    if lookup.dim == 0:
        return _spread_rows(gradient.reshape(index.numel(), -1), lookup, index, shape[0], dtype).reshape(shape)
    places = [*[None] * lookup.dim, index]
    whole = torch.ops.aten.index_put(gradient.new_zeros(shape), places, gradient, True)
    if lookup.skipped is not None:
        whole.select(lookup.dim, lookup.skipped).zero_()
    return whole.to(dtype)


def _spread_rows(rows: Tensor, lookup: Lookup, index: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """[count, w] from rows [n, w], where rows are whole entries of the table's first dimension."""
    if lookup.once and traced(rows):
        return rows.new_zeros(count, rows.shape[1], dtype=dtype).index_copy(0, index.reshape(-1).long(), rows.to(dtype))
    if lookup.once:
        return move_rows(rows, index.reshape(-1), count, dtype)
    if not traced(rows):
        found = segment_sum(rows.contiguous(), index.reshape(-1), count, dtype, skipped=lookup.skipped, signed=lookup.signed)
        if found is not None:
            return found
    flat, skipped = counted(lookup, index, count).reshape(-1), -1 if lookup.skipped is None else lookup.skipped
    return torch.ops.aten.embedding_dense_backward(rows, flat, count, skipped, False).to(dtype)
