"""The launch of a pass's kernel: blocks, warps and grid from sizes alone, without a measurement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from slothc.gradients.plan import Pass

from .binding import DTYPE, Bound
from .devices import INTERPRET, memory, processors
from .triton_pieces import power_of_two
from .triton_source import LOOP_BLOCK, flat, splits, sums_rows

ROW_LIMIT = 16384            # lanes of a row that one block holds: 16 warps x 32 threads x 32 fp32 registers
SPLIT, SMALLEST = 1024, 256  # lanes of a row that may lie in several blocks, and of the smallest of them
MANY = 4 * 4096              # elements for each multiprocessor from which on a program of an elementwise pass takes 4,096
STAGES = 3                   # blocks of rows that a persistent program has in hand or on their way, at most
SCRATCH = 4 << 10            # bytes of shared memory that it takes beside them
HELD, WARPS = 32, 8          # elements of a value that each of its threads holds, and warps of a processor's persistent programs
PROGRAMS, NARROW = 4, 1024   # those programs at most, and lanes of a row below which all of those are one program's
REGISTERS, APART = 255, 45   # of a thread, and those for other things than rows, columns and sums


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
        block_r, pieces, warps, here = 1, (LOOP_BLOCK if not INTERPRET else 1024,), 8, 2
    elif p.program.reductions:
        pieces = _pieces(lanes) if splits(p) else (power_of_two(lanes),)
        block_r, warps, here = _summed(p, pieces, rows, processors(device)) if sums else (*_whole(p, pieces, rows), 1)
    else:
        many = rows * lanes >= MANY * processors(device)
        pieces = (min(power_of_two(lanes), 4096 if many else 1024),)
        block_r = max(1, min((4096 if many else 2048) // pieces[0], power_of_two(rows)))
        warps = max(1, min(8, block_r * pieces[0] // 256))
        here = max(1, min(PROGRAMS, 2 * WARPS // warps))
    blocks = -(-rows // block_r)
    across = 1 if p.program.reductions else -(-lanes // pieces[0])
    programs, stages = blocks, 1
    if sums:
        programs = min(blocks, max(1, processors(device) * here // min(across, 4)))
        programs = -(-blocks // -(-blocks // programs))                    # as few as need not take a block more each
        stages = 1 if loop else _stages(p, block_r * sum(pieces), memory(device) // here - SCRATCH)
    grid = (programs * across, 1) if flat(p) else (programs, across)
    return Shape(loop, block_r, pieces, warps, grid, programs if sums else 0, stages)


def _whole(p: Pass, pieces: tuple[int, ...], rows: int) -> tuple[int, int]:
    """Rows of a block that holds them whole, and warps: what was fastest for norms of 2,048 to 8,192 lanes.

    A thread has 16 elements of a row in flight, and 32 where a second reduction waits for the first with little to read beside it.
    """
    width = sum(pieces)
    streams = sum(i.role == "data" and i.kind.rows and i.kind.lanes for i in p.program.inputs)
    waits = len(p.program.reductions) > 1 and streams == 1
    least = min(2 * width, 16384) if waits else 0
    block = max(1, min(power_of_two(rows), max(2048, least) // width))
    return block, max(1, min(block * pieces[0] // (1024 if waits else 512), 8 if waits else 16))


def _summed(p: Pass, pieces: tuple[int, ...], rows: int, processors: int) -> tuple[int, int, int]:
    """The same where gradients are summed over rows, and programs for each processor, which go through many blocks. The threads of all of
    them hold as many elements as they have registers for, in fp32 beside the sums; no program is without a block.
    """
    width = sum(pieces)
    values = sum(i.role == "data" and i.kind.lanes for i in p.program.inputs)
    values += sum(o.over_rows and not p.folded(k) and p.program.kinds[o.value].lanes for k, o in enumerate(p.program.outputs))
    held = 32 * (HELD if APART + values * HELD <= REGISTERS else HELD // 2)    # by a warp
    least = WARPS if width < NARROW else WARPS // 2                        # many short rows have more to wait for
    warps = max(least, min(16, power_of_two(-(-width // held))))
    most = max(1, min(warps * held // width, rows // processors))
    block = 1 << most.bit_length() - 1
    here = max(1, min(PROGRAMS, WARPS * held // (block * width)))
    return block, max(1, min(warps, power_of_two(-(-block * width // held)))), here


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


def even(shape: Shape, bound: Bound) -> tuple[bool, bool]:
    """Whether no block reaches over the last row, and none over a row's end. Rows that 16 divides have a kernel of their own anyway."""
    return bound.rows % max(16, shape.block_r) == 0 or shape.block_r == 1, bound.lanes % sum(shape.blocks_l) == 0
