"""Adapted linears that read one value, and the region that makes it: one operation (``kernels.siblings``).

What several linears read meets a stacked product once, their gradients of it are summed in one accumulator, and where nobody else reads
it, it is not kept for the backward but made again by the region's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from slothc.gradients.remake import remaking
from slothc.kernels import siblings
from slothc.kernels.products import native
from slothc.patterns.lora_linear import NAME
from slothc.patterns.rule import Match

from .found import Region
from .view import GraphView


@dataclass(frozen=True)
class Block:
    """``matches`` read ``x``, in the graph's order; ``region`` makes it for them alone, or is None."""

    region: Region | None
    matches: tuple[Match, ...]
    x: fx.Node

    @property
    def rule(self) -> str:
        """The name for messages."""
        return f"{self.region.rule}+{NAME}" if self.region else NAME

    @property
    def members(self) -> tuple[Region | Match, ...]:
        return (*([self.region] if self.region else []), *self.matches)

    @property
    def operands(self) -> tuple[fx.Node, ...]:
        """The arguments of ``call``."""
        first = self.region.operands if self.region else (self.x,)
        return (*first, *(m.inputs[k] for m in self.matches for k in ("weight", "a", "b")))

    @property
    def results(self) -> tuple[fx.Node, ...]:
        """The nodes whose values ``call`` returns, in its order."""
        more = self.region.cone.results[1:] if self.region else ()
        return (*(m.node for m in self.matches), *more)

    @property
    def place(self) -> fx.Node:
        """Where the call stands: before this node everything it reads is known."""
        return self.region.cone.results[-1] if self.region else self.matches[0].node

    def call(self, view: GraphView) -> Callable[..., tuple[torch.Tensor, ...]]:
        ranks = [int(view.value(m.inputs["a"]).shape[0]) for m in self.matches]
        return siblings.call(self.region.plan if self.region else None, [m.inputs["scale"] for m in self.matches], ranks)


def blocks(view: GraphView, items: Sequence[Region | Match]) -> list[Block]:
    """The blocks that ``items`` form; an item is in one at most."""
    order = {n: k for k, n in enumerate(view.nodes)}
    makers = {i.cone.sink: i for i in items if isinstance(i, Region) and _remade(i)}
    readers: dict[tuple[fx.Node, bool], list[Match]] = {}
    for item in items:
        if isinstance(item, Match) and _stacks(view, item):
            readers.setdefault((item.inputs["x"], view.grad_enabled(item.node)), []).append(item)
    found: list[Block] = []
    for (x, _), matches in readers.items():
        matches = sorted(matches, key=lambda m: order[m.node])
        whole = Block(makers.get(view.source(x)), tuple(matches), x)
        candidates = [whole] if whole.region and _alone(view, whole.region.cone.sink, matches) else []
        candidates += [Block(None, whole.matches, x)] if len(matches) > 1 else []
        found += [b for b in candidates if _known(view, b, order)][:1]
    return found


def _remade(region: Region) -> bool:
    return region.plan.backward is not None and remaking(region.plan) is not None


def _stacks(view: GraphView, match: Match) -> bool:
    """A frozen base without bias and a trained adapter that reads what the base reads, all of one dtype that the device multiplies."""
    if match.rule != NAME or match.attrs["layout"] != "nk" or not isinstance(match.inputs["scale"], int | float):
        return False
    if match.inputs["more"] or any(match.inputs[k] is not None for k in ("xa", "bias", "c", "factor")):
        return False
    x, weight, a, b = (match.inputs[k] for k in ("x", "weight", "a", "b"))
    dtypes = {view.value(n).dtype for n in (x, weight, a, b, match.node)} | {match.attrs["adapter_dtype"], match.attrs["out_dtype"]}
    value = view.value(x)
    return (
        len(dtypes - {None}) == 1 and native(value.device.type, value.dtype) and not any(map(view.mutated, (x, weight, a, b)))
        and view.needs_grad(a) and view.needs_grad(b) and not view.needs_grad(weight)
        and view.value(match.node).shape[:-1] == value.shape[:-1] and not torch._C._is_any_autocast_enabled()
    )  # fmt: skip


def _alone(view: GraphView, x: fx.Node, matches: Sequence[Match]) -> bool:
    """Whether nobody but the matches reads ``x``, identities passed over."""
    inside = {n for m in matches for n in m.nodes}
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

