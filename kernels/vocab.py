"""The ``vocab`` family: a linear over the vocabulary and the cross-entropy of its result, without holding the logits.

    loss_t = cross_entropy(chain(H_t W^T + b), y_t),    reduced by mean over the tokens that count, sum, or not at all.

An adapted head has H W^T + b + s L U^T, one value that is rounded once.

The forward computes the gradients too, while a chunk's logits are at hand (the idea of Liger's fused loss); the
backward only scales them. Where only hidden's gradient is wanted, a device with Triton needs no more than a block of the
vocabulary at a time (``vocab_blocks``). ``reduction="none"`` with a trained weight is the exception: what each token's gradient is
multiplied by is known in the backward only, so the logits are made once more there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from slothc.gradients.vocabulary import Chain
from torch import Tensor

from . import in_place, vocab_blocks
from .binding import DTYPE
from .once import once_differentiable
from .packed import Packed, packs
from .tracing import traced
from .vocab_chain import Adapter, no_autocast
from .vocab_chunks import Gradients, Operands, Wants, gradients, greatest, losses_and_gradients
from .vocab_rows import Loss

REDUCTIONS = ("mean", "sum", "none")
NAMES = {dtype: name for name, dtype in DTYPE.items()}
Given = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
"""hidden, weight, bias, and an adapter's low and up."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *,
    chain: str | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    dtype: torch.dtype | None = None,
    adapter: Adapter | None = None,
) -> Tensor:
    """``F.cross_entropy(chain(F.linear(hidden, weight, bias)), labels, ...)`` in bounded memory.

    hidden [..., D], weight [V, D], bias [V] or None, labels [...] int64. ``chain`` is the text of a
    ``gradients.vocabulary.Chain`` (default: nothing, in hidden's dtype); it starts with the dtype in which the linear
    computes. ``dtype``: of the result (default: of the processed logits). ``adapter``: low [..., r], up [V, r] and s. Returns a
    scalar, or with reduction "none" a tensor shaped like labels. Raises ValueError for arguments that do not fit, and IndexError
    for labels out of range (CPU; on other devices the result is nan).
    """
    text = chain if chain is not None else NAMES[hidden.dtype]
    spec = Loss(text, int(ignore_index), float(label_smoothing), reduction, dtype or DTYPE[Chain.parse(text).result])
    _validate(hidden, weight, bias, labels, spec, adapter)
    given, scale = _given(hidden, weight, bias, adapter)
    loss = _apply(given, labels.reshape(-1), scale, spec)
    return loss.reshape(labels.shape) if reduction == "none" else loss


def linear_logsumexp(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, chain: str | None = None, dtype: torch.dtype | None = None,
    adapter: Adapter | None = None,
) -> Tensor:  # fmt: skip
    """``torch.logsumexp(chain(F.linear(hidden, weight, bias)), -1)`` in bounded memory: [...] for hidden [..., D]."""
    text = chain if chain is not None else NAMES[hidden.dtype]
    spec = Loss(text, -100, -1.0, "none", dtype or DTYPE[Chain.parse(text).result])
    _validate(hidden, weight, bias, None, spec, adapter)
    given, scale = _given(hidden, weight, bias, adapter)
    return _apply(given, None, scale, spec).reshape(hidden.shape[:-1])


@torch.no_grad()
def linear_argmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, chain: str | None = None, adapter: Adapter | None = None
) -> Tensor:
    """``chain(F.linear(hidden, weight, bias)).argmax(-1)`` in bounded memory: [...] int64 for hidden [..., D]."""
    made = Chain.parse(chain if chain is not None else NAMES[hidden.dtype])
    with no_autocast(hidden.device):
        (rows, *_, low, up), scale = _given(hidden, weight, bias, adapter)
        ops = Operands.of(rows, weight, bias, None, DTYPE[made.dtype], _adapter(low, up, scale))
        return greatest(ops, made).reshape(hidden.shape[:-1])


def _given(hidden: Tensor, weight: Tensor, bias: Tensor | None, adapter: Adapter | None) -> tuple[Given, float]:
    """The operands with the tokens in one dimension, and the adapter's scale."""
    low, up, scale = adapter or (None, None, 1.0)
    rows = None if low is None else low.reshape(-1, low.shape[-1])
    return (hidden.reshape(-1, hidden.shape[-1]), weight, bias, rows, up), scale


def _adapter(low: Tensor | None, up: Tensor | None, scale: float) -> Adapter | None:
    return None if low is None or up is None else (low, up, scale)


