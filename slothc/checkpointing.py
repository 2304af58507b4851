"""Gradient checkpointing of child graphs with the forward's random numbers.

``tag_activation_checkpoint`` leaves random numbers to AOTAutograd: run as it is, it draws other dropout masks when it recomputes, and the
gradients belong to no loss. A graph that runs without AOTAutograd calls ``torch.utils.checkpoint`` itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint


def checkpointed(body: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    """``body(*args)``, recomputed in the backward from the same random state. ``kwargs`` are those of the call in the model."""
    chosen = {"preserve_rng_state": True, **kwargs, "use_reentrant": False}
    if "_checkpoint_context_fn" in body.meta:
        chosen["context_fn"] = body.meta["_checkpoint_context_fn"]
    return checkpoint(body.forward, *args, **chosen)


def keep_random_states(module: fx.GraphModule) -> None:
    """Give every checkpoint in the graph and its child graphs the forward's random state, in place."""
    op = torch.ops.higher_order.tag_activation_checkpoint
    for graph_module in [m for m in module.modules() if isinstance(m, fx.GraphModule)]:
        found = [n for n in graph_module.graph.nodes if n.op == "call_function" and n.target is op]
        for node in found:
            node.target = checkpointed
        if found:
            graph_module.recompile()
