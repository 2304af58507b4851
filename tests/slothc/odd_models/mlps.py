"""Gated and plain MLPs as nobody spells them. ``counts``: what a reader of one call would count."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GATED, NONE = Counter({"gated_mlp": 1}), Counter[str]()


class Mlp(nn.Module):
    """``down(activated(x))``. ``rows``: the widths of the projections of x, each of ``inner`` where not said."""

    counts: ClassVar[Counter[str]] = GATED
    rows: ClassVar[int] = 2

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.inner = inner
        self.up = nn.Linear(width, self.rows * inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activated(self.up(x)))

    def activated(self, z: Tensor) -> Tensor:
        raise NotImplementedError


class Glu(Mlp):
    def activated(self, z: Tensor) -> Tensor:
        return F.glu(z, dim=-1)


class ByHand(Mlp):
    """x / (1 + exp(-x)) times the other half."""

    def activated(self, z: Tensor) -> Tensor:
        gate, up = z.split(self.inner, dim=-1)
        return gate / (1 + torch.exp(-gate)) * up


class Unflattened(Mlp):
    def activated(self, z: Tensor) -> Tensor:
        pair = z.unflatten(-1, (self.inner, 2))
        return pair.select(-1, 0) * torch.sigmoid(pair.select(-1, 0)) * pair.select(-1, 1)


class SquaredRelu(Mlp):
    def activated(self, z: Tensor) -> Tensor:
        gate, up = z.chunk(2, dim=-1)
        return torch.clamp(gate, min=0) ** 2 * up


class GeluByHand(Mlp):
    def activated(self, z: Tensor) -> Tensor:
        up, gate = z[..., : self.inner], z[..., self.inner :]
        bend = torch.tanh((gate + 0.044715 * gate * gate * gate) * 0.7978845608028654)
        return torch.lerp(gate * 0.0, gate, 0.5 * (1 + bend)) * up


class Softplus(Mlp):
    def activated(self, z: Tensor) -> Tensor:
        gate, up = z.unflatten(-1, (2, self.inner)).unbind(-2)
        return F.softplus(gate).mul(up.clamp(-6.0, 6.0))


class Twice(Mlp):
    """Two gates, each bending, times one value: a gated activation of a gated activation."""

    rows = 3
    counts: ClassVar[Counter[str]] = GATED + GATED

    def activated(self, z: Tensor) -> Tensor:
        a, b, up = z.tensor_split(3, dim=-1)
        return F.silu(a) * (torch.tanh(b) * up)


class Conditional(Mlp):
    """The gate's positive part only, by comparison."""

    def activated(self, z: Tensor) -> Tensor:
        gate, up = z.chunk(2, -1)
        return torch.where(gate > 0, gate, 0.01 * gate) * up


class Plain(Mlp):
    rows, counts = 1, NONE

    def activated(self, z: Tensor) -> Tensor:
        return 0.5 * z * (1 + torch.erf(z * 0.5**0.5))


MLPS: tuple[type[Mlp], ...] = (Glu, ByHand, Unflattened, SquaredRelu, GeluByHand, Softplus, Twice, Conditional, Plain)
