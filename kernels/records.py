"""Launches by shape: what follows from the operands' shapes and strides is worked out once for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from slothc.gradients.plan import Pass
from torch import Tensor

from .binding import Binder, Blanks

Launch: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], None]
KEPT = 512


class Recorded(ABC):
    """Runs pass ``p``: ``(reads)`` allocates the results, ``(reads, writes)`` fills the given ones; both return them."""

    def __init__(self, p: Pass) -> None:
        self.p, self.binder = p, Binder(p)
        self.records: dict[tuple[Any, ...], tuple[Launch, Blanks | None]] = {}

    def __call__(self, reads: Sequence[Tensor], writes: Sequence[Tensor] | None = None) -> list[Tensor]:
        if not self.p.writes:
            return []
        parts: list[Any] = [reads[0].device]
        for t in reads:
            parts += (t.shape, t.stride(), t.dtype)
        if writes is not None:
            for t in writes:
                parts += (t.shape, t.stride(), t.dtype)
        key = tuple(parts)
        record = self.records.get(key)
        if record is None:
            record = self._record(key, reads, writes)
        launch, blanks = record
        results = list(writes) if blanks is None else blanks()             # type: ignore[arg-type]
        launch(reads, results)
        return results

    def _record(self, key: tuple[Any, ...], reads: Sequence[Tensor], writes: Sequence[Tensor] | None) -> tuple[Launch, Blanks | None]:
        blanks = Blanks(self.binder.allocate(reads), [o.zero for o in self.p.writes]) if writes is None else None
        record = self.records[key] = self._prepare(reads, blanks() if blanks else list(writes or ())), blanks
        if len(self.records) > KEPT:
            self.records.pop(next(iter(self.records)))
        return record

    @abstractmethod
    def _prepare(self, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> Launch:
        """The launch for operands of these shapes, strides and device."""


@torch.no_grad()
def clear(reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
    """The launch of a pass over no rows or no lanes: a sum of nothing is zero."""
    for w in writes:
        w.zero_()
