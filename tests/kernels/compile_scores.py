"""The attention kernels for ``compile_for.py``: (name, kernel, signature, constants, options, most bytes of shared memory)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from slothc.kernels import scores_launch
from slothc.kernels.scores_launch import Form, at_once, block, constants, keyed, shapes

MEMORY = {"75": 64 << 10, "80": 163 << 10, "90": 227 << 10, "gfx942": 64 << 10}
POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
KEPT = {"tops": "*fp32", "inverses": "*fp32", "deltas": "*fp32", "low": "*i8"}
CAPPED, PLAIN = "fp32; mul 0.0625 fp32; div 50 fp32; tanh fp32; mul 50 fp32", "fp32; mul 0.125 fp32"
NUMBERS = ("H", "TQ", "TK", "window", "before", "heads")
# chain, KIND, MASK, sinks, head dimensions, wide offsets
CASES = (
    (CAPPED, 1, 0, False, (256, 256), False), (PLAIN, 0, 1, False, (80, 80), False), (PLAIN, 2, 2, True, (64, 64), False),
    (CAPPED, 0, 3, False, (192, 128), True),
)  # fmt: skip


def kernels(arch: str) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any], int]]:
    half = torch.float16 if arch == "75" else torch.bfloat16
    every = ((half, CASES), (torch.float32, CASES[1:2]))
    some = ((half, CASES[::2] if arch.startswith("gfx") else CASES[:1]),)    # a kernel takes seconds
    for dtype, cases in every if arch == "90" else some:
        for chain, kind, mask, sink, dims, wide in cases:
            left = bool(at_once(1, 2, (2048, 2048), dims, dtype.itemsize))
            for name in ("forward", "to_queries", *keyed(dims), *(["by_weights"] if left else [])):
                kernel = scores_launch._kernel(name)
                b = shapes(name, block(dims[0]) + block(dims[1]), dtype.itemsize, MEMORY[arch])[0]
                values = constants(name, Form(chain, kind, mask, sink), dtype, 2, wide, dims, b, left)
                options = {o: values.pop(o) for o in ("num_warps", "num_stages", "enable_fp_fusion")}
                types = {n: _type(n, dtype, mask, values) for n in kernel.arg_names}
                text = f"{name} {str(dtype)[6:]} {dims} kind {kind} mask {mask} {b}"
                yield text, kernel, types, values, options, MEMORY[arch]


def _type(name: str, dtype: torch.dtype, mask: int, values: dict[str, Any]) -> str:
    if name in values:
        return "constexpr"
    if name == "mask" and mask > 1:
        return "*u8"
    if name in KEPT:
        return KEPT[name]
    return "i32" if (name.startswith("s") and "_" in name) or name in NUMBERS else POINTER[dtype]
