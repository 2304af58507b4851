"""How much of a graph's memory traffic the rewrite accounts for."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import fx

from . import bind
from .catalogue import UNNAMED
from .found import Found, Region
from .spellings import target_name
from .traffic import traffic


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
