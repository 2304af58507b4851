"""The Triton kernel of ``split``: imported only where there is a device for it."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["TOTAL", "COLUMNS", "sv_r", "sv_c", "so_r", "so_c", "STEP"])
def split(v, out, TOTAL, COLUMNS, sv_r, sv_c, so_r, so_c, STEP, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Element (r, c) of v, as COUNT parts of out's dtype that lie STEP apart."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = at < TOTAL
    row, column = at // COLUMNS, at % COLUMNS
    rest = tl.load(v + row * sv_r + column * sv_c, mask=ok, other=0.0)
    place = out + row * so_r + column * so_c
    for k in tl.static_range(COUNT):
        part = rest.to(out.dtype.element_ty)
        tl.store(place + k * STEP, part, mask=ok)
        rest = rest - part.to(tl.float32)
