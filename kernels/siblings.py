"""Linears that read one value, and the row program that makes it, as one differentiable operation.

    x, more = region(operands),      y_i = x W_i' + b_i + s_i (x A_i') B_i'     or     y_i = x W_i' + b_i

x is read by these linears alone, so nobody keeps it: the backward of the region makes it again while it reads the same rows
(``gradients.remake``), for the gradients of the A_i and W_i. Without a region, x is an operand like the others, and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from slothc.gradients.plan import Plan
from torch import Tensor

from . import rowwise_op, siblings_op
from .lowrank import _rows
from .once import once_differentiable
from .siblings_block import Siblings, shaped_like
from .siblings_program import Linear


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
        if torch.is_grad_enabled():
            return _Siblings.apply(static, *tensors)
        made = siblings_op.forward(static, tensors)
        return (*made.ys, *_more(static, made.written))

    run.__name__ = f"siblings_{len(static.linears)}{'' if plan is None else '_' + plan.key}{'' if needed else '_unneeded'}"
    if needed:
        run.unneeded = call(plan, linears, False)                         # type: ignore[attr-defined]
    return run


def _more(s: Siblings, written: Sequence[Tensor | None]) -> Sequence[Any]:
    """The region's results besides x."""
    return written[1 : s.plan.results] if s.plan is not None else ()


class _Siblings(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, s: Siblings, *tensors: Tensor) -> tuple[Tensor, ...]:
        made = siblings_op.forward(s, tensors)
        results = (*made.ys, *_more(s, made.written))
        ctx.s, ctx.shape = s, tensors[0].shape
        ctx.set_materialize_grads(False)                                  # no gradient of y, none of W: not zeros
        ctx.mark_non_differentiable(*[results[k] for k in s.constant[tensors[0].requires_grad]])
        ctx.like = rowwise_op.likes(results)
        kept = [tensors[k] for k in s.kept] if s.plan is not None else [_rows(tensors[0])]
        ctx.save_for_backward(*kept, *(made.written[k] for k in s.held), made.t, made.a, *(tensors[k] for k in s.base))
        ctx.tables = {} if s.plan is None else rowwise_op.tables(s.plan, tensors)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> tuple[Tensor | None, ...]:
        s: Siblings = ctx.s
        saved, count, held = ctx.saved_tensors, len(s.kept), len(s.kept) + len(s.held)     # read once: a checkpoint gives them out once
        kept, stored, (t, a, *base) = saved[:count], saved[count:held], saved[held:]
        gradients = rowwise_op.filled(given, ctx.like)
        reached = [g is not None for m, g in zip(s.linears, given) for _ in m.operands]
        dx, region, own = siblings_op.backward(s, kept, stored, t, a, base, gradients, ctx.needs_input_grad[1])
        found: list[Tensor | None] = [None] * (s.reads + 1)
        if s.plan is None:
            found[1] = None if dx is None else dx.view(ctx.shape)
        else:
            assert dx is not None
            more = given[len(s.linears) :]
            cut = rowwise_op.unreached(s.plan, [dx if any(reached) else None, *more])
            towards = [shaped_like(dx, gradients[0]), *gradients[len(s.linears) :]]
            for operand, which in zip(s.plan.wrt, s.plan.targets):
                if ctx.needs_input_grad[operand + 1] and operand not in cut:
                    value = region[which] if which >= 0 else towards[-1 - which]
                    found[operand + 1] = rowwise_op.whole_gradient(s.plan, operand, value, kept, ctx.tables)
        return (*found, *(g if r else None for g, r in zip(own, reached)))
