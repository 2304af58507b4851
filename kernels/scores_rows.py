"""The ``scores`` family as plain PyTorch: what a device without Triton runs, in fp32, a block of queries at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .scores_program import torch_functions

LOG2E = 1.4426950408889634
SHUT = -1e30
ELEMENTS = 1 << 22            # scores in one block


def forward_rows(s: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, saved: tuple[Tensor, ...]) -> None:
    """Fills ``saved``: out, the bits that rounding it took, the largest logit and 1 / the sum of weights of each row."""
    value, _ = torch_functions(s.chain)
    out, low, tops, inverses = saved
    keys, values = (_repeated(t, q.shape[1]) for t in (k, v))
    for rows in _blocks(q, k):
        y, _ = _masked(s, value(q[:, :, rows].float() @ keys.transpose(2, 3)), mask, rows)
        top = y.amax(-1)
        if sinks is not None:
            sink = sinks.float()[None, :, None] * LOG2E
            top = torch.maximum(top, sink)
        p = torch.exp2(y - torch.where(top == -torch.inf, 0.0, top)[..., None])
        total = p.sum(-1)
        if sinks is not None:
            total = total + torch.exp2(sink - top)
        whole = p @ values / total[..., None]
        out[:, :, rows], tops[:, :, rows], inverses[:, :, rows] = whole.to(out.dtype), top, 1 / total
        if low.numel():
            low[:, :, rows] = bits(whole, out[:, :, rows])


def bits(whole: Tensor, rounded: Tensor) -> Tensor:
    """The first eight of the bits that rounding took."""
    shift = 8 if rounded.dtype is torch.bfloat16 else 5
    lost = whole.view(torch.int32) - rounded.float().view(torch.int32)
    return ((lost + (1 << (shift - 1))) >> shift).clamp(-128, 127).to(torch.int8)


def whole(rounded: Tensor, low: Tensor) -> Tensor:
    """The result in fp32, as far as it was kept."""
    if rounded.dtype is torch.float32:
        return rounded
    shift = 8 if rounded.dtype is torch.bfloat16 else 5
    return (rounded.float().view(torch.int32) + (low.to(torch.int32) << shift)).view(torch.float32)


def backward_rows(
    s: Any, upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, saved: tuple[Tensor, ...], into: tuple[Tensor, ...],
    deltas: Tensor,
) -> None:  # fmt: skip
    """Fills ``into`` (dq, dk, dv) and ``deltas`` [batch, head, query]."""
    _, both = torch_functions(s.chain)
    out, low, tops, inverses = saved
    dq, dk, dv = into
    keys, values = (_repeated(t, q.shape[1]) for t in (k, v))
    to_k, to_v = torch.zeros_like(keys), torch.zeros_like(values)
    torch.sum(upstream.float() * whole(out, low), -1, out=deltas)
    for rows in _blocks(q, k):
        queries, grads = q[:, :, rows].float(), upstream[:, :, rows].float()
        y, slope = both(queries @ keys.transpose(2, 3))
        y, keep = _masked(s, y, mask, rows)
        p = torch.exp2(y - tops[:, :, rows, None]) * inverses[:, :, rows, None]
        dx = p * (grads @ values.transpose(2, 3) - deltas[:, :, rows, None]) * slope
        dx = dx if keep is None else torch.where(keep, dx, 0.0)
        dq[:, :, rows] = (dx @ keys).to(dq.dtype)
        to_k += dx.transpose(2, 3) @ queries
        to_v += p.transpose(2, 3) @ grads
    group = q.shape[1] // k.shape[1]
    dk.copy_(to_k.unflatten(1, (-1, group)).sum(2))
    dv.copy_(to_v.unflatten(1, (-1, group)).sum(2))


def _blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    step = max(1, ELEMENTS // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], step):
        yield slice(start, min(start + step, q.shape[2]))


def _repeated(t: Tensor, heads: int) -> Tensor:
    return t.float().repeat_interleave(heads // t.shape[1], 1)


def _masked(s: Any, y: Tensor, mask: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
    """y behind the mask, and where a mask of flags keeps it."""
    keep = None
    if mask is not None:
        part = mask[:, :, rows]
        if part.dtype is torch.bool:
            keep = part
            y = torch.where(part, y, max(s.fill, SHUT * LOG2E) if s.fill != -torch.inf else s.fill)
        else:
            more = part.float()
            y = y + torch.where((more < SHUT) & (more > -torch.inf), SHUT, more) * LOG2E
    if s.kind != "none":
        i = torch.arange(rows.start, rows.stop, device=y.device)[:, None]
        j = torch.arange(y.shape[-1], device=y.device)
        seen = (j <= i) & (j > i - s.window) if s.kind == "sliding_window" else j <= i
        y = torch.where(seen, y, -torch.inf)
    return y, keep
