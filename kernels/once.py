"""First derivatives only, and an error for who asks for more.

``torch.autograd.function.once_differentiable`` refuses a second derivative where an incoming gradient requires one, or where the error's
node is on the way to what is asked for. A loss has no incoming gradient, and what a backward read from its context is no way back to the
operands: the second derivative would be silently wrong. So the first one is refused already, if its graph is wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

TWICE = (
    "sloth's kernels can be differentiated once: they have no graph of their gradients (create_graph=True). Run the model without "
    "sloth where a gradient is differentiated again, or leave the rules out with options={'disable': [...]}"
)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A ``backward(ctx, *gradients)`` that raises RuntimeError where ``create_graph=True``."""

    @wraps(backward)
    def run(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(TWICE)
        return backward(ctx, *gradients)

    return run
