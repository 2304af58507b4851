"""Names come from what a region computes: any spelling has its name, and what only looks alike has none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forms import rms_norm, rope
from torch import Tensor

from slothc.capture import found_in


def named(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Counter[str]:
    total: Counter[str] = Counter()
    for region in found_in(function, [torch.randn(s) for s in shapes]).regions:
        total += region.counts()
    return total


X, W = (2, 5, 48), (48,)
HEADS, ANGLES = (2, 3, 5, 16), (2, 5, 16)

NAMED: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...], str]] = {
    "norm by linalg": (lambda x, w: x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) * 48**-0.5) * w, (X, W), "rms_norm"),
    "norm of 1 + w": (lambda x, w: (1 + w) * (x * (x.square().mean(-1, True) + 1e-6).rsqrt()), (X, W), "rms_norm"),
    "layer norm by moments": (
        lambda x, w: w * (x - x.mean(-1, True)) * (x.pow(2).mean(-1, True) - x.mean(-1, True) ** 2 + 1e-5).rsqrt(), (X, W), "layer_norm",
    ),
    "relu squared, gated": (lambda g, u: F.relu(g).square() * u, (X, X), "gated_mlp"),
    "gated, over sums of projections and adapters": (
        lambda g, u, a, b: F.silu(g + 2.0 * a) * (u + 0.5 * b), (X, X, X, X), "gated_mlp",
    ),
    "quick gelu": (lambda g, u: u * (g * torch.sigmoid(1.702 * g)), (X, X), "gated_mlp"),
    "exact gelu": (lambda g, u: u * (0.5 * g * (1 + torch.erf(g / 2**0.5))), (X, X), "gated_mlp"),
    "rope, other sense": (
        lambda x, c, s: torch.cat((x[..., :8] * c[:, None, :, :8] + x[..., 8:] * s[:, None, :, :8],
                                   x[..., 8:] * c[:, None, :, :8] - x[..., :8] * s[:, None, :, :8]), -1), (HEADS, ANGLES, ANGLES), "rope",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMED)
def test_any_spelling_has_its_name(case: str) -> None:
    function, shapes, name = NAMED[case]
    assert named(function, *shapes) == Counter({name: 1})


UNNAMED: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "norm of absolute values": (lambda x, w: w * x / (x.abs().mean(-1, True) + 1e-6), (X, W)),
    "norm with a large eps": (lambda x, w: w * x * (x.pow(2).mean(-1, True) + 1.0).rsqrt(), (X, W)),
    "norm over the cube": (lambda x, w: w * x * (x.pow(2).mean(-1, True) + 1e-6) ** -1.5, (X, W)),
    "softmax": (lambda x, w: torch.softmax(x, -1) * w, (X, W)),
    "bilinear product": (lambda a, b: 2.0 * a * b, (X, X)),
    "sum of two activations": (lambda a, b: F.silu(a) + torch.tanh(b), (X, X)),
    "shear, not turn": (
        lambda x, c, s: torch.cat((x[..., :8] * c[:, None, :, :8] + x[..., 8:] * s[:, None, :, :8],
                                   x[..., 8:] * c[:, None, :, :8] + x[..., :8] * s[:, None, :, :8]), -1), (HEADS, ANGLES, ANGLES),
    ),
    "one activation": (lambda x: F.silu(x) * 2.0 + 1.0, (X,)),
}  # fmt: skip


@pytest.mark.parametrize("case", UNNAMED)
def test_what_only_looks_alike_has_no_name(case: str) -> None:
    function, shapes = UNNAMED[case]
    assert set(named(function, *shapes)) <= {"rowwise"}


def test_things_in_one_region_are_counted_one_by_one() -> None:
    def two_norms(x: Tensor, w: Tensor) -> Tensor:
        return rms_norm(rms_norm(x, w), w)

    def norm_then_gate(x: Tensor, w: Tensor, u: Tensor) -> Tensor:
        return F.silu(rms_norm(x, w)) * u

    def turned_heads(x: Tensor, w: Tensor, c: Tensor, s: Tensor) -> Tensor:
        return rope(rms_norm(x, w), c, s)

    assert named(two_norms, X, W) == Counter({"rms_norm": 2})
    assert named(norm_then_gate, X, W, X) == Counter({"rms_norm": 1, "gated_mlp": 1})
    assert named(turned_heads, HEADS, (16,), ANGLES, ANGLES) == Counter({"rms_norm": 1, "rope": 1})


def test_unnamed_regions_are_reported_with_their_plan() -> None:
    (region,) = found_in(lambda x: torch.tanh(x) * 2.0 + x, [torch.randn(X)]).regions
    assert region.rule == f"rowwise#{region.plan.key}"


def test_factors_of_one_value_are_no_gate_and_row() -> None:
    assert named(lambda x, r: 0.5 * (x + r) * (1 + torch.tanh(0.8 * ((x + r) + 0.04 * (x + r) ** 3))), X, X)["gated_mlp"] == 0
