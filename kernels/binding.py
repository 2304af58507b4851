"""Binding a pass to tensors: sizes, strides and offsets of every access, with adjacent row axes merged where memory allows.

Every access is affine, so for each operand tensor it is one offset, one stride for each row axis and one for the lane.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

import sympy as sp
import torch
from slothc.gradients.geometry import Access, Size
from slothc.gradients.plan import Operand, Pass
from torch import Tensor

DTYPE = {
    "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64,
    "i64": torch.int64, "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8, "bool": torch.bool,
}  # fmt: skip


class Unbindable(ValueError):
    """The operands do not fit the pass: a size cannot be found, or a shape or dtype differs from the plan's."""


@dataclass(frozen=True)
class Placement:
    """One access with numbers: element offset, a stride for each merged row axis, the lane's stride."""

    tensor: int
    offset: int
    rows: tuple[int, ...]
    lane: int
    table: TablePlacement | None = None


@dataclass(frozen=True)
class TablePlacement:
    """A looked-up dimension of ``count`` elements, ``step`` apart: which one is at ``index``."""

    index: Placement
    step: int
    count: int


@dataclass(frozen=True)
class Bound:
    """A pass bound to shapes and strides. ``groups`` says which row axes were merged into each loop of ``shape``."""

    shape: tuple[int, ...]
    lanes: int
    groups: tuple[tuple[int, ...], ...]
    loads: tuple[Placement | None, ...]
    stores: tuple[Placement, ...]
    sizes: dict[str, int]
    wide: bool

    @property
    def rows(self) -> int:
        return prod(self.shape)


class Binder:
    """Binds one pass; everything that does not depend on the tensors is worked out once."""

    def __init__(self, p: Pass) -> None:
        self.p = p
        self._steps = tuple(_size_steps(p))
        symbols = [s for s, *_ in self._steps]
        self._evaluate = _evaluator(symbols, [*(a.size for a in p.axes), p.lane.size, *(e for _, e in p.sizes)])
        self._shapes = [_evaluator(symbols, list(w.shape)) for w in p.writes]
        self._coefficients = {
            a: _evaluator(symbols, _flat_coefficients(a, p)) for a in {*(x for x in p.loads if x), *p.stores}
        }

    def values(self, reads: Sequence[Tensor]) -> tuple[int, ...]:
        """The value of every size symbol, in the order in which they are found."""
        found: dict[str, int] = {}
        for name, tensor, dim, known, factor in self._steps:
            size = self._shape(tensor, reads)[dim]
            unit = factor * prod(found[k] for k in known)
            if unit == 0:
                found[name] = 0
                continue
            if size % unit:
                raise Unbindable(f"operand {tensor} has size {size} in dimension {dim}, which is not a multiple of {unit}")
            found[name] = size // unit
        return tuple(found.values())

    def allocate(self, reads: Sequence[Tensor]) -> list[Tensor]:
        """New tensors for the results, laid out in memory in the order the plan gives."""
        values, device = self.values(reads), reads[0].device
        return [_empty(shape(*values), w, device) for shape, w in zip(self._shapes, self.p.writes)]

    def bind(self, reads: Sequence[Tensor], writes: Sequence[Tensor]) -> Bound:
        """Numbers for every access. Raises ``Unbindable``."""
        if len(reads) != len(self.p.reads) or len(writes) != len(self.p.writes):
            fit = f"the plan reads {len(self.p.reads)} and writes {len(self.p.writes)} tensors"
            raise Unbindable(f"{fit}, not {len(reads)} and {len(writes)}")
        values = self.values(reads)
        numbers = [int(v) for v in self._evaluate(*values)]
        count = len(self.p.axes)
        shape, lanes, sizes = numbers[:count], numbers[count], numbers[count + 1 :]
        loads = [self._load(a, reads, values) if a else None for a in self.p.loads]
        stores = [self._place(a, writes[a.tensor].stride(), values) for a in self.p.stores]
        placed = [x for x in (*loads, *stores) if x]
        groups = _merge(shape, _order(stores, loads), [*placed, *(x.table.index for x in placed if x.table)])
        wide = any(_extent(t) >= 2**31 for t in (*reads, *writes)) or prod(shape) * lanes >= 2**31
        return Bound(
            tuple(prod(shape[i] for i in g) for g in groups), lanes, groups,
            tuple(_regroup(x, groups) if x else None for x in loads), tuple(_regroup(x, groups) for x in stores),
            {name: v for (name, _), v in zip(self.p.sizes, sizes)}, wide,
        )  # fmt: skip

    def _shape(self, tensor: int, reads: Sequence[Tensor]) -> tuple[int, ...]:
        """The operand's shape; a table's with the index's in place of the dimension that is looked up."""
        shape, lookup = tuple(reads[tensor].shape), self.p.reads[tensor].lookup
        if lookup is not None and lookup.along:
            return tuple(reads[lookup.index].shape)
        return shape if lookup is None else (*shape[: lookup.dim], *reads[lookup.index].shape, *shape[lookup.dim + 1 :])

    def _load(self, access: Access, reads: Sequence[Tensor], values: tuple[int, ...]) -> Placement:
        lookup = self.p.reads[access.tensor].lookup
        strides = reads[access.tensor].stride()
        if lookup is None:
            return self._place(access, strides, values)
        index, d = reads[lookup.index], lookup.dim
        beside = index.dim() if not lookup.along else 1
        own = self._place(access, (*strides[:d], *[0] * beside, *strides[d + 1 :]), values)
        around = (d, len(strides) - 1 - d) if not lookup.along else (0, 0)
        which = self._place(access, (*[0] * around[0], *index.stride(), *[0] * around[1]), values)
        which = replace(which, tensor=lookup.index)
        return replace(own, table=TablePlacement(which, strides[d], reads[access.tensor].shape[d]))

    def _place(self, access: Access, strides: Sequence[int], values: tuple[int, ...]) -> Placement:
        numbers = self._coefficients[access](*values)
        width = len(self.p.axes) + 2
        total = [0] * width
        for d, stride in enumerate(strides):
            for k in range(width):
                total[k] += int(numbers[d * width + k]) * stride
        return Placement(access.tensor, total[-1], tuple(total[:-2]), total[-2])


