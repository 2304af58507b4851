"""What a recording reads from memory that is not its own: it must live, unchanged, as long as the recording is replayed.

Whoever keeps a tensor from one call to the next (a mask of sizes, a table made once) asks ``recording()`` before keeping one: what is
made while a CUDA graph records is memory of the graph's, and its values come with a replay. What was kept before goes out through ``held``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor

T = TypeVar("T", bound=Tensor)
_open: list[list[Tensor]] = []


def recording() -> bool:
    """Whether a recording is under way in this process."""
    return bool(_open)


def held(tensor: T) -> T:
    """``tensor``, which the recording under way (if there is one) keeps alive."""
    for kept in _open:
        kept.append(tensor)
    return tensor


@contextmanager
def holding() -> Iterator[list[Tensor]]:
    """A recording is under way; the list fills with what it has to keep."""
    kept: list[Tensor] = []
    _open.append(kept)
    try:
        yield kept
    finally:
        _open[:] = [k for k in _open if k is not kept]
