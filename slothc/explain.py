"""``slothc.explain``: what sloth would do with a model, without running a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo.utils import graph_break_reasons

from .breaks import count
from .options import Options
from .report import Report, report
from .rewrite import Rewritten, rewrite


def explain(model: Any, *args: Any, sloth_options: Mapping[str, Any] | None = None, **inputs: Any) -> Report:
    """Capture ``model(*args, **inputs)`` as ``torch.compile`` would and report what was found.

    Nothing is computed and nothing is changed: graphs return placeholders of the right shapes. Works on the CPU, on a GPU and on the meta
    device (a full-size model costs no memory there).
    """
    options = Options.of(sloth_options)
    graphs: list[Rewritten] = []

    def record(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(rewrite(module, options, run=False))
        return _Hollow(module)

    before = len(graph_break_reasons)
    compiled = torch.compile(model, backend=record)
    with torch.random.fork_rng():
        compiled(*args, **inputs)
    return report(graphs, count(graph_break_reasons[before:]))


class _Hollow:
    """Stands for a graph: returns tensors of the right shape, dtype and device that hold no memory."""

    def __init__(self, module: fx.GraphModule) -> None:
        self.outputs = next(n for n in module.graph.nodes if n.op == "output").args[0]

    def __call__(self, *inputs: Any) -> Any:
        return torch.utils._pytree.tree_map(self._value, tuple(self.outputs))

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
