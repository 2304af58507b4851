"""A linear and its cross-entropy become one call; logits that are also read elsewhere become lazy ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slothc.kernels.vocab import linear_cross_entropy
from slothc.lazy_logits import lazy_logits
from slothc.patterns.rule import Match

from .replacement import Replacement


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    index: tuple[slice, ...] | None,
    vocab: int | None,
    chain: str,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    sign: float,
    picked: bool,
    dtype: torch.dtype,
) -> Tensor:
    """The loss of a head: hidden [..., D] sliced by ``index``, the first ``vocab`` rows of weight and bias.

    Returns a scalar, or a tensor like labels for reduction "none", times ``sign``; ``picked``: without their last dimension.
    """
    hidden = hidden if index is None else hidden[index]
    if vocab is not None:
        weight, bias = weight[:vocab], None if bias is None else bias[:vocab]
    loss = linear_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        labels.reshape(-1),
        chain=chain,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
        dtype=dtype,
    )
    loss = loss.reshape(labels.shape[:-1] if picked else labels.shape) if reduction == "none" else loss
    return loss if sign == 1 else -loss


def bind(match: Match) -> list[Replacement]:
    """The loss in one call, and a lazy value for every node in ``match.extra``."""
    inputs, attrs = match.inputs, dict(match.attrs)
    lazy: dict[Any, str] = attrs.pop("lazy")
    head = (inputs["hidden"], inputs["weight"], inputs["bias"])
    made = [Replacement(node, lazy_logits, (*head, chain), {}) for node, chain in lazy.items()]
    return [Replacement(match.node, head_loss, (*head, inputs["labels"]), attrs), *made]
