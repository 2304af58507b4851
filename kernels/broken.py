"""Kernels that turn out not to be built for a device, or not to fit it: PyTorch does their work from then on, with one warning."""

from __future__ import annotations

import warnings
from collections.abc import Hashable
from typing import Any

import torch


def give_up(broken: set[Any], kind: Hashable, device: torch.device, does: str, error: Exception) -> None:
    """Remembers in ``broken`` that there is no kernel of this kind. Raises ``error`` again where it is for want of memory alone."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    broken.add(kind)
    why = error.__cause__ or error                                        # Triton's own says where, its cause what
    text = f"sloth {does} on {device} with PyTorch, in more passes: {type(why).__name__}: {why}"
    warnings.warn(text, RuntimeWarning, stacklevel=3)