def _validate(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor | None, loss: Loss, adapter: Adapter | None = None
) -> None:
    if loss.reduction not in REDUCTIONS:
        raise ValueError(f"reduction {loss.reduction!r} is not one of {', '.join(REDUCTIONS)}")
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        shapes = f"hidden {tuple(hidden.shape)} does not fit weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes}: expected [..., D] and [V, D]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}: expected [V]")
    if adapter is not None:
        low, up, _ = adapter
        if low.shape[:-1] != hidden.shape[:-1] or up.shape != (weight.shape[0], low.shape[-1]):
            shapes = f"low {tuple(low.shape)} and up {tuple(up.shape)} do not fit"
            raise ValueError(f"{shapes} hidden {tuple(hidden.shape)} and weight {tuple(weight.shape)}: expected [..., r] and [V, r]")
    if labels is not None and labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels are {tuple(labels.shape)}; hidden {tuple(hidden.shape)} needs {tuple(hidden.shape[:-1])}")
    if labels is not None and labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if loss.compute not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the linear must compute in float32, bfloat16 or float16, not {loss.compute}")


def _apply(given: Given, labels: Tensor | None, scale: float, loss: Loss) -> Tensor:
    wants = Wants(*(torch.is_grad_enabled() and t is not None and t.requires_grad for t in given))
    if traced() or not all(t is None or _is_plain(t) for t in (*given, labels)):
        return _op(*given, labels, scale, *_arguments(loss), list(wants))[0]
    if any(wants):
        return _LinearCrossEntropy.apply(*given, labels, scale, loss)
    return _forward(given, labels, scale, loss, wants)[0]


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter) and t.device.type != "meta"


def _arguments(loss: Loss) -> tuple[str, int, float, str, torch.dtype]:
    return loss.chain, loss.ignore_index, loss.smoothing, loss.reduction, loss.dtype


def _operands(given: Given, labels: Tensor | None, scale: float, loss: Loss) -> Operands:
    hidden, weight, bias, low, up = given
    return Operands.of(hidden, weight, bias, labels, loss.compute, _adapter(low, up, scale))


def _forward(
    given: Given, labels: Tensor | None, scale: float, loss: Loss, wants: Wants, pack: bool = False
) -> tuple[Tensor, Tensor, Gradients]:
    """The reduced loss, what multiplies the gradients besides the upstream one ([] or [n], fp32), and the gradients."""
    bad = _labels_out_of_range(labels, given[1].shape[0], loss.ignore_index)
    now = wants if _in_forward(loss, wants) else Wants()
    with no_autocast(given[0].device):
        ops = _operands(given, labels, scale, loss)
        if vocab_blocks.takes(ops, loss, now):
            losses, grads = vocab_blocks.losses_and_gradients(ops, loss, pack)
        else:
            losses, grads = losses_and_gradients(ops, loss, now, pack)
    value, factor = _reduced(losses, labels, bad, loss)
    return value.to(loss.dtype), factor, grads


def _in_forward(loss: Loss, wants: Wants) -> bool:
    """Whether the forward computes the gradients: not if they sum over tokens with factors still unknown."""
    return any(wants) and (loss.reduction != "none" or not (wants.weight or wants.bias or wants.up))


def _labels_out_of_range(labels: Tensor | None, vocab: int, ignore_index: int) -> Tensor | None:
    """Which labels are neither ignored nor in [0, V): an IndexError on a CPU, a mask elsewhere."""
    if labels is None:
        return None
    bad = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
    if labels.device.type != "cpu":
        return bad
    if bad.any():
        raise IndexError(f"Target {int(labels[bad][0])} is out of bounds.")
    return None


