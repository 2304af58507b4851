"""Numbers that a model computes with NumPy: Dynamo traces ``np.sqrt(64)`` as a call that gives a tensor without dimensions."""

from __future__ import annotations

import torch
from torch import fx
from torch._dynamo.utils import numpy_to_tensor_wrapper


def numpy_number(node: fx.Node) -> float | None:
    """What the node computes out of numbers alone by NumPy, or None."""
    if not isinstance(node.target, numpy_to_tensor_wrapper) or node.all_input_nodes or node.kwargs:
        return None
    if not all(isinstance(a, int | float) for a in node.args):
        return None
    value = node.target(*node.args)
    known = isinstance(value, torch.Tensor) and not value.dim() and value.is_floating_point()
    return float(value.item()) if known else None
