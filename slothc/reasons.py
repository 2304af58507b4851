"""Why a node that no rewrite covers was left as it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from slothc.patterns.meaning import Op

from .coverage import operation
from .regions import ARITHMETIC, FLOATS, VIEWS
from .view import GraphView

SCANS = ("cumsum", "cumprod", "cummax", "logcumsumexp", "associative_scan", "scan", "while_loop")
ORDERS = ("sort", "argsort", "topk", "unique", "histc", "bincount", "nonzero", "searchsorted", "one_hot")
SCATTERS = ("scatter", "index_add", "index_copy", "index_put", "gather", "index_select", "getitem", "take_along_dim", "masked_select")
COPIES = {"cat": "copies into one tensor", "stack": "copies into one tensor", "pad": "copies into a larger tensor", "roll": "a copy"}
MADE = set("arange eye tensor rand randn".split()) | {
    name for made in ("zeros", "ones", "full", "empty") for name in (made, f"{made}_like", f"new_{made}")
}


def why(view: GraphView, node: fx.Node, missed: Mapping[fx.Node, str]) -> str:
    """The reason, for a reader of the model's source. ``missed``: what the search for rules and regions said of nodes."""
    if node in missed:
        return missed[node]
    op, name = view.op(node), operation(node).split(".")[-1]
    if op.params.get("mutates") or view.mutated(node):
        return "written to in place: its value depends on when it is read"
    if op.kind == "embedding" or name == "embedding":
        return "a table look-up: PyTorch's kernel moves no byte too many"
    return _by_name(name) or _by_value(view, node, op, name)


def _by_name(name: str) -> str:
    bare = name.rstrip("_")
    if bare in SCANS:
        return "a scan along a dimension: each element needs the one before"
    if bare in ORDERS:
        return "orders or counts elements: not a formula of rows"
    if bare.startswith(SCATTERS):
        return "addresses elements by values (gather, scatter)"
    if bare in ("_add_batch_dim", "_remove_batch_dim"):
        return "inside vmap"
    return COPIES.get(bare, "makes a tensor from nothing" if bare in MADE else "")


def _by_value(view: GraphView, node: fx.Node, op: Op, name: str) -> str:
    value, kind = view.example(node), op.kind
    values = value if isinstance(value, tuple | list) else (value,)
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    if tensors and all(v.dtype not in FLOATS and not v.dtype.is_complex for v in tensors):
        return "integer or boolean arithmetic"
    if kind == "dropout":
        return "dropout with p > 0"
    if kind in ARITHMETIC | VIEWS:
        if not view.needs_grad(node):
            return "no gradient flows through it, and it stands alone"
        return "stands alone: a kernel of its own would move as many bytes"
    return op.params.get("reason") or f"no formula for {name}"
