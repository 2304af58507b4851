"""How fast is one fused operation? Forward and backward against eager, Inductor, Liger and cut-cross-entropy.

    python -m pytest bench/kernels.py            # pytest-benchmark; on a GPU at real sizes, on a CPU at toy sizes

The plain function of each name is what is compiled, so sloth's rows are what any model with that formula gets.
pytest-benchmark's figures are wall time with the launch. The closing table is the device's time (events, cache flushed,
median) with the TB/s of the bytes that must move, or TFLOP/s of the multiplications that must happen, beside what a
plain copy and a plain matmul reach on the same machine in the same run.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))  # slothc, when it isn't installed

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
ROWS, WIDTH, INNER, HEADS, HEAD, VOCAB = (8192, 4096, 14336, 32, 128, 128256) if CUDA else (64, 128, 256, 4, 32, 512)
Row = tuple[str, str, str, float, float, str]


@dataclass(frozen=True)
class Case:
    """``work``: bytes, or FLOPs if ``unit`` is TFLOP/s, of (forward, backward); ``peers``: other implementations."""

    plain: Callable[..., torch.Tensor]
    arguments: Callable[[], tuple[torch.Tensor, ...]]
    work: tuple[float, float]
    unit: str
    peers: dict[str, Callable[[], Callable[..., torch.Tensor]]]


def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def glu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def rope(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = q.chunk(2, dim=-1)
    return q * cos + torch.cat((-b, a), dim=-1) * sin


def vocab(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), labels)


def liger_norm() -> Callable[..., torch.Tensor]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False)


def liger_glu() -> Callable[..., torch.Tensor]:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


def liger_rope() -> Callable[..., torch.Tensor]:
    from liger_kernel.ops.rope import LigerRopeFunction

    # it rotates queries and keys in one call and in place: one key head keeps its extra work small
    def rotate(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return LigerRopeFunction.apply(q.clone(), q[:, :1].detach().clone(), cos[None], sin[None])[0]

    return rotate


def liger_vocab() -> Callable[..., torch.Tensor]:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels)
        return found[0] if isinstance(found, tuple) else found

    return loss


def cut_cross_entropy() -> Callable[..., torch.Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy


def _random(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE).requires_grad_(grad)


def _vocab_arguments() -> tuple[torch.Tensor, ...]:
    weight = (_random(VOCAB, WIDTH, grad=False) / WIDTH**0.5).requires_grad_(False)
    return _random(ROWS, WIDTH), weight, torch.randint(VOCAB, (ROWS,), device=DEVICE)


_ITEM = DTYPE.itemsize
_ROTATED = ROWS * HEADS * HEAD * _ITEM
_PRODUCT = 2.0 * ROWS * WIDTH * VOCAB
CASES = {
    "rms_norm": Case(
        norm,
        lambda: (_random(ROWS, WIDTH), _random(WIDTH)),
        (2 * ROWS * WIDTH * _ITEM, 3 * ROWS * WIDTH * _ITEM),
        "TB/s",
        {"liger": liger_norm},
    ),
    "gated_mlp": Case(
        glu,
        lambda: (_random(ROWS // 2, INNER), _random(ROWS // 2, INNER)),
        (3 * ROWS // 2 * INNER * _ITEM, 5 * ROWS // 2 * INNER * _ITEM),
        "TB/s",
        {"liger": liger_glu},
    ),
    "rope": Case(
        rope,
        lambda: (_random(1, HEADS, ROWS, HEAD), _random(ROWS, HEAD, grad=False), _random(ROWS, HEAD, grad=False)),
        (2 * _ROTATED, 2 * _ROTATED),
        "TB/s",
        {"liger": liger_rope},
    ),
    "cross_entropy": Case(
        vocab,
        _vocab_arguments,
        (_PRODUCT, 2 * _PRODUCT),
        "TFLOP/s",
        {"liger": liger_vocab, "cut-cross-entropy": cut_cross_entropy},
    ),
}
_MODULES = {"liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}


def implementation(case: Case, system: str) -> Callable[..., torch.Tensor]:
    """The function to time. A peer that is not installed is skipped, by name."""
    if system == "eager":
        return case.plain
    if system in ("inductor", "sloth"):
        import slothc  # noqa: F401

        return torch.compile(case.plain, backend=system, dynamic=False)
    if importlib.util.find_spec(_MODULES[system]) is None:
        pytest.skip(f"{system} is not installed")
    if not CUDA:
        pytest.skip(f"{system} needs a GPU")
    return case.peers[system]()


@cache
def _cache_sized() -> torch.Tensor:
    return torch.empty(256 * 2**20 if CUDA else 2**10, dtype=torch.int8, device=DEVICE)


def flush() -> None:
    _cache_sized().zero_()


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds(work: Callable[[], Any], repeats: int) -> float:
    """Median time of ``work`` on the device, each after its cache was overwritten."""
    work()
    found = []
    for _ in range(repeats):
        flush()
        if CUDA:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            work()
            found.append(time.perf_counter() - began)
    return statistics.median(found)


@pytest.fixture(scope="module", autouse=True)
def limits(kernel_table: list[Row]) -> None:
    """What the machine does at best: a copy of 1 GiB and a square bf16 matmul (small ones on a CPU)."""
    size = 2**29 if CUDA else 2**20
    a, b = torch.empty(size, dtype=DTYPE, device=DEVICE), torch.empty(size, dtype=DTYPE, device=DEVICE)
    copy = seconds(lambda: b.copy_(a), 20)
    side = 8192 if CUDA else 256
    m, n = (torch.randn(side, side, dtype=DTYPE, device=DEVICE) for _ in range(2))
    product = seconds(lambda: m @ n, 20)
    kernel_table.append(("limit", "copy", "", copy, 2 * size * _ITEM / copy / 1e12, "TB/s"))
    kernel_table.append(("limit", "matmul", "", product, 2 * side**3 / product / 1e12, "TFLOP/s"))


PAIRS = [(name, system) for name, case in CASES.items() for system in ("eager", "inductor", "sloth", *case.peers)]


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("name", "system"), PAIRS)
def test_kernel(benchmark: Any, kernel_table: list[Row], name: str, system: str, direction: str) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    arguments = case.arguments()
    run = implementation(case, system)
    result = run(*arguments)
    torch.testing.assert_close(result, case.plain(*arguments), rtol=2e-2, atol=2e-2)
    wrt = [x for x in arguments if x.requires_grad]
    upstream = torch.randn_like(result)

    def backward() -> Any:  # liger's overwrite what they saved: run again they take the same time, on other values
        return torch.autograd.grad(result, wrt, upstream, retain_graph=True)

    work = (lambda: run(*arguments)) if direction == "forward" else backward
    repeats = 50 if CUDA else 5
    found = seconds(work, repeats)
    benchmark.group = f"{name} {direction}"
    benchmark.pedantic(lambda: (work(), synchronize()), rounds=repeats, warmup_rounds=1, setup=flush)
    rate = case.work[direction == "backward"] / found / 1e12
    benchmark.extra_info.update(device_us=found * 1e6, rate=rate, unit=case.unit)
    kernel_table.append((name, system, direction, found, rate, case.unit))
