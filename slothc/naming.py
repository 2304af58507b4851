"""Naming what a cone computes: its parts, each recognised by evaluating it, whatever its spelling.

A cone may hold several things a reader would count (a q-norm and the rotation after it). From the sink backwards, the largest part that
some rule identifies gets the rule's name; what remains behind it is named in turn.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import sympy as sp
from torch import fx

from slothc.gradients.geometry import Access
from slothc.gradients.program import CONST, Input, Reduce, symbol
from slothc.patterns.rule import RowRule

from .catalogue import ROW
from .lift import CannotLift, Lifted, lift
from .lift_space import fixed
from .regions import ARITHMETIC, Cone, behind
from .view import GraphView

PIECES = {"split", "item", "index"}
REDUCES = {"reduce", "norm", "moments"}
SHORT = 4             # numbers up to here are exponents and halves, not lengths


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
        reached = _reach(sink, cone.nodes, None)
        cuts: list[fx.Node | None] = [None, *sorted((n for n in reached if n is not sink), key=order.__getitem__)]
        if view.op(sink).kind in ARITHMETIC:
            for cut in cuts:
                inside = _reach(sink, cone.nodes, cut)
                if cut is not None and (view.op(cut).kind == "split" or not _separates(view, cut, inside, cone.nodes)):
                    continue
                rule = _identify(view, inside, sink)
                if rule:
                    cut, inside = _last(view, cone, sink, rule, cut, cuts[cuts.index(cut) + 1 :], inside)
                    yield Part(rule, sink, frozenset(inside))
                    if cut is not None:
                        yield from visit(cut)
                    return
        for node in sink.all_input_nodes:
            if node in cone.nodes:
                yield from visit(node)

    return [p for r in cone.results for p in visit(r)]


def _last(
    view: GraphView, cone: Cone, sink: fx.Node, rule: str, cut: fx.Node | None, later: list[fx.Node | None], inside: set[fx.Node]
) -> tuple[fx.Node | None, set[fx.Node]]:
    """The last of several reductions that are one by formula, as norm(norm(x)) is a norm of x: a smaller part that has the same name."""
    if sum(view.op(n).kind in REDUCES for n in inside) < 2:
        return cut, inside
    for other in filter(None, reversed(later)):
        part = _reach(sink, cone.nodes, other)
        again = any(view.op(n).kind in REDUCES for n in _reach(other, cone.nodes, None))
        split = view.op(other).kind != "split" and again and any(view.op(n).kind in REDUCES for n in part)
        if split and _separates(view, other, part, cone.nodes) and _identify(view, part, sink) == rule:
            return other, part
    return cut, inside


def _reach(sink: fx.Node, nodes: frozenset[fx.Node], cut: fx.Node | None) -> set[fx.Node]:
    """The nodes behind ``sink`` that can be reached without passing ``cut``, ``sink`` included."""
    return behind(sink, lambda n: n in nodes and n is not cut)


def _separates(view: GraphView, cut: fx.Node, inside: set[fx.Node], nodes: frozenset[fx.Node]) -> bool:
    """Whether everything behind ``cut`` reaches the part only through it: no node and no operand in common.

    Pieces of one tensor are values of their own, as the two halves of a fused projection are.
    """
    beyond = _reach(cut, nodes, None)
    mine, theirs = (_values(view, part, nodes) for part in (inside, beyond))
    shared = {n for n in beyond & inside if view.op(n).kind != "split"}
    return not shared and not mine & theirs


def _values(view: GraphView, part: set[fx.Node], nodes: frozenset[fx.Node]) -> set[fx.Node]:
    """What the part reads from outside the cone, other than to cut pieces from it."""
    return {n for x in part if view.op(x).kind not in PIECES for n in x.all_input_nodes if n not in nodes}


def _identify(view: GraphView, inside: set[fx.Node], sink: fx.Node) -> str | None:
    try:
        lifted = lift(view, inside, [sink])
    except CannotLift:
        return None
    first = [lifted.leaves.index(leaf) for leaf in lifted.leaves]          # one tensor may be several operands
    single = {axis.name: 0 for axis in (*lifted.axes, lifted.lane) if axis.size == 1}
    loads = (a and Access(first[a.tensor], tuple(fixed(f, single) for f in a.index)) for a in lifted.loads)
    lifted = replace(lifted, loads=tuple(loads))
    forms = [lifted, *_by_length(lifted)]
    return next((r.name for r in ROW if any(_computes(r, form) for form in forms)), None)


def _by_length(lifted: Lifted) -> list[Lifted]:
    """The formula with the row's length for numbers that are equal to it, where there are any: models divide by a width they know."""
    program, length = lifted.program, dict(lifted.sizes).get("D") or lifted.lane.size
    if not program.reductions or not isinstance(length, int) or length <= SHORT:
        return []
    stages = tuple(replace(s, value=_written(s.value, length)) for s in program.stages)
    if stages == program.stages:
        return []
    known = "D" in program.input
    size = () if known else (Input("D", CONST, "fp32", differentiable=False, role="size"),)
    form = replace(program, inputs=(*program.inputs, *size), stages=stages)
    return [replace(lifted, program=form, loads=(*lifted.loads, *(None for _ in size)))]


def _written(expr: sp.Expr | Reduce, length: int) -> sp.Expr | Reduce:
    if isinstance(expr, Reduce):
        return replace(expr, body=_written(expr.body, length))
    whole = {n: n.p / symbol("D") if n.q == length else symbol("D") for n in expr.atoms(sp.Rational) if length in (n.q, n)}
    return expr.xreplace(whole)


def _computes(rule: RowRule, lifted: Lifted) -> bool:
    try:
        return rule.identify(lifted.program, lifted.loads)
    except (ArithmeticError, ValueError, TypeError):  # it has no real value at a point where the rule's formula has one
        return False
