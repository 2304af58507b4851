"""The Triton kernels of ``scores``: imported only where there is a device for them.

x = q k^T in fp32, y = VALUE(x) + mask in base 2, p = 2^(y - top) / total. VALUE and BOTH (y and dy/dx) are printed from an expression
(``scores_program``). Everything about a block of queries, or of keys, stays in one program: no sum depends on the order of programs.

KIND: 0 every key, 1 keys up to the query, 2 the last ``window`` of those. MASK: 0 none, 1 a tensor that is added, 2 a tensor of flags
with -inf where one is clear, 3 with SHUT there. EDGE: whether a block has pairs that KIND or a length shuts.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
SHUT = tl.constexpr(-1e30)                   # any score added to it is lost: as good as what models write, and base 2 does not overflow


@triton.jit
def _rows(base, at, stride, dims, END, DIM: tl.constexpr, BLOCK: tl.constexpr, EDGE: tl.constexpr):
    """[at, dims] of a matrix with ``END`` rows and ``DIM`` columns, zeros beyond."""
    place = base + at[:, None] * stride + dims[None, :]
    if DIM != BLOCK:
        return tl.load(place, mask=(at[:, None] < END) & (dims[None, :] < DIM), other=0.0)
    if EDGE:
        return tl.load(place, mask=at[:, None] < END, other=0.0)
    return tl.load(place)


@triton.jit
def _rows_from(base, start, stride, dims, END, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """ROWS rows from ``start``, zeros beyond ``END``.

    What differs between a loop's turns is a number, not an address for each thread: where two accumulators fill the registers.
    """
    row = tl.arange(0, ROWS)[:, None]
    place = base + tl.cast(start, tl.int64) * stride + (row * stride + dims[None, :])
    if DIM != BLOCK:
        return tl.load(place, mask=(row < END - start) & (dims[None, :] < DIM), other=0.0)
    return tl.load(place, mask=row < END - start, other=0.0)


@triton.jit
def _store(base, at, stride, dims, END, value, DIM: tl.constexpr):
    tl.store(base + at[:, None] * stride + dims[None, :], value, mask=(at[:, None] < END) & (dims[None, :] < DIM))


@triton.jit
def _masked(y, rows, keys, mask, sm_q, sm_k, TQ, TK, window, KIND: tl.constexpr, MASK: tl.constexpr, EDGE: tl.constexpr):
    if MASK == 1:
        more = tl.load(mask + rows * sm_q + keys * sm_k, mask=(rows < TQ) & (keys < TK), other=0.0).to(tl.float32)
        y += tl.where((more < SHUT) & (more > -float("inf")), SHUT, more) * LOG2E
    if MASK > 1:
        keep = tl.load(mask + rows * sm_q + keys * sm_k, mask=(rows < TQ) & (keys < TK), other=0) != 0
        y = tl.where(keep, y, -float("inf") if MASK == 2 else SHUT * LOG2E)
    if EDGE:
        ok = keys < TK
        if KIND > 0:
            ok = ok & (keys <= rows)
        if KIND == 2:
            ok = ok & (keys > rows - window)
        y = tl.where(ok, y, -float("inf"))
    return y


@triton.jit
def _cut(dx, rows, keys, mask, sm_q, sm_k, TQ, TK, MASK: tl.constexpr):
    """A score that a flag replaces has no gradient, not even where all of a row are replaced."""
    if MASK > 1:
        keep = tl.load(mask + rows * sm_q + keys * sm_k, mask=(rows < TQ) & (keys < TK), other=0) != 0
        dx = tl.where(keep, dx, 0.0)
    return dx


@triton.jit
def _key_spans(start, TK, window, KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first, full, edge, end): keys for BLOCK_M queries from ``start``; none shut between ``full`` and ``edge``."""
    first, end = 0, TK
    if KIND > 0:
        end = tl.minimum(TK, start + BLOCK_M)
    edge = TK // BLOCK_N * BLOCK_N
    if KIND > 0:
        edge = tl.minimum(edge, (start + 1) // BLOCK_N * BLOCK_N)
    full = 0
    if KIND == 2:
        first = tl.maximum(start - window + 1, 0) // BLOCK_N * BLOCK_N
        full = tl.cdiv(tl.maximum(start + BLOCK_M - window, 0), BLOCK_N) * BLOCK_N
        full = tl.minimum(tl.maximum(full, first), tl.cdiv(end, BLOCK_N) * BLOCK_N)
        edge = tl.maximum(edge, full)
    return first, full, edge, end


@triton.jit
def _whole_spans(start, TK, window, KIND: tl.constexpr, SPAN: tl.constexpr):
    """(first, end): the squares of SPAN queries and keys that the queries around ``start`` have pairs in."""
    start = start // SPAN * SPAN
    first, end = 0, TK
    if KIND > 0:
        end = tl.minimum(TK, start + SPAN)
    if KIND == 2:
        first = tl.maximum(start - window + 1, 0) // SPAN * SPAN
    return first, tl.cdiv(end, SPAN) * SPAN


@triton.jit
def _row_span(start, TQ, window, KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first, end): queries for BLOCK_N keys from ``start``."""
    first, end = 0, TQ
    if KIND > 0:
        first = tl.minimum(start, TQ) // BLOCK_M * BLOCK_M
    if KIND == 2:
        end = tl.minimum(TQ, start + BLOCK_N - 1 + window)
    return first, end


@triton.jit
def _attend(acc, top, total, rounded, queries, k, v, mask, rows, lo, hi, sk_t, sv_t, sm_q, sm_k, TQ, TK, window,
            VALUE: tl.constexpr, KIND: tl.constexpr, MASK: tl.constexpr, EDGE: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
            BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    for start in range(lo, hi, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N).to(rows.dtype)
        x = tl.dot(queries, _rows(k, keys, sk_t, dims, TK, DIM, BLOCK_D, EDGE).T, input_precision=PRECISION)
        y = _masked(VALUE(x), rows[:, None], keys[None, :], mask, sm_q, sm_k, TQ, TK, window, KIND, MASK, EDGE)
        new = tl.maximum(top, tl.max(y, 1))
        base = tl.where(new == -float("inf"), 0.0, new)
        p = tl.exp2(y - base[:, None])
        alpha = tl.exp2(top - base)
        low = p.to(v.dtype.element_ty)
        total = total * alpha + tl.sum(p, 1)
        rounded = rounded * alpha + tl.sum(low.to(tl.float32), 1)
        values = _rows(v, keys, sv_t, dims_v, TK, DIM_V, BLOCK_V, EDGE)
        acc = tl.dot(low, values, acc * alpha[:, None], input_precision=PRECISION)
        top = new
    return acc, top, total, rounded


@triton.jit(do_not_specialize=["H", "TQ", "TK", "window"])
def forward(q, k, v, mask, sinks, out, low, tops, inverses,
            sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, so_b, so_h, so_t, sm_b, sm_h, sm_q, sm_k, H, TQ, TK, window,
            VALUE: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, MASK: tl.constexpr, SINK: tl.constexpr, SHIFT: tl.constexpr,
            WIDE: tl.constexpr, PRECISION: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
            BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """out = p v, and of each row: the largest y, 1 / total, and the SHIFT-th and next seven bits of what rounding took from out.

    The weights in the product are rounded; they are divided by the sum of the rounded ones, so that their common error goes.
    """
    blocks = tl.cdiv(TQ, BLOCK_M)
    start = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M               # the longest first
    head = tl.program_id(0) // blocks
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    k += b * sk_b + h // GROUP * sk_h
    v += b * sv_b + h // GROUP * sv_h
    mask += b * sm_b + h * sm_h
    rows = start + tl.arange(0, BLOCK_M)
    if WIDE:
        rows = rows.to(tl.int64)
    queries = _rows(q + b * sq_b + h * sq_h, rows, sq_t, tl.arange(0, BLOCK_D), TQ, DIM, BLOCK_D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    if SINK:
        top = tl.zeros((BLOCK_M,), tl.float32) + tl.load(sinks + h).to(tl.float32) * LOG2E
        total += 1.0
    rounded = total
    first, full, edge, end = _key_spans(start, TK, window, KIND, BLOCK_M, BLOCK_N)
    if KIND == 2:
        acc, top, total, rounded = _attend(
            acc, top, total, rounded, queries, k, v, mask, rows, first, full, sk_t, sv_t, sm_q, sm_k, TQ, TK, window,
            VALUE, KIND, MASK, True, DIM, DIM_V, BLOCK_D, BLOCK_V, BLOCK_N, PRECISION)  # fmt: skip
    acc, top, total, rounded = _attend(
        acc, top, total, rounded, queries, k, v, mask, rows, full, edge, sk_t, sv_t, sm_q, sm_k, TQ, TK, window,
        VALUE, KIND, MASK, False, DIM, DIM_V, BLOCK_D, BLOCK_V, BLOCK_N, PRECISION)  # fmt: skip
    acc, top, total, rounded = _attend(
        acc, top, total, rounded, queries, k, v, mask, rows, edge, end, sk_t, sv_t, sm_q, sm_k, TQ, TK, window,
        VALUE, KIND, MASK, True, DIM, DIM_V, BLOCK_D, BLOCK_V, BLOCK_N, PRECISION)  # fmt: skip
    acc = acc / rounded[:, None]
    result = acc.to(out.dtype.element_ty)
    dims = tl.arange(0, BLOCK_V)
    place = b * so_b + h * so_h
    _store(out + place, rows, so_t, dims, TQ, result, DIM_V)
    if SHIFT > 0:
        lost = acc.to(tl.int32, bitcast=True) - result.to(tl.float32).to(tl.int32, bitcast=True)
        lost = tl.minimum(tl.maximum((lost + (1 << (SHIFT - 1))) >> SHIFT, -128), 127)
        _store(low + place, rows, so_t, dims, TQ, lost.to(tl.int8), DIM_V)
    ok = rows < TQ
    tl.store(tops + head.to(tl.int64) * TQ + rows, top, mask=ok)
    tl.store(inverses + head.to(tl.int64) * TQ + rows, 1.0 / total, mask=ok)


@triton.jit
def _to_queries(acc, queries, upstream, top, inverse, delta, k, v, mask, weights, slopes, rows, lo, hi, sk_t, sv_t, sm_q, sm_k, sw_t,
                TQ, TK, window, BOTH: tl.constexpr, SPAN: tl.constexpr, KIND: tl.constexpr, MASK: tl.constexpr, EDGE: tl.constexpr,
                DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr,
                PRECISION: tl.constexpr):  # fmt: skip
    dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    for start in range(lo, hi, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N).to(rows.dtype)
        kt = _rows(k, keys, sk_t, dims, TK, DIM, BLOCK_D, EDGE)
        values = _rows(v, keys, sv_t, dims_v, TK, DIM_V, BLOCK_V, EDGE)
        y, slope = BOTH(tl.dot(queries, kt.T, input_precision=PRECISION))
        y = _masked(y, rows[:, None], keys[None, :], mask, sm_q, sm_k, TQ, TK, window, KIND, MASK, EDGE)
        p = tl.exp2(y - top[:, None]) * inverse[:, None]
        dp = tl.dot(upstream, values.T, input_precision=PRECISION)
        dx = _cut(p * (dp - delta[:, None]) * slope, rows[:, None], keys[None, :], mask, sm_q, sm_k, TQ, TK, MASK)
        low = dx.to(kt.dtype)
        if SPAN > 0:
            place = rows[:, None] * sw_t + keys[None, :]
            tl.store(weights + place, p.to(kt.dtype), mask=rows[:, None] < TQ)
            tl.store(slopes + place, low, mask=rows[:, None] < TQ)
        acc = tl.dot(low, kt, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _nothing(weights, slopes, rows, lo, hi, sw_t, TQ, BLOCK_N: tl.constexpr):
    """Zeros for the keys from ``lo`` to ``hi``."""
    for start in range(lo, hi, BLOCK_N):
        place = rows[:, None] * sw_t + (start + tl.arange(0, BLOCK_N))[None, :]
        zeros = tl.zeros(place.shape, weights.dtype.element_ty)
        tl.store(weights + place, zeros, mask=rows[:, None] < TQ)
        tl.store(slopes + place, zeros, mask=rows[:, None] < TQ)


@triton.jit(do_not_specialize=["H", "TQ", "TK", "window", "before"])
def to_queries(q, k, v, mask, out, low, upstream, tops, inverses, deltas, dq, weights, slopes,
               sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, so_b, so_h, so_t, sm_b, sm_h, sm_q, sm_k,
               su_b, su_h, su_t, sd_b, sd_h, sd_t, sw_t, H, TQ, TK, window, before,
               BOTH: tl.constexpr, SPAN: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, MASK: tl.constexpr, SHIFT: tl.constexpr,
               WIDE: tl.constexpr, PRECISION: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
               BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """dq = dx k for dx = p (dp - delta) dy/dx, dp = upstream v^T, delta = sum_j p dp = upstream . out, which is stored.

    Heads are counted from the ``before``-th on. SPAN > 0: p and dx are left in ``weights`` and ``slopes`` [head, query, key] for
    ``by_weights``, with zeros where a square of SPAN queries and keys has pairs that KIND shuts; rows are ``sw_t`` long.
    """
    blocks = tl.cdiv(TQ, BLOCK_M)
    start = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    head = tl.program_id(0) // blocks
    if SPAN > 0:
        weights += head.to(tl.int64) * TQ * sw_t
        slopes += head.to(tl.int64) * TQ * sw_t
    head += before
    b, h = (head // H).to(tl.int64), (head % H).to(tl.int64)
    k += b * sk_b + h // GROUP * sk_h
    v += b * sv_b + h // GROUP * sv_h
    mask += b * sm_b + h * sm_h
    rows = start + tl.arange(0, BLOCK_M)
    if WIDE:
        rows = rows.to(tl.int64)
    ok = rows < TQ
    dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    grads = _rows(upstream + b * su_b + h * su_h, rows, su_t, dims_v, TQ, DIM_V, BLOCK_V, True)
    whole = _rows(out + b * so_b + h * so_h, rows, so_t, dims_v, TQ, DIM_V, BLOCK_V, True).to(tl.float32)
    if SHIFT > 0:
        lost = _rows(low + b * so_b + h * so_h, rows, so_t, dims_v, TQ, DIM_V, BLOCK_V, True).to(tl.int32)
        whole = (whole.to(tl.int32, bitcast=True) + (lost << SHIFT)).to(tl.float32, bitcast=True)
    delta = tl.sum(grads.to(tl.float32) * whole, 1)
    at = head.to(tl.int64) * TQ + rows
    tl.store(deltas + at, delta, mask=ok)
    top = tl.load(tops + at, mask=ok, other=0.0)
    inverse = tl.load(inverses + at, mask=ok, other=0.0)
    queries = _rows(q + b * sq_b + h * sq_h, rows, sq_t, dims, TQ, DIM, BLOCK_D, True)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first, full, edge, end = _key_spans(start, TK, window, KIND, BLOCK_M, BLOCK_N)
    if KIND == 2:
        acc = _to_queries(
            acc, queries, grads, top, inverse, delta, k, v, mask, weights, slopes, rows, first, full, sk_t, sv_t, sm_q, sm_k, sw_t,
            TQ, TK, window, BOTH, SPAN, KIND, MASK, True, DIM, DIM_V, BLOCK_D, BLOCK_V, BLOCK_N, PRECISION)  # fmt: skip
    acc = _to_queries(
        acc, queries, grads, top, inverse, delta, k, v, mask, weights, slopes, rows, full, edge, sk_t, sv_t, sm_q, sm_k, sw_t,
        TQ, TK, window, BOTH, SPAN, KIND, MASK, False, DIM, DIM_V, BLOCK_D, BLOCK_V, BLOCK_N, PRECISION)  # fmt: skip
    acc = _to_queries(
        acc, queries, grads, top, inverse, delta, k, v, mask, weights, slopes, rows, edge, end, sk_t, sv_t, sm_q, sm_k, sw_t,
        TQ, TK, window, BOTH, SPAN, KIND, MASK, True, DIM, DIM_V, BLOCK_D, BLOCK_V, BLOCK_N, PRECISION)  # fmt: skip
    _store(dq + b * sd_b + h * sd_h, rows, sd_t, dims, TQ, acc.to(dq.dtype.element_ty), DIM)
    if SPAN > 0:
        whole_first, whole_end = _whole_spans(start, TK, window, KIND, SPAN)
        _nothing(weights, slopes, rows, whole_first, first, sw_t, TQ, BLOCK_N)
        _nothing(weights, slopes, rows, tl.cdiv(end, BLOCK_N) * BLOCK_N, whole_end, sw_t, TQ, BLOCK_N)


@triton.jit
def _weighed(weights, x, sw_t, sx_h, sx_t, start, first, turns, TQ, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """sum_i weights_ij x_i over GROUP heads and their queries from ``first`` on, for BLOCK_N keys from ``start``."""
    acc = tl.zeros((BLOCK_N, BLOCK), tl.float32)
    keys, dims = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK)
    for turn in range(GROUP * turns):
        h, row = tl.cast(turn // turns, tl.int64), first + turn % turns * BLOCK_M
        w = _rows_from(weights + h * TQ * sw_t + start, row, sw_t, keys, TQ, BLOCK_N, BLOCK_N, BLOCK_M)
        rows = _rows_from(x + h * sx_h, row, sx_t, dims, TQ, DIM, BLOCK, BLOCK_M)
        acc = tl.dot(w.T, rows, acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["H", "TQ", "TK", "window", "before", "heads"])
def by_weights(q, upstream, weights, slopes, dk, dv, sq_b, sq_h, sq_t, su_b, su_h, su_t, sd_b, sd_h, sd_t, se_b, se_h, se_t, sw_t,
               H, TQ, TK, window, before, heads, GROUP: tl.constexpr, KIND: tl.constexpr, WIDE: tl.constexpr, PRECISION: tl.constexpr,
               DIM: tl.constexpr, DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """dk = dx^T q and dv = p^T upstream, summed over the GROUP query heads that read a key head, from what ``to_queries`` left of p and dx.

    ``heads`` key heads from the ``before``-th on; H of them in a batch's element.
    """
    start = tl.program_id(0) // heads * BLOCK_N                              # the longest first
    local = (tl.program_id(0) % heads).to(tl.int64)
    head = local + before
    b, g = head // H, head % H
    keys = start + tl.arange(0, BLOCK_N)
    if WIDE:
        keys = keys.to(tl.int64)
    first, end = _row_span(start, TQ, window, KIND, BLOCK_M, BLOCK_N)
    turns = tl.cdiv(tl.maximum(end - first, 0), BLOCK_M)
    place = local * GROUP * TQ * sw_t
    acc = _weighed(weights + place, upstream + b * su_b + g * GROUP * su_h, sw_t, su_h, su_t, start, first, turns, TQ,
                   GROUP, DIM_V, BLOCK_V, BLOCK_M, BLOCK_N, PRECISION)  # fmt: skip
    _store(dv + b * se_b + g * se_h, keys, se_t, tl.arange(0, BLOCK_V), TK, acc.to(dv.dtype.element_ty), DIM_V)
    acc = _weighed(slopes + place, q + b * sq_b + g * GROUP * sq_h, sw_t, sq_h, sq_t, start, first, turns, TQ,
                   GROUP, DIM, BLOCK_D, BLOCK_M, BLOCK_N, PRECISION)  # fmt: skip
    _store(dk + b * sd_b + g * sd_h, keys, sd_t, tl.arange(0, BLOCK_D), TK, acc.to(dk.dtype.element_ty), DIM)


@triton.jit(do_not_specialize=["H", "TQ", "TK", "window"])
def to_keys(q, k, v, mask, upstream, tops, inverses, deltas, dk, dv,
            sq_b, sq_h, sq_t, sk_b, sk_h, sk_t, sv_b, sv_h, sv_t, sm_b, sm_h, sm_q, sm_k, su_b, su_h, su_t,
            sd_b, sd_h, sd_t, se_b, se_h, se_t, H, TQ, TK, window,
            BOTH: tl.constexpr, WHICH: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, MASK: tl.constexpr,
            WIDE: tl.constexpr, PRECISION: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
            BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """dk = dx^T q and dv = p^T upstream, summed over the GROUP query heads that read a key head. Keys down, queries across; H key heads.

    WHICH: 1 dv, 2 dk, 3 both. What is not asked for is a block of one element, and what only it reads is not read.
    """
    blocks = tl.cdiv(TK, BLOCK_N)
    start = tl.program_id(0) % blocks * BLOCK_N
    head = tl.program_id(0) // blocks
    b, g = (head // H).to(tl.int64), (head % H).to(tl.int64)
    keys = start + tl.arange(0, BLOCK_N)
    if WIDE:
        keys = keys.to(tl.int64)
    dims, dims_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    kt = _rows_from(k + b * sk_b + g * sk_h, start, sk_t, dims, TK, DIM, BLOCK_D, BLOCK_N)
    values = kt
    if WHICH != 1:
        values = _rows_from(v + b * sv_b + g * sv_h, start, sv_t, dims_v, TK, DIM_V, BLOCK_V, BLOCK_N)
    to_k = tl.zeros((BLOCK_N if WHICH != 1 else 1, BLOCK_D if WHICH != 1 else 1), tl.float32)
    to_v = tl.zeros((BLOCK_N if WHICH != 2 else 1, BLOCK_V if WHICH != 2 else 1), tl.float32)
    first, end = _row_span(start, TQ, window, KIND, BLOCK_M, BLOCK_N)
    turns = tl.cdiv(tl.maximum(end - first, 0), BLOCK_M)
    for turn in range(GROUP * turns):                                     # one loop over heads and queries: nothing is loaded anew between
        h = g * GROUP + turn // turns
        first_row = first + turn % turns * BLOCK_M
        rows = first_row + tl.arange(0, BLOCK_M)
        if WIDE:
            rows = rows.to(tl.int64)
        ok = rows < TQ                                                    # beyond, the inverse is 0
        at = (b * H * GROUP + h) * TQ + rows
        queries = _rows_from(q + b * sq_b + h * sq_h, first_row, sq_t, dims, TQ, DIM, BLOCK_D, BLOCK_M)
        grads = _rows_from(upstream + b * su_b + h * su_h, first_row, su_t, dims_v, TQ, DIM_V, BLOCK_V, BLOCK_M)
        y, slope = BOTH(tl.dot(kt, queries.T, input_precision=PRECISION))
        flags = mask + b * sm_b + h * sm_h
        y = _masked(y, rows[None, :], keys[:, None], flags, sm_q, sm_k, TQ, TK, window, KIND, MASK, KIND > 0)
        top = tl.load(tops + at, mask=ok, other=float("inf"))
        inverse = tl.load(inverses + at, mask=ok, other=0.0)
        p = tl.exp2(y - top[None, :]) * inverse[None, :]
        if WHICH != 2:
            to_v = tl.dot(p.to(grads.dtype), grads, to_v, input_precision=PRECISION)
        if WHICH != 1:
            delta = tl.load(deltas + at, mask=ok, other=0.0)
            dp = tl.dot(values, grads.T, input_precision=PRECISION)
            dx = _cut(p * (dp - delta[None, :]) * slope, rows[None, :], keys[:, None], flags, sm_q, sm_k, TQ, TK, MASK)
            to_k = tl.dot(dx.to(queries.dtype), queries, to_k, input_precision=PRECISION)
    if WHICH != 1:
        _store(dk + b * sd_b + g * sd_h, keys, sd_t, dims, TK, to_k.to(dk.dtype.element_ty), DIM)
    if WHICH != 2:
        _store(dv + b * se_b + g * se_h, keys, se_t, dims_v, TK, to_v.to(dv.dtype.element_ty), DIM_V)
