"""A linear and its cross-entropy become one call; logits that are also read elsewhere become lazy ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slothc.kernels.vocab import linear_cross_entropy
from slothc.kernels.vocab_chain import Adapter
from slothc.lazy_logits import lazy_logits
from slothc.patterns.rule import Match

from .lora_linear import joined
from .replacement import Replacement

_PARTS = ("low", "up", "c", "scale", "factor")


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
    adapter: Adapter | None = None,
) -> Tensor:
    """The loss of a head: hidden [..., D] sliced by ``index``, the first ``vocab`` rows of weight and bias; an adapter likewise.

    Returns a scalar, or a tensor like labels for reduction "none", times ``sign``; ``picked``: without their last dimension.
    """
    hidden = hidden if index is None else hidden[index]
    if adapter is not None:
        low, up, scale = adapter
        low = low if index is None else low[index]
        adapter = low.reshape(-1, low.shape[-1]), up[:vocab], scale
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
        adapter=adapter,
    )
    loss = loss.reshape(labels.shape[:-1] if picked else labels.shape) if reduction == "none" else loss
    return loss if sign == 1 else -loss


def adapted_head_loss(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *parts: Any, **attrs: Any) -> Tensor:
    """``head_loss`` of a head with the adapters in ``parts`` (see ``joined``)."""
    bias, low, up, scale = joined(bias, parts, -1)
    return head_loss(hidden, weight, bias, labels, **attrs, adapter=(low, up, scale))


def adapted_lazy_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, chain: str, *parts: Any) -> Tensor:
    """``lazy_logits`` of a head with the adapters in ``parts``."""
    bias, low, up, scale = joined(bias, parts, -1)
    return lazy_logits(hidden, weight, bias, chain, (low, up, scale))


def bind(match: Match) -> list[Replacement]:
    """The loss in one call, and a lazy value for every node in ``match.extra``."""
    inputs, attrs = match.inputs, dict(match.attrs)
    lazy: dict[Any, str] = attrs.pop("lazy")
    head = (inputs["hidden"], inputs["weight"], inputs["bias"])
    parts = tuple(adapter[name] for adapter in inputs["adapters"] for name in _PARTS)
    loss, logits = (adapted_head_loss, adapted_lazy_logits) if parts else (head_loss, lazy_logits)
    made = [Replacement(node, logits, (*head, chain, *parts), {}) for node, chain in lazy.items()]
    return [Replacement(match.node, loss, (*head, inputs["labels"], *parts), attrs), *made]
