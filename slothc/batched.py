"""What ``vmap`` maps over elementwise operations, as those operations on whole tensors.

    a = _add_batch_dim(x, 0, level); b = a * 2; y = _remove_batch_dim(b, level, n, 0)
    y = x * 2

An element of the result depends on the elements at its place alone, so one more dimension in front changes nothing, as long as shapes
still meet from the right: every mapped operand has as many dimensions as the result. That is how ``associative_scan`` applies its
function to pairs of halves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from .spellings import meaning, target_name
from .view import GraphView

BEGIN, END = "_vmap_increment_nesting", "_vmap_decrement_nesting"
ADD, REMOVE = "_add_batch_dim", "_remove_batch_dim"
ELEMENTWISE = {"pointwise", "cast"}


def batched(view: GraphView) -> bool:
    """Rewrite the graph of ``view`` as above, where it can be done; whether anything changed (the view is then out of date)."""
    spans = [span for span in _spans(view.nodes) if _elementwise(view, span)]
    for span in spans:
        _Whole(view, span).run()
    return bool(spans)


def _spans(nodes: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """The nodes of every ``vmap`` that holds no other, its begin and end included."""
    span: list[fx.Node] = []
    for node in nodes:
        name = target_name(node) if node.op == "call_function" else ""
        if name == BEGIN:
            span = [node]
        elif span:
            span.append(node)
            if name == END:
                yield span
                span = []


def _elementwise(view: GraphView, span: list[fx.Node]) -> bool:
    mapped: set[fx.Node] = set()
    for node in span[1:-1]:
        name = target_name(node)
        if name == ADD and isinstance(view.example(node), torch.Tensor) and all(isinstance(a, int) for a in node.args[1:]):
            mapped.add(node)
        elif name == REMOVE and node.args[0] in mapped and isinstance(node.args[3], int):
            continue
        elif node.op.startswith("call") and _each_alone(view, node, mapped):
            mapped.add(node)
        else:
            return False
    return all(u in span for n in mapped for u in n.users)


def _each_alone(view: GraphView, node: fx.Node, mapped: set[fx.Node]) -> bool:
    value = view.example(node)
    if meaning(node, view.example).kind not in ELEMENTWISE or not isinstance(value, torch.Tensor) or not value.dim():
        return False
    operands = [(n, view.example(n)) for n in node.all_input_nodes]
    ranks = [v.dim() for n, v in operands if n in mapped]
    fitting = all(isinstance(v, torch.Tensor) and v.dim() <= value.dim() for _, v in operands)
    return fitting and bool(ranks) and set(ranks) == {value.dim()}


class _Whole:
    """One ``vmap`` taken away."""

    def __init__(self, view: GraphView, span: list[fx.Node]) -> None:
        self.view, self.span, self.graph = view, span, view.graph_module.graph
        self.new: dict[fx.Node, fx.Node] = {}

    def run(self) -> None:
        for node in self.span[1:-1]:
            name = target_name(node)
            with self.graph.inserting_before(node):
                if name == ADD:
                    self.new[node] = self._moved(node, node.args[0], node.args[1], 0)
                elif name == REMOVE:
                    node.replace_all_uses_with(self._moved(node, fx.map_arg(node.args[0], self._now), 0, node.args[3]))
                else:
                    self.new[node] = self._made(node, node.op, node.target, *fx.map_arg((node.args, node.kwargs), self._now))
        for node in reversed(self.span):
            self.graph.erase_node(node)

    def _now(self, node: fx.Node) -> fx.Node:
        return self.new.get(node, node)

    def _moved(self, node: fx.Node, x: Any, source: Any, destination: Any) -> fx.Node:
        if source == destination:
            return x
        return self._made(node, "call_function", torch.movedim, (x, source, destination), {})

    def _made(self, node: fx.Node, op: str, target: Any, args: Any, kwargs: Any) -> fx.Node:
        """The node, with the value that it has on the fake tensors of its operands."""
        made = self.graph.create_node(op, target, args, kwargs)
        values, named = fx.map_arg((args, kwargs), self._example)
        fake = next(v for v in torch.utils._pytree.tree_leaves((values, named)) if isinstance(v, FakeTensor))
        with fake.fake_mode, torch.set_grad_enabled(self.view.grad_enabled(node)):
            value = target(*values, **named) if op == "call_function" else getattr(values[0], target)(*values[1:], **named)
        made.meta = {**node.meta, "example_value": value}
        return made

    def _example(self, node: fx.Node) -> Any:
        return node.meta["example_value"] if node not in self.view.order else self.view.example(node)
