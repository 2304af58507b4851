"""What was found in a graph: regions with plans, structural matches, misses."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import sympy as sp
import torch
from torch import fx

from slothc.gradients.plan import Plan
from slothc.patterns.rule import Match, Miss

from .catalogue import CONSTANT, STRUCTURAL, UNNAMED
from .constants import constants
from .lift import CannotLift, OtherRow, lift, shape_of
from .lift_forms import same
from .naming import Part, parts
from .options import Options
from .planning import plan
from .regions import ARITHMETIC, FLOATS, JOINS, LARGEST, Cone, Growth, behind, leaves
from .statistics import counts
from .structure import structure
from .traffic import traffic
from .view import GraphView

ATTEMPTS = 8
MOST = 40             # unnamed formulas that one graph has checked: an unrolled recurrence has one for every step
PRODUCERS = {"pointwise", "embedding", "gather", "reshape", "identity"}


@dataclass(frozen=True)
class Region:
    """A cone with its plan: ``operands`` are the nodes the plan reads, in its order. ``parts`` are the named things inside."""

    cone: Cone
    plan: Plan
    operands: tuple[fx.Node, ...]
    parts: tuple[Part, ...]

    @property
    def rule(self) -> str:
        """The name for messages."""
        return "+".join(dict.fromkeys(p.rule for p in reversed(self.parts))) or f"{UNNAMED}#{self.plan.key}"

    def counts(self) -> Counter[str]:
        return Counter(p.rule for p in self.parts) or Counter({UNNAMED: 1})


@dataclass
class Found:
    """Everything found in one graph."""

    view: GraphView
    regions: list[Region] = field(default_factory=list)
    matches: list[Match] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)


@dataclass(frozen=True)
class _Known:
    """What is known of a structure, in terms of node and leaf numbers."""

    plan: Plan | None
    operands: tuple[int, ...]
    parts: tuple[tuple[str, int, tuple[int, ...]], ...]
    barred: int | None = None
    reason: str = ""


_known: dict[str, _Known] = {}


def find(view: GraphView, options: Options) -> Found:
    """Look for structural rules, then grow cones over what is left. Nothing is changed."""
    found = Found(view)
    growth = Growth(view)
    _structural(found, growth, options)
    for cone in growth.cones():
        region = _region(found, growth, cone)
        if region is None or not _worthwhile(view, region, options):
            continue
        region = _with_producer(found, growth, region)
        growth.claim(region.cone)
        found.regions.append(region)
    _limit(found)
    found.matches += [] if CONSTANT in options.disable else constants(view, growth.taken)
    return found


def _limit(found: Found) -> None:
    """Of more than ``MOST`` unnamed formulas those that account for most bytes stay: each is compiled and checked."""
    sizes: Counter[str] = Counter()
    for region in found.regions:
        if not region.parts:
            sizes[region.plan.key] += sum(traffic(found.view, n) for n in region.cone.nodes)
    beyond = {key for key, _ in sizes.most_common()[MOST:]}
    left = [r for r in found.regions if not r.parts and r.plan.key in beyond]
    reason = f"there are more than {MOST} different formulas in one graph, and others move more bytes"
    nodes = (n for r in left for n in r.cone.nodes if found.view.op(n).kind in ARITHMETIC)
    found.misses += [Miss(UNNAMED, n, reason) for n in sorted(nodes, key=found.view.order.__getitem__)]
    found.regions = [r for r in found.regions if r not in left]


def _structural(found: Found, growth: Growth, options: Options) -> None:
    taken = growth.taken
    for rule in STRUCTURAL:
        if rule.name in options.disable:
            continue
        for node in found.view.nodes:
            if node in taken or not found.view.alive(node):
                continue
            match = rule.recognise(found.view, node)
            if isinstance(match, Miss):
                found.misses.append(match)
            elif match is not None and _written(growth, match):
                found.misses.append(Miss(rule.name, node, "a value it reads is written to in place"))
            elif match is not None and taken.isdisjoint(match.nodes):
                found.matches.append(match)
                taken.update(match.nodes)
                taken.update(match.extra)
                taken.update(getattr(match.attrs.get("cone"), "nodes", ()))     # a mask's nodes are run by whoever judges it


def _written(growth: Growth, match: Match) -> bool:
    """Whether a value of the match, or one that it reads, is written to in place before the match's own place."""
    inner = [n for n in match.nodes if n is not match.node]
    return any(map(growth.view.mutated, inner)) or not all(growth.steady(n, match.node) for n in match.nodes)


