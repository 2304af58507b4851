"""The chunk loops of the vocabulary family: a chunk of tokens meets the whole vocabulary, then its logits are gone.

For a chunk with hidden states H [m, D], weight W [V, D], Z = H W^T + b and dZ = d loss / d Z (from the derived row
program, written over Z):

    dH = dZ W,    dW = sum over chunks of dZ^T H,    db = sum of dZ over tokens,

all three in fp32 (dH in three bytes of it where ``packed`` can). An adapted head has Z = H W^T + b + s L U^T, with L [m, r] and U [V, r]:

    dL = s dZ U,    dU = s dZ^T L.

dZ carries neither 1/n nor the upstream gradient, so that fp16 does not underflow: both multiply the gradients afterwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from slothc.gradients.vocabulary import Chain
from torch import Tensor

from .packed import Packed
from .vocab_chain import Adapter, processed
from .vocab_matrix import adapted_into, linear_into, product_into
from .vocab_rows import Loss, run_rows

GPU_CHUNK_BYTES = 256 << 20
CPU_CHUNK_BYTES = 64 << 20
"""Bytes of one chunk's logits. A product with W reads all of W, so a chunk must have rows enough to pay for that."""
GPU_SUMMED_BYTES = 512 << 20
"""The most where W gets a gradient, which every chunk reads and writes in fp32: then a chunk is half of W, or the above if that is more."""


class Wants(NamedTuple):
    """Which operands get a gradient."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    low: bool = False
    up: bool = False


class Gradients(NamedTuple):
    """fp32 gradients of the operands, None where not asked for, before they are scaled. With ``rest``, hidden and rest are a ``Packed``."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    low: Tensor | None = None
    up: Tensor | None = None
    rest: Tensor | None = None


