"""Sums of rows by an index, the gradient of a lookup: out[v] = sum over k with index[k] = v of rows[k].

PyTorch's own (``embedding_dense_backward``, ``index_put`` that accumulates) sorts 64-bit keys and goes through the sorted rows in about
twenty launches. Here the index is sorted by counting: blocks of it count each row's elements, the counts are added up, and an element's
place is what is before it. One program sums the rows of a segment where they lie, in fp32. The sum's order is the index's: the same
bits in every run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .handwritten import Kernels
from .triton_pieces import power_of_two

LENGTH, LONGEST = 1 << 10, 1 << 14    # elements of a block of the index, at least and at most
COUNTS = 1 << 22                      # of all blocks and rows: 16 MiB, twice
MINE, OTHERS = 64, 128                # that are compared with one another; a block is a multiple of both
BLOCK = 256                           # elements of the index that are put in their places by one program
TILE, STAGES = 4096, 3                # elements of rows that a program reads at once, and how often they are on their way to it
KERNELS = Kernels("segments_kernel", "sums looked-up rows' gradients")
Order = tuple[Tensor, Tensor, Tensor]
"""counts [count x blocks], sums and order [2, n]: row v has the elements order[1, i] of an index, in the index's order, for i from
sums[v, 0] - counts[v, 0] to sums[v, -1].
"""


def segment_sum(rows: Tensor, index: Tensor, count: int, dtype: torch.dtype, *, skipped: int | None, signed: bool) -> Tensor | None:
    """[count, w] in ``dtype`` from rows [n, w] and index [n], int32 or int64, both contiguous. None where there is no kernel.

    ``skipped``: a row that stays zero. ``signed``: negative numbers count from the end. An element that no row has is left out.
    """
    length = _length(rows.shape[0], count)
    if length is None or not KERNELS.here(rows.device):
        return None
    out = torch.empty(count, rows.shape[1], dtype=dtype, device=rows.device)
    if not out.numel() or not rows.shape[0]:
        return out.zero_()
    order = _sorted(index, count, length, -1 if skipped is None else skipped, signed)
    return out if order is not None and _add(rows, order, out) else None


def _length(n: int, count: int) -> int | None:
    """Elements of a block of the index: few, unless there are many rows to count them for."""
    length = LENGTH
    while length <= LONGEST:
        if count * -(-n // length) <= COUNTS:
            return length
        length *= 2
    return None


def _sorted(index: Tensor, count: int, length: int, skipped: int, signed: bool) -> Order | None:
    """The elements of the index, sorted by their rows in blocks of ``length``; None where there is no kernel."""
    n, blocks = index.numel(), -(-index.numel() // length)
    counts = torch.zeros(count * blocks, dtype=torch.int32, device=index.device)
    order = torch.empty(2, n, dtype=torch.int32, device=index.device)     # first what each element has before it in its block
    numbers, options = (n, count, blocks, skipped), {"SIGNED": signed, "LENGTH": length}
    compared = options | {"MINE": MINE, "OTHERS": OTHERS, "num_warps": 4}
    if not KERNELS.launch("count", (index, counts, order), (blocks, length // MINE), numbers, compared):
        return None
    sums = torch.cumsum(counts, 0, dtype=torch.int32)
    placed = options | {"BLOCK": BLOCK, "num_warps": 4}
    return (counts, sums, order) if KERNELS.launch("place", (index, counts, sums, order), (-(-n // BLOCK),), numbers, placed) else None


def _add(rows: Tensor, segments: Order, out: Tensor) -> bool:
    (n, _), (count, width) = rows.shape, out.shape
    together = min(16, max(4, power_of_two(n // count)))                        # rows of a segment that are read at once
    block = max(16, min(TILE // together, power_of_two(width)))
    stages = STAGES if n >= together * count else 1                       # one read has nothing to follow it
    options = {"ROWS": together, "BLOCK": block, "STAGES": stages, "num_warps": max(1, min(4, together * block // 256))}
    numbers = (n, width, segments[0].numel() // count, rows.stride(0))
    return KERNELS.launch("total", (rows, *segments, out), (count, -(-width // block)), numbers, options)
