"""Sums of a base in four bits and its adapters that autocast leaves in fp32, as sums in 16 bits.

    y = fp32(x W') + fp32(s (x A') B')        y = fp32(x W' + s (x A') B')

Beside hidden states in fp32 (PEFT's ``prepare_model_for_kbit_training``) the library widens its product, and PEFT adds to that what
autocast computed in 16 bits, widened by a cast on a CPU and by the sum on a GPU. Both terms are rounded then: their sum in one
accumulator, rounded once, is as near to the truth, so the rule for adapted linears may have it. Where it does not take it, the sum in fp32
has its place again (``restore``): two roundings more are nobody's wish.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from slothc.kernels.products import LOW
from slothc.patterns import lora_linear
from slothc.patterns.rule import Match

from .four_bit import INSTEAD
from .narrowed import in_dtype
from .options import Options
from .view import GraphView

SUM = "sloth_fp32_sum"                    # in the meta of a widened sum: (the sum in 16 bits, the sum whose place it has)


def narrow_sums(view: GraphView, options: Options) -> bool:
    """Rewrite the graph of ``view`` as above, where the rule takes the sum; whether anything changed."""
    if lora_linear.NAME in options.disable:
        return False
    made = [cast for node in view.nodes if (cast := _narrowed(view, node)) is not None]
    if not made:
        return False
    view = view.again()
    taken = {n for node in view.nodes if view.alive(node) and isinstance(m := lora_linear.recognise(view, node), Match) for n in m.nodes}
    for cast in made:
        if cast.meta[SUM][0] not in taken:
            cast.replace_all_uses_with(cast.meta.pop(SUM)[1])
    return True


def restore(graph: fx.Graph) -> None:
    """Sums that nothing took in are what they were."""
    for node in graph.nodes:
        before = node.meta.get(SUM)
        if before is not None and node.users and node.args[0] is before[0]:
            node.replace_all_uses_with(before[1])


def _narrowed(view: GraphView, node: fx.Node) -> fx.Node | None:
    """The sum at ``node`` made of 16-bit terms, and widened; None where it is no such sum."""
    if node.op != "call_function" or not view.alive(node):
        return None
    op = view.op(node)
    if op.kind != "pointwise" or op.params.get("fn") != "add" or len(op.args) != 2 or not all(isinstance(a, fx.Node) for a in op.args):
        return None
    if not isinstance(view.example(node), torch.Tensor) or view.dtype(node) is not torch.float32:
        return None
    base, adapter = _widened(view, op.args[0]), _widened(view, op.args[1])
    if base is None or adapter is None or view.dtype(base) is not view.dtype(adapter) or not _of_four_bits(base):
        return None
    if view.value(base).shape != view.value(node).shape or view.value(adapter).shape != view.value(node).shape:
        return None
    graph = view.graph_module.graph
    with graph.inserting_after(node):
        total = graph.call_function(operator.add, (base, adapter))
    with graph.inserting_after(total):
        cast = graph.call_method("to", (total, torch.float32))
    total.meta = {**node.meta, "example_value": in_dtype(view.value(node), view.dtype(base))}
    node.replace_all_uses_with(cast)
    cast.meta = {**node.meta, SUM: (total, node)}
    return cast


def _widened(view: GraphView, node: Any) -> fx.Node | None:
    """The value in 16 bits behind copies and the cast that widened it, or that the sum itself widens; of a sum made here, the sum."""
    while isinstance(node, fx.Node):
        if SUM in node.meta:
            return node.meta[SUM][0]
        op = view.op(node)
        if isinstance(view.example(node), torch.Tensor) and view.dtype(node) in LOW:
            return node
        if op.kind == "cast" and view.dtype(op.args[0]) in LOW:
            return op.args[0]
        if op.kind not in ("identity", "cast"):
            return None
        node = op.args[0]
    return None


def _of_four_bits(node: fx.Node) -> bool:
    """Whether it is a product with a weight in four bits, or a sum with one at its start."""
    while node.op == "call_function" and node.target is operator.add and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return INSTEAD in node.meta
