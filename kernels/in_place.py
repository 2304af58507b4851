"""fp32 sums rounded to a low precision where they lie: the gradient of a large matrix without a second one beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from .tracing import traced

FIRST = 1 << 20       # elements that are rounded beside their place; those behind them follow in parts as long as all before
LEAST = 64 << 20      # bytes of a matrix that is worth the launches


def pays(sums: Tensor, dtype: torch.dtype) -> bool:
    """Whether these are fp32 sums of that size, without gaps, to be rounded to half the width, and nobody is to read them again."""
    wide = sums.dtype is torch.float32 and dtype.itemsize == 2 and sums.nbytes >= LEAST and sums.is_contiguous()
    return wide and not traced(sums) and not torch._C._autograd._get_current_graph_task_keep_graph() and not _recorded(sums.device)


def _recorded(device: torch.device) -> bool:
    """Whether a CUDA graph is being made, whose replays need the memory as it is."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def rounded_in_place(sums: Tensor, by: Tensor, dtype: torch.dtype) -> Tensor:
    """``sums`` times ``by`` [], as ``dtype``, in the first half of the memory of ``sums``, whose values are gone.

    Element k is written to the place of element k / 2: [n, 2 n) when [n / 2, n) has been read.
    """
    whole = sums.view(-1)
    out = whole.view(dtype)[: whole.numel()]
    done = min(FIRST, whole.numel())
    out[:done] = (whole[:done] * by).to(dtype)
    while done < whole.numel():
        until = min(2 * done, whole.numel())
        torch.mul(whole[done:until], by, out=out[done:until])
        done = until
    return out.view(sums.shape)