@dataclass(frozen=True)
class Operands:
    """hidden [n, D], weight [V, D], bias [V] or None in the compute dtype; labels [n] or None; an adapter's low [n, r] and up [V, r] in
    its own dtype, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor | None
    low: Tensor | None = None
    up: Tensor | None = None
    scale: float = 1.0

    def rows(self, start: int, stop: int) -> Tensor | None:
        """The labels of one chunk."""
        return None if self.labels is None else self.labels[start:stop]

    @staticmethod
    def of(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor | None, dtype: torch.dtype, adapter: Adapter | None = None
    ) -> Operands:
        ops = Operands(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), labels)
        if adapter is None:
            return ops
        low, up, scale = adapter
        wide = torch.promote_types(dtype, low.dtype)
        return replace(ops, low=low.to(wide), up=up.to(wide), scale=scale)


def chunk_rows(tokens: int, vocab: int, itemsize: int, device: torch.device, summed: int = 0) -> int:
    """How many tokens a chunk has: within the byte limit, chunks of nearly equal size.

    ``summed``: bytes of a weight that gets a gradient.
    """
    limit = CPU_CHUNK_BYTES if device.type == "cpu" else max(GPU_CHUNK_BYTES, min(GPU_SUMMED_BYTES, summed // 2))
    most = max(1, limit // max(1, vocab * itemsize))
    count = max(1, -(-tokens // most))
    rows = -(-tokens // count)
    return max(1, min(most, -(-rows // 8) * 8))


def _chunks(ops: Operands, wants: Wants) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """(start, stop, hidden states, logits) of every chunk; all logits share one buffer."""
    n, vocab = ops.hidden.shape[0], ops.weight.shape[0]
    summed = ops.weight.numel() * ops.weight.element_size() if wants.weight else 0
    rows = chunk_rows(n, vocab, ops.hidden.element_size(), ops.hidden.device, summed)
    buffer = ops.hidden.new_empty(min(rows, n), vocab)
    for start in range(0, n, rows):
        h = ops.hidden[start : start + rows]
        z = buffer[: h.shape[0]]
        if ops.low is None or ops.up is None:
            linear_into(z, h, ops.weight, ops.bias)
        else:
            adapted_into(z, h, ops.weight, ops.bias, ops.low[start : start + rows], ops.up, ops.scale)
        yield start, start + h.shape[0], h, z


def losses_and_gradients(ops: Operands, loss: Loss, wants: Wants, pack: bool = False) -> tuple[Tensor, Gradients]:
    """The loss of every token [n] in fp32, and those gradients of their sum (hidden, weight, bias) that are wanted.

    ``pack``: hidden's as a ``Packed``.
    """
    whole, keep, ops = ops, *counting(ops, loss)
    losses = ops.hidden.new_empty(ops.hidden.shape[0], dtype=torch.float32)
    grads = empty_gradients(ops, wants, pack and wants.hidden)
    mode = "both" if any(wants) else "value"
    for start, stop, h, z in _chunks(ops, wants):
        run_rows(loss, mode, z, ops.rows(start, stop), losses=losses[start:stop])
        if any(wants):
            _add_chunk(grads, ops, start, stop, h, z)
    return spread(losses, keep, whole), finished(grads, keep, whole)


def greatest(ops: Operands, chain: Chain) -> Tensor:
    """The number of the greatest processed logit of every token, [n] int64."""
    parts = [processed(z, chain).argmax(-1) for _, _, _, z in _chunks(ops, Wants())]
    return torch.cat(parts) if parts else ops.hidden.new_empty(0, dtype=torch.int64)


def gradients(ops: Operands, loss: Loss, upstream: Tensor, wants: Wants) -> Gradients:
    """The gradients of sum_t upstream[t] * loss[t], logits made anew. ``upstream``: [n] in fp32."""
    whole, keep, ops = ops, *counting(ops, loss)
    upstream = upstream if keep is None else upstream[keep]
    grads = empty_gradients(ops, wants)
    for start, stop, h, z in _chunks(ops, wants):
        run_rows(loss, "gradient", z, ops.rows(start, stop), upstream=upstream[start:stop])
        _add_chunk(grads, ops, start, stop, h, z)
    return finished(grads, keep, whole)


def counting(ops: Operands, loss: Loss) -> tuple[Tensor | None, Operands]:
    """The numbers of the tokens that count and the operands for those alone; (None, ops) where that saves nothing.

    An ignored token costs no matrix product on a CPU. Elsewhere, their number is known to the device only.
    """
    if ops.labels is None or ops.labels.device.type != "cpu":
        return None, ops
    keep = (ops.labels != loss.ignore_index).nonzero().squeeze(1)
    if keep.shape[0] == ops.labels.shape[0]:
        return None, ops
    low = None if ops.low is None else ops.low[keep]
    return keep, replace(ops, hidden=ops.hidden[keep], labels=ops.labels[keep], low=low)


def spread(t: Tensor, keep: Tensor | None, whole: Operands) -> Tensor:
    """Rows ``keep`` of a tensor for all tokens, zeros elsewhere."""
    return t if keep is None else t.new_zeros(whole.hidden.shape[0], *t.shape[1:]).index_copy_(0, keep, t)


def finished(grads: Gradients, keep: Tensor | None, whole: Operands) -> Gradients:
    """The tokens' gradients for all tokens, the adapter's times its scale."""
    hidden, low, rest = (None if g is None else spread(g, keep, whole) for g in (grads.hidden, grads.low, grads.rest))
    for g in (low, grads.up):
        if g is not None:
            g.mul_(whole.scale)
    return grads._replace(hidden=hidden, low=low, rest=rest)


def empty_gradients(ops: Operands, wants: Wants, pack: bool = False) -> Gradients:
    make = torch.zeros if ops.hidden.shape[0] == 0 else torch.empty
    like = (ops.hidden, ops.weight, ops.weight[:, 0], ops.low, ops.up)
    asked = (not pack, *wants[1:]) if wants.hidden else wants
    tensors = [make(t.shape, dtype=torch.float32, device=t.device) if w and t is not None else None for t, w in zip(like, asked)]
    if not pack:
        return Gradients(*tensors)
    hidden = Packed.empty(ops.hidden.shape, ops.hidden.device)
    return Gradients(*tensors)._replace(hidden=hidden.high, rest=hidden.low)


def _add_chunk(grads: Gradients, ops: Operands, start: int, stop: int, h: Tensor, dz: Tensor) -> None:
    if grads.hidden is not None and grads.rest is not None:
        part = torch.empty(h.shape, dtype=torch.float32, device=h.device)
        product_into(part, dz, ops.weight, add=False)
        Packed(grads.hidden, grads.rest).put(start, part)
    elif grads.hidden is not None:
        product_into(grads.hidden[start:stop], dz, ops.weight, add=False)
    if grads.weight is not None:
        product_into(grads.weight, dz.t(), h, add=start > 0)
    if grads.bias is not None:
        total = dz.sum(0, dtype=torch.float32)
        grads.bias.copy_(total) if start == 0 else grads.bias.add_(total)
    if ops.low is None or ops.up is None or (grads.low is None and grads.up is None):
        return
    dz = dz.to(ops.low.dtype)
    if grads.low is not None:
        product_into(grads.low[start:stop], dz, ops.up, add=False)
    if grads.up is not None:
        product_into(grads.up, dz.t(), ops.low[start:stop], add=start > 0)
