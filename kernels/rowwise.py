"""The ``rowwise`` family: any row program as a callable, in Triton where the device has it, in plain PyTorch elsewhere."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence

import torch
from slothc.gradients.plan import Pass
from torch import Tensor

from . import triton_source
from .devices import available
from .torch_lowering import TorchLauncher
from .triton_launch import TritonLauncher


class Launcher:
    """``launcher(reads, writes=None) -> results`` for one pass; picks the lowering by the operands' device.

    ``reads``: the pass's operands in order, any strides. Results are new tensors, or ``writes`` filled in (which may be operands: an
    element is read before it is written). Raises ``kernels.binding.Unbindable`` where shapes do not fit, and what Triton raises where its
    first kernel does not compile. A kernel that fails later, for a shape that needs another one, is replaced by PyTorch with one warning.
    """

    def __init__(self, p: Pass) -> None:
        self.p = p
        self.proven, self.broken = False, False

    @functools.cached_property
    def triton(self) -> TritonLauncher:
        return TritonLauncher(self.p)

    @functools.cached_property
    def torch(self) -> TorchLauncher:
        return TorchLauncher(self.p)

    def __call__(self, reads: Sequence[Tensor], writes: Sequence[Tensor] | None = None) -> list[Tensor]:
        if not self.p.writes:
            return []                                                      # every gradient is a result's own
        if self.broken or not available(reads[0].device):
            return self.torch(reads, writes)
        try:
            results = self.triton(reads, writes)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if not self.proven:
                raise
            self.broken = True
            text = f"sloth runs plan {self.p.key} with PyTorch from here: {type(error).__name__}: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
            return self.torch(reads, writes)
        self.proven = True
        return results


_launchers: dict[str, Launcher] = {}


def launcher(p: Pass) -> Launcher:
    """The launcher of pass ``p``; equal passes share one."""
    if p.text not in _launchers:
        _launchers[p.text] = Launcher(p)
    return _launchers[p.text]


def source(p: Pass) -> str:
    """The Triton source of pass ``p`` for rows that fit one block and no merged axes."""
    return triton_source.source(p, tuple((a,) for a in range(len(p.axes))) or ((),), loop=False)
