"""Which nodes to lift together: the fan-in of a value that nothing else reads.

A cone is a value with every liftable node whose only readers are inside the cone. It has one result, it is convex by construction, and
it does not depend on how the model spells anything. A value that has other readers stays an operand, unless a cheap producer (a residual
add) can be computed in the same kernel and written once for all readers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from .narrowed import NARROWED
from .view import GraphView

ARITHMETIC = {
    "pointwise", "reduce", "norm", "softmax", "cast", "complex", "glu", "roll", "einsum", "cat", "stack", "pad", "write", "gather",
    "embedding", "repeat", "repeat_interleave",
}  # fmt: skip
LARGEST = 128                     # nodes of a cone: a longer chain is cut, its value an operand
JOINS = {"cat", "stack", "pad", "write"}
VIEWS = {"identity", "reshape", "permute", "expand", "index", "split", "item", "moments"}
FILLED = {"full", "empty"}              # values that nothing is read for: part of a cone, never all of it
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Cone:
    """Nodes to lift together; ``results`` are the values that others read, the last one made first."""

    nodes: frozenset[fx.Node]
    results: tuple[fx.Node, ...]

    @property
    def sink(self) -> fx.Node:
        return self.results[0]


class Growth:
    """Grows cones in one graph; ``taken`` nodes belong to structural rules or to cones that were claimed."""

    def __init__(self, view: GraphView, taken: set[fx.Node] | None = None) -> None:
        self.view, self.taken = view, set(taken or ())
        self.order = view.order
        self.barred: set[fx.Node] = set()
        self.writes = [self.order[n] for n in view.nodes if view.op(n).params.get("mutates") or view.writes(n)]

    def liftable(self, node: fx.Node) -> bool:
        """Whether the node may be part of a cone."""
        view = self.view
        if node in self.taken or not view.alive(node) or node.op in ("placeholder", "output", "get_attr") or NARROWED in node.meta:
            return False
        kind = view.op(node).kind
        if kind not in ARITHMETIC | VIEWS | FILLED or view.mutated(node):
            return False
        value = view.example(node)
        if kind in ("split", "moments"):
            return all(isinstance(v, torch.Tensor) for v in value)
        if not isinstance(value, torch.Tensor):
            return False
        number = kind == "full" and not value.dim()                        # of any width: it does not decide the result's
        return number or value.dtype in FLOATS or value.dtype == torch.bool or value.dtype.is_complex

    def cones(self) -> Iterator[Cone]:
        """Every cone, last value first. ``barred`` nodes, set while iterating, are no longer taken in."""
        for node in reversed(self.view.nodes):
            op = self.view.op(node)
            ends = op.kind in ARITHMETIC or op.params.get("clone")
            if ends and self.liftable(node) and op.kind != "split" and self.view.dtype(node) in FLOATS:
                yield self.grow(node)

    def grow(self, sink: fx.Node) -> Cone:
        """The cone of ``sink`` over the nodes that are free."""
        cone, mode = {sink}, self.view.grad_enabled(sink)
        waiting = set(sink.all_input_nodes)
        while waiting:
            node = max(waiting, key=self.order.__getitem__)
            waiting.remove(node)
            inside = all(u in cone for u in self.view.users(node))
            free = node not in self.barred and self.view.grad_enabled(node) == mode and self.liftable(node)
            if inside and free and len(cone) < LARGEST and self.steady(node, sink) and self._beside(node, sink):
                cone.add(node)
                waiting.update(n for n in node.all_input_nodes if n not in cone)
        return Cone(frozenset(cone), (sink,))

    def _beside(self, node: fx.Node, sink: fx.Node) -> bool:
        """Whether both are on one device, or the node is a number: what is computed on the CPU for a tensor that is not stays there."""
        values = [v[0] if isinstance(v, tuple | list) else v for v in map(self.view.example, (node, sink))]
        return values[0].device == values[1].device or (self.view.op(node).kind == "full" and not values[0].dim())

    def steady(self, node: fx.Node, place: fx.Node) -> bool:
        """Whether what ``node`` reads is the same where ``place`` stands: nothing it reads is written to in place in between."""
        if not any(map(self.view.mutated, node.all_input_nodes)):
            return True
        first, last = sorted((self.order[node], self.order[place]))
        return not any(first < w < last for w in self.writes)

    def claim(self, cone: Cone) -> None:
        self.taken |= cone.nodes


def behind(sink: fx.Node, within: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """``sink`` and the nodes that it depends on by way of nodes that are ``within``."""
    found, waiting = {sink}, [sink]
    while waiting:
        for n in waiting.pop().all_input_nodes:
            if n not in found and within(n):
                found.add(n)
                waiting.append(n)
    return found


def leaves(cone: Cone) -> list[fx.Node]:
    """The values a cone reads, in a settled order."""
    found: dict[fx.Node, None] = {}
    for node in sorted(cone.nodes, key=lambda n: n.name):
        for n in node.all_input_nodes:
            if n not in cone.nodes:
                found[n] = None
    return list(found)
