"""Peak memory of a stretch of code: the device's allocator on a GPU, the process's resident set on a CPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass
class Peak:
    """``bytes`` is filled in when the stretch ends."""

    bytes: int = 0


@contextlib.contextmanager
def peak(device: torch.device) -> Iterator[Peak]:
    """Measure the peak from here to the end of the block, after giving back what earlier work no longer uses.

    Linux lets a process reset its high-water mark; elsewhere the mark covers the process's whole life.
    """
    found = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _reset()
    yield found
    found.bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _high_water()


def _reset() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        _CLEAR.write_text("5")


def _high_water() -> int:
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
