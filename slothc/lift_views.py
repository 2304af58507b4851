"""Views as index arithmetic: the element of the source that an element of the result is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import sympy as sp
from torch import fx

from slothc.gradients.geometry import Form

from .lift_forms import part, reshape
from .lift_loader import CannotLift, Loader
from .sizes import shape_of


class Views(Loader):
    """Handlers of operations that move elements and compute none."""

    _reduce: Callable[..., sp.Expr]

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
        if split.kind == "moments" and source in self.region:
            return self._reduce(node, replace(split, kind="reduce", params=split.params["items"][op.params["number"]]), index)
        if split.kind != "split" or source not in self.region:
            raise CannotLift(node, "one value of a tuple")
        dim, which = split.params["dim"], op.params["number"]
        if split.params.get("sizes") is None:                              # unbind
            return self.load(split.args[0], (*index[:dim], Form.of(which), *index[dim:]))
        start = sum(split.params["sizes"][:which])
        return self.load(split.args[0], (*index[:dim], index[dim] + start, *index[dim + 1 :]))
