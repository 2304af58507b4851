"""What the programs of a persistent grid summed over their rows, added up and rounded: one launch for all sums of a pass."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .binding import Placement
from .devices import dependent
from .direct import Direct
from .triton_pieces import power_of_two

COUNT = 4             # sums in one launch
LANES = 16            # lanes of a program: 64 bytes of each row, and few enough that every processor has work
PARTIALS = 1024       # rows that a program has on their way at once


class ColumnSums:
    """``sums(parts, targets)``: part k, fp32 [partials, lanes or 1], summed over its rows into ``targets`` at ``places[k]``."""

    def __init__(
        self, places: Sequence[tuple[Placement, int]], partials: int, lanes: int, device: torch.device, interpreted: bool = False
    ) -> None:  # fmt: skip
        """``places``: where each sum goes, and the width of its parts. ``interpreted``: in few programs, which run one after another."""
        self.targets = [place.tensor for place, _ in places]
        self.runs = []
        rows = min(PARTIALS, power_of_two(partials))
        block = 256 if interpreted else LANES
        for first in range(0, len(places), COUNT):
            mine = places[first : first + COUNT]
            numbers = [n for place, width in _filled(mine) for n in (place.offset, int(width == lanes), place.lane)]
            options = {"COUNT": len(mine), "BLOCK_P": rows, "BLOCK_L": block}
            options |= {**dependent(device), "num_warps": max(1, min(16, rows * LANES // 1024)), "enable_fp_fusion": False}
            grid = (-(-lanes // block), len(mine))
            self.runs.append((first, Direct(_kernel(), grid, [*numbers, partials, lanes], options, device)))

    def __call__(self, parts: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
        outs = [targets[t] for t in self.targets]
        for first, run in self.runs:
            run((*_filled(parts[first : first + COUNT]), *_filled(outs[first : first + COUNT])))


def _filled(few: Sequence[Any]) -> tuple[Any, ...]:
    """As many as a launch takes: the first again for those that are not there."""
    return (*few, *[few[0]] * (COUNT - len(few)))


@functools.cache
def _kernel() -> Any:
    from . import column_sums_kernel

    return column_sums_kernel.column_sums
