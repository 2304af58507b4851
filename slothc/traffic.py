"""The bytes that a node moves when it runs by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator

from slothc.patterns.meaning import Op

from .narrowed import NARROWED
from .regions import VIEWS
from .spellings import target_name
from .view import GraphView

MATRIX = {"linear", "matmul", "baddbmm", "sdpa"}
PRODUCTS = ("mm", "conv", "einsum", "attention", "solve_triangular")
MAPPED = ("_add_batch_dim", "_remove_batch_dim")                          # views
CALLS = ("autograd_function_apply", "tag_activation_checkpoint", "wrap", "invoke_subgraph")


def traffic(view: GraphView, node: fx.Node) -> int:
    """Bytes that the node reads and writes when it runs by itself; views, matrix products and autocast's own casts count nothing.

    Dynamic sizes count with the value they had at capture.
    """
    op = view.op(node)
    if node.op not in ("call_function", "call_method") or op.kind in MATRIX | {"detach", "whole"} or NARROWED in node.meta:
        return 0
    if (op.kind in VIEWS and not op.params.get("clone")) or target_name(node) in MAPPED:
        return 0
    if isinstance(node.target, HigherOrderOperator) and target_name(node).startswith(CALLS):
        return 0                                                           # what it runs is in a graph of its own
    if any(word in str(getattr(node.target, "__name__", node.target)) for word in PRODUCTS):
        return 0
    written = bytes_of(view.example(node))
    if op.kind == "empty":
        return 0                                                           # memory is reserved, nothing moves
    if op.kind == "write":
        return 2 * _part_bytes(view, op)                                   # in place: the part that is written, not the whole
    if op.kind in ("embedding", "gather") or target_name(node) == "embedding":
        return 2 * written                                                 # the rows it looks up, not the table
    return written + sum(bytes_of(view.example(n)) for n in node.all_input_nodes) if written else 0


def _part_bytes(view: GraphView, op: Op) -> int:
    """The bytes of the part of a tensor that a write goes to."""
    x = view.value(op.args[0])
    sizes, count = iter(x.shape), x.element_size()
    for item in (i for i in op.params["items"] if i is not None):
        size = _number(next(sizes))
        count *= len(range(size)[item]) if isinstance(item, slice) else 1
    return count


def bytes_of(value: Any) -> int:
    """The bytes of a tensor, or of a tuple's tensors; elements that are one in memory count once."""
    if isinstance(value, tuple | list):
        return sum(map(bytes_of, value))
    if not isinstance(value, torch.Tensor):
        return 0
    count = 1
    for size, stride in zip(value.shape, value.stride()):
        count *= 1 if _number(stride) == 0 else _number(size)
    return count * value.element_size()


def _number(size: int | torch.SymInt) -> int:
    return size if isinstance(size, int) else int(size.node.hint or 1)
