"""Autocast where something runs twice: its state as it was, and its cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


def as_it_is(*devices: str) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """The state of autocast now, for each type of device that has one; to be entered as often as wanted."""
    kinds = [d for d in dict.fromkeys(devices) if torch.amp.is_autocast_available(d)]
    states = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in kinds]

    @contextmanager
    def entered() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for kind, enabled, dtype in states:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            yield

    return entered


@contextmanager
def without_cache() -> Iterator[None]:
    """Autocast keeps no cast weights: they would be memory of the recording's."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