def _reduced(losses: Tensor, labels: Tensor | None, bad: Tensor | None, loss: Loss) -> tuple[Tensor, Tensor]:
    if bad is not None:
        losses = losses.masked_fill(bad, float("nan"))
    if loss.reduction == "none" or labels is None:
        return losses, torch.where(losses.isnan(), losses, 1.0)
    total = losses.sum()
    poison = torch.where(bad.any(), torch.nan, 1.0).to(losses) if bad is not None else losses.new_ones(())
    if loss.reduction == "sum":
        return total, poison
    count = (labels != loss.ignore_index).sum()
    return total / count, poison / count.clamp(min=1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *operands, labels, scale, loss = inputs
        given: Given = tuple(operands)  # type: ignore[assignment]
        ctx.loss, ctx.scale, ctx.wants = loss, scale, Wants(*ctx.needs_input_grad[:5])
        ctx.kept = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None     # somebody else may hold what is saved
        value, factor, grads = _forward(given, labels, scale, loss, ctx.wants, packs(given[0]))
        ctx.dtypes = _dtypes(given)
        ctx.save_for_backward(factor, *(grads if _in_forward(loss, ctx.wants) else (*given, labels)))
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        factor, *saved = ctx.saved_tensors
        if _in_forward(ctx.loss, ctx.wants):
            grads = _scaled(saved, factor * upstream.float(), ctx.dtypes, ctx.kept)
        else:
            *given, labels = saved
            found = _remade(upstream, factor, given, labels, ctx.scale, ctx.loss, ctx.wants)
            grads = tuple(None if g is None else g.to(d) for g, d in zip(found, ctx.dtypes))
        return (*grads, None, None, None)


def _dtypes(given: Given) -> tuple[torch.dtype | None, ...]:
    return tuple(None if t is None else t.dtype for t in given)


def _scaled(
    saved: Sequence[Tensor | None], by: Tensor, dtypes: Sequence[torch.dtype | None], kept: bool
) -> tuple[Tensor | None, ...]:
    """Each gradient (of ``Gradients``) times ``by`` ([] or one number for each row), rounded once to its operand's dtype.

    ``kept``: the sums must stay as they are.
    """
    grads = Gradients(*saved)
    column = by.unsqueeze(-1) if by.dim() else by
    plain = grads[:5] if grads.rest is None else (None, *grads[1:5])
    found = [None if g is None or d is None else _rounded(g, column, d, kept) for g, d in zip(plain, dtypes)]
    if grads.hidden is not None and grads.rest is not None:
        found[0] = Packed(grads.hidden, grads.rest).scaled(by.contiguous(), dtypes[0] or torch.float32)
    return tuple(found)


def _rounded(sums: Tensor, by: Tensor, dtype: torch.dtype, kept: bool) -> Tensor:
    if not kept and not by.dim() and in_place.pays(sums, dtype):
        return in_place.rounded_in_place(sums, by, dtype)
    return torch.mul(sums, by, out=torch.empty_like(sums, dtype=dtype))


def _remade(upstream: Tensor, factor: Tensor, given: Any, labels: Tensor | None, scale: float, loss: Loss, wants: Wants) -> Gradients:
    with no_autocast(given[0].device):
        return gradients(_operands(given, labels, scale, loss), loss, (upstream.float() * factor).contiguous(), wants)


Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""A gradient for each of ``Given``, empty where there is none."""


def _filled(grads: Gradients, like: Tensor) -> Five:
    return tuple(like.new_empty(0, dtype=torch.float32) if g is None else g for g in grads[:5])  # type: ignore[return-value]


def _fake_gradients(given: Given, wants: Wants) -> Five:
    shapes = (t.shape if w and t is not None else (0,) for t, w in zip(given, wants))
    return tuple(given[0].new_empty(s, dtype=torch.float32) for s in shapes)  # type: ignore[return-value]


@torch.library.custom_op("sloth::linear_cross_entropy", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    labels: Tensor | None,
    scale: float,
    chain: str,
    ignore_index: int,
    smoothing: float,
    reduction: str,
    dtype: torch.dtype,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, factor, dH, dW, db, dL, dU); a gradient that is not asked for is empty."""
    loss = Loss(chain, ignore_index, smoothing, reduction, dtype)
    value, factor, grads = _forward((hidden, weight, bias, low, up), labels, scale, loss, Wants(*wants))
    return (value, factor, *_filled(grads, hidden))


@_op.register_fake
def _op_fake(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    given, loss, wants = inputs[:5], Loss(*inputs[7:-1]), Wants(*inputs[-1])
    shape = given[0].shape[:1] if loss.reduction == "none" else ()
    grads = _fake_gradients(given, wants if _in_forward(loss, wants) else Wants())
    return (given[0].new_empty(shape, dtype=loss.dtype), given[0].new_empty(shape, dtype=torch.float32), *grads)


@torch.library.custom_op("sloth::linear_cross_entropy_gradients", mutates_args=())
def _gradients_op(
    upstream: Tensor,
    factor: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
    labels: Tensor | None,
    scale: float,
    chain: str,
    ignore_index: int,
    smoothing: float,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dH, dW, db, dL, dU) in fp32 for reduction "none", logits made anew; a gradient that is not asked for is empty."""
    loss = Loss(chain, ignore_index, smoothing, "none", torch.float32)
    return _filled(_remade(upstream, factor, (hidden, weight, bias, low, up), labels, scale, loss, Wants(*wants)), hidden)


@_gradients_op.register_fake
def _gradients_fake(*inputs: Any) -> Five:
    return _fake_gradients(inputs[2:7], Wants(*inputs[-1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *given, labels, ctx.scale = inputs[:7]
    ctx.loss, ctx.wants = Loss(*inputs[7:-1]), Wants(*inputs[-1])
    ctx.dtypes = tuple(None if t is None else t.dtype for t in given)
    ctx.save_for_backward(*output[1:], *((*given, labels) if not _in_forward(ctx.loss, ctx.wants) else ()))
    ctx.mark_non_differentiable(*output[1:])


def _op_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    factor, *saved = ctx.saved_tensors
    found, inputs = saved[:5], saved[5:]
    if inputs:
        arguments = (ctx.scale, ctx.loss.chain, ctx.loss.ignore_index, ctx.loss.smoothing, list(ctx.wants))
        found = _gradients_op(upstream, factor, *inputs, *arguments)
        by = torch.ones_like(factor[:0].sum())
    else:
        by = factor * upstream.float()
        by = by.unsqueeze(-1) if by.dim() else by
    grads = tuple((g * by).to(d) if w else None for g, d, w in zip(found, ctx.dtypes, ctx.wants))
    return (*grads, *(None,) * 8)


_op.register_autograd(_op_backward, setup_context=_setup)
