"""The ``scores`` family: attention whose scores a library's kernel has no word for, without holding them.

    out[b,h,i,:] = sum_j p_ij v[b,h//n,j,:],   p = softmax over j of (f(q_i . k_j) + mask_ij), with a sink s_h beside the scores or without

f is any chain of pointwise steps (a scale, a soft-cap), its derivative comes from its formula. A sink is one more column that has no value.
The forward keeps no score. The backward makes them for dq and again for dk and dv; of heads so wide that this costs more than memory
does, it leaves p and dx of some heads at a time (``scores_launch.LEFT``).

The backward needs delta_i = sum_j p_ij dp_ij = upstream_i . out_i, and subtracts it from numbers near to it where weights are nearly alike:
from a result rounded to 16 bits, gradients of q and k can be farther from truth than those of the written form, which sums p dp. So the
forward keeps the next eight bits of the result too (one byte an element; the sum itself would be two more products), and divides the sum
of values by that of the weights as they were rounded for it. For weights that differ by a thousandth, bf16 gradients are then 2.4e-3 from
truth, the written form's 8e-2; with one of the two alone they are 2e-2 to 9e-2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from slothc.gradients.vocabulary import Chain
from torch import Tensor

from .broken import give_up
from .devices import available
from .once import once_differentiable
from .scores_launch import BY_KEYS, KEPT, MOST, Form, Kernel, Part, at_once, keyed, left_row
from .scores_rows import backward_rows, forward_rows
from .tracing import traced
from .vocab_chain import no_autocast

KINDS = ("none", "causal", "sliding_window")
WIDE = 1 << 31
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

Three = tuple[Tensor, Tensor, Tensor]
Saved = tuple[Tensor, Tensor, Tensor, Tensor]
"""out, the bits that rounding it took, and of each row [batch, head, query] the largest logit in base 2 and 1 / sum of its weights."""


@dataclass(frozen=True)
class Scoring:
    """What makes weights out of products. ``chain``: the text of a ``Chain`` in fp32. ``fill``: what stands where a mask of flags is clear.

    ``swapped``: the result lies in memory as [batch, query, head, dim].
    """

    chain: str
    kind: str = "none"
    window: int = 0
    fill: float = float("-inf")
    swapped: bool = True

    def form(self, mask: Tensor | None, sinks: Tensor | None) -> Form:
        flags = 0 if mask is None else 1 if mask.dtype != torch.bool else 2 if self.fill == float("-inf") else 3
        return Form(self.chain, KINDS.index(self.kind), flags, sinks is not None)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None, *, chain: str, kind: str = "none",
    window: int = 0, fill: float = float("-inf"), swapped: bool = True,
) -> Tensor:  # fmt: skip
    """Attention for q [batch, head, query, dim], k [batch, head or fewer, key, dim] and v [.., key, value dim] of one dtype.

    ``kind``: none, causal (key <= query) or sliding_window (the last ``window`` of those). ``mask`` broadcasts to the scores: floating
    point is added, with bool ``fill`` (-inf, or a number that takes in any score) stands where it is false. ``sinks`` [head]. There is
    no gradient to the mask. Raises ValueError for operands that do not fit.
    """
    s = Scoring(chain, kind, int(window), float(fill), swapped)
    _validate(q, k, v, mask, sinks, s)
    mask = None if mask is None else mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    given = (q, k, v, mask, sinks)
    if traced(*given) or not all(t is None or _is_plain(t) for t in given):
        return _op(*given, *_arguments(s))[0]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return _Attend.apply(s, *given)
    return forward(s, *given)[0]


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter) and t.device.type != "meta"


def _arguments(s: Scoring) -> tuple[str, str, int, float, bool]:
    return s.chain, s.kind, s.window, s.fill, s.swapped


def _validate(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, s: Scoring) -> None:
    if any(t.dim() != 4 for t in (q, k, v)) or q.dtype not in DTYPES or not q.dtype == k.dtype == v.dtype:
        found = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in (q, k, v))
        raise ValueError(f"queries, keys and values must be [batch, head, length, dim] in one of {DTYPES}, not {found}")
    fits = k.shape[:3] == v.shape[:3] and q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3]
    if not fits or k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"queries {tuple(q.shape)}, keys {tuple(k.shape)} and values {tuple(v.shape)} do not fit each other")
    if max(q.shape[3], v.shape[3]) > MOST:
        raise ValueError(f"heads have {max(q.shape[3], v.shape[3])} dimensions; the kernels take up to {MOST}")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise ValueError(f"sinks are {tuple(sinks.shape)}: expected one for each of {q.shape[1]} heads")
    if mask is not None and mask.requires_grad:
        raise ValueError("the mask requires a gradient")
    if mask is not None and mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise ValueError(f"the mask is {mask.dtype}: expected bool or floating point")
    if s.kind not in KINDS or (s.kind == "sliding_window" and s.window < 1):
        raise ValueError(f"{s.kind} with a window of {s.window} is not one of {', '.join(KINDS)}")
    Chain.parse(s.chain)


def forward(s: Scoring, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Saved:
    saved = _outputs(s, q, v)
    if saved[0].numel() == 0 or k.shape[2] == 0:
        saved[0].zero_()
        return saved
    with no_autocast(q.device), torch.no_grad():
        if not (_generates(q) and _launched(q, lambda: _forward(s, q, k, v, mask, sinks, saved))):
            forward_rows(s, q, k, v, mask, sinks, saved)
    return saved


def _forward(s: Scoring, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, saved: Saved) -> None:
    q, k, v = (_rows_lie(t) for t in (q, k, v))
    flags = _bytes(mask, q)
    run = _kernel("forward", s.form(mask, sinks), s.window, q, k, v, flags, (saved[0],))
    run(q, k, v, flags, q if sinks is None else sinks, *saved)


_broken: set[tuple[torch.device, torch.dtype, int]] = set()


def _generates(q: Tensor) -> bool:
    return available(q.device) and (q.device, q.dtype, q.shape[3]) not in _broken


def _launched(q: Tensor, launch: Callable[[], None]) -> bool:
    """Whether the kernels run. Where they cannot be built or do not fit the device, PyTorch does it from then on, with one warning."""
    try:
        launch()
    except Exception as error:
        give_up(_broken, (q.device, q.dtype, q.shape[3]), q.device, "computes attention", error)
        return False
    return True


def _outputs(s: Scoring, q: Tensor, v: Tensor) -> Saved:
    b, h, t, _ = q.shape
    shape = (b, t, h, v.shape[3]) if s.swapped else (b, h, t, v.shape[3])
    out = q.new_empty(shape)
    low = q.new_empty(shape if q.dtype is not torch.float32 else (0,) * 4, dtype=torch.int8)
    out, low = (x.transpose(1, 2) if s.swapped else x for x in (out, low))
    return out, low, q.new_empty((b, h, t), dtype=torch.float32), q.new_empty((b, h, t), dtype=torch.float32)


def backward(
    s: Scoring, upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, saved: Saved,
    to_keys: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The gradients of q, k (with v's, left empty where not asked for) and the sinks."""
    dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
    if saved[0].numel() == 0 or k.shape[2] == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), None if sinks is None else torch.zeros_like(sinks)
    with no_autocast(q.device), torch.no_grad():
        made = (t if _lies(t) else torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (dq, dk, dv))
        into: Three = tuple(made)  # type: ignore[assignment]
        deltas = torch.empty_like(saved[2])
        if not (_generates(q) and _launched(q, lambda: _backward(s, upstream, q, k, v, mask, saved, into, deltas, to_keys))):
            backward_rows(s, upstream, q, k, v, mask, saved, into, deltas)
        return *into, None if sinks is None else _to_sinks(sinks, saved[2], saved[3], deltas)


