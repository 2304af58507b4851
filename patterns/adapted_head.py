"""A head with low-rank adapters: Z = H W^T + b + sum of s (L B^T + c), where L = H A^T is a node of the graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from .lora_linear import FLOATS, Base, Branch, adapted
from .meaning import View


@dataclass(frozen=True)
class AdaptedHead:
    """``linear``: the base. ``adapters``: of each low (the node of L), up (B), c, scale and factor, s being scale * factor. ``inside``: the
    nodes from the base and L to the sum. ``reason``: why it cannot be taken, empty where it can.
    """

    linear: fx.Node
    adapters: tuple[dict[str, Any], ...]
    inside: tuple[fx.Node, ...]
    reason: str = ""


def adapted_head(view: View, node: fx.Node) -> AdaptedHead | None:
    """The adapted linear whose sum is ``node``; None where it is not one."""
    found = adapted(view, node)
    if found is None:
        return None
    base, branches = found
    adapters = tuple({"low": n.down, "up": n.b, "c": n.bias, "scale": n.scale, "factor": n.factor} for n in branches)
    inside = [node, *base.inside, *(n for branch in branches for n in branch.inside if n is not branch.down)]
    reasons = (_unfit(view, node, base, branch) for branch in branches)
    return AdaptedHead(base.linear, adapters, tuple(dict.fromkeys(inside)), next(filter(None, reasons), ""))


def _unfit(view: View, node: fx.Node, base: Base, branch: Branch) -> str:
    low, up, sum_, weight = (view.value(n) for n in (branch.down, branch.up, node, base.weight))
    if view.op(branch.up).params.get("layout", "nk") != "nk":
        return "the head's adapter is stored [in, out]"
    if low.dtype not in FLOATS or low.dtype is not up.dtype:
        return f"the two products of the head's adapter are {low.dtype} and {up.dtype}"
    if low.shape[-1] >= min(weight.shape):
        return f"rank {low.shape[-1]} is not below {min(weight.shape)}: a sum of two heads"
    if view.value(base.linear).shape != sum_.shape or low.shape[:-1] != view.value(base.x).shape[:-1]:
        return "the head's adapter is of another shape than the head"
    return ""
