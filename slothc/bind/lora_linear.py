"""LoRA linear matches onto the low-rank family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slothc.kernels.lowrank import lora_linear
from slothc.patterns.rule import Match

from .replacement import Replacement

WEIGHT = 2                                # the weight's place among the arguments of both calls
_PARTS = ("a", "b", "c", "scale", "factor")


def joined(bias: Tensor | None, parts: Sequence[Any], dim: int) -> tuple[Tensor | None, Tensor, Tensor, float]:
    """Several adapters as one: sum of s (L B' + c) = s [L..] [B s/s ..]' + sum of s c, the latter added to ``bias``.

    ``parts``: a first factor (A or L, whose rank is dimension ``dim``), b [N, r], c [N] or None, scale and factor (None is 1) of each; s is
    scale * factor. Returns bias, first factor, second factor and s.
    """
    adapters = [parts[k : k + len(_PARTS)] for k in range(0, len(parts), len(_PARTS))]
    scales = [scale if factor is None else scale * factor for *_, scale, factor in adapters]
    s = scales[0] or 1.0
    for (_, _, c, *_), scale in zip(adapters, scales):
        if c is not None:
            bias = c * scale if bias is None else bias + c * scale
    if len(adapters) == 1:
        return bias, *adapters[0][:2], scales[0]
    first = torch.cat([a for a, *_ in adapters], dim)
    return bias, first, torch.cat([b if scale == s else b * (scale / s) for (_, b, *_), scale in zip(adapters, scales)], 1), s


def joined_lora_linear(x: Tensor, xa: Tensor | None, weight: Tensor, bias: Tensor | None, *parts: Any, **attrs: Any) -> Tensor:
    """``lora_linear`` with several adapters as one; ``parts`` as in ``joined``."""
    bias, a, b, s = joined(bias, parts, 0)
    return lora_linear(x, xa, weight, bias, a, b, s, **attrs)


def bind(match: Match) -> list[Replacement]:
    """One call of ``lora_linear`` for the matched sum."""
    inputs = match.inputs
    args = tuple(inputs[name] for name in ("x", "xa", "weight", "bias"))
    if not inputs["more"] and inputs["factor"] is None and inputs["c"] is None:
        return [Replacement(match.node, lora_linear, (*args, inputs["a"], inputs["b"], inputs["scale"]), dict(match.attrs))]
    parts = tuple(adapter[name] for adapter in (inputs, *inputs["more"]) for name in _PARTS)
    return [Replacement(match.node, joined_lora_linear, (*args, *parts), dict(match.attrs))]
