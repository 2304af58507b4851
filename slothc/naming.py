"""Naming what a cone computes: its parts, each recognised by evaluating it, whatever its spelling.

A cone may hold several things a reader would count (a q-norm and the rotation after it). From the sink backwards, the largest part that
some rule identifies gets the rule's name; what remains behind it is named in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from slothc.patterns.rule import RowRule

from .catalogue import ROW
from .lift import CannotLift, Lifted, lift
from .regions import ARITHMETIC, Cone, behind
from .view import GraphView

LARGEST = 40          # nodes of a part that a rule may name; the largest known has 20
STEPS = 96            # steps of its formula
TRIES = 80            # parts of one cone that are evaluated


@dataclass(frozen=True)
class Part:
    """A named part of a cone: the rule, and the node whose value it is."""

    rule: str
    node: fx.Node
    nodes: frozenset[fx.Node]


def parts(view: GraphView, cone: Cone) -> list[Part]:
    """The named parts of ``cone``, last first."""
    order = view.order
    seen: set[fx.Node] = set()
    tries = [None] * TRIES

    def visit(sink: fx.Node) -> Iterator[Part]:
        if sink in seen:
            return
        seen.add(sink)
        reached = _reach(sink, cone.nodes, None)
        cuts: list[fx.Node | None] = [None, *sorted((n for n in reached if n is not sink), key=order.__getitem__)]
        if view.op(sink).kind in ARITHMETIC:
            for cut in cuts:
                inside = _reach(sink, cone.nodes, cut)
                if len(inside) > LARGEST or not tries:
                    continue
                if cut is not None and (view.op(cut).kind == "split" or not _separates(cut, inside, cone.nodes)):
                    continue
                tries.pop()
                rule = _identify(view, inside, sink)
                if rule:
                    yield Part(rule, sink, frozenset(inside))
                    if cut is not None:
                        yield from visit(cut)
                    return
        for node in sink.all_input_nodes:
            if node in cone.nodes:
                yield from visit(node)

    return [p for r in cone.results for p in visit(r)]


def _reach(sink: fx.Node, nodes: frozenset[fx.Node], cut: fx.Node | None) -> set[fx.Node]:
    """The nodes behind ``sink`` that can be reached without passing ``cut``, ``sink`` included."""
    return behind(sink, lambda n: n in nodes and n is not cut)


def _separates(cut: fx.Node, inside: set[fx.Node], nodes: frozenset[fx.Node]) -> bool:
    """Whether everything behind ``cut`` reaches the part only through it: no node and no operand in common."""
    beyond = _reach(cut, nodes, None)
    mine = {n for x in inside for n in x.all_input_nodes if n not in nodes}
    theirs = {n for x in beyond for n in x.all_input_nodes if n not in nodes}
    return not beyond & inside and not mine & theirs


def _identify(view: GraphView, inside: set[fx.Node], sink: fx.Node) -> str | None:
    try:
        lifted = lift(view, inside, [sink], STEPS)
    except CannotLift:
        return None
    return next((r.name for r in ROW if _computes(r, lifted)), None)


def _computes(rule: RowRule, lifted: Lifted) -> bool:
    try:
        return rule.identify(lifted.program, lifted.loads)
    except (ArithmeticError, ValueError, TypeError):  # it has no real value at a point where the rule's formula has one
        return False
