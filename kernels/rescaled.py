"""Rows of an fp32 matrix times factors that are mostly 1, which only the device knows: such rows are not touched."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .broken import give_up
from .direct import Direct
from .triton_launch import available

BLOCK = 1024
KEPT = 256
_records: dict[tuple[Any, ...], Direct] = {}
_broken: set[torch.device] = set()


def rescale(a: Tensor, by: Tensor) -> None:
    """a [m, n] *= by [m, 1], contiguous fp32 both."""
    if not _launched(a, by):
        a.mul_(by.unsqueeze(1))


def _launched(a: Tensor, by: Tensor) -> bool:
    """Whether the kernel has run; False where there is none for the device."""
    device = a.device
    if not available(device) or device in _broken:
        return False
    if a.numel() == 0:
        return True
    key = (device, *a.shape)
    try:
        run = _records.get(key)
        if run is None:
            if len(_records) > KEPT:
                _records.clear()
            run = _records[key] = Direct(_kernel(), (a.shape[0],), [a.shape[1]], {"BLOCK": BLOCK}, device)
        run((a, by))
    except Exception as error:
        give_up(_broken, device, device, "rescales rows", error)
        return False
    return True


@cache
def _kernel() -> Any:
    from . import rescaled_kernel

    return rescaled_kernel.rescale
