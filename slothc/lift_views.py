"""Views as index arithmetic: the element of the source that an element of the result is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sympy as sp
from torch import fx

from slothc.gradients.geometry import Form

from .lift_forms import divmod_form, part, reshape
from .lift_loader import CannotLift, Loader
from .lift_scalars import number
from .sizes import shape_of


class Views(Loader):
    """Handlers of operations that move elements and compute none."""

    _reduce: Callable[..., sp.Expr]

    def _reshape(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        source = op.args[0]
        return self.load(source, reshape(index, shape_of(self.view, node), shape_of(self.view, source), self.sizes))

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
        which, inside = part(index[dim], widths, self.sizes, self.space.lane)
        return self.load(op.args[which], (*index[:dim], inside, *index[dim + 1 :]))

    def _stack(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        dim = op.params["dim"]
        which, _ = part(index[dim], [1] * len(op.args), self.sizes, self.space.lane)
        return self.load(op.args[which], (*index[:dim], *index[dim + 1 :]))

    def _pad(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        back: list[Form] = []
        for form, size, (low, high) in zip(index, shape_of(self.view, op.args[0]), op.params["pads"]):
            before = Form.of(max(0, -low))                                 # a negative width cuts
            widths = (max(0, low), size + min(0, low) + min(0, high), max(0, high))
            which, inside = part(form, widths, self.sizes, self.space.lane) if low > 0 or high > 0 else (1, form)
            if which != 1:
                return number(op.params["value"])
            back.append(inside + before)
        return self.load(op.args[0], tuple(back))

    def _write(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        """The value where the element is in the part that is written, what was there before elsewhere."""
        (x, value), inner = op.args, list[Form]()
        forms = iter(zip(index, shape_of(self.view, x)))
        for item in op.params["items"]:
            if item is None:
                inner.append(Form())
                continue
            form, size = next(forms)
            which, inside = 1, form
            if item != slice(None):
                start, stop = (item.start or 0, item.stop) if isinstance(item, slice) else (item, item + 1)
                stop = size if stop is None else stop
                which, inside = part(form, (start, stop - start, size - stop), self.sizes, self.space.lane)
            if which != 1:
                return self.load(x, index)
            if isinstance(item, slice):
                inner.append(inside)
        return self._round(self._broadcast(value, tuple(inner)), node)

    def _empty(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        raise CannotLift(node, "memory without a value")

    def _full(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        return number(op.params["value"])

    def _repeat_interleave(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        dim = op.params["dim"]
        which, _ = divmod_form(index[dim], op.params["repeats"], self.sizes)
        return self.load(op.args[0], (*index[:dim], which, *index[dim + 1 :]))

    def _repeat(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        shape = shape_of(self.view, op.args[0])
        own = index[len(index) - len(shape) :]
        counts = op.params["repeats"][len(index) - len(shape) :]
        back = (f if n == 1 else divmod_form(f, size, self.sizes)[1] for f, size, n in zip(own, shape, counts))
        return self.load(op.args[0], tuple(back))

    def _gather(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        (x, table), dim = op.args, op.params["dim"]
        if op.params.get("along"):
            row = self._looked_up(node, table, index, shape_of(self.view, x)[dim], along=True)
            return self.load(x, (*index[:dim], row, *index[dim + 1 :]))
        rank = len(shape_of(self.view, table))
        row = self._looked_up(node, table, index[dim : dim + rank], shape_of(self.view, x)[dim], signed=op.params["signed"])
        return self.load(x, (*index[:dim], row, *index[dim + rank :]))

    def _embedding(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        table, weight = op.args
        row = self._looked_up(node, table, index[:-1], shape_of(self.view, weight)[0], op.params["padding_idx"])
        return self.load(weight, (row, index[-1]))

    def _item(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        source = op.args[0]
        split = self.view.op(source)
        if split.kind == "moments" and source in self.region:
            return self._reduce(node, replace(split, kind="reduce", params=split.params["items"][op.params["number"]]), index)
        if split.kind != "split" or source not in self.region:
            raise CannotLift(node, "one value of a tuple")
        dim, which = split.params["dim"], op.params["number"]
        if split.params.get("sizes") is None:                              # unbind
            return self.load(split.args[0], (*index[:dim], Form.of(which), *index[dim:]))
        start = sum(split.params["sizes"][:which])
        return self.load(split.args[0], (*index[:dim], index[dim] + start, *index[dim + 1 :]))
