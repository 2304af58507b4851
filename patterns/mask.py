"""What an attention mask is computed from: the part of the graph between it and the values that enter the graph.

Under Dynamo a model writes its mask as index arithmetic on ``arange``: the value is a function of sizes alone, or of
sizes and small integer inputs (padding flags, positions). That function, cut out of the graph, can be evaluated
wherever its value is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from .meaning import View

RANDOM = frozenset(
    "rand randn randint randperm rand_like randn_like randint_like bernoulli multinomial normal poisson rrelu dropout "
    "alpha_dropout empty empty_like new_empty empty_strided".split()
)
NEW = frozenset(("new_ones", "new_zeros", "new_full"))  # read their first argument's dtype and device only


class Facts(View, Protocol):
    """What more this rule asks of the graph."""

    def example(self, node: Any) -> Any:
        """The node's example value, whatever it is: a tensor, a tuple, a number, None."""
        ...

    def generates(self, device: torch.device) -> bool:
        """Whether kernels are generated for the device, or would be for the one that a meta device stands for."""
        ...

    def mutated(self, node: fx.Node) -> bool:
        """Whether the node's value, or one that may share its storage, is written to anywhere."""
        ...


@dataclass(frozen=True, eq=False)
class Cone:
    """The ancestors of ``root`` in graph order, and where they end: ``sizes`` (numbers, shapes) and ``data`` (tensors).

    ``examples``: the traced values of the root and of the ends. ``inverted``: the mask is true where the root is false.
    """

    root: fx.Node
    nodes: tuple[fx.Node, ...]
    sizes: tuple[fx.Node, ...]
    data: tuple[fx.Node, ...]
    examples: Mapping[fx.Node, Any]
    inverted: bool = False


def find(view: Facts, root: fx.Node) -> Cone | str:
    """The cone of ``root``, or the reason why its value is not a function that can be evaluated elsewhere."""
    inside: dict[fx.Node, None] = {root: None}
    sizes: dict[fx.Node, None] = {}
    todo = [root]
    while todo:
        node = todo.pop()
        reason = _unfit(view, node, node is root)
        if reason:
            return reason
        for value in () if _leaf(node) else _reads(node):
            if value in inside or value in sizes:
                continue
            if is_size(view.example(value)):
                sizes[value] = None
            else:
                inside[value] = None
                todo.append(value)
    data = tuple(node for node in inside if _leaf(node))
    order = tuple(node for node in root.graph.nodes if node in inside and not _leaf(node))
    return Cone(root, order, tuple(sizes), data, {node: view.example(node) for node in (root, *sizes, *data)})


def as_function(cone: Cone, device: torch.device | None = None) -> fx.GraphModule:
    """``mask(*sizes, *data)`` as a module that keeps no node of the original graph.

    ``device`` replaces the traced one.
    """
    graph = fx.Graph()
    copies = {leaf: graph.placeholder(f"leaf_{i}") for i, leaf in enumerate((*cone.sizes, *cone.data))}

    def place(value: Any) -> Any:
        return device if device is not None and isinstance(value, torch.device) else value

    for node in cone.nodes:
        source = node.args[0] if node.args else None
        if name(node) in NEW and isinstance(source, fx.Node) and source not in copies:
            like = source.meta["example_value"]
            copies[source] = graph.call_function(torch.empty, (0,), {"dtype": like.dtype, "device": place(like.device)})
        copy = graph.node_copy(node, copies.__getitem__)
        copy.meta = {}
        copy.args, copy.kwargs = fx.node.map_aggregate((copy.args, copy.kwargs), place)
        if device is not None and isinstance(copy.kwargs.get("device"), str):
            copy.kwargs = {**copy.kwargs, "device": device}
        copies[node] = copy
    root = copies[cone.root]
    graph.output(graph.call_function(torch.logical_not, (root,)) if cone.inverted else root)
    return fx.GraphModule({}, graph)


def is_size(value: Any) -> bool:
    """True for a number, a shape, a device or a dtype: what is known without looking at a tensor's elements."""
    if isinstance(value, (tuple, list)):
        return all(isinstance(item, (int, torch.SymInt)) for item in value)
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat, torch.device, torch.dtype))


def name(node: fx.Node) -> str:
    """The last part of the name of what a node calls."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _leaf(node: fx.Node) -> bool:
    return node.op in ("placeholder", "get_attr")


def _reads(node: fx.Node) -> list[fx.Node]:
    """The nodes whose values ``node`` depends on."""
    if name(node) in NEW and isinstance(node.args[0], fx.Node) and "example_value" in node.args[0].meta:
        return [n for n in node.all_input_nodes if n is not node.args[0] or n in node.args[1:]]
    return list(node.all_input_nodes)


def _unfit(view: Facts, node: fx.Node, is_mask: bool) -> str | None:
    """Why ``node`` cannot be part of a cone. ``is_mask``: it is the mask itself."""
    value = view.example(node)
    if not isinstance(value, (torch.Tensor, tuple, list)):
        return f"{node.name} is neither a tensor nor a size"
    if isinstance(value, torch.Tensor) and value.requires_grad:
        return "it is learned"
    if _leaf(node) and not is_mask and (not isinstance(value, torch.Tensor) or value.is_floating_point()):
        return f"it depends on the floating-point values of {node.name}"
    if not _leaf(node):
        opaque = node.op == "call_module" or "functorch" in str(getattr(node.target, "__module__", ""))
        if opaque or isinstance(node.target, torch._ops.HigherOrderOperator):
            return f"{name(node)} is opaque"
        if name(node) in RANDOM or view.op(node).params.get("mutates"):
            return f"{name(node)} makes it differ from call to call"
    return f"{node.name} is changed in place" if view.mutated(node) else None
