"""The Triton text of the main plans, for people to review. ``SLOTH_ACCEPT=1 pytest tests/kernels/test_golden.py`` rewrites it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from contract import case
from forms import Form, form, rope
from slothc.kernels import triton_helpers, triton_source
from slothc.patterns import gated_mlp

GOLDEN = Path(__file__).with_name("golden")
SWIGLU = Form("swiglu", gated_mlp.RULE.samples[0].function, ((2, 5, 48), (2, 5, 48)))
ROPE = Form("rope", rope, ((2, 3, 5, 16), (2, 5, 16), (2, 5, 16)), fixed=(1, 2))
MAIN = [form("rms_norm"), form("add_norm"), form("layer_norm"), SWIGLU, ROPE]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("f", MAIN, ids=lambda f: f.name)
def test_tile_kernels(f: Form, direction: str) -> None:
    """One row loop where memory is plain; for rope, whose heads are transposed, three."""
    p = dict(zip(("forward", "backward"), case(f.function, f.draw(torch.bfloat16), f.fixed).passes()))[direction]
    axes = tuple(range(len(p.axes)))
    groups = tuple((a,) for a in axes) if f is ROPE else (axes,)
    agrees(f"{f.name}_{direction}", triton_source.source(p, groups, loop=False))


def test_loop_kernel() -> None:
    f = form("rms_norm")
    p = case(f.function, f.draw(torch.bfloat16)).plan.backward
    assert p is not None
    agrees("rms_norm_backward_long_rows", triton_source.source(p, ((0, 1),), loop=True))


def agrees(name: str, text: str) -> None:
    text = text.removeprefix(triton_helpers.HEADER)
    path = GOLDEN / f"{name}.py.txt"
    if os.environ.get("SLOTH_ACCEPT") == "1":
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text, f"{path.name} differs; SLOTH_ACCEPT=1 takes the new text"
