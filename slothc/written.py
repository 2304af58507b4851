"""Writing into a part of a tensor, as a value of its own and in place."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def written(x: Tensor, key: Any, value: Any) -> Tensor:
    """``x`` with ``x[key] = value``, as a new tensor; ``x`` stays as it is. What PyTorch raises for a wrong key or shape."""
    result = x.clone()
    result[key] = value
    return result


def write_into(x: Tensor, key: Any, value: Any) -> Tensor:
    """``x[key] = value`` in place; returns ``x``."""
    if isinstance(value, Tensor) and key == (Ellipsis,):
        return x.copy_(value)
    x[key] = value
    return x

