"""Integers that are a permutation of 0 .. n-1: what is looked up by them is read once, and its gradient is moved, not summed.

The tokens of a mixture of experts are sorted by expert and put back by the inverse.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from .lift_forms import same
from .sizes import shape_of
from .spellings import target_name
from .view import GraphView

_MOVED = ("identity", "reshape", "permute")               # the same numbers at other places


def is_permutation(view: GraphView, node: fx.Node) -> bool:
    """Whether the tensor of n integers holds each number below n once, by how it is made: an order that sorts a vector, or its inverse."""
    while view.op(node).kind in _MOVED or (view.op(node).kind == "cast" and view.dtype(node) in (torch.int32, torch.int64)):
        node = view.op(node).args[0]
    if not isinstance(view.example(node), torch.Tensor) or len(shape_of(view, node)) != 1:
        return False
    return _inverse(view, node) if view.mutated(node) else _order(view, node)


def _order(view: GraphView, node: fx.Node) -> bool:
    """The indices of a sort of a vector."""
    if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        return bool(node.args[1] == 1) and _name(node.args[0]) == "sort"
    return _name(node) in ("argsort", "randperm")


def _inverse(view: GraphView, node: fx.Node) -> bool:
    """``x[p] = arange(n)`` for a permutation p, as all that is ever written to x, before it is read."""
    members = next((m for m in view.memories() if node in m), [])
    writes = [m for m in members if view.writes(m)]
    if len(writes) != 1 or writes[0].target is not operator.setitem:
        return False
    into, key, value = writes[0].args
    early = [u for m in members if m is not writes[0] for u in m.users if view.order[u] < view.order[writes[0]]]
    key = key[0] if isinstance(key, tuple) and len(key) == 1 else key
    if into is not node or early or not isinstance(key, fx.Node) or not isinstance(value, fx.Node):
        return False
    return _alike(view, key, node) and _alike(view, value, node) and _counts(value) and is_permutation(view, key)


def _alike(view: GraphView, a: fx.Node, b: fx.Node) -> bool:
    shapes = [shape_of(view, n) for n in (a, b)]
    return len(shapes[0]) == len(shapes[1]) and all(same(s, t) for s, t in zip(*shapes))


def _counts(value: fx.Node) -> bool:
    """Whether the value is 0, 1, 2 and so on."""
    ends: tuple[Any, ...] = value.args
    steps = len(ends) == 1 or (len(ends) == 2 and ends[0] == 0) or (len(ends) == 3 and ends[0] == 0 and ends[2] == 1)
    return _name(value) == "arange" and steps and not {"start", "end", "step"} & value.kwargs.keys()


def _name(node: fx.Node) -> str:
    return target_name(node).rpartition(".")[2] if node.op.startswith("call") else ""