def _backward(
    s: Scoring, upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, saved: Saved, into: Three, deltas: Tensor,
    to_keys: bool,
) -> None:  # fmt: skip
    """Fills ``into`` (dq, dk, dv) and ``deltas``."""
    q, k, v, upstream = (_rows_lie(t) for t in (q, k, v, upstream))
    (out, low, tops, inverses), (dq, dk, dv) = saved, into
    form, flags = s.form(mask, None), _bytes(mask, q)
    (b, h, tq, d), (kv, tk) = q.shape, k.shape[1:3]
    dims, group = (d, v.shape[3]), h // kv
    count = at_once(b * kv, group, (tq, tk), dims, q.element_size()) if to_keys else 0
    if not count:
        run = _kernel("to_queries", form, s.window, q, k, v, flags, (out, upstream, dq))
        run(q, k, v, flags, out, low, upstream, tops, inverses, deltas, dq, dq, dq)
        for name in keyed(dims) if to_keys else ():
            run = _kernel(name, form, s.window, q, k, v, flags, (upstream, dk, dv))
            run(q, k, v, flags, upstream, tops, inverses, deltas, dk, dv)
        return
    weights, slopes = q.new_empty((2, count * group * tq * left_row(tk)))
    for before in range(0, b * kv, count):
        some = min(count, b * kv - before)
        part = Part(before * group, some * group, True)
        run = _kernel("to_queries", form, s.window, q, k, v, flags, (out, upstream, dq), part)
        run(q, k, v, flags, out, low, upstream, tops, inverses, deltas, dq, weights, slopes)
        run = _kernel("by_weights", form, s.window, q, k, v, flags, (upstream, dk, dv), Part(before, some, True))
        run(q, upstream, weights, slopes, dk, dv)


def _to_sinks(sinks: Tensor, tops: Tensor, inverses: Tensor, deltas: Tensor) -> Tensor:
    """Every column's gradient is p (dp - delta); a sink's dp is 0."""
    p = torch.exp2(sinks.float()[None, :, None] * 1.4426950408889634 - tops) * inverses
    return -(p * deltas).sum((0, 2)).to(sinks.dtype)


def _lies(t: Tensor) -> bool:
    """Whether a row's elements have no gaps between them."""
    return t.stride(3) == 1 or t.shape[3] == 1


