"""Linears that read one value, and the region that makes it: one operation (``kernels.siblings``).

What adapted linears read meets a stacked product once, each of their gradients is read once for its adapter, the gradients of what they
read are summed in one accumulator, and where only linears read it, it is not kept for the backward but made again by the region's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from slothc.gradients.remake import remaking
from slothc.kernels import siblings
from slothc.kernels.four_bit import FourBit
from slothc.kernels.joined import LOW, takes_wide
from slothc.kernels.products import native
from slothc.kernels.siblings_program import Linear
from slothc.patterns.lora_linear import NAME
from slothc.patterns.rule import Match

from .found import Region
from .view import GraphView


@dataclass(frozen=True)
class Reader:
    """A linear of ``x``: ``node`` is its result, ``nodes`` compute it, ``weight`` (whole, or what it is held in) and ``others`` are read
    besides x; ``whole`` is the weight itself. ``match``: its adapter's.
    """

    x: fx.Node
    node: fx.Node
    nodes: tuple[fx.Node, ...]
    whole: fx.Node
    weight: tuple[fx.Node, ...]
    others: tuple[fx.Node, ...]
    linear: Linear
    match: Match | None = None

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        return (*self.weight, *self.others)

    @property
    def checked(self) -> Reader:
        """The same with its weight whole: how that is made of what it is held in is no formula of ours."""
        return replace(self, weight=(self.whole,), linear=replace(self.linear, held=None))


@dataclass(frozen=True)
class Block:
    """``readers`` read ``x``, in the graph's order; ``region`` makes it for them alone, or is None."""

    region: Region | None
    readers: tuple[Reader, ...]
    x: fx.Node

    @property
    def matches(self) -> tuple[Match, ...]:
        return tuple(r.match for r in self.readers if r.match is not None)

    @property
    def rule(self) -> str:
        """The name for messages."""
        name = NAME if self.matches else "linear"
        return f"{self.region.rule}+{name}" if self.region else name

    @property
    def checked(self) -> Block:
        """What a check runs."""
        return replace(self, readers=tuple(r.checked for r in self.readers))

    @property
    def members(self) -> tuple[Region | Match, ...]:
        return (*([self.region] if self.region else []), *self.matches)

    @property
    def linears(self) -> tuple[Linear, ...]:
        return tuple(r.linear for r in self.readers)

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        """The arguments of ``call``."""
        first = self.region.operands if self.region else (self.x,)
        return (*first, *(n for r in self.readers for n in r.operands))

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """The nodes whose values ``call`` returns, in its order."""
        more = self.region.cone.results[1:] if self.region else ()
        return (*(r.node for r in self.readers), *more)

    @property
    def place(self) -> fx.Node:
        """Where the call stands: before this node everything it reads is known."""
        return self.region.cone.results[-1] if self.region else self.readers[0].node

    def call(self) -> Callable[..., tuple[torch.Tensor, ...]]:
        return siblings.call(self.region.plan if self.region else None, self.linears)


def blocks(view: GraphView, items: Sequence[Region | Match]) -> list[Block]:
    """The blocks that ``items``, and linears that are in none of them, form; an item is in one at most."""
    order = {n: k for k, n in enumerate(view.nodes)}
    makers = {i.cone.sink: i for i in items if isinstance(i, Region) and _remade(i)}
    readers: dict[tuple[fx.Node, bool], list[Reader]] = {}
    for reader in (*_adapted(view, items), *_plain(view, items)):
        readers.setdefault((view.source(reader.x), view.grad_enabled(reader.node)), []).append(reader)
    found: list[Block] = []
    for (x, _), those in readers.items():
        those = sorted(those, key=lambda r: order[r.node])
        whole = Block(makers.get(x), tuple(those), x)
        if whole.region and any(r.linear.wanted for r in those) and _alone(view, x, those) and _known(view, whole, order):
            found.append(whole)
            continue
        for given in dict.fromkeys(r.x for r in those):
            adapted = Block(None, tuple(r for r in those if r.match and r.x is given), given)
            found += [adapted] if adapted.readers and _known(view, adapted, order) else []
    return found


def _adapted(view: GraphView, items: Sequence[Region | Match]) -> Iterator[Reader]:
    for item in items:
        if isinstance(item, Match) and _stacks(view, item):
            w, a, b, bias = (item.inputs[k] for k in ("weight", "a", "b", "bias"))
            form, weight = _held(view, w)
            linear = Linear(item.inputs["scale"], int(view.value(a).shape[0]), bias=bias is not None, held=form)
            yield Reader(item.inputs["x"], item.node, item.nodes, w, weight, (a, b) if bias is None else (a, b, bias), linear, item)


