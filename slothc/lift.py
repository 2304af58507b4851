"""Lifting by evaluation: a region of a graph, run at symbolic indices, gives its formula, whatever its spelling.

Every node is a loader: given an index (one affine form for each dimension) it returns a scalar expression over loads of the region's
operands. Evaluating the region's results at symbolic indices *is* the lift; no node needs to know about any other. Where a view cannot
be followed because an axis straddles a boundary, that axis is split and the evaluation starts again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import product
from math import prod
from typing import Any

import sympy as sp
import torch
from torch import fx

from slothc.gradients.geometry import Access, Axis, Form, Size
from slothc.gradients.program import CONST, Input, Kind, Output, Program, Reduce, Stage, symbol
from slothc.gradients.reverse import inlined

from .lift_complex import COMPLEX, Pair
from .lift_forms import NotAffine, Split, extent, part, reshape, same
from .lift_scalars import SCALAR, number
from .view import GraphView

STORAGE = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
           torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool"}  # fmt: skip
MAX_LANES = 16


class CannotLift(Exception):
    """The region has no row program; ``node`` is where it shows. Its value may become an operand instead."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


class _Lane(Exception):
    """The lane must be another axis, or a new one of this size."""

    def __init__(self, axis: str | None, size: Size = 0) -> None:
        super().__init__(axis, size)
        self.axis, self.size = axis, size


class _Pairs(Exception):
    """This axis tells real from imaginary parts: it must be unrolled."""

    def __init__(self, axis: str) -> None:
        super().__init__(axis)
        self.axis = axis


@dataclass
class Space:
    """The iteration space: row axes, one lane axis, and the lanes' number unrolled into separate equations."""

    axes: dict[str, Size]
    index: list[Form]
    lane: str
    unrolled: dict[str, int] = field(default_factory=dict)
    fresh: int = 0

    def split(self, axis: str, inner: Size, blocked: bool) -> None:
        """axis = inner_size * outer + inner. Pieces of the lane are told apart by unrolling."""
        outer, low = f"{axis}o{self.fresh}", f"{axis}i{self.fresh}"
        self.fresh += 1
        size = self.axes[axis]
        count = size // inner if isinstance(size, int) and isinstance(inner, int) else sp.cancel(sp.sympify(size) / inner)
        names = list(self.axes)
        entries = {outer: count, low: inner}
        self.axes = {k: v for n in names for k, v in (entries.items() if n == axis else ((n, self.axes[n]),))}
        to = Form(((outer, inner),)) + Form.axis(low)
        self.index = [substitute(f, axis, to) for f in self.index]
        if axis == self.lane:
            if blocked:
                self._unroll(outer, count)
                self.lane = low
            elif isinstance(inner, int) and inner <= 4:
                self._unroll(low, inner)
                self.lane = outer
            else:
                self.lane = low

    def _unroll(self, axis: str, count: Size) -> None:
        total = count * prod(self.unrolled.values())
        if not isinstance(total, int) or total > MAX_LANES:
            raise NotAffine(f"the row falls into {total} pieces, more than {MAX_LANES}")
        self.unrolled[axis] = count

    def unroll_pairs(self, axis: str) -> None:
        """The axis of real and imaginary parts becomes two equations; where it was the lane, the axis before it is."""
        self._unroll(axis, 2)
        if axis == self.lane:
            self.lane = next((a for a in reversed(self.axes) if a not in self.unrolled), "")

    @property
    def rows(self) -> list[str]:
        return [a for a in self.axes if a != self.lane and a not in self.unrolled]

    def combinations(self) -> Iterator[dict[str, int]]:
        for values in product(*(range(n) for n in self.unrolled.values())):
            yield dict(zip(self.unrolled, values))


def substitute(form: Form, axis: str, to: Form | int) -> Form:
    """The form with ``axis`` replaced."""
    c = form.coefficient(axis)
    if c == 0:
        return form
    rest = Form(tuple(t for t in form.terms if t[0] != axis), form.const)
    return rest + (to * c)


@dataclass(frozen=True)
class Lifted:
    """A region's formula: the program, its space, and where each input is read and each output written.

    ``leaves``: the operands, in order. ``loads``: per program input. ``stores``: per program output, numbering ``results``.
    """

    program: Program
    axes: tuple[Axis, ...]
    lane: Axis
    leaves: tuple[fx.Node, ...]
    results: tuple[fx.Node, ...]
    loads: tuple[Access | None, ...]
    stores: tuple[Access, ...]
    sizes: tuple[tuple[str, Size], ...]


