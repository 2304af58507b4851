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
