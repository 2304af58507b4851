"""How much of a graph's memory traffic the rewrite accounts for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from slothc.patterns.meaning import Op

from . import bind
from .catalogue import UNNAMED
from .found import Found, Region
from .regions import VIEWS
from .spellings import target_name
from .view import GraphView

MATRIX = {"linear", "matmul", "baddbmm", "sdpa"}
PRODUCTS = ("mm", "conv", "einsum", "attention", "solve_triangular")
CALLS = ("autograd_function_apply", "tag_activation_checkpoint", "wrap", "invoke_subgraph")


def traffic(view: GraphView, node: fx.Node) -> int:
    """Bytes that the node reads and writes when it runs by itself; views and matrix products count nothing.

    Dynamic sizes count with the value they had at capture.
    """
    op = view.op(node)
    if node.op not in ("call_function", "call_method") or op.kind in MATRIX | {"detach"}:
        return 0
    if op.kind in VIEWS and not op.params.get("clone"):
        return 0
    if isinstance(node.target, HigherOrderOperator) and target_name(node).startswith(CALLS):
        return 0                                                           # what it runs is in a graph of its own
    if any(word in str(getattr(node.target, "__name__", node.target)) for word in PRODUCTS):
        return 0
    written = _bytes(view.example(node))
    if op.kind == "empty":
        return 0                                                           # memory is reserved, nothing moves
    if op.kind == "write":
        return 2 * _part_bytes(view, op)                                   # in place: the part that is written, not the whole
    if op.kind in ("embedding", "gather") or target_name(node) == "embedding":
        return 2 * written                                                 # the rows it looks up, not the table
    return written + sum(_bytes(view.example(n)) for n in node.all_input_nodes) if written else 0


def _part_bytes(view: GraphView, op: Op) -> int:
    """The bytes of the part of a tensor that a write goes to."""
    x = view.value(op.args[0])
    sizes, count = iter(x.shape), x.element_size()
    for item in (i for i in op.params["items"] if i is not None):
        size = _number(next(sizes))
        count *= len(range(size)[item]) if isinstance(item, slice) else 1
    return count


def _bytes(value: Any) -> int:
    if isinstance(value, tuple | list):
        return sum(map(_bytes, value))
    if not isinstance(value, torch.Tensor):
        return 0
    count = 1
    for size, stride in zip(value.shape, value.stride()):
        count *= 1 if _number(stride) == 0 else _number(size)
    return count * value.element_size()


def _number(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint or 1)


def coverage(found: Found, used: list[Any]) -> tuple[int, dict[fx.Node, int]]:
    """Bytes of the nodes that the rewrite replaces or makes unnecessary, and those of each of the others."""
    view = found.view
    operands: dict[fx.Node, tuple[fx.Node, ...]] = {}
    inside: set[fx.Node] = set()
    for item in used:
        if isinstance(item, Region):
            operands |= {r: item.operands for r in item.cone.results}
            inside |= item.cone.nodes
        else:
            inside |= set(item.nodes)
            for r in bind.calls(item):
                operands[r.node] = tuple(a for a in (*r.args, *r.kwargs.values()) if isinstance(a, fx.Node))
    needed = {n for n in view.nodes if view.has_effect(n)}
    for node in reversed(view.nodes):
        if node in needed:
            needed.update(operands.get(node, node.all_input_nodes))
    total = {n: traffic(view, n) for n in view.nodes if view.alive(n)}
    left = {n: count for n, count in total.items() if count and n not in inside and n in needed and n not in operands}
    return sum(total.values()) - sum(left.values()), left


def by_rule(found: Found, used: list[Any]) -> Counter[str]:
    """Bytes of the nodes that the rewrite replaces, by the name of what they belong to."""
    view, sizes = found.view, Counter[str]()
    for item in used:
        if not isinstance(item, Region):
            sizes[item.rule] += sum(traffic(view, n) for n in item.nodes)
            continue
        named: set[fx.Node] = set()
        for part in item.parts:
            sizes[part.rule] += sum(traffic(view, n) for n in part.nodes - named)
            named |= part.nodes
        sizes[UNNAMED] += sum(traffic(view, n) for n in item.cone.nodes - named)
    return +sizes


def operation(node: fx.Node) -> str:
    """What the node calls, as its author would write it."""
    return target_name(node) if node.op == "call_function" else str(node.target)
