"""Reductions over the last dimension: sums, softmax, norms."""

from __future__ import annotations

from functools import reduce
from itertools import product
from math import prod
from typing import Any

import sympy as sp
import torch
from torch import fx

from slothc.gradients.geometry import Form, Size
from slothc.gradients.program import CONST, Input, Reduce, symbol

from .lift_forms import same
from .lift_loader import CannotLift, Loader, OtherRow
from .lift_scalars import SCALAR, number
from .lift_space import MAX_LANES, OtherLane, fixed
from .sizes import shape_of

APART = 64            # elements of a row that are no neighbours in memory: as many as a kernel's rows, which share what they load


class Reductions(Loader):
    """Handlers of operations that combine the lanes of a row."""

    def _over_lanes(self, source: fx.Node, prefix: tuple[Form, ...], node: fx.Node, dim: int = -1) -> list[sp.Expr]:
        """The value at every unrolled lane of one row of ``source``, which runs along ``dim``; ``prefix``: the index of the others."""
        dim %= len(shape_of(self.view, source))
        lanes = self._lanes(shape_of(self.view, source)[dim], prefix, node)
        return [self.load(source, (*prefix[:dim], at, *prefix[dim:])) for at in lanes]

    def _lanes(self, size: Size, prefix: tuple[Form, ...], node: fx.Node) -> list[Form]:
        """The positions of a row of ``size`` elements at every unrolled lane."""
        space = self.space
        if any(space.lane in f.axes for f in prefix) or space.lane not in space.axes or (size != 1 and space.axes[space.lane] == 1):
            used = {a for f in prefix for a in f.axes}
            free = [a for a, n in space.axes.items() if a not in used and a != space.lane and same(n, size)]
            raise OtherLane(free[0] if free else None, size)
        if not same(space.lane_count(), size):
            raise OtherRow(node, f"it reduces over {size} elements where the row has {space.lane_count()}")
        row = next((f for f in self.space.index if self.space.lane in f.axes), Form.axis(space.lane))
        row = Form(tuple(t for t in row.terms if t[0] == space.lane or t[0] in space.unrolled), row.const)
        return [fixed(row, c) for c in space.lanes()]

    def _near(self, source: fx.Node, dim: int, prefix: tuple[Form, ...]) -> bool:
        """Whether the elements along ``dim`` are neighbours in memory, as in a moved last dimension, and an axis runs along them."""
        size, used = shape_of(self.view, source)[dim], {a for f in prefix for a in f.axes}
        free = (a for a, n in self.space.axes.items() if a not in used and same(n, size))
        return self.view.value(source).stride(dim) == 1 and (not isinstance(size, int) or size > MAX_LANES) and any(free)

    def _apart(self, source: fx.Node, dim: int) -> bool:
        """Whether the elements along ``dim`` are too many for a load each, and few enough for a row whose elements lie apart."""
        size = shape_of(self.view, source)[dim]
        return isinstance(size, int) and MAX_LANES < size <= APART

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
        dim = op.params["dims"][0] if len(op.params["dims"]) == 1 else rank
        prefix = index if not op.params["keepdim"] else (*index[:dim], *index[dim + 1 :])
        if dim != rank - 1 and (dim == rank or not (self._near(source, dim, prefix) or self._apart(source, dim))):
            return self._few(node, op, index)
        if fn not in ("sum", "mean", "amax", "amin", "var", "std", "norm", "logsumexp"):
            raise CannotLift(node, f"the reduction {fn} has no formula")
        if not self.view.dtype(source).is_floating_point:
            raise CannotLift(node, "a reduction of integers")
        values = self._over_lanes(source, prefix, node, dim)
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

    def _few(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        """A reduction over few elements of other dimensions than the last, one load for each."""
        source, fn, dims = op.args[0], op.params["fn"], tuple(op.params["dims"])
        shape = shape_of(self.view, source)
        sizes = [shape[d] for d in dims]
        if not all(isinstance(n, int) for n in sizes) or not 0 < prod(sizes) <= MAX_LANES or fn not in ("sum", "mean"):
            raise CannotLift(node, f"it reduces over dimensions {dims}, not the last")
        if not self.view.dtype(source).is_floating_point:
            raise CannotLift(node, "a reduction of integers")
        kept = iter(index if not op.params["keepdim"] else [f for d, f in enumerate(index) if d not in dims])
        rest = [Form.of(0) if d in dims else next(kept) for d in range(len(shape))]
        values = []
        for place in product(*map(range, sizes)):
            at = dict(zip(dims, map(Form.of, place)))
            values.append(self.load(source, tuple(at.get(d, f) for d, f in enumerate(rest))))
        total = values[0]
        for value in values[1:]:
            total = self._stage(total + value, None)
        return self._round(total / len(values) if fn == "mean" else total, node)

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
        eps = self._broadcast(torch.finfo(self.view.dtype(source)).eps if eps is None else eps, ())
        if op.params["fn"] == "layer_norm":
            mean = self._mean(values)
            scale = self._stage((self._variance(values, mean) + eps) ** sp.Rational(-1, 2), None)
            y = self._stage(x - mean, None) * scale
        elif op.params["fn"] == "normalize":
            length = self._stage(self._reduced("sum", [v**2 for v in values]) ** sp.Rational(1, 2), None)
            y = x / self._stage(SCALAR["maximum"](length, eps), None)
        else:
            scale = self._stage((self._mean([v**2 for v in values]) + eps) ** sp.Rational(-1, 2), None)
            y = x * scale
        y = y if weight is None else y * self.load(weight, index[-1:])
        y = y if bias is None else y + self.load(bias, index[-1:])
        return self._round(y, node)
