"""Rows moved to the places of a permutation: the gradient of a lookup that reads each row once, out[index[k]] = rows[k]."""

from __future__ import annotations

import torch
from torch import Tensor

from .handwritten import Kernels
from .triton_pieces import power_of_two

TILE, WIDEST = 4096, 1024     # elements of a program, and of a row's in it
KERNELS = Kernels("moved_kernel", "moves looked-up rows' gradients")


def move_rows(rows: Tensor, index: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """[count, w] in ``dtype`` from rows [n, w] and index [n], int32 or int64, a permutation of the numbers below n; zeros from row n on."""
    n, width = rows.shape
    out = (torch.empty if n == count else torch.zeros)(count, width, dtype=dtype, device=rows.device)
    block = min(WIDEST, power_of_two(width))
    together = max(1, TILE // block)
    options = {"ROWS": together, "BLOCK": block, "num_warps": 4}
    grid = (-(-n // together), -(-width // block))
    if not out.numel() or not KERNELS.launch("move", (rows.contiguous(), index.contiguous(), out), grid, (n, width), options):
        out.index_copy_(0, index.long(), rows.to(dtype))
    return out
