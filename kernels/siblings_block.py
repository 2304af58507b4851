"""What a block of linears and the row program before them computes, forward and backward, on plain tensors: no autograd here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import NamedTuple

import torch
from slothc.gradients.plan import Plan
from slothc.gradients.remake import Remaking, remaking
from torch import Tensor

from .lowrank import _rows, _without_autocast
from .rowwise import launcher
from .siblings_program import Linear, Stacked, stacked


@dataclass(frozen=True)
class Siblings:
    """What is static of a call: the region's plan (None: x is given), and the linears."""

    plan: Plan | None
    linears: tuple[Linear, ...]
    needed: bool = True                   # whether the y_i have to hold their values, or only the backward is wanted

    @cached_property
    def again(self) -> Remaking | None:
        """The region's backward that makes x again; None without a region."""
        return None if self.plan is None else remaking(self.plan)

    @cached_property
    def reads(self) -> int:
        """The operands before the linears' own: the region's, or x."""
        return 1 if self.plan is None else len(self.plan.forward.reads)

    @cached_property
    def kept(self) -> tuple[int, ...]:
        """The region's operands that its backward and the remaking of x read."""
        if self.plan is None:
            return (0,)
        assert self.again is not None
        return (*self.plan.saved_operands, *self.again.more)

    @cached_property
    def base(self) -> tuple[int, ...]:
        """The numbers of the linears' operands that the gradient of x reads."""
        return tuple(self.reads + k for k, (m, name) in enumerate(self.named) if name in m.read)

    @cached_property
    def constant(self) -> tuple[list[int], list[int]]:
        """The numbers of the results that have no gradient, where x itself, if it is given, has none and where it has one."""
        found = []
        for given in (False, True):
            region = (given,) if self.plan is None else self.plan.differentiable
            own = [bool(m.rank or m.trained or region[0]) for m in self.linears]
            found.append([k for k, d in enumerate((*own, *region[1:])) if not d])
        return found[0], found[1]

    @cached_property
    def named(self) -> list[tuple[Linear, str]]:
        """The linears' operands, in order."""
        return [(m, name) for m in self.linears for name in m.operands]

    @cached_property
    def held(self) -> tuple[int, ...]:
        """The numbers of what the region writes that its backward reads."""
        return () if self.plan is None else self.plan.held

    @cached_property
    def code(self) -> Stacked:
        return stacked(self.linears)

    @cached_property
    def key(self) -> str:
        """The same for what computes the same, in every process."""
        text = repr((None if self.plan is None else self.plan.key, self.linears, self.needed))
        return f"{len(self.linears)}_{sha256(text.encode()).hexdigest()[:16]}"


class Made(NamedTuple):
    """y_i [..., N_i]; what the region writes, x first, None where it was not asked for; T and the stacked A, None without an adapter."""

    ys: Sequence[Tensor]
    written: Sequence[Tensor | None]
    t: Tensor | None
    a: Tensor | None


class Found(NamedTuple):
    """The gradient of x as rows, or None; what the region's backward writes but for x; the linears' operands' gradients or None."""

    dx: Tensor | None
    region: Sequence[Tensor]
    own: Sequence[Tensor | None]


def forward(s: Siblings, tensors: Sequence[Tensor]) -> Made:
    written = [] if s.plan is None else launcher(s.plan.forward)(tensors[: s.reads])
    x = written[0] if written else tensors[0]
    with _without_autocast(x.device):
        *ys, t, a = (s.code.forward if s.needed else s.code.unneeded)(_rows(x), *tensors[s.reads :])
    whole = [torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[1]]) for y in ys]     # no view: the model may write into it
    return Made(whole, written, t, a)


def backward(
    s: Siblings, kept: Sequence[Tensor], stored: Sequence[Tensor], t: Tensor | None, a: Tensor | None, base: Sequence[Tensor],
    gradients: Sequence[Tensor], want: bool,
) -> Found:  # fmt: skip
    """From what the forward kept (the operands ``s.kept``, or x as rows; what is ``s.held``; T and A; the operands ``s.base``) and the
    gradients of all results. ``want``: whether the gradient of a given x is wanted.
    """
    gs, more = [_rows(g) for g in gradients[: len(s.linears)]], gradients[len(s.linears) :]
    with _without_autocast(gs[0].device):
        dx, u, db = s.code.towards(*gs, *base, a, t, s.plan is not None or want)
        if s.again is None:
            region, x = [], kept[0]
        else:
            *region, x = launcher(s.again.backward)(reads(s, kept, stored, [shaped_like(dx, gradients[0]), *more]))
        return Found(dx, region, s.code.weights(*gs, _rows(x), u, db))


def reads(s: Siblings, kept: Sequence[Tensor], stored: Sequence[Tensor], gradients: Sequence[Tensor]) -> list[Tensor]:
    """What the region's backward that makes x again reads, given the gradients of the region's results."""
    assert s.plan is not None
    count = len(s.plan.saved_operands)
    return [*kept[:count], *stored, *gradients, *kept[count:]]


def shaped_like(dx: Tensor, like: Tensor) -> Tensor:
    """Rows [m, K] as [..., K] beside a ``like`` of [..., N]."""
    return dx.view(*like.shape[:-1], dx.shape[1])
