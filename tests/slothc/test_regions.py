"""Cones: what grows together, what stays an operand, and that no region contains a path through the outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import networkx as nx
import torch
import torch.nn.functional as F
from forms import rms_norm
from torch import Tensor, fx

from slothc.capture import captured, found_in
from slothc.found import Found
from slothc.regions import Cone, Growth, leaves
from slothc.statistics import counts
from slothc.view import GraphView


def grown(function: Callable[..., Any], *arguments: Tensor) -> tuple[GraphView, Growth, Cone]:
    """The cone of the function's result."""
    view = GraphView(captured(function, [a.requires_grad_() for a in arguments]))
    growth = Growth(view, set())
    result = next(n for n in view.nodes if n.op == "output").args[0][0]
    return view, growth, growth.grow(result)


def names(nodes: Any) -> set[str]:
    return {getattr(n.target, "__name__", str(n.target)) for n in nodes}


def x() -> Tensor:
    return torch.randn(2, 5, 48)


def test_a_cone_is_everything_that_only_its_value_reads() -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        h = torch.tanh(a)
        return (h * h + torch.exp(b)) * 2.0

    _, _, cone = grown(function, x(), x())
    assert len(cone.nodes) == 5
    assert all(n.op == "placeholder" for n in leaves(cone)) and len(leaves(cone)) == 2


def test_what_others_read_stays_an_operand() -> None:
    def function(a: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(a)
        return torch.exp(h) * 2.0, h @ w

    _, _, cone = grown(function, x(), torch.randn(48, 48))
    assert names(leaves(cone)) == {"tanh"} and len(cone.nodes) == 2


def test_matmuls_and_barred_nodes_end_a_cone() -> None:
    def function(a: Tensor, w: Tensor) -> Tensor:
        return torch.tanh(F.silu(torch.tanh(a @ w) * 2.0)) + 1.0

    _, growth, cone = grown(function, x(), torch.randn(48, 48))
    assert not any(n.op == "placeholder" for n in leaves(cone)) and len(cone.nodes) == 5
    growth.barred |= {n for n in cone.nodes if "silu" in str(n)}
    assert names(leaves(growth.grow(cone.sink))) == {"silu"}
    growth.claim(cone)
    assert not any(growth.liftable(n) for n in cone.nodes)


def test_a_change_of_grad_mode_ends_a_cone() -> None:
    def function(a: Tensor) -> Tensor:
        with torch.no_grad():
            s = a.abs().amax(-1, keepdim=True) + 1.0
        return torch.tanh(a / s)

    view, _, cone = grown(function, x())
    assert {view.grad_enabled(n) for n in cone.nodes} == {True}
    assert names(cone.nodes).isdisjoint({"amax", "abs"})


def test_regions_do_not_overlap_and_are_convex() -> None:
    def function(a: Tensor, w: Tensor, m: Tensor) -> Tensor:
        h = a + F.silu(a) * 2.0
        n = rms_norm(h, w)
        h = h + torch.tanh(n @ m) * n
        return rms_norm(h, w) * 2.0

    found = found_in(function, [x(), torch.randn(48), torch.randn(48, 48)])
    assert len(found.regions) >= 2
    seen: set[fx.Node] = set()
    for region in found.regions:
        assert seen.isdisjoint(region.cone.nodes)
        seen |= region.cone.nodes
        assert convex(found, region.cone)


def convex(found: Found, cone: Cone) -> bool:
    """No path leaves the cone and comes back."""
    graph = nx.DiGraph((a, n) for n in found.view.nodes for a in n.all_input_nodes)
    outside = graph.subgraph(set(graph) - cone.nodes)
    out = {u for n in cone.nodes for u in graph.successors(n) if u not in cone.nodes}
    back = {a for n in cone.nodes for a in graph.predecessors(n) if a not in cone.nodes}
    return not any(nx.has_path(outside, u, a) for u in out for a in back)


def test_identical_layers_are_lifted_once() -> None:
    def function(a: Tensor, w: Tensor) -> Tensor:
        for _ in range(4):
            a = torch.nn.functional.linear(rms_norm(a, w), torch.eye(48))
        return a

    before = counts["lifted"]
    found = found_in(function, [x(), torch.randn(48)])
    assert len(found.regions) == 4 and len({r.plan.key for r in found.regions}) == 1
    assert counts["lifted"] - before <= 2                                  # the eye matrix's cone, and the norm's


def test_a_lone_operation_is_left_alone() -> None:
    """One pointwise operation spares no trip through memory."""
    assert not found_in(lambda a: torch.tanh(a), [x()]).regions