def fold_rows(part: Tensor, place: Placement) -> Tensor:
    """The sum of [merged row axes..., lanes] over the axes that the placement does not vary with."""
    over = [g for g, stride in enumerate(place.rows) if stride == 0]
    return part.sum(over) if over else part


def put(target: Tensor, place: Placement, total: Tensor, lanes: int) -> None:
    """Write a sum over rows, [kept row axes..., lanes or 1], to its places in ``target``; one value may go to every lane."""
    strides = [s for s in place.rows if s != 0] if total.dim() > 1 else []
    if place.lane and total.shape[-1] == 1:
        total = total.expand(*total.shape[:-1], lanes)
    target.as_strided(total.shape, (*strides, place.lane), target.storage_offset() + place.offset).copy_(total)


def _flat_coefficients(access: Access, p: Pass) -> list[Size]:
    """For each tensor dimension: the coefficient of each row axis, of the lane, and the constant."""
    names = [*(a.name for a in p.axes), p.lane.name]
    return [c for form in access.index for c in (*(form.coefficient(n) for n in names), form.const)]


def _evaluator(symbols: list[str], exprs: Sequence[Size]) -> Callable[..., tuple]:
    """A Python function of the size symbols that returns the values of ``exprs``."""
    text = ", ".join(sp.sstr(e) for e in exprs)
    return eval(f"lambda {', '.join(symbols)}: ({text}{',' if exprs else ''})")


