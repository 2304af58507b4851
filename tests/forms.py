"""Row computations as a model's author might write them, beyond the samples of the rules: what the engine must be right on.

Each is a plain torch function with the shapes of its arguments; together they use every feature of a row plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """A function, the shapes of its floating-point arguments, and makers for the others. ``fixed``: arguments without gradient."""

    name: str
    function: Callable[..., Any]
    shapes: tuple[Shape | Callable[[], Tensor], ...]
    fixed: tuple[int, ...] = ()

    def draw(self, dtype: torch.dtype, device: str | torch.device = "cpu", **sizes: int) -> list[Tensor]:
        """Random arguments. ``sizes``: new lengths for sizes 5 (``rows``) and 48 (``lanes``) of the table."""
        places = {5: sizes.get("rows", 5), 48: sizes.get("lanes", 48)}
        made = []
        for s in self.shapes:
            if callable(s):
                made.append(s().to(device))
            else:
                made.append(torch.randn([places.get(n, n) for n in s], device=device).to(dtype))
        return made


def rms_norm(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def add_norm(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    h = x + r
    return rms_norm(h, w), h


def layer_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), w, b, 1e-5)


def in_no_file(x: Tensor, w: Tensor) -> Tensor:
    return x * F.softplus(w) / (x.abs().mean(-1, keepdim=True) + 1e-3)


def softmax(x: Tensor, w: Tensor) -> Tensor:
    return torch.softmax(x.float(), dim=-1).to(x.dtype) * w


def log_softmax(x: Tensor) -> Tensor:
    return x - torch.logsumexp(x, dim=-1, keepdim=True)


def largest(x: Tensor) -> Tensor:
    return x / (x.abs().amax(-1, keepdim=True) + 1.0)


def chained(x: Tensor, w: Tensor) -> Tensor:
    p = torch.softmax(x, dim=-1)
    return w * p * torch.rsqrt((p - p.mean(-1, keepdim=True)).square().sum(-1, keepdim=True) + 1e-2)


def scalars(x: Tensor, s: Tensor, gate: Tensor, b: Tensor) -> Tensor:
    return x * torch.tanh(s) * torch.sigmoid(gate) + b


def masked(x: Tensor, keep: Tensor, ids: Tensor) -> Tensor:
    return torch.where(keep, F.silu(x), 0.25 * x) * (ids == 1)


def gated(gate_up: Tensor, limit: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate) * torch.minimum(up, limit)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-x2, x1), dim=-1) * sin.unsqueeze(1)


def norm_rope(x: Tensor, w: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return rope(rms_norm(x, w).transpose(1, 2), cos, sin)


def by_sequence(x: Tensor, t: Tensor) -> Tensor:
    return F.silu(x * t) + x


def total(x: Tensor, w: Tensor) -> Tensor:
    return (x * w).sum(-1)


def sum_of_sums(x: Tensor, w: Tensor) -> Tensor:
    return (x + w).sum(-1) * 2.0


def column_only(x: Tensor, w: Tensor) -> Tensor:
    return (w - torch.logsumexp(w, dim=-1, keepdim=True)) * x


def unused_gradient(x: Tensor, u: Tensor, w: Tensor) -> Tensor:
    return (x > w) * x + torch.tanh(u)


def middle(x: Tensor) -> Tensor:
    return torch.cat((x[..., :8], torch.tanh(x[..., 8:24]), x[..., 24:] * 2.0), dim=-1) + 1.0


FORMS = (
    Form("rms_norm", rms_norm, ((2, 5, 48), (48,))),
    Form("add_norm", add_norm, ((2, 5, 48), (2, 5, 48), (48,))),
    Form("layer_norm", layer_norm, ((2, 5, 48), (48,), (48,))),
    Form("in_no_file", in_no_file, ((2, 5, 48), (48,))),
    Form("softmax", softmax, ((2, 5, 48), (48,))),
    Form("log_softmax", log_softmax, ((2, 5, 48),)),
    Form("largest", largest, ((2, 5, 48),)),
    Form("chained", chained, ((2, 5, 48), (48,))),
    Form("scalars", scalars, ((2, 5, 48), (2, 5, 1), (), (1,))),
    Form("masked", masked, ((2, 5, 48), lambda: torch.rand(2, 5, 1) > 0.4, lambda: torch.randint(0, 3, (2, 5, 48)))),
    Form("gated", gated, ((2, 5, 96), (48,))),
    Form("rope", rope, ((2, 3, 5, 16), (2, 5, 16), (2, 5, 16)), fixed=(1, 2)),
    Form("rope of learned angles", rope, ((2, 3, 5, 16), (2, 5, 16), (2, 5, 16))),
    Form("norm_rope", norm_rope, ((2, 5, 3, 16), (16,), (2, 5, 16), (2, 5, 16)), fixed=(2, 3)),
    Form("by_sequence", by_sequence, ((2, 5, 48), (5, 1))),
    Form("total", total, ((2, 5, 48), (48,))),
    Form("sum_of_sums", sum_of_sums, ((2, 5, 48), (48,))),
    Form("column_only", column_only, ((2, 5, 48), (48,))),
    Form("unused_gradient", unused_gradient, ((2, 5, 48), (2, 5, 48), (48,))),
    Form("middle", middle, ((2, 5, 48),)),
)


def form(name: str) -> Form:
    return next(f for f in FORMS if f.name == name)
