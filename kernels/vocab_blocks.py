"""The block loop of the vocabulary family, for a head that is not trained: tokens meet a block of the vocabulary at a time.

For hidden states H [m, D] of a group of tokens, and for every block of rows W_B [B, D] of the weight, Z = H W_B^T + b_B, and with dZ
and the factors k of the derived row program (``gradients/vocabulary_blocks.py``), dZ written over Z,

    A = k A + dZ W_B;    after the last block,    dH = A / Z' + (p_y - 1) chain'(z_y) W_y,    Z' = sum_v e^(c_v - m).

Each logit is read once, and a block is small enough to stay in a device's cache between the two products. A trained weight needs the whole
vocabulary's sum before its gradient: there is ``vocab_chunks`` for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import sympy as sp
import torch
from slothc.gradients.plan import Pass
from slothc.gradients.vocabulary import Chain, row_pass
from slothc.gradients.vocabulary_blocks import block_program, closing_program, greatest
from torch import Tensor

from .devices import available
from .packed import Packed
from .rescaled import rescale
from .rowwise import Launcher, launcher
from .triton_source import NARROW
from .vocab_chunks import Gradients, Operands, Wants, counting, empty_gradients, finished, spread
from .vocab_matrix import linear_into, product_into
from .vocab_rows import Loss

TOKENS = 2048
"""Tokens of a group, at most: W is read twice for each group, and A has D fp32 numbers for each token."""
BLOCK_BYTES = 48 << 20
"""Bytes of a block's logits, at most. A is read and written once for each block."""
STEP = 128
"""What the tokens of a group are a multiple of, where there are enough: whole tiles of the products, rows at aligned addresses."""
LANES = sp.Symbol("L", integer=True, nonnegative=True)
LOWEST = torch.finfo(torch.float32).min
"""m before the first block: below every logit, and no infinity, so that e^(-inf - m) is 0 where a block is masked."""


def takes(ops: Operands, loss: Loss, wants: Wants) -> bool:
    """Whether a loss and its gradients are made here. fp16 has no room for e^(c - m)."""
    alone = wants == Wants(hidden=True) and ops.low is None and loss.smoothing == 0
    return alone and ops.hidden.dtype != torch.float16 and available(ops.hidden.device)


