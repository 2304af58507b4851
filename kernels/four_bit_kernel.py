"""The Triton kernel of ``four_bit``: imported only where there is a device for it."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["BYTES"])
def whole(q, s, s2, code, offset, table, w, BYTES, HALF: tl.constexpr, SHARED: tl.constexpr, NESTED: tl.constexpr, BLOCKS: tl.constexpr):
    """w[2i] = table[q[i] >> 4] s[i // HALF] and w[2i + 1] = table[q[i] & 15] s[i // HALF] for i < BYTES, BLOCKS blocks of scales a program.

    NESTED: the scales are s[j] = code[s[j]] s2[j // SHARED] + offset. Products and the sum are rounded one by one, as the library does.
    """
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    i = block * HALF + tl.arange(0, HALF)[None, :]
    some = block * HALF < BYTES
    pair = tl.load(q + i, mask=i < BYTES, other=0).to(tl.int32)
    scale = tl.load(s + block, mask=some, other=0)
    if NESTED:
        scale = tl.load(code + scale.to(tl.int32)) * tl.load(s2 + block // SHARED, mask=some, other=0.0) + tl.load(offset)
    first, second = tl.load(table + (pair >> 4)) * scale, tl.load(table + (pair & 15)) * scale
    both = tl.interleave(first, second).to(w.dtype.element_ty)
    k = block * (2 * HALF) + tl.arange(0, 2 * HALF)[None, :]
    tl.store(w + k, both, mask=k < 2 * BYTES)
