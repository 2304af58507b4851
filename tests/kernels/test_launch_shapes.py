"""What is chosen without a measurement: block shapes from sizes, a tanh from what is rounded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from slothc.gradients.plan import Pass
from slothc.kernels import shapes
from slothc.kernels.shapes import ROW_LIMIT, choose
from slothc.kernels.triton_source import source
from slothc.kernels.vocab_rows import Loss, row_plan

from slothc import catalogue


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("rule", ["rms_norm", "layer_norm", "gated_mlp", "rope"])
def test_blocks_hold_what_there_is(rule: str, direction: str) -> None:
    """A row with reductions lies in one program; a program has no more rows than there are, and warps for what it holds."""
    p = getattr(catalogue.lifted(rule)[0][1], direction)
    assert isinstance(p, Pass)
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


SHAPES = [(128, 64, 8, 1), (1024, 4, 4, 2), (2048, 2, 4, 2), (2304, 1, 4, 3), (4096, 1, 4, 2), (5120, 1, 8, 1), (8192, 1, 8, 1),
          (16384, 1, 16, 1)]  # fmt: skip


@pytest.mark.parametrize("lanes, block, warps, programs", SHAPES)
@pytest.mark.parametrize("rule", ["rms_norm", "layer_norm"])
def test_a_persistent_grid_fills_a_processor(
    rule: str, lanes: int, block: int, warps: int, programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 elements of every value a thread, 8 warps a processor, rows on their way; not so tall that programs would have no block."""
    monkeypatch.setattr(shapes, "processors", lambda device: 132)
    monkeypatch.setattr(shapes, "memory", lambda device: 227 << 10)
    p = catalogue.lifted(rule)[0][1].backward
    assert p is not None

    def chosen(rows: int) -> shapes.Shape:
        bound: Any = SimpleNamespace(rows=rows, lanes=lanes)
        return choose(p, bound, torch.device("cpu"))

    s = chosen(132 * 64 * programs)
    assert (s.block_r, s.warps, s.partials) == (block, warps, 132 * programs) and s.grid[0] == s.partials
    size = block * sum(s.blocks_l) * sum(4 if "fp32" in str(p.reads[a.tensor]) else 2 for i, a in zip(p.program.inputs, p.loads)
                                         if a is not None and i.kind.rows and i.kind.lanes)  # fmt: skip
    assert s.stages >= 2 and programs * (s.stages - 1) * size < 227 << 10
    assert chosen(200).block_r == 1 and 100 <= chosen(200).partials <= 200
    assert chosen(5).partials == 5


def test_a_tanh_to_16_bits_only_where_everything_behind_it_is_rounded_to_them() -> None:
    """A loss in fp32 keeps the exact one, whatever is stored beside it."""
    def text(chain: str, mode: str) -> str:
        loss = Loss(chain, -100, 0.0, "mean", torch.float32)
        return source(row_plan(loss, 32, mode, False), ((0,),), loop=True)

    wide, short = "bf16; div 30.0 fp32; tanh fp32", "bf16; div 30.0 bf16; tanh bf16; mul 30.0 bf16"
    assert "_tanh16(" not in text(wide, "value") and "_tanh16(" not in text("fp32; tanh fp32", "both")
    lines = text(wide, "both").splitlines()
    behind = [line for line in lines if " c = " in line]
    assert behind and all("_tanh(" in line for line in behind)
    assert "_tanh(" not in text(short, "both") and "_tanh8(" in text(short, "both")
    half = text(short.replace("bf16", "fp16"), "both")                       # which has three bits more
    assert "_tanh8(" not in half and "_tanh16(" in half


def test_logits_that_are_bounded_need_no_maximum() -> None:
    def text(chain: str) -> str:
        return source(row_plan(Loss(chain, -100, 0.0, "mean", torch.float32), 32, "both", False), ((0,),), loop=True)

    assert "top_lse" not in text("bf16; div 30.0 bf16; tanh bf16; mul 30.0 bf16")
    for chain in ("bf16", "bf16; div 40.0 bf16; tanh bf16; mul 40.0 bf16"):     # e^-80 of a sum would be close to nothing
        assert "top_lse" in text(chain)
