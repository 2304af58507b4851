"""The two halves of a block as operations of the dispatcher, each one node for who traces them; called directly where nobody does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from . import siblings_block
from .rowwise import launcher
from .siblings_block import Found, Made, Siblings, reads, shaped_like
from .tracing import traced

BLOCKS: dict[str, Siblings] = {}

_library = torch.library.Library("sloth", "FRAGMENT")
_library.define("siblings(Tensor[] tensors, str block) -> Tensor[]")
_library.define(
    "siblings_backward(Tensor[] kept, Tensor[] stored, Tensor[] thin, Tensor[] base, Tensor[] gradients, bool want, str block) -> Tensor[]"
)


def forward(s: Siblings, tensors: Sequence[Tensor]) -> Made:
    """``siblings_block.forward``; under a tracer what is not read afterwards is left out."""
    if not traced(*tensors):
        return siblings_block.forward(s, tensors)
    BLOCKS[s.key] = s
    found = iter(torch.ops.sloth.siblings(list(tensors), s.key))
    ys = [next(found) for _ in s.linears]
    written: list[Tensor | None] = [next(found) if k in _asked(s) else None for k in range(_writes(s))]
    adapters = [t for (_, name), t in zip(s.named, tensors[s.reads :], strict=True) if name == "A"]
    return Made(ys, written, next(found), torch.cat(adapters)) if adapters else Made(ys, written, None, None)


def backward(
    s: Siblings, kept: Sequence[Tensor], stored: Sequence[Tensor], t: Tensor | None, a: Tensor | None, base: Sequence[Tensor],
    gradients: Sequence[Tensor], want: bool,
) -> Found:  # fmt: skip
    """``siblings_block.backward``."""
    if not traced(*gradients):
        return siblings_block.backward(s, kept, stored, t, a, base, gradients, want)
    BLOCKS[s.key] = s
    thin = [] if t is None or a is None else [t, a]
    found = iter(torch.ops.sloth.siblings_backward(list(kept), list(stored), thin, list(base), list(gradients), want, s.key))
    dx = next(found) if want or s.plan is not None else None
    region = [next(found) for _ in range(0 if s.again is None else len(s.again.backward.writes) - 1)]
    return Found(dx, region, [next(found) if name in m.wanted else None for m, name in s.named])


def _writes(s: Siblings) -> int:
    return 0 if s.plan is None else len(s.plan.forward.writes)


def _asked(s: Siblings) -> Sequence[int]:
    """The numbers of what the region writes that is read after the forward: all but x, and x where its backward reads it."""
    return range(0 if 0 in s.held else 1, _writes(s))


def _forward(tensors: list[Tensor], block: str) -> list[Tensor]:
    s = BLOCKS[block]
    made = siblings_block.forward(s, tensors)
    thin = [] if made.t is None else [made.t]
    return [*made.ys, *(made.written[k] for k in _asked(s)), *thin]       # type: ignore[list-item]


def _fake_forward(tensors: list[Tensor], block: str) -> list[Tensor]:
    s = BLOCKS[block]
    written = [] if s.plan is None else launcher(s.plan.forward).torch.allocate(tensors[: s.reads])
    x, rank = written[0] if written else tensors[0], sum(m.rank for m in s.linears)
    own = list(zip(s.named, tensors[s.reads :], strict=True))
    widths = [m.held.shape[0] if m.held is not None else t.shape[0] for (m, name), t in own if name == m.weight[0]]
    adapters = [t for (_, name), t in own if name == "A"]
    thin = [adapters[0].new_empty(x.numel() // x.shape[-1], rank)] if adapters else []
    return [*(x.new_empty(*x.shape[:-1], n) for n in widths), *(written[k] for k in _asked(s)), *thin]


def _backward(
    kept: list[Tensor], stored: list[Tensor], thin: list[Tensor], base: list[Tensor], gradients: list[Tensor], want: bool, block: str
) -> list[Tensor]:
    t, a = thin or (None, None)
    dx, region, own = siblings_block.backward(BLOCKS[block], kept, stored, t, a, base, gradients, want)
    return [*([] if dx is None else [dx]), *region, *_owned([g for g in own if g is not None])]


def _owned(gradients: list[Tensor]) -> list[Tensor]:
    """Those that share their memory with one before them, copied: an operation's results are nobody's views."""
    seen: set[StorageWeakRef] = set()
    found = []
    for g in gradients:
        memory = StorageWeakRef(g.untyped_storage())
        found.append(g.clone() if memory in seen else g)
        seen.add(memory)
    return found


def _fake_backward(
    kept: list[Tensor], stored: list[Tensor], thin: list[Tensor], base: list[Tensor], gradients: list[Tensor], want: bool, block: str
) -> list[Tensor]:
    s, first = BLOCKS[block], gradients[0]
    read = iter(base)
    weights = [{name: next(read) for name in m.read} for m in s.linears]
    width = s.linears[0].held.shape[1] if s.linears[0].held is not None else weights[0]["W"].shape[1]
    dx = first.new_empty(first.numel() // first.shape[-1], width)
    region: list[Tensor] = []
    if s.again is not None:
        given = [shaped_like(dx, first), *gradients[len(s.linears) :]]
        region = launcher(s.again.backward).torch.allocate(reads(s, kept, stored, given))[:-1]
    own: list[Any] = []
    for m, g in zip(s.linears, gradients):
        n = g.shape[-1]
        shapes = {"A": (m.rank, width), "B": (n, m.rank), "W": (n, width), "b": (n,)}
        own += [(thin[1] if m.rank else g).new_empty(shapes[name]) for name in m.wanted]
    return [*([dx] if want or s.plan is not None else []), *region, *own]


_library.impl("siblings", _forward, "CompositeExplicitAutograd")
_library.impl("siblings_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("sloth::siblings", _fake_forward, lib=_library)
torch.library.register_fake("sloth::siblings_backward", _fake_backward, lib=_library)
