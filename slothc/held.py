"""What a recording takes for granted: tensors in memory that is not its own, and what masks turned out to be.

Whoever keeps a tensor from one call to the next (a mask of sizes, a table made once) asks ``recording()`` before keeping one: what is
made while a CUDA graph records is memory of the graph's, and its values come with a replay. What was kept before goes out through ``held``
and lives as long as the recording. What depends on values may only be used where the recording ``assumes`` it: it is then looked at
again before each replay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T", bound=Tensor)
_open: list[tuple[list[Tensor], Mapping[Any, Any]]] = []


def recording() -> bool:
    """Whether a recording is under way in this process."""
    return bool(_open)


def held(tensor: T) -> T:
    """``tensor``, which the recording under way (if there is one) keeps alive."""
    for kept, _ in _open:
        kept.append(tensor)
    return tensor


def assumed(key: Any) -> Any:
    """What the recording under way assumes about ``key``; None if nothing."""
    return next((facts[key] for _, facts in _open if key in facts), None)


@contextmanager
def holding(kept: list[Tensor], facts: Mapping[Any, Any]) -> Iterator[None]:
    """A recording is under way: ``kept`` fills with what it has to keep, ``facts`` are assumed."""
    mine = (kept, facts)
    _open.append(mine)
    try:
        yield
    finally:
        _open[:] = [o for o in _open if o is not mine]
