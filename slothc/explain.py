"""``slothc.explain``: what sloth would do with a model, without running a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import graph_break_reasons

from .breaks import count
from .options import Options
from .report import Report, report
from .rewrite import Rewritten, rewrite
from .taught import as_it_stands

# What explain compiles is no recompilation of anything else; before torch 2.13 there was no such promise.
ISOLATED: dict[str, Any] = {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}


def explain(model: Any, *args: Any, sloth_options: Mapping[str, Any] | None = None, **inputs: Any) -> Report:
    """Capture ``model(*args, **inputs)`` as ``torch.compile`` would and report what was found.

    Nothing is computed and nothing is changed: graphs return placeholders of the right shapes. Works on the CPU, on a GPU and on the meta
    device (a full-size model costs no memory there). Only where Dynamo makes more than one graph, what runs between two of them may depend
    on their values: then they are computed, unless the model is on the meta device.
    """
    options = Options.of(sloth_options)
    first = len(graph_break_reasons)
    try:
        graphs = _captured(model, args, inputs, options, _Hollow)
    except Exception:
        if first == len(graph_break_reasons) or _on_meta(model, args, inputs):
            raise
        graphs = []
    if len(graphs) != 1 and not _on_meta(model, args, inputs):
        first = len(graph_break_reasons)
        graphs = _captured(model, args, inputs, options, _Computed)
    return report([(made, max(stand.calls, 1)) for made, stand in graphs], count(graph_break_reasons[first:]))


def _captured(
    model: Any, args: tuple[Any, ...], inputs: Mapping[str, Any], options: Options, kind: type[_Stand]
) -> list[tuple[Rewritten, _Stand]]:
    """Every graph of one call, with what stood for it."""
    graphs: list[tuple[Rewritten, _Stand]] = []

    def record(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append((rewrite(module, options, run=False), kind(module)))
        return graphs[-1][1]

    backend = as_it_stands(record) if options.rest == "eager" else record
    compiled = torch.compile(model, backend=backend, **ISOLATED)
    with torch.random.fork_rng():
        compiled(*args, **inputs)
    return graphs


def _on_meta(*given: Any) -> bool:
    tensors = [v for v in torch.utils._pytree.tree_leaves(given[1:]) if isinstance(v, torch.Tensor)]
    if isinstance(given[0], torch.nn.Module):
        tensors += given[0].parameters()
    return any(t.is_meta for t in tensors)


class _Stand:
    """Stands for a graph; ``calls`` is how often it ran."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.module, self.calls = module, 0

    def __call__(self, *inputs: Any) -> Any:
        self.calls += 1
        return self.run(*inputs)

    def run(self, *inputs: Any) -> Any:
        raise NotImplementedError


class _Computed(_Stand):
    """Runs the graph as it is."""

    def run(self, *inputs: Any) -> Any:
        return self.module(*inputs)


class _Hollow(_Stand):
    """Returns tensors of the right shape, dtype and device that hold no memory."""

    def run(self, *inputs: Any) -> Any:
        outputs = next(n for n in self.module.graph.nodes if n.op == "output").args[0]
        return torch.utils._pytree.tree_map(self._value, tuple(outputs))

    @staticmethod
    def _value(node: Any) -> Any:
        example = node.meta.get("example_value") if isinstance(node, fx.Node) else node
        if not isinstance(example, torch.Tensor):
            return _hint(example)
        shape = [_hint(s) for s in example.shape]
        made = torch.zeros((), dtype=example.dtype, device=example.device).expand(shape)
        return made.requires_grad_() if example.requires_grad and made.is_floating_point() else made


def _hint(value: Any) -> Any:
    return int(value.node.hint) if isinstance(value, torch.SymInt) else value
