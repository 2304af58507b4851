"""The Dynamo backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .options import Options
from .rewrite import rewrite


def sloth(module: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, **more: Any) -> Callable[..., Any]:
    """``torch.compile(model, backend="sloth", options={...})``: rewrite the graph, run it.

    Raises ``slothc.errors.OptionError`` for unknown options or values; nothing else: what is not understood runs eagerly.
    """
    chosen = Options.of({**(options or {}), **more})
    with torch._dynamo.utils.preserve_rng_state():
        rewrite(module, chosen)
    if chosen.rest == "inductor":
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(module, list(example_inputs))
    return module.forward
