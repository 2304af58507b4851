"""Functions that are several operations in one: what they mean, and that a region with them is lifted, right, and differentiated."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import DTYPES, case, cast, hold
from torch import Tensor

from slothc.capture import found_in

X = (2, 5, 48)

COMPOSITES: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "addcmul": (lambda x, a, b: torch.tanh(torch.addcmul(x, a, b, value=0.5)), (X, X, X)),
    "addcdiv": (lambda x, a, b: torch.tanh(x.addcdiv(a, b.square() + 1.0, value=-2.0)), (X, X, X)),
    "lerp by a tensor": (lambda x, a, b: torch.tanh(torch.lerp(x, a, torch.sigmoid(b))), (X, X, X)),
    "alpha": (lambda x, a: torch.tanh(torch.add(x, a, alpha=3)) - torch.sub(x, a, alpha=0.25), (X, X)),
    "glu": (lambda x: torch.tanh(F.glu(x, dim=-1)), (X,)),
    "glu of another dimension": (lambda x: torch.tanh(F.glu(x, dim=1)) * 2.0, ((2, 6, 48),)),
    "normalize": (lambda x, w: F.normalize(x, dim=-1) * w, (X, (48,))),
    "var_mean": (lambda x: (lambda v, m: (x - m) / (v + 0.5).sqrt())(*torch.var_mean(x, dim=-1, keepdim=True, correction=0)), (X,)),
    "roll": (lambda x, w: torch.tanh(torch.roll(x, 24, dims=-1)) * w, (X, (48,))),
    "roll by a quarter, backwards": (lambda x, w: torch.roll(x * w, -12, -1) + x, (X, (48,))),
    "a dot product of rows": (lambda x, a: x * torch.einsum("bti,bti->bt", x, a)[..., None], (X, X)),
    "a scale for rows and columns": (lambda x, s, w: torch.tanh(torch.einsum("bti,bt,i->bti", x, s, w)), (X, (2, 5), (48,))),
    "pairs by a matrix": (
        lambda x, m: torch.tanh(torch.einsum("btpi,tpij->btpj", x.unflatten(-1, (-1, 2)), m).flatten(-2)), (X, (5, 24, 2, 2)),
    ),
    "rows that lie apart": (lambda x, r: torch.tanh((r.unsqueeze(-1) * x).sum(-2)) * 2.0, ((2, 40, 24), (2, 40))),
    "the largest of rows that lie apart": (lambda x, w: torch.tanh(x.amax(dim=1)) * w, ((2, 40, 24), (24,))),
    "a number by NumPy": (lambda x, w: torch.tanh(x * w) / np.sqrt(48), (X, (48,))),
    "a row that was moved": (lambda x: (x.transpose(1, 2) * x.transpose(1, 2).square().mean(1, keepdim=True)), (X,)),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", COMPOSITES)
def test_one_region_under_the_contract(name: str, dtype: torch.dtype) -> None:
    function, shapes = COMPOSITES[name]

    def draw() -> list[Tensor]:
        return cast([torch.randn(s) for s in shapes], dtype)

    hold(case(function, draw()), "torch", draw)


OPAQUE: dict[str, tuple[Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "a matrix product by letters": (lambda x, y: torch.einsum("bti,bsi->bts", x, y), (X, X)),
    "two letters summed": (lambda x, y: torch.einsum("bti,bti->b", x, y), (X, X)),
    "a diagonal": (lambda x: torch.einsum("ii->i", x), ((48, 48),)),
    "a sum over many that lie apart": (lambda x: x.sum(1), ((2, 65, 48),)),
    "rolled over all": (lambda x: torch.roll(x, 1), (X,)),
    "normalize of order 1": (lambda x: F.normalize(x, p=1.0, dim=-1), (X,)),
}


@pytest.mark.parametrize("name", OPAQUE)
def test_what_has_no_row_formula_stays_itself(name: str) -> None:
    function, shapes = OPAQUE[name]
    assert found_in(function, [torch.randn(s) for s in shapes]).regions == []
