"""Block shapes that are chosen from sizes alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from slothc.gradients.plan import Pass
from slothc.kernels.triton_launch import ROW_LIMIT, choose

from slothc import catalogue


def passes() -> list[tuple[str, Pass]]:
    found = []
    for rule in ("rms_norm", "layer_norm", "gated_mlp", "rope"):
        _, plan = catalogue.lifted(rule)[0]
        found += [(f"{rule} {n}", p) for n, p in (("forward", plan.forward), ("backward", plan.backward)) if p is not None]
    return found


@pytest.mark.parametrize("p", [pytest.param(p, id=n) for n, p in passes()])
def test_blocks_hold_what_there_is(p: Pass) -> None:
    """A row with reductions lies in one program; a program has no more rows than there are, and warps for what it holds."""
    for rows in (1, 3, 100, 8192, 1 << 20):
        for lanes in (1, 64, 128, 2048, 2304, 4096, 5120, 8192, ROW_LIMIT, 50000):
            bound: Any = SimpleNamespace(rows=rows, lanes=lanes)
            s = choose(p, bound, torch.device("cpu"))
            held = sum(s.blocks_l)
            assert s.block_r < 2 * rows and 1 <= s.warps <= 16 and s.warps & (s.warps - 1) == 0
            assert s.warps == 1 or s.block_r * held >= 32 * s.warps
            assert s.block_r * held <= max(ROW_LIMIT, 4096)
            if p.program.reductions and not s.loop:
                assert held >= lanes and s.grid[1] == 1
            blocks = -(-rows // s.block_r)
            covered = s.grid[0] * s.grid[1] * s.blocks_l[0] if not p.program.reductions else held
            assert s.partials or s.loop or (s.grid[0] * s.grid[1] >= blocks and covered >= lanes)
            assert s.partials in (0, s.grid[0]) and s.grid[0] <= blocks * max(1, -(-lanes // s.blocks_l[0]))
