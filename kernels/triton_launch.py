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

from .binding import DTYPE, Bound, fold_rows, put
from .cache import load
from .column_sums import ColumnSums
from .direct import Direct
from .records import Launch, Recorded, clear
from .triton_arguments import Groups, arguments, tensors
from .triton_pieces import block_names, power_of_two
from .triton_source import LOOP_BLOCK, flat, source, splits, staged, sums_rows

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
ROW_LIMIT = 16384            # lanes of a row that one block holds: 16 warps x 32 threads x 32 fp32 registers
FUSION = False               # a b - a b is 0 as in eager: with one of the products in a fused multiply-add it is that product's rounding
SPLIT, SMALLEST = 1024, 256  # lanes of a row that may lie in several blocks, and of the smallest of them
MANY = 4 * 4096              # elements for each multiprocessor from which on a program of an elementwise pass takes 4,096
STAGES = 3                   # blocks of rows that a program has in hand or on their way, at most
SCRATCH = 4 << 10            # bytes of shared memory that a program takes beside them
PROGRAMS_PER_PROCESSOR = 4   # persistent programs per multiprocessor for gradients summed over rows, at most
HELD = 18                    # elements that a thread of those holds of every value, at most
REGISTERS = 1 << 16          # of a multiprocessor
APART = 45                   # registers of a thread beside those for what it holds of rows and columns


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
        pieces = _pieces(lanes) if splits(p) else (power_of_two(lanes),)
        block_r, warps = _rows_and_warps(p, pieces, sums, power_of_two(rows))
    else:
        many = rows * lanes >= MANY * processors(device)
        pieces = (min(power_of_two(lanes), 4096 if many else 1024),)
        block_r = max(1, min((4096 if many else 2048) // pieces[0], power_of_two(rows)))
        warps = max(1, min(8, block_r * pieces[0] // 256))
    blocks = -(-rows // block_r)
    across = 1 if p.program.reductions else -(-lanes // pieces[0])
    programs, stages = blocks, 1
    if sums:
        here = 2 if loop else _at_once(p, block_r * sum(pieces), warps)
        programs = min(blocks, max(1, processors(device) * here // min(across, 4)))
        programs = -(-blocks // -(-blocks // programs))                    # as few as need not take a block more each
        stages = 1 if loop else _stages(p, block_r * sum(pieces), memory(device) // here - SCRATCH)
    grid = (programs * across, 1) if flat(p) else (programs, across)
    return Shape(loop, block_r, pieces, warps, grid, programs if sums else 0, stages)


def _rows_and_warps(p: Pass, pieces: tuple[int, ...], sums: bool, most: int) -> tuple[int, int]:
    """Rows of a block that holds them whole, ``most`` at most, and warps: what was fastest for norms of 2,048 to 8,192 lanes.

    A thread has 16 elements of a row in flight, and 32 where a second reduction waits for the first with little to read beside it. Where
    it goes through many blocks it has ``HELD`` at most, and few warps wait for one another.
    """
    width = sum(pieces)
    if sums:
        rows = max(1, min(most, 2048 // width))
        return rows, min(power_of_two(-(-rows * width // (32 * HELD))), 16)
    streams = sum(i.role == "data" and i.kind.rows and i.kind.lanes for i in p.program.inputs)
    waits = len(p.program.reductions) > 1 and streams == 1
    least = min(2 * width, 16384) if waits else 0
    rows = max(1, min(most, max(2048, least) // width))
    return rows, max(1, min(rows * pieces[0] // (1024 if waits else 512), 8 if waits else 16))


def _at_once(p: Pass, elements: int, warps: int) -> int:
    """Programs that a processor has the registers for: a thread holds sums, columns and rows, in fp32."""
    values = sum(i.role == "data" and i.kind.lanes for i in p.program.inputs)
    values += sum(o.over_rows and not p.folded(k) and p.program.kinds[o.value].lanes for k, o in enumerate(p.program.outputs))
    thread = min(255, APART + values * elements // (32 * warps))
    return max(1, min(PROGRAMS_PER_PROCESSOR, REGISTERS // (32 * warps * thread)))


def _stages(p: Pass, elements: int, most: int) -> int:
    """Blocks of rows in hand or on their way: the one in hand is in registers, the others in ``most`` bytes of shared memory."""
    rows = [p.reads[a.tensor].dtype for i, a in zip(p.program.inputs, p.loads) if a is not None and i.kind.rows and i.kind.lanes]
    size = elements * sum(DTYPE[d].itemsize for d in rows)
    return max(1, min(STAGES, 1 + most // max(1, size)))


def _pieces(lanes: int) -> tuple[int, ...]:
    """Powers of two that hold a row side by side, the largest first: as few as waste less than a tenth, three at most.

    In one block, 2304 lanes would hold registers for 4096, and half as many rows be in flight.
    """
    if lanes < SPLIT:
        return (power_of_two(lanes),)
    ways = [_in_pieces(lanes, count) for count in (1, 2, 3)]
    return next((w for w in ways if sum(w) * 10 <= lanes * 11), min(ways, key=sum))


def _in_pieces(lanes: int, most: int) -> tuple[int, ...]:
    found: list[int] = []
    rest = lanes
    while rest >= SMALLEST and len(found) < most - 1:
        found.append(power_of_two(rest + 1) // 2)
        rest -= found[-1]
    return (*found, max(SMALLEST, power_of_two(rest))) if rest else tuple(found)



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
        even_r, even_l = _even(shape, bound)
        options = dict(BLOCK_R=shape.block_r, **blocks, WIDE=bound.wide, EVEN_R=even_r, EVEN_L=even_l,
                       num_warps=shape.warps, enable_fp_fusion=FUSION)  # fmt: skip
        if staged(p, shape.loop):
            options["STAGES"] = shape.stages
        run = Direct(kernel, shape.grid, integers, options, device)
        pick = _picker(ins, [len(p.reads) + i for i in outs])
        if not totals:
            return lambda reads, writes: run(pick((*reads, *writes)))
        make = torch.zeros if shape.loop else torch.empty
        sizes = [(*(bound.shape if fold else (shape.partials,)), w) for fold, w, _ in totals]
        sums = [(place, w) for fold, w, place in totals if not fold]
        add = ColumnSums(sums, shape.partials, bound.lanes, device, INTERPRET)

        def launch(reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
            partial = [make(size, dtype=torch.float32, device=device) for size in sizes]
            run((*pick((*reads, *writes)), *partial))
            add(partial[: len(sums)], writes)
            for (_, _, place), part in zip(totals[len(sums) :], partial[len(sums) :]):
                put(writes[place.tensor], place, fold_rows(part, place), bound.lanes)

        return launch


def _even(shape: Shape, bound: Bound) -> tuple[bool, bool]:
    """Whether no block reaches over the last row, and none over a row's end. Rows that 16 divides have a kernel of their own anyway."""
    return bound.rows % max(16, shape.block_r) == 0 or shape.block_r == 1, bound.lanes % sum(shape.blocks_l) == 0


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
