"""What autocast narrows for an adapter and for attention, written out.

    T = linear(h, A)            h' = h.to(bf16);  T = linear(h', A.to(bf16))
    O = attention(q, k, v)      O = attention(q.to(bf16), k.to(bf16), v.to(bf16))

with operands in fp32 and results in 16 bits: the same numbers, as autocast does just that. The adapter then reads what its base reads, in
one dtype, and linears that read one value are a block as they are without autocast; a region that ends in q writes it in 16 bits.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from slothc.kernels.products import LOW
from slothc.patterns import heads, mask
from slothc.patterns.lora_linear import Base, Branch, adapted

from .view import GraphView

NARROWED = "sloth_narrowed"               # in the meta of a weight's cast: an operation of PyTorch's, nothing to make a kernel of


def narrowed(view: GraphView) -> bool:
    """Rewrite the graph of ``view`` as above; whether anything changed."""
    found = [sides for node in view.nodes if view.alive(node) and (sides := adapted(view, node)) is not None]
    casts, changed = _Casts(view), False
    for base, branches in found:
        for branch in (b for b in branches if not _drops(view, b)):
            changed |= _adapter(view, casts, branch)
            _base(view, casts, base, branch)
    for node in view.nodes:
        changed |= view.alive(node) and view.op(node).kind == "sdpa" and _attention(view, casts, node)
    return changed


class _Casts:
    """Values in 16 bits, each made once, where the value is."""

    def __init__(self, view: GraphView) -> None:
        self.view, self.made = view, dict[tuple[fx.Node, torch.dtype], fx.Node]()
        self.inputs = next((n for n in reversed(view.nodes) if n.op == "placeholder"), None)

    def of(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        found = self.made.get((node, dtype))
        if found is None:
            graph, weight = self.view.graph_module.graph, node.op == "placeholder"
            with graph.inserting_after(self.inputs if weight else node):
                found = self.made[node, dtype] = graph.call_method("to", (node, dtype))
            kept = {k: v for k, v in node.meta.items() if k != "grapharg"}
            found.meta = {**kept, "example_value": in_dtype(self.view.value(node), dtype), **({NARROWED: True} if weight else {})}
        return found

    def read(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """``node`` in 16 bits: what it was widened from, or a cast of it."""
        view, wide = self.view, node
        while view.op(wide).kind in ("identity", "cast") and view.dtype(wide) is torch.float32:
            wide = view.op(wide).args[0]
            if view.dtype(wide) is dtype and not view.mutated(wide):
                return wide
        return self.of(node, dtype)


def _drops(view: GraphView, branch: Branch) -> bool:
    """Whether the adapter reads a dropout, which nobody else reads: there is no block to be made."""
    source = branch.source
    while view.op(source).kind in ("identity", "cast"):
        source = view.op(source).args[0]
    return view.op(source).kind == "dropout"


def _adapter(view: GraphView, casts: _Casts, branch: Branch) -> bool:
    """Both of its products; whether anything of them was narrowed."""
    changed = False
    for linear in (branch.down, branch.up):
        dtype = view.dtype(linear)
        if dtype not in LOW or not _plain(view, linear):
            continue
        read, weight = linear.args[0], linear.args[1]
        assert isinstance(read, fx.Node) and isinstance(weight, fx.Node)
        if view.dtype(weight) is torch.float32 and not view.mutated(weight):
            linear.replace_input_with(weight, casts.of(weight, dtype))
            changed = True
        if linear is branch.down and view.dtype(read) is torch.float32 and not view.mutated(read):
            linear.replace_input_with(read, casts.read(read, dtype))
            changed = True
    return changed


def _base(view: GraphView, casts: _Casts, base: Base, branch: Branch) -> None:
    """It reads what the adapter reads, where it has narrowed the same value by itself."""
    x, dtype = base.x, view.dtype(base.linear)
    if view.op(x).kind == "cast" and view.dtype(x) is dtype and x in base.linear.all_input_nodes:
        shared = casts.made.get((view.op(x).args[0], dtype))
        if shared is not None and branch.down.args[0] is shared:
            base.linear.replace_input_with(x, shared)


def _attention(view: GraphView, casts: _Casts, node: fx.Node) -> bool:
    """Its operands; whether anything was narrowed. Repeated heads are not: the gradients of those that read one are summed in fp32."""
    dtype, facts, changed = view.dtype(node), cast(mask.Facts, view), False
    for t in view.op(node).args[:3] if dtype in LOW else ():
        if view.dtype(t) is torch.float32 and not view.mutated(t) and heads.repeated(facts, t) is None:
            node.replace_input_with(t, casts.of(t, dtype))
            changed = True
    return changed


def _plain(view: GraphView, linear: fx.Node) -> bool:
    return view.op(linear).kind == "linear" and view.op(linear).args[:2] == tuple(linear.args[:2]) and len(linear.args) >= 2


def in_dtype(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The example value of a cast of ``value``."""
    if not isinstance(value, FakeTensor):
        return value.to(dtype)
    with value.fake_mode, torch.enable_grad():
        return value.to(dtype)
