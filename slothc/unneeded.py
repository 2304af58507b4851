"""What a checkpoint need not compute when it runs again: values that no gradient reads.

The last product of a layer is added to the residual stream, and neither the sum nor what is added is kept for a backward. The body that
runs again leaves such products out: their operations then only keep what their own backward reads.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable

from torch import fx

from .spellings import target_name

KEEP_NOTHING = {
    "add", "__add__", "__radd__", "sub", "__sub__", "neg", "getitem", "__getitem__", "view", "reshape", "flatten", "unflatten",
    "squeeze", "unsqueeze", "transpose", "permute", "contiguous", "to", "type_as", "clone",
}  # fmt: skip
"""Operations whose backward reads no operand's value, but for the indices of ``LOOKUPS``."""
LOOKUPS = ("getitem", "__getitem__")
_bodies: weakref.WeakKeyDictionary[fx.GraphModule, fx.GraphModule | None] = weakref.WeakKeyDictionary()


def without_unneeded(body: fx.GraphModule) -> fx.GraphModule:
    """``body`` with the same gradients, whose results hold no values; ``body`` itself where nothing can be left out."""
    if body not in _bodies:
        _bodies[body] = _made(body)
    return _bodies[body] or body


def _made(body: fx.GraphModule) -> fx.GraphModule | None:
    needed = _needed(body.graph)
    if not any(n not in needed and _lighter(n) for n in body.graph.nodes):
        return None
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(body.graph, copies))
    for node, copy in copies.items():
        if node not in needed and _lighter(node):
            copy.target = getattr(node.target, "unneeded")  # noqa: B009
    return fx.GraphModule(body, graph)


def _lighter(node: fx.Node) -> bool:
    return node.op == "call_function" and hasattr(node.target, "unneeded")


def _needed(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose values some gradient reads."""
    needed: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op != "output":
            needed.update(node.all_input_nodes if node in needed else _kept(node))
    return needed


def _kept(node: fx.Node) -> Iterable[fx.Node]:
    """What the node keeps for its backward; all that it reads where that is not known."""
    saves = getattr(node.target, "saves", None) if node.op == "call_function" else None
    if saves is not None:
        return [a for k, a in enumerate(node.args) if k in saves and isinstance(a, fx.Node)]
    torchs = node.op == "call_method" or getattr(node.target, "__module__", "") in ("_operator", "torch")
    if not torchs or target_name(node) not in KEEP_NOTHING:
        return node.all_input_nodes
    return [n for n in node.all_input_nodes if n is not node.args[0]] if target_name(node) in LOOKUPS else ()
