"""RMSNorm: y_i = w_i x_i / sqrt(mean(x^2) + eps) (Zhang and Sennrich 2019, arXiv:1910.07467), any weight, any order of casts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from slothc.gradients.geometry import Access
from slothc.gradients.program import Program

from .normalisation import is_normalisation
from .rule import RowRule, Sample


def identify(program: Program, loads: Sequence[Access | None]) -> bool:
    """Whether the program is w_i * x_i * (mean(x^2) + eps)^(-1/2)."""
    return is_normalisation(program, lambda x: x, bias=False)


def _llama(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * h.to(x.dtype)


def _gemma(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * (1.0 + weight.float())).type_as(x)


def _written_out(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (torch.square(x).sum(dim=-1, keepdim=True) / x.shape[-1] + 1e-5).sqrt() * weight


def _weightless(x: torch.Tensor) -> torch.Tensor:
    return x * torch.pow(x.pow(2).mean(-1, True) + 1e-6, -0.5)


def _library(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


def _arguments() -> tuple[Any, ...]:
    return torch.randn(2, 5, 48), torch.randn(48)


RULE = RowRule(
    "rms_norm", "y = w * x * rsqrt(mean(x^2) + eps)", identify,
    (Sample("llama", _llama, _arguments), Sample("gemma", _gemma, _arguments), Sample("written_out", _written_out, _arguments),
     Sample("weightless", _weightless, lambda: _arguments()[:1]), Sample("library", _library, _arguments)),
)  # fmt: skip