def lift(view: GraphView, region: set[fx.Node], results: Sequence[fx.Node]) -> Lifted:
    """The row program of ``region``, which computes ``results``. Raises ``CannotLift``."""
    space = _space(view, results[0])
    for _ in range(12):
        attempt = _Evaluation(view, region, space)
        try:
            return attempt.run(results)
        except Split as split:
            try:
                space.split(split.axis, split.inner, split.blocked)
            except NotAffine as error:
                raise CannotLift(attempt.at or results[0], str(error)) from None
        except _Pairs as pairs:
            space.unroll_pairs(pairs.axis)
        except _Lane as lane:
            if lane.axis is None:
                space.axes["lane"] = lane.size
            space.lane = lane.axis or "lane"
        except NotAffine as error:
            raise CannotLift(attempt.at or results[0], str(error)) from None
    raise CannotLift(results[0], "its axes split without end")


def _space(view: GraphView, node: fx.Node) -> Space:
    shape = shape_of(view, node)
    names = [f"r{d}" for d in range(len(shape))]
    return Space(dict(zip(names, shape)), [Form.axis(n) for n in names], names[-1] if names else "")


def shape_of(view: GraphView, node: fx.Node) -> tuple[Size, ...]:
    """The node's shape: ints, and sympy expressions where Dynamo made a size dynamic."""
    return tuple(size_of(s) for s in view.value(node).shape)


def size_of(s: Any) -> Size:
    """An int or the expression of a SymInt over positive integer symbols."""
    if isinstance(s, int):
        return s
    expr = s.node.expr
    if expr.is_Integer:
        return int(expr)
    return expr.xreplace({x: sp.Symbol(x.name, integer=True, positive=True) for x in expr.free_symbols})


