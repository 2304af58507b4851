"""PyTorch's scaled_dot_product_attention, apart from the plans that PyTorch keeps for cuDNN.

cuDNN's backward is a plan for the memory layout of each tensor that it reads, the gradient of the result among them. PyTorch looks plans
up by the layouts of q, k and v alone (ATen/native/cudnn/MHA.cpp, ``MHACacheKeyWrapper``), for the whole process. A gradient that is laid
out in another way than the first one that came with such q, k and v is read by that one's strides: the gradients of q, k and v are then
wrong by their own size, and nobody says so. Here

    every gradient of the result comes as [batch, length, head, dim] in memory, which is how nearly all models make it;
    without dropout no plan is shared with other callers: the key has the bits of dropout_p, and a probability of -0.0 is one of 0.0.

With dropout plans are shared, and right as long as the others' gradients come that way too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .products import LOW

DEVICES = ("cuda",)  # that have cuDNN


def scaled_dot_product_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``: the same arguments, numbers and errors."""
    alone = query.device.type in DEVICES
    if alone and dropout_p == 0:
        dropout_p = -0.0
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    if alone and out.requires_grad and out.dim() == 4 and out.dtype in LOW:
        out.register_hook(by_rows)
    return out


def by_rows(gradient: torch.Tensor) -> torch.Tensor:
    """[batch, head, length, dim] whose memory is [batch, length, head, dim]: as it is, or copied."""
    rows = gradient.transpose(1, 2)
    return gradient if rows.is_contiguous() else rows.contiguous().transpose(1, 2)
