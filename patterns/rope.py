"""Rotary position embedding: pairs of lanes turned by an angle (Su et al. 2021, arXiv:2104.09864).

(y1, y2) = (c x1 - s x2, c x2 + s x1).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import mpmath
import torch
from slothc.gradients.geometry import Access
from slothc.gradients.program import Program

from .probe import LANES, close, draw, rows_of, value
from .rule import RowRule, Sample


def identify(program: Program, loads: Sequence[Access | None]) -> bool:
    """Whether the outputs are lanes of one tensor, turned in pairs or passed through.

    With every other operand positive, the matrix of the (linear) map has blocks of two whose four signs multiply to -1, as
    c, -s, s, c do: that holds for half-split and interleaved pairs, either sense of rotation, scaled and partial forms.
    """
    if program.reductions or len(program.outputs) < 2:
        return False
    tensor = {i.name: a.tensor for i, a in zip(program.inputs, loads) if a is not None}
    rows = [i.name for i in rows_of(program)]
    for candidate in dict.fromkeys(tensor[r] for r in rows):
        lanes: dict[Any, list[str]] = {}
        for name, access in zip((i.name for i in program.inputs), loads):
            if name in rows and access is not None and access.tensor == candidate:
                lanes.setdefault(access.index, []).append(name)
        if len(lanes) >= 2 and _rotates(program, list(lanes.values())):
            return True
    return False


def _rotates(program: Program, lanes: list[list[str]]) -> bool:
    """``lanes``: the inputs that each lane is read as."""
    dice = random.Random(13)
    base = draw(program, dice)

    def at(weights: Sequence[Any]) -> list[Any]:
        return [v[0] for v in value(program, {**base, **{n: [[w] * LANES] for names, w in zip(lanes, weights) for n in names}}).values()]

    unit = [[mpmath.mpf(k == j) for k in range(len(lanes))] for j in range(len(lanes))]
    columns = [at(u) for u in unit]
    weights = [mpmath.mpf(dice.uniform(-1, 1)) for _ in lanes]
    sums = [mpmath.fsum(w * c[o] for w, c in zip(weights, columns)) for o in range(len(columns[0]))]
    if not all(close(a, b) for a, b in zip(at(weights), sums)):
        return False
    support = [frozenset(k for k, c in enumerate(columns) if c[o] != 0) for o in range(len(columns[0]))]
    pairs = 0
    for o, s in enumerate(support):
        partners = [p for p in range(len(support)) if p != o and support[p] == s]
        if len(s) == 1:
            continue
        if len(s) != 2 or len(partners) != 1:
            return False
        j, k = sorted(s)
        p = partners[0]
        if columns[j][o] * columns[k][o] * columns[j][p] * columns[k][p] >= 0:
            return False
        pairs += 1
    return pairs >= 2


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    x1, x2 = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat((-x2, x1), dim=-1)


def _half_split(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos.unsqueeze(1) + _rotate_half(x) * sin.unsqueeze(1)


def _interleaved(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def _partial(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    width = cos.shape[-1] // 2
    turned, kept = x[..., :width], x[..., width:]
    cos, sin = cos[..., :width].unsqueeze(1), sin[..., :width].unsqueeze(1)
    return torch.cat([turned * cos + _rotate_half(turned) * sin, kept], dim=-1)


def _half_width(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half].unsqueeze(1), sin[..., :half].unsqueeze(1)
    first, second = torch.chunk(x, 2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _arguments() -> tuple[Any, ...]:
    angle = torch.randn(2, 6, 16)
    return torch.randn(2, 6, 4, 16).transpose(1, 2), angle.cos(), angle.sin()


RULE = RowRule(
    "rope", "(y1, y2) = (x1 * cos - x2 * sin, x2 * cos + x1 * sin)", identify,
    (Sample("half_split", _half_split, _arguments), Sample("interleaved", _interleaved, _arguments),
     Sample("partial", _partial, _arguments), Sample("half_width", _half_width, _arguments)),
)  # fmt: skip
