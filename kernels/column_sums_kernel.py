"""The Triton kernel of ``column_sums``: imported only where there is a device for it."""

import triton
import triton.language as tl


@triton.jit
def _total(part, out, offset, step, stride, PARTIALS, LANES, BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr):
    lane = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)[None, :]
    width = LANES * step + 1 - step
    total = tl.zeros((BLOCK_P, BLOCK_L), tl.float32)
    for first in range(0, PARTIALS, BLOCK_P):
        row = (first + tl.arange(0, BLOCK_P)[:, None]).to(tl.int64)
        total += tl.load(part + row * width + lane * step, mask=(row < PARTIALS) & (lane < LANES), other=0.0)
    tl.store(out + offset + lane * stride, tl.sum(total, axis=0)[None, :], mask=lane < LANES)


@triton.jit(do_not_specialize=["PARTIALS"])
def column_sums(p0, p1, p2, p3, y0, y1, y2, y3, offset0, step0, stride0, offset1, step1, stride1, offset2, step2, stride2,
                offset3, step3, stride3, PARTIALS, LANES, COUNT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_L: tl.constexpr,
                WAITS: tl.constexpr):
    """y_k[offset + lane stride] = sum over rows of p_k [PARTIALS, LANES], or [PARTIALS, 1] where its step is 0; k by program."""
    if WAITS:
        tl.extra.cuda.gdc_wait()
    k = tl.program_id(1)
    if k == 0:
        _total(p0, y0, offset0, step0, stride0, PARTIALS, LANES, BLOCK_P, BLOCK_L)
    if COUNT > 1:
        if k == 1:
            _total(p1, y1, offset1, step1, stride1, PARTIALS, LANES, BLOCK_P, BLOCK_L)
    if COUNT > 2:
        if k == 2:
            _total(p2, y2, offset2, step2, stride2, PARTIALS, LANES, BLOCK_P, BLOCK_L)
    if COUNT > 3:
        if k == 3:
            _total(p3, y3, offset3, step3, stride3, PARTIALS, LANES, BLOCK_P, BLOCK_L)
