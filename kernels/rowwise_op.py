"""``sloth::rowwise``: a plan as a differentiable operation.

``call(plan)`` is the direct way, an autograd.Function without the dispatcher's cost. ``torch.ops.sloth.rowwise(operands, key)`` is the same
for tracers: it has fakes, a backward that is itself an operation, and passes ``opcheck``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from slothc.gradients.plan import Plan
from torch import Tensor

from .lookup import spread
from .rowwise import launcher

PLANS: dict[str, Plan] = {}


def register(plan: Plan) -> str:
    """Make ``plan`` known to the operation; its key."""
    PLANS[plan.key] = plan
    return plan.key


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, *operands: Tensor) -> Any:
        written = launcher(plan.forward)(operands)
        ctx.plan, ctx.shapes = plan, _table_shapes(plan, operands)
        ctx.save_for_backward(*(operands[k] for k in plan.saved_operands), *written[plan.results :])
        return written[0] if plan.results == 1 else tuple(written[: plan.results])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        plan: Plan = ctx.plan
        saved = ctx.saved_tensors                                          # once: a checkpoint hands them out a single time
        found = _backward(plan, [*saved, *gradients])
        result: list[Tensor | None] = [None] * (len(plan.forward.reads) + 1)
        for operand, which in zip(plan.wrt, plan.targets):
            if ctx.needs_input_grad[operand + 1]:
                value = found[which] if which >= 0 else gradients[-1 - which]
                result[operand + 1] = whole_gradient(plan, operand, value, saved, ctx.shapes)
        return tuple(result)


def _table_shapes(plan: Plan, operands: Sequence[Tensor]) -> dict[int, torch.Size]:
    """The shapes of the tables that get a gradient, by operand."""
    return {k: operands[k].shape for k in plan.wrt if plan.forward.reads[k].lookup is not None}


def whole_gradient(plan: Plan, operand: int, gradient: Tensor, saved: Sequence[Tensor], shapes: dict[int, torch.Size]) -> Tensor:
    """The operand's gradient: a table's from that of its rows."""
    lookup = plan.forward.reads[operand].lookup
    if lookup is None:
        return gradient
    return spread(gradient, lookup, saved[plan.saved_operands.index(lookup.index)], shapes[operand])


def _backward(plan: Plan, reads: Sequence[Tensor]) -> list[Tensor]:
    assert plan.backward is not None
    return launcher(plan.backward)(reads)


def call(plan: Plan) -> Callable[..., Any]:
    """The plan as a function of its operands: one tensor, or a tuple where the region has several results."""
    forward, saved = launcher(plan.forward), plan.results
    plain = not any(o.complex or o.number for o in plan.forward.reads)
    register(plan)

    def run(*operands: Any) -> Any:
        if not plain:
            operands = _as_tensors(plan, operands)
        if torch.compiler.is_compiling() or isinstance(operands[0], torch._subclasses.FakeTensor):
            results = torch.ops.sloth.rowwise(list(operands), plan.key)[:saved]
            return results[0] if saved == 1 else tuple(results)
        if torch.is_grad_enabled() and plan.backward is not None and any(t.requires_grad for t in operands):
            return _Function.apply(plan, *operands)
        written = forward(operands)
        return written[0] if saved == 1 else tuple(written[:saved])

    run.__name__ = f"rowwise_{plan.key}"
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
    ctx.key, ctx.count, ctx.tables = key, len(operands), _table_shapes(PLANS[key], operands)
    ctx.save_for_backward(*(operands[k] for k in PLANS[key].saved_operands), *output[PLANS[key].results :])
    ctx.shapes = [(o.shape, o.dtype, o.device) for o in output[: PLANS[key].results]]


def _vjp(ctx: Any, gradients: list[Tensor | None]) -> tuple[list[Tensor | None], None]:
    plan = PLANS[ctx.key]
    result: list[Tensor | None] = [None] * ctx.count
    if plan.backward is None:
        return result, None
    given = [
        torch.zeros(shape, dtype=dtype, device=device) if g is None else g
        for g, (shape, dtype, device) in zip(gradients, ctx.shapes)
    ]  # fmt: skip
    saved = ctx.saved_tensors
    found = torch.ops.sloth.rowwise_backward([*saved, *given], ctx.key)
    for operand, which in zip(plan.wrt, plan.targets):
        value = found[which] if which >= 0 else given[-1 - which]
        value = whole_gradient(plan, operand, value, saved, ctx.tables)
        result[operand] = value if plan.targets.count(which) == 1 else value.clone()
    return result, None


torch.library.register_autograd("sloth::rowwise", _vjp, setup_context=_setup, lib=_library)
