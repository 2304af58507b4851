"""What a model decides in a step: which of its elements are the largest. A router's choice of experts is such a decision.

Two right programs in 16 bits decide otherwise where scores are as near as a rounding. They are different functions from there on, and in
such a draw neither's distance to the other says anything of its arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
LARGEST = {aten.topk.default: 1, aten.argmax.default: None, aten.max.dim: 1}   # which of the results are indices; None: the only one


class Choices(TorchDispatchMode):
    """Inside, ``made`` gets the indices of every choice, in order; compiled graphs run as they are, and are not to be compiled inside."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in LARGEST:
            which = LARGEST[function]
            indices = result if which is None else result[which]
            self.made.append(indices.sort(-1).values if function is aten.topk.default else indices.clone())   # a set of k has no order
        return result


def turned(made: Sequence[Sequence[Tensor]], true: Sequence[Sequence[Tensor]]) -> list[bool]:
    """In which draws the choices are others than the true ones."""
    return [len(m) != len(t) or not all(map(torch.equal, m, t)) for m, t in zip(made, true)]


def too_many(ours: int, eager: int) -> bool:
    """Whether more draws turned than chance explains: both are counts of rare events of one rate, three deviations are allowed."""
    return ours > eager + 3.0 * (2.0 * eager + 1.0) ** 0.5
