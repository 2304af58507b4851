"""Loads: the scalar at an index of a node's value, as an expression over loads of a region's operands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy as sp
import torch
from torch import fx

from slothc.gradients.geometry import Access, Form, Size
from slothc.gradients.program import Input, Kind, Reduce, Stage, symbol

from .lift_complex import Pair
from .lift_scalars import number
from .lift_space import Space
from .permutations import is_permutation
from .sizes import shape_of
from .view import GraphView

STORAGE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
           torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool"}  # fmt: skip

LONGEST = 256         # steps of one kernel: what is longer would not stay in registers


@dataclass(frozen=True)
class LeafLookup:
    """Leaf ``index`` says which of the positions along dimension ``dim`` of a leaf are read; its own are at ``at`` (see ``Lookup``)."""

    index: int
    dim: int
    skipped: int | None
    along: bool
    signed: bool
    once: bool
    at: tuple[Form, ...]


class CannotLift(Exception):
    """The region has no row program; ``node`` is where it shows. Its value may become an operand instead."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


class OtherRow(CannotLift):
    """``node`` combines a row of another length than the region's: by itself it has a formula."""


class Loader:
    """Scalars of one evaluation over a fixed space: ``load`` gives a node's value at an index, by the handler ``_<kind>`` of its op."""

    def __init__(self, view: GraphView, region: set[fx.Node], space: Space, longest: int = LONGEST) -> None:
        self.view, self.region, self.space, self.longest = view, region, space, longest
        self.at: fx.Node | None = None
        self.memo: dict[tuple[fx.Node, tuple[Form, ...]], Any] = {}
        self.inputs: list[Input] = []
        self.loads: list[Access | None] = []
        self.leaves: list[fx.Node] = []
        self.lookups: dict[int, LeafLookup] = {}
        self.indirect: dict[tuple[fx.Node, tuple[Form, ...], int | None, bool, bool], str] = {}
        self.sizes: dict[str, Size] = dict(space.axes)
        self.stages: list[Stage] = []

    # stages

    def _stage(self, expr: sp.Expr | Reduce, dtype: str | None, force: bool = False, detached: bool = False) -> sp.Symbol:
        if isinstance(expr, sp.Expr) and expr.is_Symbol and dtype is None and not (force and expr.name in {i.name for i in self.inputs}):
            return expr
        if len(self.stages) >= self.longest and self.at is not None:
            raise CannotLift(self.at, f"its formula has more than {self.longest} steps")
        name = f"v{len(self.stages)}"
        self.stages.append(Stage(name, expr, dtype, detached))
        return symbol(name)

    def _round(self, expr: sp.Expr, node: fx.Node) -> sp.Expr:
        """The value as the node stores it."""
        if isinstance(expr, Pair):
            return expr
        dtype = STORAGE.get(self.view.dtype(node))
        if dtype in ("bf16", "fp16") and not expr.is_number:
            return self._stage(expr, dtype)
        return expr if expr.is_Symbol or expr.is_number else self._stage(expr, None)

    # loaders

    def load(self, node: Any, index: tuple[Form, ...]) -> sp.Expr:
        """The scalar at ``index`` of a node's value, or a number."""
        if not isinstance(node, fx.Node):
            return number(node)
        key = (node, index)
        if key not in self.memo:
            if node not in self.region:
                self.memo[key] = self._leaf(node, index)
            else:
                outer, self.at = self.at, node
                handler = getattr(self, f"_{self.view.op(node).kind}", None)
                if handler is None:
                    raise CannotLift(node, f"{self.view.op(node).kind} has no scalar formula")
                self.memo[key] = handler(node, self.view.op(node), index)
                self.at = outer
        return self.memo[key]

    def _broadcast(self, arg: Any, index: tuple[Form, ...]) -> sp.Expr:
        """An argument of a pointwise node, aligned on the right; dimensions of size 1 are read at 0."""
        if not isinstance(arg, fx.Node):
            return number(arg)
        if isinstance(self.view.example(arg), torch.SymFloat | torch.SymInt):
            return self._number(arg)
        shape = shape_of(self.view, arg)
        index = index[len(index) - len(shape) :]
        return self.load(arg, tuple(f if s != 1 or self._single(f) else Form() for f, s in zip(index, shape)))

    def _number(self, node: fx.Node) -> sp.Expr:
        """A number known only at run time: an operand without dimensions."""
        if (node, ()) not in self.memo:
            self.memo[node, ()] = self._real_leaf(node, (), torch.float32)
        return self.memo[node, ()]

    def _single(self, form: Form) -> bool:
        """Whether the form is the whole of axes that have size 1 here: such a dimension is an axis, not a broadcast."""
        return bool(form.terms) and all(self.sizes[a] == 1 for a in form.axes)

    def _leaf(self, node: fx.Node, index: tuple[Form, ...]) -> sp.Expr | Pair:
        value = self.view.example(node)
        if not isinstance(value, torch.Tensor):
            raise CannotLift(node, "its value is no tensor")
        if value.dtype == torch.complex64 and not self.view.needs_grad(node):
            return Pair(*(self._real_leaf(node, (*index, Form.of(k)), torch.float32) for k in range(2)))
        return self._real_leaf(node, index, value.dtype)

    def _real_leaf(self, node: fx.Node, index: tuple[Form, ...], dtype: torch.dtype) -> sp.Expr:
        if dtype not in STORAGE:
            raise CannotLift(node, f"its dtype is {str(dtype).removeprefix('torch.')}")
        access = self._access(node, index)
        kind = Kind(bool(access.axes - {self.space.lane}), self.space.lane in access.axes)
        stem = {(True, True): "x", (False, True): "w", (True, False): "s", (False, False): "c"}[kind.rows, kind.lanes]
        count = sum(i.name.rstrip("0123456789") == stem for i in self.inputs)
        grad = self.view.needs_grad(node) and dtype.is_floating_point
        self.inputs.append(Input(f"{stem}{count or ''}", kind, STORAGE[dtype], differentiable=grad))
        self.loads.append(access)
        return symbol(self.inputs[-1].name)

    def _access(self, node: fx.Node, index: tuple[Form, ...]) -> Access:
        """Where the leaf is read. A looked-up dimension is read at the index's own places: the access is to the rows looked up."""
        found = [(d, key) for d, f in enumerate(index) for key, name in self.indirect.items() if name in f.axes]
        if not found:
            return Access(self._operand(node, index, None), index)
        (dim, key), *more = found
        table, at, skipped, along, signed = key
        if more or index[dim] != Form.axis(self.indirect[key]):
            raise CannotLift(node, "it is looked up at more than one index, or at a part of one")
        if along and (len(at) != len(index) or any(f != g for d, (f, g) in enumerate(zip(at, index)) if d != dim)):
            raise CannotLift(node, "it is looked up along a dimension after it was moved")
        index = at if along else (*index[:dim], *at, *index[dim + 1 :])
        which = next((k for k, leaf in enumerate(self.leaves) if leaf is table and k not in self.lookups), len(self.leaves))
        self.leaves += [table] * (which == len(self.leaves))
        once = dim == 0 and skipped is None and not along and is_permutation(self.view, table)
        return Access(self._operand(node, index, LeafLookup(which, dim, skipped, along, signed, once, at)), index)

    def _operand(self, node: fx.Node, index: tuple[Form, ...], lookup: LeafLookup | None) -> int:
        """The operand's number; a differentiable tensor read through two maps that may meet counts as two operands."""
        for number_, leaf in enumerate(self.leaves):
            if leaf is not node or _table(self.lookups.get(number_)) != _table(lookup):
                continue
            others = [a for a in self.loads if a and a.tensor == number_]
            if not self.view.needs_grad(node) or all(self._disjoint(a.index, index) for a in others):
                return number_
        self.leaves.append(node)
        if lookup is not None:
            self.lookups[len(self.leaves) - 1] = lookup
        return len(self.leaves) - 1

    def _looked_up(
        self, node: fx.Node, index: fx.Node, at: tuple[Form, ...], size: Size,
        skipped: int | None = None, along: bool = False, signed: bool = False,
    ) -> Form:  # fmt: skip
        """The value of an integer tensor as if it were an axis of its own."""
        if any(a not in self.space.axes for f in at for a in f.axes):
            raise CannotLift(node, "it is looked up at an index that is looked up itself")
        name = self.indirect.setdefault((index, at, skipped, along, signed), f"@{len(self.indirect)}")
        self.sizes[name] = size
        return Form.axis(name)

    def _disjoint(self, a: tuple[Form, ...], b: tuple[Form, ...]) -> bool:
        """Two maps with the same axes and steps whose constants differ by no multiple of a lane step within the row."""
        if any(f.terms != g.terms for f, g in zip(a, b)):
            return False
        lane, size = self.space.lane, self.space.axes.get(self.space.lane, 1)
        for f, g in zip(a, b):
            if f.const != g.const:
                gap, step = abs(f.const - g.const), f.coefficient(lane)
                below_next = all(gap < c for n, c in f.terms if n != lane)
                if step == 0:
                    return below_next
                return below_next and isinstance(gap, int) and (gap % step != 0 or gap // step >= size)
        return False


def _table(lookup: LeafLookup | None) -> tuple[Any, ...] | None:
    return None if lookup is None else (lookup.index, lookup.dim, lookup.skipped, lookup.along, lookup.signed)
