"""The Triton kernels of ``segments``: imported only where there is a device for them."""

import triton
import triton.language as tl


@triton.jit
def _key(index, at, ok, COUNT, skipped, SIGNED: tl.constexpr):
    """The row that an element of the index means; COUNT, beyond the last, for one that is skipped or that no row has."""
    v = tl.load(index + at, mask=ok, other=COUNT)
    if SIGNED:
        v = tl.where(v < 0, v + COUNT, v)
    return tl.where((v < 0) | (v >= COUNT) | (v == skipped), COUNT, v).to(tl.int32)


@triton.jit(do_not_specialize=["N", "BLOCKS", "skipped"])
def count(index, counts, order, N, COUNT, BLOCKS, skipped, SIGNED: tl.constexpr, LENGTH: tl.constexpr, MINE: tl.constexpr,
          OTHERS: tl.constexpr):  # fmt: skip
    """Blocks of LENGTH elements of the index: how many of each row a block has, in counts [COUNT, BLOCKS], and how many an element of its
    row has before it in its block, in the first row of ``order`` [2, N].
    """
    block, first = tl.program_id(0), tl.program_id(0) * LENGTH
    k = first + tl.program_id(1) * MINE + tl.arange(0, MINE)[:, None]
    key = _key(index, k, k < N, COUNT, skipped, SIGNED)
    ahead = tl.zeros((MINE, OTHERS), tl.int32)
    behind = tl.zeros((MINE, OTHERS), tl.int32)
    for start in range(first, tl.minimum(first + LENGTH, N), OTHERS):
        j = start + tl.arange(0, OTHERS)[None, :]
        same = _key(index, j, j < N, COUNT, skipped, SIGNED) == key
        ahead += (same & (j < k)).to(tl.int32)
        behind += (same & (j > k)).to(tl.int32)
    mine = tl.sum(ahead, 1)[:, None]
    tl.store(order + k, mine, mask=k < N)
    last = (k < N) & (key < COUNT) & (tl.sum(behind, 1)[:, None] == 0)
    tl.store(counts + key.to(tl.int64) * BLOCKS + block, mine + 1, mask=last)


@triton.jit(do_not_specialize=["N", "BLOCKS", "skipped"])
def place(index, counts, sums, order, N, COUNT, BLOCKS, skipped, SIGNED: tl.constexpr, LENGTH: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """order[1, place] = element, row after row and in the index's order. ``sums``: counts added up, each with all before it."""
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = _key(index, k, k < N, COUNT, skipped, SIGNED)
    kept = (k < N) & (key < COUNT)
    at = key.to(tl.int64) * BLOCKS + k // LENGTH
    start = tl.load(sums + at, mask=kept, other=0) - tl.load(counts + at, mask=kept, other=0)
    tl.store(order + N + start + tl.load(order + k, mask=kept, other=0), k, mask=kept)


@triton.jit(do_not_specialize=["N", "BLOCKS"])
def total(rows, counts, sums, order, out, N, WIDTH, BLOCKS, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """out[v] = the sum of the rows whose numbers are row v's part of order[1], in fp32 and rounded once."""
    v = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    start = tl.load(sums + v * BLOCKS) - tl.load(counts + v * BLOCKS)
    stop = tl.load(sums + v * BLOCKS + BLOCKS - 1)
    found = tl.zeros((1, BLOCK), tl.float32)
    for first in tl.range(start, stop, ROWS, num_stages=STAGES):
        at = first + tl.arange(0, ROWS)[:, None]
        which = tl.load(order + N + at, mask=at < stop, other=0).to(tl.int64)
        part = tl.load(rows + which * stride + column, mask=(at < stop) & (column < WIDTH), other=0.0)
        found += tl.sum(part.to(tl.float32), 0)[None, :]
    tl.store(out + v * WIDTH + column, found.to(out.dtype.element_ty), mask=column < WIDTH)
