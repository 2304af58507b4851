"""The Dynamo backend."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.registry import lookup_backend

from . import recorder
from .checkpointing import keep_random_states
from .errors import RegionDropped
from .graphed import graphed
from .options import Options
from .rewrite import rewrite
from .taught import as_it_stands


@as_it_stands
def sloth(
    module: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, **more: Any
) -> Callable[..., Any]:
    """``torch.compile(model, backend="sloth", options={...})``: rewrite the graph, run it.

    Raises ``slothc.errors.OptionError`` for unknown options or values; nothing else: what is not understood runs eagerly.
    """
    chosen = Options.of({**(options or {}), **more})
    kept = _copy(module)
    try:
        with recorder.alone, torch._dynamo.utils.preserve_rng_state():
            rewrite(module, chosen)
    except Exception as error:
        warnings.warn(f"sloth leaves a whole graph to eager: {type(error).__name__}: {error}", RegionDropped, stacklevel=2)
        module.graph = kept
        module.recompile()
    if chosen.rest == "inductor":
        return lookup_backend("inductor")(module, list(example_inputs))
    keep_random_states(module)
    return graphed(module) if chosen.cuda_graphs else module.forward


def _copy(module: fx.GraphModule) -> fx.Graph:
    graph = fx.Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return graph


def register() -> None:
    """Make ``backend="sloth"`` known to torch, also where the package is imported from a checkout that is not installed.

    Torch loads the entry point when it is asked for; loading it imports this package, so nothing more may be registered here.
    """
    from torch._dynamo.backends import registry

    registry._BACKENDS.setdefault("sloth", EntryPoint("sloth", "slothc.backend:sloth", "torch_dynamo_backends"))
