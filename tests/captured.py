"""Every graph that Dynamo makes of a model, looked at as ``slothc.explain`` looks at it, and run: what comes next may read its values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

from slothc.options import Options
from slothc.rewrite import Rewritten, rewrite


def graphs_of(model: nn.Module, **inputs: Any) -> list[Rewritten]:
    """The graphs of one call, child graphs included."""
    found: list[Rewritten] = []

    def record(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(rewrite(module, Options(), run=False))
        return module.forward

    torch._dynamo.reset()
    with torch.random.fork_rng():
        torch.compile(model, backend=record)(**inputs)
    torch._dynamo.reset()
    return [r for g in found for r in g.all()]
