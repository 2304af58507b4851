"""The Triton kernels of ``joined`` and ``summed``: imported only where there is a device for them."""

import triton
import triton.language as tl


@triton.jit
def _corner(tile, down, across, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Row and column where a tile starts: tiles that share rows of x stay close in time."""
    band = GROUP * across
    first = (tile // band) * GROUP
    height = min(down - first, GROUP)
    return (first + (tile % band) % height) * BLOCK_M, ((tile % band) // height) * BLOCK_N


@triton.jit
def _add(total, x, w, row, column, K, NK: tl.constexpr, BLOCK_K: tl.constexpr):
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        left = x.load([row, k * BLOCK_K])
        if NK:
            total = tl.dot(left, w.load([column, k * BLOCK_K]).T, total)
        else:
            total = tl.dot(left, w.load([k * BLOCK_K, column]), total)
    return total


@triton.jit
def _factors(a, b, row, column, at, M, N, R, sa_m, sa_r, sb_r, sb_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The tile's rows of a and columns of b, at the places ``at`` of the inner dimension."""
    rows = (row + tl.arange(0, BLOCK_M))[:, None]
    columns = (column + tl.arange(0, BLOCK_N))[None, :]
    low = tl.load(a + rows.to(tl.int64) * sa_m + at[None, :] * sa_r, mask=(rows < M) & (at[None, :] < R), other=0.0)
    high = tl.load(b + at[:, None] * sb_r + columns.to(tl.int64) * sb_n, mask=(at[:, None] < R) & (columns < N), other=0.0)
    return low, high


@triton.jit
def _add_product(total, low, high, alpha, dtype: tl.constexpr):
    """total + alpha low high. Factors in fp32 are two parts each, v = v1 + v2, and the product of the second ones is left out."""
    low = low.to(tl.float32) * alpha
    if high.dtype == tl.float32:
        low1, high1 = low.to(dtype), high.to(dtype)
        low2, high2 = (low - low1.to(tl.float32)).to(dtype), (high - high1.to(tl.float32)).to(dtype)
        total = tl.dot(low2, high1, tl.dot(low1, high2, total))
        total = tl.dot(low1, high1, total)
    else:
        total = tl.dot(low.to(dtype), high, total)
    return total


@triton.jit
def _add_low_rank(total, a, b, alpha, row, column, M, N, R, sa_m, sa_r, sb_r, sb_n, dtype: tl.constexpr,
                  RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    rank = tl.arange(0, RANK)
    for r in tl.range(0, R, RANK, num_stages=1):
        low, high = _factors(a, b, row, column, r + rank, M, N, R, sa_m, sa_r, sb_r, sb_n, BLOCK_M, BLOCK_N)
        total = _add_product(total, low, high, alpha, dtype)
    return total


@triton.jit
def _add_bias(total, c, column, N, BLOCK_N: tl.constexpr):
    columns = column + tl.arange(0, BLOCK_N)
    return total + tl.load(c + columns, mask=columns < N, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _store(y, total, row, column, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Round and store a tile, half of it in shared memory at a time."""
    one, two = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    y.store([row, column], one.to(y.dtype))
    y.store([row, column + BLOCK_N // 2], two.to(y.dtype))


@triton.jit(do_not_specialize=["alpha", "M", "N", "K", "R", "sa_m", "sa_r", "sb_r", "sb_n"])
def joined(x, w, y, a, b, c, alpha, M, N, K, R, sa_m, sa_r, sb_r, sb_n,
           NK: tl.constexpr, BIAS: tl.constexpr, ONCE: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
           BLOCK_K: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr):  # fmt: skip
    """y [M, N] = x [M, K] w + alpha a [M, R] b [R, N] + c [N] (BIAS); x, w, y are tensor descriptors, w is [N, K] where NK, else [K, N].

    ONCE: R is RANK at most, and the tile's factors are fetched while x w is being summed.
    """
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), down * across, PROGRAMS):
        row, column = _corner(tile, down, across, BLOCK_M, BLOCK_N, GROUP)
        if ONCE:
            low, high = _factors(a, b, row, column, tl.arange(0, RANK), M, N, R, sa_m, sa_r, sb_r, sb_n, BLOCK_M, BLOCK_N)
        total = _add(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x, w, row, column, K, NK, BLOCK_K)
        if ONCE:
            total = _add_product(total, low, high, alpha, y.dtype)
        else:
            total = _add_low_rank(total, a, b, alpha, row, column, M, N, R, sa_m, sa_r, sb_r, sb_n, y.dtype, RANK, BLOCK_M, BLOCK_N)
        if BIAS:
            total = _add_bias(total, c, column, N, BLOCK_N)
        _store(y, total, row, column, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["M", "N", "R", "K0", "K1", "K2", "sa_m", "sa_r", "sb_r", "sb_n"])
def summed(x0, w0, x1, w1, x2, w2, y, a, b, M, N, R, K0, K1, K2, sa_m, sa_r, sb_r, sb_n,
           ONCE: tl.constexpr, RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
           GROUP: tl.constexpr, PROGRAMS: tl.constexpr):  # fmt: skip
    """y [M, N] = a [M, R] b [R, N] + sum of x_i [M, K_i] w_i [K_i, N]; x, w, y are tensor descriptors. K2 is 0 for two pairs."""
    down, across = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in range(tl.program_id(0), down * across, PROGRAMS):
        row, column = _corner(tile, down, across, BLOCK_M, BLOCK_N, GROUP)
        if ONCE:
            low, high = _factors(a, b, row, column, tl.arange(0, RANK), M, N, R, sa_m, sa_r, sb_r, sb_n, BLOCK_M, BLOCK_N)
        total = _add(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x0, w0, row, column, K0, False, BLOCK_K)
        total = _add(total, x1, w1, row, column, K1, False, BLOCK_K)
        total = _add(total, x2, w2, row, column, K2, False, BLOCK_K)
        if ONCE:
            total = _add_product(total, low, high, 1.0, y.dtype)
        else:
            total = _add_low_rank(total, a, b, 1.0, row, column, M, N, R, sa_m, sa_r, sb_r, sb_n, y.dtype, RANK, BLOCK_M, BLOCK_N)
        _store(y, total, row, column, BLOCK_M, BLOCK_N)
