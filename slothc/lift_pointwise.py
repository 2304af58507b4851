"""Pointwise operations, casts and complex numbers as scalar expressions."""

from __future__ import annotations

from typing import Any

import sympy as sp
import torch
from torch import fx

from slothc.gradients.geometry import Form

from .lift_complex import COMPLEX, Pair
from .lift_forms import Split
from .lift_loader import CannotLift, Loader
from .lift_scalars import SCALAR
from .lift_space import TellsParts

COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne", "and", "or", "not")


class Pointwise(Loader):
    """Handlers of operations that compute each element from the elements at its place."""

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
            raise Split(part_.terms[0][0], self.space.axes[part_.terms[0][0]]) if len(part_.terms) > 1 else TellsParts(part_.terms[0][0])
        value = Pair.of(self.load(source, index[:-1]))
        return value.im if part_.const else value.re

    def _cast(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        if self.view.dtype(node) not in (torch.float32, torch.bfloat16, torch.float16):
            raise CannotLift(node, f"a cast to {str(self.view.dtype(node)).removeprefix('torch.')}")
        return self._round(self.load(op.args[0], index), node)

    def _identity(self, node: fx.Node, op: Any, index: tuple[Form, ...]) -> sp.Expr:
        return self._broadcast(op.args[0], index)
