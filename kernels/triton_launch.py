"""Launching the Triton kernels of a pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from slothc.gradients.plan import Pass
from torch import Tensor

from .binding import fold_rows, put
from .cache import load
from .column_sums import ColumnSums
from .devices import INTERPRET, nvidia
from .direct import Direct
from .records import Launch, Recorded, clear
from .shapes import choose, even
from .triton_arguments import Groups, arguments, tensors
from .triton_pieces import block_names
from .triton_source import source, staged

FUSION = False               # a b - a b is 0 as in eager: with one of the products in a fused multiply-add it is that product's rounding


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
        even_r, even_l = even(shape, bound)
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
