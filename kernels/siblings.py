"""Linears that read one value, and the row program that makes it, as one differentiable operation.

    x, more = region(operands),      y_i = x W_i' + b_i + s_i (x A_i') B_i'     or     y_i = x W_i' + b_i

x is read by these linears alone, so nobody keeps it: the backward of the region makes it again while it reads the same rows
(``gradients.remake``), for the gradients of the A_i and W_i. Without a region, x is an operand like the others, and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import torch
from slothc.gradients.plan import Plan
from slothc.gradients.remake import Remaking, remaking
from torch import Tensor

from . import rowwise_op
from .four_bit import taken
from .lowrank import _rows, _without_autocast, lora_linear
from .once import once_differentiable
from .rowwise import launcher
from .siblings_program import Linear, Stacked, stacked
from .tracing import traced

_NOTHING: tuple[Tensor, ...] = ()


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
        names = [(m, name) for m in self.linears for name in m.operands]
        return tuple(self.reads + k for k, (m, name) in enumerate(names) if name in m.read)

    @cached_property
    def constant(self) -> tuple[list[int], list[int]]:
        """The numbers of the results that have no gradient, where x itself, if it is given, has none and where it has one."""
        found = []
        for given in (False, True):
            region = (given,) if self.plan is None else self.plan.differentiable
            own = [bool(m.rank or m.trained or region[0]) for m in self.linears]
            found.append([k for k, d in enumerate((*own, *region[1:])) if not d])
        return found[0], found[1]

    def each(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Linear, Sequence[Tensor]]]:
        """Each linear with its operands."""
        start = self.reads
        for linear in self.linears:
            yield linear, tensors[start : start + len(linear.operands)]
            start += len(linear.operands)

    @cached_property
    def code(self) -> Stacked:
        return stacked(self.linears)


def call(plan: Plan | None, linears: Sequence[Linear], needed: bool = True) -> Callable[..., tuple[Tensor, ...]]:
    """A function of the region's operands, or x, and then the operands of each linear (``Linear.operands``). It returns the y of each and
    then the region's other results.

    W and b of an adapted linear are frozen. Everything is of one dtype, but for adapters in fp32 and weights that are held in four bits.
    ``unneeded`` of the function is the one with ``needed`` False: what its y_i hold is undefined, their gradients are the same.
    Raises ValueError for a region that has no backward.
    """
    static = Siblings(plan, tuple(linears), needed)
    if plan is not None:
        if static.again is None:
            raise ValueError("siblings: the region has no backward that makes its result again")
        rowwise_op.register(plan)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        if traced(*tensors):
            return _apart(static, tensors)
        if torch.is_grad_enabled():
            return _Siblings.apply(static, *tensors)
        return _forward(static, tensors)[0]

    run.__name__ = f"siblings_{len(static.linears)}{'' if plan is None else '_' + plan.key}{'' if needed else '_unneeded'}"
    if needed:
        run.unneeded = call(plan, linears, False)                         # type: ignore[attr-defined]
    return run


def _apart(s: Siblings, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The same as operations that another compiler can trace."""
    made: Any = tensors[0] if s.plan is None else rowwise_op.call(s.plan)(*tensors[: s.reads])
    x, *more = made if isinstance(made, tuple) else (made,)
    return (*(_one(x, linear, own) for linear, own in s.each(tensors)), *more)


def _one(x: Tensor, linear: Linear, own: Sequence[Tensor]) -> Tensor:
    w, rest = taken(linear.held, own)
    if not linear.rank:
        return torch.nn.functional.linear(x, w, *rest)
    a, b, *bias = rest
    return lora_linear(x, None, w, bias[0] if bias else None, a, b, linear.scale)


_Forward: TypeAlias = tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor, Tensor | None, Tensor | None]


def _forward(s: Siblings, tensors: Sequence[Tensor]) -> _Forward:
    """(results, what the region keeps, x as rows, T, stacked A)."""
    if s.plan is None:
        x, more, stored = tensors[0], _NOTHING, _NOTHING
    else:
        written = launcher(s.plan.forward)(tensors[: s.reads])
        x, more, stored = written[0], tuple(written[1 : s.plan.results]), tuple(written[k] for k in s.plan.held)
    rows = _rows(x)
    with _without_autocast(x.device):
        *ys, t, a = (s.code.forward if s.needed else s.code.unneeded)(rows, *tensors[s.reads :])
    shaped = (torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[1]]) for y in ys)   # no view: the model may write into it
    return (*shaped, *more), stored, rows, t, a


class _Siblings(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Siblings, *tensors: Tensor) -> tuple[Tensor, ...]:
        results, stored, rows, t, a = _forward(s, tensors)
        ctx.s, ctx.stored, ctx.lead = s, len(stored), results[0].shape[:-1]
        ctx.set_materialize_grads(False)                                  # no gradient of y, none of W: not zeros
        ctx.mark_non_differentiable(*[results[k] for k in s.constant[tensors[0].requires_grad]])
        ctx.like = rowwise_op.likes(results)
        kept = [tensors[k] for k in s.kept] if s.plan is not None else [rows]
        ctx.save_for_backward(*kept, *stored, t, a, *(tensors[k] for k in s.base))
        ctx.shape = tensors[0].shape
        ctx.tables = {} if s.plan is None else rowwise_op.tables(s.plan, tensors)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        s: Siblings = ctx.s
        count = len(s.linears)
        gradients = rowwise_op.filled(given, ctx.like)
        reached = [g is not None for m, g in zip(s.linears, given) for _ in m.operands]
        saved, held = ctx.saved_tensors, len(s.kept) + ctx.stored            # read once: a checkpoint gives them out once
        kept, (t, a, *base) = saved[:held], saved[held:]
        gs = [_rows(g) for g in gradients[:count]]
        found: list[Tensor | None] = [None] * (s.reads + 1)
        with _without_autocast(gs[0].device):
            dx, u, db = s.code.towards(*gs, *base, a, t, s.plan is not None or ctx.needs_input_grad[1])
            if s.plan is None:
                x, found[1] = kept[0], None if dx is None else dx.view(ctx.shape)
            else:
                cut = rowwise_op.unreached(s.plan, [dx if any(reached) else None, *given[count:]])
                x = _region_backward(ctx, s, kept, [dx.view(*ctx.lead, dx.shape[1]), *gradients[count:]], cut, found)
            own = s.code.weights(*gs, x, u, db)
        return (*found, *(g if r else None for g, r in zip(own, reached)))


def _region_backward(
    ctx: Any, s: Siblings, kept: Sequence[Tensor], gradients: Sequence[Tensor], cut: Collection[int], found: list[Tensor | None]
) -> Tensor:
    """Fills ``found`` with the gradients of the region's operands but those that are ``cut`` off; x made again, as rows."""
    plan, again = s.plan, s.again
    assert plan is not None and again is not None
    held = len(plan.saved_operands)
    operands, more, stored = kept[:held], kept[held : len(s.kept)], kept[len(s.kept) :]
    *made, x = launcher(again.backward)([*operands, *stored, *gradients, *more])
    for operand, which in zip(plan.wrt, plan.targets):
        if ctx.needs_input_grad[operand + 1] and operand not in cut:
            value = made[which] if which >= 0 else gradients[-1 - which]
            found[operand + 1] = rowwise_op.whole_gradient(plan, operand, value, operands, ctx.tables)
    return _rows(x)
