"""Block shapes and launches of the attention kernels."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .devices import memory
from .direct import Direct
from .scores_program import triton_functions

SHIFTS = {torch.bfloat16: 8, torch.float16: 5}     # of the bits that rounding takes from fp32, 16 and 13, the first eight are kept
KEPT = 512
MOST = 256            # a head's dimension


@dataclass(frozen=True)
class Blocks:
    """Queries and keys in a block, warps, and loads in flight."""

    m: int
    n: int
    warps: int
    stages: int


# the first that fits the device's shared memory is taken: {kernel: {largest head dim: shapes}}, for 16-bit operands
SHAPES: dict[str, dict[int, tuple[Blocks, ...]]] = {
    "forward": {
        64: (Blocks(128, 64, 8, 3), Blocks(64, 64, 4, 2)),
        128: (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2)),
        256: (Blocks(128, 64, 8, 2), Blocks(128, 32, 8, 2), Blocks(64, 32, 4, 2)),
    },
    "to_queries": {
        64: (Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2)),
        128: (Blocks(128, 64, 8, 3), Blocks(128, 64, 8, 2), Blocks(64, 64, 4, 2), Blocks(64, 32, 4, 2)),
        256: (Blocks(64, 32, 4, 3), Blocks(64, 32, 4, 2), Blocks(32, 32, 4, 1)),
    },
    "to_both": {
        64: (Blocks(64, 128, 8, 2), Blocks(64, 64, 4, 2)),
        128: (Blocks(64, 128, 8, 2), Blocks(64, 64, 8, 2), Blocks(32, 64, 4, 2)),
        256: (Blocks(32, 64, 8, 3), Blocks(32, 64, 8, 2), Blocks(32, 32, 4, 1)),
    },
    "to_keys": {256: (Blocks(32, 128, 8, 2), Blocks(64, 64, 8, 2), Blocks(32, 64, 8, 2), Blocks(32, 32, 4, 1))},
    "to_values": {256: (Blocks(64, 128, 8, 2), Blocks(64, 64, 8, 2), Blocks(32, 64, 8, 2), Blocks(32, 32, 4, 1))},
    "by_weights": {256: (Blocks(64, 64, 8, 4), Blocks(64, 64, 8, 3), Blocks(64, 64, 8, 2), Blocks(32, 64, 4, 2), Blocks(32, 32, 4, 1))},
}
SMALL = {64: (Blocks(64, 32, 4, 1), Blocks(32, 32, 4, 1)), 128: (Blocks(32, 32, 4, 1),), 256: (Blocks(16, 16, 4, 1),)}
SMALL_MEMORY = 64 << 10
PARTS = {"to_values": 1, "to_keys": 2, "to_both": 3}
BY_KEYS = (*PARTS, "by_weights")
TOGETHER = 384        # columns of a query and a value up to which making the scores again is cheaper than leaving them in memory
SPAN = 128            # of keys: what is left is left in whole spans
LEFT = 512 << 20      # bytes of weights and slopes that are left at a time
# fp32 products are exact, on the ordinary cores
WIDE_SHAPES = (Blocks(32, 32, 4, 1), Blocks(16, 16, 4, 1))
chosen: dict[tuple[str, int, int], Blocks] = {}    # what a benchmark, or a launch that did not fit, puts in place of a table's line


def block(dim: int) -> int:
    """The power of two that holds a head's dimension."""
    return max(16, 1 << (dim - 1).bit_length())


