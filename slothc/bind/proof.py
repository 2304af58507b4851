"""An attention kernel is held against the written form once, before its first result is used.

The check of a rewrite does not run attention at large sizes: it would hold the scores. This one runs the kernel that is about to be used,
for the same dtype, chain, kind of mask, widths and groups, on made-up operands of a few blocks.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from slothc.check import TINY, Distances
from slothc.errors import RegionDropped
from slothc.kernels.scores import attend
from slothc.kernels.scores_written import written

from .masks import observable

LENGTH, WINDOW, DRAWS = 200, 70, 3
_proofs: dict[tuple[Any, ...], str | None] = {}


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, **how: Any) -> Tensor:
    """``attend``, or the written form where the kernel is farther from truth than that."""
    group = q.shape[1] // max(k.shape[1], 1)
    flags = None if mask is None else mask.dtype
    key = (q.device, q.dtype, q.shape[3], v.shape[3], group, flags, sinks is not None, how["chain"], how["kind"], how.get("fill"))
    if key not in _proofs and observable(q, k, v):
        _proofs[key] = reason = _wrong(q, v, group, flags, sinks is not None, how)
        if reason:
            warnings.warn(f"sloth leaves attention of {q.dtype} to eager: {reason}", RegionDropped, stacklevel=2)
    return (written if _proofs.get(key) else attend)(q, k, v, mask, sinks, **how)


def _wrong(q: Tensor, v: Tensor, group: int, flags: torch.dtype | None, sink: bool, how: dict[str, Any]) -> str | None:
    """What is wrong with the kernel; None if nothing is."""
    how = {**how, "window": WINDOW if how["kind"] == "sliding_window" else 0}
    sums: dict[str, Distances] = {}
    with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
        for seed in range(DRAWS):
            given, mask, upstream = _drawn(seed, q, v, group, flags, sink)
            runs = [_everything(f, given, mask, upstream, wide, how) for f, wide in ((attend, False), (written, False), (written, True))]
            for name, ours, eager, true in zip(("result", "dq", "dk", "dv", "gradient of the sinks"), *runs):
                sums.setdefault(name, Distances()).add(ours, eager, true)
    for name, found in sums.items():
        if not found.holds(TINY[q.dtype]):
            ours, eager = found.errors()
            return f"{name} is {ours:.2e} from float64 truth, eager {eager:.2e}"
    return None


def _drawn(
    seed: int, q: Tensor, v: Tensor, group: int, flags: torch.dtype | None, sink: bool
) -> tuple[list[Tensor], Tensor | None, Tensor]:
    made = torch.Generator(q.device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=made, device=q.device).to(q.dtype)

    given = [normal(1, LENGTH, n, d).transpose(1, 2) for n, d in ((group, q.shape[3]), (1, q.shape[3]), (1, v.shape[3]))]
    given += [normal(group)] if sink else []
    upstream = normal(1, LENGTH, group, v.shape[3]).transpose(1, 2)
    if flags is None:
        return given, None, upstream
    mask = torch.randn(1, 1, LENGTH, LENGTH, generator=made, device=q.device)
    return given, _seen(mask) if flags is torch.bool else mask.to(flags), upstream


def _seen(mask: Tensor) -> Tensor:
    """Flags with at least one that is set in each row."""
    seen = mask > -1.0
    seen[..., 0] = True
    return seen


def _everything(run: Any, given: list[Tensor], mask: Tensor | None, upstream: Tensor, wide: bool, how: dict[str, Any]) -> list[Tensor]:
    """The result and every gradient in float64."""
    leaves = [(t.double() if wide else t).detach().requires_grad_() for t in given]
    sinks = leaves[3] if len(leaves) > 3 else None
    mask = mask.double() if wide and mask is not None and mask.dtype is not torch.bool else mask
    out = run(*leaves[:3], mask, sinks, **how)
    return [t.double() for t in (out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype)))]
