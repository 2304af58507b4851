"""Values that depend on nothing that enters the graph but sizes: tables that a model makes anew in every step, and that need be made once.

Not every one of them is kept: a mask of T x T is no more work to make from ``arange`` than to read. A value is kept where making it from
what is kept before it moves several times its own bytes, or where it is no larger than the kept values that only it reads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from slothc.patterns import mask
from slothc.patterns.rule import Match

from .catalogue import CONSTANT
from .traffic import bytes_of, traffic
from .view import GraphView
from .view_alias import storages

MATH = "a value of sizes alone, made once"
WORTH = 3             # bytes moved to make a value, for each of its own


def constants(view: GraphView, taken: set[fx.Node]) -> list[Match]:
    """The values to make once, with the nodes that each makes unnecessary. ``taken`` nodes belong to something else."""
    fixed = [n for n in _fixed(view) if n not in taken]
    work: dict[fx.Node, int] = {}
    kept: set[fx.Node] = set()
    given_away = _outputs(view)
    for node in fixed:
        work[node] = traffic(view, node) + sum(work[n] for n in node.all_input_nodes if n in work and n not in kept)
        value = view.example(node)
        if not isinstance(value, torch.Tensor) or not value.dim() or given_away & set(storages(value)):
            continue
        instead = sum(bytes_of(view.example(n)) for n in node.all_input_nodes if n in kept and view.users(n) == [node])
        if work[node] >= WORTH * bytes_of(value) > 0 or 0 < bytes_of(value) <= instead:
            kept.add(node)
    read = _read(view, set(fixed), kept)
    found: list[Match] = []
    free = _gone(view, fixed, read)
    for node in (n for n in fixed if n in read):
        cone = mask.find(view, node)
        if isinstance(cone, mask.Cone) and not cone.data:
            inside = tuple(n for n in cone.nodes if n in free)
            free.difference_update(inside)
            found.append(Match(CONSTANT, node, inside, {"sizes": cone.sizes}, {"cone": cone}, count=0))
    return found


def _gone(view: GraphView, fixed: list[fx.Node], read: set[fx.Node]) -> set[fx.Node]:
    """The nodes that nothing needs any more once the values in ``read`` are made elsewhere."""
    gone: set[fx.Node] = set()
    for node in reversed(fixed):
        if node in read or all(u in gone for u in view.users(node)):
            gone.add(node)
    return gone


def _fixed(view: GraphView) -> Iterator[fx.Node]:
    """Nodes whose values nothing but sizes decides, in order."""
    known: set[fx.Node] = set()
    for node in view.nodes:
        if not node.op.startswith("call") or not view.alive(node) or view.has_effect(node) or view.mutated(node):
            continue
        inputs = [n for n in node.all_input_nodes if not mask.is_size(view.example(n))]
        value = view.example(node)
        if isinstance(value, torch.Tensor | tuple | list) and not mask.is_size(value) and all(n in known for n in inputs):
            if view.op(node).params.get("reason") != "inside vmap" and not isinstance(mask.find(view, node), str):
                known.add(node)
                yield node


def _outputs(view: GraphView) -> set[object]:
    """The memory of what the graph returns: whoever gets it may write to it."""
    last = next(n for n in reversed(view.nodes) if n.op == "output")
    return {s for n in last.all_input_nodes for s in storages(view.example(n))}


def _read(view: GraphView, fixed: set[fx.Node], kept: set[fx.Node]) -> set[fx.Node]:
    """The kept values that something reads which is not made of them alone, or only with what is not kept."""
    found: set[fx.Node] = set()
    waiting = [n for n in fixed if any(u not in fixed for u in view.users(n))]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node in kept:
            found.add(node)
            continue
        before = [n for n in node.all_input_nodes if n in fixed and n not in seen]
        seen.update(before)
        waiting += before
    return found
