"""What a match turns into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx


@dataclass(frozen=True)
class Replacement:
    """``node``'s value is ``target(*args, **kwargs)`` instead; ``args`` and ``kwargs`` may hold nodes of the same
    graph.
    """

    node: fx.Node
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
