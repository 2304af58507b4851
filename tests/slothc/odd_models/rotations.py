"""Rotations of [batch, heads, tokens, size] by angles [tokens, size/2]. Each turns one tensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Rotation = Callable[[Tensor, Tensor], Tensor]


def angles(tokens: int, size: int, like: Tensor, base: float = 1000.0) -> Tensor:
    """[tokens, size/2] in fp32."""
    speed = base ** (-torch.arange(0, size, 2, device=like.device, dtype=torch.float32) / size)
    return torch.outer(torch.arange(tokens, device=like.device, dtype=torch.float32), speed)


def complex_product(x: Tensor, angle: Tensor) -> Tensor:
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def by_matrix(x: Tensor, angle: Tensor) -> Tensor:
    """Pairs times [[c, s], [-s, c]]."""
    c, s = angle.cos(), angle.sin()
    matrix = torch.stack((torch.stack((c, s), -1), torch.stack((-s, c), -1)), -2)
    return torch.einsum("bhtpi,tpij->bhtpj", x.float().unflatten(-1, (-1, 2)), matrix).flatten(-2).to(x.dtype)


def stacked(x: Tensor, angle: Tensor) -> Tensor:
    c, s = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * c - odd * s, torch.addcmul(odd * c, even, s)), dim=-1).flatten(start_dim=-2)


def unbound(x: Tensor, angle: Tensor) -> Tensor:
    first, second = x.reshape(*x.shape[:-1], 2, -1).unbind(-2)
    c, s = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([first * c - second * s, second * c + first * s], -1)


def rolled(x: Tensor, angle: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    sign = torch.cat((-torch.ones(half, device=x.device), torch.ones(half, device=x.device))).to(x.dtype)
    c, s = (torch.cat((a, a), -1).to(x.dtype) for a in (angle.cos(), angle.sin()))
    return x * c + torch.roll(x, half, dims=-1) * (sign * s)


def other_sense(x: Tensor, angle: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    c, s = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat((first * c + second * s, second * c - first * s), dim=-1)


def partial(x: Tensor, angle: Tensor) -> Tensor:
    """The last half of the lanes turns, the first stays."""
    size = x.shape[-1]
    kept, turned = x.split([size // 2, size // 2], -1)
    c, s = (a[:, : size // 4].repeat(1, 2).to(x.dtype) for a in (angle.cos(), angle.sin()))
    first, second = turned.tensor_split(2, dim=-1)
    return torch.cat([kept, turned * c + torch.cat([second.neg(), first], -1) * s], -1)


def one_cache(x: Tensor, angle: Tensor) -> Tensor:
    """Cosines and sines in one table, as some caches keep them."""
    table = torch.cat((angle.cos(), angle.sin()), dim=-1).to(x.dtype)
    c, s = table.chunk(2, dim=-1)
    left, right = x.narrow(-1, 0, x.shape[-1] // 2), x.narrow(-1, x.shape[-1] // 2, x.shape[-1] // 2)
    return torch.cat((torch.addcmul(left * c, right, s, value=-1), torch.addcmul(right * c, left, s)), -1)


def for_each_head(x: Tensor, angle: Tensor) -> Tensor:
    """Each head turns at a speed of its own."""
    speed = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=torch.float32)[:, None, None]
    c, s = (speed * angle).cos().to(x.dtype), (speed * angle).sin().to(x.dtype)
    first, second = x[..., ::2], x[..., 1::2]
    return torch.stack((c * first - s * second, s * first + c * second), dim=-1).view(x.shape)


ROTATIONS: tuple[Rotation, ...] = (
    complex_product, by_matrix, stacked, unbound, rolled, other_sense, partial, one_cache, for_each_head
)  # fmt: skip
