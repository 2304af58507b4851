"""The ``vocab`` family: a linear over the vocabulary and the cross-entropy of its result, without holding the logits.

    loss_t = cross_entropy(chain(H_t W^T + b), y_t),    reduced by mean over the tokens that count, sum, or not at all.

The forward computes the gradients too, while a chunk's logits are at hand (the idea of Liger's fused loss); the
backward only scales them. ``reduction="none"`` with a trained weight is the exception: what each token's gradient is
multiplied by is known in the backward only, so the logits are made once more there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from slothc.gradients.vocabulary import Chain
from torch import Tensor

from .binding import DTYPE
from .once import once_differentiable
from .tracing import traced
from .vocab_chain import no_autocast
from .vocab_chunks import Gradients, Operands, Wants, gradients, greatest, losses_and_gradients
from .vocab_rows import Loss

REDUCTIONS = ("mean", "sum", "none")
NAMES = {dtype: name for name, dtype in DTYPE.items()}
T = TypeVar("T")


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
) -> Tensor:
    """``F.cross_entropy(chain(F.linear(hidden, weight, bias)), labels, ...)`` in bounded memory.

    hidden [..., D], weight [V, D], bias [V] or None, labels [...] int64. ``chain`` is the text of a
    ``gradients.vocabulary.Chain`` (default: nothing, in hidden's dtype); it starts with the dtype in which the linear
    computes. ``dtype``: of the result (default: of the processed logits). Returns a scalar, or with reduction "none" a
    tensor shaped like labels. Raises ValueError for arguments that do not fit, and IndexError for labels out of range
    (CPU; on other devices the result is nan).
    """
    text = chain if chain is not None else NAMES[hidden.dtype]
    spec = Loss(text, int(ignore_index), float(label_smoothing), reduction, dtype or DTYPE[Chain.parse(text).result])
    _validate(hidden, weight, bias, labels, spec)
    flat, rows = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    loss = _apply(flat, weight, bias, rows, spec)
    return loss.reshape(labels.shape) if reduction == "none" else loss


def linear_logsumexp(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, chain: str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """``torch.logsumexp(chain(F.linear(hidden, weight, bias)), -1)`` in bounded memory: [...] for hidden [..., D]."""
    text = chain if chain is not None else NAMES[hidden.dtype]
    spec = Loss(text, -100, -1.0, "none", dtype or DTYPE[Chain.parse(text).result])
    _validate(hidden, weight, bias, None, spec)
    return _apply(hidden.reshape(-1, hidden.shape[-1]), weight, bias, None, spec).reshape(hidden.shape[:-1])


@torch.no_grad()
def linear_argmax(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, chain: str | None = None) -> Tensor:
    """``chain(F.linear(hidden, weight, bias)).argmax(-1)`` in bounded memory: [...] int64 for hidden [..., D]."""
    made = Chain.parse(chain if chain is not None else NAMES[hidden.dtype])
    with no_autocast(hidden.device):
        ops = Operands.of(hidden.reshape(-1, hidden.shape[-1]), weight, bias, None, DTYPE[made.dtype])
        return greatest(ops, made).reshape(hidden.shape[:-1])


def _validate(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor | None, loss: Loss) -> None:
    if loss.reduction not in REDUCTIONS:
        raise ValueError(f"reduction {loss.reduction!r} is not one of {', '.join(REDUCTIONS)}")
    if weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        shapes = f"hidden {tuple(hidden.shape)} does not fit weight {tuple(weight.shape)}"
        raise ValueError(f"{shapes}: expected [..., D] and [V, D]")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {tuple(bias.shape)} does not fit weight {tuple(weight.shape)}: expected [V]")
    if labels is not None and labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels are {tuple(labels.shape)}; hidden {tuple(hidden.shape)} needs {tuple(hidden.shape[:-1])}")
    if labels is not None and labels.dtype != torch.int64:
        raise ValueError(f"labels must be int64, got {labels.dtype}")
    if loss.compute not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the linear must compute in float32, bfloat16 or float16, not {loss.compute}")


def _apply(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor | None, loss: Loss) -> Tensor:
    tensors = (hidden, weight, bias)
    wants = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors)
    if traced() or not all(t is None or _is_plain(t) for t in (*tensors, labels)):
        return _op(hidden, weight, bias, labels, *_arguments(loss), list(wants))[0]
    if any(wants):
        return _LinearCrossEntropy.apply(hidden, weight, bias, labels, loss)
    return _forward(hidden, weight, bias, labels, loss, (False, False, False))[0]


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, torch.nn.Parameter) and t.device.type != "meta"


def _arguments(loss: Loss) -> tuple[str, int, float, str, torch.dtype]:
    return loss.chain, loss.ignore_index, loss.smoothing, loss.reduction, loss.dtype


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor | None, loss: Loss, wants: Wants
) -> tuple[Tensor, Tensor, Gradients]:
    """The reduced loss, what multiplies the gradients besides the upstream one ([] or [n], fp32), and the gradients."""
    bad = _labels_out_of_range(labels, weight.shape[0], loss.ignore_index)
    now = wants if _in_forward(loss, wants) else (False, False, False)
    with no_autocast(hidden.device):
        losses, grads = losses_and_gradients(Operands.of(hidden, weight, bias, labels, loss.compute), loss, now)
    value, factor = _reduced(losses, labels, bad, loss)
    return value.to(loss.dtype), factor, grads


def _in_forward(loss: Loss, wants: Wants) -> bool:
    """Whether the forward computes the gradients: not if they sum over tokens with factors still unknown."""
    return any(wants) and (loss.reduction != "none" or not (wants[1] or wants[2]))


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
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor | None, loss: Loss) -> Tensor:
        ctx.loss, ctx.wants = loss, tuple(ctx.needs_input_grad[:3])
        value, factor, grads = _forward(hidden, weight, bias, labels, loss, ctx.wants)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (hidden, weight, bias))
        if _in_forward(loss, ctx.wants):
            ctx.save_for_backward(factor, grads.hidden, grads.weight, grads.bias)
        else:
            ctx.save_for_backward(factor, hidden, weight, bias, labels)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        factor, *saved = ctx.saved_tensors
        if _in_forward(ctx.loss, ctx.wants):
            grads = _scaled(saved, factor * upstream.float(), ctx.dtypes)
        else:
            hidden, weight, bias, labels = saved
            found = _remade(upstream, factor, hidden, weight, bias, labels, ctx.loss, ctx.wants)
            grads = tuple(None if g is None else g.to(d) for g, d in zip((found.hidden, found.weight, found.bias), ctx.dtypes))
        return (*grads, None, None)


def _scaled(saved: Sequence[Tensor | None], by: Tensor, dtypes: Sequence[torch.dtype | None]) -> tuple[Tensor | None, ...]:
    """Each gradient times ``by`` ([] or one number for each row), rounded once to its operand's dtype."""
    by = by.unsqueeze(-1) if by.dim() else by
    return tuple(None if g is None else torch.mul(g, by, out=torch.empty_like(g, dtype=d)) for g, d in zip(saved, dtypes))


def _remade(
    upstream: Tensor,
    factor: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    loss: Loss,
    wants: Wants,
) -> Gradients:
    ops = Operands.of(hidden, weight, bias, labels, loss.compute)
    with no_autocast(hidden.device):
        return gradients(ops, loss, (upstream.float() * factor).contiguous(), wants)


def _three(items: Iterable[T]) -> tuple[T, T, T]:
    """What belongs to hidden, weight and bias."""
    hidden, weight, bias = items
    return hidden, weight, bias


def _filled(grads: Gradients, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dH, dW, db), empty where there is none."""
    found = (grads.hidden, grads.weight, grads.bias)
    return _three(like.new_empty(0, dtype=torch.float32) if g is None else g for g in found)


def _fake_gradients(hidden: Tensor, weight: Tensor, wants: Wants) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    return _three(hidden.new_empty(s if w else (0,), dtype=torch.float32) for s, w in zip(shapes, wants))


@torch.library.custom_op("sloth::linear_cross_entropy", mutates_args=())
def _op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    chain: str,
    ignore_index: int,
    smoothing: float,
    reduction: str,
    dtype: torch.dtype,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, factor, dH, dW, db); a gradient that is not asked for is empty."""
    loss = Loss(chain, ignore_index, smoothing, reduction, dtype)
    value, factor, grads = _forward(hidden, weight, bias, labels, loss, _three(wants))
    return (value, factor, *_filled(grads, hidden))


@_op.register_fake
def _op_fake(hidden: Tensor, weight: Tensor, bias: Any, labels: Any, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *arguments, wants = rest
    loss = Loss(*arguments)
    shape = hidden.shape[:1] if loss.reduction == "none" else ()
    now = _three(wants) if _in_forward(loss, _three(wants)) else (False, False, False)
    grads = _fake_gradients(hidden, weight, now)
    return (hidden.new_empty(shape, dtype=loss.dtype), hidden.new_empty(shape, dtype=torch.float32), *grads)


@torch.library.custom_op("sloth::linear_cross_entropy_gradients", mutates_args=())
def _gradients_op(
    upstream: Tensor,
    factor: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    chain: str,
    ignore_index: int,
    smoothing: float,
    wants: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """(dH, dW, db) in fp32 for reduction "none", logits made anew; a gradient that is not asked for is empty."""
    loss = Loss(chain, ignore_index, smoothing, "none", torch.float32)
    return _filled(_remade(upstream, factor, hidden, weight, bias, labels, loss, _three(wants)), hidden)


@_gradients_op.register_fake
def _gradients_fake(upstream: Tensor, factor: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_gradients(hidden, weight, _three(rest[-1]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, *rest, wants = inputs
    ctx.loss, ctx.wants = Loss(*rest), tuple(wants)
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (hidden, weight, bias))
    ctx.save_for_backward(*output[1:], *((hidden, weight, bias, labels) if not _in_forward(ctx.loss, ctx.wants) else ()))
    ctx.mark_non_differentiable(*output[1:])


def _op_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Any, ...]:
    factor, dh, dw, db, *inputs = ctx.saved_tensors
    if inputs:
        arguments = (ctx.loss.chain, ctx.loss.ignore_index, ctx.loss.smoothing, list(ctx.wants))
        found = _gradients_op(upstream, factor, *inputs, *arguments)
        by = torch.ones_like(factor[:0].sum())
    else:
        found, by = (dh, dw, db), factor * upstream.float()
        by = by.unsqueeze(-1) if by.dim() else by
    grads = tuple((g * by).to(d) if w else None for g, d, w in zip(found, ctx.dtypes, ctx.wants))
    return (*grads, *(None,) * 7)


_op.register_autograd(_op_backward, setup_context=_setup)
