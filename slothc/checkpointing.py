"""Gradient checkpointing of child graphs with the forward's random numbers.

``tag_activation_checkpoint`` leaves random numbers to AOTAutograd: run as it is, it draws other dropout masks when it recomputes, and the
gradients belong to no loss. A graph that runs without AOTAutograd calls ``torch.utils.checkpoint`` itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from .held import recording
from .recompute import fits, recomputed
from .spellings import target_name

RANDOM = {
    "rand", "randn", "randint", "rand_like", "randn_like", "randint_like", "randperm", "bernoulli", "bernoulli_", "multinomial", "normal",
    "normal_", "uniform_", "exponential_", "geometric_", "cauchy_", "log_normal_", "random_", "rrelu", "rrelu_", "gumbel_softmax",
    "poisson",
}  # fmt: skip


def checkpointed(body: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    """``body(*args)``, recomputed in the backward from the same random state. ``kwargs`` are those of the call in the model."""
    chosen = {"preserve_rng_state": True, **kwargs, "use_reentrant": False}
    if recording() and not draws(body):
        chosen["preserve_rng_state"] = False                              # reading the state is refused while a CUDA graph records
    if fits(body, chosen, args):
        return recomputed(body, args, chosen["preserve_rng_state"])
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


def draws(module: fx.GraphModule) -> bool:
    """Whether something in the graph or its child graphs may draw random numbers."""
    return any(_draws(n) for m in module.modules() if isinstance(m, fx.GraphModule) for n in m.graph.nodes if n.op.startswith("call"))


def _draws(node: fx.Node) -> bool:
    name = target_name(node).rsplit(".", 1)[-1]
    if "scaled_dot_product" in name:
        return bool(node.kwargs.get("dropout_p", node.args[4] if len(node.args) > 4 else 0.0) != 0.0)
    if "dropout" in name:
        probability = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
        return bool(probability != 0.0) and training is not False
    return name in RANDOM or bool(getattr(node.target, "dropout_p", 0.0) != 0.0)
