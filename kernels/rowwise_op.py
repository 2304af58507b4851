"""``sloth::rowwise``: a plan as a differentiable operation.

``call(plan)`` is the direct way, an autograd.Function without the dispatcher's cost. ``torch.ops.sloth.rowwise(operands, key)`` is the same
for tracers: it has fakes, a backward that is itself an operation, and passes ``opcheck``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import torch
from slothc.gradients.plan import Plan
from torch import Tensor

from .lookup import spread
from .once import once_differentiable
from .rowwise import launcher
from .tracing import traced

PLANS: dict[str, Plan] = {}
Tables: TypeAlias = dict[int, tuple[torch.Size, torch.dtype]]


def register(plan: Plan) -> str:
    """Make ``plan`` known to the operation; its key."""
    PLANS[plan.key] = plan
    return plan.key


class _Call:
    """What every call of a plan needs, looked up once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.forward, self.saved, self.results, self.held = launcher(plan.forward), plan.saved_operands, plan.results, plan.held
        self.backward = launcher(plan.backward) if plan.backward is not None else None
        self.wanted = [(operand + 1, which) for operand, which in zip(plan.wrt, plan.targets)]
        self.tables = [k for k in plan.wrt if plan.forward.reads[k].lookup is not None]
        self.inputs = len(plan.forward.reads) + 1
        self.constant = [k for k, d in enumerate(plan.differentiable) if not d]


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, *operands: Tensor) -> Any:
        written = call.forward(operands)
        ctx.call = call
        ctx.tables = tables(call.plan, operands) if call.tables else {}
        ctx.save_for_backward(*[operands[k] for k in call.saved], *[written[k] for k in call.held])
        if call.results == 1:
            return written[0]
        results = tuple(written[: call.results])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*[results[k] for k in call.constant])
        ctx.like = likes(results)
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        call, needed = ctx.call, ctx.needs_input_grad
        saved = ctx.saved_tensors                                          # once: a checkpoint hands them out a single time
        cut: Collection[int] = ()
        if call.results > 1:
            cut, gradients = unreached(call.plan, gradients), filled(gradients, ctx.like)
        found = call.backward((*saved, *gradients))
        result: list[Tensor | None] = [None] * call.inputs
        for operand, which in call.wanted:
            if needed[operand] and operand - 1 not in cut:
                result[operand] = found[which] if which >= 0 else gradients[-1 - which]
        for operand in call.tables:
            if (value := result[operand + 1]) is not None:
                result[operand + 1] = whole_gradient(call.plan, operand, value, saved, ctx.tables)
        return tuple(result)


def likes(results: Sequence[Tensor]) -> list[tuple[torch.Size, torch.dtype, torch.device]]:
    """What ``filled`` has to know of the results."""
    return [(r.shape, r.dtype, r.device) for r in results]


def filled(gradients: Sequence[Tensor | None], like: Sequence[tuple[torch.Size, torch.dtype, torch.device]]) -> tuple[Tensor, ...]:
    """The results' gradients, zeros where there is none."""
    return tuple(torch.zeros(n, dtype=d, device=e) if g is None else g for g, (n, d, e) in zip(gradients, like))


def unreached(plan: Plan, gradients: Sequence[Tensor | None]) -> Collection[int]:
    """The operands that get no gradient, as no result that they are a part of has one: none at all, not zeros."""
    absent = {k for k, g in enumerate(gradients) if g is None}
    if not absent:
        return ()
    return {operand for operand, reach in zip(plan.wrt, plan.reach) if reach and reach <= absent}


def tables(plan: Plan, operands: Sequence[Tensor]) -> Tables:
    """The shapes and dtypes of the tables that get a gradient, by operand."""
    return {k: (operands[k].shape, operands[k].dtype) for k in plan.wrt if plan.forward.reads[k].lookup is not None}


def whole_gradient(plan: Plan, operand: int, gradient: Tensor, saved: Sequence[Tensor], of: Tables) -> Tensor:
    """The operand's gradient: a table's from that of its rows."""
    lookup = plan.forward.reads[operand].lookup
    if lookup is None:
        return gradient
    shape, dtype = of[operand]
    return spread(gradient, lookup, saved[plan.saved_operands.index(lookup.index)], shape, dtype)


