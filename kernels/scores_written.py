"""Attention whose scores go through a chain, as it stands: what a check compares with, and what runs where a mask shuts whole rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from slothc.gradients.vocabulary import Chain
from torch import Tensor

from .attention import Steps, masked, repeat_heads
from .vocab_chain import STEPS


def scored(q: Tensor, k: Tensor, v: Tensor, steps: Steps, parts: Sequence[Tensor], chain: str, sinks: Tensor | None) -> Tensor:
    """softmax(steps(chain(q k^T))) v, a sink beside the scores, the softmax in fp32 at least."""
    if k.shape[1] != q.shape[1]:
        k, v = (repeat_heads(t, q.shape[1] // t.shape[1]) for t in (k, v))
    scores = q @ k.transpose(-2, -1)
    for step in Chain.parse(chain).steps:
        scores = STEPS[step.fn](scores, *step.numbers)
    scores = masked(scores, steps, parts)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, column), -1)
    weights = torch.softmax(scores, -1, torch.promote_types(scores.dtype, torch.float32))
    return (weights if sinks is None else weights[..., :-1]).to(v.dtype) @ v


def written(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, sinks: Tensor | None = None, *, chain: str, kind: str = "none",
    window: int = 0, fill: float = float("-inf"), swapped: bool = True,
) -> Tensor:  # fmt: skip
    """``scores.attend``, written out."""
    steps: list[tuple[str, float]] = []
    parts: list[Tensor] = []
    if mask is not None:
        steps.append(("keep" if mask.dtype is torch.bool else "add", fill))
        parts.append(mask)
    if kind != "none":
        i, j = torch.arange(q.shape[2], device=q.device)[:, None], torch.arange(k.shape[2], device=q.device)
        steps.append(("keep", float("-inf")))
        parts.append((j <= i) & (j > i - window) if kind == "sliding_window" else j <= i)
    return scored(q, k, v, steps, parts, chain, sinks)
