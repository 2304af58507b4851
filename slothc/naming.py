"""Naming what a cone computes: its parts, each recognised by evaluating it, whatever its spelling.

A cone may hold several things a reader would count (a q-norm and the rotation after it). From the sink backwards, the largest part that
some rule identifies gets the rule's name; what remains behind it is named in turn. A rule's rows may be sums made in the cone: of a
projection and its adapters, say.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from slothc.patterns.rule import RowRule

from .catalogue import ROW
from .lift import CannotLift, Lifted, lift
from .regions import ARITHMETIC, Cone, behind
from .view import GraphView


@dataclass(frozen=True)
class Part:
    """A named part of a cone: the rule, and the node whose value it is."""

    rule: str
    node: fx.Node
    nodes: frozenset[fx.Node]


def parts(view: GraphView, cone: Cone) -> list[Part]:
    """The named parts of ``cone``, last first."""
    order = {n: k for k, n in enumerate(view.nodes)}
    seen: set[fx.Node] = set()

    def visit(sink: fx.Node) -> Iterator[Part]:
        if sink in seen:
            return
        seen.add(sink)
        if view.op(sink).kind in ARITHMETIC:
            for cut in _cuts(view, sink, cone.nodes, order):
                inside = _reach(sink, cone.nodes, cut)
                if any(view.op(c).kind == "split" or not _separates(c, inside, cone.nodes) for c in cut):
                    continue
                rule = _identify(view, inside, sink)
                if rule:
                    yield Part(rule, sink, frozenset(inside))
                    for c in cut:
                        yield from visit(c)
                    return
        for node in sink.all_input_nodes:
            if node in cone.nodes:
                yield from visit(node)

    return [p for r in cone.results for p in visit(r)]


def _reach(sink: fx.Node, nodes: frozenset[fx.Node], cut: Collection[fx.Node] = ()) -> set[fx.Node]:
    """The nodes behind ``sink`` that can be reached without passing one of ``cut``, ``sink`` included."""
    return behind(sink, lambda n: n in nodes and n not in cut)


def _separates(cut: fx.Node, inside: set[fx.Node], nodes: frozenset[fx.Node]) -> bool:
    """Whether everything behind ``cut`` reaches the part only through it: no node and no operand in common."""
    beyond = _reach(cut, nodes)
    mine = {n for x in inside for n in x.all_input_nodes if n not in nodes}
    theirs = {n for x in beyond for n in x.all_input_nodes if n not in nodes}
    return not beyond & inside and not mine & theirs


def _cuts(view: GraphView, sink: fx.Node, nodes: frozenset[fx.Node], order: dict[fx.Node, int]) -> Iterator[tuple[fx.Node, ...]]:
    """Where a part that ends in ``sink`` may begin: nowhere before its operands, at one value, at all the sums that it reads."""
    reached = sorted(_reach(sink, nodes) - {sink}, key=order.__getitem__)
    yield ()
    yield from ((n,) for n in reached)
    linear = {n for n in reached if _linear(view, n, nodes)}
    last = tuple(n for n in reached if n in linear and any(u in nodes and u not in linear for u in n.users))
    if len(last) > 1 and all(_apart(a, b, nodes) for a, b in itertools.combinations(last, 2)):
        yield last


def _apart(a: fx.Node, b: fx.Node, nodes: frozenset[fx.Node]) -> bool:
    """Whether nothing, operands included, is behind both."""
    behind_a, behind_b = ({n for x in _reach(s, nodes) for n in (x, *x.all_input_nodes)} for s in (a, b))
    return not behind_a & behind_b


def _linear(view: GraphView, node: fx.Node, nodes: frozenset[fx.Node]) -> bool:
    """Whether ``node`` is linear in the rows that ``nodes`` read: a sum of them, each times what no row has."""
    if node not in nodes:
        return True
    op = view.op(node)
    rows = [a for a in op.args if isinstance(a, fx.Node) and _has_rows(view, a)]
    if op.kind == "pointwise":
        one = len(rows) == 1 and (op.params["fn"] == "mul" or (op.params["fn"] == "div" and op.args[0] is rows[0]))
        if not one and op.params["fn"] not in ("add", "sub", "neg"):
            return False
    elif op.kind not in ("cast", "identity", "reshape", "permute"):
        return False
    return all(_linear(view, a, nodes) for a in rows)


def _has_rows(view: GraphView, node: fx.Node) -> bool:
    value = view.example(node)
    return isinstance(value, torch.Tensor) and any(s != 1 for s in value.shape[:-1])


def _identify(view: GraphView, inside: set[fx.Node], sink: fx.Node) -> str | None:
    try:
        lifted = lift(view, inside, [sink])
    except CannotLift:
        return None
    return next((r.name for r in ROW if _computes(r, lifted)), None)


def _computes(rule: RowRule, lifted: Lifted) -> bool:
    try:
        return rule.identify(lifted.program, lifted.loads)
    except (ArithmeticError, ValueError, TypeError):  # it has no real value at a point where the rule's formula has one
        return False
