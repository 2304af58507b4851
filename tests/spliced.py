"""One rule's matches replaced in a graph, with nothing else around it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from slothc.patterns.cross_entropy import RULE

from slothc.bind.cross_entropy import bind
from slothc.view import GraphView

V = 33


class Splice:
    """A Dynamo backend that replaces every match and remembers what it found."""

    def __init__(self):
        self.matches, self.misses, self.graphs = [], [], []

    def __call__(self, graph_module, example_inputs):
        graph, view = graph_module.graph, GraphView(graph_module)
        self.graphs.append(graph_module)
        replacements = []
        for node in graph.nodes:
            found = RULE.recognise(view, node)
            if found is None:
                continue
            (self.matches if found else self.misses).append(found)
            replacements += bind(found) if found else []
        for r in replacements:
            with graph.inserting_before(r.node):
                new = graph.call_function(r.target, r.args, dict(r.kwargs))
            r.node.replace_all_uses_with(new)
        graph.eliminate_dead_code()
        graph.lint()
        graph_module.recompile()
        return graph_module.forward


def spliced(function, *args, dynamic=False):
    torch._dynamo.reset()
    backend = Splice()
    return backend, torch.compile(function, backend=backend, dynamic=dynamic, fullgraph=True)(*args)


def linears(graph_module):
    return [n for n in graph_module.graph.nodes if n.target in (F.linear, torch._C._nn.linear)]


def same(ours, eager, leaves, tolerance=1e-5):
    """Values and gradients agree, each as a whole."""
    pairs = [(ours, eager)]
    pairs += zip(*(torch.autograd.grad(x.float().sum(), leaves, retain_graph=True) for x in (ours, eager)))
    for a, b in pairs:
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


def rows(z):
    return z.reshape(-1, z.shape[-1])
