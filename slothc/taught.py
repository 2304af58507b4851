"""Backends whose graphs run as they stand, and what Dynamo is taught for them. For every other backend it does what it did."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from . import four_bit_product, made_leaves

T = TypeVar("T", bound=Callable[..., Any])


def as_it_stands(backend: T) -> T:
    """Mark a backend that runs the graph it is given, node by node, and teach Dynamo what that allows."""
    backend.runs_as_it_stands = True                                      # type: ignore[attr-defined]
    made_leaves.teach(marked)
    four_bit_product.teach(marked)
    return backend


def marked(compiler: Any) -> bool:
    """Whether the compiler is ``torch.compile``'s around a marked backend, without Inductor behind it."""
    if not getattr(getattr(compiler, "compiler_fn", None), "runs_as_it_stands", False):
        return False
    kwargs = getattr(compiler, "kwargs", None) or {}
    return bool({"rest": "eager", **(kwargs.get("options") or {}), **kwargs}["rest"] == "eager")