def _plain(view: GraphView, items: Sequence[Region | Match]) -> Iterator[Reader]:
    """Linears [N, K] that are part of no item, of one dtype that the device multiplies."""
    taken = {n for i in items for n in (i.nodes if isinstance(i, Match) else i.cone.nodes)}
    for node in view.nodes:
        op = view.op(node)
        if op.kind != "linear" or node in taken or op.params["layout"] != "nk":
            continue
        if not all(a is None or isinstance(a, fx.Node) for a in op.args):
            continue
        x, weight, bias = op.args
        own = (weight, bias) if bias is not None else (weight,)
        if not view.needs_grad(weight) and bias is not None and view.needs_grad(bias):
            continue                                                       # its gradient needs no x, and the weight's is not wanted
        if view.value(weight).dim() == 2 and _native(view, (x, *own, node)) and view.value(node).shape[:-1] == view.value(x).shape[:-1]:
            form, held = _held(view, weight)
            linear = Linear(trained=view.needs_grad(weight), bias=bias is not None, held=form)
            yield Reader(x, node, (node,), weight, held, own[1:], linear)


def _held(view: GraphView, weight: fx.Node) -> tuple[FourBit | None, tuple[fx.Node, ...]]:
    """How the weight is held, and in what: as it is, or in four bits."""
    op = view.op(weight)
    return (op.params["form"], op.args) if op.kind == "whole" else (None, (weight,))


def _native(view: GraphView, nodes: Sequence[fx.Node]) -> bool:
    """Whether these are of one dtype that the device multiplies, and nobody writes into them (the last is the result)."""
    values = [view.value(n) for n in nodes]
    same = len({v.dtype for v in values}) == 1 and native(values[0].device.type, values[0].dtype)
    return same and not any(map(view.mutated, nodes[:-1]))


def _remade(region: Region) -> bool:
    tensors = not any(o.number or o.complex for o in region.plan.forward.reads)
    return tensors and region.plan.backward is not None and remaking(region.plan) is not None


def _stacks(view: GraphView, match: Match) -> bool:
    """A frozen base and a trained adapter that reads what the base reads, of one dtype that the device multiplies; the adapter may be in
    fp32, and the base have a bias, where base and adapter are summed in one accumulator.
    """
    if match.rule != NAME or match.attrs["layout"] != "nk" or not isinstance(match.inputs["scale"], int | float):
        return False
    if match.inputs["more"] or any(match.inputs[k] is not None for k in ("xa", "c", "factor")):
        return False
    x, weight, a, b, bias = (match.inputs[k] for k in ("x", "weight", "a", "b", "bias"))
    base = (x, weight, match.node) if bias is None else (x, weight, bias, match.node)
    dtype, adapter = view.value(x).dtype, view.value(a).dtype
    mixes = takes_wide(view.value(x), view.value(weight))
    return (
        _native(view, base) and _native(view, (a, b, b)) and (adapter is dtype or (adapter is torch.float32 and mixes))
        and match.attrs["adapter_dtype"] in (adapter, None) and match.attrs["out_dtype"] in (dtype, None)
        and (bias is None or dtype not in LOW or mixes)
        and view.needs_grad(a) and view.needs_grad(b) and not any(map(view.needs_grad, base[1:-1]))
        and view.value(match.node).shape[:-1] == view.value(x).shape[:-1]
    )  # fmt: skip


def _alone(view: GraphView, x: fx.Node, readers: Sequence[Reader]) -> bool:
    """Whether nobody but these reads ``x``, identities passed over."""
    inside = {n for r in readers for n in r.nodes}
    waiting = [x]
    while waiting:
        for user in view.users(waiting.pop()):
            if user in inside:
                continue
            if view.op(user).kind != "identity" or user.op == "output":
                return False
            waiting.append(user)
    return True


def _known(view: GraphView, block: Block, order: dict[fx.Node, int]) -> bool:
    """Whether everything the call reads is made before its place, under the same grad mode."""
    last = max(order[n] for n in block.operands if isinstance(n, fx.Node))
    modes = {view.grad_enabled(n) for n in (block.place, *block.results)}
    return last < order[block.place] and len(modes) == 1

