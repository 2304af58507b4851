"""Sizes of a graph's values: ints, and sympy expressions where Dynamo made them dynamic."""

from __future__ import annotations

from typing import Any

import sympy as sp
from torch import fx

from slothc.gradients.geometry import Size

from .view import GraphView


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
