"""The CUDA calls of a recording, and nothing else: work done once under capture, replayed as often as wanted.

A recorder has one pool of memory for all that it records. That is right only where no replay happens while something that another
replay wrote is still needed: ``graphed`` sees to it.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")
alone = threading.RLock()  # a capture has the device's random numbers for itself: one at a time, and no compilation beside it


class Recorder(Protocol):
    """What ``graphed`` needs of a device."""

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Do ``work`` under capture: its results, whose values come with the first replay, and the replay."""

    def stream(self) -> int:
        """The current stream."""

    def capturing(self) -> bool:
        """Whether somebody captures the current stream."""

    def settle(self) -> None:
        """Wait for everything that the device has been asked to do."""

    def random_state(self) -> Any:
        """The state of the device's random numbers."""

    def random_from(self, state: Any) -> contextlib.AbstractContextManager[None]:
        """Random numbers from ``state`` on; afterwards from where they were."""


class CudaRecorder:
    """CUDA graphs in a private pool, captured on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.index: int = device.index if device.index is not None else torch.cuda.current_device()
        self.pool = torch.cuda.graph_pool_handle()
        self.graphs: weakref.WeakSet[torch.cuda.CUDAGraph] = weakref.WeakSet()   # in the pool
        with torch.cuda.device(self.index):
            self.side = torch.cuda.Stream()

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        if not self.graphs:                                               # a pool that its last graph has left takes no other
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with alone, torch.cuda.device(self.index):
            torch.cuda.synchronize()
            torch.cuda.empty_cache()                                      # under capture nothing can be given back
            _forget_workspaces()                                          # each graph has cuBLAS's in memory of its own
            with torch.cuda.stream(self.side):
                begun = False
                try:
                    graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")   # others' loaders may go on
                    begun = True
                    result = work()
                    graph.capture_end()
                except BaseException:
                    self._abandon(graph, begun)
                    raise
            _forget_workspaces()
        self.graphs.add(graph)
        return result, self._replay(graph)

    def _replay(self, graph: torch.cuda.CUDAGraph) -> Callable[[], None]:
        def replay() -> None:
            if torch.cuda.current_device() == self.index:
                graph.replay()
            else:
                with torch.cuda.device(self.index):
                    graph.replay()

        return replay

    def _abandon(self, graph: torch.cuda.CUDAGraph, begun: bool) -> None:
        """End a capture that failed, so that allocator and random numbers are as they were. ``begun``: it did not fail to begin."""
        try:
            if begun:
                graph.capture_end()
        except RuntimeError:
            with contextlib.suppress(RuntimeError):                       # the end of a broken capture skips what follows it
                torch._C._cuda_endAllocateToPool(self.index, self.pool)
                torch._C._cuda_releasePool(self.index, self.pool)         # nor does the graph's end give its memory back
            begun = False
        if not begun:
            empty = torch.cuda.CUDAGraph()                                # a whole capture sets the generators' state right
            empty.capture_begin(capture_error_mode="thread_local")
            torch.zeros(1, device=self.device)
            empty.capture_end()
        _forget_workspaces()

    def stream(self) -> int:
        return int(torch._C._cuda_getCurrentRawStream(self.index))

    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def settle(self) -> None:
        torch.cuda.synchronize(self.index)

    def random_state(self) -> Any:
        return torch.cuda.default_generators[self.index].get_state()

    @contextmanager
    def random_from(self, state: Any) -> Iterator[None]:
        generator = torch.cuda.default_generators[self.index]
        now = generator.get_state()
        generator.set_state(state)
        try:
            yield
        finally:
            generator.set_state(now)


def _forget_workspaces() -> None:
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()


KINDS: dict[str, Callable[[torch.device], Recorder]] = {} if torch.version.hip else {"cuda": CudaRecorder}
"""Device type -> what records on it."""
