"""The Triton kernels of ``packed``: imported only where there is a device for them."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["TOTAL"])
def pack(v, high, low, TOTAL, BLOCK: tl.constexpr):
    """The upper 24 bits of fp32 values, rounded: two bytes in ``high``, one in ``low``. A nan is not rounded: it might become a number."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < TOTAL
    value = tl.load(v + at, mask=ok, other=0.0)
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(value == value, bits + 128, bits)
    tl.store(high + at, (bits >> 16).to(tl.int16), mask=ok)
    tl.store(low + at, ((bits >> 8) & 255).to(tl.uint8), mask=ok)


@triton.jit(do_not_specialize=["TOTAL"])
def scaled(high, low, by, out, TOTAL, WIDTH, EACH: tl.constexpr, BLOCK: tl.constexpr):
    """out = packed * by, by one number, or one for each row of WIDTH (EACH)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < TOTAL
    bits = (tl.load(high + at, mask=ok, other=0).to(tl.int32) << 16) | (tl.load(low + at, mask=ok, other=0).to(tl.int32) << 8)
    factor = tl.load(by + at // WIDTH, mask=ok, other=0.0) if EACH else tl.load(by)
    tl.store(out + at, (bits.to(tl.float32, bitcast=True) * factor).to(out.dtype.element_ty), mask=ok)
