"""Set-up for every test: where kernels run, and a cache folder of the session's own.

With a CUDA device the kernels are compiled and run on it. Without one they run in Triton's interpreter, but only where a test asks
for them (``lowerings``): models take the PyTorch lowering, as they do for a user without a GPU. Triton decides when it is imported
whether its own library is interpreted, so it is imported here, before anything else does it.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Two workers of two threads each on two cores wait for one another a sixth of the time. Read when torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))))

import torch

sys.path.insert(0, str(Path(__file__).parent))

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")     # no pool of processes for the few tests that Inductor has a part in
CUDA = torch.cuda.is_available()
ASKED = os.environ.get("TRITON_INTERPRET")

if not CUDA and importlib.util.find_spec("triton"):
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language
    import triton.runtime.interpreter  # noqa: F401
    from interpreted import patch_once

    patch_once()
    if ASKED is None:
        del os.environ["TRITON_INTERPRET"]                 # subprocesses and models: as the user has it


# What glibc gives back to the system it asks for again a moment later, page by page: a quarter of the time spent in the kernel.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
if sys.platform == "linux":
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter, size in ((M_TRIM_THRESHOLD, 1 << 30), (M_TOP_PAD, 64 << 20), (M_MMAP_THRESHOLD, 1 << 30)):
            libc.mallopt(parameter, size)


def pytest_collection_finish() -> None:
    """A tenth of the time went to looking for cycles among the objects of torch and transformers, which stay."""
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="module", autouse=True)
def frozen_heap() -> None:
    """What imports and caches have left by now stays: a test that collects garbage looks at its own objects, not at a million others."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def no_log_of_dynamos() -> Iterator[None]:
    """Dynamo does without what it makes for its logs only: the guards' latency on a cold cache (it floods the cache for that, after
    every compilation, a twentieth of the time), and the stack of every side effect.
    """
    from torch._dynamo import guards  # not before triton, which it imports

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guards, "profile_guard_manager", lambda *rest: 0.0, raising=False)
        if hasattr(torch._dynamo.config, "side_effect_replay_policy"):
            patch.setattr(torch._dynamo.config, "side_effect_replay_policy", "silent")
        yield


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Generated source goes to a folder that starts empty."""
    path = tmp_path_factory.mktemp("sloth", numbered=True)
    path.chmod(0o700)
    before = os.environ.get("SLOTH_CACHE_DIR")
    os.environ["SLOTH_CACHE_DIR"] = str(path)
    yield path
    os.environ.pop("SLOTH_CACHE_DIR")
    if before is not None:
        os.environ["SLOTH_CACHE_DIR"] = before


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where tests of kernels run: the GPU if there is one."""
    return torch.device("cuda" if CUDA else "cpu")


@pytest.fixture
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated kernels are compiled for the GPU, or interpreted where there is none."""
    if not CUDA:
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
