"""Sums of rows by an index, the gradient of a lookup: out[v] = sum over k with index[k] = v of rows[k].

PyTorch's own (``embedding_dense_backward``, ``index_put`` that accumulates) sorts 64-bit keys and goes through the sorted rows in about
twenty launches. Here the index is sorted by counting: blocks of it count each row's elements, the counts are added up, and an element's
place is what is before it. One program sums the rows of a segment where they lie, in fp32. The sum's order is the index's: the same
bits in every run.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .broken import give_up
from .direct import Direct
from .triton_launch import available

LENGTH, LONGEST = 1 << 10, 1 << 14   # elements of a block of the index, at least and at most
COUNTS = 1 << 22     # of all blocks and rows: 16 MiB, twice
MINE, OTHERS = 64, 128                 # that are compared with one another; a block is a multiple of both
BLOCK = 256          # elements of the index that are put in their places by one program
TILE, STAGES = 4096, 3               # elements of rows that a program reads at once, and how often they are on their way to it
KEPT = 256
_records: dict[tuple[Any, ...], Direct] = {}
_broken: set[torch.device] = set()


def segment_sum(rows: Tensor, index: Tensor, count: int, dtype: torch.dtype, *, skipped: int | None, signed: bool) -> Tensor | None:
    """[count, w] in ``dtype`` from rows [n, w] and index [n], int32 or int64, both contiguous. None where there is no kernel.

    ``skipped``: a row that stays zero. ``signed``: negative numbers count from the end. An element that no row has is left out.
    """
    device, length = rows.device, _length(rows.shape[0], count)
    if length is None or not available(device) or device in _broken:
        return None
    try:
        out = torch.empty(count, rows.shape[1], dtype=dtype, device=device)
        if out.numel() and rows.shape[0]:
            _add(rows, _sorted(index, count, length, -1 if skipped is None else skipped, signed), out)
            return out
        return out.zero_()
    except Exception as error:
        give_up(_broken, device, device, "sums looked-up rows' gradients", error)
        return None


def _length(n: int, count: int) -> int | None:
    """Elements of a block of the index: few, unless there are many rows to count them for."""
    length = LENGTH
    while length <= LONGEST:
        if count * -(-n // length) <= COUNTS:
            return length
        length *= 2
    return None


def _sorted(index: Tensor, count: int, length: int, skipped: int, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(counts [count x blocks], sums, order [2, n]): row v has the elements order[1, i] of the index, in the index's order, for i from
    sums[v, 0] - counts[v, 0] to sums[v, -1].
    """
    n, blocks = index.numel(), -(-index.numel() // length)
    counts = torch.zeros(count * blocks, dtype=torch.int32, device=index.device)
    order = torch.empty(2, n, dtype=torch.int32, device=index.device)     # first what each element has before it in its block
    numbers, options = (n, count, blocks, skipped), {"SIGNED": signed, "LENGTH": length}
    _launch("count", (index, counts, order), (blocks, length // MINE), numbers, options | {"MINE": MINE, "OTHERS": OTHERS, "num_warps": 4})
    sums = torch.cumsum(counts, 0, dtype=torch.int32)
    _launch("place", (index, counts, sums, order), (-(-n // BLOCK),), numbers, options | {"BLOCK": BLOCK, "num_warps": 4})
    return counts, sums, order


def _add(rows: Tensor, segments: tuple[Tensor, Tensor, Tensor], out: Tensor) -> None:
    (n, _), (count, width) = rows.shape, out.shape
    together = min(16, max(4, _power(n // count)))                        # rows of a segment that are read at once
    block = max(16, min(TILE // together, _power(width)))
    stages = STAGES if n >= together * count else 1                       # one read has nothing to follow it
    options = {"ROWS": together, "BLOCK": block, "STAGES": stages, "num_warps": max(1, min(4, together * block // 256))}
    numbers = (n, width, segments[0].numel() // count, rows.stride(0))
    _launch("total", (rows, *segments, out), (count, -(-width // block)), numbers, options)


def _launch(name: str, tensors: tuple[Tensor, ...], grid: tuple[int, ...], numbers: tuple[int, ...], options: dict[str, Any]) -> None:
    key = (name, tensors[0].device, grid, numbers, *options.values(), *(t.dtype for t in tensors))
    run = _records.get(key)
    if run is None:
        if len(_records) > KEPT:
            _records.clear()
        run = _records[key] = Direct(_kernel(name), grid, numbers, options, tensors[0].device)
    run(tensors)


def _power(n: int) -> int:
    return 1 << max(0, (n - 1).bit_length())


@cache
def _kernel(name: str) -> Any:
    from . import segments_kernel

    return getattr(segments_kernel, name)
