"""Launching the Triton kernels of a pass."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch
from slothc.gradients.plan import Pass
from torch import Tensor

from .binding import DTYPE, Bound, fold_rows, put, summed
from .cache import load
from .direct import Direct
from .records import Launch, Recorded, clear
from .triton_pieces import block_names
from .triton_source import LOOP_BLOCK, Groups, arguments, flat, source, splits, staged, sums_rows, tensors

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
ROW_LIMIT = 16384            # lanes of a row that one block holds: 16 warps x 32 threads x 32 fp32 registers
FUSION = False               # a b - a b is 0 as in eager: with one of the products in a fused multiply-add it is that product's rounding
SPLIT, SMALLEST = 1024, 256  # lanes of a row that may lie in several blocks, and of the smallest of them
MANY = 4 * 4096              # elements for each multiprocessor from which on a program of an elementwise pass takes 4,096
STAGED = 96 << 10            # bytes of shared memory for rows on their way
PROGRAMS_PER_PROCESSOR = 2   # persistent programs per multiprocessor for gradients summed over rows


@functools.cache
def available(device: torch.device) -> bool:
    """Whether Triton can run on ``device``: an accelerator it has a driver for, or any CPU under ``TRITON_INTERPRET=1``."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return INTERPRET if device.type == "cpu" else device.type in ("cuda", "xpu")