def _region(found: Found, growth: Growth, cone: Cone) -> Region | None:
    """The region of a cone. Where a node inside has no formula, its value becomes an operand and the cone grows anew."""
    for _ in range(ATTEMPTS):
        if not any(found.view.op(n).kind in ARITHMETIC for n in cone.nodes):
            return None
        known, nodes, inputs = _look(found.view, cone)
        if known.plan is not None:
            made = tuple(Part(r, nodes[k], frozenset(nodes[i] for i in inside)) for r, k, inside in known.parts)
            return Region(cone, known.plan, tuple(inputs[k] for k in known.operands), made)
        if known.barred is None:
            return None
        barred = nodes[known.barred]
        _report(found, cone, barred, known.reason)
        if barred is cone.sink or barred not in cone.nodes:
            return None
        growth.barred.add(barred)
        cone = growth.grow(cone.sink)
    return None


def _report(found: Found, cone: Cone, node: fx.Node, reason: str) -> None:
    said = any(m.node is node and m.reason == reason for m in found.misses)
    if len(cone.nodes) > 1 and found.view.op(node).kind != "reshape" and not said:
        found.misses.append(Miss(UNNAMED, node, reason))


def _look(view: GraphView, cone: Cone) -> tuple[_Known, list[fx.Node], list[fx.Node]]:
    key, nodes, inputs = structure(view, cone)
    if key not in _known:
        _known[key] = _learn(view, cone, nodes, inputs)
    return _known[key], nodes, inputs


def _learn(view: GraphView, cone: Cone, nodes: list[fx.Node], inputs: list[fx.Node]) -> _Known:
    counts["lifted"] += 1
    try:
        lifted = lift(view, set(cone.nodes), cone.results)
        made = plan(view, lifted)
    except CannotLift as error:
        return _Known(None, (), (), _barrier(view, error, nodes), error.reason)
    except Exception as error:                                            # a fault of ours is a miss, not the user's
        return _Known(None, (), (), nodes.index(cone.sink), f"{type(error).__name__}: {error}".splitlines()[0])
    if not lifted.leaves:
        return _Known(None, (), (), nodes.index(cone.sink), "it reads nothing")
    named = [(p.rule, nodes.index(p.node), tuple(nodes.index(n) for n in p.nodes)) for p in parts(view, cone)]
    return _Known(made, tuple(inputs.index(leaf) for leaf in lifted.leaves), tuple(named))


def _barrier(view: GraphView, error: CannotLift, nodes: list[fx.Node]) -> int | None:
    """Where to cut a cone that has no formula at a node: the first reader of an operand that cannot be one, the node itself, or, where
    only the length of its row does not fit, the place where that row becomes another: behind the node, else before it.
    """
    node = error.node
    if node not in nodes:
        return next((k for k, n in enumerate(nodes) if node in n.all_input_nodes), None)
    if not isinstance(error, OtherRow):
        return nodes.index(node)
    ends = _row_ends(view, node, nodes)
    return ends if ends is not None else next(reversed(_joins(view, node, nodes)), nodes.index(node))


def _row_ends(view: GraphView, node: fx.Node, nodes: list[fx.Node]) -> int | None:
    """Where the rows that a reduction runs over are no rows any more: the first reshape of such a row to another length, or what a
    join puts such a row into a longer one of.
    """
    lengths = [shape_of(view, n)[-1:] for n in (view.op(node).args[0], node)]
    after = {node}
    for k, n in enumerate(nodes):
        sources = [a for a in n.all_input_nodes if a in after]
        after |= {n} if sources else set()
        if view.op(n).kind not in JOINS | {"reshape"} or shape_of(view, n)[-1:] in lengths:
            continue
        for a in (a for a in sources if shape_of(view, a)[-1:] in lengths):
            return k if view.op(n).kind == "reshape" else nodes.index(a)
    return None


