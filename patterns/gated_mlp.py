"""Gated activations: y = f(gate) * h(up) with f or h not linear (Shazeer 2020, arXiv:2002.05202), separate or fused projections."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import mpmath
import torch
import torch.nn.functional as F
from slothc.gradients.geometry import Access
from slothc.gradients.program import Program

from .probe import LANES, close, draw, rows_of, value
from .rule import RowRule, Sample


def identify(program: Program, loads: Sequence[Access | None]) -> bool:
    """Whether the program is a product f(a) h(b) of its two rows with a factor that is not linear.

    y(a, b) y(a', b') = y(a, b') y(a', b) at random points says that y is a product.
    """
    rows = rows_of(program)
    if len(rows) != 2 or len(program.outputs) != 1 or program.reductions or any(i.kind.rows and not i.kind.lanes for i in program.inputs):
        return False
    if rows[0].differentiable != rows[1].differentiable:                    # what gates what is learned: an angle's cosine gates nothing
        return False
    dice = random.Random(11)
    base = draw(program, dice)

    def at(a: Any, b: Any) -> Any:
        return next(iter(value(program, {**base, rows[0].name: [[a] * LANES], rows[1].name: [[b] * LANES]}).values()))[0]

    points = [[mpmath.mpf(dice.uniform(-2, 2)) for _ in range(2)] for _ in range(8)]
    for (a, b), (c, d) in zip(points[::2], points[1::2]):
        if not close(at(a, b) * at(c, d), at(a, d) * at(c, b)):
            return False
    a, b = max(points, key=lambda p: abs(at(*p)))
    factors = ([(x, at(x, b)) for x, _ in points], [(y, at(a, y)) for _, y in points])
    varies = all(any(not close(v, f[0][1]) for _, v in f) for f in factors)
    decays = _exponential(lambda v: at(v, b), factors[0]) or _exponential(lambda v: at(a, v), factors[1])
    return varies and not decays and not all(map(_linear, factors))


def _exponential(f: Callable[[Any], Any], known: list[tuple[Any, Any]]) -> bool:
    """A factor c exp(k v), as in a state's decay, gates nothing: f(a) f(b) = f((a + b) / 2)^2."""
    return all(close(u * v, f((x + y) / 2) ** 2) for (x, u), (y, v) in pairwise(known))


def _linear(known: list[tuple[Any, Any]]) -> bool:
    return all(close(u * y, v * x) for (x, u), (y, v) in pairwise(known))


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def _fused(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return up * F.silu(gate)


def _geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh") * up


def _written_out(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return 0.5 * gate * (1 + torch.tanh(0.7978845608028654 * (gate + 0.044715 * torch.pow(gate, 3.0)))) * up


def _clamped(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up[..., ::2].clamp(max=7.0), gate_up[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * (gate * torch.sigmoid(gate * 1.702))


def _arguments() -> tuple[Any, ...]:
    return torch.randn(2, 5, 48), torch.randn(2, 5, 48)


RULE = RowRule(
    "gated_mlp", "y = f(gate) * h(up)", identify,
    (Sample("swiglu", _swiglu, _arguments), Sample("fused", _fused, lambda: _arguments()[:1]), Sample("geglu", _geglu, _arguments),
     Sample("written_out", _written_out, _arguments), Sample("clamped", _clamped, lambda: _arguments()[:1])),
)  # fmt: skip
