"""How a block's parts are put together around the residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .assembled import Block


def scaled(block: Block, x: Tensor) -> Tensor:
    x = torch.add(x, block.attention(block.first(x)), alpha=0.5)
    return x.mul(0.9) + block.mlp(block.second(x)) * 0.7


def parallel(block: Block, x: Tensor) -> Tensor:
    """Both from one point, by two norms."""
    return x + block.attention(block.first(x)) + block.mlp(block.second(x))


def sandwiched(block: Block, x: Tensor) -> Tensor:
    """Norms before and after each part: four."""
    x = x + block.third(block.attention(block.first(x)))
    return x + block.fourth(block.mlp(block.second(x)))


def several_streams(block: Block, x: Tensor) -> Tensor:
    """Two residual streams mixed by learned numbers."""
    s = block.scales.to(x.dtype)
    left, right = x * s[0], torch.roll(x, 1, dims=-1) * s[1]
    done = block.attention(block.first(left + right))
    left, right = torch.stack((left + done, right), dim=0).unbind(0)
    return left * s[2] + right * s[3] + block.mlp(block.second(left))


def in_turn(block: Block, x: Tensor) -> Tensor:
    """Each part's result runs through a learned gate of its own."""
    a, b = torch.sigmoid(block.scales[0]).to(x.dtype), torch.sigmoid(block.scales[1]).to(x.dtype)
    x = torch.lerp(x, block.attention(block.first(x)), a)
    return x * (1 - b) + b * block.mlp(block.second(x))
