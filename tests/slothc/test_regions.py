"""Cones: what grows together, what stays an operand, and that no region contains a path through the outside."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import networkx as nx
import torch
import torch.nn.functional as F
from forms import rms_norm
from torch import Tensor, fx

from slothc.capture import captured, found_in
from slothc.errors import RegionDropped
from slothc.found import MOST, Found, find
from slothc.lift_loader import LONGEST
from slothc.options import Options
from slothc.regions import LARGEST, Cone, Growth, leaves
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


def parts(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Counter[str]:
    """How often each rule names something in the function's regions."""
    return sum((Counter(p.rule for p in r.parts) for r in found_in(function, [torch.randn(s) for s in shapes]).regions), Counter())


def turned(x: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """Every pair of neighbours turned by its angle."""
    return x * c + torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2) * s


def test_a_softmax_over_another_dimension_is_cut_off_by_itself() -> None:
    """It has no formula in any region, so that nothing behind it needs to be cut: the norm and the turn of what it weighs stay whole."""

    def pooled(x: Tensor, gate: Tensor, w: Tensor, c: Tensor, s: Tensor) -> Tensor:
        h = rms_norm((x * gate.softmax(2)).sum(2), w)
        return torch.cat((h[..., :8], turned(h[..., 8:], c, s)), dim=-1)

    heads, angles = (2, 4, 8, 16), (2, 4, 8)
    assert parts(pooled, heads, heads, (16,), angles, angles) == Counter({"rms_norm": 1, "rope": 1})


def test_a_shorter_row_is_cut_where_it_joins_the_longer_one() -> None:
    """The norm and the turn of a row that becomes a part of another one, by a cat or by a write, are a region of their own."""

    def joined(x: Tensor, r: Tensor, w: Tensor, c: Tensor, s: Tensor) -> Tensor:
        return torch.cat((x * 2.0, turned(rms_norm(r, w), c, s).expand(2, 4, 5, 8)), dim=-1)

    def written(x: Tensor, r: Tensor, w: Tensor, c: Tensor, s: Tensor) -> Tensor:
        keys = x.new_empty(2, 4, 5, 24)
        keys[..., :16] = x * 2.0
        keys[..., 16:] = turned(rms_norm(r, w), c, s)
        return keys

    for function in (joined, written):
        assert parts(function, (2, 4, 5, 16), (2, 1, 5, 8), (8,), (5, 8), (5, 8)) == Counter({"rms_norm": 1, "rope": 1})


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


def test_a_lone_operation_moves_what_eager_moves() -> None:
    """One pointwise operation is a region; a lone join is none: its gradients are views of the result's, which cost eager nothing."""
    (region,) = found_in(lambda a, w: torch.tanh(a @ w) @ w, [x(), torch.randn(48, 48)]).regions
    assert names(region.cone.nodes) == {"tanh"}
    joined = found_in(lambda a, w: torch.cat((a @ w, a @ w), dim=-1) @ torch.cat((w, w)), [x(), torch.randn(48, 48)])
    assert not any(names(r.cone.nodes) & {"cat"} for r in joined.regions)


def test_a_sum_has_no_backward_kernel() -> None:
    """The gradient of a lone sum is the result's, handed on as it is; that of a broadcast term is summed."""
    (region,) = found_in(lambda a, b, w: (a @ w + b) @ w, [x(), x(), torch.randn(48, 48)]).regions
    assert region.plan.targets == (-1, -1) and region.plan.backward is not None and not region.plan.backward.writes
    (region,) = found_in(lambda a, b, w: (a @ w + b) @ w, [x(), torch.randn(48), torch.randn(48, 48)]).regions
    assert sorted(region.plan.targets) == [-1, 0]


def test_a_sum_read_through_a_view_is_written_for_others_too() -> None:
    """A residual whose rows are merged before the norm: one kernel writes the norm and the sum."""

    def function(a: Tensor, b: Tensor, w: Tensor, m: Tensor) -> Tensor:
        h = (a @ m + b).reshape(-1, 48)
        return rms_norm(h, w) @ m + h

    found = found_in(function, [x(), x(), torch.randn(48), torch.randn(48, 48)])
    assert sorted(len(r.cone.results) for r in found.regions) == [1, 2]


def test_the_body_of_an_autograd_function_is_fused() -> None:
    """There nothing wants a gradient; elsewhere such values are tables made once, and left alone."""
    found = found_in(lambda a: (torch.sin(a.detach() * 2.0) + 1.0) @ a.transpose(1, 2), [x()])
    assert not found.regions
    view = GraphView(captured(lambda a: torch.sin(a * 2.0) + 1.0, [x()]))
    assert len(find(view, Options()).regions) == 1


def test_an_unrolled_recurrence_is_cut_off() -> None:
    """One formula for each step, each with its own plan and check, would make compiling endless."""

    def function(a: Tensor, w: Tensor) -> Tensor:
        for k in range(MOST + 5):
            a = torch.tanh(a @ w) * (k + 2.5)
        return a

    found = found_in(function, [x(), torch.randn(48, 48)])
    assert len(found.regions) == MOST and any("different formulas" in m.reason for m in found.misses)


def test_of_too_many_formulas_the_largest_stay() -> None:
    """The small ones come last in the graph, where the search begins."""

    def function(a: Tensor, w: Tensor) -> Tensor:
        a = torch.tanh(a) * 0.5 @ w
        b = a[:, :1]
        for k in range(MOST + 5):
            b = torch.tanh(b @ w) * (k + 2.5)
        return b

    found = find(GraphView(captured(function, [x(), torch.randn(48, 48)])), Options())
    sizes = [found.view.value(r.cone.sink).numel() for r in found.regions]
    assert len(sizes) == MOST and max(sizes) == x().numel()


def test_a_formula_ends_where_it_grows_too_long() -> None:
    def chain(a: Tensor, b: Tensor) -> Tensor:
        for k in range(LARGEST):
            a = torch.tanh(a) * b + k
        return a

    def pieces(a: Tensor) -> Tensor:
        for k in range(30):
            a = torch.cat([p * k + 1.5 for p in torch.tanh(a).split(3, dim=-1)], dim=-1)
        return a

    regions = found_in(chain, [x(), x()]).regions
    assert sum(len(r.cone.nodes) for r in regions) == 3 * LARGEST and max(len(r.cone.nodes) for r in regions) == LARGEST
    lengths = [len(r.plan.forward.program.stages) for r in found_in(pieces, [x()]).regions]
    assert len(lengths) > 1 and max(lengths) <= LONGEST


def test_what_reads_nothing_is_no_region() -> None:
    """A number for each sequence, made of sizes alone, that leaves the graph (X-MOD's languages)."""

    def function(a: Tensor) -> Tensor:
        numbers = 0 * torch.ones(2, device=a.device)
        torch._dynamo.graph_break()
        return torch.tanh(a) * 2 + numbers.sum()

    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("error", RegionDropped)
        given = x()
        torch.testing.assert_close(torch.compile(function, backend="sloth")(given), function(given))
