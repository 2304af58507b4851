"""What a device has for Triton's kernels."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def available(device: torch.device) -> bool:
    """Whether Triton can run on ``device``: an accelerator it has a driver for, or any CPU under ``TRITON_INTERPRET=1``."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return INTERPRET if device.type == "cpu" else device.type in ("cuda", "xpu")


@functools.cache
def nvidia() -> bool:
    """Whether kernels are compiled for NVIDIA's devices from sm_75 on, and all of them are."""
    if INTERPRET or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return all(torch.cuda.get_device_capability(k) >= (7, 5) for k in range(torch.cuda.device_count()))


@functools.cache
def dependent(device: torch.device) -> dict[str, Any]:
    """Options of a launch whose programs may start while those of the launch before it on the stream end, and wait for its results
    (``tl.extra.cuda.gdc_wait``, where the constexpr WAITS says so): no gap between the two. NVIDIA's devices have it from sm_90 on.
    """
    if INTERPRET or device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < (9, 0):
        return {"WAITS": False}
    return {"WAITS": True, "launch_pdl": True}


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; 2 under the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have on the device."""
    if device.type != "cuda":
        return 1 << 16
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", 1 << 16))