def _size_steps(p: Pass) -> list[tuple[str, int, int, tuple[str, ...], int]]:
    """How each size symbol is found: (symbol, operand, dimension, symbols already known, integer factor)."""
    wanted = {s.name for e in (*(a.size for a in p.axes), p.lane.size, *(x for _, x in p.sizes), *(d for w in p.writes for d in w.shape))
              for s in sp.sympify(e).free_symbols}  # fmt: skip
    steps: list[tuple[str, int, int, tuple[str, ...], int]] = []
    known: set[str] = set()
    progress = True
    while wanted - known and progress:
        progress = False
        for t, operand in enumerate(p.reads):
            for d, expr in enumerate(operand.shape):
                factor, symbols = _product(expr)
                new = [s for s in symbols if s not in known]
                if len(new) == 1 and symbols.count(new[0]) == 1:
                    steps.append((new[0], t, d, tuple(s for s in symbols if s != new[0]), factor))
                    known.add(new[0])
                    progress = True
    if wanted - known:
        raise Unbindable(f"no operand's shape gives the size {sorted(wanted - known)[0]}")
    return steps


def _product(expr: Size) -> tuple[int, list[str]]:
    """An integer factor and the symbols of a product; no symbols if it is anything else."""
    expr = sp.sympify(expr)
    factor, rest = expr.as_coeff_Mul()
    symbols = [] if rest == 1 else [s.name for s in sp.Mul.make_args(rest) if s.is_Symbol]
    return int(factor), symbols if len(symbols) == len(sp.Mul.make_args(rest)) else []


def _empty(shape: tuple[int, ...], operand: Operand, device: torch.device) -> Tensor:
    order = operand.order
    make = torch.zeros if operand.zero else torch.empty
    if order is None:
        return make(shape, dtype=DTYPE[operand.dtype], device=device)
    outer = make([shape[d] for d in order], dtype=DTYPE[operand.dtype], device=device)
    return outer.permute([order.index(d) for d in range(len(shape))])


_device = getattr(torch._C, "_cuda_getDevice", None)
_quick = getattr(getattr(torch._C._dynamo, "guards", None), "_empty_strided_cuda", None)


class Blanks:
    """``blanks()``: new tensors like those of one allocation, their sizes and strides not worked out again."""

    def __init__(self, results: Sequence[Tensor], zeros: Sequence[bool]) -> None:
        self.index = results[0].device.index if results and results[0].device.type == "cuda" and _quick else None
        self.made = [(tuple(t.shape), t.stride(), t.dtype, t.device, zero) for t, zero in zip(results, zeros)]

    def __call__(self) -> list[Tensor]:
        quick = self.index is not None and self.index == _device()        # type: ignore[misc]
        results = []
        for size, stride, dtype, device, zero in self.made:
            if quick:
                t = _quick(size, stride, dtype)                           # type: ignore[misc]
            else:
                t = torch.empty_strided(size, stride, dtype=dtype, device=device)
            results.append(t.zero_() if zero else t)
        return results


def _order(stores: Sequence[Placement], loads: Sequence[Placement | None]) -> list[int]:
    """The row axes, outermost first, as they lie in the memory of the access that varies with most of them.

    Neighbours in memory are then neighbours in time, and what has no such axis (a table of angles beside heads) is read once for all.
    """
    most = max((*stores, *(x for x in loads if x)), key=lambda x: sum(s != 0 for s in x.rows))
    return sorted(range(len(most.rows)), key=lambda axis: -abs(most.rows[axis]))


def _merge(shape: list[int], order: list[int], placements: list[Placement]) -> tuple[tuple[int, ...], ...]:
    """Adjacent row axes become one loop where, for every access, outer stride = inner stride * inner size."""
    groups: list[tuple[int, ...]] = []
    for axis in order:
        size = shape[axis]
        if size == 1:
            continue
        if groups:
            outer = groups[-1][-1]
            if all(x.rows[outer] == x.rows[axis] * size for x in placements):
                groups[-1] = (*groups[-1], axis)
                continue
        groups.append((axis,))
    return tuple(groups) or (((0,),) if shape else ((),))


def _regroup(x: Placement, groups: tuple[tuple[int, ...], ...]) -> Placement:
    table = replace(x.table, index=_regroup(x.table.index, groups)) if x.table else None
    return Placement(x.tensor, x.offset, tuple(x.rows[g[-1]] if g else 0 for g in groups), x.lane, table)


def _extent(t: Tensor) -> int:
    return sum((n - 1) * abs(s) for n, s in zip(t.shape, t.stride())) + 1 if t.numel() else 0
