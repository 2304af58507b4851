"""Functions that read several elements for one: gated halves, rolls, sums of products by letters."""

from __future__ import annotations

from typing import Any

import sympy as sp
from torch import fx

from slothc.gradients.geometry import Form

from .lift_forms import part
from .lift_reductions import Reductions
from .lift_scalars import SCALAR
from .sizes import shape_of


class Composite(Reductions):
    """Handlers of functions that are several operations in one."""

    def _glu(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        source, dim = op.args[0], op.params["dim"]
        moved = (*index[:dim], index[dim] + shape_of(self.view, node)[dim], *index[dim + 1 :])
        return self._round(self.load(source, index) * SCALAR["sigmoid"](self.load(source, moved)), node)

    def _roll(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        """The last ``shift`` elements come first."""
        source, dim = op.args[0], op.params["dim"]
        size = shape_of(self.view, source)[dim]
        shift = op.params["shift"] % size
        which, inside = part(index[dim], (shift, size - shift), self.sizes, self.space.lane)
        inside = inside + (size - shift if which == 0 else 0)
        return self.load(source, (*index[:dim], inside, *index[dim + 1 :]))

    def _einsum(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        place, summed = dict(zip(op.params["out"], index)), op.params["summed"]
        if not summed:
            return self._round(self._product(op, place), node)
        if op.params["count"]:
            terms = [self._product(op, {**place, summed: Form.of(k)}) for k in range(op.params["count"])]
            return self._round(sp.Add(*terms), node)
        widest, letters = max(zip(op.args, op.params["terms"]), key=lambda pair: len(pair[1]))
        size = shape_of(self.view, widest)[letters.index(summed)]
        values = [self._product(op, {**place, summed: at}) for at in self._lanes(size, index, node)]
        return self._round(self._reduced("sum", values), node)

    def _product(self, op: Any, place: dict[str, Form]) -> sp.Expr:
        return sp.Mul(*(self._broadcast(t, tuple(place[c] for c in term)) for t, term in zip(op.args, op.params["terms"])))
