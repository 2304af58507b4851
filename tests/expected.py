"""What a reader of a model's source would count, taken from what Dynamo noted about each node: module classes and function names.

It knows nothing of formulas. A call of a module whose class is called ``*Norm*`` is a norm; what a function called ``apply_rotary*``
gives back are rotated tensors; a product of an activation and another value in a module called ``*MLP*`` or ``*Experts*`` is a
gated activation; a call of ``cross_entropy`` or ``nll_loss`` is a loss.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from slothc.found import Region
from slothc.rewrite import Rewritten
from slothc.view import GraphView

RULES = {"norm": {"rms_norm", "layer_norm"}, "rotated": {"rope"}, "gated": {"gated_mlp"}, "loss": {"cross_entropy"}}
NORM, MLP = re.compile("Norm"), re.compile("MLP|Mlp|Experts|FeedForward|FFN")
ROTARY = re.compile(r"in apply_\w*(?:rotary|rope)\w*")
BENT = {"silu", "relu", "gelu", "gelu_tanh", "sigmoid", "tanh", "erf", "mish", "hardswish", "softplus", "elu", "leaky_relu", "logsigmoid"}
ONE, WRITTEN = "several of one row are one by formula", "its result is written to in place"
ALONG = {"pointwise", "identity", "cast"}


@dataclass(frozen=True)
class Expected:
    """One thing that a reader would count: ``kind`` is a key of ``RULES``, ``nodes`` are all that belong to it."""

    kind: str
    name: str
    location: str
    nodes: frozenset[fx.Node]


def expected(view: GraphView) -> list[Expected]:
    """Everything that a reader would count in one graph."""
    return [*_norms(view), *_rotated(view), *_gated(view), *_losses(view)]


def missed(graphs: Iterable[Rewritten]) -> tuple[list[Expected], list[tuple[Expected, str]]]:
    """(all that is expected, what of it has no rule's name, each with the reason)."""
    every: list[Expected] = []
    lacking: list[tuple[Expected, str]] = []
    for r in graphs:
        named = list(_named(r))
        found = list(named)
        for item in expected(r.found.view):
            every.append(item)
            fitting = [p for p in found if p[0] in RULES[item.kind] and p[2] & item.nodes]
            if fitting:
                found.remove(max(fitting, key=lambda p: (p[1] in item.nodes, len(p[2] & item.nodes))))
            else:
                within = any(p[0] in RULES[item.kind] and p[1] not in item.nodes and p[2] & item.nodes for p in named)
                lacking.append((item, ONE if within else _reason(r, item)))
    return every, lacking


def _named(r: Rewritten) -> Iterator[tuple[str, fx.Node, frozenset[fx.Node]]]:
    """(rule, the node whose value it is, all nodes) of everything that was found."""
    for item in r.used:
        if isinstance(item, Region):
            yield from ((p.rule, p.node, p.nodes) for p in item.parts)
        else:
            yield item.rule, item.node, frozenset(item.nodes)


def _reason(r: Rewritten, item: Expected) -> str:
    if any(map(r.found.view.mutated, item.nodes)):
        return WRITTEN
    said = [m.reason for m in (*r.found.misses, *r.dropped) if m.node in item.nodes]
    return said[0] if said else ""


def _modules(node: fx.Node) -> list[tuple[str, str]]:
    """(key of the call, class name) of the modules whose forward the node was recorded in, outermost first."""
    stack = node.meta.get("nn_module_stack") or {}
    return [(key, getattr(kind, "__name__", str(kind))) for key, (_, kind) in stack.items()]


def _grouped(view: GraphView, pattern: re.Pattern[str]) -> dict[tuple[str, str], list[fx.Node]]:
    """The living nodes of each call of a norm or an MLP whose class name fits, by the innermost module that is one."""
    groups: dict[tuple[str, str], list[fx.Node]] = {}
    for node in view.nodes:
        if node.op.startswith("call") and view.alive(node):
            inner = next((m for m in reversed(_modules(node)) if NORM.search(m[1]) or MLP.search(m[1])), None)
            if inner is not None and pattern.search(inner[1]):
                groups.setdefault(inner, []).append(node)
    return groups


def _norms(view: GraphView) -> Iterator[Expected]:
    for (_, name), nodes in _grouped(view, NORM).items():
        reduces = any(view.op(n).kind in ("norm", "reduce") or "norm" in str(n.target) for n in nodes)
        if reduces and view.value(nodes[-1]).shape[-1:] != (1,):               # the inverse root by itself is a number for each row
            yield Expected("norm", name, view.location(nodes[-1]), frozenset(nodes))


def _rotated(view: GraphView) -> Iterator[Expected]:
    groups: dict[tuple[str, str], set[fx.Node]] = {}
    for node in view.nodes:
        called = ROTARY.search(node.meta.get("stack_trace") or "")
        if called and node.op.startswith("call") and view.alive(node):
            inner = (_modules(node) or [("", "")])[-1]
            groups.setdefault((inner[0], called.group()), set()).add(node)
    for (_, name), nodes in groups.items():
        for out in (n for n in view.nodes if n in nodes and any(u not in nodes for u in view.users(n))):
            value = view.example(out)
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                yield Expected("rotated", name, view.location(out), frozenset(_within(out, nodes)))


def _within(out: fx.Node, nodes: set[fx.Node]) -> set[fx.Node]:
    found, waiting = {out}, [out]
    while waiting:
        for n in waiting.pop().all_input_nodes:
            if n in nodes and n not in found:
                found.add(n)
                waiting.append(n)
    return found


def _gated(view: GraphView) -> Iterator[Expected]:
    for (_, name), nodes in _grouped(view, MLP).items():
        inside = set(nodes)
        for node in nodes:
            op = view.op(node)
            if op.kind == "pointwise" and op.params["fn"] == "mul" and _gates(view, node, inside):
                yield Expected("gated", name, view.location(node), frozenset({node}))


def _gates(view: GraphView, node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether the product's two sides are rows that come from different values, one of them through an activation."""
    if any(not isinstance(a, fx.Node) or view.value(a).shape[-1:] != view.value(node).shape[-1:] for a in view.op(node).args):
        return False
    sides = [_sources(view, a, inside) for a in view.op(node).args]
    (first, bent), (second, curved) = sides
    return bool(first) and bool(second) and not first & second and (bent or curved)


def _sources(view: GraphView, arg: object, inside: set[fx.Node]) -> tuple[set[fx.Node], bool]:
    """The values that ``arg`` is made of one by one, none of them a parameter, and whether it goes through an activation."""
    found: set[fx.Node] = set()
    bent, waiting, seen = False, [arg], set()
    while waiting:
        n = waiting.pop()
        if not isinstance(n, fx.Node) or n in seen:
            continue
        seen.add(n)
        op = view.op(n)
        if n in inside and op.kind in ALONG:
            bent |= op.kind == "pointwise" and op.params["fn"] in BENT
            waiting += op.args
        elif op.kind != "input":
            found.add(n)
    return found, bent


def _losses(view: GraphView) -> Iterator[Expected]:
    for node in view.nodes:
        if view.op(node).kind in ("cross_entropy", "nll_loss") and view.alive(node):
            yield Expected("loss", view.op(node).kind, view.location(node), frozenset({node}))
