"""Naming what a cone computes: its parts, each recognised by evaluating it, whatever its spelling.

A cone may hold several things a reader would count (a q-norm and the rotation after it). From the sink backwards, the largest part that
some rule identifies gets the rule's name; what remains behind it is named in turn. A rule's rows may be sums made in the cone: of a
projection and its adapters, say.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import sympy as sp
import torch
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
Cut: TypeAlias = tuple[fx.Node, ...]
SHORT = 4             # numbers up to here are exponents and halves, not lengths
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
        if view.op(sink).kind in ARITHMETIC:
            cuts = list(_cuts(view, sink, cone.nodes, order))
            for number, cut in enumerate(cuts):
                inside = _reach(sink, cone.nodes, cut)
                if len(inside) > LARGEST or not tries:
                    continue
                if any(view.op(c).kind == "split" or not _separates(view, c, inside, cone.nodes) for c in cut):
                    continue
                tries.pop()
                rule = _identify(view, inside, sink)
                if rule:
                    begins, inside = _last(view, cone, sink, rule, cut, cuts[number + 1 :], inside)
                    yield Part(rule, sink, frozenset(inside))
                    for c in begins:
                        yield from visit(c)
                    return
        for node in sink.all_input_nodes:
            if node in cone.nodes:
                yield from visit(node)

    named = [p for r in cone.results for p in visit(r)]
    return [p for p in named if not any(q.rule == p.rule and q.nodes < p.nodes for q in named)]    # a result and its cast are one thing


def _last(
    view: GraphView, cone: Cone, sink: fx.Node, rule: str, cut: Cut, later: Sequence[Cut], inside: set[fx.Node]
) -> tuple[Cut, set[fx.Node]]:
    """The last of several reductions that are one by formula, as norm(norm(x)) is a norm of x: a smaller part that has the same name."""
    if sum(view.op(n).kind in REDUCES for n in inside) < 2:
        return cut, inside
    for other in (c[0] for c in reversed(later) if len(c) == 1):
        part = _reach(sink, cone.nodes, (other,))
        again = any(view.op(n).kind in REDUCES for n in _reach(other, cone.nodes))
        split = view.op(other).kind != "split" and again and any(view.op(n).kind in REDUCES for n in part)
        if split and _separates(view, other, part, cone.nodes) and _identify(view, part, sink) == rule:
            return (other,), part
    return cut, inside


def _reach(sink: fx.Node, nodes: frozenset[fx.Node], cut: Collection[fx.Node] = ()) -> set[fx.Node]:
    """The nodes behind ``sink`` that can be reached without passing one of ``cut``, ``sink`` included."""
    return behind(sink, lambda n: n in nodes and n not in cut)


def _separates(view: GraphView, cut: fx.Node, inside: set[fx.Node], nodes: frozenset[fx.Node]) -> bool:
    """Whether everything behind ``cut`` reaches the part only through it: no node and no operand in common.

    Pieces of one tensor are values of their own, as the two halves of a fused projection are.
    """
    beyond = _reach(cut, nodes)
    mine, theirs = (_values(view, part, nodes) for part in (inside, beyond))
    shared = {n for n in beyond & inside if view.op(n).kind != "split"}
    return not shared and not mine & theirs


def _values(view: GraphView, part: set[fx.Node], nodes: frozenset[fx.Node]) -> set[fx.Node]:
    """What the part reads from outside the cone, other than to cut pieces from it."""
    return {n for x in part if view.op(x).kind not in PIECES for n in x.all_input_nodes if n not in nodes}


def _cuts(view: GraphView, sink: fx.Node, nodes: frozenset[fx.Node], order: dict[fx.Node, int]) -> Iterator[Cut]:
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
        lifted = lift(view, inside, [sink], STEPS)
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
