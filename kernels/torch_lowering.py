"""The same passes as plain PyTorch: what a CPU runs, and the second implementation that the kernels are tested against.

Each input becomes a strided view over [merged row axes..., lane]; the equations are torch operations in fp32 on those views. Work goes
in slices of the outermost axis small enough for a processor's cache, so that temporaries never reach memory.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from slothc.gradients.plan import Pass
from slothc.gradients.program import Input, Program, Reduce, Stage
from torch import Tensor

from .binding import DTYPE, Bound, Placement, fold_rows, put
from .cache import load
from .expression import TORCH, render
from .lookup import look_up
from .records import Launch, Recorded, clear

SLICE = int(os.environ.get("SLOTH_CPU_SLICE", 1 << 17))      # elements of an input in one slice, about: 512 KiB of fp32


def source(program: Program) -> str:
    """The text of a module with a function ``run(inputs...) -> outputs`` over broadcastable fp32 tensors."""
    return "\n".join(_lines(program)) + "\n"


def _lines(program: Program) -> Iterator[str]:
    yield "import torch"
    yield "\n"
    yield "def _full(x, lanes):"
    yield "    x = torch.as_tensor(x, dtype=torch.float32)"
    yield "    return x if x.dim() and x.shape[-1] == lanes else x.expand(*x.shape[:-1], lanes)"
    yield "\n"
    yield f"def run(LANES, {', '.join(i.name for i in program.inputs)}):"
    for stage in program.stages:
        yield f"    {stage.name} = {_equation(stage)}"
    yield f"    return {''.join(o.value + ', ' for o in program.outputs)}"


def _equation(stage: Stage) -> str:
    value = stage.value
    if isinstance(value, Reduce):
        body = f"_full({render(value.body, TORCH)}, LANES)"
        if value.op == "sum":
            return f"{body}.sum(-1, keepdim=True)"
        return f"{body}.amax(-1, keepdim=True)" if value.op == "max" else f"torch.logsumexp({body}, -1, keepdim=True)"
    text = render(value, TORCH)
    if stage.dtype and stage.dtype != "fp32" and value.free_symbols:
        return f"{text}.to({DTYPE[stage.dtype]}).float()"
    return text


class TorchLauncher(Recorded):
    """Runs a pass with PyTorch operations. Tables are looked up first: the pass then reads the rows."""

    def __init__(self, p: Pass) -> None:
        super().__init__(replace(p, reads=tuple(replace(o, lookup=None) for o in p.reads)))
        self.tables = tuple((k, o.lookup) for k, o in enumerate(p.reads) if o.lookup is not None)

    def __call__(self, reads: Sequence[Tensor], writes: Sequence[Tensor] | None = None) -> list[Tensor]:
        return super().__call__(self.rows(reads), writes)

    def allocate(self, reads: Sequence[Tensor]) -> list[Tensor]:
        """New tensors for the results."""
        return self.binder.allocate(self.rows(reads))

    @torch.no_grad()
    def rows(self, reads: Sequence[Tensor]) -> Sequence[Tensor]:
        """The operands with every table in place of its looked-up rows."""
        if not self.tables:
            return reads
        found = list(reads)
        for k, lookup in self.tables:
            found[k] = look_up(reads[k], lookup, reads[lookup.index])
        return found

    @functools.cached_property
    def run(self) -> Callable[..., tuple[Any, ...]]:
        return load(f"rowwise_torch_{self.p.key}", source(self.p.program)).run

    def _prepare(self, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> Launch:
        bound, program = self.binder.bind(reads, writes), self.p.program
        if bound.rows == 0 or bound.lanes == 0:
            return clear
        axis = max(range(len(bound.shape)), key=lambda a: bound.shape[a])
        step = -(-bound.shape[axis] // max(1, round(bound.rows * bound.lanes / SLICE)))
        index = torch.arange(bound.lanes, dtype=torch.float32, device=reads[0].device).view(*(1 for _ in bound.shape), -1)

        @torch.no_grad()
        def launch(reads: Sequence[Tensor], writes: Sequence[Tensor]) -> None:
            inputs = [_input(i, place, reads, bound, index) for i, place in zip(program.inputs, bound.loads)]
            outputs = [self._target(k, writes, bound) for k in range(len(program.outputs))]
            totals: dict[int, Tensor] = {}
            for start in range(0, bound.shape[axis], step):
                length = min(step, bound.shape[axis] - start)
                values = self.run(bound.lanes, *(_slice(x, axis, start, length) for x in inputs))
                for k, (value, target) in enumerate(zip(values, outputs)):
                    if target is None:
                        part = _sum_rows(value, bound, axis, length)
                        totals[k] = totals[k] + part if k in totals else part
                    else:
                        part = target.narrow(axis, start, length) if target.shape[axis] > 1 else target
                        part.copy_(value) if isinstance(value, Tensor) else part.fill_(value)
            for k, place in enumerate(bound.stores):
                if program.outputs[k].over_rows:
                    full = outputs[k]
                    put(writes[place.tensor], place, totals[k] if full is None else fold_rows(full, place), bound.lanes)

        return launch

    def _target(self, k: int, writes: Sequence[Tensor], bound: Bound) -> Tensor | None:
        """Where output ``k`` goes slice by slice: its tensor, a full one to be folded, or (None) a running sum over all rows."""
        out, place = self.p.program.outputs[k], bound.stores[k]
        if not out.over_rows:
            return _view(writes[place.tensor], place, bound, self.p.program.out_kind(out))
        lanes = bound.lanes if self.p.program.kinds[out.value].lanes else 1
        return torch.empty(*bound.shape, lanes, device=writes[place.tensor].device) if self.p.folded(k) else None


def _view(t: Tensor, place: Placement, bound: Bound, kind: Any) -> Tensor:
    """The tensor as [row axes..., lane], with size 1 where the access does not vary."""
    strides = (*place.rows, place.lane)
    varies = [*(kind.rows and s != 0 for s in place.rows), kind.lanes]      # lanes stay: reductions count them
    sizes = [n if v else 1 for n, v in zip((*bound.shape, bound.lanes), varies)]
    return t.as_strided(sizes, strides, t.storage_offset() + place.offset)


def _input(i: Input, place: Placement | None, reads: Sequence[Tensor], bound: Bound, index: Tensor) -> Tensor | float:
    if i.role == "size":
        return float(bound.sizes[i.name])
    if place is None:
        return index
    return _view(reads[place.tensor], place, bound, i.kind)


def _slice(x: Tensor | float, axis: int, start: int, length: int) -> Tensor | float:
    if not isinstance(x, Tensor):
        return x
    part = x.narrow(axis, start, length) if x.shape[axis] > 1 else x
    return part if part.dtype == torch.float32 else part.float()


def _sum_rows(value: Any, bound: Bound, axis: int, length: int) -> Tensor:
    """The sum over this slice's rows; a value without rows counts once for each."""
    shape = [length if a == axis else n for a, n in enumerate(bound.shape)]
    value = torch.as_tensor(value, dtype=torch.float32)
    value = value.expand(*shape, value.shape[-1] if value.dim() else 1)
    return value.reshape(-1, value.shape[-1]).sum(0)