def shared(name: str, b: Blocks, width: int, size: int) -> int:
    """About how many bytes of shared memory a program takes: ``width`` columns of a query and a value together, ``size`` bytes each."""
    if name == "by_weights":
        return b.m * (b.n + width // 2) * b.stages * size
    rows, across = (b.n, b.m) if name in PARTS else (b.m, b.n)
    kept = rows * width // (2 if name in ("forward", "to_values") else 1)
    moving = across * width * b.stages
    return (kept + moving + (b.m * b.n if name != "forward" else 0)) * size


def shapes(name: str, width: int, size: int, memory: int) -> list[Blocks]:
    """The block shapes to try, best first. ``memory``: bytes of shared memory that a program may have."""
    tables = {MOST: WIDE_SHAPES} if size > 2 else SMALL if memory <= SMALL_MEMORY else SHAPES[name]
    table = next(s for most, s in tables.items() if width <= 2 * most)
    fitting = [b for b in table if shared(name, b, width, size) <= memory]
    return fitting or [table[-1]]


@dataclass(frozen=True)
class Form:
    """What a kernel is compiled for besides its operands' dtypes: the chain's text, KIND, MASK, whether there are sinks."""

    chain: str
    kind: int
    mask: int
    sink: bool


def tanh(dtype: torch.dtype) -> str:
    """Which tanh scores of operands of this dtype take."""
    return "quick" if dtype in SHIFTS else "exact"


def constants(
    name: str, form: Form, dtype: torch.dtype, group: int, wide: bool, dims: tuple[int, int], b: Blocks, leaves: bool = False
) -> dict[str, Any]:  # fmt: skip
    """The kernel's compile-time arguments in the order of its signature, then the compiler's options."""
    value, both = triton_functions(form.chain, tanh(dtype))
    firsts: dict[str, dict[str, Any]] = {
        "forward": {"VALUE": value}, "to_queries": {"BOTH": both, "SPAN": SPAN if leaves else 0}, "by_weights": {}
    }  # fmt: skip
    found = {**(firsts[name] if name in firsts else {"BOTH": both, "WHICH": PARTS[name]}), "GROUP": group, "KIND": form.kind}
    found |= {"MASK": form.mask} if name != "by_weights" else {}
    found |= {"SINK": form.sink} if name == "forward" else {}
    found |= {"SHIFT": SHIFTS.get(dtype, 0)} if name in ("forward", "to_queries") else {}
    found |= {"WIDE": wide, "PRECISION": "ieee", "DIM": dims[0], "DIM_V": dims[1], "BLOCK_D": block(dims[0]), "BLOCK_V": block(dims[1])}
    return found | {"BLOCK_M": b.m, "BLOCK_N": b.n, "num_warps": b.warps, "num_stages": b.stages, "enable_fp_fusion": True}


def keyed(dims: tuple[int, int]) -> tuple[str, ...]:
    """The kernels for the gradients of keys and values where nothing is left for them."""
    return ("to_both",) if block(dims[0]) + block(dims[1]) <= TOGETHER else ("to_values", "to_keys")


def left_row(keys: int) -> int:
    """Elements in a row of the weights that are left."""
    return -(-keys // SPAN) * SPAN


def at_once(heads: int, group: int, lengths: tuple[int, int], dims: tuple[int, int], size: int) -> int:
    """Of ``heads`` key heads, each read by ``group`` query heads, how many leave weights and slopes at a time; 0: making them again is
    cheaper, or one takes too much memory.
    """
    each = 2 * size * group * lengths[0] * left_row(lengths[1])
    if block(dims[0]) + block(dims[1]) <= TOGETHER or each > LEFT:
        return 0
    turns = -(-heads // (LEFT // each))
    return -(-heads // turns)


@dataclass(frozen=True)
class Part:
    """``count`` heads from the ``before``-th on. ``leaves``: their weights are left, or read."""

    before: int
    count: int
    leaves: bool = False


class Kernel:
    """One kernel for operands of these dtypes, shapes and strides; smaller blocks where the first choice does not fit."""

    def __init__(
        self, name: str, form: Form, dtype: torch.dtype, dims: tuple[int, int], group: int, wide: bool, part: Part,
        lengths: tuple[int, int], numbers: tuple[int, ...], device: torch.device,
    ) -> None:  # fmt: skip
        self.name, self.device, self.numbers, self.part = name, device, numbers, part
        self.parts = (form, dtype, group, wide, dims)
        self.tq, self.tk = lengths
        width, size = block(dims[0]) + block(dims[1]), dtype.itemsize
        self.key = (name, width, size)
        tried = shapes(name, width, size, memory(device))
        self.tried = [chosen[self.key]] if self.key in chosen else tried
        self.run = self._direct()

    def _direct(self) -> Direct:
        b = self.tried[0]
        rows, by = (self.tk, b.n) if self.name in BY_KEYS else (self.tq, b.m)
        options = constants(self.name, *self.parts, b, self.part.leaves)
        return Direct(_kernel(self.name), (-(-rows // by) * self.part.count,), self.numbers, options, self.device)

    def __call__(self, *tensors: Tensor) -> None:
        while True:
            try:
                return self.run(tensors)
            except Exception as error:
                if type(error).__name__ != "OutOfResources" or len(self.tried) == 1:
                    raise
                self.tried = self.tried[1:]
                self.run = self._direct()


@functools.cache
def _kernel(name: str) -> Any:
    from . import scores_kernel

    return getattr(scores_kernel, "to_keys" if name in PARTS else name)
