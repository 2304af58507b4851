"""Attention as nobody spells it: heads, masks and softmax written by hand, queries and keys turned by a given rotation."""

from __future__ import annotations

import math
from collections import Counter
from typing import ClassVar

import torch
from torch import Tensor, nn

from .rotations import Rotation, angles

HEADS, SHARED = 4, 2


class Attention(nn.Module):
    """Four query heads over two key heads. ``turn``: the rotation of queries and keys, or None. ``counts``: where it is one softmax between
    two batched products it is found as attention; the rest is fused by rows.
    """

    counts: ClassVar[Counter[str]] = Counter()

    def __init__(self, width: int, turn: Rotation | None) -> None:
        super().__init__()
        self.size, self.turn = width // HEADS, turn
        self.qkv = nn.Linear(width, (HEADS + 2 * SHARED) * self.size, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        wide = self.qkv(x).view(batch, tokens, HEADS + 2 * SHARED, self.size).transpose(1, 2)
        q, k, v = wide.split([HEADS, SHARED, SHARED], dim=1)
        if self.turn is not None:
            angle = angles(tokens, self.size, x)
            q, k = self.turn(q, angle), self.turn(k, angle)
        mixed = self.mixed(q, k, v)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, -1))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[batch, heads, tokens, size] of queries over keys and values with fewer heads."""
        raise NotImplementedError


class BySoftmax(Attention):
    """Softmax in fp32, the mask from ``tril`` added as -inf."""

    counts: ClassVar[Counter[str]] = Counter({"attention": 1})

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(HEADS // SHARED, dim=1) for t in (k, v))
        tokens = q.shape[-2]
        seen = torch.ones(tokens, tokens, device=q.device).tril()
        hidden = torch.zeros_like(seen).masked_fill(seen == 0, float("-inf"))
        scores = torch.matmul(q, k.transpose(-1, -2)) * self.size**-0.5 + hidden.to(q.dtype)
        return torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


class ByExponentials(Attention):
    """exp over sum of exp, the largest taken out; the mask compares positions."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t[:, :, None].expand(-1, -1, HEADS // SHARED, -1, -1).flatten(1, 2) for t in (k, v))
        place = torch.arange(q.shape[-2], device=q.device)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k).float() / math.sqrt(self.size)
        scores = torch.where(place[:, None] >= place[None, :], scores, torch.finfo(torch.float32).min)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
        weights = weights / weights.sum(-1, keepdim=True)
        return torch.einsum("bhqk,bhkd->bhqd", weights.to(q.dtype), v)


class ByBaddbmm(Attention):
    """One batched product that adds a sloping bias with the mask in it."""

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, _, tokens, size = q.shape
        k, v = (t.repeat_interleave(HEADS // SHARED, dim=1).reshape(batch * HEADS, tokens, size) for t in (k, v))
        step = torch.ones(tokens, device=q.device).cumsum(0)
        far = step[None, :] - step[:, None]
        bias = torch.where(far > 0, -1e4, 0.1 * far).to(q.dtype).expand(batch * HEADS, -1, -1)
        scores = torch.baddbmm(bias, q.reshape(batch * HEADS, tokens, size), k.transpose(1, 2), beta=1.0, alpha=size**-0.5)
        return torch.bmm(scores.softmax(-1), v).view(batch, HEADS, tokens, size)


class WithoutRepeats(Attention):
    """Query heads in groups over shared keys, scores capped by tanh, with a place to look away to."""

    def __init__(self, width: int, turn: Rotation | None) -> None:
        super().__init__(width, turn)
        self.sink = nn.Parameter(0.1 * torch.randn(HEADS))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[-2]
        q = q.unflatten(1, (SHARED, -1))
        scores = torch.einsum("bgrqd,bgkd->bgrqk", q, k) * self.size**-0.5
        scores = 20.0 * torch.tanh(scores / 20.0)
        scores = scores.masked_fill(torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1), -1e4)
        aside = self.sink.to(q.dtype).view(1, SHARED, -1, 1, 1).expand(q.shape[0], -1, -1, tokens, 1)
        weights = torch.cat((scores, aside), dim=-1).softmax(-1)[..., :-1]
        return torch.einsum("bgrqk,bgkd->bgrqd", weights, v).flatten(1, 2)


ATTENTIONS: tuple[type[Attention], ...] = (BySoftmax, ByExponentials, ByBaddbmm, WithoutRepeats)
