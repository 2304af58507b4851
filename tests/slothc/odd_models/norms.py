"""Norms as nobody spells them. ``counts``: what a reader of one call would count."""

from __future__ import annotations

from collections import Counter
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RMS, LAYER, NONE = Counter({"rms_norm": 1}), Counter({"layer_norm": 1}), Counter[str]()


class Norm(nn.Module):
    """A norm over the last of [batch, tokens, width], with a weight around one."""

    counts: ClassVar[Counter[str]] = RMS

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(width))


class ByVectorNorm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
        return (x.float() * self.width**0.5 / length).to(x.dtype) * self.weight


class ByNormalize(Norm):
    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x.float(), dim=-1, eps=1e-8).mul(self.width**0.5).to(x.dtype).mul(self.weight)


class ByEinsum(Norm):
    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        power = torch.einsum("btd,btd->bt", h, h) / self.width
        return torch.einsum("btd,bt,d->btd", h, (power + 1e-6).rsqrt(), self.weight.float()).to(x.dtype)


class ByVariance(Norm):
    """mean(x^2) = var(x) + mean(x)^2."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        spread, mean = torch.var_mean(h, dim=-1, correction=0, keepdim=True)
        return self.weight * (h / torch.sqrt(spread + mean * mean + 1e-6)).to(x.dtype)


class ByAddcmul(Norm):
    counts = LAYER

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.bias = nn.Parameter(0.1 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        scale = torch.rsqrt(centred.square().mean(dim=-1, keepdim=True).add(1e-5))
        return torch.addcmul(self.bias, centred * scale, self.weight)


class InTwoPasses(Norm):
    counts = LAYER

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        total, squares = h.sum(-1), (h * h).sum(-1)
        mean = (total / self.width).unsqueeze(-1)
        variance = (squares / self.width).unsqueeze(-1) - mean**2
        return ((h - mean) * (variance + 1e-5) ** -0.5).to(x.dtype) * self.weight


class OfLogScale(Norm):
    """The weight is exp(w)."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        inverse = torch.exp(-0.5 * torch.log(h.pow(2).mean(-1, keepdim=True) + 1e-6))
        return (h * inverse * torch.exp(self.weight.float() - 1)).to(x.dtype)


class OneMore(Norm):
    """The weight is 1 + w, and half of the square root is taken twice."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        root = torch.sqrt(torch.sqrt(torch.mean(h * h, -1, True).add(1e-6).square()))
        return torch.addcmul(h / root, h / root, self.weight.float()).to(x.dtype)


class Weightless(Norm):
    def __init__(self, width: int) -> None:
        nn.Module.__init__(self)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        return torch.div(x, x.float().square().sum(-1, keepdim=True).div(self.width).add(1e-6).sqrt().to(x.dtype))


class Across(Norm):
    """The width is moved in front of the tokens and back."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.transpose(1, 2).float()
        scale = torch.rsqrt(h.square().mean(dim=1, keepdim=True) + 1e-6)
        return (h * scale * self.weight.float()[:, None]).to(x.dtype).transpose(1, 2)


class Grouped(Norm):
    """Each quarter of the width has a scale of its own."""

    def forward(self, x: Tensor) -> Tensor:
        h = x.float().unflatten(-1, (4, -1))
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)
        return h.flatten(-2).to(x.dtype) * self.weight


class Gated(Norm):
    """The norm's result times an activation of a projection: a norm, and a gated activation."""

    counts: ClassVar[Counter[str]] = RMS + Counter({"gated_mlp": 1})

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.gate = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = self.weight.float() * (h * (h.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt())
        return (h * F.silu(self.gate(x).float())).to(x.dtype)


class OfMagnitudes(Norm):
    """Divided by the mean of absolute values: no rule has this name."""

    counts = NONE

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.abs().mean(-1, keepdim=True) + 1e-5) * self.weight


class OfLargest(Norm):
    """Divided by the largest absolute value, which many lanes may share only by accident: no rule has this name."""

    counts = NONE

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x / torch.linalg.vector_norm(x, ord=float("inf"), dim=-1, keepdim=True).clamp_min(1e-5))


NORMS: tuple[type[Norm], ...] = (
    ByVectorNorm, ByNormalize, ByEinsum, ByVariance, ByAddcmul, InTwoPasses, OfLogScale, OneMore, Weightless, Across, Grouped, Gated,
    OfMagnitudes, OfLargest,
)  # fmt: skip
