"""Logits and their chain as plain PyTorch operations: what the graph did, for logits that are asked for after all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from slothc.gradients.vocabulary import FUNCTIONS, Chain
from torch import Tensor

from .binding import DTYPE

Adapter = tuple[Tensor, Tensor, float]
"""low [..., r], up [V, r] and s: s low up^T is added to a head's logits."""

STEPS: dict[str, Callable[..., Any]] = {
    "cast": lambda z: z,
    "neg": torch.neg,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "relu": torch.relu,
    "abs": torch.abs,
    "exp": torch.exp,
    "add": torch.add,
    "sub": torch.sub,
    "rsub": torch.rsub,
    "mul": torch.mul,
    "div": torch.div,
    "clamp": torch.clamp,
}
if STEPS.keys() != FUNCTIONS.keys():
    raise ImportError(f"steps without a PyTorch operation or without a formula: {sorted(STEPS.keys() ^ FUNCTIONS.keys())}")


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off, on devices that have it."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def processed(z: Tensor, chain: Chain) -> Tensor:
    """chain(z), rounded to each step's dtype."""
    for step in chain.steps:
        z = STEPS[step.fn](z, *step.numbers).to(DTYPE[step.dtype])
    return z


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, chain: Chain, adapter: Adapter | None = None) -> Tensor:
    """chain(hidden W^T + b + s low up^T), [..., V]: what eager computes. Differentiable."""
    dtype = DTYPE[chain.dtype]
    with no_autocast(hidden.device):
        z = F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
        if adapter is not None:
            low, up, scale = adapter
            z = (z + F.linear(low, up.to(low.dtype)) * scale).to(dtype)
        return processed(z, chain)


def picked(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, chain: Chain, index: Tensor, adapter: Adapter | None = None
) -> Tensor:
    """The same at ``index`` [..., k] of the vocabulary, by k dot products in fp32. Differentiable."""
    dtype = DTYPE[chain.dtype]
    with no_autocast(hidden.device):
        z = _dots(hidden.to(dtype), weight.to(dtype), index)
        z = z if bias is None else z + bias.to(dtype)[index].float()
        if adapter is not None:
            low, up, scale = adapter
            z = z + _dots(low, up.to(low.dtype), index) * scale
        return processed(z.to(dtype), chain)


def _dots(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """x [..., K] with the rows at ``index`` [..., k] of [V, K], in fp32: [..., k]."""
    return (x.float().unsqueeze(-2) * rows[index].float()).sum(-1)
