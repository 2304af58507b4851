"""What a LoRA linear's forward costs by how base and adapter are summed, and whether an adapter's delta survives.

    python bench/joined.py                # bf16, the seven linears of an 8B Llama, 4,096 tokens, rank 16, on a CUDA device
    python bench/joined.py --device cpu --tokens 64

``alone``: the base product without an adapter. ``addmm``: the low-rank product first, the base accumulated onto it by the library's GEMM.
``fp32``: the base product in fp32, the low-rank product added, rounded after. ``joined``: one accumulator (slothc.kernels.joined).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from slothc.kernels.joined import joined

SHAPES = ((4096, 4096, 2), (1024, 4096, 2), (14336, 4096, 2), (4096, 14336, 1))       # out, in, how many in a layer
LAYERS, RANK = 32, 16


def milliseconds(call: Callable[[], object], device: str) -> float:
    if device == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=30, rep=200, return_mode="median"))
    call()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def ways(x: torch.Tensor, w: torch.Tensor, t: torch.Tensor, b: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    def wide() -> torch.Tensor:
        if x.is_cuda:
            return torch.addmm(torch.mm(x, w.t(), out_dtype=torch.float32), t, b.t(), out_dtype=torch.float32).to(x.dtype)
        return (x.float() @ w.float().t() + t.float() @ b.float().t()).to(x.dtype)

    return {
        "alone": lambda: torch.mm(x, w.t()), "addmm": lambda: torch.mm(t, b.t()).addmm_(x, w.t()), "fp32": wide,
        "joined": lambda: joined(t, b.t(), 1.0, x, w.t()),
    }  # fmt: skip


def survival(y: torch.Tensor, base: torch.Tensor, delta: torch.Tensor) -> float:
    """The share of the delta that is in y: its projection on delta, 1 where nothing is lost."""
    return float(((y.double() - base) * delta).sum() / delta.square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tokens", type=int, default=4096)
    a = parser.parse_args()
    torch.manual_seed(0)
    total: dict[str, float] = {}
    kept: dict[str, float] = {}
    print("| out x in | alone | addmm | fp32 | joined |\n| --- | --- | --- | --- | --- |")
    for out, width, count in SHAPES:
        made = {"device": a.device, "dtype": torch.bfloat16}
        x, w = torch.randn(a.tokens, width, **made), torch.randn(out, width, **made) * 0.02
        t, b = torch.randn(a.tokens, RANK, **made), torch.randn(out, RANK, **made) * 2e-4
        calls = ways(x, w, t, b)
        base, delta = torch.mm(x, w.t()).double(), t.double() @ b.double().t()
        spent = {name: milliseconds(call, a.device) for name, call in calls.items()}
        for name, ms in spent.items():
            total[name] = total.get(name, 0.0) + ms * count * LAYERS
            kept[name] = survival(calls[name](), base, delta)
        print(f"| {out} x {width} | " + " | ".join(f"{spent[n] * 1e3:.1f} us" for n in calls) + " |")
    print(f"| {LAYERS} layers | " + " | ".join(f"{ms:.1f} ms" for ms in total.values()) + " |")
    print("| share of a small delta that survives | " + " | ".join(f"{s:.2f}" for s in kept.values()) + " |")


if __name__ == "__main__":
    main()
