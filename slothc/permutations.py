"""Integers that are a permutation of 0 .. n-1: what is looked up by them is read once, and its gradient is moved, not summed.

The tokens of a mixture of experts are sorted by expert and put back by the inverse.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from .lift_forms import same
from .sizes import shape_of
from .view import GraphView

_MOVED = ("identity", "reshape", "permute")               # the same numbers at other places
_WIDE = (torch.int32, torch.int64)                        # no length is too large for them


def is_permutation(view: GraphView, node: fx.Node) -> bool:
    """Whether the tensor of n integers holds each number below n once, by how it is made: an order that sorts a vector, or its inverse."""
    passed: list[fx.Node] = []
    while view.op(node).kind in _MOVED or (view.op(node).kind == "cast" and view.dtype(node) in _WIDE):
        passed.append(node)
        node = view.op(node).args[0]
    value = view.example(node)
    if not isinstance(value, torch.Tensor) or value.dtype not in _WIDE or value.dim() != 1:
        return False
    written = [n for n in (*passed, node) if view.mutated(n)]
    return _inverse(view, node, written) if written else _order(node)


def _order(node: fx.Node) -> bool:
    """The indices of a sort of a vector."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return bool(node.args[1] == 1) and _calls(node.args[0], "sort")
    return _calls(node, "argsort") or _calls(node, "randperm")


def _inverse(view: GraphView, node: fx.Node, written: list[fx.Node]) -> bool:
    """``x[p] = arange(n)`` for a permutation p, as all that is ever written to x, before it is read; ``written`` must be x's memory."""
    members = next((m for m in view.memories() if node in m), [])
    writes = [m for m in members if view.writes(m)]
    if len(writes) != 1 or writes[0].target is not operator.setitem or any(n not in members for n in written):
        return False
    into, key, value = writes[0].args
    early = [u for m in members if m is not writes[0] for u in m.users if view.order[u] < view.order[writes[0]]]
    key = key[0] if isinstance(key, tuple) and len(key) == 1 else key
    if into is not node or early or not isinstance(key, fx.Node) or not isinstance(value, fx.Node):
        return False
    return _alike(view, key, node) and _alike(view, value, node) and _counts(value) and is_permutation(view, key)


def _alike(view: GraphView, a: fx.Node, b: fx.Node) -> bool:
    """Whether both are vectors of wide integers and of one length."""
    shapes = [shape_of(view, n) for n in (a, b)]
    return all(len(s) == 1 for s in shapes) and same(shapes[0][0], shapes[1][0]) and {view.dtype(a), view.dtype(b)} <= set(_WIDE)


def _counts(value: fx.Node) -> bool:
    """Whether the value is 0, 1, 2 and so on."""
    ends: tuple[Any, ...] = value.args
    steps = len(ends) == 1 or (len(ends) == 2 and ends[0] == 0) or (len(ends) == 3 and ends[0] == 0 and ends[2] == 1)
    return _calls(value, "arange") and steps and not {"start", "end", "step"} & value.kwargs.keys()


def _calls(node: fx.Node, name: str) -> bool:
    """Whether the node calls torch's function of this name: another library's may mean something else by it."""
    if node.op == "call_method":
        return node.target == name
    target = node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target
    return node.op == "call_function" and target in (getattr(torch, name), getattr(torch.ops.aten, name))
