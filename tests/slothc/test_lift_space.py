"""The iteration space of a lift at its ends: no axis at all, and more pieces than are unrolled."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slothc.capture import found_in
from slothc.lift import CannotLift, Lifted, lift


def _lifted(function: Callable[..., Tensor], *arguments: Tensor) -> Lifted:
    view = found_in(function, arguments).view
    sink = next(n for n in reversed(view.nodes) if view.op(n).kind == "pointwise")
    return lift(view, {n for n in view.nodes if n.op not in ("placeholder", "output")}, [sink])


def test_a_result_without_axes_reads_elements_of_one_tensor() -> None:
    def f(w: Tensor) -> Tensor:
        return torch.sigmoid(w[0]) * torch.tanh(w[1]) + w[2]

    assert len(_lifted(f, torch.randn(4)).loads) == 3


def test_real_and_imaginary_parts_of_too_many_pieces_are_a_reason_not_an_error() -> None:
    def f(x: Tensor, y: Tensor) -> Tensor:
        product = torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(y))
        return torch.cat([product] * 12, dim=-1) * 2.0

    with pytest.raises(CannotLift, match="24 pieces"):
        _lifted(f, torch.randn(3, 5, 2), torch.randn(3, 5, 2))
