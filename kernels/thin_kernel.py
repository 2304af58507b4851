"""The Triton kernels of ``thin``: imported only where there is a device for them."""

import triton
import triton.language as tl


@triton.jit
def _dot(left, right, total, low: tl.constexpr):
    """total + left right for a ``left`` of a low-precision dtype. A ``right`` in fp32 is three parts of it, which hold all of its bits."""
    if right.dtype == tl.float32:
        one = right.to(low)
        rest = right - one.to(tl.float32)
        two = rest.to(low)
        three = (rest - two.to(tl.float32)).to(low)
        total = tl.dot(left, one, tl.dot(left, two, tl.dot(left, three, total)))
    else:
        total = tl.dot(left, right, total)
    return total


@triton.jit
def _strip(g, b, t, u, d, row, first, last, M, N, R, sg, sb_n, sb_r, st, sd_n, sd_r, ACROSS: tl.constexpr, DOWN: tl.constexpr,
           RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """BLOCK_M rows of one g and its columns first to last: what they are of g b in u [M, R], of g' t in d."""
    rows, rank = (row + tl.arange(0, BLOCK_M)).to(tl.int64), tl.arange(0, RANK)
    inside, used = (rows < M)[:, None], (rank < R)[None, :]
    low: tl.constexpr = g.dtype.element_ty
    if DOWN:
        right = tl.load(t + rows[:, None] * st + rank[None, :], mask=inside & used, other=0.0)
    total = tl.zeros((BLOCK_M, RANK), tl.float32)
    for n in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        columns = n + tl.arange(0, BLOCK_N)
        tile = tl.load(g + rows[:, None] * sg + columns[None, :], mask=inside & (columns < N)[None, :], other=0.0)
        if ACROSS:
            up = tl.load(b + columns[:, None] * sb_n + rank[None, :] * sb_r, mask=(columns < N)[:, None] & used, other=0.0)
            total = _dot(tile, up, total, low)
        if DOWN:
            part = _dot(tl.trans(tile), right, tl.zeros((BLOCK_N, RANK), tl.float32), low)
            tl.store(d + columns[:, None] * sd_n + rank[None, :] * sd_r, part, mask=(columns < N)[:, None] & used)
    if ACROSS:
        tl.store(u + rows[:, None] * R + rank[None, :], total, mask=inside & used)


@triton.jit(do_not_specialize=["M", "C0", "C1"])
def thin(g0, g1, g2, b0, b1, b2, t, u, d, M, N0, N1, N2, C0, C1, CHUNK, R, sg0, sg1, sg2, sb0_n, sb1_n, sb2_n, sb_r, st, sd_n, sd_r,
         COUNT: tl.constexpr, ACROSS: tl.constexpr, DOWN: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
         STAGES: tl.constexpr):  # fmt: skip
    """Parts of u_i = g_i b_i (ACROSS) and d_i = g_i' t_i (DOWN) for COUNT matrices g_i [M, N_i], b_i [N_i, R], t_i [M, R] (R columns of t).

    Program (i, j) has BLOCK_M rows and CHUNK columns; g_0 has C0 such pieces, g_1 C1. u is [pieces, M, R], d is [row blocks, sum N_i, R]
    or, by its strides, [row blocks, R, N_0].
    """
    row, piece = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    g, b, N, sg, sb_n, at, before = g0, b0, N0, sg0, sb0_n, piece, 0
    if COUNT > 1:
        if piece >= C0:
            g, b, N, sg, sb_n, at, before, t = g1, b1, N1, sg1, sb1_n, piece - C0, N0, t + R
    if COUNT > 2:
        if piece >= C0 + C1:
            g, b, N, sg, sb_n, at, before, t = g2, b2, N2, sg2, sb2_n, piece - C0 - C1, N0 + N1, t + R
    u += piece.to(tl.int64) * M * R
    d += tl.program_id(0).to(tl.int64) * (N0 + N1 + N2) * R + before * sd_n
    _strip(g, b, t, u, d, row, at * CHUNK, tl.minimum(at * CHUNK + CHUNK, N), M, N, R, sg, sb_n, sb_r, st, sd_n, sd_r, ACROSS, DOWN, RANK,
           BLOCK_M, BLOCK_N, STAGES)  # fmt: skip


@triton.jit
def _total(parts, at, ok, size, count, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum over k < count of parts[k, at], parts [count, size]."""
    part = tl.arange(0, PARTS)[:, None]
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, count, PARTS):
        total += tl.sum(tl.load(parts + (k + part).to(tl.int64) * size + at[None, :], mask=ok[None, :] & (k + part < count), other=0.0), 0)
    return total


@triton.jit(do_not_specialize=["M", "C0", "C1", "C2", "BLOCKS", "FIRST", "s0", "s1", "s2"])
def add(u, d, across, down, s0, s1, s2, M, N0, N1, N2, C0, C1, C2, BLOCKS, R, FIRST, COUNT: tl.constexpr, TURNED: tl.constexpr,
        BLOCK: tl.constexpr, PARTS: tl.constexpr, WAITS: tl.constexpr):  # fmt: skip
    """Sums the parts that ``thin`` leaves, times s_i, and rounds: across [M, COUNT R] and down [sum N_i, R] (TURNED: [R, N_0]).

    COUNT times FIRST programs make ``across``, those of one g_i after those of another.
    """
    if WAITS:
        tl.extra.cuda.gdc_wait()
    which, block = tl.program_id(0) // FIRST, tl.program_id(0) % FIRST
    if which < COUNT:
        at = block * BLOCK + tl.arange(0, BLOCK)
        ok = at < M * R
        start, count, scale = 0, C0, s0
        if COUNT > 1:
            if which >= 1:
                start, count, scale = C0, C1, s1
        if COUNT > 2:
            if which >= 2:
                start, count, scale = C0 + C1, C2, s2
        total = _total(u + (M * R).to(tl.int64) * start, at, ok, M * R, count, PARTS, BLOCK)
        tl.store(across + at // R * (COUNT * R) + which * R + at % R, (total * scale).to(across.dtype.element_ty), mask=ok)
    else:
        size = (N0 + N1 + N2) * R
        at = (tl.program_id(0) - COUNT * FIRST) * BLOCK + tl.arange(0, BLOCK)
        ok = at < size
        total = _total(d, at, ok, size, BLOCKS, PARTS, BLOCK)
        scales = tl.where(TURNED | (at < N0 * R), s0, tl.where(at < (N0 + N1) * R, s1, s2))
        tl.store(down + at, (total * scales).to(down.dtype.element_ty), mask=ok)
