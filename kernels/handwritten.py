"""Kernels that are written by hand, by their names in a module that is imported only where there is a device for them.

What a launch needs is worked out once for operands of a kind. A kernel that cannot be built for a device leaves its work to PyTorch.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .broken import give_up
from .devices import available
from .direct import Direct

KEPT = 256


class Kernels:
    """The kernels of ``module``, beside this one. ``does``: what they do, for the warning where one of them cannot."""

    def __init__(self, module: str, does: str) -> None:
        self.module, self.does = module, does
        self.records: dict[tuple[Any, ...], Direct] = {}
        self.broken: set[torch.device] = set()

    def named(self, name: str) -> Any:
        return getattr(importlib.import_module(f".{self.module}", __package__), name)

    def here(self, device: torch.device) -> bool:
        """Whether the device may have them."""
        return available(device) and device not in self.broken

    def launch(
        self, name: str, tensors: Sequence[Tensor], grid: tuple[int, ...], numbers: Sequence[float], options: Mapping[str, Any]
    ) -> bool:
        """Whether the kernel has run, with arguments in the order of ``Direct``; False where there is none for the tensors' device."""
        device = tensors[0].device
        if not self.here(device):
            return False
        key = (name, device, grid, *numbers, *options.values(), *(t.dtype for t in tensors))
        try:
            run = self.records.get(key)
            if run is None:
                if len(self.records) > KEPT:
                    self.records.clear()
                run = self.records[key] = Direct(self.named(name), grid, numbers, options, device)
            run(tensors)
        except Exception as error:
            give_up(self.broken, device, device, self.does, error)
            return False
        return True