class _Evaluation:
    """One evaluation of a region over a fixed space."""

    def __init__(self, view: GraphView, region: set[fx.Node], space: Space) -> None:
        self.view, self.region, self.space = view, region, space
        self.at: fx.Node | None = None
        self.memo: dict[tuple[fx.Node, tuple[Form, ...]], Any] = {}
        self.inputs: list[Input] = []
        self.loads: list[Access | None] = []
        self.leaves: list[fx.Node] = []
        self.stages: list[Stage] = []
        self.width: Size | None = None

    def run(self, results: Sequence[fx.Node]) -> Lifted:
        outputs: list[Output] = []
        stores: list[Access] = []
        space = self.space
        for number_, node in enumerate(results):
            shape = shape_of(self.view, node)
            if node is not results[0] and not (len(shape) == len(space.index) and all(map(same, shape, shape_of(self.view, results[0])))):
                raise CannotLift(node, "results of one region differ in shape")
            for combination in space.combinations():
                index = tuple(self._fix(f, combination) for f in space.index)
                value = self._stage(self.load(node, index), None, force=True)
                access = Access(number_, index)
                kind = Kind(bool(access.axes - {space.lane}), space.lane in access.axes)
                outputs.append(Output(f"y{len(outputs) or ''}", value.name, STORAGE[self.view.dtype(node)], kind=kind))
                stores.append(access)
        program = inlined(Program(tuple(self.inputs), tuple(self.stages), tuple(outputs)))
        kept = [k for k, i in enumerate(self.inputs) if i.name in program.input]
        sizes = (("D", self._lane_count()),) if "D" in program.input else ()
        axes = tuple(Axis(a, space.axes[a]) for a in space.rows)
        lane = Axis(space.lane, space.axes.get(space.lane, 1))
        return Lifted(program, axes, lane, tuple(self.leaves), tuple(results), tuple(self.loads[k] for k in kept), tuple(stores), sizes)

    @staticmethod
    def _fix(form: Form, combination: dict[str, int]) -> Form:
        for axis, value in combination.items():
            form = substitute(form, axis, Form.of(value))
        return form

    def _lane_count(self) -> Size:
        return self.space.axes[self.space.lane] * prod(self.space.unrolled.values())

    # stages

    def _stage(self, expr: sp.Expr | Reduce, dtype: str | None, force: bool = False, detached: bool = False) -> sp.Symbol:
        if isinstance(expr, sp.Expr) and expr.is_Symbol and dtype is None and not (force and expr.name in {i.name for i in self.inputs}):
            return expr
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
                self.at = node
                handler = getattr(self, f"_{self.view.op(node).kind}", None)
                if handler is None:
                    raise CannotLift(node, f"{self.view.op(node).kind} has no scalar formula")
                self.memo[key] = handler(node, self.view.op(node), index)
        return self.memo[key]

    def _broadcast(self, arg: Any, index: tuple[Form, ...]) -> sp.Expr:
        """An argument of a pointwise node, aligned on the right; dimensions of size 1 are read at 0."""
        if not isinstance(arg, fx.Node):
            return number(arg)
        if not isinstance(self.view.example(arg), torch.Tensor):
            raise CannotLift(arg, "a number known only at run time takes part in the arithmetic")
        shape = shape_of(self.view, arg)
        index = index[len(index) - len(shape) :]
        return self.load(arg, tuple(f if s != 1 or self._single(f) else Form() for f, s in zip(index, shape)))

    def _single(self, form: Form) -> bool:
        """Whether the form is the whole of axes that have size 1 here: such a dimension is an axis, not a broadcast."""
        return bool(form.terms) and all(self.space.axes[a] == 1 for a in form.axes)

    def _leaf(self, node: fx.Node, index: tuple[Form, ...]) -> sp.Expr | Pair:
        value = self.view.example(node)
        if not isinstance(value, torch.Tensor):
            raise CannotLift(node, "a number known only at run time takes part in the arithmetic")
        if value.dtype == torch.complex64 and not self.view.needs_grad(node):
            return Pair(*(self._real_leaf(node, (*index, Form.of(k)), torch.float32) for k in range(2)))
        return self._real_leaf(node, index, value.dtype)

    def _real_leaf(self, node: fx.Node, index: tuple[Form, ...], dtype: torch.dtype) -> sp.Expr:
        if dtype not in STORAGE:
            raise CannotLift(node, f"its dtype is {str(dtype).removeprefix('torch.')}")
        tensor = self._operand(node, index)
        access = Access(tensor, index)
        kind = Kind(bool(access.axes - {self.space.lane}), self.space.lane in access.axes)
        stem = {(True, True): "x", (False, True): "w", (True, False): "s", (False, False): "c"}[kind.rows, kind.lanes]
        count = sum(i.name.rstrip("0123456789") == stem for i in self.inputs)
        grad = self.view.needs_grad(node) and dtype.is_floating_point
        self.inputs.append(Input(f"{stem}{count or ''}", kind, STORAGE[dtype], differentiable=grad))
        self.loads.append(access)
        return symbol(self.inputs[-1].name)

    def _operand(self, node: fx.Node, index: tuple[Form, ...]) -> int:
        """The operand's number; a differentiable tensor read through two maps that may meet counts as two operands."""
        for number_, leaf in enumerate(self.leaves):
            others = [a for a in self.loads if a and a.tensor == number_]
            if leaf is node and (not self.view.needs_grad(node) or all(self._disjoint(a.index, index) for a in others)):
                return number_
        self.leaves.append(node)
        return len(self.leaves) - 1

    def _disjoint(self, a: tuple[Form, ...], b: tuple[Form, ...]) -> bool:
        """Two maps with the same axes and steps whose constants differ by no multiple of a lane step within the row."""
        if any(f.terms != g.terms for f, g in zip(a, b)):
            return False
        lane, size = self.space.lane, self.space.axes[self.space.lane]
        for f, g in zip(a, b):
            if f.const != g.const:
                gap, step = abs(f.const - g.const), f.coefficient(lane)
                below_next = all(gap < c for n, c in f.terms if n != lane)
                if step == 0:
                    return below_next
                return below_next and isinstance(gap, int) and (gap % step != 0 or gap // step >= size)
        return False

    # pointwise

    def _pointwise(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        fn = op.params["fn"]
        if fn not in SCALAR:
            raise CannotLift(node, f"{fn} has no scalar formula")
        dtype = self.view.dtype(node)
        if not (dtype.is_floating_point or dtype.is_complex) and fn not in ("gt", "ge", "lt", "le", "eq", "ne", "and", "or", "not"):
            raise CannotLift(node, "integer arithmetic")
        args = [None if a is None else self._broadcast(a, index) for a in op.args]
        if any(isinstance(a, Pair) for a in args):
            if fn not in COMPLEX:
                raise CannotLift(node, f"{fn} of complex numbers")
            value = COMPLEX[fn](Pair.of(args[0]), *args[1:])
            return Pair(self._stage(value.re, None), self._stage(value.im, None))
        return self._round(SCALAR[fn](*args), node)

    def _complex(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr | Pair:
        fn, source = op.params["fn"], op.args[0]
        if fn == "view_as_complex":
            return Pair(*(self.load(source, (*index, Form.of(k))) for k in range(2)))
        if fn in ("real", "imag"):
            value = Pair.of(self.load(source, index))
            return value.re if fn == "real" else value.im
        if fn != "view_as_real":
            raise CannotLift(node, f"{fn} has no scalar formula")
        part_ = index[-1]
        if part_.terms:
            raise Split(part_.terms[0][0], self.space.axes[part_.terms[0][0]]) if len(part_.terms) > 1 else _Pairs(part_.terms[0][0])
        value = Pair.of(self.load(source, index[:-1]))
        return value.im if part_.const else value.re

    def _cast(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        if self.view.dtype(node) not in (torch.float32, torch.bfloat16, torch.float16):
            raise CannotLift(node, f"a cast to {str(self.view.dtype(node)).removeprefix('torch.')}")
        return self._round(self.load(op.args[0], index), node)

    def _identity(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        return self._broadcast(op.args[0], index)

    # views

    def _reshape(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        source = op.args[0]
        return self.load(source, reshape(index, shape_of(self.view, node), shape_of(self.view, source), self.space.axes))

    def _permute(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        back: list[Form] = [Form()] * len(index)
        for out, dim in enumerate(op.params["dims"]):
            back[dim] = index[out]
        return self.load(op.args[0], tuple(back))

    def _expand(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        return self._broadcast(op.args[0], index)

    def _index(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        shape = shape_of(self.view, op.args[0])
        back: list[Form] = []
        out = iter(index)
        for item in op.params["items"]:
            if item is None:
                next(out)
            elif isinstance(item, slice):
                start, step = item.start or 0, item.step or 1
                if not isinstance(start, int) or not isinstance(step, int) or step < 1:
                    raise CannotLift(node, "a slice whose bounds are known only at run time")
                if start < 0:
                    size = shape[len(back)]
                    start = max(0, start + size) if isinstance(size, int) else start + size
                back.append(next(out) * step + start)
            else:
                back.append(Form.of(item if item >= 0 else shape[len(back)] + item))
        back += list(out)
        return self.load(op.args[0], tuple(back))

    def _cat(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        dim = op.params["dim"]
        widths = [shape_of(self.view, a)[dim] for a in op.args]
        which, inside = part(index[dim], widths, self.space.axes, self.space.lane)
        return self.load(op.args[which], (*index[:dim], inside, *index[dim + 1 :]))

    def _stack(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        dim = op.params["dim"]
        which, _ = part(index[dim], [1] * len(op.args), self.space.axes, self.space.lane)
        return self.load(op.args[which], (*index[:dim], *index[dim + 1 :]))

    def _item(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        source = op.args[0]
        split = self.view.op(source)
        if split.kind != "split" or source not in self.region:
            raise CannotLift(node, "one value of a tuple")
        dim, which = split.params["dim"], op.params["number"]
        if split.params.get("sizes") is None:                              # unbind
            return self.load(split.args[0], (*index[:dim], Form.of(which), *index[dim:]))
        start = sum(split.params["sizes"][:which])
        return self.load(split.args[0], (*index[:dim], index[dim] + start, *index[dim + 1 :]))

    # reductions over the last dimension

    def _over_lanes(self, source: fx.Node, prefix: tuple[Form, ...], node: fx.Node) -> list[sp.Expr]:
        """The value at every unrolled lane of one row of ``source``."""
        size, space = shape_of(self.view, source)[-1], self.space
        if any(space.lane in f.axes for f in prefix) or space.lane not in space.axes or (size != 1 and space.axes[space.lane] == 1):
            used = {a for f in prefix for a in f.axes}
            free = [a for a, n in space.axes.items() if a not in used and a != space.lane and same(n, size)]
            raise _Lane(free[0] if free else None, size)
        if not same(self._lane_count(), size):
            raise CannotLift(node, f"it reduces over {size} elements where the row has {self._lane_count()}")
        row = next((f for f in self.space.index if self.space.lane in f.axes), Form.axis(space.lane))
        row = Form(tuple(t for t in row.terms if t[0] == space.lane or t[0] in space.unrolled), row.const)
        return [self.load(source, (*prefix, self._fix(row, c))) for c in space.combinations()]

    def _reduced(self, op_name: str, values: list[sp.Expr]) -> sp.Expr:
        if op_name == "sum":
            return self._stage(Reduce("sum", sp.Add(*values)), None)
        parts = [self._stage(Reduce(op_name, v), None) for v in values]
        total = parts[0]
        for p in parts[1:]:
            total = SCALAR["maximum"](total, p) if op_name == "max" else total + SCALAR["softplus"](p - total)
        return total if total.is_Symbol else self._stage(total, None)

    def _size(self) -> sp.Symbol:
        if not any(i.name == "D" for i in self.inputs):
            self.inputs.append(Input("D", CONST, "fp32", differentiable=False, role="size"))
            self.loads.append(None)
        return symbol("D")

    def _mean(self, values: list[sp.Expr]) -> sp.Expr:
        return self._stage(self._reduced("sum", values) / self._size(), None)

    def _variance(self, values: list[sp.Expr], mean: sp.Expr, correction: float = 0) -> sp.Expr:
        squares = [self._stage(v - mean, None) ** 2 for v in values]
        return self._stage(self._reduced("sum", squares) / (self._size() - number(correction)), None)

    def _reduce(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        source, fn = op.args[0], op.params["fn"]
        rank = len(shape_of(self.view, source))
        if tuple(op.params["dims"]) != (rank - 1,):
            raise CannotLift(node, f"it reduces over dimensions {tuple(op.params['dims'])}, not the last")
        prefix = index[:-1] if op.params["keepdim"] else index
        if fn not in ("sum", "mean", "amax", "amin", "var", "std", "norm", "logsumexp"):
            raise CannotLift(node, f"the reduction {fn} has no formula")
        if not self.view.dtype(source).is_floating_point:
            raise CannotLift(node, "a reduction of integers")
        values = self._over_lanes(source, prefix, node)
        correction = op.params.get("correction", 1)
        table = {
            "sum": lambda: self._reduced("sum", values),
            "mean": lambda: self._mean(values),
            "amax": lambda: self._reduced("max", values),
            "amin": lambda: -self._reduced("max", [-v for v in values]),
            "var": lambda: self._variance(values, self._mean(values), correction),
            "std": lambda: self._variance(values, self._mean(values), correction) ** sp.Rational(1, 2),
            "norm": lambda: self._reduced("sum", [v**2 for v in values]) ** sp.Rational(1, 2),
            "logsumexp": lambda: self._reduced("logsumexp", values),
        }
        return self._round(table[fn](), node)

    def _softmax(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        source = op.args[0]
        if op.params["dim"] != len(index) - 1:
            raise CannotLift(node, f"a softmax over dimension {op.params['dim']}, not the last")
        values = self._over_lanes(source, index[:-1], node)
        tops = [self._stage(Reduce("max", v), None, detached=True) for v in values]
        top = tops[0] if len(tops) == 1 else self._stage(reduce(SCALAR["maximum"], tops), None, detached=True)
        total = self._reduced("sum", [sp.exp(v - top) for v in values])
        shifted = self.load(source, index) - top                              # softmax(x) = softmax(x - c) for every c
        value = shifted - sp.log(total) if op.params["fn"] == "log_softmax" else sp.exp(shifted) / total
        return self._round(value, node)

    def _norm(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        source, weight, bias = op.args
        if len(op.params["shape"]) != 1:
            raise CannotLift(node, f"it normalises {len(op.params['shape'])} dimensions, not the last")
        values = self._over_lanes(source, index[:-1], node)
        x, eps = self.load(source, index), op.params["eps"]
        eps = number(torch.finfo(self.view.dtype(source)).eps if eps is None else eps)
        if op.params["fn"] == "layer_norm":
            mean = self._mean(values)
            scale = self._stage((self._variance(values, mean) + eps) ** sp.Rational(-1, 2), None)
            y = self._stage(x - mean, None) * scale
        else:
            scale = self._stage((self._mean([v**2 for v in values]) + eps) ** sp.Rational(-1, 2), None)
            y = x * scale
        y = y if weight is None else y * self.load(weight, index[-1:])
        y = y if bias is None else y + self.load(bias, index[-1:])
        return self._round(y, node)


__all__ = ["CannotLift", "Lifted", "extent", "lift", "shape_of"]