def _rows_lie(t: Tensor) -> Tensor:
    return t if _lies(t) else t.contiguous()


def _bytes(mask: Tensor | None, like: Tensor) -> Tensor:
    """The mask as what a kernel reads; anything where there is none."""
    return like if mask is None else mask.view(torch.uint8) if mask.dtype is torch.bool else mask


_kernels: dict[tuple[Any, ...], Kernel] = {}


def _kernel(
    name: str, form: Form, window: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, more: Sequence[Tensor], part: Part | None = None
) -> Kernel:
    """The kernel for these operands' dtypes, shapes and strides. ``more``: those whose strides follow. ``part``: of the heads, or all."""
    tensors = (q, k, v, mask, *more)
    key = (name, form, window, part, q.device, mask.dtype, q.dtype, q.shape, k.shape[1:3], v.shape[3], *(t.stride() for t in tensors))
    found = _kernels.get(key)
    if found is None:
        while len(_kernels) >= KEPT:
            _kernels.pop(next(iter(_kernels)))
        (b, h, tq, d), (kv, tk), dv = q.shape, k.shape[1:3], v.shape[3]
        heads = kv if name in BY_KEYS else h
        part = part or Part(0, b * heads)
        far = max(sum((n - 1) * abs(m) for n, m in zip(t.shape[2:], t.stride()[2:])) for t in tensors)
        numbers = (*_strides(name, form, q, k, v, mask, more), *_counts(name, part, heads, tq, tk, window))
        found = _kernels[key] = Kernel(name, form, q.dtype, (d, dv), h // kv, far >= WIDE, part, (tq, tk), numbers, q.device)
    return found


def _strides(name: str, form: Form, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, more: Sequence[Tensor]) -> list[int]:
    if name == "by_weights":
        return [n for t in (q, *more) for n in t.stride()[:3]]
    before = 0 if name in BY_KEYS else 1                                # the result's strides come before the mask's
    strides = [n for t in (q, k, v, *more[:before]) for n in t.stride()[:3]]
    strides += mask.stride() if form.mask else (0, 0, 0, 0)
    return strides + [n for t in more[before:] for n in t.stride()[:3]]


def _counts(name: str, part: Part, heads: int, tq: int, tk: int, window: int) -> tuple[int, ...]:
    every = (heads, tq, tk, window)
    if name == "by_weights":
        return (left_row(tk), *every, part.before, part.count)
    return (left_row(tk), *every, part.before) if name == "to_queries" else every


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Scoring, *given: Any) -> Tensor:
        saved = forward(s, *given)
        ctx.s = s
        ctx.save_for_backward(*given, *saved)
        return saved[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, mask, sinks, *saved = ctx.saved_tensors
        _, wq, wk, wv, _, ws = ctx.needs_input_grad
        dq, dk, dv, ds = backward(ctx.s, upstream, q, k, v, mask, sinks, tuple(saved), wk or wv)  # type: ignore[arg-type]
        return None, dq if wq else None, dk if wk else None, dv if wv else None, None, ds if ws else None


@torch.library.custom_op("sloth::attend", mutates_args=())
def _op(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None,
    chain: str, kind: str, window: int, fill: float, swapped: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """out, the bits that rounding it took, the largest logit of each row in base 2, and 1 / sum of its weights."""
    return forward(Scoring(chain, kind, window, fill, swapped), q, k, v, mask, sinks)


@_op.register_fake
def _op_fake(q: Tensor, k: Tensor, v: Tensor, mask: Any, sinks: Any, *arguments: Any) -> Saved:
    return _outputs(Scoring(*arguments), q, v)


@torch.library.custom_op("sloth::attend_gradients", mutates_args=())
def _gradients_op(
    upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None,
    out: Tensor, low: Tensor, tops: Tensor, inverses: Tensor, chain: str, kind: str, window: int, fill: float, swapped: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv and the sinks' gradient, which is empty where there are none."""
    s = Scoring(chain, kind, window, fill, swapped)
    dq, dk, dv, ds = backward(s, upstream, q, k, v, mask, sinks, (out, low, tops, inverses))
    return dq, dk, dv, q.new_empty(0) if ds is None else ds


@_gradients_op.register_fake
def _gradients_fake(upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Any, sinks: Tensor | None, *_: Any) -> tuple[Tensor, ...]:
    return (*(torch.empty_like(t) for t in (q, k, v)), q.new_empty(0) if sinks is None else torch.empty_like(sinks))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.arguments = inputs[5:]
    ctx.save_for_backward(*inputs[:5], *output)
    ctx.mark_non_differentiable(*output[1:])


def _op_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    *given, sinks, out, low, tops, inverses = ctx.saved_tensors
    dq, dk, dv, ds = _gradients_op(upstream, *given, sinks, out, low, tops, inverses, *ctx.arguments)
    return dq, dk, dv, None, None if sinks is None else ds, *(None,) * 5


_op.register_autograd(_op_backward, setup_context=_setup)