@functools.cache
def nvidia() -> bool:
    """Whether kernels are compiled for NVIDIA's devices from sm_75 on, and all of them are."""
    if INTERPRET or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return all(torch.cuda.get_device_capability(k) >= (7, 5) for k in range(torch.cuda.device_count()))


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; 2 under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have on the device."""
    if device.type != "cuda":
        return 1 << 16
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 1 << 16))


@dataclass(frozen=True)
class Shape:
    """The launch of one kernel: rows of a block, lanes of the blocks that are side by side, warps, grid, how many rows of partial sums
    it writes (0: none), and blocks of rows on their way at once."""

    loop: bool
    block_r: int
    blocks_l: tuple[int, ...]
    warps: int
    grid: tuple[int, int]
    partials: int
    stages: int


def choose(p: Pass, bound: Bound, device: torch.device) -> Shape:
    """Block shapes from sizes alone. Where a row has reductions it lies whole in a block, but for one that fits none."""
    sums = sums_rows(p)
    rows, lanes = max(bound.rows, 1), max(bound.lanes, 1)
    loop = bool(p.program.reductions) and lanes > ROW_LIMIT
    pieces: tuple[int, ...]
    if loop:
        block_r, pieces, warps = 1, (LOOP_BLOCK if not INTERPRET else 1024,), 8
    elif p.program.reductions:
        pieces = _pieces(lanes) if splits(p) else (_power(lanes),)
        block_r, warps = _rows_and_warps(p, pieces, sums, _power(rows))
    else:
        many = rows * lanes >= MANY * processors(device)
        pieces = (min(_power(lanes), 4096 if many else 1024),)
        block_r = max(1, min((4096 if many else 2048) // pieces[0], _power(rows)))
        warps = max(1, min(8, block_r * pieces[0] // 256))
    blocks = -(-rows // block_r)
    across = 1 if p.program.reductions else -(-lanes // pieces[0])
    programs = blocks
    if sums:
        here = PROGRAMS_PER_PROCESSOR if sum(pieces) < 8192 or loop else 1
        programs = min(blocks, max(1, processors(device) * here // min(across, 4)))
    stages = _stages(p, block_r * sum(pieces), min(STAGED, memory(device) // 2)) if sums and not loop else 1
    grid = (programs * across, 1) if flat(p) else (programs, across)
    return Shape(loop, block_r, pieces, warps, grid, programs if sums else 0, stages)


def _rows_and_warps(p: Pass, pieces: tuple[int, ...], sums: bool, most: int) -> tuple[int, int]:
    """Rows of a block that holds them whole, ``most`` at most, and warps: what was fastest for norms of 2,048 to 8,192 lanes.

    A thread has 16 elements of a row in flight, and 32 where a second reduction waits for the first with little to read beside it, or
    where the block is one of many that a program goes through.
    """
    width = sum(pieces)
    streams = sum(i.role == "data" and i.kind.rows and i.kind.lanes for i in p.program.inputs)
    waits = len(p.program.reductions) > 1 and (sums or streams == 1)
    least = min(2 * width, 8192 if sums else 16384) if waits else 0
    rows = max(1, min(most, max(4096 if sums else 2048, least) // width))
    warps = rows * pieces[0] // (1024 if sums or waits else 512)
    return rows, max(1, min(warps, 8 if waits and not sums else 16))


def _stages(p: Pass, elements: int, most: int) -> int:
    """Blocks of rows on their way at once: three where their shared memory leaves room for the other program of the processor."""
    rows = [p.reads[a.tensor].dtype for i, a in zip(p.program.inputs, p.loads) if a is not None and i.kind.rows and i.kind.lanes]
    size = elements * sum(DTYPE[d].itemsize for d in rows)
    return next((n for n in (3, 2) if n * size <= most), 1)


def _pieces(lanes: int) -> tuple[int, ...]:
    """Powers of two that hold a row side by side, the largest first: as few as waste less than a tenth, three at most.

    In one block, 2304 lanes would hold registers for 4096, and half as many rows be in flight.
    """
    if lanes < SPLIT:
        return (_power(lanes),)
    ways = [_in_pieces(lanes, count) for count in (1, 2, 3)]
    return next((w for w in ways if sum(w) * 10 <= lanes * 11), min(ways, key=sum))


def _in_pieces(lanes: int, most: int) -> tuple[int, ...]:
    found: list[int] = []
    rest = lanes
    while rest >= SMALLEST and len(found) < most - 1:
        found.append(_power(rest + 1) // 2)
        rest -= found[-1]
    return (*found, max(SMALLEST, _power(rest))) if rest else tuple(found)


def _power(n: int) -> int:
    return 1 << max(0, (n - 1).bit_length())


class TritonLauncher(Recorded):
    """Runs a pass with its Triton kernels, one for each way in which row axes merge."""

    def __init__(self, p: Pass) -> None:
        super().__init__(p)
        self.kernels: dict[tuple[Groups, bool, int], Any] = {}

    def _kernel(self, groups: Groups, loop: bool, pieces: int) -> Any:
        if (groups, loop, pieces) not in self.kernels:
            name = f"rowwise_{self.p.key}"                                # what a profiler shows
            text = source(self.p, groups, loop, name, pieces, nvidia=nvidia())
            self.kernels[groups, loop, pieces] = getattr(load(name, text), name)
        return self.kernels[groups, loop, pieces]

    def _prepare(self, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> Launch:
        p, device = self.p, reads[0].device
        bound = self.binder.bind(reads, writes)
        outputs = p.program.outputs
        if bound.rows == 0 or bound.lanes == 0:
            return clear
        shape = choose(p, bound, device)
        kernel = self._kernel(bound.groups, shape.loop, len(shape.blocks_l))
        places = (*bound.loads, *bound.stores)
        integers = [_number(places[n], what) for _, n, what in arguments(p, bound.groups)]
        integers += [*bound.shape, *(bound.sizes[i.name] for i in p.program.inputs if i.role == "size"), bound.rows, bound.lanes]
        ins = tensors(p)
        outs = sorted({a.tensor for o, a in zip(outputs, p.stores) if not o.over_rows})
        totals = [(p.folded(k), bound.lanes if p.program.kinds[o.value].lanes else 1, place)
                  for k, (o, place) in enumerate(zip(outputs, bound.stores)) if o.over_rows]  # fmt: skip
        totals.sort(key=lambda t: t[0])                                   # as the kernel's arguments: column sums, then folds
        blocks = dict(zip(block_names(len(shape.blocks_l)), shape.blocks_l))
        options = dict(BLOCK_R=shape.block_r, **blocks, WIDE=bound.wide, num_warps=shape.warps, enable_fp_fusion=FUSION)
        if staged(p, shape.loop):
            options["STAGES"] = shape.stages
        run = Direct(kernel, shape.grid, integers, options, device)
        pick = _picker(ins, [len(p.reads) + i for i in outs])
        if not totals:
            return lambda reads, writes: run(pick((*reads, *writes)))
        make = torch.zeros if shape.loop else torch.empty
        sizes = [(*(bound.shape if fold else (shape.partials,)), w) for fold, w, _ in totals]

        def launch(reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
            partial = [make(size, dtype=torch.float32, device=device) for size in sizes]
            run((*pick((*reads, *writes)), *partial))
            for (fold, _, place), part in zip(totals, partial):
                if fold:
                    put(writes[place.tensor], place, fold_rows(part, place), bound.lanes)
                else:
                    summed(part, writes[place.tensor], place, bound.lanes)

        return launch


def _picker(reads: Sequence[int], writes: Sequence[int]) -> Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """The tensors that a kernel takes, of all reads and writes."""
    numbers = (*reads, *writes)
    return itemgetter(*numbers) if len(numbers) > 1 else lambda all_of: tuple(all_of[n] for n in numbers)


def _number(place: Any, what: str) -> int:
    if what in ("step", "count"):
        return int(getattr(place.table, what))
    if what.startswith("index "):
        return _number(place.table.index, what.removeprefix("index "))
    return place.offset if what == "offset" else place.lane if what == "lane" else place.rows[int(what)]
