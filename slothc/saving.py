"""Which forward values the backward reads from memory and which it recomputes: a minimum cut over bytes.

Every value the backward needs must be reachable from what is saved. Each value is an edge whose capacity is what storing it costs, in
bytes for each element of a row; a reduction may instead be recomputed at the price of another pass. Inputs come from the source, the
values the backward names flow to the sink, and the cheapest cut is what to save.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

import networkx as nx

from slothc.gradients.program import Kind, Program, Reduce, Stage

BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0}
SCALAR_BYTES = 4.0 / 256           # one fp32 for each row, spread over a typical row
WRITTEN = 0.99                     # a result is read, as an operand is, but not written once more
PASS_BYTES = 0.25                  # recomputing a reduction: a pass over a row that is in registers already


def saved_stages(forward: Program, backward: Program, results: Set[str] = frozenset()) -> set[str]:
    """The forward stages to store for the backward; everything else is recomputed from the inputs. ``results`` are in memory anyway."""
    shared = [s for s in backward.stages if s.name in forward.stage and s == forward.stage[s.name]]
    if not shared:
        return set()
    graph = _network(forward, backward, shared, results)
    if "sink" not in graph:
        return set()
    _, (near, _) = nx.minimum_cut(graph, "source", "sink")
    return {s.name for s in shared if ("in", s.name) in near and ("out", s.name) not in near}


def _network(forward: Program, backward: Program, shared: Sequence[Stage], results: Set[str]) -> nx.DiGraph:
    """Values from "source" (what is in memory) to "sink" (the backward's own stages); what a cut goes through is stored."""
    names = {s.name for s in shared}
    graph = nx.DiGraph()
    for i in backward.inputs:
        if i.name in forward.input:
            graph.add_edge("source", ("in", i.name))
            graph.add_edge(("in", i.name), ("out", i.name), capacity=_cost(i.kind, i.dtype))
    for s in shared:
        cost = _cost(forward.kinds[s.name], s.dtype)
        graph.add_edge(("in", s.name), ("out", s.name), capacity=cost * (WRITTEN if s.name in results else 1.0))
        for x in s.expr.free_symbols:
            graph.add_edge(("out", x.name), ("in", s.name))
        if isinstance(s.value, Reduce):
            graph.add_edge("source", ("in", s.name), capacity=PASS_BYTES)
    for s in backward.stages:
        if s.name not in names:
            for x in s.expr.free_symbols:
                if x.name in names or x.name in forward.input:
                    graph.add_edge(("out", x.name), "sink")
    return graph


def _cost(kind: Kind, dtype: str | None) -> float:
    if kind.rows and kind.lanes:
        return BYTES.get(dtype or "fp32", 4.0)
    return SCALAR_BYTES if kind.rows else 1e-6
