"""Launches by shape: what follows from the operands' shapes and strides is worked out once for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from slothc.gradients.plan import Pass
from torch import Tensor

from .binding import Binder

Launch: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], None]
KEPT = 512


class Recorded(ABC):
    """Runs pass ``p``: ``(reads)`` allocates the results, ``(reads, writes)`` fills the given ones; both return them."""

    def __init__(self, p: Pass) -> None:
        self.p, self.binder = p, Binder(p)
        self.records: dict[tuple[Any, ...], Launch] = {}

    def __call__(self, reads: Sequence[Tensor], writes: Sequence[Tensor] | None = None) -> list[Tensor]:
        if not self.p.writes:
            return []
        results = self.binder.allocate(reads) if writes is None else list(writes)
        key = (tuple((t.shape, t.stride()) for t in (*reads, *results)), reads[0].device)
        record = self.records.get(key)
        if record is None:
            record = self.records[key] = self._prepare(reads, results)
            if len(self.records) > KEPT:
                self.records.pop(next(iter(self.records)))
        record(reads, results)
        return results

    @abstractmethod
    def _prepare(self, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> Launch:
        """The launch for operands of these shapes, strides and device."""


@torch.no_grad()
def clear(reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
    """The launch of a pass over no rows or no lanes: a sum of nothing is zero."""
    for w in writes:
        w.zero_()
