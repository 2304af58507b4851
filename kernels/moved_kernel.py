"""The Triton kernel of ``moved``: imported only where there is a device for it."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N"])
def move(rows, index, out, N, WIDTH, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out[index[k]] = rows[k] for k < N, rows of WIDTH elements, rounded to the dtype of ``out``."""
    k = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    ok = (k < N) & (column < WIDTH)
    to = tl.load(index + k, mask=k < N, other=0).to(tl.int64)
    value = tl.load(rows + k.to(tl.int64) * WIDTH + column, mask=ok, other=0.0)
    tl.store(out + to * WIDTH + column, value.to(out.dtype.element_ty), mask=ok)