def _backward(plan: Plan, reads: Sequence[Tensor]) -> list[Tensor]:
    assert plan.backward is not None
    return launcher(plan.backward)(reads)


def call(plan: Plan) -> Callable[..., Any]:
    """The plan as a function of its operands: one tensor, or a tuple where the region has several results. ``saves`` of the function are
    the numbers of those whose values its backward reads.
    """
    known, results, differentiable = _Call(plan), plan.results, plan.backward is not None
    plain = not any(o.complex or o.number for o in plan.forward.reads)
    register(plan)

    def run(*operands: Any) -> Any:
        if not plain:
            operands = _as_tensors(plan, operands)
        if traced(operands[0]):
            written = torch.ops.sloth.rowwise(list(operands), plan.key)[:results]
            return written[0] if results == 1 else tuple(written)
        if differentiable and torch.is_grad_enabled():
            for t in operands:
                if t.requires_grad:
                    return _Function.apply(known, *operands)
        written = known.forward(operands)
        return written[0] if results == 1 else tuple(written[:results])

    run.__name__ = f"rowwise_{plan.key}"
    run.saves = range(len(plan.forward.reads)) if plan.held else plan.saved_operands  # type: ignore[attr-defined]
    return run


def _as_tensors(plan: Plan, operands: Sequence[Any]) -> tuple[Tensor, ...]:
    """Complex operands as pairs, numbers as tensors without dimensions beside the others."""
    device = next(t.device for t in operands if isinstance(t, Tensor))
    kinds = zip(operands, plan.forward.reads)
    return tuple(
        torch.view_as_real(t) if o.complex else torch.full((), float(t), device=device) if o.number else t for t, o in kinds
    )


_library = torch.library.Library("sloth", "FRAGMENT")
_library.define("rowwise(Tensor[] operands, str plan) -> Tensor[]")
_library.define("rowwise_backward(Tensor[] reads, str plan) -> Tensor[]")


def _forward_kernel(operands: list[Tensor], plan: str) -> list[Tensor]:
    return launcher(PLANS[plan].forward)(operands)


def _backward_kernel(reads: list[Tensor], plan: str) -> list[Tensor]:
    return _backward(PLANS[plan], reads)


for _key in ("CPU", "CUDA"):
    _library.impl("rowwise", _forward_kernel, _key)
    _library.impl("rowwise_backward", _backward_kernel, _key)


@torch.library.register_fake("sloth::rowwise", lib=_library)
def _fake_forward(operands: list[Tensor], plan: str) -> list[Tensor]:
    return launcher(PLANS[plan].forward).torch.allocate(operands)


@torch.library.register_fake("sloth::rowwise_backward", lib=_library)
def _fake_backward(reads: list[Tensor], plan: str) -> list[Tensor]:
    p = PLANS[plan].backward
    assert p is not None
    return launcher(p).torch.allocate(reads)


def _setup(ctx: Any, inputs: tuple[list[Tensor], str], output: list[Tensor]) -> None:
    operands, key = inputs
    ctx.key, ctx.count, ctx.tables = key, len(operands), tables(PLANS[key], operands)
    ctx.save_for_backward(*(operands[k] for k in PLANS[key].saved_operands), *(output[k] for k in PLANS[key].held))
    ctx.like = likes(output[: PLANS[key].results])
    ctx.set_materialize_grads(False)


def _vjp(ctx: Any, gradients: list[Tensor | None]) -> tuple[list[Tensor | None], None]:
    plan = PLANS[ctx.key]
    result: list[Tensor | None] = [None] * ctx.count
    if plan.backward is None:
        return result, None
    cut, given, saved = unreached(plan, gradients[: plan.results]), filled(gradients, ctx.like), ctx.saved_tensors
    found = torch.ops.sloth.rowwise_backward([*saved, *given], ctx.key)
    for operand, which in zip(plan.wrt, plan.targets):
        if operand in cut:
            continue
        value = found[which] if which >= 0 else given[-1 - which]
        value = whole_gradient(plan, operand, value, saved, ctx.tables)
        result[operand] = value if plan.targets.count(which) == 1 else value.clone()
    return result, None


torch.library.register_autograd("sloth::rowwise", _vjp, setup_context=_setup, lib=_library)
