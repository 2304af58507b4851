"""Lifting a plain torch function: capture it as Dynamo captures a model, find its region."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .found import Found, Region, find
from .options import Options
from .view import GraphView


def captured(function: Callable[..., Any], arguments: Sequence[Any]) -> fx.GraphModule:
    """The one graph Dynamo makes of ``function(*arguments)``."""
    graphs: list[fx.GraphModule] = []

    def record(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    torch.compile(function, backend=record, fullgraph=True, dynamic=False)(*arguments)
    torch._dynamo.reset()
    return graphs[0]


def found_in(function: Callable[..., Any], arguments: Sequence[Any], dtype: torch.dtype = torch.float32) -> Found:
    """What the rewrite finds in a function; floating-point arguments are cast to ``dtype`` and want gradients."""
    values = [a.to(dtype).requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    return find(GraphView(captured(function, values)), Options())


def region_of(function: Callable[..., Any], arguments: Sequence[Any], dtype: torch.dtype = torch.float32) -> Region:
    """The region that holds the function's result. Raises ValueError with the misses where there is none."""
    found = found_in(function, arguments, dtype)
    if not found.regions:
        raise ValueError("no region: " + "; ".join(m.reason for m in found.misses))
    return found.regions[0]
