"""Which graphs can be replayed at all: what a recording would freeze, or what cannot be done while one is made, is a reason not to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.utils._pytree import tree_leaves

from .checkpointing import checkpointed, draws
from .spellings import target_name
from .spellings_call import example
from .view_children import attribute
from .view_location import location

WAITS = {
    "item", "tolist", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "cpu", "numpy", "bincount",
    "equal", "allclose", "is_nonzero", "_local_scalar_dense", "_unique2", "bool", "__bool__", "__int__", "__float__",
}  # fmt: skip
STATE = ("manual_seed", "set_rng_state", "get_rng_state", "seed", "initial_seed")
KNOWN = {"aten", "prims", "prim", "sloth"}                                # libraries whose operations do nothing behind the stream's back
FREE = {f"bitsandbytes.{name}" for name in ("gemm_4bit", "dequantize_4bit", "dequantize_blockwise")}     # and such operations of others
NESTED = {"wrap_with_autocast", "wrap_with_set_grad_enabled", "autograd_function_apply"}


def device_of(module: fx.GraphModule) -> torch.device | None:
    """The device of the first value that is on an accelerator, or of the first value."""
    devices = [t.device for n in module.graph.nodes if n.users for t in _tensors(n)]
    return next((d for d in devices if d.type not in ("cpu", "meta")), devices[0] if devices else None)


def is_number(node: fx.Node) -> bool:
    """Whether an input is a number that Dynamo hands over as a tensor: on the CPU, and nothing reads it but ``item``."""
    value = example(node)
    if node.op != "placeholder" or not isinstance(value, torch.Tensor) or value.dim() or value.device.type != "cpu":
        return False
    return bool(node.users) and all(target_name(u).rsplit(".", 1)[-1] == "item" for u in node.users)


def obstacle(module: fx.GraphModule, device: torch.device) -> str | None:
    """Why ``module`` cannot be recorded on ``device``, with the place; None if nothing is known against it."""
    for part in [m for m in module.modules() if isinstance(m, fx.GraphModule)]:
        for node in part.graph.nodes:
            reason = _against(part, node, device) if node.users or node.op.startswith("call") else None
            if reason is not None:
                return f"{reason} at {location(node)}"
    return None


def _against(module: fx.GraphModule, node: fx.Node, device: torch.device) -> str | None:
    if is_number(node) or (node.all_input_nodes and all(map(is_number, node.all_input_nodes))):
        return None
    values = list(_tensors(node))
    found = attribute(module, node)
    values += [found] if isinstance(found, torch.Tensor) else []
    other = next((t.device for t in values if t.device != device), None)
    if other is not None:
        return f"a value on {other}"
    if any(_unbacked(s) for t in values for s in t.shape) or _unbacked(example(node)):
        return "a size that depends on values"
    return _call_against(module, node) if node.op.startswith("call") else None


def _call_against(module: fx.GraphModule, node: fx.Node) -> str | None:
    target, name = node.target, target_name(node).rsplit(".", 1)[-1]
    if isinstance(target, HigherOrderOperator):
        return None if name in NESTED else f"the operation {name}"
    if isinstance(target, OpOverload | OpOverloadPacket):
        library = str(target._qualified_op_name if isinstance(target, OpOverloadPacket) else target.namespace).split("::")[0]
        if library not in KNOWN and target_name(node) not in FREE:
            return f"an operation of the library {library}"
    if name in WAITS or (name == "repeat_interleave" and len(node.all_input_nodes) > 1 and "output_size" not in node.kwargs):
        return f"{name}, which waits for the device,"
    if name == "histc" and not _bounded(node):
        return "histc without bounds, which waits for the device,"
    if name in STATE:
        return f"{name}, which sets the state of random numbers,"
    if name == "requires_grad_" and any(u.op == "output" for n in (node, node.args[0]) if isinstance(n, fx.Node) for u in n.users):
        return "a leaf that is made inside and returned,"                  # its .grad would be another's
    if target is checkpointed and isinstance(node.args[0], fx.Node):
        body: Any = attribute(module, node.args[0])
        if not isinstance(body, fx.GraphModule) or draws(body):
            return "a checkpoint that draws random numbers"
    return None


def _bounded(node: fx.Node) -> bool:
    """Whether a histogram's bounds are given: two numbers that differ. It looks for them in the values otherwise."""
    low, high = (node.kwargs.get(k, node.args[2 + i] if len(node.args) > 2 + i else 0) for i, k in enumerate(("min", "max")))
    return isinstance(low, int | float) and isinstance(high, int | float) and low != high


def _tensors(node: fx.Node) -> Iterator[torch.Tensor]:
    yield from (t for t in tree_leaves(example(node)) if isinstance(t, torch.Tensor))


def _unbacked(size: Any) -> bool:
    if not isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
        return False
    return any(str(s).startswith(("u", "zuf")) for s in size.node.expr.free_symbols)
