"""LoRA linear: base and adapter summed in one fp32 accumulator and rounded once, forward and backward.

What is multiplied comes from ``gradients.matrix.lora_plan``: formulas differentiated by sympy, associated by cost,
shared products made once. This file only runs plans: each step is a ``products.total`` or ``products.product`` of
named tensors. The cheapest term of a sum (the adapter's) is made first and the base GEMM accumulates onto it, so the
adapter's delta is rounded relative to itself, never to the base, whose half ulp is larger than most deltas early in
training.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from slothc.gradients.matrix import ONES
from torch import Tensor

from .four_bit import Held
from .lowrank_program import OPERANDS, program, straight
from .once import once_differentiable
from .products import LOW, Matrix, Ones, native, widens
from .tracing import traced

LAYOUTS = ("nk", "kn")
_NOTHING = nullcontext()
_BELOW = torch._C._AutoDispatchBelowAutograd    # what an autograd.Function does inside is nothing that autograd follows


@dataclass(frozen=True)
class _Form:
    """What a call computes in: ``low`` for the base and the result, ``adapter`` for the two small products."""

    low: torch.dtype
    adapter: torch.dtype
    layout: str

    def env(
        self, x: Tensor, xa: Tensor | None, tensors: Mapping[str, Tensor | None]
    ) -> dict[str, Matrix]:
        """Operands as matrices in their compute dtypes."""
        env: dict[str, Matrix] = {"X": _rows(x).to(self.low)}
        if xa is not None:
            env["Xa"] = _rows(xa).to(xa.dtype if xa.dtype is self.adapter else self.low)
        for name, tensor in tensors.items():
            if tensor is not None:
                env[name] = tensor.to(self.adapter) if name in "AB" else tensor.to(self.low)
        env[ONES] = Ones(env["X"].shape[0])
        if tensors.get("b") is not None:
            env["b"] = env["b"].unsqueeze(1)
        return env


def _rows(x: Tensor) -> Tensor:
    """[..., n] as [rows, n]: a view where strides allow, and with a unit stride so that no GEMM copies it again."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(_count(x), x.shape[-1])
    return x if 1 in x.stride() else x.contiguous()


def _count(x: Tensor) -> int:
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return rows


def _without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    if torch._C._is_any_autocast_enabled() and torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return _NOTHING


class _Options(NamedTuple):
    """The operator's last arguments; the dispatcher leaves out those that are at their defaults."""

    out_dtype: torch.dtype | None = None
    adapter_dtype: torch.dtype | None = None
    layout: str = "nk"


def _form(weight: Tensor | Held, a: Tensor, b: Tensor, options: _Options) -> _Form:
    low, adapter = options.out_dtype or weight.dtype, options.adapter_dtype
    if adapter is None:  # a base that is cast (autocast) has its adapter cast with it
        adapter = low if weight.dtype is not low else torch.promote_types(a.dtype, b.dtype)
    return _Form(low, torch.promote_types(low, adapter) if adapter not in LOW or low not in LOW else low, options.layout)


