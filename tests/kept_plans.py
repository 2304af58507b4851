"""cuDNN's attention as PyTorch calls it, on a CPU: a backward that is planned once for the layouts of q, k and v, and then reads every
gradient by the strides of the first one.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

Plans = dict[tuple[Any, ...], tuple[int, ...]]


@contextmanager
def kept_plans() -> Iterator[Plans]:
    """Inside, every ``scaled_dot_product_attention`` on a CPU is that one. The strides that were planned for, by key."""
    plans: Plans = {}

    def attention(q: Any, k: Any, v: Any, mask: Any = None, p: float = 0.0, causal: bool = False, **more: Any) -> torch.Tensor:
        result: torch.Tensor = _Attention.apply(plans, q, k, v, mask, p, causal, more.get("scale"))
        return result

    library = torch.library.Library("aten", "IMPL")
    library.impl("scaled_dot_product_attention", attention, "AutogradCPU")
    try:
        yield plans
    finally:
        library._destroy()
        torch.ops.aten.scaled_dot_product_attention.default._dispatch_cache.clear()   # where Python has looked the key up


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plans: Plans, q: Any, k: Any, v: Any, mask: Any, p: float, causal: bool, scale: Any) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.plans, ctx.rest = plans, (mask, causal, scale)
        given = None if mask is None else mask.stride()
        ctx.key = (q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(), given, struct.pack("d", p), causal)
        return torch.empty_like(q[..., :1].expand(*q.shape[:-1], v.shape[-1])).copy_(_math(q, k, v, *ctx.rest))

    @staticmethod
    def backward(ctx: Any, *given: torch.Tensor) -> Any:
        (gradient,) = given
        strides = ctx.plans.setdefault(ctx.key, gradient.stride())
        last = gradient.storage_offset() + sum((n - 1) * s for n, s in zip(gradient.shape, strides))
        outside = last >= gradient.untyped_storage().nbytes() // gradient.itemsize
        read = torch.full_like(gradient, torch.nan) if outside else gradient.as_strided(gradient.shape, strides)
        leaves = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        with torch.enable_grad():
            result = _math(*leaves, *ctx.rest)
        return (None, *torch.autograd.grad(result, leaves, read), None, None, None, None)


def _math(q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: Any) -> torch.Tensor:
    n, wide = q.shape[1] // k.shape[1], torch.promote_types(q.dtype, torch.float32)
    k, v = (t.repeat_interleave(n, 1).to(wide) if n > 1 else t.to(wide) for t in (k, v))
    scores = q.to(wide) @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = torch.where(mask, scores, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return (torch.softmax(scores, -1) @ v).to(q.dtype)
