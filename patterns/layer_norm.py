"""LayerNorm: y_i = w_i (x_i - mean(x)) / sqrt(var(x) + eps) + b_i (Ba, Kiros and Hinton 2016, arXiv:1607.06450)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mpmath
import torch
import torch.nn.functional as F
from slothc.gradients.geometry import Access
from slothc.gradients.program import Program

from .normalisation import is_normalisation
from .rule import RowRule, Sample


def identify(program: Program, loads: Sequence[Access | None]) -> bool:
    """Whether the program is w_i * (x_i - mean(x)) * (var(x) + eps)^(-1/2) + b_i."""
    return is_normalisation(program, _centred, bias=True)


def _centred(x: list[Any]) -> list[Any]:
    mean = mpmath.fsum(x) / len(x)
    return [v - mean for v in x]


def _library(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, 1e-5)


def _plain(x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x.float(), (x.shape[-1],), None, None, 1e-5).to(x.dtype)


def _cohere(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    mean = h.mean(-1, keepdim=True)
    variance = (h - mean).pow(2).mean(-1, keepdim=True)
    h = (h - mean) * torch.rsqrt(variance + 1e-5)
    return (weight.float() * h).to(x.dtype)


def _variance(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, correction=0) + 1e-5) * weight + bias


def _arguments() -> tuple[Any, ...]:
    return torch.randn(2, 5, 48), torch.randn(48), torch.randn(48)


RULE = RowRule(
    "layer_norm", "y = w * (x - mean(x)) * rsqrt(var(x) + eps) + b", identify,
    (Sample("library", _library, _arguments), Sample("plain", _plain, lambda: _arguments()[:1]),
     Sample("cohere", _cohere, lambda: _arguments()[:2]), Sample("variance", _variance, _arguments)),
)  # fmt: skip