def _forward(
    x: Tensor,
    xa: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    form: _Form,
    wanted: tuple[str, ...],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The result [..., N] and the intermediates that the gradients of ``wanted`` read."""
    plan = program(form.layout, bias is not None, xa is None, wanted)
    with _without_autocast(x.device):
        env = form.env(x, xa, {"W": weight, "b": bias, "A": a, "B": b})
        for step in plan.forward:
            env[step.name] = step(env, scale, form.low if step.name == "Y" else None, strict=True)
    y = env["Y"]
    y = torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[-1]])  # no view: the model may write into it
    return y, tuple(env[name] for name in plan.saved)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        xa: Tensor | None,
        weight: Tensor | Held,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        form: _Form,
    ) -> Tensor:
        ctx.form, ctx.held = form, weight if isinstance(weight, Held) else None
        weight = weight.whole() if isinstance(weight, Held) else weight
        ctx.wanted = tuple(name for name, wanted in zip(OPERANDS, ctx.needs_input_grad) if wanted)
        ctx.key = (form.layout, bias is not None, xa is None, ctx.wanted)
        ctx.scale = scale
        y, kept = _forward(x, xa, weight, bias, a, b, scale, ctx.form, ctx.wanted)
        reads = program(*ctx.key).reads
        ctx.shapes = (x.shape, x.dtype, None if xa is None else xa.dtype, None if bias is None else bias.dtype)
        ctx.dtypes = {"W": weight.dtype, "A": a.dtype, "B": b.dtype, "b": bias.dtype if bias is not None else None}
        ctx.save_for_backward(
            *(t if n in reads else None for n, t in zip(OPERANDS, (x, xa, None if ctx.held else weight, None, a, b))), *kept
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan, form = program(*ctx.key), ctx.form
        shape, x_dtype, xa_dtype, _ = ctx.shapes
        x, xa, weight, _, a, b, *kept = ctx.saved_tensors
        weight = ctx.held.whole() if ctx.held and "W" in plan.reads else weight
        found: dict[str, Tensor] = {}
        with _without_autocast(grad.device):
            env = _operands(form, grad, {"X": x, "Xa": xa, "W": weight, "A": a, "B": b})
            env.update(zip(plan.saved, kept))
            for step in plan.backward:
                found_as = _gradient_dtype(step.operand, ctx.dtypes, x_dtype, xa_dtype)
                env[step.name] = value = step(env, ctx.scale, found_as)
                if step.operand:
                    found[step.operand] = value
        for name, dtype in (("X", x_dtype), ("Xa", xa_dtype)):
            if name in found:
                found[name] = found[name].view(shape).to(dtype)
        if "b" in found:
            found["b"] = found["b"].squeeze(1)
        return (*(found.get(name) for name in OPERANDS), None, None)


def _operands(form: _Form, grad: Tensor, saved: Mapping[str, Tensor | None]) -> dict[str, Matrix]:
    env: dict[str, Matrix] = {"G": _rows(grad)}
    env[ONES] = Ones(env["G"].shape[0])
    for name, tensor in saved.items():
        if tensor is not None:
            if name in ("X", "Xa"):
                keep = name == "Xa" and tensor.dtype is form.adapter
                env[name] = _rows(tensor).to(tensor.dtype if keep else form.low)
            else:
                env[name] = tensor.to(form.adapter if name in "AB" else form.low)
    return env


def _gradient_dtype(
    operand: str | None, dtypes: Mapping[str, torch.dtype | None], x: torch.dtype, xa: torch.dtype | None
) -> torch.dtype | None:
    """A gradient is made in its operand's own dtype; intermediates in their operands' widest."""
    if operand is None:
        return None
    if operand == "X":
        return x
    return xa if operand == "Xa" else dtypes[operand]


def _check(
    x: Tensor,
    xa: Tensor | None,
    weight: tuple[int, ...],
    bias: Any,
    a: Tensor,
    b: Tensor,
    layout: str,
) -> None:
    if layout not in LAYOUTS:
        raise ValueError(f"lora_linear: layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    if not x.is_floating_point():
        raise TypeError(f"lora_linear: x is {x.dtype}; a floating-point tensor is needed")
    n, k = weight if layout == "nk" else weight[::-1]
    if (
        x.shape[-1] != k
        or a.shape[1] != k
        or b.shape[0] != n
        or a.shape[0] != b.shape[1]
        or (xa is not None and xa.shape != x.shape)
    ):
        raise ValueError(
            f"lora_linear: x {tuple(x.shape)}, weight {tuple(weight)} ({layout}), a {tuple(a.shape)}, "
            f"b {tuple(b.shape)} do not fit: "
            "x and xa are [..., K], weight [N, K] for nk or [K, N] for kn, a [r, K], b [N, r]"
        )
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"lora_linear: bias {tuple(bias.shape)} is not [{n}]")


def _uniform(
    x: Tensor,
    xa: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    options: _Options,
) -> bool:
    """Whether everything is of one dtype that the device multiplies natively, without a bias."""
    dtype = x.dtype
    return (
        bias is None
        and weight.dtype is dtype
        and a.dtype is dtype
        and b.dtype is dtype
        and (xa is None or xa.dtype is dtype)
        and (options.out_dtype is None or options.out_dtype is dtype)
        and (options.adapter_dtype is None or options.adapter_dtype is dtype)
        and native(x.device.type, dtype)
    )


class _Uniform(torch.autograd.Function):
    """The straight-line program: few Python steps around the GEMMs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, xa: Tensor | None, weight: Tensor, a: Tensor, b: Tensor, scale: float, layout: str) -> Tensor:
        needs = ctx.needs_input_grad
        wanted = tuple(name for name, need in zip(("X", "Xa", "W", "A", "B"), needs) if need)
        code = straight(layout, xa is None, wanted, x.dtype in LOW and widens(x.device))
        with _without_autocast(x.device), _BELOW():
            y, *kept = code.forward(_rows(x), None if xa is None else _rows(xa), weight, a, b, scale)
            if x.dim() != 2:                                              # no view: the model may write into it
                y = torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[1]])
        reads = code.reads
        ctx.code, ctx.scale, ctx.shape = code, scale, x.shape
        ctx.save_for_backward(
            x if "X" in reads else None,
            xa if "Xa" in reads else None,
            weight if "W" in reads else None,
            a if "A" in reads else None,
            b if "B" in reads else None,
            *kept,
        )
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, xa, *others = ctx.saved_tensors
        with _without_autocast(grad.device), _BELOW():
            rows = (None if t is None else _rows(t) for t in (grad, x, xa))
            dx, dxa, dw, da, db = ctx.code.backward(*rows, *others, ctx.scale)
        shape = ctx.shape
        return (
            None if dx is None else dx.view(shape),
            None if dxa is None else dxa.view(shape),
            *(dw, da, db, None, None),
        )


