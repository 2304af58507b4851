"""The row kernels of the vocabulary family: a loss and its gradient from one chunk of logits, in place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from slothc.gradients.plan import Pass
from slothc.gradients.program import Program
from slothc.gradients.vocabulary import (
    Chain,
    gradient_program,
    loss_program,
    normaliser_program,
    row_pass,
    with_gradient,
)
from torch import Tensor

from .binding import DTYPE
from .devices import available
from .rowwise import Launcher, launcher

MODES = ("value", "gradient", "both")


@dataclass(frozen=True)
class Loss:
    """What is computed from a row of logits. ``smoothing`` -1: their logsumexp. ``dtype``: of the reduced result."""

    chain: str
    ignore_index: int
    smoothing: float
    reduction: str
    dtype: torch.dtype

    @property
    def compute(self) -> torch.dtype:
        """The dtype in which the linear gives its logits."""
        return DTYPE[Chain.parse(self.chain).dtype]

    def gathers(self, device: torch.device) -> bool:
        """Whether the label's logit is fetched by itself: where PyTorch runs the rows (a mask over the vocabulary costs
        three passes), ignored labels are left out beforehand (a CPU) and the gradient is stored unrounded (adding
        at the label loses nothing).
        """
        return self.smoothing >= 0 and device.type == "cpu" and self.compute == torch.float32 and not available(device)


def row_program(loss: Loss, vocab: int, mode: str, gathered: bool) -> Program:
    """The program for ``mode``: "value", "gradient" (scaled by a cotangent for each row) or "both" (cotangent 1)."""
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    c = Chain.parse(loss.chain)
    if loss.smoothing < 0:
        program = normaliser_program(c.dtype, c.exprs)
    else:
        ignore = None if gathered else loss.ignore_index
        program = loss_program(c.dtype, c.exprs, vocab=vocab, ignore_index=ignore, smoothing=loss.smoothing, gathered=gathered)
    if mode == "value":
        return program
    return gradient_program(program, seeded=True) if mode == "gradient" else with_gradient(program)


@lru_cache(maxsize=256)
def row_plan(loss: Loss, vocab: int, mode: str, gathered: bool) -> Pass:
    """``row_program`` over [tokens, V]."""
    return row_pass(row_program(loss, vocab, mode, gathered), vocab)


@lru_cache(maxsize=256)
def _launcher(loss: Loss, vocab: int, mode: str, gathered: bool) -> Launcher:
    return launcher(row_plan(loss, vocab, mode, gathered))


def run_rows(
    loss: Loss,
    mode: str,
    z: Tensor,
    labels: Tensor | None,
    losses: Tensor | None = None,
    upstream: Tensor | None = None,
) -> None:
    """One chunk: fills ``losses`` [m] ("value", "both") and writes the gradient over ``z`` [m, V] ("gradient", "both").

    labels [m] int64 (None for the logsumexp), upstream [m] fp32 for mode "gradient".
    """
    gathered = loss.gathers(z.device)
    run = _launcher(loss, z.shape[1], mode, gathered)
    at = labels.unsqueeze(1) if gathered and labels is not None else None
    own = None if at is None else z.gather(1, at).squeeze(1)
    given = {"z": z, "zy": own, "label": labels, "g_loss": upstream, "g_lse": upstream}
    given |= {"loss": losses, "lse": losses, "d_z": z, "d_zy": own}
    tensors = {n: t for n, t in given.items() if t is not None}
    program = run.p.program
    reads = [tensors[i.name] for i in program.inputs if i.role == "data"]
    run(reads, [tensors[o.name] for o in program.outputs])
    if at is not None and own is not None and mode != "value":
        z.scatter_add_(1, at, own.unsqueeze(1))
