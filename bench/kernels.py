"""How fast is one fused operation? Forward and backward against eager, Inductor, Liger and cut-cross-entropy.

    python -m pytest bench/kernels.py            # pytest-benchmark; on a GPU at real sizes, on a CPU at toy sizes
    python -m pytest bench/kernels.py -k rms_norm

The plain function of each name is what is compiled, so sloth's rows are what any model with that formula gets.
pytest-benchmark's figures are wall time of both passes with the launches. The closing tables: the device's time (events, cache flushed,
median) in microseconds, and the share that sloth reaches of what a plain copy moves, or a plain matmul multiplies, on the same machine in
the same run: bytes that must move, each once, or multiplications that must happen. ``of a copy``: of the time that a copy of as many bytes
takes, which for the smallest of these sizes is more than its share of a long one's. For the loss: the most that is allocated at once,
operands and gradients with it.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[1]))  # slothc, when it isn't installed

CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
# rows x width of norms, rows x width of gated products, rows of 32 heads of 128: as in models of 1B, 8B and 70B
ROW_SIZES = [(8192, 2048), (8192, 4096), (8192, 8192)] if CUDA else [(64, 128), (64, 256)]
GATED_SIZES = [(8192, 8192), (8192, 14336), (8192, 28672)] if CUDA else [(64, 256), (64, 512)]
ROTATED_SIZES = [4096, 8192, 16384] if CUDA else [32, 64]
# tokens, hidden size, vocabulary, soft-cap
VOCAB_SIZES = [(8192, 4096, 128256, None), (8192, 2304, 256000, 30.0)] if CUDA else [(64, 128, 512, None), (64, 128, 512, 30.0)]
HEADS, HEAD = (32, 128) if CUDA else (4, 32)
ITEM = DTYPE.itemsize
Arguments = tuple[torch.Tensor, ...]
Function = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Case:
    """``work``: bytes, or FLOPs if ``unit`` is TFLOP/s, of (forward, backward); ``peers``: other implementations."""

    plain: Function
    arguments: Callable[[], Arguments]
    work: tuple[float, float]
    unit: str
    peers: dict[str, Callable[[], Function]]


@dataclass(frozen=True)
class Row:
    """What one system takes for one operation; ``work`` over ``seconds`` is its rate."""

    operation: str
    system: str
    direction: str
    seconds: float
    work: float
    unit: str
    peak: float = 0.0                                                     # bytes


def norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def layer_norm(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b)


def added_norm(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = x + r
    return norm(h, w), h


def glu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.gelu(gate, approximate="tanh") * up


def rope(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = q.chunk(2, dim=-1)
    return q * cos + torch.cat((-b, a), dim=-1) * sin


def vocab(cap: float | None, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = F.linear(hidden, weight)
    if cap is not None:
        logits = torch.tanh(logits / cap) * cap
    return F.cross_entropy(logits.float(), labels)


def liger_norm() -> Function:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return lambda x, w: LigerRMSNormFunction.apply(x, w, 1e-6, 0.0, "llama", False)


def liger_layer_norm() -> Function:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, w, b: LigerLayerNormFunction.apply(x, w, b, 1e-5)


def liger_added_norm() -> Function:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return lambda x, r, w: LigerFusedAddRMSNormFunction.apply(x, r, w, 1e-6, 0.0, "llama", False)


def liger_glu() -> Function:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply


def liger_geglu() -> Function:
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    return LigerGELUMulFunction.apply


def liger_rope() -> Function:
    from liger_kernel.ops.rope import LigerRopeFunction

    # it rotates queries and keys in one call and in place: one key head keeps its extra work small
    def rotate(q: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return LigerRopeFunction.apply(q.clone(), q[:, :1].detach().clone(), cos[None], sin[None])[0]

    return rotate


def liger_vocab(cap: float | None) -> Function:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    def loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels, None, None, -100, 0.0, 0.0, "mean", cap)
        return found[0] if isinstance(found, tuple) else found

    return loss


def cut_cross_entropy(cap: float | None) -> Function:
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, softcap=cap)


def _random(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE).requires_grad_(grad)


def _tables(rows: int) -> torch.Tensor:
    """Angles repeat after half a row, as a model's do; Liger reads the first half only."""
    half = _random(rows, HEAD // 2, grad=False)
    return torch.cat((half, half), -1)


def _vocab_arguments(tokens: int, width: int, size: int, trained: bool) -> Arguments:
    weight = (_random(size, width, grad=False) / width**0.5).requires_grad_(trained)
    return _random(tokens, width), weight, torch.randint(size, (tokens,), device=DEVICE)


def _cases() -> dict[str, Case]:
    found = {}
    for rows, width in ROW_SIZES:
        size, at = rows * width * ITEM, f"{rows} x {width}"
        x, w = partial(_random, rows, width), partial(_random, width)
        found[f"rms_norm {at}"] = Case(norm, lambda x=x, w=w: (x(), w()), (2 * size, 3 * size), "TB/s", {"liger": liger_norm})
        found[f"layer_norm {at}"] = Case(
            layer_norm, lambda x=x, w=w: (x(), w(), w()), (2 * size, 3 * size), "TB/s", {"liger": liger_layer_norm}
        )
        found[f"add + rms_norm {at}"] = Case(
            added_norm, lambda x=x, w=w: (x(), x(), w()), (4 * size, 4 * size), "TB/s", {"liger": liger_added_norm}
        )
    for rows, width in GATED_SIZES:
        size, at, x = rows * width * ITEM, f"{rows} x {width}", partial(_random, rows, width)
        for name, function, peer in (("swiglu", glu, liger_glu), ("geglu", geglu, liger_geglu)):
            found[f"{name} {at}"] = Case(function, lambda x=x: (x(), x()), (3 * size, 5 * size), "TB/s", {"liger": peer})
    for rows in ROTATED_SIZES:
        size, tables = rows * HEADS * HEAD * ITEM, partial(_tables, rows)
        q = partial(_random, 1, HEADS, rows, HEAD)
        found[f"rope {rows} x {HEADS} x {HEAD}"] = Case(
            rope, lambda q=q, t=tables: (q(), t(), t()), (2 * size, 2 * size), "TB/s", {"liger": liger_rope}
        )
    for tokens, width, size, cap in VOCAB_SIZES:
        product = 2.0 * tokens * width * size
        peers = {"liger": partial(liger_vocab, cap), "cut-cross-entropy": partial(cut_cross_entropy, cap)}
        for trained in (False, True):
            what = f"{f', soft-cap {cap:.0f}' if cap else ''}{', weight trained' if trained else ''}"
            draw = partial(_vocab_arguments, tokens, width, size, trained)
            work = (product, 2 * product if trained else product)
            found[f"cross_entropy {tokens} x {width} x {size}{what}"] = Case(partial(vocab, cap), draw, work, "TFLOP/s", peers)
    return found


CASES = _cases()
_MODULES = {"liger": "liger_kernel", "cut-cross-entropy": "cut_cross_entropy"}


def implementation(case: Case, system: str) -> Function:
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


@cache  # long enough to overwrite that the processor has launched what follows before it ends
def _cache_sized() -> torch.Tensor:
    return torch.empty(2**30 if CUDA else 2**10, dtype=torch.int8, device=DEVICE)


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


def peak(work: Callable[[], Any], arguments: Arguments) -> float:
    """Bytes allocated at most while ``work`` runs, its arguments with them; 0 on a CPU."""
    if not CUDA:
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return float(torch.cuda.max_memory_allocated() - before + sum(x.nbytes for x in arguments))


@pytest.fixture(scope="module", autouse=True)
def limits(kernel_table: list[Row]) -> None:
    """What the machine does at best: a copy of 1 GiB and a square bf16 matmul (small ones on a CPU)."""
    size = 2**29 if CUDA else 2**20
    a, b = torch.empty(size, dtype=DTYPE, device=DEVICE), torch.empty(size, dtype=DTYPE, device=DEVICE)
    side = 8192 if CUDA else 256
    m, n = (torch.randn(side, side, dtype=DTYPE, device=DEVICE) for _ in range(2))
    kernel_table.append(Row("copy", "limit", "", seconds(lambda: b.copy_(a), 20), 2 * size * ITEM, "TB/s"))
    kernel_table.append(Row("matmul", "limit", "", seconds(lambda: m @ n, 20), 2 * side**3, "TFLOP/s"))
    for moved in {w for case in CASES.values() for w in case.work if case.unit == "TB/s"}:
        count = int(moved) // (2 * ITEM)
        copied = seconds(lambda count=count: b[:count].copy_(a[:count]), 20)
        kernel_table.append(Row("copy", "limit of its size", "", copied, moved, "TB/s"))


PAIRS = [(name, system) for name, case in CASES.items() for system in ("eager", "inductor", "sloth", *case.peers)]


@pytest.mark.parametrize(("name", "system"), PAIRS)
def test_kernel(benchmark: Any, kernel_table: list[Row], name: str, system: str) -> None:
    """Forward, backward and, for the loss (which may compute gradients in its forward), both."""
    case = CASES[name]
    torch.manual_seed(0)
    torch.compiler.reset()
    arguments = case.arguments()
    run = implementation(case, system)
    results, expected = (_tuple(f(*arguments)) for f in (run, case.plain))
    for result, other in zip(results, expected):
        atol = 2e-2 if system == "sloth" else max(2e-2, 2.0**-7 * float(other.detach().abs().max()))   # peers: a bf16 step at the largest
        torch.testing.assert_close(result, other, rtol=2e-2, atol=atol)
    del expected
    wrt = [x for x in arguments if x.requires_grad]
    upstream = [torch.randn_like(r) for r in results]

    def backward() -> Any:  # liger's overwrite what they saved: run again they take the same time, on other values
        return torch.autograd.grad(results, wrt, upstream, retain_graph=True)

    def forward() -> Any:
        return run(*arguments)

    def both() -> Any:
        return torch.autograd.grad(_tuple(run(*arguments)), wrt, upstream)

    passes = {"both": both} if case.unit == "TFLOP/s" else {"forward": forward, "backward": backward}
    for direction, work in passes.items():
        amount = sum(case.work) if direction == "both" else case.work[direction == "backward"]
        most = peak(work, arguments) if direction == "both" else 0.0
        kernel_table.append(Row(name, system, direction, seconds(work, 20 if CUDA else 3), amount, case.unit, most))
    benchmark.group = name
    benchmark.pedantic(lambda: (both(), synchronize()), rounds=5, warmup_rounds=1, setup=flush)


def _tuple(found: Any) -> tuple[torch.Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)