def _autograd(
    x: Tensor, xa: Tensor | None, weight: Tensor | Held, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, *last: Any
) -> Tensor:
    options = _Options(*last)
    _check(x, xa, weight.shape, bias, a, b, options.layout)
    if isinstance(weight, Tensor) and _uniform(x, xa, weight, bias, a, b, options):
        return _Uniform.apply(x, xa, weight, a, b, scale, options.layout)
    return _LoraLinear.apply(x, xa, weight, bias, a, b, scale, _form(weight, a, b, options))


def _plain(x: Tensor, xa: Tensor | None, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, *last: Any) -> Tensor:
    options = _Options(*last)
    _check(x, xa, weight.shape, bias, a, b, options.layout)
    return _forward(x, xa, weight, bias, a, b, scale, _form(weight, a, b, options), ())[0]


def _fake(x: Tensor, xa: Tensor | None, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, *last: Any) -> Tensor:
    options = _Options(*last)
    _check(x, xa, weight.shape, bias, a, b, options.layout)
    return x.new_empty((*x.shape[:-1], b.shape[0]), dtype=options.out_dtype or weight.dtype)


_LIBRARY = torch.library.Library("sloth", "FRAGMENT")
_LIBRARY.define(
    "lora_linear(Tensor x, Tensor? xa, Tensor weight, Tensor? bias, Tensor a, Tensor b, float scale, "
    "ScalarType? out_dtype=None, ScalarType? adapter_dtype=None, str layout='nk') -> Tensor"
)
_LIBRARY.impl("lora_linear", _autograd, "Autograd")
_LIBRARY.impl("lora_linear", _plain, "CompositeExplicitAutograd")
torch.library.register_fake("sloth::lora_linear", _fake, lib=_LIBRARY)


def lora_linear(
    x: Tensor,
    xa: Tensor | None,
    weight: Tensor | Held,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    out_dtype: torch.dtype | None = None,
    layout: str = "nk",
    adapter_dtype: torch.dtype | None = None,
) -> Tensor:
    """x W' + bias + scale * (xa A') B', summed in fp32 and rounded once to ``out_dtype``.

    x [..., K]; xa [..., K] what the adapter reads, None for x itself; weight [N, K], or [K, N] for ``layout`` "kn", or [N, K] held in
    four bits, which is made whole for each pass and not kept; bias [N] or None; a [r, K]; b [N, r]. Any strides, zero tokens included.
    ``out_dtype`` (default: weight's) is what operands are cast to and the result's dtype; ``adapter_dtype`` is what the adapter computes
    in (default: its own, or ``out_dtype`` where the base is cast). Gradients are once differentiable. Raises ValueError for shapes or a
    layout that do not fit, TypeError for an integer x. The backward is ``gradients.matrix.lora_plan``'s.
    """
    if traced(x):
        weight = weight.whole() if isinstance(weight, Held) else weight
        return torch.ops.sloth.lora_linear(x, xa, weight, bias, a, b, scale, out_dtype, adapter_dtype, layout)
    return _autograd(x, xa, weight, bias, a, b, scale, out_dtype, adapter_dtype, layout)