def _joins(view: GraphView, node: fx.Node, nodes: list[fx.Node]) -> list[int]:
    """The reshapes behind a reduction whose result has the reduction's row as its last dimension, and whose source has not."""
    row = shape_of(view, view.op(node).args[0])[-1:]
    within = behind(node, set(nodes).__contains__)
    reshapes = [k for k, n in enumerate(nodes) if n in within and view.op(n).kind == "reshape"]
    return [k for k in reshapes if shape_of(view, nodes[k])[-1:] == row != shape_of(view, view.op(nodes[k]).args[0])[-1:]]


def _worthwhile(view: GraphView, region: Region, options: Options) -> bool:
    """Named regions, and unnamed ones that move no more bytes than what they replace, forward and backward.

    One operation by itself moves the same, except a join: its gradients are slices of the result's, which cost eager nothing.
    """
    names = set(region.counts())
    if names & options.disable:
        return False
    if region.parts:
        return True
    wide = [n for n in region.cone.nodes if view.op(n).kind in ARITHMETIC and view.value(n).dim() and _elements(view, n) > 1]
    enough = len(wide) >= 2 or (len(wide) == 1 and view.op(wide[0]).kind not in JOINS)
    return enough and _learns(view, region.cone) and UNNAMED not in options.disable


def _learns(view: GraphView, cone: Cone) -> bool:
    """Whether a gradient flows through the cone; in a graph that computes none (the body of an autograd function) nothing tells."""
    computed = (n for n in view.nodes if n.op.startswith("call"))
    return any(view.needs_grad(n) for n in cone.results) or not any(map(view.needs_grad, computed))


def _elements(view: GraphView, node: fx.Node) -> int:
    value = view.value(node)
    return 2 if any(not isinstance(s, int) for s in value.shape) else value.numel()


def _with_producer(found: Found, growth: Growth, region: Region) -> Region:
    """A residual add that the region reads and others read too, computed in the same kernel and written for them."""
    view, cone = found.view, region.cone
    for leaf in region.operands:
        if not growth.liftable(leaf) or not isinstance(view.example(leaf), torch.Tensor) or leaf in growth.barred or len(cone.results) > 1:
            continue
        inner = growth.grow(leaf)
        computed = {view.op(n).kind for n in inner.nodes} & ARITHMETIC
        if view.op(leaf).kind not in PRODUCERS or view.dtype(leaf) not in FLOATS or not computed or not _as_large(view, leaf, cone.sink):
            continue
        merged = Cone(cone.nodes | inner.nodes, (cone.sink, leaf))
        if len(merged.nodes) > LARGEST or not placeable(view, growth, merged):
            continue
        known, nodes, inputs = _look(view, merged)
        if known.plan is not None:
            made = tuple(Part(r, nodes[k], frozenset(nodes[i] for i in inside)) for r, k, inside in known.parts)
            if Counter(p.rule for p in made) >= Counter(p.rule for p in region.parts):
                return replace(region, cone=merged, plan=known.plan, operands=tuple(inputs[k] for k in known.operands), parts=made)
    return region


def _as_large(view: GraphView, a: fx.Node, b: fx.Node) -> bool:
    """Whether two values hold the same number of elements, whatever the sizes are."""
    return same(sp.Mul(*shape_of(view, a)), sp.Mul(*shape_of(view, b)))


def placeable(view: GraphView, growth: Growth, cone: Cone) -> bool:
    """Whether the cone can run where its first result is made: everything it reads is known there. Then no value moves behind a reader."""
    last = max((growth.order[n] for n in leaves(cone)), default=-1)
    if not all(growth.steady(n, cone.results[-1]) for n in cone.nodes):
        return False
    return last < growth.order[cone.results[-1]] and len({view.grad_enabled(n) for n in cone.nodes}) == 1