def geometry(tokens: int, vocab: int, itemsize: int) -> tuple[int, int]:
    """Tokens of a group, in nearly equal groups, and lanes of a block: 2^k or 3 2^k, so that few kernels serve every number of tokens."""
    even = -(-tokens // max(1, -(-tokens // TOKENS)))
    rows = max(1, min(tokens, TOKENS, -(-even // STEP) * STEP))
    most = max(1, BLOCK_BYTES // (rows * itemsize))
    power = 1 << (most.bit_length() - 1)
    return rows, min(vocab, power * 3 // 2 if power * 3 // 2 <= most else power)


def losses_and_gradients(ops: Operands, loss: Loss, pack: bool = False) -> tuple[Tensor, Gradients]:
    """As ``vocab_chunks.losses_and_gradients``, for hidden's gradient alone."""
    whole, keep, ops = ops, *counting(ops, loss)
    losses = ops.hidden.new_empty(ops.hidden.shape[0], dtype=torch.float32)
    grads = empty_gradients(ops, Wants(hidden=True), pack)
    assert ops.labels is not None and grads.hidden is not None
    (n, width), (vocab, _) = ops.hidden.shape, ops.weight.shape
    rows, lanes = geometry(n, vocab, ops.hidden.element_size())
    group = Group(ops, ops.labels, loss, rows, lanes)
    part = None if grads.rest is None else losses.new_empty(rows, width)
    for start in range(0, n, rows):
        at = slice(start, min(start + rows, n))
        total = grads.hidden[at] if part is None else part[: at.stop - start]
        group.fill(at, losses[at], total)
        if grads.rest is not None:
            Packed(grads.hidden, grads.rest).put(start, total)
    return spread(losses, keep, whole), finished(grads, keep, whole)


class Group:
    """Goes over the vocabulary with ``rows`` tokens, ``lanes`` of it at a time; all groups share the memory."""

    def __init__(self, ops: Operands, labels: Tensor, loss: Loss, rows: int, lanes: int) -> None:
        self.ops, self.labels, self.loss, self.lanes = ops, labels, loss, lanes
        self.bounded = bound(loss.chain) is not None
        device = ops.hidden.device
        self.starts = torch.arange(0, ops.weight.shape[0], lanes, device=device).unsqueeze(1)
        self.shifted = ops.hidden.new_empty(len(self.starts), rows, dtype=torch.int64)
        self.logits = ops.hidden.new_empty(rows * lanes)
        self.state = {name: ops.hidden.new_empty(rows, dtype=torch.float32) for name in ("s", "zy", "m", "k")}
        self.numbers = labels.clamp(0, ops.weight.shape[0] - 1)

    def fill(self, at: slice, losses: Tensor, total: Tensor) -> None:
        """The losses [m] and gradients [m, D] of the tokens ``at``, in fp32."""
        h, labels, n = self.ops.hidden[at], self.labels[at], at.stop - at.start
        shifted = torch.sub(labels, self.starts, out=self.shifted[:, :n])
        state = {name: t[:n] for name, t in self.state.items()}
        for name, first in (("s", 0.0), ("zy", 0.0), ("m", LOWEST)):
            state[name].fill_(first)
        for number, (z, w, b) in enumerate(self._blocks(n)):
            linear_into(z, h, w, b)
            run(block_launcher(self.loss.chain), {"z": z, "label": shifted[number], "d_z": z, **state})
            if number and not self.bounded:
                rescale(total, state["k"])
            product_into(total, z, w, add=number > 0)
        given = {"a": total, "w": self.ops.weight, "label": labels, "numbers": self.numbers[at], "loss": losses, "d_h": total}
        run(closing_launcher(self.loss.chain, self.loss.ignore_index), given | state)

    def _blocks(self, n: int) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """(logits to be filled, rows of the weight, their bias) of every block."""
        for start in range(0, self.ops.weight.shape[0], self.lanes):
            w = self.ops.weight[start : start + self.lanes]
            b = None if self.ops.bias is None else self.ops.bias[start : start + self.lanes]
            yield self.logits[: n * w.shape[0]].view(n, w.shape[0]), w, b


def run(made: Launcher, tensors: dict[str, Tensor]) -> None:
    """A pass on tensors by name; the state's are read as they were and written as they are, ``numbers`` is a table's last operand."""
    program = made.p.program
    reads = [tensors[i.name.removesuffix("0")] for i in program.inputs if i.role == "data"]
    if len(made.p.reads) > len(reads):
        reads.append(tensors["numbers"])
    made(reads, [tensors[o.name] for o in program.outputs])


@lru_cache(maxsize=256)
def bound(chain: str) -> float | None:
    """The reference of every exponent, where the chain alone says it."""
    c = Chain.parse(chain)
    return greatest(c.dtype, c.exprs, NARROW)


def block_plan(chain: str) -> Pass:
    """``block_program`` over [tokens, lanes]."""
    c = Chain.parse(chain)
    return row_pass(block_program(c.dtype, c.exprs, bound(chain)), LANES)


def closing_plan(chain: str, ignore_index: int) -> Pass:
    """``closing_program`` over [tokens, D], w read where the labels say."""
    c = Chain.parse(chain)
    return row_pass(closing_program(c.dtype, c.exprs, bound(chain), ignore_index), LANES, tables=("w",))


@lru_cache(maxsize=256)
def block_launcher(chain: str) -> Launcher:
    return launcher(block_plan(chain))


@lru_cache(maxsize=256)
def closing_launcher(chain: str, ignore_index: int) -> Launcher:
    return launcher(closing_plan(chain, ignore_index))
